"""Labels as LLaVA's training code makes them, its known bugs included, for runs that compare.

It writes a conversation as one string, counts the ids of parts of that string, and masks as many.
So parts that have other ids inside the string than by themselves move the borders, and a message
that spells out a separator ends the count early. Where the count comes out wrong, the whole row is
ignored.

| routine  | templates              | known bugs                                              |
|----------|------------------------|---------------------------------------------------------|
| rounds   | v1, llama_2, mpt, and  | v1: ignores rows of several turns unless the vocabulary |
|          | those like them        | is Llama's; mpt: ignores most rows, shifts the others   |
| pieces   | v0 and those like it   | borders drift by an id in each turn                     |
| captions | plain, v0_plain        | none                                                    |

`Chat.conversation` masks by construction instead, which agrees with all rounds of v1 and llama_2
that are not ignored, and with captions.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from metamorph_jax.data.chat_templates import ChatTemplate, fill, render
from metamorph_jax.data.sources.base import IMAGE, Turn
from metamorph_jax.errors import BadSample

IGNORE = -100
PAD = 0  # that of Llama's tokenizer is `unk`; ids equal to it are not counted


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How the reference finds questions and answers in its string.

    Attributes:
        end: what rounds end with.
        border: between a question and its answer.
        start: ids before the first round.
        less: of the ids counted for a question and its border, how many it doesn't mask.
        later: ids added to the counts of later rounds, by whether the tokenizer is a legacy one.
        first: how many stretches that end with `end` are the first round; later ones have one
            less.
    """

    end: str
    border: str
    start: int
    less: int
    later: Mapping[bool, int]
    first: int = 1

    def of(self, text: str) -> list[str]:
        """The rounds of a text."""
        parts, n = text.split(self.end), max(self.first - 1, 1)
        later = range(self.first, len(parts), n)
        return [
            self.end.join(parts[: self.first]),
            *(self.end.join(parts[k : k + n]) for k in later),
        ]


_V1 = Rounds("</s>", " ASSISTANT: ", start=1, less=2, later={False: -1})
_LLAMA2 = Rounds("</s>", "[/INST] ", start=1, less=2, later={})
_CHATML = Rounds("<|im_end|>", "<|im_end|><|im_start|>assistant\n", start=0, less=1,
                 later={True: 1}, first=3)  # fmt: skip
ROUNDS = {
    **dict.fromkeys(("v1", "vicuna_v1", "llava_v1", "v1_mmtag"), _V1),
    **dict.fromkeys(("llama_2", "llava_llama_2", "mistral_instruct"), _LLAMA2),
    **dict.fromkeys(("mpt", "chatml_direct", "mistral_direct"), _CHATML),
}
PIECES = ("default", "v0", "llava_v0", "v0_mmtag")
CAPTIONS = ("plain", "v0_plain")
TEMPLATES = (*ROUNDS, *PIECES, *CAPTIONS)


@dataclasses.dataclass(frozen=True)
class OfficialMasks:
    """The masking routine of a template.

    Attributes:
        template: its row, as conversations for training are written; one of `TEMPLATES`.
        ids: the ids of a text by itself: BOS first, `<image>` as the sentinel, special tokens where
            they are spelled out.
        legacy: whether text after a special token gets a blank of its own.
        length: of a row, in ids (the reference's `model_max_length`).
    """

    template: ChatTemplate
    ids: Callable[[str], list[int]]
    legacy: bool
    length: int

    def __call__(self, turns: Sequence[Turn], system: str) -> tuple[np.ndarray, np.ndarray, str]:
        """(ids int32[n], labels int32[n], why the reference ignores the whole row, or "").

        Raises:
            BadSample: the reference would stop at this row.
        """
        name, image = self.template.name, any(IMAGE in text for _, text in turns)
        if name in CAPTIONS and (len(turns) != 2 or IMAGE not in turns[0][1]):
            raise BadSample("official_masks", f"{name} takes an image and its caption, no more")
        if name in CAPTIONS:  # of the question, only that there is an image is left
            turns = [("user", IMAGE), turns[1]]
        text = "".join(piece for piece, _ in render(self.template, turns, system))
        ids = np.array(self.ids(text), np.int32)
        if not image:  # rows with images are cut by the collator
            ids = ids[: self.length]
        labels, at = ids.copy(), None
        if name in CAPTIONS:
            labels[: self._count(IMAGE)] = IGNORE
        elif name in PIECES:
            self._mask_pieces(labels, turns, system)
        else:
            at = self._mask_rounds(labels, text)
        total = int((ids != PAD).sum())
        if at is None or at >= self.length or at == total:
            return ids, labels, ""
        return ids, np.full_like(labels, IGNORE), f"its parts have {at} ids, the whole has {total}"

    def _count(self, text: str) -> int:
        return len(self.ids(text))

    def _mask_rounds(self, labels: np.ndarray, text: str) -> int:
        """Masks all but the answers; returns how many ids were counted."""
        rules = ROUNDS[self.template.name]
        at = rules.start
        labels[:at] = IGNORE
        for k, part in enumerate(rules.of(text)):
            halves = part.split(rules.border)
            if not part or len(halves) != 2:
                break
            later = rules.later.get(self.legacy, 0) if k else 0
            asked = self._count(halves[0] + rules.border) - rules.less + later
            labels[at : at + asked] = IGNORE
            at += self._count(part) + later
        labels[at:] = IGNORE
        return at

    def _mask_pieces(self, labels: np.ndarray, turns: Sequence[Turn], system: str) -> None:
        """Masks the system message and the questions, but for the first two ids of each.

        Every piece is counted with a BOS of its own. The separator stands at its start.
        """
        at = self._count(f"{system}\n\n")
        labels[:at] = IGNORE
        for role, text in turns:
            text = text.replace(IMAGE, self.template.image)
            written = "".join(piece for piece, _ in fill(self.template.row(role), text))
            count = self._count("###" + written.removesuffix("###"))
            if role == "user":
                labels[at + 2 : at + count] = IGNORE
            at += count

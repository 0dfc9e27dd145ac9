"""Conversations as token ids and labels, by a template (`chat_templates.py`) and a tokenizer.

    llama3     <bos> <bos> [header user] \\n question <eot> [header assistant] \\n answer <eot> …
    chatml     [im_start] system \\n … [im_end] \\n [im_start] user \\n question [im_end] \\n …

Only the answer and the token that closes it are supervised. `<image>` in a text becomes
the markers of the recipe around a sentinel; `data/interleave.py` puts the image at the sentinel.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence

import numpy as np

from metamorph_jax.data.chat_templates import (
    TEMPLATES,
    ChatTemplate,
    Piece,
    Special,
    fill,
    render,
    split,
)
from metamorph_jax.data.sources.base import IMAGE, Turn

IGNORE = -100
SENTINEL = -200
START_TOKEN, END_TOKEN = "<image_start>", "<image_end>"  # names of markers in exported tokenizers
_LONG = 100_000  # characters of one message; longer ones would only be cut later
_SHORT = 32  # characters of a text that may well be a header


@dataclasses.dataclass(frozen=True)
class Markers:
    """Ids that stand before and after every image; either may be empty."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Encoded:
    """ids, labels int32[n]; turns int32[n] or None (0 = prefix, k = question and answer k)."""

    ids: np.ndarray
    labels: np.ndarray
    turns: np.ndarray | None = None


class Chat:
    """A template together with a tokenizer.

    Args:
        tokenizer: has `encode(text, add_special_tokens=False)` and `convert_tokens_to_ids(token)`.
        template: name in TEMPLATES, or a ChatTemplate.
        system: "default" keeps the template's own system message, "" leaves it out.
        single_bos: one BOS at the start of llama3 text. The reference writes two (one by the
            template, one by the tokenizer); weights trained by it have always seen two.
        markers: ids around every image.

    Attributes:
        close: id that ends an answer, or None.

    A message is tokenised together with the text before it, as one stretch. So a message that
    itself starts with a newline may merge with the one before it; then the merged token belongs to
    the header and is not supervised. An empty message writes the header and nothing else, not even
    the closing token. Both are what the reference does. (Where it loses count after an empty
    answer it drops the labels of the whole sample; here the other answers keep theirs.)
    """

    def __init__(
        self,
        tokenizer,
        template: str | ChatTemplate = "llama3",
        system: str = "default",
        single_bos: bool = False,
        markers: Markers = Markers(),
    ):
        if isinstance(template, str):
            if template not in TEMPLATES:
                raise ValueError(f"chat template {template!r}: expected one of {list(TEMPLATES)}")
            template = TEMPLATES[template]
        self.tokenizer, self.template, self.markers = tokenizer, template, markers
        self.system = template.default_system if system == "default" else (system or None)
        self._image = [*markers.before, SENTINEL, *markers.after]
        start = template.start[:1] if single_bos else template.start
        self._start = [self._special(token) for token in start]
        self._specials = {
            piece: self._special(piece)
            for role in ("system", "user", "assistant")
            for piece, _ in (*template.row(role), *template.row(role, first=True))
            if isinstance(piece, Special)
        }
        closing = [p for p, answer in template.assistant if answer and isinstance(p, Special)]
        self.close = self._specials[closing[-1]] if closing else None
        # Headers of turns, and beginnings of texts whose ids are only counted, come up repeatedly.
        self._repeated = functools.lru_cache(maxsize=1024)(self.encode)

    @classmethod
    def of(cls, tokenizer, row, markers: Markers = Markers()) -> "Chat":
        """The chat that a `RowConfig` describes."""
        return cls(tokenizer, row.template, row.system, row.single_bos, markers)

    def __reduce__(self):  # for worker processes
        system = self.system or ""
        single = len(self._start) < len(self.template.start)
        return Chat, (self.tokenizer, self.template, system, single, self.markers)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without anything added."""
        # The Rust tokenizer inside a transformers one gives the same ids in a fraction of the time,
        # as long as no truncation or padding is set.
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None and backend.truncation is None and backend.padding is None:
            return backend.encode(text, add_special_tokens=False).ids
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _special(self, token: str) -> int:
        id_ = self.tokenizer.convert_tokens_to_ids(str(token))
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if id_ is None or (id_ == unknown and token != getattr(self.tokenizer, "unk_token", None)):
            raise ValueError(
                f"the tokenizer has no token {str(token)!r}, which template "
                f"{self.template.name} needs"
            )
        return int(id_)

    def _write(self, ids: list[int], pieces: Iterable[Piece]) -> list[slice]:
        """Appends the ids of pieces; returns which of them are supervised.

        Neighbouring texts are tokenised as one stretch.
        """
        supervised: list[slice] = []
        stretch: list[Piece] = []
        before = ""  # special token directly before the stretch, if that matters

        def add(new: Sequence[int], answer: bool) -> None:
            if answer:
                supervised.append(slice(len(ids), len(ids) + len(new)))
            ids.extend(new)

        def finish() -> None:
            if stretch:
                for new, answer in self._stretch(before, stretch):
                    add(new, answer)
                stretch.clear()

        for piece, answer in pieces:
            if isinstance(piece, Special):
                finish()
                add((self._specials[piece],), answer)
                before = str(piece) if self.template.in_context else ""
                continue
            for k, text in enumerate(piece.split(IMAGE)):
                if k:
                    finish()
                    add(self._image, answer)
                    before = ""
                if text and stretch and stretch[-1][1] == answer:
                    stretch[-1] = (stretch[-1][0] + text, answer)
                elif text:
                    stretch.append((text, answer))
        finish()
        return supervised

    def _stretch(self, before: str, pieces: list[Piece]) -> list[tuple[list[int], bool]]:
        """(ids, supervised) of parts of a text that is tokenised as a whole, after `before`.

        A token that spans two pieces belongs to the first.
        """
        done = 1 if before else 0
        if len(pieces) == 1:
            text, supervised = pieces[0]
            encode = self._repeated if len(text) < _SHORT else self.encode
            return [(encode(before + text)[done:], supervised)]
        ids, parts = self.encode(before + "".join([text for text, _ in pieces])), []
        for text, supervised in pieces[:-1]:
            before += text
            end = max(done, min(len(self._repeated(before)), len(ids)))
            parts.append((ids[done:end], supervised))
            done = end
        return [*parts, (ids[done:], pieces[-1][1])]

    def conversation(self, turns: Sequence[Turn], independent: bool = False) -> Encoded:
        """ids and labels of a whole conversation.

        With `independent`, and images at the start of the first question, every question and
        answer stands by itself after start, user header and those images: the second question
        does not see the first answer (see `Encoded.turns`). Other conversations are encoded as
        without it, with turns None.
        """
        turns = [(role, text[:_LONG]) for role, text in turns]
        if independent and turns:
            lead, rest = _leading_images(turns[0][1])
            if lead and rest and len(turns) > 2 and len(turns) % 2 == 0:
                return self._independent(turns, lead, rest)
        ids = list(self._start)
        supervised = self._write(ids, render(self.template, turns, self.system))
        return _encoded(ids, supervised)

    def _independent(self, turns: Sequence[Turn], lead: str, rest: str) -> Encoded:
        first, of_all = self.template.row("user", first=True), self.system or ""
        opening, _ = split(first, lead, "", of_all)
        ids = list(self._start)
        self._write(ids, [*render(self.template, (), self.system), *opening])
        numbers, supervised = [0] * len(ids), []
        gap = rest[: len(rest) - len(rest.lstrip())]  # between the images and the question
        for k in range(0, len(turns), 2):
            question = rest if k == 0 else gap + turns[k][1].lstrip()
            _, asked = split(first, "", question, of_all)
            answer = fill(self.template.assistant, turns[k + 1][1])
            supervised += self._write(ids, [*asked, *answer])
            numbers += [k // 2 + 1] * (len(ids) - len(numbers))
        return dataclasses.replace(_encoded(ids, supervised), turns=np.array(numbers, np.int32))

    def prompt(self, turns: Sequence[Turn]) -> np.ndarray:
        """int32[n]: the turns, then the header of an answer that is still to come."""
        turns = [(role, text[:_LONG]) for role, text in turns]
        pieces = render(self.template, [*turns, ("assistant", "")], self.system)
        ids = list(self._start)
        self._write(ids, pieces)
        return np.array(ids, np.int32)

    def question(self, text: str, images: int = 0) -> np.ndarray:
        """int32[n]: prompt of one question, its images in front on a line of their own."""
        lead = IMAGE * images + "\n" if images else ""
        return self.prompt([("user", lead + text)])


def _encoded(ids: list[int], supervised: Iterable[slice]) -> Encoded:
    found = np.array(ids, np.int32)
    labels = np.full(len(ids), IGNORE, np.int32)
    for part in supervised:
        labels[part] = found[part]
    return Encoded(found, labels)


def _leading_images(text: str) -> tuple[str, str]:
    """Splits off the markers at the start of a message."""
    match = re.match(rf"(\s*{IMAGE})*", text)
    return text[: match.end()], text[match.end() :]

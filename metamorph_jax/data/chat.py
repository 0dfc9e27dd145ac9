"""Conversations as token ids and labels, by a template (`chat_templates.py`) and a tokenizer.

    llama3     <bos> <bos> [header user] \\n question <eot> [header assistant] \\n answer <eot> …
    chatml     [im_start] system \\n … [im_end] \\n [im_start] user \\n question [im_end] \\n …

Only the answer and the token that closes it are supervised. `<image>` in a text becomes
the markers of the recipe around a sentinel; `data/interleave.py` puts the image at the sentinel.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence

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
from metamorph_jax.errors import BadSample

IGNORE = -100
SENTINEL = -200
START_TOKEN, END_TOKEN = "<image_start>", "<image_end>"  # names of markers in exported tokenizers
LONGEST = 2_000_000  # characters of a conversation; a longer one is a file in the wrong place
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
        specials: special token of the template -> its id.

    Special tokens come from the template and the markers alone: where a message spells one out
    ("<|im_end|>"), it is text like any other.

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
        self.specials = {str(token): self._special(token) for token in template.start}
        self.specials |= {
            str(piece): self._special(piece)
            for role in ("system", "user", "assistant")
            for piece, _ in (*template.row(role), *template.row(role, first=True))
            if isinstance(piece, Special)
        }
        closing = [p for p, answer in template.assistant if answer and isinstance(p, Special)]
        self.close = self.specials[closing[-1]] if closing else None
        self._plain = _as_text(tokenizer)
        self._spelled = self._spelled_tokens()
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

    def encode(self, text: str, before: str = "") -> list[int]:
        """Ids of text in which nothing is a special token, as it stands after `before`.

        Args:
            text: of any content.
            before: a special token that is tokenised together with the text, for models whose
                tokenizer needs that; its id is not part of the result.
        """
        parts = [text] if self._spelled is None else self._spelled.split(text)
        if before:
            encode = lambda part: self._parsed(before + part)[1:]  # noqa: E731
        else:
            encode = self._plain or self._parsed
        return encode(parts[0]) if len(parts) == 1 else [i for part in parts for i in encode(part)]

    def _parsed(self, text: str) -> list[int]:
        """Ids of text in which special tokens that are spelled out become their ids."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _spelled_tokens(self) -> re.Pattern | None:
        """Where a text has to be cut so that the tokenizer does not see special tokens in it.

        These are the ones that it recognises although it was told not to. The cut comes after the
        first character of the token.
        """
        names = {*self.specials, START_TOKEN, END_TOKEN}
        plain = self._plain
        if plain is None or self.template.in_context:
            added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
            names |= {str(token) for token in added if token.special}
            plain = self._parsed
        names = [name for name in names if len(name) > 1 and len(plain(name)) == 1]
        cuts = "|".join(
            f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in sorted(names)
        )
        return re.compile(cuts) if cuts else None

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
                add((self.specials[piece],), answer)
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
        if len(pieces) == 1:
            text, supervised = pieces[0]
            encode = self._repeated if len(text) < _SHORT else self.encode
            return [(encode(text, before), supervised)]
        ids, parts = self.encode("".join([text for text, _ in pieces]), before), []
        done, so_far = 0, ""
        for text, supervised in pieces[:-1]:
            so_far += text
            end = max(done, min(len(self._repeated(so_far, before)), len(ids)))
            parts.append((ids[done:end], supervised))
            done = end
        return [*parts, (ids[done:], pieces[-1][1])]

    def conversation(self, turns: Sequence[Turn], independent: bool = False) -> Encoded:
        """ids and labels of a whole conversation.

        With `independent`, and images at the start of the first question, every question and
        answer stands by itself after start, user header and those images: the second question
        does not see the first answer (see `Encoded.turns`). Other conversations are encoded as
        without it, with turns None.

        Raises:
            BadSample: it has more than LONGEST characters.
        """
        characters = sum(len(text) for _, text in turns)
        if characters > LONGEST:
            raise BadSample("too_long", f"{characters} characters, at most {LONGEST}")
        system, turns = self._system_of(turns)
        if independent and turns:
            lead, rest = _leading_images(turns[0][1])
            if lead and rest and len(turns) > 2 and len(turns) % 2 == 0:
                return self._independent(system, turns, lead, rest)
        ids = list(self._start)
        supervised = self._write(ids, render(self.template, turns, system))
        return _encoded(ids, supervised)

    def _system_of(self, turns: Sequence[Turn]) -> tuple[str | None, Sequence[Turn]]:
        """(system message, the other turns): that of the conversation, else the chat's own."""
        if turns and turns[0][0] == "system":
            return turns[0][1], turns[1:]
        return self.system, turns

    def _independent(
        self, system: str | None, turns: Sequence[Turn], lead: str, rest: str
    ) -> Encoded:
        first, of_all = self.template.row("user", first=True), system or ""
        opening, _ = split(first, lead, "", of_all)
        ids = list(self._start)
        self._write(ids, [*render(self.template, (), system), *opening])
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
        system, turns = self._system_of(turns)
        pieces = render(self.template, [*turns, ("assistant", "")], system)
        ids = list(self._start)
        self._write(ids, pieces)
        return np.array(ids, np.int32)

    def next_prompt(self, text: str, closed: bool) -> np.ndarray:
        """int32[n]: what stands between an answer and the next one, of a conversation so far.

        Args:
            text: of the user's next turn.
            closed: whether the answer ended with the template's closing token.
        """
        row = self.template.row("assistant")
        _, after = split(row, "", "")
        specials = [k for k, (piece, _) in enumerate(after) if isinstance(piece, Special)]
        after = after[specials[-1] + 1 :] if closed and specials else after
        ids: list[int] = []
        user = fill(self.template.row("user"), text, self.system or "")
        self._write(ids, [*after, *user, *fill(row, "")])
        return np.array(ids, np.int32)

    def question(self, text: str, images: int = 0) -> np.ndarray:
        """int32[n]: prompt of one question, its images in front on a line of their own."""
        lead = IMAGE * images + "\n" if images else ""
        return self.prompt([("user", lead + text)])


def _as_text(tokenizer) -> Callable[[str], list[int]] | None:
    """The Rust tokenizer inside a transformers one, set to read special tokens as text.

    It is a copy, as the tokenizer itself is used elsewhere. Besides, it takes a fraction of the
    time of `tokenizer.encode`. None for other tokenizers.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    backend = type(backend).from_str(backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return lambda text: backend.encode(text, add_special_tokens=False).ids


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

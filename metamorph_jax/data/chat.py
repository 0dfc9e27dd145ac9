"""Conversations as token ids and labels, by a template (`chat_templates.py`) and a tokenizer.

    llama3     <bos> <bos> [header user] \\n question <eot> [header assistant] \\n answer <eot> …
    chatml     [im_start] system \\n … [im_end] \\n [im_start] user \\n question [im_end] \\n …

Only the answer and the token that closes it are supervised. `<image>` in a text becomes
the markers of the recipe around a sentinel; `data/interleave.py` puts the image at the sentinel.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np

from metamorph_jax.data import official_masks
from metamorph_jax.data.chat_templates import (
    BREAK,
    SOURCE,
    TEMPLATES,
    ChatTemplate,
    Piece,
    Special,
    fill,
    render,
    show_image_first,
    split,
)
from metamorph_jax.data.official_masks import OfficialMasks
from metamorph_jax.data.sources.base import IMAGE, Turn
from metamorph_jax.data.text_ids import TextIds
from metamorph_jax.errors import BadSample, ConfigError

IGNORE = -100
SENTINEL = -200
START_TOKEN, END_TOKEN = "<image_start>", "<image_end>"  # names of markers in exported tokenizers
LONGEST = 2_000_000  # characters of a conversation; a longer one is a file in the wrong place


@dataclasses.dataclass(frozen=True)
class Markers:
    """Ids that stand before and after every image; either may be empty."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Encoded:
    """ids, labels int32[n]; turns int32[n] or None (0 = prefix, k = question and answer k).

    `ignored` is why the reference learns nothing from this row (`official_masks`), or "".
    """

    ids: np.ndarray
    labels: np.ndarray
    turns: np.ndarray | None = None
    ignored: str = ""


class Chat:
    """A template together with a tokenizer.

    Args:
        tokenizer: has `encode(text, add_special_tokens=False)` and `convert_tokens_to_ids(token)`.
        template: name in TEMPLATES, or a ChatTemplate.
        system: "default" keeps the template's own system message, "" leaves it out.
        single_bos: one BOS at the start of llama3 text. The reference writes two (one by the
            template, one by the tokenizer); weights trained by it have always seen two.
        markers: ids around every image.
        official: make labels as LLaVA's code does, for rows of this many ids (`official_masks`); 0
            masks by construction.

    Attributes:
        bos: the BOS that conversations begin with, if the template and the tokenizer have one.
        eos: the EOS that they end with, or ().
        close: the special token that ends an answer, or None.
        stop: ids that end an answer when they come one after another; () where nothing
            but the tokenizer's EOS does.
        stops: all ways in which a model may write that: a text that begins with a blank also
            without it, which are other ids.
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
        official: int = 0,
    ):
        if isinstance(template, str):
            if template not in TEMPLATES:
                raise ValueError(f"chat template {template!r}: expected one of {list(TEMPLATES)}")
            template = TEMPLATES[template]
        self.tokenizer, self.template, self.markers = tokenizer, template, markers
        self._written, self._single_bos = template.training or template, single_bos
        self.system = template.default_system if system == "default" else (system or None)
        self._image = [*markers.before, SENTINEL, *markers.after]
        start = template.start[:1] if single_bos else template.start
        self._start = [self._special(token) for token in start]
        self.bos = _bos(tokenizer) if template.bos else ()
        self.eos = _eos(tokenizer, template) if template.eos else ()
        self._start += [self._special(token) for token in self.bos]
        self.specials = {str(token): self._special(token) for token in template.start}
        self.specials |= {
            str(piece): self._special(piece)
            for form in (template, self._written)
            for role in ("system", "user", "assistant")
            for piece, _ in (*form.row(role), *form.row(role, first=True))
            if isinstance(piece, Special)
        }
        self.specials |= {token: self._special(token) for token in self.eos}
        closing = (template.close,) if template.close else self.eos
        self.close = self.specials[closing[0]] if closing else None
        around = {self._name([id_]) for id_ in (*markers.before, *markers.after)}
        names = {*self.specials, START_TOKEN, END_TOKEN, *around}
        self._texts = TextIds(tokenizer, names, template.in_context)
        self.stop = (self.close,) if closing else ()
        if template.stop:
            self.stop = self._stop(template.stop)
        bare = self._stop(template.stop.lstrip(" ")) if template.stop else ()
        self.stops = tuple(dict.fromkeys(stop for stop in (self.stop, bare) if stop))
        self._after_image = self._name(markers.after[-1:]) if template.in_context else ""
        self._official = self._official_masks(official) if official else None

    @classmethod
    def of(cls, tokenizer, row, markers: Markers = Markers()) -> "Chat":
        """The chat that a `RowConfig` describes."""
        official = row.longest if row.official_masks else 0
        return cls(tokenizer, row.template, row.system, row.single_bos, markers, official)

    def __reduce__(self):  # for worker processes
        system, official = self.system or "", self._official.length if self._official else 0
        args = self.template, system, self._single_bos, self.markers, official
        return Chat, (self.tokenizer, *args)

    def encode(self, text: str, before: str = "") -> list[int]:
        """Ids of text in which nothing is a special token, see `TextIds`."""
        return self._texts(text, before)

    def _stop(self, text: str) -> tuple[int, ...]:
        """Ids of text after a word."""
        return tuple(self._texts.parts(["a", text])[1])

    def _special(self, token: str) -> int:
        id_ = self.tokenizer.convert_tokens_to_ids(str(token))
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if id_ is None or (id_ == unknown and token != getattr(self.tokenizer, "unk_token", None)):
            raise ValueError(
                f"the tokenizer has no token {str(token)!r}, which template "
                f"{self.template.name} needs"
            )
        return int(id_)

    def _official_masks(self, length: int) -> OfficialMasks:
        """The reference's masking, with its way to tokenise."""
        template, markers = self._written, self.markers
        if template.name not in official_masks.TEMPLATES:
            raise ConfigError(
                f"official_masks reproduces the labels of templates "
                f"{', '.join(official_masks.TEMPLATES)}, not of {template.name}"
            )
        names = [self._name([id_]) for id_ in (*markers.before, *markers.after)]
        if not all(names):
            raise ConfigError("official_masks needs a tokenizer that has the markers of images")
        before = "".join(names[: len(markers.before)])
        after = "".join(names[len(markers.before) :])
        image = template.image.replace(IMAGE, before + IMAGE + after)
        template = dataclasses.replace(template, image=image)
        parsed, start, close = self._texts.parsed, self._start, template.close
        legacy = bool(start and close and parsed(f"{close}a")[1:] == parsed("a"))

        def ids(text: str) -> list[int]:
            pieces = [parsed(piece) for piece in text.split(IMAGE)]
            joined = [i for piece in pieces for i in (SENTINEL, *piece)]
            return [*start, *joined[1:]]

        return OfficialMasks(template, ids, legacy, length)

    def _name(self, ids: Sequence[int]) -> str:
        """The token of an id; "" where the tokenizer has none, or can't tell."""
        convert = getattr(self.tokenizer, "convert_ids_to_tokens", None)
        names = convert(list(ids)) if ids and convert else []
        return "".join(name for name in names if name)

    def _write(self, ids: list[int], pieces: Iterable[Piece]) -> list[slice]:
        """Appends the ids of pieces; returns which of them are supervised.

        Neighbouring texts are tokenised as one stretch. A token that spans two of them belongs to
        the first.
        """
        supervised: list[slice] = []
        stretch: list[Piece] = []
        before = ""  # special token directly before the stretch, if that matters

        def add(new: Sequence[int], answer: bool) -> None:
            if answer:
                supervised.append(slice(len(ids), len(ids) + len(new)))
            ids.extend(new)

        def finish() -> None:
            if len(stretch) == 1:
                add(self._texts(stretch[0][0], before), stretch[0][1])
            elif stretch:
                parts = self._texts.parts([text for text, _ in stretch], before)
                for new, (_, answer) in zip(parts, stretch, strict=True):
                    add(new, answer)
            stretch.clear()

        for piece, answer in pieces:
            if isinstance(piece, Special):
                finish()
                if piece == BREAK:
                    before = ""
                    continue
                add((self.specials[piece],), answer)
                before = str(piece) if self.template.in_context else ""
                continue
            parts = piece.split(IMAGE)
            for k, text in enumerate(parts):
                if k:
                    if self.template.strip:
                        text = text.lstrip()
                        _strip_end(stretch)
                    finish()
                    add(self._image, answer)
                    before = self._after_image
                if text and stretch and stretch[-1][1] == answer:
                    stretch[-1] = (stretch[-1][0] + text, answer)
                elif text:
                    stretch.append((text, answer))
        finish()
        return supervised

    def conversation(self, turns: Sequence[Turn], independent: bool = False) -> Encoded:
        """ids and labels of a whole conversation.

        With `independent`, and images at the start of the first question, every question and
        answer stands by itself after start, user header and those images: the second question
        does not see the first answer (see `Encoded.turns`). Other conversations are encoded as
        without it, with turns None.

        Raises:
            BadSample: it has more than LONGEST characters, or doesn't fit the template.
        """
        characters = sum(len(text) for _, text in turns)
        if characters > LONGEST:
            raise BadSample("too_long", f"{characters} characters, at most {LONGEST}")
        system, turns = self._system_of(turns)
        if self._official is not None:
            ids, labels, ignored = self._official(turns, system or "")
            return Encoded(ids, labels, None, ignored)
        first = self._written.row("user", first=True)
        if independent and turns and any("{text}" in piece for piece, _ in first):
            lead, rest = _leading_images(turns[0][1])
            if lead and rest and len(turns) > 2 and len(turns) % 2 == 0:
                return self._independent(system, turns, lead, rest)
        ids = list(self._start)
        pieces = render(self._written, turns, system)
        pieces += [(Special(token), True) for token in self.eos]
        return _encoded(ids, self._write(ids, pieces))

    def _system_of(self, turns: Sequence[Turn]) -> tuple[str | None, Sequence[Turn]]:
        """(system message, the other turns): that of the conversation, else the chat's own."""
        if turns and turns[0][0] == "system":
            return turns[0][1], turns[1:]
        if turns and turns[0][0] == SOURCE:
            return None, turns
        return self.system, turns

    def _independent(
        self, system: str | None, turns: Sequence[Turn], lead: str, rest: str
    ) -> Encoded:
        template, of_all = self._written, system or ""
        first = template.row("user", first=True)
        lead, rest = (text.replace(IMAGE, template.image) for text in (lead, rest))
        opening, _ = split(first, lead, "", of_all)
        ids = list(self._start)
        self._write(ids, [*(fill(template.system, system) if system else ()), *opening])
        numbers, supervised = [0] * len(ids), []
        gap = rest[: len(rest) - len(rest.lstrip())]  # between the images and the question
        for k in range(0, len(turns), 2):
            question = rest if k == 0 else gap + turns[k][1].lstrip()
            _, asked = split(first, "", question, of_all)
            answer = fill(template.assistant, turns[k + 1][1])
            supervised += self._write(ids, [*asked, *answer])
            numbers += [k // 2 + 1] * (len(ids) - len(numbers))
        return dataclasses.replace(_encoded(ids, supervised), turns=np.array(numbers, np.int32))

    def prompt(self, turns: Sequence[Turn]) -> np.ndarray:
        """int32[n]: the turns, then the header of an answer that is still to come.

        Raises:
            BadSample: the template has no place for one of the turns.
        """
        system, turns = self._system_of(turns)
        if self._shows_image_apart(turns):
            turns = [*show_image_first(self.template, turns[0][1]), *turns[1:]]
        given = turns and turns[-1][0] == SOURCE
        turns = turns if given else [*turns, ("assistant", "")]
        ids = list(self._start)
        self._write(ids, render(self.template, turns, system))
        return np.array(ids, np.int32)

    def _shows_image_apart(self, turns: Sequence[Turn]) -> bool:
        """Whether the image of the first question is still to get a turn of its own."""
        reply = ("assistant", self.template.image_reply)
        one = bool(turns) and turns[0][1].count(IMAGE) == 1
        return bool(self.template.image_reply) and one and reply not in turns[1:2]

    def is_closed(self, ids: np.ndarray) -> bool:
        """Whether an answer, int32[n], ends with what ends answers (`stops`)."""
        last = np.asarray(ids).tolist()
        return any(tuple(last[-len(stop) :]) == stop for stop in self.stops)

    def next_prompt(self, text: str, closed: bool) -> np.ndarray:
        """int32[n]: what stands between an answer and the next one, of a conversation so far.

        Args:
            text: of the user's next turn.
            closed: whether the answer `is_closed`.

        Raises:
            ValueError: prompts of the template have one turn only.
        """
        row = self.template.row("assistant")
        if not row:
            raise ValueError(f"a prompt of chat template {self.template.name} is one message")
        _, after = split(row, "", "")
        specials = [k for k, (piece, _) in enumerate(after) if isinstance(piece, Special)]
        if closed and specials:
            after = after[specials[-1] + 1 :]
        elif closed:  # what closes it is a text, which decides how the next one begins
            (rest, _), *later = after
            stop = self.template.stop
            after = [(f"a{stop}", True), (rest.removeprefix(stop), False), *later]
        ids: list[int] = []
        text = self.template.with_images("user", text)
        user = fill(self.template.row("user"), text, self.system or "")
        learnt = self._write(ids, [*after, *user, *fill(row, "")])
        before = learnt[0].stop if closed and not specials else 0
        return np.array(ids[before:], np.int32)

    def question(self, text: str, images: int = 0) -> np.ndarray:
        """int32[n]: prompt of one question, its images in front on a line of their own."""
        lead = IMAGE * images + self.template.lead if images else ""
        return self.prompt([("user", lead + text)])


def _bos(tokenizer) -> tuple[str, ...]:
    """The BOS of a tokenizer that writes one before a text, else nothing."""
    bos = getattr(tokenizer, "bos_token_id", None)
    written = [] if bos is None else list(tokenizer.encode("", add_special_tokens=True))
    return (str(tokenizer.bos_token),) if written[:1] == [bos] else ()


def _eos(tokenizer, template: ChatTemplate) -> tuple[str, ...]:
    """The EOS of a tokenizer."""
    token = getattr(tokenizer, "eos_token", None)
    if token is None:
        raise ValueError(
            f"the tokenizer names no EOS (`eos_token`), which template {template.name} needs"
        )
    return (str(token),)


def _strip_end(stretch: list[Piece]) -> None:
    """Leaves out the blanks at the end of a stretch of texts, in place."""
    while stretch:
        text, answer = stretch[-1]
        if text := text.rstrip():
            stretch[-1] = (text, answer)
            return
        stretch.pop()


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

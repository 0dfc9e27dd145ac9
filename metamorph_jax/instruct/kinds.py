"""The kinds of instruction data: what a model is told, and how its reply becomes questions and
answers.

| kind           | is shown            | replies with                                              |
|----------------|---------------------|-----------------------------------------------------------|
| `conversation` | sentences           | several blocks "Question: … === Answer: … ==="            |
| `detail`       | sentences and boxes | a description; the question is one of ours                |
| `reasoning`    | sentences and boxes | one block "Question: … === Answer: … ==="                 |
| `captions`     | the image itself    | sentences, one a line; the first step for images without  |

A reply that is not as it should be is repaired where that is safe, or else refused with a reason.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable

from metamorph_jax import files
from metamorph_jax.data.sources.base import IMAGE, VIDEO, Turn
from metamorph_jax.errors import BadSample, ConfigError, FileError
from metamorph_jax.files import shown
from metamorph_jax.instruct import wordings

Pair = tuple[str, str]  # question and answer
_PROMPTS = pathlib.Path(__file__).with_name("prompts")
_SYSTEM = "system_message.txt"
_CAPS, _CONV = "_caps.txt", "_conv.txt"
MOST_CAPTIONS = 10

_MARKER = re.compile(  # `*+` never steps back: a long line of blanks takes no longer than others
    r"^[*_#> \t]*+(question|answer)[ \t]*+\d*+[*_]*+[ \t]*+[:：][*_]*+[ \t]*+", re.I | re.M
)
_SEPARATOR = re.compile(r"^[ \t]*={3,}[ \t]*$", re.M)
_FENCE = re.compile(r"\A\s*```\w*\n(.*)\n```\s*\Z", re.S)
# What betrays that the model was not looking at an image.
_LEAK = re.compile(
    r"\bcaption(s|ed)?\b|\bbounding[ -]?box(es)?\b|\[\s*\d?\.\d+\s*,|"
    r"\b(given|provided) (sentences|descriptions?|lists?|objects|coordinates)\b", re.I
)  # fmt: skip
_REFUSAL = re.compile(
    r"\bas an? (ai|artificial|language)\b|"
    r"\bI('m| am) (sorry|unable)\b.{0,60}\b(can('t|not)?|unable|not)\b|"
    r"\bI can('t|not) (help|assist|comply|process|(see|view) (the |this |that |any )?"
    r"(image|picture|photo)s?)\b", re.I
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What a reply holds.

    Attributes:
        pairs: questions with their answers; the question of a description is "".
        repaired: whether it was not exactly of the form that was asked for.
    """

    pairs: tuple[Pair, ...]
    repaired: bool = False


# ---- parsing


def _blocks(text: str, cut: bool) -> Parsed:
    """All blocks of a reply.

    Safe repairs: missing separators, markers that are bold or numbered or on the line of their
    text, a short introduction, and a last block that was cut off.
    """
    marks = list(_MARKER.finditer(text))
    if not marks:
        raise BadSample("no_blocks", 'the reply has no line "Question:"')
    introduction = _SEPARATOR.sub("", text[: marks[0].start()]).strip()
    if len(introduction) > 200:
        raise BadSample("odd_blocks", "there is a text before the first question")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    parts = [(m[1].lower(), text[m.end() : end]) for m, end in zip(marks, ends, strict=True)]
    if cut and not _ends_with_separator(parts[-1][1]):
        parts = parts[: -1 if parts[-1][0] == "question" else -2]
        if not parts:
            raise BadSample("cut_off", "the reply was cut off in its first block")
    expected = ["question", "answer"] * (len(parts) // 2 + 1)
    for number, (found, _) in enumerate(parts):
        if found != expected[number]:
            raise BadSample("odd_blocks", f"part {number + 1} is a second {found} in a row")
    if len(parts) % 2:
        raise BadSample("odd_blocks", "the last question has no answer")
    texts = [_without_separators(part, number) for number, (_, part) in enumerate(parts)]
    pairs = tuple(zip(texts[::2], texts[1::2], strict=True))
    return Parsed(pairs, repaired=written(pairs).strip() != text.strip())


def _ends_with_separator(text: str) -> bool:
    return _SEPARATOR.match(text.rstrip().rpartition("\n")[2]) is not None


def _without_separators(text: str, number: int) -> str:
    """The text of a part; separators may end it, and nothing may come after them."""
    before, *after = _SEPARATOR.split(text)
    if any(piece.strip() for piece in after):
        raise BadSample("odd_blocks", f"text after the separator of part {number + 1}")
    return before.strip()


def written(pairs: tuple[Pair, ...]) -> str:
    """Pairs in the form that models are asked for."""
    return "".join(f"Question:\n{q}\n===\nAnswer:\n{a}\n===\n" for q, a in pairs)


def _one_block(text: str, cut: bool) -> Parsed:
    found = _blocks(text, cut)
    if len(found.pairs) > 1:
        raise BadSample("odd_blocks", f"{len(found.pairs)} questions, expected one")
    return found


def _description(text: str, cut: bool) -> Parsed:
    if cut:
        raise BadSample("cut_off", "the description was cut off")
    if _MARKER.search(text):
        raise BadSample("odd_blocks", "a description is expected, not questions and answers")
    plain = _SEPARATOR.sub("", text).strip()
    return Parsed((("", plain),), repaired=plain != text.strip())


def _sentences(text: str, cut: bool) -> Parsed:
    """Captions: a line each; an introduction and marks in front of them are taken off."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    whole = lines[:-1] if cut else lines
    whole = whole[1:] if len(whole) > 1 and whole[0].endswith(":") else whole
    plain = [re.sub(r"^([-*•]|\d+[.):])\s+", "", line).strip('"“”') for line in whole]
    if not 1 <= len(plain) <= MOST_CAPTIONS:
        raise BadSample("no_captions", f"{len(plain)} lines, expected 1 to {MOST_CAPTIONS}")
    return Parsed(tuple(("", line) for line in plain), repaired=plain != lines)


# ---- kinds


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of data.

    Attributes:
        name: of it.
        boxes: whether places of objects are shown.
        form: reply, and whether it was cut off -> `Parsed`; BadSample if it is malformed.
        question: whether the reply holds the question, too.
    """

    name: str
    boxes: bool
    form: Callable[[str, bool], Parsed]
    question: bool = True

    def parse(self, text: str, cut: bool = False) -> Parsed:
        """The questions and answers in a reply.

        Args:
            text: of it.
            cut: whether the limit of tokens cut it off.

        Raises:
            BadSample: it can't be used: malformed, empty, a refusal, or it speaks of what only the
                writer was given (captions, boxes).
        """
        plain = text.replace("\r\n", "\n").replace("\r", "\n")
        fenced = _FENCE.match(plain)
        found = self.form(fenced[1] if fenced else plain, cut)
        for question, answer in found.pairs:
            if not answer or (self.question and not question):
                raise BadSample("empty", "a question or an answer is empty")
            for said in (question, answer):
                _refuse(said)
        return dataclasses.replace(found, repaired=found.repaired or fenced is not None)


def _refuse(said: str) -> None:
    if IMAGE in said or VIDEO in said:
        raise BadSample("marker", "it holds the marker of an image or a video")
    if leak := _LEAK.search(said):
        raise BadSample("leak", f"it says {shown(leak[0], 40)!r}")
    if refusal := _REFUSAL.search(said):
        raise BadSample("refusal", f"it says {shown(refusal[0], 80)!r}")


CAPTIONS = Kind("captions", False, _sentences, question=False)
KINDS = {
    kind.name: kind
    for kind in (
        Kind("conversation", False, _blocks),
        Kind("detail", True, _description, question=False),
        Kind("reasoning", True, _one_block),
        CAPTIONS,
    )
}


# ---- what the model is told


def opening(kind: Kind, folder: str | None = None) -> tuple[Turn, ...]:
    """The turns before the context: a system message, and pairs of an example and its reply.

    Args:
        kind: of data.
        folder: of the user's own files, named as ours in `prompts/KIND/`: `system_message.txt`
            (ours, if it is missing) and `NAME_caps.txt` with `NAME_conv.txt`.

    Raises:
        FileError: a file can't be read, or lacks its counterpart, or there are none.
        ConfigError: an example is one that would be refused as a reply.
    """
    if kind is CAPTIONS:
        return (("system", wordings.CAPTION_SYSTEM),)
    ours = _PROMPTS / kind.name
    place = pathlib.Path(folder) if folder else ours
    own = place / _SYSTEM
    system = own if own.exists() else ours / _SYSTEM
    examples = sorted(place.glob(f"*{_CAPS}"))
    answers = {file.name for file in place.glob(f"*{_CONV}")}
    wanted = {file.name.removesuffix(_CAPS) + _CONV for file in examples}
    for name in sorted(answers ^ wanted):
        other = name.removesuffix(_CONV) + _CAPS
        missing = other if name in answers else name
        raise FileError(f"{shown(place)} lacks {missing}: examples are pairs *{_CAPS}, *{_CONV}")
    if not examples and not own.exists():
        raise FileError(f"{shown(place)} holds neither {_SYSTEM} nor pairs *{_CAPS}, *{_CONV}")
    turns = [("system", files.read_text(system).strip())]
    for file in examples:
        reply = file.with_name(file.name.removesuffix(_CAPS) + _CONV)
        said = files.read_text(reply).strip()
        try:
            kind.parse(said)
        except BadSample as error:
            raise ConfigError(f"{shown(reply)} would be refused as a reply: {error}") from error
        turns += [("user", files.read_text(file).strip()), ("assistant", said)]
    return tuple(turns)

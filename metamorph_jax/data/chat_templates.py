"""How conversations are written: a table with a row for each template.

    render(TEMPLATES["chatml"], turns, system) -> [(text or special token, supervised), …]

A turn is a list of pieces, each with whether it is supervised: the answer and the token that closes
it. In a text, "{text}" stands for the message, "{images}" for the `<image>` markers of the message,
and "{system}" for the system message. Neighbouring texts are tokenised together.

Of a turn with an empty message, only the pieces before the one with "{text}" are written, as in the
reference; a prompt ends with such a turn of the assistant.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from metamorph_jax.data.sources.base import IMAGE, Turn


class Special(str):
    """A special token, by its name in the tokenizer."""

    __slots__ = ()


Piece = tuple[str, bool]  # (text or Special, whether it is supervised)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """One row of the table.

    Attributes:
        name: as `config.data.row.template` has it.
        start: tokens before everything, twice where the reference writes two.
        system, user, assistant: pieces of a turn.
        first_user: pieces of the first turn, where they differ ("{system}" may stand there).
        default_system: the system message if none is given; None writes no system turn.
        in_context: text after a special token is tokenised together with it. SentencePiece models
            begin a text of its own with a blank, but not one that follows a special token.
    """

    name: str
    user: tuple[Piece, ...]
    assistant: tuple[Piece, ...]
    system: tuple[Piece, ...] = ()
    first_user: tuple[Piece, ...] | None = None
    start: tuple[Special, ...] = ()
    default_system: str | None = None
    in_context: bool = False

    def row(self, role: str, first: bool = False) -> tuple[Piece, ...]:
        """The pieces of a turn by `role`."""
        if first and role == "user" and self.first_user is not None:
            return self.first_user
        return {"system": self.system, "user": self.user, "assistant": self.assistant}[role]


def fill(row: Sequence[Piece], text: str, system: str = "") -> Iterator[Piece]:
    """The pieces of one turn with its message put in."""
    images = IMAGE * text.count(IMAGE)
    for piece, supervised in row:
        if "{" not in piece or isinstance(piece, Special):
            yield piece, supervised
            continue
        if "{text}" in piece and not text:
            return
        # One pass: a message that holds "{system}" itself is left alone.
        parts = piece.split("{text}")
        parts = [p.replace("{images}", images).replace("{system}", system) for p in parts]
        yield text.join(parts), supervised


def render(template: ChatTemplate, turns: Sequence[Turn], system: str | None) -> list[Piece]:
    """A whole conversation; the start tokens are not part of it."""
    pieces = list(fill(template.system, system)) if system else []
    for k, (role, text) in enumerate(turns):
        pieces += fill(template.row(role, k == 0), text, system or "")
    return pieces


def split(
    row: Sequence[Piece], lead: str, rest: str, system: str = ""
) -> tuple[list[Piece], list[Piece]]:
    """The pieces of a turn whose message is `lead + rest`, cut between the two."""
    before: list[Piece] = []
    for k, (piece, supervised) in enumerate(row):
        if not isinstance(piece, Special) and "{text}" in piece:
            head, tail = (p.replace("{system}", system) for p in piece.split("{text}"))
            after = [(rest + tail, supervised), *row[k + 1 :]]
            return [*before, (head + lead, supervised)], after
        before.append((piece, supervised))
    return before, []


def _roles(turn) -> dict[str, tuple[Piece, ...]]:
    """The rows of all three roles where they differ in the role's name only."""
    return {role: turn(role, role == "assistant") for role in ("system", "user", "assistant")}


def _llama3(role: str, answer: bool) -> tuple[Piece, ...]:
    return (
        (Special("<|start_header_id|>"), False),
        (role, False),
        (Special("<|end_header_id|>"), False),
        ("\n", False),
        ("{text}", answer),
        (Special("<|eot_id|>"), answer),
    )


def _chatml(role: str, answer: bool) -> tuple[Piece, ...]:
    return (
        (Special("<|im_start|>"), False),
        (f"{role}\n", False),
        ("{text}", answer),
        (Special("<|im_end|>"), answer),
        ("\n", False),
    )


_SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

TEMPLATES = {
    template.name: template
    for template in (
        ChatTemplate("llama3", **_roles(_llama3), start=2 * (Special("<|begin_of_text|>"),)),
        ChatTemplate("chatml", **_roles(_chatml)),
        ChatTemplate("smollm2", **_roles(_chatml), default_system=_SMOLLM2),
        ChatTemplate("qwen", **_roles(_chatml), default_system=_QWEN),
    )
}

"""How conversations are written: a table with a row for each template.

    render(TEMPLATES["chatml"], turns, system) -> [(text or special token, supervised), …]

A turn is a list of pieces, each with whether it is supervised: the answer and what closes it. In a
text, "{text}" stands for the message, "{images}" for the `<image>` markers of the message, and
"{system}" for the system message; a piece with "{system}" and without "{text}" is left out where
there is none. Neighbouring texts are tokenised together.

Of a turn with an empty message, only the pieces before the one with "{text}" are written, as in the
reference; a prompt ends with such a turn of the assistant.

Turns by `SOURCE` and `TARGET` are written as they are, whatever the template: what is given, and
what is learnt, of data that has a wording of its own. The two are tokenised separately.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from metamorph_jax.data import system_messages as messages
from metamorph_jax.data.sources.base import IMAGE, Turn
from metamorph_jax.errors import BadSample


class Special(str):
    """A special token, by its name in the tokenizer."""

    __slots__ = ()


Piece = tuple[str, bool]  # (text or Special, whether it is supervised)
BREAK = Special("")  # texts before and after it are tokenised separately
SOURCE, TARGET = "source", "target"


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """One row of the table.

    Attributes:
        name: as `config.data.row.template` has it.
        start: tokens before everything, twice where the reference writes two.
        bos: begin with the BOS of the tokenizer, if it is one that writes a BOS.
        eos: a conversation to train on ends with the EOS of the tokenizer, supervised.
        system, user, assistant: pieces of a turn; () for a role that has no place in it.
        first_user: pieces of the first turn, where they differ ("{system}" may stand there).
        default_system: the system message if none is given; None writes no system turn.
        preset: turns that always come first.
        in_context: text after a special token is tokenised together with it. SentencePiece models
            begin a text of its own with a blank, but not one that follows a special token.
        bare_turns: a turn with an empty message is written by its beginning; otherwise not at all.
        image: how an image is written in a message, around its marker.
        answer_image: likewise in a message of the assistant; None: as `image`.
        strip: blanks beside an image are left out, as the slow tokenizers of transformers did
            around added tokens (before 4.34), of which one stands for the image.
        image_reply: prompts show the image of the first question in a turn of its own, which the
            assistant answers so.
        lead: what stands between a question and the images before it, where a prompt says nothing.
        end: text after the last turn.
        stop: text that ends an answer where no special token does, in prompts.
        training: how conversations are written for training, where that differs from prompts.
    """

    name: str
    user: tuple[Piece, ...]
    assistant: tuple[Piece, ...]
    system: tuple[Piece, ...] = ()
    first_user: tuple[Piece, ...] | None = None
    start: tuple[Special, ...] = ()
    bos: bool = False
    eos: bool = False
    default_system: str | None = None
    preset: tuple[Turn, ...] = ()
    in_context: bool = False
    bare_turns: bool = True
    image: str = IMAGE
    answer_image: str | None = None
    strip: bool = False
    image_reply: str = ""
    lead: str = "\n"
    end: str = ""
    stop: str = ""
    training: "ChatTemplate | None" = None

    def row(self, role: str, first: bool = False) -> tuple[Piece, ...]:
        """The pieces of a turn by `role`."""
        if first and role == "user" and self.first_user is not None:
            return self.first_user
        return {
            "system": self.system,
            "user": self.user,
            "assistant": self.assistant,
            SOURCE: (("{text}", False),),
            TARGET: ((BREAK, False), ("{text}", True)),
        }[role]

    def with_images(self, role: str, text: str) -> str:
        """A message with what stands around its images."""
        if role in (SOURCE, TARGET):
            return text
        own = self.answer_image if role == "assistant" else None
        return text.replace(IMAGE, self.image if own is None else own)

    @property
    def close(self) -> Special | None:
        """The special token that ends an answer, or None."""
        closing = [p for p, answer in self.assistant if answer and isinstance(p, Special)]
        return closing[-1] if closing else None


def fill(row: Sequence[Piece], text: str, system: str = "") -> Iterator[Piece]:
    """The pieces of one turn with its message put in."""
    images = IMAGE * text.count(IMAGE)
    for piece, supervised in row:
        if "{" not in piece or isinstance(piece, Special):
            yield piece, supervised
            continue
        if "{text}" in piece and not text:
            return
        if needs_system(piece) and not system:
            continue
        # One pass: a message that holds "{system}" itself is left alone.
        parts = piece.split("{text}")
        parts = [p.replace("{images}", images).replace("{system}", system) for p in parts]
        yield text.join(parts), supervised


def needs_system(piece: str) -> bool:
    """Whether a piece is left out without a system message."""
    return "{system}" in piece and "{text}" not in piece


def render(template: ChatTemplate, turns: Sequence[Turn], system: str | None) -> list[Piece]:
    """A whole conversation; the start tokens are not part of it.

    Raises:
        BadSample: a message has no place in this template, or has to be there and is not.
    """
    in_first = any("{system}" in piece for piece, _ in template.row("user", first=True))
    if system and not (template.system or in_first):
        raise _misfit(template, "has no place for a system message")
    pieces = list(fill(template.system, system)) if system else []
    for k, (role, text) in enumerate((*template.preset, *turns)):
        row = template.row(role, k == 0)
        if text and not row:
            raise _misfit(template, f"has no place for a turn by {role}")
        if not (text or template.bare_turns or k):
            raise _misfit(template, "can't begin with an empty message")
        if text or template.bare_turns:
            pieces += fill(row, template.with_images(role, text), system or "")
    return [*pieces, (template.end, False)] if template.end else pieces


def _misfit(template: ChatTemplate, what: str) -> BadSample:
    return BadSample("template_misfit", f"chat template {template.name} {what}")


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
        if isinstance(piece, Special):
            before.append((piece, supervised))
        elif system or not needs_system(piece):
            before.append((piece.replace("{system}", system), supervised))
    return before, []


def show_image_first(template: ChatTemplate, text: str) -> list[Turn]:
    """The turns of a prompt whose question, `text`, comes with an image.

    The image goes to the front; markers in the text are dropped. Templates with preset turns leave
    the question as it is. This is how the reference's demo and its evaluations ask.
    """
    if template.preset:
        return [("user", text)]
    rest = text.replace(IMAGE, "").strip()
    if template.image_reply:
        return [("user", IMAGE), ("assistant", template.image_reply), ("user", rest)]
    return [("user", f"{IMAGE}\n{rest}")]


# ---- rows


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
    return (*_chatml_in_line(role, answer), ("\n", False))


def _chatml_in_line(role: str, answer: bool) -> tuple[Piece, ...]:
    return (
        (Special("<|im_start|>"), False),
        (f"{role}\n", False),
        ("{text}", answer),
        (Special("<|im_end|>"), answer),
    )


def _short(name: str) -> ChatTemplate:
    """ChatML without roles: three tokens beside question and answer, in place of ten. For small
    models, where the template would be half of what they are trained on."""
    return ChatTemplate(
        name,
        user=((Special("<|im_start|>"), False), ("{text}\n", False)),
        assistant=(("{text}", True), (Special("<|im_end|>"), True)),
    )


def _in_line(name: str, system: str) -> ChatTemplate:
    """ChatML without line breaks between turns."""
    rows = _roles(_chatml_in_line)
    return ChatTemplate(name, **rows, bos=True, in_context=True, default_system=system)


# Of the two ways to tag images, text only: these tags are no tokens.
_TAGGED = {"image": f"<Image>{IMAGE}</Image>", "image_reply": "Received."}


def _vicuna(name: str, system: str, **options) -> ChatTemplate:
    """SYSTEM USER: … ASSISTANT: …</s>USER: … ASSISTANT: …</s>"""
    return ChatTemplate(
        name,
        system=(("{text} ", False),),
        user=(("USER:", False), (" {text} ", False)),
        assistant=(("ASSISTANT:", False), (" {text}", True), (Special("</s>"), True)),
        bos=True,
        in_context=True,
        default_system=system,
        **options,
    )


def _hashes(name: str, system: str, **options) -> ChatTemplate:
    """SYSTEM###Human: …###Assistant: …###, and with line breaks where it is trained."""
    training = ChatTemplate(
        name,
        system=(("{text}\n\n###", False),),
        user=((" Human:", False), (" {text}\n###", False)),
        assistant=((" Assistant:", False), (" {text}\n###", True)),
        bos=True,
        default_system=system,
        image=options.get("image", IMAGE),
        end=" ",
    )
    return ChatTemplate(
        name,
        system=(("{text}###", False),),
        user=(("Human:", False), (" {text}###", False)),
        assistant=(("Assistant:", False), (" {text}###", True)),
        bos=True,
        default_system=system,
        stop="###",
        training=training,
        **options,
    )


def _voken(name: str, system: str) -> ChatTemplate:
    """SYSTEM ###Human: … ###Assistant: … ###Human: … ###Assistant: … ###

    An image that is read stands between tags; one that is drawn does not.
    """
    return ChatTemplate(
        name,
        system=(("{text} ", False),),
        first_user=(("###Human:", False), (" {text} ", False)),
        user=(("Human:", False), (" {text} ", False)),
        assistant=(("###Assistant:", False), (" {text} ###", True)),
        bos=True,
        default_system=system,
        image=f"<Img>{IMAGE}</Img>",
        answer_image=IMAGE,
        strip=True,
        lead=" ",
        stop=" ###",
    )


def _instruct(name: str, system: str, begin: tuple[Piece, ...]) -> ChatTemplate:
    """[INST] <<SYS>> SYSTEM <</SYS>> … [/INST] … </s><s>[INST] … [/INST]"""
    question = ("{text} [/INST]", False)
    return ChatTemplate(
        name,
        user=(*begin, ("[INST] ", False), question),
        first_user=(("[INST] ", False), ("<<SYS>>\n{system}\n<</SYS>>\n\n", False), question),
        assistant=((" {text} ", True), (Special("</s>"), True)),
        bos=True,
        in_context=True,
        bare_turns=False,
        default_system=system,
    )


def _captions(name: str) -> ChatTemplate:
    """The image and its caption, whatever was asked; a prompt is one message."""
    training = ChatTemplate(
        name, user=(("{images}", False),), assistant=(("{text}\n", True),), bos=True
    )
    return ChatTemplate(
        name, user=(("{text}\n", False),), assistant=(), bos=True, stop="\n", training=training
    )


def _document(name: str) -> ChatTemplate:
    """Text and images as they are: the user's part is given, the assistant's is learnt."""
    user, assistant = (("{text}", False),), (("{text}", True),)
    return ChatTemplate(name, user=user, assistant=assistant, bos=True, eos=True, lead="")


_NEXT = ((Special("<s>"), False),)

TEMPLATES = {
    template.name: template
    for template in (
        ChatTemplate("llama3", **_roles(_llama3), start=2 * (Special("<|begin_of_text|>"),)),
        ChatTemplate("chatml", **_roles(_chatml)),
        _short("chatml_short"),
        ChatTemplate("smollm2", **_roles(_chatml), default_system=messages.SMOLLM2),
        ChatTemplate("qwen", **_roles(_chatml), default_system=messages.QWEN),
        _vicuna("v1", messages.VICUNA),
        _vicuna("vicuna_v1", messages.VICUNA),
        _vicuna("llava_v1", messages.VICUNA_HUMAN),
        _vicuna("v1_mmtag", messages.IMAGE_TAGS, **_TAGGED),
        _hashes("default", messages.VICUNA_HUMAN, preset=messages.ENERGY),
        _hashes("v0", messages.VICUNA_HUMAN, preset=messages.ENERGY),
        _hashes("llava_v0", messages.VICUNA_HUMAN),
        _hashes("v0_mmtag", messages.IMAGE_TAGS, **_TAGGED),
        _instruct("llama_2", messages.LLAMA2, _NEXT),
        _instruct("llava_llama_2", messages.LLAMA2_VISION, _NEXT),
        _instruct("mistral_instruct", "", ()),
        _captions("plain"),
        _captions("v0_plain"),
        _document("document"),
        _voken("vokens", messages.IMG_TAGS),
        _in_line("mpt", messages.MPT),
        _in_line("chatml_direct", messages.ANSWER),
        _in_line("mistral_direct", messages.ANSWER),
    )
}

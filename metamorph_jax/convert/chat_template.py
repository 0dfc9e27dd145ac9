"""Our chat templates as the Jinja templates that transformers' tokenizers carry.

`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` then gives the ids of
`Chat.prompt`, with the system turn (or none) and the start tokens that the model was trained with.
Templates with a form of their own for training are written as their prompts are.
"""

import ast
import re
from collections.abc import Iterator, Sequence

from metamorph_jax.data.chat import Chat
from metamorph_jax.data.chat_templates import TEMPLATES, ChatTemplate, Piece, Special, needs_system
from metamorph_jax.data.sources.base import IMAGE, Turn

_ROLES = "the roles of this template are system (first), user and assistant"
_SLOTS = re.compile(r"(\{(?:text|images|system)\})")


def to_jinja(chat: Chat, single_bos: bool = False) -> str:
    """The Jinja template that writes conversations as this chat does."""
    template = chat.template
    start = [*(template.start[:1] if single_bos else template.start), *_bos(chat)]
    bare = template.bare_turns
    later, first = _row(template.user, bare), _row(template.row("user", first=True), bare)
    user = later if later == first else f"{_if('loop.first')}{first}{_ELSE}{later}{_END}"
    none = f"{template.name} has no place for an answer"
    answer = _row(template.assistant, bare) or _if("text") + _raise(none) + _END
    lines = [
        f"{{%- set system = {_literal(chat.system or '')} -%}}",
        "{%- set turns = messages -%}",
        _if('messages and messages[0]["role"] == "system"'),
        '{%- set system = messages[0]["content"] -%}',
        "{%- set turns = messages[1:] -%}",
        _END,
        *_preset(template.preset),
        *(_put(_literal(token)) for token in start),
        _if("system") + "{%- set text = system -%}" + _row(template.system) + _END,
        "{%- for message in turns -%}",
        f"{{%- set text = {_content(template)} -%}}",
        _if('message["role"] == "user"') + user,
        '{%- elif message["role"] == "assistant" -%}' + answer,
        _ELSE + _raise(_ROLES) + _END,
        "{%- endfor -%}",
        _if("add_generation_prompt") + "".join(_header(template.assistant)) + _END,
    ]
    return "\n".join(lines)


_SYSTEM = re.compile(r'\{%- set system = ("(?:[^"\\]|\\.)*") -%\}\n')


def recognised(tokenizer) -> dict | None:
    """The fields of a `RowConfig` that `to_jinja` wrote into this tokenizer; None if none did.

    Returns:
        template, system and single_bos, so that the model is asked as it was trained.
    """
    written = getattr(tokenizer, "chat_template", None)
    found = _SYSTEM.match(written) if isinstance(written, str) else None
    if found is None:
        return None
    system = ast.literal_eval(found[1])
    for name, single_bos in ((name, single) for name in TEMPLATES for single in (False, True)):
        try:
            chat = Chat(tokenizer, name, system, single_bos)
        except ValueError:  # the tokenizer lacks one of the template's tokens
            continue
        if to_jinja(chat, single_bos) == written:
            usual = system == (TEMPLATES[name].default_system or "")
            return {"template": name, "system": "default" if usual else system,
                    "single_bos": single_bos}  # fmt: skip
    return None


_ELSE, _END = "{%- else -%}", "{%- endif -%}"


def _if(condition: str) -> str:
    return f"{{%- if {condition} -%}}"


def _put(expression: str) -> str:
    return f"{{{{- {expression} -}}}}"


def _bos(chat: Chat) -> Iterator[str]:
    """The BOS, and a blank where a text that begins has one, but not if `<s>` is spelled out."""
    yield from chat.bos
    first = (*chat.template.system, *chat.template.row("user", first=True))[0][0]
    for bos in chat.bos if not isinstance(first, Special) else ():
        encode = lambda text: list(chat.tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
        yield "" if encode(f"{bos}a")[1:] == encode("a") else " "


def _raise(message: str) -> str:
    return _put(f"raise_exception({_literal(message)})")


def _preset(turns: Sequence[Turn]) -> Iterator[str]:
    """Puts the turns that always come first before the others."""
    if turns:
        objects = ", ".join(
            f'{{"role": {_literal(role)}, "content": {_literal(text)}}}' for role, text in turns
        )
        yield f"{{%- set turns = [{objects}] + turns -%}}"


def _content(template: ChatTemplate) -> str:
    """The message of a turn, with what stands around its images."""
    content = 'message["content"]'
    if template.image == IMAGE:
        return content
    tagged = f"{content} | replace({_literal(IMAGE)}, {_literal(template.image)})"
    if template.answer_image is None:
        return tagged
    return f'({tagged}) if message["role"] != "assistant" else {content}'


def _literal(text: str) -> str:
    """A Jinja string; its escapes are Python's."""
    return '"' + text.encode("unicode_escape").decode("ascii").replace('"', r"\"") + '"'


def _header(row: Sequence[Piece]) -> Iterator[str]:
    """The pieces of a turn before its message."""
    for piece, _ in row:
        if not isinstance(piece, Special) and "{text}" in piece:
            return
        yield _written(piece)


def _row(row: Sequence[Piece], bare: bool = True) -> str:
    """A turn whose message is `text`; of one with an empty message, the header, if it is `bare`."""
    header = list(_header(row))
    rest = [_written(piece) for piece, _ in row[len(header) :]]
    if not bare:
        return "".join([_if("text"), *header, *rest, _END])
    return "".join([*header, _if("text"), *rest, _END] if rest else header)


def _written(piece: str) -> str:
    """A piece; one that needs a system message, only if there is one."""
    put = _put(_expression(piece))
    left_out = not isinstance(piece, Special) and needs_system(piece)
    return _if("system") + put + _END if left_out else put


def _expression(piece: str) -> str:
    if isinstance(piece, Special):
        return _literal(piece)
    marker = _literal(IMAGE)
    slots = {
        "{text}": "text",
        "{system}": "system",
        "{images}": f"{marker} * (text.split({marker}) | length - 1)",
    }
    parts = [part for part in _SLOTS.split(piece) if part]
    return " ~ ".join(f"({slots[p]})" if p in slots else _literal(p) for p in parts) or '""'

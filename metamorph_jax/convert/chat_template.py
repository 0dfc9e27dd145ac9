"""Our chat templates as the Jinja templates that transformers' tokenizers carry.

`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` then gives the ids of
`Chat.prompt`, with the system turn (or none) and the start tokens that the model was trained with.
"""

import re
from collections.abc import Iterator, Sequence

from metamorph_jax.data.chat import Chat
from metamorph_jax.data.chat_templates import Piece, Special
from metamorph_jax.data.sources.base import IMAGE

_ROLES = "the roles of this template are system (first), user and assistant"
_SLOTS = re.compile(r"(\{(?:text|images|system)\})")


def to_jinja(chat: Chat, single_bos: bool = False) -> str:
    """The Jinja template that writes conversations as this chat does."""
    template = chat.template
    start = template.start[:1] if single_bos else template.start
    later, first = _row(template.row("user")), _row(template.row("user", first=True))
    user = later if later == first else f"{_if('loop.first')}{first}{_ELSE}{later}{_END}"
    lines = [
        f"{{%- set system = {_literal(chat.system or '')} -%}}",
        "{%- set turns = messages -%}",
        _if('messages and messages[0]["role"] == "system"'),
        '{%- set system = messages[0]["content"] -%}',
        "{%- set turns = messages[1:] -%}",
        _END,
        *(_put(_literal(token)) for token in start),
        _if("system") + "{%- set text = system -%}" + _row(template.system) + _END,
        "{%- for message in turns -%}",
        '{%- set text = message["content"] -%}',
        _if('message["role"] == "user"') + user,
        '{%- elif message["role"] == "assistant" -%}' + _row(template.assistant),
        _ELSE + _put(f"raise_exception({_literal(_ROLES)})") + _END,
        "{%- endfor -%}",
        _if("add_generation_prompt") + "".join(_header(template.assistant)) + _END,
    ]
    return "\n".join(lines)


_ELSE, _END = "{%- else -%}", "{%- endif -%}"


def _if(condition: str) -> str:
    return f"{{%- if {condition} -%}}"


def _put(expression: str) -> str:
    return f"{{{{- {expression} -}}}}"


def _literal(text: str) -> str:
    """A Jinja string; its escapes are Python's."""
    return '"' + text.encode("unicode_escape").decode("ascii").replace('"', r"\"") + '"'


def _header(row: Sequence[Piece]) -> Iterator[str]:
    """The pieces of a turn before its message."""
    for piece, _ in row:
        if not isinstance(piece, Special) and "{text}" in piece:
            return
        yield _put(_expression(piece))


def _row(row: Sequence[Piece]) -> str:
    """A turn whose message is `text`; of one with an empty message, the header alone."""
    header = list(_header(row))
    rest = [_put(_expression(piece)) for piece, _ in row[len(header) :]]
    return "".join([*header, _if("text"), *rest, _END] if rest else header)


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

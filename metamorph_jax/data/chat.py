"""Conversations as token ids and labels, built turn by turn.

    llama3     <bos> <bos> [header user] \\n question <eot> [header assistant] \\n answer <eot> …
    chatml     [im_start] system \\n … [im_end] \\n [im_start] user \\n question [im_end] \\n …

Supervised are the answer and the token that closes it, nothing else. `<image>` in a text becomes
start token, sentinel, end token; `data/interleave.py` puts the picture at the sentinel.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from metamorph_jax.data.sources.base import IMAGE, Turn

IGNORE = -100
SENTINEL = -200
START_TOKEN, END_TOKEN = "<image_start>", "<image_end>"
_LONG = 100_000  # characters of one message; longer ones would only be cut again


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How turns are written.

    A turn is `header` (special tokens; "{role}" stands for its text), then one stretch of ordinary
    text `lead + message`, then `close`. Names in angle brackets are single tokens.

    Attributes:
        bos: token that starts the text, or None.
        header: pieces before the lead; each is one special token, or text holding "{role}".
        lead: text between header and message; "{role}" allowed.
        close: token after a message.
        after: text after `close`, never supervised.
        system: default system message, or None for no system turn.
    """

    name: str
    bos: str | None
    header: tuple[str, ...]
    lead: str
    close: str
    after: str = ""
    system: str | None = None


LLAMA3 = ChatTemplate(
    "llama3",
    "<|begin_of_text|>",
    ("<|start_header_id|>", "{role}", "<|end_header_id|>"),
    "\n",
    "<|eot_id|>",
)
CHATML = ChatTemplate("chatml", None, ("<|im_start|>",), "{role}\n", "<|im_end|>", "\n")
SMOLLM2 = dataclasses.replace(
    CHATML,
    name="smollm2",
    system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
)
QWEN = dataclasses.replace(
    CHATML,
    name="qwen",
    system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
)
TEMPLATES = {t.name: t for t in (LLAMA3, CHATML, SMOLLM2, QWEN)}


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
        image_start, image_end: ids of the picture tokens. Default: the tokenizer's, or the two
            ids behind its last one, where models append the rows.

    A message is tokenised together with the newline before it, as one stretch of text. So a
    message that itself starts with a newline may merge with it; then the merged token belongs to
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
        image_start: int | None = None,
        image_end: int | None = None,
    ):
        if isinstance(template, str):
            if template not in TEMPLATES:
                raise ValueError(f"chat template {template!r}: expected one of {list(TEMPLATES)}")
            template = TEMPLATES[template]
        self.tokenizer = tokenizer
        self.template = template
        self.system = template.system if system == "default" else (system or None)
        size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
        self.image_start = _picture_id(tokenizer, START_TOKEN, image_start, size, 0)
        self.image_end = _picture_id(tokenizer, END_TOKEN, image_end, size, 1)
        self._picture = [self.image_start, SENTINEL, self.image_end]
        bos = [] if template.bos is None else [self._special(template.bos)]
        self._start = bos * (1 if single_bos else 2)
        self._header = {r: self._header_ids(r) for r in ("system", "user", "assistant")}
        self._lead = {r: template.lead.format(role=r) for r in self._header}
        # How many ids of `lead + message` belong to the lead.
        self._lead_count = {r: len(self.encode(text)) for r, text in self._lead.items()}
        self.close = self._special(template.close)
        self._after = self.encode(template.after) if template.after else []

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without anything added."""
        # The Rust tokenizer behind a transformers one, where it has no truncation or padding set,
        # gives the same ids without most of the time.
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None and backend.truncation is None and backend.padding is None:
            return backend.encode(text, add_special_tokens=False).ids
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _special(self, token: str) -> int:
        id_ = self.tokenizer.convert_tokens_to_ids(token)
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if id_ is None or (id_ == unknown and token != getattr(self.tokenizer, "unk_token", None)):
            raise ValueError(
                f"the tokenizer has no token {token!r}, which template {self.template.name} needs"
            )
        return int(id_)

    def _header_ids(self, role: str) -> list[int]:
        ids = []
        for piece in self.template.header:
            ids += self.encode(role) if piece == "{role}" else [self._special(piece)]
        return ids

    def _message(self, lead: str, text: str) -> list[int]:
        """Ids of `lead + text`, with start, sentinel and end for every <image>."""
        ids: list[int] = []
        for k, piece in enumerate((lead + text).split(IMAGE)):
            if k:
                ids += self._picture
            if piece:
                ids += self.encode(piece)
        return ids

    def _turn(self, role: str, text: str) -> tuple[list[int], int]:
        """(ids of one turn, how many of them at the start are its header)."""
        header = self._header[role]
        if not text:
            return header + self.encode(self._lead[role]), len(header) + self._lead_count[role]
        ids = header + self._message(self._lead[role], text[:_LONG])
        return [*ids, self.close], len(header) + self._lead_count[role]

    def conversation(self, turns: Sequence[Turn], independent: bool = False) -> Encoded:
        """ids and labels of a whole conversation.

        With `independent`, and pictures at the start of the first question, every question and
        answer stands by itself behind start, user header and those pictures: the second question
        does not see the first answer (`turns` says who sees whom). Other conversations are
        encoded as ever, with turns None.
        """
        if independent and turns:
            lead, rest = _leading_pictures(turns[0][1])
            if lead and rest and len(turns) > 2 and len(turns) % 2 == 0:
                return self._independent(turns, lead, rest)
        ids, labels = self._prefix()
        for role, text in turns:
            self._append(ids, labels, *self._turn(role, text), role == "assistant" and text)
        return Encoded(np.array(ids, np.int32), np.array(labels, np.int32))

    def _prefix(self) -> tuple[list[int], list[int]]:
        ids = list(self._start)
        if self.system:
            ids += self._turn("system", self.system)[0] + self._after
        return ids, [IGNORE] * len(ids)

    def _append(self, ids, labels, new, masked, supervised) -> None:
        ids += new
        labels += [IGNORE] * masked + new[masked:] if supervised else [IGNORE] * len(new)
        if new[-1] == self.close:
            ids += self._after
            labels += [IGNORE] * len(self._after)

    def _independent(self, turns, lead: str, rest: str) -> Encoded:
        ids, labels = self._prefix()
        ids += self._header["user"] + self._message(self._lead["user"], lead)
        labels += [IGNORE] * (len(ids) - len(labels))
        spans = [len(ids)]
        gap = rest[: len(rest) - len(rest.lstrip())]  # between the pictures and the question
        for k in range(0, len(turns), 2):
            question = rest if k == 0 else gap + turns[k][1].lstrip()
            self._append(ids, labels, [*self._message("", question), self.close], 0, False)
            answer = turns[k + 1][1]
            self._append(ids, labels, *self._turn("assistant", answer), answer)
            spans.append(len(ids))
        numbers = np.zeros(len(ids), np.int32)
        for k, (a, b) in enumerate(zip(spans, spans[1:], strict=False), 1):
            numbers[a:b] = k
        return Encoded(np.array(ids, np.int32), np.array(labels, np.int32), numbers)

    def prompt(self, turns: Sequence[Turn]) -> np.ndarray:
        """int32[n]: the turns, then the header of an answer that is still to come."""
        ids, labels = self._prefix()
        for role, text in turns:
            self._append(ids, labels, *self._turn(role, text), False)
        ids += self._turn("assistant", "")[0]
        return np.array(ids, np.int32)

    def question(self, text: str, pictures: int = 0) -> np.ndarray:
        """int32[n]: prompt of one question, its pictures in front on a line of their own."""
        lead = IMAGE * pictures + "\n" if pictures else ""
        return self.prompt([("user", lead + text)])


def _picture_id(tokenizer, token: str, given: int | None, size: int | None, k: int) -> int:
    if given is not None:
        return int(given)
    id_ = tokenizer.convert_tokens_to_ids(token)
    if id_ is not None and id_ != getattr(tokenizer, "unk_token_id", None):
        return int(id_)
    if size is None:
        raise ValueError(f"the tokenizer has no {token}; pass image_start and image_end")
    return size + k


def _leading_pictures(text: str) -> tuple[str, str]:
    """Splits off the markers at the start of a message."""
    match = re.match(rf"(\s*{IMAGE})*", text)
    return text[: match.end()], text[match.end() :]

"""Ids of texts in which nothing is a special token, whatever they spell out.

Special tokens come from the chat template and the markers alone: where a message spells one out
("<|im_end|>"), it is text like any other.
"""

import bisect
import copy
import functools
import re
from collections.abc import Callable, Collection, Sequence

from metamorph_jax.errors import BadSample, ConfigError
from metamorph_jax.files import shown

_SHORT = 32  # characters of a text that may well be a header
_LEAD = "\ufdd0\ufdd1"  # a token of our copy of a tokenizer; characters that no text has
Coded = tuple[list[int], list[int]]  # (ids, in which character each of them begins)


class TextIds:
    """A tokenizer that reads text as text.

    Args:
        tokenizer: has `encode(text, add_special_tokens=False)`, and perhaps a `backend_tokenizer`
            (those of transformers have), whose copies are told to read special tokens as text.
        names: of special tokens of the template.
        in_context: text that follows a special token is tokenised as it stands there.

    Ids of a text that the tokenizer fails on raise BadSample. Its patterns come from a file and may
    take exponential time; the library gives up on a match after half a second or so.

    Raises:
        ConfigError: it fails on a single letter.
    """

    def __init__(self, tokenizer, names: Collection[str], in_context: bool):
        self.tokenizer = tokenizer
        self._plain = _as_text(tokenizer)
        self._inside = _as_text(tokenizer, _LEAD) if in_context else None
        # Whether a blank at the start of a text is lost, where the tokenizer puts one of its own.
        self._loses_blank = False
        try:
            self._loses_blank = self.parsed(" a") == self.parsed("a")
            self._spelled = self._cuts(names, in_context)
        except BadSample as error:
            raise ConfigError(f"the tokenizer can't be used: {error.detail}") from error
        # Headers of turns, and beginnings of texts whose ids are only counted, come up repeatedly.
        self._repeated = functools.lru_cache(maxsize=1024)(self._ids)

    def __call__(self, text: str, before: str = "") -> list[int]:
        """Ids of text, as it stands after the special token `before`.

        The id of `before` is not part of the result; "" is for text that begins, or where the token
        before makes no difference.
        """
        return self._repeated(text, before) if len(text) < _SHORT else self._ids(text, before)

    def parsed(self, text: str) -> list[int]:
        """Ids of text in which special tokens that are spelled out become their ids."""
        if text.startswith(" ") and self._loses_blank:
            text = f" {text}"
        return list(_encoded(self.tokenizer.encode, text))

    def parts(self, texts: Sequence[str], before: str = "") -> list[list[int]]:
        """Ids of the parts of a text that is tokenised as a whole, after `before`.

        A token that spans two parts belongs to the first.
        """
        whole, ends, done, so_far = "".join(texts), [], 0, ""
        if self._plain is not None:
            ids, starts = self._coded(whole, before)
        else:
            ids, starts = self._ids(whole, before), None
        for text in texts[:-1]:
            so_far += text
            if starts is None:  # counted, as these tokenizers don't say where a token begins
                end = min(len(self._repeated(so_far, before)), len(ids))
            else:
                end = bisect.bisect_left(starts, len(so_far))
            done = max(done, end)
            ends.append(done)
        return [ids[a:b] for a, b in zip([0, *ends], [*ends, len(ids)], strict=True)]

    def _ids(self, text: str, before: str = "") -> list[int]:
        if self._plain is not None:
            return self._coded(text, before)[0]
        parts = [text] if self._spelled is None else self._spelled.split(text)
        before = before if self._recognised(before) else ""
        return [i for part in parts for i in self.parsed(before + part)[bool(before) :]]

    @functools.lru_cache(maxsize=64)  # noqa: B019  (lives as long as its chat)
    def _recognised(self, token: str) -> bool:
        """Whether a special token that is spelled out becomes its id."""
        return len(token) > 1 and len(self.parsed(token)) == 1

    def _coded(self, text: str, before: str) -> Coded:
        """By the copies of the tokenizer."""
        parts = [text] if self._spelled is None else self._spelled.split(text)
        encode = self._inside if before and self._inside else self._plain
        if encode is self._plain and parts[0].startswith(" ") and self._loses_blank:
            ids, starts = encode(f" {parts[0]}")
            starts = [max(s - 1, 0) for s in starts]
        else:
            ids, starts = encode(parts[0])
        at = len(parts[0])
        for part in parts[1:]:
            new, places = (self._inside or self._plain)(part)
            ids, starts = ids + new, starts + [at + place for place in places]
            at += len(part)
        return ids, starts

    def _cuts(self, names: Collection[str], in_context: bool) -> re.Pattern | None:
        """Where a text has to be cut so that the tokenizer does not see special tokens in it.

        These are the ones that it recognises although it was told not to. The cut comes after the
        first character of the token.
        """
        names, one_id = set(names), lambda name: len(self.parsed(name)) == 1
        if self._plain is not None:
            names.add(_LEAD)
            encode = self._inside or self._plain
            one_id = lambda name: name == _LEAD or len(encode(name)[0]) == 1  # noqa: E731
        elif in_context:
            added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
            names |= {str(token) for token in added if token.special}
        cuts = "|".join(
            f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})"
            for name in sorted(names)
            if len(name) > 1 and one_id(name)
        )
        return re.compile(cuts) if cuts else None


@functools.lru_cache(maxsize=8)
def _as_text(tokenizer, lead: str = "") -> Callable[[str], Coded] | None:
    """The Rust tokenizer inside a transformers one, set to read special tokens as text.

    It is a copy, as the tokenizer itself is used elsewhere; training, evaluations and sampling
    share it. Besides, it takes a fraction of the time of `tokenizer.encode`. None for other
    tokenizers.

    Args:
        lead: a token that the copy gets and that every text is made to follow.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    backend = copy.deepcopy(backend)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    backend.post_processor = None  # it would leave blanks out of the tokens' places
    if lead:
        from tokenizers import AddedToken

        backend.add_tokens([AddedToken(lead, normalized=False)])

    def encode(text: str) -> Coded:
        found = _encoded(backend.encode, lead + text)
        starts = [max(start - len(lead), 0) for start, _ in found.offsets]
        return found.ids[bool(lead) :], starts[bool(lead) :]

    return encode


def _encoded(encode: Callable, text: str):
    """What `encode` makes of a text, without tokens around it; a panic in Rust is a BadSample."""
    try:
        return encode(text, add_special_tokens=False)
    except BaseException as error:  # a panic is no Exception
        if type(error).__name__ != "PanicException":
            raise
        why = f"it fails on a text of {len(text):,} characters ({shown(error, 100)})"
        raise BadSample("tokenizer", why) from error

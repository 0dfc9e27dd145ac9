"""What a tokenizer.json may cost: its regular expressions are programs that the file brings.

The library gives up on a match after half a second or so, but a text has as many matches as it has
characters. So there are two kinds of patterns (`is_quick`):

    published, or repeating nothing but its end    run as they are
    any other, in the pre-tokenizer or decoder     run under `Limited`, which watches the time
               in the normalizer                   refused

The normalizer also runs on the file's own tokens, while it is loaded. Nothing interrupts the
library then, nor in its `encode`; but `encode_batch` lets other threads run, and a text that takes
too long is left to a thread that nobody waits for. It keeps a core busy until the program ends,
which a command does at once: no data are read on with such a tokenizer.
"""

import copy
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from metamorph_jax.errors import FileError, SlowTokenizer
from metamorph_jax.files import shown

# Tokenizers read 300,000 characters a second or more on one core. A watched one may take:
SECONDS = 10.0  # in all, and beside that
SECONDS_PER_CHARACTER = 1e-4
_LONGEST_WORD = 200  # characters; WordPiece takes the square of a word's length
_MOST_GROWTH = 10_000  # characters for one
_TABLES = ("model", "added_tokens")  # the parts of a tokenizer.json that only hold tokens

# Patterns of published tokenizers that backtrack, but not far on any text.
PUBLISHED = frozenset({
    # GPT-2
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen 2 to 3, and 3.5
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # GPT-4o, Llama 4
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Mistral
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # normalizers that transformers makes from SentencePiece models
    r" +▁", r"^▁+$", r"\A +| +\z",
})  # fmt: skip
_CLASS = r"\[\^?(?:[^\\\[\]&]|\\.)+\]"
_ONE = rf"(?:[^\\\[\](){{}}.*+?|]|\\[pP]\{{\^?\w+\}}|\\[^pPgkKRXcCM\d]|{_CLASS}|\.)"  # a character
_BRANCH = rf"(?:{_ONE}\?)?(?:{_ONE}){{1,32}}(?:[?*+]|\{{\d{{1,3}},?\d{{0,3}}\}})?"
_QUICK = re.compile(rf"{_BRANCH}(?:\|{_BRANCH}){{0,32}}")


def is_quick(pattern: str) -> bool:
    """Whether a pattern is known, or seen by its form, to take little time on any text.

    By its form: it has branches of single characters and classes, of which the last may be
    repeated; so it never goes back over what it has matched.
    """
    return pattern in PUBLISHED or (len(pattern) < 1000 and bool(_QUICK.fullmatch(pattern)))


def slow_part(table: Mapping[str, Any], where: str) -> str:
    """What of a tokenizer.json has to be watched, in words for an error; "" if nothing.

    Raises:
        FileError: its normalizer has a pattern that is not quick, or its normalizer or decoder may
            make a text 10,000 times as long.
    """
    parts = {name: part for name, part in table.items() if name not in _TABLES}
    for name, part in parts.items():
        if _growth(part) > _MOST_GROWTH:
            raise FileError(f"{where}: its {shown(name)} may make texts more than "
                            f"{_MOST_GROWTH:,} times as long")  # fmt: skip
    for pattern in filter(_is_slow, _patterns(parts.pop("normalizer", None))):
        raise FileError(
            f"{where}: the pattern {shown(repr(pattern), 80)} of its normalizer may take very "
            "long on some texts; only patterns that repeat nothing but their end are read there"
        )
    model = table.get("model")
    longest = model.get("max_input_chars_per_word", 0) if isinstance(model, dict) else 0
    if isinstance(longest, int) and longest > _LONGEST_WORD:
        return f"its words of up to {longest:,} characters"
    for name, part in parts.items():
        for pattern in filter(_is_slow, _patterns(part)):
            return f"the pattern {shown(repr(pattern), 80)} of its {shown(name)}"
    return ""


def _is_slow(pattern: str) -> bool:
    return not is_quick(pattern)


def _patterns(part: Any) -> Iterator[str]:
    """The regular expressions in a part of a tokenizer.json."""
    for one in _objects(part):
        if isinstance(one.get("Regex"), str):
            yield one["Regex"]


def _objects(part: Any) -> Iterator[dict]:
    """All objects in a part of a tokenizer.json, in its order."""
    if isinstance(part, dict):
        yield part
    for value in part.values() if isinstance(part, dict) else part if type(part) is list else ():
        yield from _objects(value)


def _growth(part: Any) -> int:
    """A bound on characters for one: what is written in place of a text may be replaced again."""
    grown, written = 1, ""
    for step in _objects(part):
        pattern, content = step.get("pattern"), step.get("content")
        if not isinstance(pattern, dict) or not isinstance(content, str):
            continue
        again = "Regex" in pattern or str(pattern.get("String", "")) in written
        grown = max(1, len(content)) * grown if again else max(grown, len(content))
        written += f"{content}\n"
    return grown


class Limited:
    """A Rust tokenizer (`tokenizers.Tokenizer`) whose work is bounded; else it is as that one.

    A text costs one more thread, some 0.1 ms. A copy counts its time anew.

    Args:
        inner: the tokenizer.
        where: its file, for the error.
        slow: its `slow_part`.

    Raises:
        SlowTokenizer: from every use, once the time is up.
    """

    def __init__(self, inner, where: str, slow: str):
        vars(self).update(_inner=inner, _where=where, _slow=slow, _spent=0.0, _characters=0)

    def __getattr__(self, name: str):
        if name == "_inner":  # there is none yet, as in a copy that is being made
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self._inner, name, value)

    def __deepcopy__(self, memo) -> "Limited":
        return Limited(copy.deepcopy(self._inner, memo), self._where, self._slow)

    def __reduce__(self):
        return Limited, (self._inner, self._where, self._slow)

    def encode(self, sequence, *args, **kwargs):
        found = self._in_time(len(sequence), self._inner.encode_batch, [sequence], *args, **kwargs)
        return found[0]

    def encode_batch(self, input, *args, **kwargs):
        texts = [part for one in input for part in ([one] if isinstance(one, str) else one)]
        return self._in_time(
            sum(map(len, texts)), self._inner.encode_batch, input, *args, **kwargs
        )  # fmt: skip

    def decode(self, ids, *args, **kwargs) -> str:
        return self.decode_batch([ids], *args, **kwargs)[0]

    def decode_batch(self, sequences, *args, **kwargs) -> list[str]:
        length = sum(map(len, sequences))
        return self._in_time(length, self._inner.decode_batch, sequences, *args, **kwargs)

    def _in_time(self, characters: int, function: Callable, *args, **kwargs):
        """What the function returns or raises."""
        own = vars(self)
        own["_characters"] += characters
        allowed = SECONDS + SECONDS_PER_CHARACTER * self._characters - self._spent
        outcome: list = []

        def work():
            try:
                outcome.append((function(*args, **kwargs), None))
            except BaseException as error:  # a panic in Rust is no Exception
                outcome.append((None, error))

        start = time.monotonic()
        if allowed > 0:
            worker = threading.Thread(target=work, daemon=True)
            worker.start()
            worker.join(allowed)
        own["_spent"] += time.monotonic() - start
        if not outcome:
            own["_spent"] = float("inf")
            raise SlowTokenizer(
                f"the tokenizer of {self._where} takes too long: more than {SECONDS:.0f} s and "
                f"{SECONDS_PER_CHARACTER * 1000:g} ms a character; {self._slow} may be the cause"
            )
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

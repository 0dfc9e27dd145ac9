"""The one way in which files that people bring are opened, and JSON, JSON lines and text are read;
and `write_whole`, for files that must never be there in part.

Such a file may be anything: a FIFO that never ends, a sparse terabyte, JSON that is nested ten
thousand deep. So a file must be a regular one of a bounded size, text is UTF-8 (a byte order mark
is allowed), and JSON is bounded in depth and holds no half of a surrogate pair, which no tokenizer
takes and no terminal prints. Every fault is a `FileError` of one line that names the file.
"""

import contextlib
import json
import os
import pathlib
import re
import stat
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from metamorph_jax.errors import FileError, MissingFile

# Python's objects take up to 35 times the bytes of the JSON that they are read from.
MAX_BYTES = 2**24
MAX_LINE = 2**24
MAX_DEPTH = 100

_BOM = b"\xef\xbb\xbf"
_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip
_TYPES = {
    dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number",
    float: "a number", type(None): "null",
}  # fmt: skip
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def shown(text: object, longest: int = 200) -> str:
    """Text from a file as it may be printed: on one line, control characters escaped, cut short."""
    escaped = escape(str(text)[: longest + 1]).replace("\n", "\\n")
    return escaped if len(escaped) <= longest else escaped[:longest] + "…"


def escape(text: str) -> str:
    """Text with its control characters escaped, but for ends of lines."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


# ---- files


def regular(path: str | os.PathLike) -> pathlib.Path:
    """The path, if it is a regular file: what else opens it can't be made to wait or to read on.

    Raises:
        MissingFile: there is none.
        FileError: it is a folder, pipe or device, or can't be looked at.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    _refuse_irregular(path, mode)
    return pathlib.Path(path)


def opened(path: str | os.PathLike, max_bytes: int | None = None) -> BinaryIO:
    """A regular file, opened for reading bytes; raises as `regular`, and if it is too large."""
    try:  # opening a pipe would wait for a writer
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    try:
        found = os.fstat(fd)
        _refuse_irregular(path, found.st_mode)
        if max_bytes is not None and found.st_size > max_bytes:
            raise _too_large(path, max_bytes)
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_bytes(path: str | os.PathLike, max_bytes: int = MAX_BYTES) -> bytes:
    """The whole file; raises as `opened`."""
    with opened(path, max_bytes) as file:
        data = file.read(max_bytes + 1)  # it may grow, and those of /proc don't say their size
    if len(data) > max_bytes:
        raise _too_large(path, max_bytes)
    return data


def _refuse_irregular(path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise FileError(f"{shown(path)} is {kind}, not a regular file")


def _unreadable(path, error: Exception) -> FileError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return MissingFile(f"no file {shown(path)}")
    reason = getattr(error, "strerror", None) or str(error)
    return FileError(f"{shown(path)} can't be read: {reason}")


def _too_large(path, max_bytes: int) -> FileError:
    return FileError(f"{shown(path)} is larger than the {max_bytes:,} bytes that such a file may "
                     "have")  # fmt: skip


# ---- text


def read_text(path: str | os.PathLike, max_bytes: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        FileError: as `opened`, or naming the line that is not UTF-8.
    """
    data = read_bytes(path, max_bytes)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        start = data.rfind(b"\n", 0, error.start) + 1
        raise _not_utf8(path, number, data, error.start, error.start - start) from error


def raw_lines(
    path: str | os.PathLike, max_line: int = MAX_LINE
) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset of its first byte, bytes) of every line; a byte order mark is cut off.

    Raises:
        FileError: as `opened`, or a line has more than `max_line` bytes.
    """
    with opened(path) as file:
        number, offset = 0, 0
        while line := file.readline(max_line + 1):
            number += 1
            if len(line) > max_line:
                raise FileError(
                    f"{shown(path)}, line {number}: longer than the {max_line:,} bytes that a line "
                    "may have"
                )
            cut = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
            yield number, offset + cut, line[cut:]
            offset += len(line)


def lines(path: str | os.PathLike, max_line: int = MAX_LINE) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end) of every line of a UTF-8 file.

    Raises:
        FileError: as `raw_lines`, or naming the line that is not UTF-8.
    """
    for number, _, data in raw_lines(path, max_line):
        try:
            yield number, data.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, number, data, error.start, error.start) from error


def _not_utf8(path, number: int, data: bytes, at: int, column: int) -> FileError:
    utf16 = number == 1 and data.startswith((b"\xff\xfe", b"\xfe\xff"))
    what = "it is UTF-16" if utf16 else f"byte 0x{data[at]:02x} at byte {column + 1} of the line"
    return FileError(f"{shown(path)}, line {number}: not UTF-8 ({what}); save the file as UTF-8")


def write_whole(path: str | os.PathLike, data: str | bytes) -> None:
    """Writes a file whole or not at all: into another one beside it, which takes its place.

    Raises:
        FileError: it can't be written.
    """
    path = pathlib.Path(path)
    other = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        other.write_bytes(data.encode() if isinstance(data, str) else data)
        other.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            other.unlink()
        why = error.strerror or error
        raise FileError(f"{shown(path)} can't be written: {why}") from error


# ---- JSON


def read_json(
    path: str | os.PathLike,
    kind: type | None = dict,
    *,
    what: str = "",
    max_bytes: int = MAX_BYTES,
    unique: bool = False,
    keep: Callable[[dict], Any] | None = None,
) -> Any:
    """The value of a JSON file.

    Args:
        kind: dict or list, which it must be; None: any value.
        what: what the file should hold, for messages: "an index of shards".
        max_bytes: of the file.
        unique: refuse objects in which a key occurs twice.
        keep: gives what takes the place of each object as soon as it is read, to save memory; not
            together with `unique`.

    Raises:
        FileError: as `read_text`, or it is not JSON, or not of this kind.
    """
    text = read_text(path, max_bytes)
    try:
        return parse(text, shown(path), kind, unique=unique, keep=keep)
    except FileError as error:
        raise FileError(f"{error}; expected {what}" if what else str(error)) from error


def parse(
    text: str | bytes,
    where: str,
    kind: type | None = None,
    *,
    unique: bool = False,
    keep: Callable[[dict], Any] | None = None,
) -> Any:
    """The value of some JSON.

    Args:
        text: JSON; bytes are UTF-8.
        where: for messages: a file, or a file and line.
        kind, unique, keep: as in `read_json`.

    Raises:
        FileError: it is not JSON (or only nearly), or not of this kind.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_hook=keep, object_pairs_hook=_once if unique else None)
    except RecursionError as error:
        raise FileError(f"{where} is nested deeper than {MAX_DEPTH} levels") from error
    except UnicodeDecodeError as error:
        raise FileError(
            f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x} at byte "
            f"{error.start + 1}); save the file as UTF-8"
        ) from error
    except ValueError as error:
        raise FileError(f"{where} is not JSON: {shown(error)}") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _deep(value):
        raise FileError(f"{where} is nested deeper than {MAX_DEPTH} levels")
    if _SURROGATE.search(text) and _has_lone_surrogate(value):
        raise FileError(f"{where} has half of a surrogate pair (\\ud800 … \\udfff) in a string")
    if kind is not None and not isinstance(value, kind):
        found = _TYPES.get(type(value), type(value).__name__)
        raise FileError(f"{where} holds {found}, not {_TYPES[kind]}")
    return value


def _once(pairs) -> dict:
    out = dict(pairs)
    if len(out) != len(pairs):
        names, twice = set(), set()
        for name, _ in pairs:
            (twice if name in names else names).add(name)
        raise ValueError(f"{', '.join(sorted(twice)[:8])} occurs twice")
    return out


def _deep(value) -> bool:
    """Whether a value is nested deeper than `MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [node for node in level if isinstance(node, dict | list)]
        if not level:
            return False
        level = [
            child for node in level for child in (node.values() if isinstance(node, dict) else node)
        ]
    return True


def _has_lone_surrogate(value) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False

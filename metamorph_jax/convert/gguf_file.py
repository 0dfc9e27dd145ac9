"""The container of GGUF files: metadata and the places of (quantised) tensors.

    "GGUF" | u32 version | u64 tensors | u64 metadata | metadata … | tensors … | padding | data
    metadata   string key, u32 type, value                 string   u64 bytes, UTF-8
    tensor     string name, u32 dimensions, u64 each (the fastest first), u32 kind, u64 offset
    array      u32 type, u64 count, values

Why not `gguf.GGUFReader` (0.17): it trusts the counts in the file, so that one number makes it run
for years, and it makes three arrays for each token. Here every count is checked against the bytes
that are there before anything is made. The sizes of the kinds of quantisation are the library's,
and so is what turns them into numbers.
"""

import dataclasses
import math
import pathlib
import struct
from typing import Any

import numpy as np

from metamorph_jax import files
from metamorph_jax.errors import GGUFError
from metamorph_jax.files import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Far above what any published file has.
_HEADER = 2**27  # bytes
_ENTRIES = 2**16  # of metadata, and tensors
_VALUES = 2**22  # in all arrays together
_DIMENSIONS = 4
_ALIGNMENT = 2**16

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
            10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip
# Kinds of tensors that hold plain numbers.
_PLAIN = {0: "<f4", 1: "<f2", 24: "i1", 25: "<i2", 26: "<i4", 27: "<i8", 28: "<f8"}
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the file.

    Attributes:
        name: llama.cpp's.
        shape: of the weight, the fastest dimension last.
        kind: a `gguf.GGMLQuantizationType`.
        data: its numbers, or the bytes of its rows where it is quantised; mapped into memory.
    """

    name: str
    shape: tuple[int, ...]
    kind: Any
    data: np.ndarray


class File:
    """A GGUF file.

    Attributes:
        path: of the file.
        fields: key of the metadata -> value: a number, a text, true or false, or a list of them.
        tensors: in the file's order.

    Raises:
        MissingFile: there is none.
        GGUFError: it is something else, of another version, truncated or damaged.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        with files.opened(path) as f:
            head = f.read(4)
        if head != MAGIC:
            raise self.error(f"it starts with {head!r}, expected {MAGIC!r}", "is not a GGUF file")
        data = np.memmap(self.path, np.uint8, "r")
        cursor = _Cursor(self, data)
        self.fields, infos = self._header(cursor)
        self.tensors = self._tensors(cursor, data, infos)

    def error(self, text: str, what: str = "") -> GGUFError:
        """An error that names the file."""
        return GGUFError(f"{self.path} {what}: {text}" if what else f"{self.path}: {text}")

    def damaged(self, text: str) -> GGUFError:
        size = self.path.stat().st_size
        return self.error(text, f"({size:,} bytes) is truncated or damaged")

    # ---- metadata

    def get(self, key: str, kind: type, default=None):
        """The value of a metadata key; GGUFError if it is of another kind than `kind`, or absent
        and there is no default."""
        if key not in self.fields:
            if default is None:
                raise self.error(f"metadata key {key!r} is missing")
            return default
        value = self.fields[key]
        allowed = (int, float) if kind is float else kind
        wrong = not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool)
        if wrong or (isinstance(value, float) and not math.isfinite(value)):
            raise self.error(
                f"metadata key {key!r} is {shown(repr(value), 60)}, not {_NAMES[kind]}"
            )
        return kind(value)

    def count(self, key: str, default=None) -> int:
        """As `get`, for sizes: a whole number from 1 to 2^31."""
        value = self.get(key, int, default)
        if not 0 < value < 2**31:
            raise self.error(f"metadata key {key!r} is {value}, which is not a size")
        return value

    def array(self, key: str, kind: type, default=None) -> list:
        """As `get`, for arrays whose values are all of this kind."""
        value = self.fields.get(key, default)
        if value is None:
            raise self.error(f"metadata key {key!r} is missing")
        allowed = (int, float) if kind is float else kind
        if not isinstance(value, list) or not all(isinstance(v, allowed) for v in value):
            raise self.error(f"metadata key {key!r} is not an array of {_NAMES[kind]}")
        return value

    # ---- reading

    def _header(self, cursor: "_Cursor"):
        """(metadata, (name, shape, kind, offset) of every tensor)."""
        cursor.take(4)
        version = cursor.number("<u4")
        if version & 0xFFFF == 0:
            raise self.error("big-endian GGUF files are not supported")
        if version not in VERSIONS:
            raise self.error(f"GGUF version {version} is not supported, only {VERSIONS}")
        tensors, entries = cursor.number("<u8"), cursor.number("<u8")
        for what, n in (("tensors", tensors), ("entries of metadata", entries)):
            if n > _ENTRIES:
                raise self.damaged(f"it says that it has {n:,} {what}")
        fields = {}
        for _ in range(entries):
            key = cursor.text("a key")
            if key in fields:
                raise self.damaged(f"metadata key {shown(key, 80)} occurs twice")
            fields[key] = cursor.value(key, cursor.number("<u4"))
        return fields, [cursor.tensor() for _ in range(tensors)]

    def _tensors(self, cursor: "_Cursor", data: np.ndarray, infos) -> list[Tensor]:
        alignment = self.get("general.alignment", int, 32)
        if not 0 < alignment <= _ALIGNMENT or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment}, not a power of two")
        start = -(-cursor.at // alignment) * alignment
        if len({name for name, *_ in infos}) != len(infos):
            raise self.damaged("two tensors have the same name")
        placed = [self._tensor(data, start, alignment, *info) for info in infos]
        end, last = 0, ""
        for first, stop, name in sorted((first, stop, t.name) for first, stop, t in placed):
            if first < end:
                raise self.damaged(f"tensor {shown(name, 80)} overlaps {shown(last, 80)}")
            end, last = stop, name
        return [tensor for *_, tensor in placed]

    def _tensor(self, data, start: int, alignment: int, name: str, shape, kind: int, offset: int):
        """(first byte, byte after the last, tensor), whose bytes are in the file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        title = f"tensor {shown(name, 80)}"
        if not all(0 < n < 2**31 for n in shape):
            raise self.damaged(f"{title} has the shape {shape}")
        if kind not in set(GGMLQuantizationType):
            raise self.damaged(f"{title} is of the unknown kind {kind}")
        kind = GGMLQuantizationType(kind)
        block, size = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise self.damaged(f"{title} has rows of {shape[-1]}, not a multiple of {block}")
        n = math.prod(shape) // block * size
        if offset % alignment or start + offset + n > len(data):
            raise self.damaged(f"{title} of {n:,} bytes at {offset:,} does not lie in the file")
        held = data[start + offset : start + offset + n]
        if kind in _PLAIN:
            array = held.view(_PLAIN[kind]).reshape(shape)
        else:
            array = held.reshape(*shape[:-1], shape[-1] // block * size)
        return start + offset, start + offset + n, Tensor(name, shape, kind, array)


class _Cursor:
    """Reads the header from its start; GGUFError where the file ends or a count is absurd."""

    def __init__(self, file: File, data: np.ndarray):
        self.at, self._file = 0, file
        self._end = min(len(data), _HEADER)
        self._data = memoryview(data)[: self._end]
        self._left = _VALUES

    def take(self, n: int) -> memoryview:
        if n > self._end - self.at:
            raise self._file.damaged(f"{n:,} bytes are due at byte {self.at:,} of its header")
        self.at += n
        return self._data[self.at - n : self.at]

    def number(self, dtype: str):
        dtype = np.dtype(dtype)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def text(self, what: str) -> str:
        (n,) = struct.unpack("<Q", self.take(8))
        try:
            return str(self.take(n), "utf-8")
        except UnicodeDecodeError as error:
            raise self._file.damaged(f"{shown(what, 80)} is not UTF-8") from error

    def value(self, key: str, kind: int, inside: bool = False):
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text(key)
        if kind != _ARRAY or inside:
            what = "an array of arrays" if kind == _ARRAY else f"of the unknown type {kind}"
            raise self._file.damaged(f"metadata key {shown(key, 80)} is {what}")
        kind, n = struct.unpack("<IQ", self.take(12))
        if n > self._left:
            raise self._file.damaged(f"metadata key {shown(key, 80)} has {n:,} values")
        self._left -= n
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.take(n * dtype.itemsize), dtype).tolist()
        return [self.value(key, kind, inside=True) for _ in range(n)]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, kind, offset)."""
        name = self.text("a tensor's name")
        n = self.number("<u4")
        if not 0 < n <= _DIMENSIONS:
            raise self._file.damaged(f"tensor {shown(name, 80)} has {n} dimensions")
        shape = struct.unpack(f"<{n}Q", self.take(8 * n))[::-1]
        kind, offset = struct.unpack("<IQ", self.take(12))
        return name, shape, kind, offset

"""Safetensors files, read lazily and written as a stream.

    u64 n | n bytes of JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}} | data

A file may come from anywhere, so the header is checked against the file before anything is read:
every tensor lies inside the data, none overlaps another, sizes match shapes, no name occurs twice.

Why not the `safetensors` library (0.8.0): its numpy reader copies what it returns and doesn't know
float8; here a tensor is a view into the file, of which a host reads only the parts that its shards
need, also of a transposed kernel. Its writer takes all tensors at once; ours has one in memory. Its
errors name neither the file nor the tensor.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

from metamorph_jax.convert import casts
from metamorph_jax.errors import WeightError

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_ML_DTYPES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_LONGEST_HEADER = 100_000_000  # bytes, as the reference library has it
# What files of other formats start with, when someone renamed them.
_OTHERS = {
    b"\x80": "a pickle, which could run code",
    b"PK\x03\x04": "a zip archive (torch.save), whose pickle could run code",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a Git LFS pointer instead of the file: run `git lfs pull`",
    b"<!": "a web page",
}



def dtype_of(name: str) -> np.dtype | None:
    """The numpy dtype of a safetensors dtype, or None if we don't read it."""
    if name in _ML_DTYPES:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, _ML_DTYPES[name]))
    return np.dtype(_DTYPES[name]) if name in _DTYPES else None


def name_of(dtype) -> str:
    """The safetensors dtype of a numpy dtype."""
    dtype = np.dtype(dtype)
    for names in (_DTYPES, _ML_DTYPES):
        for name in names:
            if dtype_of(name) == dtype:
                return name
    raise WeightError(f"dtype {dtype} can't be stored in a safetensors file")


class File(Mapping):
    """name -> array of one file; an array is mapped into memory when it is requested."""

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        size = self.path.stat().st_size
        with self.path.open("rb") as f:
            start = f.read(32)
            length = int.from_bytes(start[:8], "little")
            if size < 8 or not 0 < length <= min(size - 8, _LONGEST_HEADER):
                raise self._error(_other(start) or f"a header of {length} bytes in {size} bytes")
            f.seek(8)
            header = f.read(length)
        try:
            table = json.loads(header, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise self._error(_other(start) or f"the header is unreadable: {error}") from error
        if not isinstance(table, dict):
            raise self._error("the header is not a table")
        self.metadata = table.pop("__metadata__", None)
        self._start = 8 + length
        self._entries = {name: self._entry(name, entry) for name, entry in table.items()}
        self._check_layout(size - self._start)

    def _error(self, text: str) -> WeightError:
        return WeightError(f"{self.path} is not a complete safetensors file: {text}")

    def _entry(self, name: str, entry) -> tuple[str, tuple[int, ...], int, int]:
        fields = entry if isinstance(entry, dict) else {}
        kind, shape = fields.get("dtype"), fields.get("shape")
        offsets = fields.get("data_offsets")
        if not (isinstance(kind, str) and _counts(shape) and _counts(offsets)):
            raise self._error(f"{name} is not described by dtype, shape and data_offsets")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._error(f"{name} has data_offsets {offsets}")
        dtype = dtype_of(kind)
        held = offsets[1] - offsets[0]
        if dtype is not None and math.prod(shape) * dtype.itemsize != held:
            raise self._error(f"{name} is {kind} {shape}, but has {held} bytes")
        return kind, tuple(shape), *offsets

    def _check_layout(self, size: int) -> None:
        end, last = 0, "the header"
        for name, (_, _, first, stop) in sorted(
            self._entries.items(), key=lambda item: item[1][2:]
        ):
            if first < end:
                raise self._error(f"{name} overlaps {last}")
            if first > end:
                gap = f"{first - end} bytes between {last} and {name}"
                raise self._error(f"{gap} belong to no tensor")
            if stop > size:
                raise self._error(f"{name} ends at byte {stop} of {size}: the file is cut off")
            end, last = stop, name
        if end != size:
            raise self._error(f"{size - end} bytes after {last} belong to no tensor")

    def __getitem__(self, name: str) -> np.ndarray:
        kind, shape, begin, end = self._entries[name]
        dtype = dtype_of(kind)
        if dtype is None:
            raise WeightError(f"{name} in {self.path} has dtype {kind}, which is not supported")
        if begin == end:
            return np.zeros(shape, dtype)
        return np.memmap(self.path, dtype, "r", self._start + begin, shape)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1]

    def __iter__(self):
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def unique(pairs) -> dict:
    """A dict for `json.loads`; ValueError where a key occurs twice."""
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{', '.join(twice[:8])} occurs twice")
    return out


def _counts(values) -> bool:
    """Whether this is a list of non-negative integers."""
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _other(start: bytes) -> str | None:
    """What a file that starts like this really is, if we know."""
    return next((f"it is {what}" for head, what in _OTHERS.items() if start.startswith(head)), None)


# ---- writing


def plan_shards(sizes: Mapping[str, int], most: int, stem: str = "model") -> dict[str, list[str]]:
    """file name -> its tensors, in order; a file has at most `most` bytes, or one larger tensor.

    Args:
        sizes: tensor -> bytes.
        most: bytes of a file.
        stem: of the file names, as transformers ("model") or diffusers look for them.
    """
    shards, held = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    n = len(shards)
    return {f"{stem}-{i:05d}-of-{n:05d}.safetensors": s for i, s in enumerate(shards, 1)}


def write(path: pathlib.Path, names: Iterable[str], shapes: Mapping, dtypes: Mapping, get) -> None:
    """Writes one file; one tensor is in memory at a time.

    Args:
        names: tensors in order.
        shapes, dtypes: tensor -> shape, and -> the dtype to write.
        get: tensor -> array; it is cast when it is written.
    """
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        held = math.prod(shapes[name]) * np.dtype(dtypes[name]).itemsize
        header[name] = {
            "dtype": name_of(dtypes[name]),
            "shape": list(shapes[name]),
            "data_offsets": [at, at + held],
        }
        at += held
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with pathlib.Path(path).open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            given, dtype = get(name), np.dtype(dtypes[name])
            if given.shape != tuple(shapes[name]):
                raise WeightError(f"{name} is {given.shape}, expected {tuple(shapes[name])}")
            with np.errstate(over="ignore", invalid="ignore"):  # it is looked at right below
                array = np.ascontiguousarray(given, dtype)
            fault = "" if given.dtype == dtype else casts.fault_of(given, array)
            if fault and fault not in casts.ALLOWED:  # those were allowed when they were read
                raise WeightError(f"{fault} in {name}: it can't be written as {dtype}")
            f.write(memoryview(array.reshape(-1).view(np.uint8)))

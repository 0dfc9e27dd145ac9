"""Pickles of containers, texts, numbers and NumPy arrays, read without running what is in them.

Every name that a pickle asks for must be one of a few, and none of them is the real thing: arrays
and their types become objects of ours, then lists. Anything else is refused.

    python -m metamorph_jax.data.sets.pickles FILE [FILE …] > ROWS.jsonl

makes JSON lines of pickled lists (or dicts) of records, as CoMM has them.
"""

import ast
import io
import json
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from metamorph_jax import files
from metamorph_jax.errors import FileError, UserError

_MAX_BYTES = 2**31
_MAGIC = b"\x93NUMPY"


class _Type:
    """In place of `numpy.dtype`: its code, such as "i8", "O8" or "S12"."""

    def __init__(self, code: str, *_):
        self.code, self.order = str(code), "<"

    def __setstate__(self, state):
        self.order = ">" if state[1] == ">" else "<"

    def values(self, data: bytes) -> list:
        if self.code[:1] not in "biufSU":
            raise pickle.UnpicklingError(f"an array of type {self.code}")
        return np.frombuffer(data, np.dtype(self.order + self.code)).tolist()


class _Array:
    """In place of `numpy.ndarray`; `value` are nested lists."""

    def __setstate__(self, state):
        _, shape, kind, fortran, data = state
        flat = list(data) if kind.code[:1] == "O" else kind.values(data)
        self.value = _shaped(flat, shape, fortran)


def _shaped(flat: list, shape: tuple[int, ...], fortran: bool):
    """Nested lists of a flat one."""
    out = np.empty(len(flat), object)
    out[:] = flat
    return out.reshape(shape, order="F" if fortran else "C").tolist()


def _scalar(kind: _Type, data: bytes):
    return kind.values(data)[0]


def _from_buffer(data: bytes, kind: _Type, shape: tuple[int, ...], order: str):
    return _shaped(kind.values(data), shape, order == "F")


# NumPy 1 has `core` where NumPy 2 has `_core`.
_KNOWN = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Type,
    "numpy._core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _from_buffer,
}


class _Plain(pickle.Unpickler):
    def find_class(self, module, name):
        found = _KNOWN.get(f"{module}.{name}".replace("numpy.core.", "numpy._core."))
        if found is None:
            raise pickle.UnpicklingError(f"it wants to make a {module}.{name}")
        return found


def plain_pickle(path: str) -> Any:
    """The value of a pickle; arrays are lists.

    Raises:
        FileError: it can't be read, or holds anything but containers, texts, numbers and arrays.
    """
    return _read(files.read_bytes(path, _MAX_BYTES), path)


def plain_npy(path: str) -> Any:
    """The value of a `.npy` file of objects (a dict, or lists) or of anything else; raises as
    `plain_pickle`."""
    data = files.read_bytes(path, _MAX_BYTES)
    try:
        stream = io.BytesIO(data)
        if not data.startswith(_MAGIC):
            raise ValueError("it doesn't begin as .npy files do")
        width = 2 if data[6] == 1 else 4
        stream.seek(8)
        header = stream.read(int.from_bytes(stream.read(width), "little"))
        about = ast.literal_eval(header.decode("latin1"))
        if about["descr"] != "|O":
            return np.load(io.BytesIO(data), allow_pickle=False).tolist()
    except Exception as error:  # damaged files raise all kinds of errors
        raise FileError(f"{files.shown(path)} is not a .npy file: {files.shown(error)}") from error
    return _read(data[stream.tell() :], path)


def _read(data: bytes, path: str) -> Any:
    try:
        return _as_lists(_Plain(io.BytesIO(data), encoding="latin1").load())
    except Exception as error:  # damaged pickles raise all kinds of errors
        raise FileError(f"{files.shown(path)} is not a plain pickle: {error}") from error


def _as_lists(value):
    """The value without the objects that stand for arrays."""
    if isinstance(value, _Array):
        return _as_lists(value.value)
    if isinstance(value, dict):
        return {key: _as_lists(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_as_lists, value))
    return value


def rows(path: str) -> Iterator[str]:
    """A line of JSON for each record of a pickled list, or dict, of them.

    Raises:
        FileError: as `plain_pickle`; or it is no such list.
    """
    found = plain_pickle(path)
    records = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(records, list | tuple) or not all(isinstance(x, dict) for x in records):
        raise FileError(f"{files.shown(path)} is not a list of records")
    for k, record in enumerate(records):
        try:
            yield json.dumps(record, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise FileError(f"{files.shown(path)}, record {k}: {files.shown(error)}") from error


def main(paths: list[str]) -> int:
    """Prints the rows of these files; 2 if one can't be read."""
    try:
        for path in paths:
            for row in rows(path):
                print(row)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""Checkpoints in Hugging Face's folder layout: config.json and safetensors files, read lazily.

Specs: `hf:owner/name` (fetched through `huggingface_hub` into its cache) or a local folder. Only
safetensors are read; nothing is unpickled.
"""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

PREFIX = "hf:"
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U8": "u1", "BOOL": "?",
}  # fmt: skip


def find(spec: str) -> pathlib.Path:
    """The folder that a spec names."""
    if not str(spec).startswith(PREFIX):
        path = pathlib.Path(spec)
        if not path.is_dir():
            raise FileNotFoundError(f"no folder {path}; a hub repository is hf:owner/name")
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(f"{spec} needs huggingface_hub: pip install huggingface_hub") from None
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    return pathlib.Path(snapshot_download(spec.removeprefix(PREFIX), allow_patterns=patterns))


def read_config(folder: pathlib.Path) -> dict:
    return json.loads((pathlib.Path(folder) / "config.json").read_text())


class Tensors(Mapping):
    """name -> array of all safetensors files of a folder; an array is read when asked for."""

    def __init__(self, folder: pathlib.Path):
        files = sorted(pathlib.Path(folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no *.safetensors in {folder}")
        self._where: dict[str, tuple[pathlib.Path, int, dict]] = {}
        for file in files:
            with file.open("rb") as f:
                size = int.from_bytes(f.read(8), "little")
                if not 0 < size <= file.stat().st_size:
                    raise ValueError(f"{file} is no safetensors file, or is cut off")
                header = json.loads(f.read(size))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                if name in self._where:
                    raise ValueError(f"{name} is in {file} and in {self._where[name][0]}")
                self._where[name] = (file, 8 + size, entry)

    def __getitem__(self, name: str) -> np.ndarray:
        file, start, entry = self._where[name]
        if entry["dtype"] == "BF16":
            import ml_dtypes

            dtype = np.dtype(ml_dtypes.bfloat16)
        elif entry["dtype"] in _DTYPES:
            dtype = np.dtype(_DTYPES[entry["dtype"]])
        else:
            raise ValueError(f"{name} in {file} has dtype {entry['dtype']}, which is not read")
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize or start + end > file.stat().st_size:
            raise ValueError(f"{name} in {file} is cut off")
        if begin == end:
            return np.zeros(shape, dtype)
        return np.memmap(file, dtype, "r", start + begin, shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

"""Reads the golden set of MiniGPT-5: a case's entry in the descriptor, its arrays and its weights.

A case counts which of its arrays were asked for, so that a test can end with
`case.check_all_read()`.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
from safetensors.numpy import load_file

FOLDER = "minigpt5"
# First letters of a case's name -> the test file that reads every case that starts so.
READERS = {
    "eva_vit": "tests/models/vision/test_vit.py",
    "qformer": "tests/models/connectors/test_qformer.py",
    "vocab_extension": "tests/convert/test_llama.py",
    "mapper": "tests/models/heads/test_mapper.py",
    "image_splice": "tests/recipes/minigpt5/test_golden.py",
    "train_": "tests/recipes/minigpt5/test_golden.py",
    "generate_forced": "tests/recipes/minigpt5/test_golden.py",
    "preprocess": "tests/data/test_images.py",
    "datasets": "tests/recipes/minigpt5/test_sources.py",
    "fid_is_math": "tests/eval/scorers/test_golden_minigpt5.py",
    "metrics": "tests/eval/scorers/test_golden_minigpt5.py",
}


def descriptors(root: pathlib.Path) -> dict[str, dict]:
    """Name of a case -> its entry, of the set under golden/ `root`."""
    return json.loads((root / FOLDER / "descriptor.json").read_text())["cases"]


class Arrays(Mapping):
    """The arrays of a file by name; remembers which were read."""

    def __init__(self, file: pathlib.Path):
        self.found = load_file(file)
        self.read = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self.read.add(name)
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


class Case:
    """A case of the set: `about` is its entry, `arrays` what its file holds."""

    def __init__(self, root: pathlib.Path, name: str):
        self.name, self.about = name, descriptors(root)[name]
        self.config = self.about.get("config", {})
        self.arrays = Arrays(root / FOLDER / self.about["file"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def weights(self, prefix: str = "") -> dict[str, np.ndarray]:
        """The weights under `prefix`, by the rest of their PyTorch names, in PyTorch's layout."""
        start = f"w.{prefix}"
        return {k.removeprefix(start): self[k] for k in self.arrays if k.startswith(start)}

    def check_all_read(self) -> None:
        """Fails if the descriptor or the file has an array that nobody asked for."""
        listed = self.about.get("tensors", {})
        for name, (shape, kind) in listed.items():
            found = self.arrays.found[name]
            assert (list(found.shape), str(found.dtype)) == (shape, kind), f"{self.name}: {name}"
        left = ({*listed} | {*self.arrays}) - self.arrays.read
        assert not left, f"{self.name}: arrays that no test reads: {sorted(left)}"


def names(config, prefix: str) -> list[str]:
    """The cases that start with `prefix`; `config` is pytest's, for `pytest_generate_tests`."""
    root = pathlib.Path(config.getoption("--golden-root"))
    return [name for name in descriptors(root) if name.startswith(prefix)]

"""Reads the golden set of MM-Interleaved: a case's descriptor, its arrays, and its weights.

Weights are stored with the case (`w/…`) or made by the formula of the set's README. A case counts
which of its arrays were asked for, so that a test can end with `case.check_all_read()`.
"""

import json
import pathlib
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

# First letters of a case's name -> the test file that reads every case that starts so.
READERS = {
    "msda_core_": "tests/nn/test_deformable.py",
    "mmfs_": "tests/models/test_mmfs.py",
    "llama_mmfs": "tests/models/llm/test_insert.py",
    "perceiver_": "tests/models/connectors/test_perceiver.py",
    "pos_embed": "tests/nn/test_sincos.py",
    "adapter_": "tests/models/vision/test_vit_adapter.py",
    "unet_mmfs_net": "tests/models/diffusion/test_unet_mmfs.py",
    "end_to_end_": "tests/recipes/mm_interleaved/test_golden.py",
    "packing": "tests/data/test_concat.py",
    "metrics": "tests/eval/scorers/test_golden_mm_interleaved.py",
}


def descriptors(root: pathlib.Path) -> dict[str, dict]:
    """Name of a case -> its entry, over every descriptor of the set under golden/ `root`."""
    found = {}
    for file in sorted((root / "mm_interleaved").glob("descriptor*.json")):
        found |= json.loads(file.read_text())
    return found


def names(config, prefix: str) -> list[str]:
    """The cases that start with `prefix`; `config` is pytest's, for `pytest_generate_tests`."""
    root = pathlib.Path(config.getoption("--golden-root"))
    return [name for name in descriptors(root) if name.startswith(prefix)]


class Arrays(Mapping):
    """The arrays of a case by name; remembers which were read."""

    def __init__(self, file: pathlib.Path):
        self.file = np.load(file)
        self.read = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self.read.add(name)
        return self.file[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.files)

    def __len__(self) -> int:
        return len(self.file.files)


class Case:
    """A case of the set: `about` is its descriptor's entry, `arrays` what its file holds."""

    def __init__(self, root: pathlib.Path, name: str):
        self.name, self.entries = name, descriptors(root)
        self.about = self.entries[name]
        self.config = self.about.get("config", {})
        self.arrays = Arrays(root / f"mm_interleaved/{name}.npz")

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def weights(self, prefix: str = "") -> dict[str, np.ndarray]:
        """The weights under `prefix`, by the rest of their PyTorch names, in PyTorch's layout."""
        stored = [k for k in self.arrays if k.startswith("w/")]
        if stored:
            everything = {k.removeprefix("w/"): self[k] for k in stored}
        else:
            params = {k: v for k, v in self._params().items() if k.startswith(prefix)}
            everything = by_formula(params, self.about["weight_seed"])
        return {k.removeprefix(prefix): v for k, v in everything.items() if k.startswith(prefix)}

    def _params(self) -> dict[str, dict]:
        """This entry's table of weights, or that of the entry that has the same seed."""
        if "params" in self.about:
            return self.about["params"]
        seed = self.about["weight_seed"]
        same = [e for e in self.entries.values() if e.get("weight_seed") == seed and "params" in e]
        assert len(same) == 1, f"{self.name}: {len(same)} entries have weights of seed {seed}"
        return same[0]["params"]

    def check_all_read(self) -> None:
        """Fails if the descriptor or the file has an array that nobody asked for."""
        listed = self.about.get("arrays", {})
        for name, about in listed.items():
            assert list(self.arrays.file[name].shape) == about["shape"], f"{self.name}: {name}"
        left = ({*listed} | {*self.arrays}) - self.arrays.read
        assert not left, f"{self.name}: arrays that no test reads: {sorted(left)}"


def by_formula(params: dict[str, dict], seed: int) -> dict[str, np.ndarray]:
    """Weights float32 by name ("Weights given by formula" of the set's README), sums checked."""
    made = {}
    for name, about in params.items():
        key = (zlib.crc32(name.encode()) + seed) % 2**32
        z = np.random.RandomState(key).standard_normal(about["shape"])
        made[name] = (about["offset"] + about["scale"] * z).astype(np.float32)
        total = made[name].astype(np.float64).sum()
        np.testing.assert_allclose(total, about["sum"], rtol=1e-9, atol=1e-9, err_msg=name)
    return made

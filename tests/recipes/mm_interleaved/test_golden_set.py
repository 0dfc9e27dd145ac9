"""That somebody reads every case of the golden set, and what makes its weights."""

import pathlib

import numpy as np
import pytest

from tests.recipes.mm_interleaved import golden

ROOT = pathlib.Path(__file__).parents[3]
pytestmark = pytest.mark.golden


def test_every_case_is_read(golden_root):
    """Of the descriptors, and of the files that have none: by the one test file that `READERS` has
    for names that begin so, which asks for them by these letters."""
    folder = golden_root / "mm_interleaved"
    files = {f.stem for f in folder.iterdir() if f.suffix in (".npz", ".json")}
    cases = {*golden.descriptors(golden_root)} | {f for f in files if "descriptor" not in f}
    assert {f.stem for f in folder.glob("*.npz")} <= cases
    for case in sorted(cases):
        readers = [file for start, file in golden.READERS.items() if case.startswith(start)]
        assert len(readers) == 1, f"{case}: {len(readers)} readers"
    for start, file in golden.READERS.items():
        text = (ROOT / file).read_text()
        assert f'"{start}' in text or f"{start}.json" in text, f"{file} doesn't ask for {start}…"


def test_weights_by_formula():
    """A number that the README's three steps give, and a wrong sum is noticed."""
    entry = {"shape": [2, 1], "offset": 1.0, "scale": 0.5}
    z = np.random.RandomState((0x0D4A1185 + 7) % 2**32).standard_normal(
        (2, 1)
    )  # CRC-32 of "hello world"
    wanted = (1 + 0.5 * z).astype(np.float32)
    good = entry | {"sum": wanted.astype(np.float64).sum()}
    np.testing.assert_array_equal(
        golden.by_formula({"hello world": good}, 7)["hello world"], wanted
    )
    with pytest.raises(AssertionError, match="hello world"):
        golden.by_formula({"hello world": good}, 8)


def test_arrays_that_nobody_reads(golden_root):
    name = next(iter(golden.descriptors(golden_root)))
    case = golden.Case(golden_root, name)
    first, *rest = case.arrays
    for key in rest:
        case[key]
    with pytest.raises(AssertionError, match=first):
        case.check_all_read()
    case[first]
    case.check_all_read()

"""That somebody reads every case of the golden set."""

import pathlib

import pytest
from safetensors import safe_open

from tests.recipes.minigpt5 import golden

ROOT = pathlib.Path(__file__).parents[3]
pytestmark = pytest.mark.golden


def test_every_case_is_read(golden_root):
    """By the one test file that `READERS` has for names that begin so; it asks for them by these
    letters. A case that holds weights alone is read with those that name its file."""
    folder, cases = golden_root / golden.FOLDER, golden.descriptors(golden_root)
    files = {f.name for f in folder.iterdir() if f.suffix in (".safetensors", ".json")}
    assert files - {"descriptor.json"} == {about["file"] for about in cases.values()}
    weights = {about["weights"] for about in cases.values() if "weights" in about}
    for name, about in cases.items():
        if about["file"] in weights:
            continue
        readers = [file for start, file in golden.READERS.items() if name.startswith(start)]
        assert len(readers) == 1, f"{name}: {len(readers)} readers"
    for start, file in golden.READERS.items():
        text = (ROOT / file).read_text()
        assert f'"{start}' in text or f"{start}." in text, f"{file} doesn't ask for {start}…"


def test_weights_are_those_of_the_descriptor(golden_root):
    for name, about in golden.descriptors(golden_root).items():
        if "num_weight_tensors" in about:
            with safe_open(golden_root / golden.FOLDER / about["file"], "numpy") as file:
                found = [key for key in file.keys() if key.startswith("w.")]  # noqa: SIM118
            assert len(found) == about["num_weight_tensors"], name


def test_arrays_that_nobody_reads(golden_root):
    case = golden.Case(golden_root, "image_splice")
    first, *rest = case.arrays
    for key in rest:
        case[key]
    with pytest.raises(AssertionError, match=first):
        case.check_all_read()
    case[first]
    case.check_all_read()

"""Safetensors files: against the reference library, and against hostile ones."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from metamorph_jax.convert import safetensors
from metamorph_jax.errors import WeightError


def file_of(path, header, data=b"", length=None):
    """A file with this header (a table, or bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, shape=None, dtype="F32"):
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_wrote(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"a": rng.normal(size=(3, 4)).astype(np.float32), "b": np.arange(5), "c": np.zeros(0)}
    tensors["half"] = tensors["a"].astype(ml_dtypes.bfloat16)
    tensors["scalar"] = np.array(2.5, np.float16)
    save_file(tensors, tmp_path / "x.safetensors")
    found = safetensors.File(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert found[name].dtype == value.dtype and found.shape_of(name) == value.shape


def test_the_library_reads_what_we_write(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"w": rng.normal(size=(3, 4)).astype(np.float32).T, "n": np.arange(7, dtype=np.int64)}
    shapes = {k: v.shape for k, v in tensors.items()}
    dtypes = {"w": np.dtype(ml_dtypes.bfloat16), "n": np.dtype(np.int64)}
    safetensors.write(tmp_path / "x.safetensors", list(tensors), shapes, dtypes, tensors.get)
    with safe_open(tmp_path / "x.safetensors", "pt") as theirs:
        assert theirs.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(theirs.get_tensor("n").numpy(), tensors["n"])
    back = safetensors.File(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(back["w"], tensors["w"].astype(ml_dtypes.bfloat16))


def test_shards_in_order_and_no_larger_than_said():
    sizes = {"a": 5, "b": 6, "c": 20, "d": 1}
    shards = safetensors.plan_shards(sizes, 11)
    assert shards == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c"],
        "model-00003-of-00003.safetensors": ["d"],
    }
    assert safetensors.plan_shards(sizes, 100) == {"model.safetensors": list(sizes)}


WHOLE = {"a": entry(0, 8), "b": entry(8, 16)}
HOSTILE = {
    "header longer than the file": (WHOLE, 16, 10**6, "header of 1,000,000 bytes"),
    "header of no bytes": (WHOLE, 16, 0, "header of 0 bytes"),
    "overlapping": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, None, "b overlaps a"),
    "outside": ({"a": entry(0, 8), "b": entry(8, 16)}, 12, None, "cut off"),
    "a hole": ({"a": entry(0, 8), "b": entry(12, 16)}, 16, None, "between a and b"),
    "data after the last": (WHOLE, 20, None, "4 bytes after b"),
    "size and shape differ": ({"a": entry(0, 8, [3])}, 8, None, r"F32 \[3\], but has 8"),
    "negative offset": ({"a": entry(-8, 0, [2])}, 8, None, "a is not described"),
    "backward offsets": ({"a": entry(8, 0, [2])}, 8, None, r"data_offsets \[8, 0\]"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, None, "a is not described"),
    "a list": ([1, 2], 8, None, "the header holds a list"),
    "no JSON": (b"{broken", 8, None, "the header is not JSON"),
    "a name twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', 8, None, "a occurs twice"),
    "deep": (b"[" * 100_000, 8, None, "nested deeper"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_one_clear_error(case, tmp_path):
    header, data, length, message = HOSTILE[case]
    path = file_of(tmp_path / "x.safetensors", header, bytes(data), length)
    with pytest.raises(WeightError, match=message) as error:
        safetensors.File(path)
    assert str(path) in str(error.value)


def test_other_formats_under_this_name(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(WeightError, match="a pickle, which could run code"):
        safetensors.File(path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(WeightError, match="torch.save"):
        safetensors.File(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightError, match="git lfs pull"):
        safetensors.File(path)
    path.write_bytes(b"")
    with pytest.raises(WeightError, match="not a complete safetensors file"):
        safetensors.File(path)


def test_unknown_dtype_is_named_when_it_is_wanted(tmp_path):
    path = file_of(tmp_path / "x.safetensors", {"a": entry(0, 8, [4], "F5")}, bytes(8))
    with pytest.raises(WeightError, match="a in .* dtype F5"):
        safetensors.File(path)["a"]


def _good(folder):
    save_file({"a": np.arange(6.0), "b": np.ones((2, 2), np.float32)}, folder / "good.safetensors")
    return (folder / "good.safetensors").read_bytes()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_or_refused_but_never_read_outside(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("x")
    content = bytearray(_good(folder))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    path = folder / "x.safetensors"
    path.write_bytes(content)
    try:
        found = safetensors.File(path)
        for name in found:
            np.array(found[name])
    except WeightError as error:
        assert str(path) in str(error)

"""Pickles with arrays are read as lists; nothing in one is run."""

import pickle

import numpy as np
import pytest

from metamorph_jax.data.sets.pickles import plain_npy, plain_pickle
from metamorph_jax.errors import FileError


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_containers_and_arrays(tmp_path, protocol):
    rows = np.arange(6).reshape(2, 3)
    value = {"a": np.float32(0.5), "b": np.asfortranarray(rows), "c": (1, "x", None),
             "d": np.array([b"one", b"three"]), "e": rows.astype(">i2")}  # fmt: skip
    (tmp_path / "x.p").write_bytes(pickle.dumps(value, protocol))
    assert plain_pickle(tmp_path / "x.p") == {
        "a": 0.5, "b": rows.tolist(), "c": (1, "x", None), "d": [b"one", b"three"],
        "e": rows.tolist(),
    }  # fmt: skip


def test_npy_of_objects_and_of_numbers(tmp_path):
    ragged = np.empty(2, object)
    ragged[:] = [np.array([1]), np.arange(3)]
    for value, expected in (
        ({"S1/E1/1": ["Pororo waves."]}, {"S1/E1/1": ["Pororo waves."]}),
        (ragged, [[1], [0, 1, 2]]),
        (np.array([[b"a.png", b"b.png"]]), [[b"a.png", b"b.png"]]),
        (np.array([[b"a.png", b"b.png"]], object), [[b"a.png", b"b.png"]]),
    ):
        np.save(tmp_path / "x.npy", value)
        assert plain_npy(tmp_path / "x.npy") == expected


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_what_would_run_is_refused(tmp_path, capsys):
    (tmp_path / "x.p").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(FileError, match="x.p is not a plain pickle: .* builtins.print"):
        plain_pickle(tmp_path / "x.p")
    np.save(tmp_path / "x.npy", {"a": Evil()})
    with pytest.raises(FileError, match="builtins.print"):
        plain_npy(tmp_path / "x.npy")
    (tmp_path / "y.npy").write_bytes(b"\x93NUMPY\x01")
    with pytest.raises(FileError, match="y.npy is not a .npy file"):
        plain_npy(tmp_path / "y.npy")
    assert capsys.readouterr().out == ""

"""Pickles with arrays are read as lists; nothing in one is run."""

import json
import pickle

import numpy as np
import pytest

from metamorph_jax.data.sets.pickles import main, plain_npy, plain_pickle
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


def test_rows_of_pickled_records(tmp_path, capsys):
    """As JSON lines; what is not such a list, or would run, is named."""
    made = {"list.pkl": [{"a": "\u00e9"}, {"a": np.arange(2)}], "dict.pkl": {"x": {"a": 1}},
            "evil.pkl": [{"a": Evil()}], "odd.pkl": [1], "bytes.pkl": [{"a": b"x"}]}  # fmt: skip
    for name, value in made.items():
        (tmp_path / name).write_bytes(pickle.dumps(value))
    assert main([str(tmp_path / "list.pkl"), str(tmp_path / "dict.pkl")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{"a": "\u00e9"}, {"a": [0, 1]}, {"a": 1}]
    for name, why in (("evil", "builtins.print"), ("odd", "not a list"), ("bytes", "record 0")):
        assert main([str(tmp_path / f"{name}.pkl")]) == 2
        told = capsys.readouterr()
        assert why in told.err and f"{name}.pkl" in told.err and told.out == ""

"""The harness catches what it is there for."""

import pathlib
import subprocess
import sys
import time

import pytest

from metamorph_jax.errors import UserError
from tests.hostile import harness


def refuse():
    raise UserError("no: /some/file")


def write(path):
    return lambda: pathlib.Path(path).write_text("")


def test_what_is_fine(tmp_path):
    assert harness.check(["--version"], tmp_path, code=0).out
    assert harness.check(["nonsense"], tmp_path, code=2, naming="nonsense").err
    assert harness.check(["convert", "--nonsense"], tmp_path, code=2).err
    harness.attempt(refuse, tmp_path, code=2, naming="/some/file")
    harness.attempt(write(tmp_path / "a"), tmp_path, code=0)
    harness.attempt(write("relative"), tmp_path, code=0)


FAULTS = {
    "traceback": lambda p: {}["key"],
    "hang": lambda p: time.sleep(3),
    "memory": lambda p: bytearray(b"1" * (harness.BYTES + 2**20)),
    "all memory": lambda p: bytearray(2**40),
    "outside": lambda p: (p.parent / "outside").mkdir(),
    "program": lambda p: subprocess.run([sys.executable, "-c", ""]),
    "two lines": lambda p: print("metamorph: first", file=sys.stderr) or refuse(),
    "control characters": lambda p: print("\x1b[2J", file=sys.stderr) or refuse(),
    "wrong file": lambda p: refuse(),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_not(tmp_path, name):
    folder = tmp_path / "inside"
    folder.mkdir()
    naming = "/another/file" if name == "wrong file" else ""
    with pytest.raises(AssertionError):
        harness.attempt(lambda: FAULTS[name](folder), folder, naming=naming, seconds=1)

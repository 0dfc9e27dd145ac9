"""One process at a time in a folder that is written: of two, one set of results was left."""

import contextlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from metamorph_jax import cli
from metamorph_jax.convert import export
from metamorph_jax.data import cache
from metamorph_jax.data.sources.base import ImageRef

HOLD = """
import sys
from metamorph_jax.lock import Lock
lock = Lock(sys.argv[1], "is busy")
print("held", flush=True)
input()
"""


@contextlib.contextmanager
def held(folder):
    """Another process holds the folder's lock."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert other.stdout.readline() == b"held\n"
        yield other
    finally:
        other.communicate(b"\n", timeout=60)


@pytest.mark.parametrize("command", ["generate", "features"])
def test_results_of_two_commands_do_not_mix(command, tmp_path, capsys):
    """The second one is refused before it loads a model."""
    (tmp_path / "a.png").touch()
    asked = {"generate": ["--prompt", "x"], "features": ["--images", str(tmp_path)]}[command]
    with held(tmp_path / "out") as other:
        words = ["--workdir", str(tmp_path), *asked, "--out", str(tmp_path / "out")]
        assert cli.main([command, *words]) == 2
    error = capsys.readouterr().err
    assert f"another process writes in {tmp_path / 'out'}" in error and f"pid {other.pid}" in error
    assert "choose another --out" in error


def test_a_cache_is_filled_by_one_process_at_a_time(tmp_path, capfd):
    """Rows that two of them appended were not those that their lines of the index named."""
    spec = cache.CacheSpec("features", "f", (2,), "float32")
    (tmp_path / "a.png").write_bytes(b"an image")
    found = [(ImageRef(str(tmp_path / "a.png")), np.ones(2, np.float32))]
    with held(spec.folder(str(tmp_path))) as other:
        filling = threading.Thread(target=cache.put, args=(str(tmp_path), spec, found))
        filling.start()
        filling.join(0.5)
        assert filling.is_alive()
        other.stdin.write(b"\n")
        other.stdin.flush()
        filling.join(60)
    assert len(cache.ArrayCache(spec.folder(str(tmp_path)))) == 1
    error = capfd.readouterr().err
    assert "another process fills the cache" in error and f"pid {other.pid}" in error


def test_two_conversions_to_one_folder(tmp_path):
    with (
        pytest.raises(FileExistsError, match="exists and is not an empty folder"),
        export.whole_or_nothing(tmp_path / "out") as folder,
    ):
        (folder / "mine").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "theirs"]

"""Local checkpoints of one process: killed, damaged, another mesh; two of them are in
tests/distributed/test_tiers.py."""

import os
import pathlib
import sys

import pytest

from tests.devices import virtual

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from metamorph_jax.errors import (
    CheckpointError,  # noqa: E402
    ConfigError,  # noqa: E402
)
from metamorph_jax.train import local_checkpoints, loop  # noqa: E402
from metamorph_jax.train.checkpoint import Checkpoints  # noqa: E402
from tests.train import forked  # noqa: E402
from tests.train.test_loop import config, final, lines, same  # noqa: E402

pytestmark = pytest.mark.e2e

STEPS = 12


def local(tmp_path, **changes):
    """Every second step to the local disk, every sixth to the workdir."""
    options = {"folder": str(tmp_path / "disk"), "every": 2}
    return config(
        steps=STEPS, checkpoint_every=6, local_checkpoints=options | changes.pop("options", {}),
        data={"log": str(tmp_path / "log")} | changes.pop("data", {}),
        optim={"ema_decay": 0.9}, **changes,
    )  # fmt: skip


def shards(tmp_path):
    """Step -> file of the only run on the disk."""
    return {int(file.stem): file for file in tmp_path.glob("disk/*/*/host_0/*.shards")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run without local checkpoints."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    loop.train(config(steps=STEPS, optim={"ema_decay": 0.9}), workdir)
    return workdir


def kill_between(tmp_path, step=10):
    """A run that is killed after the local save of this step; the workdir has 6, if that was."""
    cfg = local(tmp_path, data={"pause": 0.3})
    run = forked.Run(cfg, tmp_path / "w")
    run.until(lambda: step in shards(tmp_path))
    run.kill()
    checkpoints = Checkpoints(tmp_path / "w")
    assert checkpoints.steps == ([6] if step > 6 else [])
    checkpoints.close()
    return cfg


def numbers(folder):
    return [(row["step"], row["seen"], row["loss"], row["grad_norm"]) for row in lines(folder)]


def test_killed_between_local_and_persistent(whole, tmp_path, capfd):
    cfg = kill_between(tmp_path)
    assert sorted(shards(tmp_path)) == [8, 10]
    loop.train(cfg, tmp_path / "w")
    said = capfd.readouterr().out
    assert "local checkpoint 10 is newer than the workdir's (6)" in said
    assert "resuming after step 10" in said
    lives = (tmp_path / "log").read_text().split("|")
    assert lives[-1].split() == ["10", "11"]
    same(final(whole), final(tmp_path / "w"))
    assert numbers(whole) == numbers(tmp_path / "w")
    assert not list((tmp_path / "disk").iterdir())  # the run is over
    checkpoints = Checkpoints(tmp_path / "w")
    assert checkpoints.steps == [6, 12]
    checkpoints.close()


@pytest.mark.parametrize("how", ["truncated", "altered"])
def test_damaged_falls_back(how, whole, tmp_path, capfd):
    """To the local one before; and if that is damaged, too, to the workdir's."""
    cfg = kill_between(tmp_path)
    files = shards(tmp_path)
    for step in (10,) if how == "altered" else (10, 8):
        data = bytearray(files[step].read_bytes())
        if how == "altered":
            data[len(data) // 3] ^= 1
        files[step].write_bytes(data if how == "altered" else data[:-100])
    loop.train(cfg, tmp_path / "w")
    said = " ".join(capfd.readouterr().out.split())  # lines are wrapped
    assert f"host 0: the local checkpoint {files[10]} is damaged ({how})" in said
    if how == "altered":
        assert "local checkpoint 8 is newer than the workdir's (6)" in said
    else:
        assert "no local checkpoint can be used: resuming from the workdir's, step 6" in said
    same(final(whole), final(tmp_path / "w"))


def test_no_checkpoint_in_the_workdir_yet(whole, tmp_path, capfd):
    """Killed before the first save there: what the data's statistics set is local, too."""
    cfg = kill_between(tmp_path, step=4)
    loop.train(cfg, tmp_path / "w")
    assert "than the workdir's (none)" in capfd.readouterr().out
    same(final(whole), final(tmp_path / "w"))


def test_another_mesh_and_another_run(whole, tmp_path, capfd):
    cfg = kill_between(tmp_path)
    env = virtual(2)
    other = forked.Run(cfg | {"steps": 10}, tmp_path / "w", env=env)
    assert other.wait() == 0, other.said
    line = ("local checkpoints up to step 10 are of hosts=1, one-device, this run has hosts=1, "
            "fsdp=2: not used")  # fmt: skip
    assert line in other.said and "resuming after step 6" in other.said
    # A run in the emptied workdir is another one.
    (tmp_path / "w").rename(tmp_path / "gone")
    loop.train(cfg, tmp_path / "w")
    said = capfd.readouterr().out
    assert "local checkpoint" not in said and "resuming" not in said
    same(final(whole), final(tmp_path / "w"))


def test_disk_full_and_wrong_options(tmp_path):
    with pytest.raises(ConfigError, match=r"config.local_checkpoints: every must be at least 1"):
        loop.train(local(tmp_path, options={"every": 0}), tmp_path / "w")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"local_checkpoints.folder: host 0: .*Not a directory"):
        loop.train(local(tmp_path, options={"folder": str(tmp_path / "file")}), tmp_path / "w")


def test_failed_write_ends_the_run(tmp_path, monkeypatch):
    """Full disk: said at the next step, and no half of a file stays."""

    real = os.replace

    def full(old, new):
        if str(new).endswith(".shards"):
            raise OSError(28, "No space left on device")
        real(old, new)

    monkeypatch.setattr(local_checkpoints.os, "replace", full)
    with pytest.raises(CheckpointError, match=r"2.shards could not be written: .*No space left"):
        loop.train(local(tmp_path), tmp_path / "w")
    assert not [name for _, _, names in os.walk(tmp_path / "disk") for name in names]

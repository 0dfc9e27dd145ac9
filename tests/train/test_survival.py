"""What a run lives through: signals, kills, full disks, damaged checkpoints, bad steps."""

import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.devices import virtual

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from metamorph_jax.errors import (  # noqa: E402
    CheckpointError,  # noqa: E402
    ConfigError,  # noqa: E402
    LossSpike,
    NonFiniteError,
)
from metamorph_jax.train import checkpoint, loop  # noqa: E402
from metamorph_jax.train.checkpoint import Checkpoints  # noqa: E402
from tests.train import forked  # noqa: E402
from tests.train.test_loop import config, final, lines, same  # noqa: E402

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    loop.train(config(), workdir)
    return workdir


def test_sigterm_saves(whole, tmp_path):
    """Also in the middle of a step; the same command then ends as if nothing had been."""
    cfg = config(data={"pause": 0.3}, checkpoint_every=100)
    run = forked.Run(cfg, tmp_path / "w")
    run.until(lambda: "step 1/6" in run.said)
    run.signal(signal.SIGTERM)
    assert run.wait() == 143
    assert "checkpoint saved" in run.said and "s after the signal" in run.said
    assert not (tmp_path / "w/final").exists()
    loop.train(cfg, tmp_path / "w")
    same(final(whole), final(tmp_path / "w"))


def kill_and_go_on(tmp_path, kills: int, steps: int):
    """Kills a run so many times, then lets it end, and compares with one that was left alone.

    Half of the kills come while a checkpoint is being written, the others at any time, the start
    included. The toy's data write down which batch they gave; losses follow from the batches and
    from random numbers that depend on the step.
    """
    cfg = config(
        steps=steps, initial_batches=0, checkpoint_every=1,
        data={"pause": 0.02, "log": str(tmp_path / "log")},
        compilation_cache=str(tmp_path / "compiled"), model={"noise": 0.1, "width": 512},
        optim={"learning_rate": 0.02, "schedule": "constant"},
    )  # fmt: skip
    run = forked.Run(cfg | {"checkpoint_every": 50}, tmp_path / "alone")
    assert run.wait() == 0, run.said
    os.remove(tmp_path / "log")
    rng, workdir = random.Random(0), tmp_path / "w"
    in_save = 0
    for k in range(kills):
        before = newest(workdir)
        run = forked.Run(cfg, workdir, name=f"_{k}")
        if k % 4 == 3:  # any time at all
            time.sleep(rng.uniform(0, 2))
        else:
            run.until(lambda before=before: newest(workdir) > before)
            if k % 2:
                time.sleep(rng.uniform(0, 0.2))
            else:
                run.until(lambda: list(workdir.glob("checkpoints/*tmp*")))
                time.sleep(rng.uniform(0, 0.02))
        run.kill()
        in_save += bool(list(workdir.glob("checkpoints/*tmp*")))
        assert newest(workdir) >= before
    run = forked.Run(cfg, workdir)
    assert run.wait() == 0, run.said
    assert in_save >= kills // 5
    same(final(tmp_path / "alone"), final(workdir))
    # Every life began with the batch after its checkpoint, and left none out.
    lives = [list(map(int, life.split())) for life in (tmp_path / "log").read_text().split("|")]
    seen = [life for life in lives if life]
    for before, life in zip([[-1], *seen], seen, strict=False):
        assert life == list(range(life[0], life[0] + len(life))) and life[0] <= before[-1] + 1
    assert seen[-1][-1] == steps - 1

    def numbers(folder):
        return [(row["step"], row["seen"], row["loss"], row["grad_norm"]) for row in lines(folder)]

    assert numbers(workdir) == numbers(tmp_path / "alone")


def newest(workdir) -> int:
    names = [p.name for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()]
    return max(map(int, names), default=0)


def test_killed_and_started_again(tmp_path):
    kill_and_go_on(tmp_path, 3, steps=30)


@pytest.mark.slow
def test_killed_ten_times(tmp_path):
    kill_and_go_on(tmp_path, 10, steps=100)


def test_disk_full_during_a_save(whole, tmp_path):
    """A file system that is too small for the third checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    limit = subprocess.run(mount, capture_output=True).returncode != 0
    try:
        # Where mounting isn't allowed, files of the later saves may not grow instead.
        data = {"limit": [3, 4096]} if limit else {"fill": [3, str(disk / "w"), 200_000]}
        cfg = config(data=data | {"pause": 0.1}, model={"noise": 0.1, "width": 128}, steps=12)
        run = forked.Run(cfg, disk / "w")
        assert run.wait() == 2, run.said
        assert "could not be written" in run.said and "Is the disk full?" in run.said, run.said
        assert run.said.splitlines()[-1].startswith("metamorph: the checkpoint")
        kept = newest(disk / "w")
        assert kept >= 2 and f"the newest whole one is {disk}/w/checkpoints/{kept}" in run.said
        for filler in (disk / "w").glob("filler"):
            filler.unlink()
        cfg["data"] = {"pause": 0.1}
        (disk / "w/config.json").unlink()  # the data option that fills the disk is gone
        loop.train(cfg, disk / "w")
        ended = final(disk / "w")
    finally:
        if not limit:
            subprocess.run(["umount", "-l", str(disk)], check=True)
    loop.train(config(model={"noise": 0.1, "width": 128}, steps=12), tmp_path / "alone")
    same(final(tmp_path / "alone"), ended)


def damage(folder: pathlib.Path, how: str) -> None:
    """Of the checkpoint's largest data file, or of its metadata."""
    if how == "metadata":
        (folder / "state" / "_METADATA").write_text("{")
        return
    file = max((f for f in folder.rglob("d/*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        data[middle] ^= 0x10
        file.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "altered", "metadata"])
def test_damaged_checkpoint(how, tmp_path):
    cfg = config(steps=4, model={"noise": 0.1, "width": 64}, optim={"schedule": "constant"})
    loop.train(cfg, tmp_path / "w")
    before = final(tmp_path / "w")
    damage(tmp_path / "w/checkpoints/4", how)
    with pytest.raises(CheckpointError, match=r"w/checkpoints/4 can't be read .*=previous"):
        loop.train(cfg, tmp_path / "w")
    loop.train(cfg | {"damaged_checkpoint": "previous"}, tmp_path / "w")
    assert (tmp_path / "w/damaged/4").is_dir()
    same(before, final(tmp_path / "w"))
    checkpoints = Checkpoints(tmp_path / "w")
    assert checkpoints.steps == [2, 4]
    checkpoints.close()


def test_no_whole_checkpoint_left(tmp_path):
    cfg = config(steps=2, damaged_checkpoint="previous")
    loop.train(cfg, tmp_path / "w")
    damage(tmp_path / "w/checkpoints/2", "truncated")
    with pytest.raises(CheckpointError, match="no whole checkpoint is left"):
        loop.train(cfg, tmp_path / "w")


def test_checksums_name_the_leaf():
    """A swap of two values, a single bit, and another way to lie over devices."""
    from metamorph_jax.train.checkpoint import checksums

    tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True, False]),
            "c": np.ones(3, np.float16), "d": np.int32(7)}  # fmt: skip
    put = lambda tree: jax.tree.map(jax.numpy.asarray, tree)  # noqa: E731
    sums = checksums(put(tree))
    assert sums == checksums(put(tree)) and len(sums) == 4
    swapped = {**tree, "a": tree["a"][::-1].copy()}
    flipped = {**tree, "b": np.array([False, True])}
    for other, name in (
        (swapped, "['a']"),
        (flipped, "['b']"),
        ({**tree, "d": np.int32(6)}, "['d']"),
    ):
        found = checksums(put(other))
        assert [k for k in sums if sums[k] != found[k]] == [name]


def test_another_mesh_goes_on(whole, tmp_path):
    """From one device to four, two ways of cutting, and back."""
    loop.train(config(steps=2, optim={"schedule": "constant"}), tmp_path / "w")
    cfg = config(steps=4, optim={"schedule": "constant"}, mesh={"fsdp": 2, "tensor": 2})
    env = virtual(4)
    run = forked.Run(cfg, tmp_path / "w", env=env)
    assert run.wait() == 0 and "changed since the run began: mesh.fsdp: -1 -> 2" in run.said
    loop.train(config(optim={"schedule": "constant"}), tmp_path / "w")
    loop.train(config(optim={"schedule": "constant"}), tmp_path / "alone")
    same(final(tmp_path / "alone"), final(tmp_path / "w"), 1e-5)


def test_nonfinite_stops_and_names_source_step_and_samples(tmp_path):
    cfg = config(data={"poison": 4})
    for _ in range(2):  # the second time from the checkpoint after step 4, which is a good one
        with pytest.raises(NonFiniteError, match=r"step 5: .*losses text; data source: bad;"):
            loop.train(cfg, tmp_path / "w")
    kept = np.load(tmp_path / "w/bad_step_5_process_0.npz")
    assert (kept["tokens"][0] == 31).all() and (kept["sources"][0] == 1).all()
    noted = json.loads((tmp_path / "w/bad_step_5_process_0.json").read_text())
    assert noted["samples"] == [[f"batch 4 row {row}"] for row in range(8)]
    assert newest(tmp_path / "w") == 4


@pytest.mark.parametrize("bad", ["poison", "spike"])
def test_bad_step_is_skipped(bad, tmp_path):
    """It changes nothing, is written down, and a run that stops there and goes on is the same."""
    guard = {"on_bad": "skip", "spike": 6.0, "spike_after": 3}
    cfg = config(
        data={bad: 4}, guard=guard, checkpoint_every=5, steps=7, optim={"schedule": "constant"}
    )
    loop.train(cfg, tmp_path / "w")
    rows = lines(tmp_path / "w")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert "loss" not in rows[4] and rows[4]["skipped_steps"] == 1 and rows[6]["loss"] < 10
    noted = json.loads((tmp_path / "w/bad_step_5_process_0.json").read_text())
    assert noted["samples"][3] == ["batch 4 row 3"]
    assert ("spike" if bad == "spike" else "not finite") in noted["what"]
    # Parameters after the skipped step are those before it.
    loop.train(cfg | {"steps": 5}, tmp_path / "five")
    loop.train(cfg | {"steps": 7}, tmp_path / "five")
    same(final(tmp_path / "w"), final(tmp_path / "five"))


def test_spike_stops(tmp_path):
    cfg = config(data={"spike": 4}, guard={"spike": 6.0, "spike_after": 3})
    with pytest.raises(LossSpike, match=r"step 5: loss .* is a spike .*guard.on_bad=skip"):
        loop.train(cfg, tmp_path / "w")
    assert newest(tmp_path / "w") == 4


def test_too_many_bad_steps_in_a_row(tmp_path):
    guard = {"on_bad": "skip", "most_in_a_row": 2}
    with pytest.raises(NonFiniteError, match="bad step 2 in a row"):
        loop.train(config(data={"poison_from": 2}, guard=guard), tmp_path / "w")


def test_batch_without_targets_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="step 3: nothing in the batch has a target"):
        loop.train(config(data={"masked": 2}), tmp_path / "w")


def test_save_in_the_background_fails_loudly(tmp_path, monkeypatch):
    """Not at the next save, but at the next step."""
    started = []
    real = Checkpoints.save

    def save(self, step, *args):
        real(self, step, *args)
        if step == 2:
            self._saving[1].result()
            broken = self._waiter.submit(lambda: 1 / 0)
            self._saving, _ = (step, broken), started.append(step)

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(CheckpointError, match=r"checkpoints/2 could not be written: division"):
        loop.train(config(checkpoint_every=2, steps=1000), tmp_path / "w")
    assert started == [2] and len(lines(tmp_path / "w")) < 20


def test_unlimited_files():
    """The limit of the disk test didn't leak into this process."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_run_of_an_earlier_version(tmp_path, monkeypatch):
    """Checkpoints had AdamW's own moments then; both the workdir and the checkpoint say so."""
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    loop.train(config(steps=2), tmp_path / "w")
    monkeypatch.undo()
    message = "w was written by another version .* format 1, this version reads format 2"
    message += " .*--workdir"
    with pytest.raises(CheckpointError, match=message):
        loop.train(config(), tmp_path / "w")
    for name in ("config.json", "versions.json"):
        (tmp_path / "w" / name).unlink()
    with pytest.raises(CheckpointError, match="checkpoints/2 was written by another version"):
        loop.train(config(), tmp_path / "w")

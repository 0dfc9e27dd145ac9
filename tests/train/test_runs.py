"""Resuming with other options, exports, locks, and starts that fail, with the real loop."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from metamorph_jax.errors import CheckpointError, ConfigError, Preempted, UserError
from metamorph_jax.lock import Lock
from metamorph_jax.train import checkpoint, loop, workdir
from tests.train.test_loop import config, final, same
from tests.train.test_survival import damage


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run of four steps with everything that may be switched off."""
    folder = tmp_path_factory.mktemp("runs") / "w"
    loop.train(full(), folder)
    return folder


def full(**changes):
    optim = {"schedule": "constant", "ema_decay": 0.5} | changes.pop("optim", {})
    return config(steps=4, guard={"spike": 50.0}, optim=optim) | changes


@pytest.fixture
def run(ended, tmp_path):
    return pathlib.Path(shutil.copytree(ended, tmp_path / "w"))


CHANGES = {
    "momentum": ({"optim": {"momentum_dtype": "bfloat16"}}, "from float32 to bfloat16"),
    "spike": ({"guard": {"spike": 0.0}}, "loss statistics: no longer kept"),
    "average": ({"optim": {"ema_decay": None}}, "moving average of the parameters: no longer"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_option_of_the_state(name, run, capsys):
    """The run goes on from its checkpoint, and says what is done with the state."""
    change, said = CHANGES[name]
    loop.train(full(**change) | {"steps": 5}, run)
    out = "".join(capsys.readouterr())
    assert said in out and "resuming after step 4" in out
    assert checkpoint.export_notes(run)["step"] == 5 and not (run / "damaged").exists()


def test_another_optimizer_does_not_fit_and_is_named(run):
    """Only leaves of its state were."""
    changed = full(optim={"name": "lion"}) | {"steps": 5, "damaged_checkpoint": "previous"}
    with pytest.raises(CheckpointError, match="/nu/.*Changed .*optim.name: 'adamw' -> 'lion'"):
        loop.train(changed, run)
    assert not (run / "damaged").exists()


def test_setting_aside_never_empties_the_folder(run):
    for step in (2, 4):
        damage(run / f"checkpoints/{step}", "metadata")
    with pytest.raises(CheckpointError, match="none was set aside"):
        loop.train(full() | {"steps": 5, "damaged_checkpoint": "previous"}, run)
    assert workdir.checkpoint.steps_in(run) == [2, 4] and not (run / "damaged").exists()


@pytest.mark.parametrize("left", ["damaged", "final", "metrics.jsonl"])
def test_lost_checkpoints_stop_a_run(left, run):
    (run / "checkpoints").rename(run / "damaged")
    for name in {"damaged", "final"} - {left}:
        shutil.rmtree(run / name)
    if left != "metrics.jsonl":
        (run / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match="but no checkpoint: the run would start again"):
        loop.train(full(), run)


def test_export_says_what_it_is_and_goes_when_the_run_goes_on(run, monkeypatch):
    notes = checkpoint.export_notes(run)
    assert (notes["step"], notes["stage"]) == (4, "all")
    assert notes["config"] == workdir.digest(loop.resolve(full()).table)
    stop = lambda self, step: step == 5 and not self._note()  # noqa: E731
    monkeypatch.setattr(loop.Sigterm, "received", stop)
    with pytest.raises(Preempted):
        loop.train(full() | {"steps": 9}, run)
    with pytest.raises(ConfigError, match="isn't finished"):
        checkpoint.read_export(run)


def test_export_has_checksums(ended, run):
    before = final(ended)
    file = max((f for f in (run / "final").rglob("d/*")), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)
    for wanted in (None, checkpoint.export_shapes(run)):
        with pytest.raises(CheckpointError, match="final are damaged"):
            checkpoint.read_export(run, placed(wanted))
    half = {k: jax.ShapeDtypeStruct(x.shape, np.float16) for k, x in before.items()}
    read = checkpoint.read_export(ended, placed(half))
    same(
        {k: x.astype(np.float16) for k, x in before.items()},
        {k: np.array(x) for k, x in read.items()},
    )


def placed(shapes):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    make = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
    return shapes and {k: make(x) for k, x in shapes.items()}


HOLD = """
import pathlib, sys, time
from metamorph_jax.lock import Lock
lock = Lock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_one_run_per_workdir(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=rf"another process trains .*pid {other.pid}, since 2"):
            loop.train(config(), tmp_path)
        assert [f.name for f in tmp_path.iterdir()] == ["lock"]
    finally:
        other.kill()
        other.wait()
    Lock(tmp_path).close()  # released by death


WRONG = {
    "weights": {"model": {"weights": "workdir:nowhere"}},
    "model": {"model": {"width": -1}},
    "mesh": {"mesh": {"tensor": 0}},
    "batch": {"mesh": {"fsdp": -1, "data": 7}},
    "optimizer": {"optim": {"name": "nonsense"}},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_failed_start_binds_nothing(name, tmp_path):
    with pytest.raises(UserError):
        loop.train(config(**WRONG[name]), tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_config_without_a_checkpoint_binds_nothing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"batch_size": 3, "checkpoint_every": 500}))
    changes = workdir.check(tmp_path, {"batch_size": 4}, trained=False)
    assert "batch_size: 3 -> 4" in changes
    (tmp_path / "versions.json").write_text(json.dumps({"format": checkpoint.FORMAT}))
    with pytest.raises(ConfigError, match="batch_size: 3 -> 4"):
        workdir.check(tmp_path, {"batch_size": 4}, trained=True)

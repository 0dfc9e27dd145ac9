"""Local checkpoints of two processes: both go on from them; one loses its folder and takes the
shards from a replica, or, if there is none, both go on from the workdir."""

import pathlib
import shutil
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests.distributed.test_processes import numbers, same_run, start, toy  # noqa: E402
from tests.train import forked  # noqa: E402

pytestmark = pytest.mark.e2e


def config(folder, mesh, pause=0.0):
    return toy(
        steps=8, checkpoint_every=4, mesh=mesh, initial_batches=0, data={"pause": pause},
        local_checkpoints={"folder": str(folder), "every": 2},
        optim={"learning_rate": 0.02, "ema_decay": 0.9, "momentum_dtype": "bfloat16"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs without local checkpoints, by mesh axis."""
    made = {}

    def run(axis):
        if axis not in made:
            folder = tmp_path_factory.mktemp("run") / axis
            made[axis] = start(folder, (2, config("", {axis: 2})))
        return made[axis]

    return run


def files(folder, step):
    return sorted(folder.glob(f"*/*/host_*/{step}.shards"))


@pytest.mark.parametrize("case", ["both", "none", "replica"])
def test_two_hosts(case, whole, tmp_path):
    axis, disk = "slice" if case == "replica" else "fsdp", tmp_path / "disk"
    mesh = {axis: 2}
    runs = forked.together(2, config(disk, mesh, pause=0.5), tmp_path / "w")
    runs[0].until(lambda: len(files(disk, 6)) == 2)
    for run in runs:
        run.kill()
    assert not (tmp_path / "w/final").exists()
    if case != "both":
        shutil.rmtree(files(disk, 6)[1].parent)
    runs = forked.together(2, config(disk, mesh, pause=0.5), tmp_path / "w")
    forked.finish(runs)
    said = runs[0].said
    if case == "none":
        assert "local checkpoint 6 isn't on all hosts: 1 lacks it" in said
        assert "no local checkpoint can be used: resuming from the workdir's, step 4" in said
    else:
        assert "local checkpoint 6 is newer than the workdir's (4)" in said
        assert ("host 1 takes local checkpoint 6 from a replica" in said) == (case == "replica")
    assert f"resuming after step {4 if case == 'none' else 6}" in said
    same_run(whole(axis), tmp_path / "w", 0)
    assert numbers(tmp_path / "w")[-1]["step"] == 8
    assert not list(disk.iterdir())

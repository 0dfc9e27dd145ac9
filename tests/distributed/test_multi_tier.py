"""Multi-tier checkpoints of two processes, with a stand-in for GKE's daemon: it numbers the hosts,
takes their replicator.yaml, and gives each the newest step back, or that of a replica."""

import os
import pathlib
import shutil
import sys
import threading

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from metamorph_jax.errors import JoinError  # noqa: E402
from metamorph_jax.train import multi_tier  # noqa: E402
from metamorph_jax.train.config import LocalConfig  # noqa: E402
from tests.distributed.test_processes import numbers, same_run, start, toy  # noqa: E402
from tests.train import forked  # noqa: E402

pytestmark = pytest.mark.e2e


def config(folder, mesh):
    local = {"folder": str(folder), "every": 2, "multi_tier": 30} if folder else {}
    return toy(
        steps=8, checkpoint_every=4, mesh=mesh, initial_batches=0,
        data={"pause": 0.3 if folder else 0.0}, local_checkpoints=local,
        optim={"learning_rate": 0.02, "ema_decay": 0.9, "momentum_dtype": "bfloat16"},
    )  # fmt: skip


class Daemon:
    """GKE's, on both hosts, for one start of the run."""

    def __init__(self, folders: list[pathlib.Path]):
        self.folders, self.asked, self._end = folders, {}, threading.Event()
        address = f"localhost:{forked.free_port()}"
        for k, folder in enumerate(folders):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "jax-init-info.txt").write_text(f"{k}\n{address}\n")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        wishes = [folder / "replicator.yaml" for folder in self.folders]
        while not all(wish.exists() for wish in wishes):
            if self._end.wait(0.05):
                return
        for k, wish in enumerate(wishes):
            self.asked[k] = dict(line.split(": ", 1) for line in wish.read_text().splitlines())
        found = [self._newest(k) for k in range(len(wishes))]
        for k, folder in enumerate(self.folders):
            if found[k]:
                shutil.rmtree(folder / found[k].name, ignore_errors=True)
            marker = folder / f"job-s{found[k].name if found[k] else 0}-n{k}-w0.restore"
            if found[k]:
                os.symlink(found[k], marker)
            else:
                marker.touch()
            wishes[k].unlink()

    def _newest(self, k) -> pathlib.Path | None:
        """A copy of the newest step of this host, or else of its peers, in a folder of ours."""
        peers = [int(i) for i in self.asked[k]["peer-ranks"].strip("[]").split(",") if i.strip()]
        mine = self.folders[k].parent / f"daemon_{k}"
        for folder in (self.folders[i] for i in (k, *peers)):
            steps = [int(step.name) for step in folder.iterdir() if step.name.isdigit()]
            if steps:
                return shutil.copytree(folder / str(max(steps)), mine / str(max(steps)))
        return None

    def stop(self):
        self._end.set()
        self._thread.join()


def together(disk, workdir, mesh):
    """The run on two hosts, each with a folder of its own; JAX counts them as SLURM would."""
    folders = [disk / f"host_{k}" for k in range(2)]
    daemon, runs = Daemon(folders), []
    for k, folder in enumerate(folders):
        slurm = {"JOB_ID": "1", "NTASKS": "2", "PROCID": str(k), "LOCALID": "0",
                 "STEP_NODELIST": "localhost"}  # fmt: skip
        env = {f"SLURM_{name}": value for name, value in slurm.items()} | {"JOBSET_NAME": "job"}
        runs.append(forked.Run(config(folder, mesh), workdir, name=f"_{k}", env=env))
    return daemon, runs


def steps(disk):
    """Steps that both hosts have whole."""
    return set.intersection(
        *({step.name for step in disk.glob(f"host_{k}/*") if step.name.isdigit()} for k in (0, 1))
    )


def test_two_hosts_and_a_lost_disk(tmp_path):
    """Host 0 goes on from its own step 6, host 1 from that of its replica."""
    mesh, disk = {"slice": 2}, tmp_path / "disk"
    daemon, runs = together(disk, tmp_path / "w", mesh)
    runs[0].until(lambda: "6" in steps(disk))
    for run in runs:
        run.kill()
    daemon.stop()
    asked = daemon.asked[1]
    assert (asked["job-name"], asked["nodes"], asked["peer-ranks"]) == ("job", "2", "[0]")
    assert (asked["assume-data-parallelism"], asked["backup-interval-minutes"]) == ("2", "30")
    assert not (tmp_path / "w/final").exists()
    assert (disk / "host_0/4").is_dir()  # of which host 1 will have none
    shutil.rmtree(disk / "host_1")
    daemon, runs = together(disk, tmp_path / "w", mesh)
    forked.finish(runs)
    daemon.stop()
    said = runs[0].said
    assert "waiting up to 600 s for GKE's multi-tier daemon" in said
    assert "all 2 hosts are connected" in said
    assert "multi-tier checkpoint 6 is newer than the workdir's (4)" in said
    assert "resuming after step 6" in said
    same_run(start(tmp_path / "whole", (2, config("", mesh))), tmp_path / "w", 0)
    assert numbers(tmp_path / "w")[-1]["step"] == 8
    assert not steps(disk)


def test_no_daemon(tmp_path):
    with pytest.raises(JoinError, match="config.local_checkpoints.folder: no .*mtc"):
        multi_tier.join(str(tmp_path / "none"), 30, {}, 1)


def test_wrong_options():
    with pytest.raises(ValueError, match="needs a folder"):
        LocalConfig(multi_tier=30)
    with pytest.raises(ValueError, match="number of minutes"):
        LocalConfig(folder="x", multi_tier=-1)

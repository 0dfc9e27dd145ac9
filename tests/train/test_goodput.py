import json
import pathlib
import sys

import pytest

from metamorph_jax.errors import FileError
from metamorph_jax.train import goodput, loop
from metamorph_jax.train.goodput import Goodput

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # the recipe is tests.train.toy


@pytest.fixture
def clock(monkeypatch):
    """Time that goes by only when told."""

    class Clock:
        now = 1000.0

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(goodput.time, "time", lambda: clock.now)
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: clock.now)
    return clock


def train(clock, workdir, first, last, every=10):
    """Start-up 20 s; steps of 2 s, half a second of it waiting; saving takes 3 s."""
    account = Goodput(workdir, first, clock.now)
    clock.sleep(20)
    account.ready()
    for step in range(first + 1, last + 1):
        clock.sleep(2)
        account.step(0.5)
        if step % every == 0:
            clock.sleep(3)
            account.saved(step, 3)
    return account


def test_one_run(clock, tmp_path):
    account = train(clock, tmp_path, 0, 20)
    assert (account.steps, account.waiting, account.saving) == (30, 10, 6)
    assert account.share() == pytest.approx(30 / 66) and account.restarts == 0
    assert account.summary() == (
        "goodput 45.5% of 0:01:06: steps 0:00:30, waiting for data 0:00:10, checkpoints 0:00:06, "
        "start 0:00:20, lost, down or ending 0:00:00"
    )


def test_killed_lost_and_down(clock, tmp_path):
    """Killed at step 17: steps 11 to 17 were in vain, and an hour went by until the next start."""
    train(clock, tmp_path, 0, 17)
    clock.sleep(3600)
    account = train(clock, tmp_path, 10, 20)
    assert (account.steps, account.waiting, account.saving) == (30, 10, 6)
    total = (20 + 17 * 2 + 3) + 3600 + (20 + 10 * 2 + 3)
    assert account.restarts == 1 and account.share() == pytest.approx(30 / total)
    assert "2 starts 0:00:40, lost, down or ending 1:00:14" in account.summary()
    saved = json.loads((tmp_path / "goodput.json").read_text())
    assert [s[1:] for s in saved["starts"]] == [[0, 20.0], [10, 20.0]]
    # From an earlier checkpoint (a damaged one, say) what came after it is forgotten.
    assert list(Goodput(tmp_path, 10, clock.now).sums) == ["10"]


def test_other_work_and_bad_files(clock, tmp_path):
    (tmp_path / "goodput.json").write_text('{"starts": [[1')
    with pytest.raises(FileError, match="goodput.json is not JSON"):
        Goodput(tmp_path, 0, clock.now)
    (tmp_path / "goodput.json").unlink()
    account = train(clock, tmp_path, 0, 1)
    clock.sleep(9)
    account.pause(9)
    clock.sleep(2)
    account.step(5.0)  # waited longer than the step took: begun before
    assert (account.steps, account.waiting) == (1.5, 2.5)
    others = Goodput(tmp_path / "nowhere", 0, clock.now, active=False)
    others.ready()
    others.saved(1, 1.0)
    assert not (tmp_path / "nowhere").exists()


def test_a_run_and_its_continuation(tmp_path, capsys):
    """Of the real loop: two steps, then two more, one of them traced."""
    config = dict(
        recipe="tests.train.toy", stage="all", steps=2, batch_size=8, model={}, data={},
        optim={"learning_rate": 0.02, "warmup": 1}, log_every=1, checkpoint_every=1,
        tensorboard=False, compilation_cache="",
    )  # fmt: skip
    loop.train(config, tmp_path)
    loop.train(config | {"steps": 4}, tmp_path, profile=(4, 4))
    said = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert "no peak FLOP/s is known for cpu: no MFU" in said
    assert said.count("goodput ") >= 2 and "2 starts" in said and "trace of steps 4 to 4" in said
    account = json.loads((tmp_path / "goodput.json").read_text())
    assert [s[1] for s in account["starts"]] == [0, 2]
    assert all(s[2] > 0 for s in account["starts"]) and list(account["sums"]) == [
        "1",
        "2",
        "3",
        "4",
    ]
    sums = list(account["sums"].values())
    for kind in zip(*sums, strict=True):  # steps, waiting, saving: none grows less
        assert list(kind) == sorted(kind)
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["goodput_restarts"] for r in rows] == [0, 0, 1, 1]
    assert 0 < rows[-1]["goodput"] < 1
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
    loop.train(config | {"steps": 4}, tmp_path)  # nothing left to do: no start is counted
    assert account == json.loads((tmp_path / "goodput.json").read_text())

import json

import pytest

from metamorph_jax.train import goodput
from metamorph_jax.train.goodput import Goodput


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

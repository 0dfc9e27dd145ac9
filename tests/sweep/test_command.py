"""Sweeps over a training of three small matrices, each run in a process of its own."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from metamorph_jax import cli
from metamorph_jax.sweep import command
from tests.sweep import toy

ROOT = pathlib.Path(__file__).parents[2]

FILE = (
    toy.CONFIG
    + """def sweep(add):
    add.product({"optim.learning_rate": [0.01, 0.1]})
    add({"data.poison": 2})
"""
)


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT))
    (tmp_path / "toy sweep.py").write_text(FILE)
    return str(tmp_path / "toy sweep.py")


def sweep(spec, workdir, *more):
    return cli.main(["sweep", f"--config={spec}", f"--workdir={workdir}", *more])


def steps(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def wait_for(process, condition, seconds=600):
    """Machines may be slow; a process that has ended, or never comes there, is shown."""
    deadline = time.time() + seconds
    while not condition():
        if time.time() > deadline or process.poll() is not None:
            process.kill()
            pytest.fail(process.stdout.read())
        time.sleep(0.02)


def test_list_and_print_start_nothing(spec, tmp_path, capsys):
    assert sweep(spec, tmp_path / "my runs", "--list", "--config.steps=2") == 0
    assert "002_learning_rate=0.1   new" in capsys.readouterr().out
    prefix = "bash launch/tpu.sh watch --name=v5e --"
    assert sweep(spec, tmp_path / "my runs", "--print", "--config.steps=2", "--prefix", prefix) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert shlex.split(lines[2]) == [
        *prefix.split(), "metamorph", "train", f"--config={spec}", "--config.steps=2",
        f"--workdir={tmp_path / 'my runs' / '003_poison=2'}", "--config.data.poison=2",
    ]  # fmt: skip
    assert not (tmp_path / "my runs").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("data.poison", "data.posion"), "run 3 .*did you mean config.data.poison"),
        (("[0.01, 0.1]", "[0.01, 'x']"), "run 2 .*learning_rate must be float"),
        (('add({"data.poison": 2})', 'add({"batch_size": 0})'), "batch_size must be at least 1"),
        (("def sweep", "def swep"), "has no sweep"),
    ],
)
def test_wrong_sweeps_start_nothing(spec, tmp_path, capsys, change, message):
    import re

    head, tail = FILE.split("def sweep")
    pathlib.Path(spec).write_text(head + ("def sweep" + tail).replace(*change))
    assert sweep(spec, tmp_path / "runs") == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and not (tmp_path / "runs").exists(), said


@pytest.mark.e2e
def test_killed_in_the_middle_a_failing_run_and_the_table(spec, tmp_path, capsys):
    """`kill -9` during the second run: the first isn't done again, the second goes on."""
    workdir = tmp_path / "runs"
    slow = "--config.data.pause=0.5"
    command = [sys.executable, "-m", "metamorph_jax", "sweep"]
    first = subprocess.Popen(
        [*command, f"--config={spec}", f"--workdir={workdir}", slow],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    second = workdir / "002_learning_rate=0.1"
    wait_for(first, (second / "checkpoints/2/commit_success.txt").exists)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    before = (workdir / "001_learning_rate=0.01/metrics.jsonl").stat().st_mtime_ns

    assert sweep(spec, workdir, slow) == 3  # all that failed did so with this code
    said = capsys.readouterr()
    assert "001_learning_rate=0.01  finished" in said.out
    assert "003_poison=2 failed" not in said.out and "failed with exit code 3" in said.out
    assert "step 3: not finite" in said.out and "1 of 3 runs failed" in said.err
    assert (workdir / "001_learning_rate=0.01/metrics.jsonl").stat().st_mtime_ns == before
    assert "resuming after step" in (second / "sweep.log").read_text()
    assert steps(second) == [1, 2, 3, 4]
    table = (workdir / "sweep.md").read_text()
    assert table.count("| finished |") == 2 and "| failed (3) |" in table
    assert (workdir / "sweep.csv").read_text().count("\n") == 4
    assert (workdir / "sweep.png").stat().st_size > 1000

    # A run that is put first gets a new number and no other's folder; nothing else is left to do.
    text = FILE.replace("sweep(add):", "sweep(add):\n    add({'model.noise': 0.5})")
    pathlib.Path(spec).write_text(text.replace('    add({"data.poison": 2})\n', ""))
    assert sweep(spec, workdir, slow, "--print") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "004_noise=0.5" in line
    # With other options the finished ones are not finished: training says what may not change.
    assert sweep(spec, workdir, slow, "--list", "--config.steps=6") == 0
    assert "finished" not in capsys.readouterr().out.replace("unfinished", "")


@pytest.mark.e2e
def test_sigterm_saves_and_stops(spec, tmp_path):
    command = [sys.executable, "-m", "metamorph_jax", "sweep", f"--config={spec}"]
    more = ["--config.data.pause=0.5", "--config.checkpoint_every=100"]
    run = subprocess.Popen(
        [*command, f"--workdir={tmp_path / 'runs'}", *more],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    first = tmp_path / "runs/001_learning_rate=0.01"
    wait_for(run, lambda: (first / "metrics.jsonl").exists() and steps(first))
    run.terminate()
    said = run.communicate(timeout=600)[0]
    assert run.returncode == 143 and "the same command resumes the sweep" in said, said
    assert list(first.glob("checkpoints/*/commit_success.txt"))
    assert not (tmp_path / "runs/002_learning_rate=0.1").exists()


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        ((0, 0, 0), 0),
        ((2, 0, 0), 2),
        ((2, 0, 3), 3),
        ((0, 1, 2), 1),
        ((2, 75, 0), 1),
        ((2, -9, 0), 1),
    ],
)
def test_exit_codes(spec, tmp_path, monkeypatch, codes, wanted):
    """Only a code that says so keeps `tpu.sh watch` from starting the sweep again."""
    left = list(codes)

    def run(words, log):
        log.write_text("\x1b[2Jlast word\n")
        return left.pop(0)

    monkeypatch.setattr(command, "_run_one", run)
    assert sweep(spec, tmp_path / "runs") == wanted and not left
    table = (tmp_path / "runs/sweep.md").read_text()
    assert table.count("failed (") == sum(map(bool, codes))


def test_a_run_whose_data_end_early_is_finished(spec, tmp_path, monkeypatch):
    """And it is not started again, unless it is prolonged."""
    started = []

    def run(words, log):
        folder = log.parent
        started.append(folder.name)
        log.touch()
        (folder / "final").mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
        return 0

    monkeypatch.setattr(command, "_run_one", run)
    assert sweep(spec, tmp_path / "runs") == 0
    for one in command.plan(spec, {}, tmp_path / "runs"):
        (one.folder / "config.json").write_text(json.dumps(one.table))
    assert sweep(spec, tmp_path / "runs") == 0 and len(started) == 3
    assert (tmp_path / "runs/sweep.md").read_text().count("| 3 of 4 | finished |") == 3

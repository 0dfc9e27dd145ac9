"""launch/slurm.sh and launch/xpk.sh against commands that record what they are called with."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
WORDS = ["job", "--workdir=/data/my run", "a'b", '$HOME "x"', "", "*"]

RECORDER = """#!{python}
import json, os, pathlib, sys
root = pathlib.Path(os.environ["FAKE"])
name = pathlib.Path(sys.argv[0]).name
folder = next((a.split("=")[1] for a in sys.argv if a.startswith("--script-dir=")), None)
inside = sorted(os.listdir(folder)) if folder else []
with open(root / "calls.jsonl", "a") as file:
    file.write(json.dumps([name, sys.argv[1:], inside]) + "\\n")
codes = root / (name + ".codes")
if codes.exists():
    code, _, rest = codes.read_text().partition(" ")
    codes.write_text(rest)
    sys.exit(int(code))
"""


@pytest.fixture
def fake(tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun", "scontrol", "squeue", "scancel", "xpk", "kubectl", "tail"):
        (tmp_path / "bin" / name).write_text(RECORDER.format(python=sys.executable))
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def script(fake, name, *args, **env):
    where = os.environ | {"FAKE": str(fake), "PATH": f"{fake}/bin:{os.environ['PATH']}"} | env
    command = ["bash", str(ROOT / "launch" / name), *args]
    return subprocess.run(command, env=where, capture_output=True, text=True, timeout=60, cwd=fake)


def calls(fake):
    file = fake / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_slurm_submit_and_job(fake):
    """What sbatch is told to run is run by the job, every word as it was."""
    flags = ["--name=vpit", "--nodes=2", "--gpus=4", "--time=1:00:00", "--flag=--partition=a b"]
    done = script(fake, "slurm.sh", "submit", "--dry-run", *flags, "--", *WORDS)
    assert done.returncode == 0 and done.stdout.startswith("+ sbatch "), done.stderr
    assert not calls(fake)
    subprocess.run(  # what was printed, given to a shell
        ["bash", "-c", done.stdout.removeprefix("+ ")], check=True,
        env={"FAKE": str(fake), "PATH": f"{fake}/bin:/usr/bin:/bin"},
    )  # fmt: skip
    ((name, args, _),) = calls(fake)
    at = args.index("launch/slurm.sh")
    assert name == "sbatch" and args[:at] == [
        "--job-name=vpit", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4",
        "--cpus-per-task=8", "--time=1:00:00", "--signal=TERM@300", "--requeue",
        "--open-mode=append", "--output=slurm-%x-%j.log", f"--chdir={ROOT}", "--partition=a b",
    ]  # fmt: skip
    done = script(fake, *args[at:][0].split("/")[1:], *args[at + 1 :], SLURM_JOB_ID="7")
    assert done.returncode == 0
    assert calls(fake)[1] == ["srun", ["--kill-on-bad-exit=1", *WORDS], []]


@pytest.mark.parametrize(
    ("code", "count", "again"),
    [(0, 0, False), (2, 0, False), (3, 0, False), (143, 0, True), (75, 99, True), (1, 100, False)],
)
def test_slurm_puts_back_what_can_go_on(fake, code, count, again):
    (fake / "srun.codes").write_text(f"{code} ")
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(count)}
    done = script(fake, "slurm.sh", "job", "100", "metamorph", **env)
    assert done.returncode == code and f"code {code}, restart {count}" in done.stdout
    assert (["scontrol", ["requeue", "7"], []] in calls(fake)) == again


def test_slurm_status_stop_logs(fake):
    for action in ("status", "stop"):
        assert script(fake, "slurm.sh", action, "--name=x").returncode == 0
    assert [c[:2] for c in calls(fake)] == [
        ["squeue", ["--me", "--name=x"]], ["scancel", ["--me", "--name=x"]],
    ]  # fmt: skip
    done = script(fake, "slurm.sh", "logs", "--name=never-run")
    assert done.returncode == 2 and "no slurm-never-run-" in done.stderr


def test_xpk_run(fake):
    done = script(
        fake, "xpk.sh", "run", "--name=vpit", "--cluster=c", "--type=v5e-64", "--slices=2",
        "--project=p", "--flag=--storage=my bucket", "--", *WORDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ((name, args, inside),) = calls(fake)
    assert (name, args[:5]) == (
        "xpk", ["workload", "create", "--cluster=c", "--project=p", "--workload=vpit"],
    )  # fmt: skip
    assert {"--device-type=v5litepod-64", "--num-slices=2", "--storage=my bucket"} <= set(args)
    assert "metamorph_jax" in inside and ".git" not in inside and ".venv" not in inside
    folder = next(a for a in args if a.startswith("--script-dir=")).split("=")[1]
    assert not pathlib.Path(folder).exists()  # it was there for the call
    # The command, given to a shell as the container does.
    text = next(a for a in args if a.startswith("--command=")).removeprefix("--command=")
    (fake / "bin/job").write_text(RECORDER.format(python=sys.executable))
    (fake / "bin/job").chmod(0o755)
    (fake / "bin/pip").write_text(RECORDER.format(python=sys.executable))
    (fake / "bin/pip").chmod(0o755)
    env = {"FAKE": str(fake), "PATH": f"{fake}/bin:/usr/bin:/bin"}
    subprocess.run(["bash", "-c", text], check=True, env=env)
    assert [c[:2] for c in calls(fake)[1:]] == [
        ["pip", ["install", "--quiet", "-e", ".[tpu]"]], ["job", WORDS[1:]],
    ]  # fmt: skip


def test_xpk_others(fake):
    common = ["--name=vpit", "--cluster=c", "--zone=z"]
    for action in ("status", "delete", "logs"):
        assert script(fake, "xpk.sh", action, *common).returncode == 0
    assert calls(fake)[0][1] == ["workload", "list", "--cluster=c", "--zone=z"]
    assert calls(fake)[1][1] == ["workload", "delete", "--cluster=c", "--zone=z", "--workload=vpit"]
    assert calls(fake)[2][0] == "kubectl" and "jobset-name=vpit," in calls(fake)[2][1][-1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["slurm.sh", "submit", "--name=x"], "there is no program to run"),
        (["slurm.sh", "submit", "--name=a b", "--", "job"], "--name=NAME is needed"),
        (["slurm.sh", "submit", "--name=x", "--gpus=all", "--", "job"], "whole numbers"),
        (["slurm.sh", "sumbit"], "no command 'sumbit'"),
        (["slurm.sh", "stop", "--name=x", "--nodes=2"], "takes no --nodes; it goes with: submit"),
        (["slurm.sh", "logs", "--name=x", "--", "job"], "logs takes no program"),
        (["xpk.sh", "delete", "--name=x", "--cluster=c", "--type=v6e-8"], "delete takes no --type"),
        (["xpk.sh", "status", "--name=x", "--cluster=c", "--", "job"], "status takes no program"),
        (["slurm.sh", "submit", "--name=x", "--time=", "--", "job"], "--time= has no value"),
        (["xpk.sh", "run", "--name=x", "--cluster=c", "--zone=", "--", "job"], "has no value"),
        (["xpk.sh", "run", "--name=x", "--", "job"], "--cluster=C is needed"),
        (["xpk.sh", "run", "--name=x", "--cluster=c", "--", "job"], "--type=T is needed"),
        (["xpk.sh", "run", "--name=x", "--cluster=c", "--type=v6e-8", "--", "a\nb"], "line break"),
        (["xpk.sh", "run", "--name=x", "--cluster=c", "job"], "unknown option 'job'"),
    ],
)
def test_wrong_options(fake, args, message):
    done = script(fake, *args)
    assert done.returncode == 2 and message in done.stderr and not calls(fake)

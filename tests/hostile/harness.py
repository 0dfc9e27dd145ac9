"""Runs a command inside this process, under limits, on inputs that want to break it.

    check(["convert", "--from", file, "--out", out], tmp_path, naming=file)

fails on a traceback, on more than 20 seconds or 1 GiB, on a file touched, a program started or a
connection made outside of the folder, and on anything but exit code 0, or 2 with one error line.
`attempt(function, folder)` does the same for a function of ours, which may return or raise a
`UserError`. Inputs come from generators: many small ones, each made by a rule.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import io
import os
import pathlib
import random
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from metamorph_jax import cli

SECONDS = 20
BYTES = 2**30
_ADDRESSES = 8 * 2**30  # beyond what is there already; more is a MemoryError before it hurts
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGING = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link",
             "os.truncate", "os.chmod", "shutil.rmtree"}  # fmt: skip
_FORBIDDEN = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect",
              "socket.bind", "builtins.input"}  # fmt: skip


class Hung(BaseException):
    """The time is up; not an Exception, so that nothing under test catches it."""


@dataclasses.dataclass
class Outcome:
    """What a command did.

    Attributes:
        code: exit code; 1 with a traceback in `err`.
        out, err: what it printed.
        seconds: that it took.
        grown: bytes by which the memory was larger at its peak than before.
        outside: what it touched, started or connected to outside of its folder.
    """

    code: int = 1
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    grown: int = 0
    outside: list[str] = dataclasses.field(default_factory=list)


# ---- watching

_watching: list[tuple[tuple[str, ...], list[str]]] = []


def _hook(event: str, args: tuple) -> None:
    if not _watching or event not in _CHANGING | _FORBIDDEN | {"open"}:
        return
    allowed, seen = _watching[-1]
    if event in _FORBIDDEN:
        seen.append(f"{event} {args[:2]!r:.200}")
        return
    if event == "open" and not (isinstance(args[2], int) and args[2] & _WRITING):
        return
    paths = args[:2] if event in ("os.rename", "os.link") else args[:1]
    for path in paths:
        if not isinstance(path, str | bytes | os.PathLike):
            continue  # a descriptor that is open already
        full = os.path.abspath(os.fsdecode(path))
        if not full.startswith(allowed) and "__pycache__" not in full:
            seen.append(f"{event} {full}")


sys.addaudithook(_hook)


@contextlib.contextmanager
def _watched(folder: pathlib.Path, seen: list[str]):
    """Records in `seen` what is touched outside of the folder, which is the current one."""
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR", folder)
    before, home = os.getcwd(), {k: os.environ.get(k) for k in ("HOME", "XDG_CACHE_HOME")}
    os.chdir(folder)
    os.environ.update(dict.fromkeys(home, str(folder)))
    _watching.append(((os.path.abspath(folder), os.path.abspath(compiled), "/dev/null"), seen))
    try:
        yield
    finally:
        _watching.pop()
        os.chdir(before)
        for key, value in home.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _memory(key: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (at the peak since `_forget_peak`)."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"^{key}:\s+(\d+) kB", status, re.M)[1]) * 1024


def _forget_peak() -> None:
    pathlib.Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def _limited(seconds: int):
    """Interrupts after so many seconds, and bounds the memory that can be asked for."""

    def stop(*_):
        raise Hung(f"longer than {seconds} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    most = _memory("VmSize") + _ADDRESSES
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    # For code that never looks at signals.
    faulthandler.dump_traceback_later(seconds + 60, exit=True, file=sys.__stderr__)
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


# ---- running


def run(
    argv: list, folder: str | os.PathLike, *, stdin: str = "", seconds: int = SECONDS
) -> Outcome:
    """`metamorph ARGV` in a folder; judges nothing."""
    return _run(lambda: cli.main([str(word) for word in argv]), folder, stdin, seconds)


def _run(command: Callable[[], int], folder, stdin: str, seconds: int) -> Outcome:
    found, out, err = Outcome(), io.StringIO(), io.StringIO()
    folder, standard_in = pathlib.Path(folder), sys.stdin
    sys.stdin = io.StringIO(stdin)
    _forget_peak()
    held, start = _memory("VmRSS"), time.monotonic()
    try:
        with (
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
            _watched(folder, found.outside), _limited(seconds),
        ):  # fmt: skip
            found.code = int(command() or 0)
    except SystemExit as stopped:  # argparse
        found.code = stopped.code if isinstance(stopped.code, int) else 1
    except (Exception, Hung):
        err.write(traceback.format_exc())
    finally:
        sys.stdin = standard_in
    found.seconds = time.monotonic() - start
    found.grown = max(0, _memory("VmHWM") - held)
    found.out, found.err = out.getvalue(), err.getvalue()
    return found


def judge(found: Outcome, *, code: int | None = None, naming: object = "") -> Outcome:
    """The outcome, if it is a clean one.

    Args:
        code: the exit code that is due; None: 0 or 2.
        naming: what an error line has to name: a file, a key.
    """
    assert "Traceback" not in found.err, found.err[-4000:]
    assert found.code in ((0, 2) if code is None else (code,)), (found.code, found.err[-2000:])
    assert found.seconds < SECONDS, f"{found.seconds:.0f} s"
    assert found.grown < BYTES, f"{found.grown / 2**20:.0f} MiB"
    assert not found.outside, found.outside
    if found.code:
        errors = [line for line in found.err.splitlines() if re.match(r"metamorph( \w+)*: ", line)]
        assert len(errors) == 1, found.err
        assert found.err.replace("\n", "").isprintable(), repr(found.err)
        assert str(naming) in found.err, (naming, found.err)
    return found


def check(
    argv: list, folder, *, code: int | None = None, naming: object = "", stdin: str = "",
    seconds: int = SECONDS,
) -> Outcome:  # fmt: skip
    """Runs `metamorph ARGV` and judges it; see `run` and `judge`."""
    return judge(run(argv, folder, stdin=stdin, seconds=seconds), code=code, naming=naming)


def attempt(
    function: Callable[[], object], folder, *, code: int | None = None, naming: object = "",
    seconds: int = SECONDS,
) -> Outcome:  # fmt: skip
    """As `check`, for a function of ours: it returns, or raises a `UserError`."""

    def command(_):
        function()
        return 0

    run_ = lambda: cli._run(command, argparse.Namespace())  # noqa: E731
    return judge(_run(run_, folder, "", seconds), code=code, naming=naming)


def damaged(
    whole: bytes, step: int, count: int, seed: int, changes: tuple[int, ...] = (1,)
) -> Iterator[tuple[str, bytes]]:
    """(name, content) of a file that is cut at every `step` bytes, and `count` times with as many
    bytes changed as one of `changes` says."""
    for at in range(0, len(whole), step):
        yield f"cut at {at}", whole[:at]
    dice = random.Random(seed)
    for k in range(count):
        data = bytearray(whole)
        for _ in range(dice.choice(changes)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        yield f"bytes {k}", bytes(data)

"""Training runs in processes of their own, that start fast: a server that has imported everything,
but started no JAX backend, forks for each of them."""

import atexit
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import time

ROOT = str(pathlib.Path(__file__).parents[2])
sys.path.insert(0, ROOT)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["metamorph_jax.train.command", "metamorph_jax.train.loop", "metamorph_jax.data.pipeline",
     "metamorph_jax.recipes.metamorph", "metamorph_jax.distributed",
     "jax.experimental.multihost_utils", "ml_collections", "jax._src.clusters"]
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class Run:
    """`metamorph train` with this config (a dict), flags and variables."""

    def __init__(self, cfg: dict, workdir, *flags: str, env: dict | None = None, name: str = ""):
        workdir = pathlib.Path(workdir)
        self.file = workdir.with_name(f"{workdir.name}{name}.py")
        self.log = workdir.with_name(f"{workdir.name}{name}.log")
        self.file.write_text(
            "from ml_collections import ConfigDict\n"
            f"def get_config(arg=''):\n    return ConfigDict({cfg!r})\n"
        )
        self.log.touch()
        args = ["train", f"--config={self.file}", f"--workdir={workdir}", *flags]
        self._process = _context.Process(target=_main, args=(args, str(self.log), env or {}))
        self._process.start()
        self.pid = self._process.pid

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def until(self, ready, seconds: float = 600.0):
        """Waits until `ready()` is true, and returns that."""
        deadline = time.monotonic() + seconds
        while not (found := ready()):
            assert self.alive, f"it ended early: {self.said}"
            assert time.monotonic() < deadline, f"too slow: {self.said}"
            time.sleep(0.005)
        return found

    def wait(self, seconds: float = 600.0) -> int:
        """Exit code; minus the number of the signal that ended it."""
        self._process.join(seconds)
        if self.alive:
            self.kill()
            raise AssertionError(f"still running after {seconds} s: {self.said}")
        return self._process.exitcode

    def signal(self, number) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.alive:
            self.signal(signal.SIGKILL)
        self._process.join()


def together(n: int, cfg: dict, workdir, *flags: str, **kw) -> list[Run]:
    """The run on n hosts."""
    flags = (*flags, f"--coordinator=localhost:{free_port()}", f"--processes={n}")
    return [Run(cfg, workdir, *flags, f"--process={k}", name=f"_{k}", **kw) for k in range(n)]


def finish(runs: list[Run], code: int = 0, seconds: float = 600.0) -> None:
    codes = [run.wait(seconds) for run in runs]
    assert codes == [code] * len(runs), "\n---\n".join([str(codes), *(run.said for run in runs)])


def _main(args: list[str], log: str, env: dict) -> None:
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(env)
    from metamorph_jax import cli

    code = cli.main(args)
    atexit._run_exitfuncs()  # multiprocessing leaves them out
    os._exit(code)

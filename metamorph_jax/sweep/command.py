"""`metamorph sweep`: trains the runs that `sweep(add)` of a config file lists, and compares them.

    workdir/001_learning_rate=0.0001_visual_coef=8.0/   the workdir of one run, with
        sweep.json    its settings, which identify it (its number may change)
        sweep.log     its output
    workdir/sweep.{csv,md,png}

Every run is a process of its own, so one that crashes or runs out of memory does not affect others.
"""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

from metamorph_jax.errors import ConfigError

PREEMPTED = 143  # the run was stopped by SIGTERM: the machine goes away, so the sweep stops, too


def add_arguments(parser) -> None:
    parser.description = (
        "Runs `metamorph train` for every run that sweep(add) in the config file lists, one after "
        "the other, and writes sweep.csv, sweep.md and sweep.png into the workdir. The same "
        "command again skips finished runs, resumes unfinished ones and retries failed ones. "
        "Options --config.a.b=value apply to all runs."
    )
    parser.add_argument("--config", required=True, metavar="FILE[:SIZE]")
    parser.add_argument("--workdir", required=True, help="folder with one folder for each run")
    parser.add_argument("--list", action="store_true", help="show the runs and their states only")
    parser.add_argument("--table", action="store_true", help="write the tables only")
    parser.add_argument(
        "--print", action="store_true", help="print the command of each unfinished run only"
    )
    parser.add_argument(
        "--prefix", default="", metavar="TEXT",
        help='put before each printed command, e.g. "bash launch/tpu.sh run --name=v5e --"',
    )  # fmt: skip
    parser.add_argument("--metric", default="loss", help="metric to compare by (default: loss)")
    parser.add_argument(
        "--distributed", action="store_true",
        help="train each run on several hosts; start the sweep on all of them in one workdir",
    )  # fmt: skip


class Run:
    """One run of a sweep.

    Args:
        folder: its workdir.
        values: dotted key -> value.
        table: all its options, resolved.
    """

    def __init__(self, folder: pathlib.Path, values: dict, table: dict):
        self.folder, self.values, self.table = folder, values, table
        self.failed = ""

    @property
    def state(self) -> str:
        """"finished", "failed (exit code)", "unfinished" or "new"."""
        from metamorph_jax.train.workdir import compare

        if self.failed:
            return self.failed
        saved = self.folder / "config.json"
        if not saved.is_file():
            return "new"
        same = not any(compare(json.loads(saved.read_text()), self.table))
        return "finished" if same and (self.folder / "final").is_dir() else "unfinished"

    def row(self) -> dict:
        from metamorph_jax.sweep.table import read_metrics

        step, metrics = read_metrics(self.folder / "metrics.jsonl")
        return {"name": self.folder.name, "state": self.state, "step": step,
                "values": self.values, "metrics": metrics}  # fmt: skip


def plan(spec: str, overrides: dict, workdir: pathlib.Path) -> list[Run]:
    """The runs, with their folders: those of earlier calls, or new ones (which are not made yet).

    Raises:
        ConfigError: the file has no sweep, or the config of a run is wrong.
    """
    from metamorph_jax import config as configs
    from metamorph_jax.sweep import grid
    from metamorph_jax.train.config import resolve

    path = spec.partition(":")[0]
    module = configs.load_module(path)
    if not hasattr(module, "sweep"):
        raise ConfigError(
            f"{path} has no sweep(add); metamorph_jax/sweep/grid.py shows what it looks like"
        )
    there = {}
    for file in workdir.glob("*/sweep.json"):
        there[_key(json.loads(file.read_text()))] = file.parent
    runs = []
    number = max([0, *(int(f.name.split("_")[0]) for f in there.values())])
    for values, config in grid.expand(module.sweep, spec, overrides):
        try:
            table = json.loads(json.dumps(resolve(config).table))
        except ConfigError as error:
            raise ConfigError(f"run {_label(values)} of the sweep: {error}") from error
        folder = there.get(_key(values))
        if folder is None:
            number += 1
            folder = workdir / f"{number:03d}_{_label(values)}"
        runs.append(Run(folder, values, table))
    return runs


def _key(values: dict) -> str:
    return json.dumps(values, sort_keys=True)


def _label(values: dict) -> str:
    """Short keys and values as the name of a folder."""
    from metamorph_jax.sweep.table import short_names

    names = short_names(list(values))
    text = "_".join(f"{names[k]}={v}" for k, v in values.items())
    return re.sub(r"[^\w.=+-]+", "-", text)[:100]


def run(args) -> int:
    from metamorph_jax.sweep import grid, table

    workdir = pathlib.Path(args.workdir).expanduser()
    runs = plan(args.config, args.overrides, workdir)
    common = [f"--config={args.config}", *grid.as_arguments(args.overrides)]

    def command(run: Run) -> list[str]:
        more = ["--distributed"] if args.distributed else []
        return [*common, f"--workdir={run.folder}", *grid.as_arguments(run.values), *more]

    states = {run.folder: run.state for run in runs}
    if args.print:
        for run in runs:
            if states[run.folder] != "finished":
                print(f"{args.prefix} metamorph train {shlex.join(command(run))}".lstrip())
        return 0
    width = max(len(run.folder.name) for run in runs)
    for run in runs:
        print(f"{run.folder.name:{width}}  {states[run.folder]}")
    if args.list:
        return 0

    def write() -> list[dict]:
        rows = [run.row() for run in runs]
        files = table.write(workdir, rows, args.metric)
        print(f"results by {args.metric}: {', '.join(map(str, files))}", flush=True)
        return rows

    workdir.mkdir(parents=True, exist_ok=True)
    if not args.table:
        code = _run_all([r for r in runs if states[r.folder] != "finished"], command, write)
        if code:
            return code
    rows = write()
    known = sorted({name for row in rows for name in row["metrics"]})
    if known and args.metric not in known:
        print(f"no run has the metric {args.metric!r}; there are {', '.join(known)}",
              file=sys.stderr)  # fmt: skip
    print(table.markdown(rows, args.metric), end="")
    failed = [run for run in runs if run.failed]
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed", file=sys.stderr)
    return 1 if failed else 0


def _run_all(runs: list[Run], command, write) -> int:
    """Trains the runs one after the other; returns 0, or the exit code if the sweep must stop."""
    for number, run in enumerate(runs, 1):
        run.folder.mkdir(parents=True, exist_ok=True)
        _save(run.folder / "sweep.json", run.values)
        log = run.folder / "sweep.log"
        print(f"{number}/{len(runs)} {run.folder.name}, log: {log}", flush=True)
        clock = time.perf_counter()
        code = _run_one([sys.executable, "-m", "metamorph_jax", "train", *command(run)], log)
        seconds = time.perf_counter() - clock
        if code in (PREEMPTED, 130):
            write()
            print("stopped; the same command resumes the sweep", file=sys.stderr)
            return code
        if code:
            run.failed = f"failed ({code})"
            print(f"  failed with exit code {code} after {seconds:.0f} s: {_last_line(log)}")
        else:
            print(f"  finished after {seconds:.0f} s")
        write()
    return 0


def _run_one(command: list[str], log: pathlib.Path) -> int:
    """Exit code of a command that writes into a log; SIGTERM is forwarded to it."""
    with log.open("ab") as out:
        child = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip
        told = []

        def forward(*_):
            told.append(True)
            child.terminate()

        before = signal.signal(signal.SIGTERM, forward)
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.wait()  # the terminal sends Ctrl-C to it, too
            return 130
        finally:
            signal.signal(signal.SIGTERM, before)
    return PREEMPTED if told else code


def _end_with_parent() -> None:
    """Called in the child, so that it does not train on when the sweep is killed (SIGKILL)."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _save(file: pathlib.Path, values: dict) -> None:
    new = file.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(values, sort_keys=True) + "\n")
    new.replace(file)


def _last_line(log: pathlib.Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it printed nothing"

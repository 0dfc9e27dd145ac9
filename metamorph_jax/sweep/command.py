"""`metamorph sweep`: trains the runs that `sweep(add)` of a config file lists, and compares them.

    workdir/001_learning_rate=0.0001_visual_coef=8.0/   the workdir of one run, with
        sweep.json    its settings, which identify it (its number may change) together with the
                      folder's name: a copy under another name is not the run
        sweep.log     its output
        ended.json    the step at which its training ended by itself
    workdir/sweep.{csv,md,png}

Every run is a process of its own, so one that crashes or runs out of memory does not affect others.
"""

import contextlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from metamorph_jax import files, paths
from metamorph_jax.errors import ConfigError, UserError
from metamorph_jax.lock import Lock

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
        help='put before each printed command, which it should see to its end, e.g. "bash '
        'launch/tpu.sh watch --name=sweep --type=v5e-64 --"',
    )  # fmt: skip
    parser.add_argument(
        "--metric",
        help="metric to compare by (default: loss, unless the sweep changes the losses' weights)",
    )
    parser.add_argument(
        "--best", choices=("min", "max"),
        help="which value of the metric is the best (default: by its name)",
    )  # fmt: skip
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
        self.code = 0  # of its process, if it has failed

    @property
    def state(self) -> str:
        """One of "finished", "failed (exit code)", "unfinished" and "new".

        Finished is a run whose last step is the last one of its config, or whose training has ended
        by itself there, as it does when the data end. (That `final` exists does not say so: it may
        be of an earlier end of a run that was prolonged.)

        Raises:
            FileError: its config or its metrics are damaged.
        """
        from metamorph_jax.train.workdir import compare

        if self.code:
            return f"failed ({self.code})"
        saved = self.folder / "config.json"
        if not saved.is_file():
            return "new"
        same = not any(compare(files.read_json(saved), self.table))
        if not same or not (self.folder / "final").is_dir():
            return "unfinished"
        ended = self.folder / "ended.json"
        step, _ = self.results()
        whole = step >= self.steps or (ended.is_file() and files.read_json(ended) == self.end(step))
        return "finished" if whole else "unfinished"

    @property
    def steps(self) -> int:
        """That are planned."""
        return self.table["steps"]

    def end(self, step: int) -> dict:
        """What ended.json says if training has ended after `step` of the planned steps."""
        return {"step": step, "steps": self.steps}

    def results(self) -> tuple[int, dict[str, float]]:
        """(steps done, metric -> value); see `table.last_values`."""
        from metamorph_jax.sweep.table import last_values

        return last_values(self.folder / "metrics.jsonl")

    def row(self) -> dict:
        step, metrics = self.results()
        return {"name": self.folder.name, "state": self.state, "step": step, "steps": self.steps,
                "values": self.values, "metrics": metrics}  # fmt: skip


def plan(spec: str, overrides: dict, workdir: pathlib.Path) -> list[Run]:
    """The runs, with their folders: those of earlier calls, or new ones (which are not made yet).

    Raises:
        ConfigError: the file has no sweep, the config of a run is wrong, or two folders hold the
            same run.
        FileError: a sweep.json is damaged.
    """
    from metamorph_jax import config as configs
    from metamorph_jax.sweep import grid
    from metamorph_jax.train.config import resolve

    path = spec.partition(":")[0]
    module = configs.load_module(path)
    if not callable(vars(module).get("sweep")):
        raise ConfigError(
            f"{path} has no sweep(add); metamorph_jax/sweep/grid.py shows what it looks like"
        )
    there, number = _runs_there(workdir)
    runs = []
    for values, config in grid.expand(module.sweep, spec, overrides):
        try:
            table = json.loads(json.dumps(resolve(config).table))
        except ConfigError as error:
            raise ConfigError(f"run {_label(values)} of the sweep: {error}") from error
        folder = there.get(grid.identity(values))
        if folder is None:
            number += 1
            folder = workdir / f"{number:03d}_{_label(values)}"
        runs.append(Run(folder, values, table))
    return runs


def _runs_there(workdir: pathlib.Path) -> tuple[dict[str, pathlib.Path], int]:
    """(identity of the settings -> folder of that run, highest number of a folder)."""
    from metamorph_jax.sweep import grid

    there: dict[str, pathlib.Path] = {}
    number = 0
    for folder in sorted(workdir.iterdir()) if workdir.is_dir() else []:
        found = re.match(r"([0-9]{3,9})_", folder.name)
        number = max(number, int(found[1]) if found else 0)
        file = folder / "sweep.json"
        if not os.path.lexists(file):
            continue
        if not found:
            _ignored(folder, "its name does not begin with a number")
            continue
        values = files.read_json(file, what="the settings of a run")
        if folder.name[found.end() :] != _label(values):
            _ignored(folder, "it is named unlike its settings, as a copy is")
            continue
        key = grid.identity(values)
        if key in there:
            raise ConfigError(
                f"{files.shown(there[key])} and {files.shown(folder)} hold the same run; "
                "move the copy out of the sweep's folder"
            )
        there[key] = folder
    return there, number


def _ignored(folder: pathlib.Path, why: str) -> None:
    print(f"{files.shown(folder)} is not taken as a run: {why}", file=sys.stderr)


def _label(values: Mapping) -> str:
    """Short keys and values as the name of a folder."""
    from metamorph_jax.sweep.table import short_names

    names = short_names(list(values))
    text = "_".join(f"{names[k]}={v}" for k, v in values.items())
    return re.sub(r"[^\w.=+-]+", "-", text, flags=re.ASCII)[:100]


def run(args) -> int:
    from metamorph_jax.sweep import grid, metrics

    workdir = paths.output_folder("--workdir", args.workdir)
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
    metric = metrics.comparable(runs) if args.metric is None else args.metric
    results = Results(workdir, runs, metric, args.best)
    if not args.table:
        metrics.check(metric, runs)
        todo = [r for r in runs if states[r.folder] != "finished"]
        with Lock(workdir, "sweeps"), _writing(workdir):
            code = _run_all(todo, command, results.attempt)
        if code:
            return code
    print(results.write(), end="")
    failed = {run.code for run in runs} - {0}
    if failed:
        print(f"{sum(bool(r.code) for r in runs)} of {len(runs)} runs failed", file=sys.stderr)
    # 2 and 3 say that starting the sweep again does not help.
    return max(failed, default=0) if failed <= {2, 3} else 1


class Results:
    """The tables and the plot.

    Args:
        workdir: of the sweep.
        runs: all.
        metric: to compare by.
        best: "min", "max" or None, which follows from the metric's name.
    """

    def __init__(self, workdir: pathlib.Path, runs: Sequence[Run], metric: str, best: str | None):
        from metamorph_jax.sweep import table

        self._workdir, self._runs, self._metric = workdir, runs, metric
        self._lower = table.lower_is_better(metric) if best is None else best == "min"

    def write(self) -> str:
        """Writes them, and returns the table as Markdown.

        Raises:
            ConfigError: no run has the metric, or the files can't be written.
            FileError: the files of a run are damaged.
        """
        from metamorph_jax.sweep import table

        rows = [run.row() for run in self._runs]
        known = sorted({name for row in rows for name in row["metrics"]})
        if known and self._metric not in known:
            raise ConfigError(
                f"no run has the metric {files.shown(self._metric)!r}; there are "
                f"{', '.join(map(files.shown, known))}. --table --metric=NAME compares the runs"
            )
        with _writing(self._workdir):
            self._workdir.mkdir(parents=True, exist_ok=True)
            written = table.write(self._workdir, rows, self._metric, self._lower)
        print(f"results by {self._metric}: {', '.join(map(files.shown, written))}", flush=True)
        return table.markdown(rows, self._metric, self._lower)

    def attempt(self) -> None:
        """`write`, whose errors are only printed: a sweep of days should not end here."""
        try:
            self.write()
        except UserError as error:
            print(f"no tables yet: {error}", file=sys.stderr)


@contextlib.contextmanager
def _writing(folder: pathlib.Path):
    """A disk that is full, or a folder that may not be written, is for the user to see to."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"can't write in {files.shown(folder)}: {files.shown(error)}") from error


def _run_all(
    runs: list[Run], command: Callable[[Run], list[str]], write: Callable[[], None]
) -> int:
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
            run.code = code
            print(f"  failed with exit code {code} after {seconds:.0f} s: {_last_line(log)}")
        else:
            _save(run.folder / "ended.json", run.end(run.results()[0]))
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
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2**16))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return files.shown(lines[-1], 300) if lines else "it printed nothing"

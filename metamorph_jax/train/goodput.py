"""How the time of a run was spent, over all its starts.

workdir/goodput.json holds when the run was started and, for the steps of its checkpoints, the
seconds spent on steps, waiting and saving by then. A run that resumes from a checkpoint takes its
sums from there: what was computed after it and lost does not count. Goodput is the share of the
wall time since the first start that went into steps that count.
"""

import json
import math
import os
import pathlib
import time

from metamorph_jax import files
from metamorph_jax.errors import FileError

_KEPT = 100  # checkpoints whose sums are remembered


class Goodput:
    """The account of one run, written by the first process.

    Args:
        workdir: of the run.
        first: step that it starts or resumes from.
        began: when this process began, as `time.time()`.
        active: False on all processes but the first, which then have no numbers.
    """

    def __init__(self, workdir: str | pathlib.Path, first: int, began: float, active: bool = True):
        self.file, self.active = pathlib.Path(workdir) / "goodput.json", active
        self.starts: list[list] = []  # [time, step, seconds until the first step was done or None]
        self.sums: dict[str, list[float]] = {}
        if active and os.path.lexists(self.file):
            self.starts, self.sums = _read(self.file)
        self.sums = {step: x for step, x in self.sums.items() if int(step) <= first}
        self.steps, self.waiting, self.saving = self.sums.get(str(first), [0.0, 0.0, 0.0])
        self.starts.append([began, first, None])
        self._last: float | None = None
        self._write()

    @property
    def restarts(self) -> int:
        return len(self.starts) - 1

    def ready(self) -> None:
        """The first step is done: start-up and compilation end here."""
        self.starts[-1][2] = time.time() - self.starts[-1][0]
        self._last = time.perf_counter()
        self._write()

    def step(self, waited: float) -> None:
        """One more step was read; `waited` seconds went into waiting for its data."""
        if self._last is None:
            return
        now = time.perf_counter()
        waited = min(waited, now - self._last)
        self.steps += now - self._last - waited
        self.waiting += waited
        self._last = now

    def pause(self, seconds: float) -> None:
        """The loop did something else for some seconds, which count as lost."""
        if self._last is not None:
            self._last += seconds

    def saved(self, step: int, seconds: float) -> None:
        """A checkpoint after `step` stopped the loop for some seconds."""
        self.saving += seconds
        self.pause(seconds)
        self.sums[str(step)] = [self.steps, self.waiting, self.saving]
        self.sums = dict(list(self.sums.items())[-_KEPT:])
        self._write()

    def share(self) -> float:
        total = time.time() - self.starts[0][0]
        return min(self.steps / total, 1.0) if total > 0 else 0.0

    def summary(self) -> str:
        """One line about the whole run."""
        total = time.time() - self.starts[0][0]
        starting = sum(seconds or 0.0 for _, _, seconds in self.starts)
        rest = max(total - self.steps - self.waiting - self.saving - starting, 0.0)
        starts = f"{len(self.starts)} starts" if self.restarts else "start"
        return (
            f"goodput {self.share():.1%} of {_clock(total)}: steps {_clock(self.steps)}, waiting "
            f"for data {_clock(self.waiting)}, checkpoints {_clock(self.saving)}, {starts} "
            f"{_clock(starting)}, lost, down or ending {_clock(rest)}"
        )

    def _write(self) -> None:
        if not self.active:
            return
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps({"starts": self.starts, "sums": self.sums}) + "\n")
        new.replace(self.file)


def _read(file: pathlib.Path) -> tuple[list[list], dict[str, list[float]]]:
    """(starts, sums) of an account.

    Raises:
        FileError: it is damaged.
    """
    saved = files.read_json(file)
    starts, sums = saved.get("starts"), saved.get("sums")
    whole = (
        isinstance(starts, list)
        and isinstance(sums, dict)
        and all(_numbers(row, 3, last_may_lack=True) for row in starts)
        and all(step.isdecimal() and _numbers(row, 3) for step, row in sums.items())
    )
    if not whole:
        raise FileError(
            f"{file} is not the account of a run (starts, sums); remove it to begin another one"
        )
    return starts, sums


def _numbers(row, length: int, last_may_lack: bool = False) -> bool:
    if not isinstance(row, list) or len(row) != length:
        return False
    row = row[:-1] if last_may_lack and row[-1] is None else row
    return all(type(x) in (int, float) and math.isfinite(x) for x in row)


def _clock(seconds: float) -> str:
    whole = int(seconds + 0.5)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"

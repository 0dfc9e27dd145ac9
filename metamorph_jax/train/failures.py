"""Bad steps, with the record that is kept of them, and the signal to stop."""

import dataclasses
import json
import pathlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from metamorph_jax.errors import LossSpike, NonFiniteError


@dataclasses.dataclass
class Pending:
    """A step whose values have not been read yet.

    Attributes:
        step: its number, from 1.
        report: of the step, on the devices.
        batch: this process's rows (numpy).
        samples: names the samples of each row, see `DataShards.sample_names`.
        counted: `counted()` of the batch, over all processes.
        wait: seconds that were spent waiting for its data.
    """

    step: int
    report: Any
    batch: Any
    samples: Callable[[], list]
    counted: dict[str, int]
    wait: float


class BadSteps:
    """Stops the run at a bad step, or writes it down and lets the run continue.

    Args:
        workdir: gets `bad_step_<step>_process_<k>.npz` (the rows of this process without pixels)
            and `.json` (what was wrong, and the samples of each row) in both cases.
        skip: skip bad steps; else the first one ends the run.
        most: this many bad steps in a row end the run even with `skip`.
        sources: names of the data sources.
    """

    def __init__(self, workdir: pathlib.Path, skip: bool, most: int, sources: list[str]):
        self.workdir, self.skip, self.most, self.sources = workdir, skip, most, sources
        self.total = self._in_a_row = 0

    def judge(self, pending: Pending, report) -> str | None:
        """None for a good step; for a bad one that was skipped, what to log.

        Raises:
            BadStep: if the run is to end.
        """
        if report["finite"] and not report["spike"]:
            self._in_a_row = 0
            return None
        kind, message = self._explain(pending, report)
        self.total += 1
        self._in_a_row += 1
        if not self.skip:
            raise kind(f"{message} Nothing was applied since step {pending.step - 1}. Look at the "
                       "samples, or set guard.on_bad=skip to leave such batches out")  # fmt: skip
        if self._in_a_row >= self.most:
            count = self._in_a_row
            raise kind(f"{message} That was bad step {count} in a row, guard.most_in_a_row")
        return f"{message} Skipped"

    def _explain(self, pending: Pending, report) -> tuple[type, str]:
        file = self.workdir / f"bad_step_{pending.step}_process_{jax.process_index()}.npz"
        batch, sources = pending.batch, self.sources
        np.savez_compressed(file, **_small_arrays(batch))
        named = [k for k, (n, _) in report["metrics"].items() if "/" in k and not np.isfinite(n)]
        blamed = sorted({s for s in sources for k in named if s in k.split("/")[1:]})
        blamed = blamed or pending.batch.sources_present()
        wrong = [k for k, v in report["sums"].items() if not np.isfinite(v)]
        if report["finite"]:
            mean, deviation = report["loss_statistics"][:2]
            kind, what = LossSpike, (
                f"loss {float(report['loss']):.5g} is a spike "
                f"(running mean {mean:.5g} ± {deviation:.2g})"
            )  # fmt: skip
        elif wrong:
            kind, what = NonFiniteError, f"not finite: losses {', '.join(wrong)}"
        else:
            kind, what = NonFiniteError, "not finite: gradients (all losses are finite)"
        message = (
            f"step {pending.step}: {what}; data source: {', '.join(blamed) or 'unknown'}; "
            f"gradient norm {float(report['grad_norm']):.5g}. The batch is in {file}, its samples "
            f"in {file.with_suffix('.json').name}."
        )
        note = {"step": pending.step, "what": what, "samples": pending.samples()}
        file.with_suffix(".json").write_text(json.dumps(note, indent=1) + "\n")
        return kind, message


def _small_arrays(batch) -> dict[str, np.ndarray]:
    """Dotted name -> leaf of a batch, without its images."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    return {name: x for name, x in named.items() if np.ndim(x) < 5}


class Sigterm:
    """Notices SIGTERM, and agrees on it with the other processes."""

    def __enter__(self):
        self.since: float | None = None  # when it was noticed
        self._alone = jax.process_count() == 1
        self._before = None
        if self._alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_) -> None:
        self.since = self.since or time.monotonic()

    def received(self, step: int) -> bool:
        """Whether to stop now. All processes ask after the same steps and get the same answer."""
        if not self._alone:
            from jax.experimental import multihost_utils  # its service has a handler of its own

            if multihost_utils.reached_preemption_sync_point(step):
                self._note()
        return self.since is not None

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

"""Logging: a line on the console, one in metrics.jsonl, and TensorBoard.

Only the first process writes. The values of a step are read when the next one is already running,
so the device never waits for the host. Metrics come as (numerator, denominator), and both are added
up over the steps of a line before they are divided, so a line is exact whatever the batches held.
"""

import json
import math
import os
import pathlib
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from metamorph_jax import chips, flops
from metamorph_jax.recipe import Shown
from metamorph_jax.train import boards, metrics_file
from metamorph_jax.train.goodput import Goodput

COLUMNS = 100  # of a console line; what does not fit is in metrics.jsonl


def flops_per_step(model, batch, rows: int, trained, mesh) -> float:
    """Model FLOPs of one training step over all devices, counted as `metamorph plan` counts them.

    Args:
        model: a `recipe.Model`; its leaves may be ShapeDtypeStructs.
        batch: of any number of rows; padding counts.
        rows: of the whole batch.
        trained: names of the trained leaves.
        mesh: of the run.
    """
    whole = lambda x: jax.ShapeDtypeStruct((rows, *np.shape(x)[1:]), x.dtype)  # noqa: E731
    with jax.set_mesh(mesh):
        return flops.total(model.work(jax.tree.map(whole, batch)), trained).model


def memory_peak() -> float | None:
    """Peak memory of this process's fullest device in GiB; None where the backend doesn't say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) / 2**30 if peaks else None


# Beside what the model has: of a step (`values_of`), and of the time that it takes (`Logger`). Some
# are there on some hardware only. What begins with "data/" counts samples.
OF_STEPS = ("loss", "grad_norm", "learning_rate")
OF_TIME = (
    *("seconds_per_step", "positions_per_second", "images_per_second", "data_wait", "seconds_left"),
    *("positions_per_second_per_chip", "tflops_per_second_per_chip", "mfu", "hbm_peak_gib"),
    *("skipped_steps", "checkpoint_seconds", "goodput", "goodput_restarts"),
)


def values_of(report: Mapping) -> dict[str, tuple[float, float]]:
    """name -> (numerator, denominator) of every value in a step's report (numpy)."""
    found = {"loss": (report["loss"], 1.0)}
    for name, total in report["sums"].items():
        found[f"{name}_loss"] = (total, report["counts"][name])
    found |= report["metrics"]
    found["grad_norm"] = (report["grad_norm"], 1.0)
    found |= {f"grad_norm/{part}": (norm, 1.0) for part, norm in report["norms"].items()}
    found["learning_rate"] = (report["rate"], 1.0)
    return {name: (float(n), float(d)) for name, (n, d) in found.items()}


class Logger:
    """Adds up steps and writes a line every `every` of them.

    Args:
        workdir: metrics.jsonl and TensorBoard files go here.
        steps: of the whole run, for the time left.
        first: steps done before; later lines of an interrupted run are removed.
        every: steps between two lines.
        active: False on all processes but the first.
        tensorboard: write TensorBoard files, too.
        wandb: project of Weights & Biases, see `boards.WandB`; "" for none.
        config: all options of the run, for that.
        devices: of the run, over all processes.
        goodput: accounts for the run's time.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        steps: int,
        first: int = 0,
        every: int = 10,
        active: bool = True,
        tensorboard: bool = True,
        wandb: str = "",
        config: Mapping | None = None,
        devices: int = 1,
        goodput: Goodput | None = None,
    ):
        self.steps, self.first, self.every, self.active = steps, first, every, active
        self.goodput = goodput
        self.data: Mapping[str, float] = {}  # counts of samples that were skipped or cut
        self.flops_per_step = 0.0  # of the model, set when the first batch is known
        chip = chips.find(jax.devices()[0].device_kind)
        self.chips = devices / (chip.devices if chip else 1)
        self.peak = chip.flops * self.chips if chip else None  # FLOP/s of all chips
        self.last: dict[str, float] = {}
        self._first_wait = False
        self.skipped = 0  # bad steps since this process started
        self._file = self._bar = None
        self._boards: list[boards.Board] = []
        self._workdir = pathlib.Path(workdir)
        self._clear()
        if not active:
            return
        file = self._workdir / "metrics.jsonl"
        _take_back(file, first)
        self._file = file.open("a", buffering=1)
        if tensorboard:
            self._boards.append(boards.TensorBoard(self._workdir, first))
        if wandb:
            self._boards.append(boards.WandB(wandb, self._workdir, config or {}))
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True)

    def _clear(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._counts = {"positions": 0, "images": 0, "steps": 0}
        self._wait = self._saving = 0.0
        self._untimed = 0  # steps of this window that were done before its clock started
        self._since = time.perf_counter()

    def restart_clock(self) -> None:
        """Leaves out the time since the last line: start-up and compilation."""
        self._since, self._wait, self._untimed = time.perf_counter(), 0.0, 1
        self._first_wait = True  # the first step's, which is read later
        if self.goodput:
            self.goodput.ready()

    def pause(self, seconds: float) -> None:
        """Leaves out seconds that went into other things than training."""
        self._since += seconds
        if self.goodput:
            self.goodput.pause(seconds)

    def saved(self, step: int, seconds: float) -> None:
        """Leaves out the seconds that a checkpoint after `step` stopped the loop."""
        self._since += seconds
        self._saving += seconds
        if self.goodput:
            self.goodput.saved(step, seconds)

    def say(self, text: str) -> None:
        """Prints text on the console (of the first process), long lines as several."""
        if not self.active:
            return
        text = "\n".join(map(wrapped, text.splitlines()))
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def step(
        self, step: int, report: Mapping, counted: Mapping[str, int], wait: float = 0.0
    ) -> dict[str, float] | None:
        """Adds one step; at the end of a window writes the line and returns its values.

        Args:
            step: its number, from 1.
            report: of the step, read back (numpy).
            counted: `counted()` of its batch, over all processes.
            wait: seconds that were spent waiting for its data.
        """
        for name, pair in values_of(report).items():
            self._sums[name] = self._sums.get(name, 0.0) + np.array(pair, np.float64)
        return self._count(step, counted, wait)

    def skip(self, step: int, counted: Mapping[str, int], wait: float) -> dict[str, float] | None:
        """As `step`, for one that changed nothing and whose values are left out."""
        self.skipped += 1
        return self._count(step, counted, wait)

    def _count(self, step, counted, wait):
        for name, n in counted.items():
            self._counts[name] += n
        self._counts["steps"] += 1
        if self._first_wait:
            wait, self._first_wait = 0.0, False
        self._wait += wait
        if self.goodput:
            self.goodput.step(wait)
        if self._bar is not None:
            self._bar.update()
        if not self.due(step):
            return None
        line = self._line(step)
        self._write(step, line)
        self._clear()
        return line

    def due(self, step: int) -> bool:
        """Whether a line is written after this step."""
        return step % self.every == 0 or step == self.steps

    def _line(self, step: int) -> dict[str, float]:
        line = {name: n / d for name, (n, d) in self._sums.items() if d > 0}
        seconds, steps = time.perf_counter() - self._since, self._counts["steps"]
        timed = max(steps - self._untimed, 1)
        line["seconds_per_step"] = seconds / timed
        line["positions_per_second"] = self._counts["positions"] / steps * timed / seconds
        line["images_per_second"] = self._counts["images"] / steps * timed / seconds
        line["data_wait"] = min(self._wait / seconds, 1.0)
        line["seconds_left"] = (self.steps - step) * seconds / timed
        line |= self.data
        if self.skipped:
            line["skipped_steps"] = self.skipped
        if self._counts["positions"]:
            line["positions_per_second_per_chip"] = line["positions_per_second"] / self.chips
        if self.flops_per_step:
            speed = self.flops_per_step / line["seconds_per_step"]
            line["tflops_per_second_per_chip"] = speed / self.chips / 1e12
            if self.peak:
                line["mfu"] = speed / self.peak
        if self._saving:
            line["checkpoint_seconds"] = self._saving
        peak = memory_peak()
        if peak is not None:
            line["hbm_peak_gib"] = peak
        if self.goodput:
            line["goodput"] = self.goodput.share()
            line["goodput_restarts"] = self.goodput.restarts
        return line

    def _write(self, step: int, line: dict[str, float]) -> None:
        self.last = line
        self._record(step, line)
        self.say(format_line(step, self.steps, line))

    def evaluated(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Writes the results of evaluations after `step`; their seconds are left out.

        Values of a single source ("NAME/SOURCE") are not on the console.
        """
        self.pause(seconds)
        if values:
            self._record(step, values)
        words = [f"{name} {value:.4g}" for name, value in values.items() if "/" not in name]
        said = "  ".join(words) or "samples written"
        self.say(f"step {step}/{self.steps}  {said}  ({seconds:.1f} s)")

    def _record(self, step: int, line: Mapping[str, float]) -> None:
        """Adds a line to metrics.jsonl and its values to TensorBoard."""
        if not self.active:
            return
        safe = {k: v if math.isfinite(v) else str(v) for k, v in line.items()}
        self._file.write(json.dumps({"step": step, **safe}) + "\n")
        for board in self._boards:
            board.numbers(step, line)

    def show(self, step: int, shown: Mapping[str, Sequence[Shown]]) -> None:
        """Keeps what evaluations after `step` showed, in workdir/samples and on the boards."""
        if not self.active:
            return
        for name, samples in shown.items():
            boards.keep(self._workdir, step, name, samples)
            for board in self._boards:
                board.samples(step, name, samples)

    def close(self) -> None:
        for one in (self._file, *self._boards, self._bar):
            if one is not None:
                one.close()


def format_line(step: int, steps: int, line: Mapping[str, float]) -> str:
    """The console line: the values that matter most, as many as fit into `COLUMNS`."""
    left = int(line["seconds_left"])
    pieces = [f"step {step}/{steps}", f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"]
    length = sum(map(len, pieces)) + 2
    for piece in _by_importance(line):
        length += 2 + len(piece)
        if length > COLUMNS:
            break
        pieces.append(piece)
    return "  ".join(pieces)


APART = ("loss", "skipped_steps", "learning_rate", "data_wait", "mfu", "hbm_peak_gib", "grad_norm")


def _by_importance(line: Mapping[str, float]) -> Iterator[str]:
    """What a console line may say, the most important first."""
    speed = ("goodput", "seconds", "per_second", "/")  # "/": of a single part or source
    others = [n for n in line if n not in APART and not any(word in n for word in speed)]
    yield from (f"{name} {line[name]:.4g}" for name in ("loss", "skipped_steps") if name in line)
    parts = [name for name in others if name.endswith("_loss")]
    yield from (f"{name.removesuffix('_loss')} {line[name]:.4g}" for name in parts)
    if "learning_rate" in line:
        yield f"lr {line['learning_rate']:.3g}"
    yield f"{line['seconds_per_step']:.3g} s/step"
    if "mfu" in line:
        yield f"MFU {line['mfu']:.1%}"
    elif "tflops_per_second_per_chip" in line:
        yield f"{line['tflops_per_second_per_chip']:.3g} TFLOP/s/chip"
    yield f"wait {line['data_wait']:.0%}"
    if "positions_per_second_per_chip" in line:
        yield f"{line['positions_per_second_per_chip']:.4g} tok/s/chip"
    if "hbm_peak_gib" in line:
        yield f"HBM peak {line['hbm_peak_gib']:.2f} GiB"
    yield f"{line['images_per_second']:.3g} images/s"
    if "goodput" in line:
        restarts = f", {line['goodput_restarts']:.0f} restarts" if line["goodput_restarts"] else ""
        yield f"goodput {line['goodput']:.0%}{restarts}"
    if "grad_norm" in line:
        yield f"grad_norm {line['grad_norm']:.4g}"
    yield from (f"{name} {line[name]:.4g}" for name in others if name not in parts)


def wrapped(text: str) -> str:
    """Text in lines of at most `COLUMNS`, those after the first indented; words stay whole."""
    return textwrap.fill(
        text, COLUMNS, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def _take_back(file: pathlib.Path, step: int) -> None:
    """Removes lines after `step`, whose steps are done again now, and a half-written last line."""
    if not os.path.lexists(file):
        return
    kept = [text + "\n" for found, text, _ in metrics_file.lines(file) if found <= step]
    new = file.with_suffix(".new")
    new.write_text("".join(kept))
    new.replace(file)

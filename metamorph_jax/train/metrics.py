"""What a run says about itself: a line on the console, one in metrics.jsonl, TensorBoard.

Only the first process writes. Values of a step are read when the next one is already running, so
the device never waits for the host. Metrics come as (numerator, denominator) and are added up over
the steps of a line before they are divided: a line is exact whatever the batches held.
"""

import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping

import numpy as np

# Peak bfloat16 FLOP/s of one device as JAX counts them, by the start of its `device_kind`.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 1153e12,  # a chip shows two devices
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
}


def peak_flops(kind: str) -> float | None:
    return next((peak for name, peak in PEAKS.items() if kind.startswith(name)), None)


def measure(batch) -> dict[str, int]:
    """How many positions and pictures of a batch (numpy) are no padding."""
    if hasattr(batch, "segments"):
        pictures = int(np.sum(batch.image_valid))
        return {"positions": int(np.sum(np.asarray(batch.segments) > 0)), "pictures": pictures}
    rows = batch.image.shape[0] if batch.valid is None else int(np.sum(batch.valid))
    return {"positions": 0, "pictures": rows}


def flops_per_position(params: Mapping, frozen: Mapping) -> float:
    """Estimated FLOPs of a training step per position, from the sizes of matrices alone.

    6 per trained and 4 per frozen weight (its own gradient is not made). Tables that are only
    looked up, towers and autoencoders aren't counted, nor is attention; output tables count as if
    they were applied everywhere.
    """

    def size(leaves):
        skip = ("tower.", "vae.")
        return sum(
            math.prod(x.shape)
            for name, x in leaves.items()
            if len(x.shape) > 1 and not name.startswith(skip) and not name.endswith("added")
        )

    untied = any(".lm_head." in n for n in (*params, *frozen))
    tables = lambda d: {n: x for n, x in d.items() if n.endswith("embed_tokens.embedding")}  # noqa: E731
    total = 6 * size(params) + 4 * size(frozen)
    return total - (6 * size(tables(params)) + 4 * size(tables(frozen)) if untied else 0)


def values_of(report: Mapping) -> dict[str, tuple[float, float]]:
    """name -> (numerator, denominator) of everything that a step reports (numpy)."""
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
        first: steps done before; later lines of an interrupted run are taken back.
        every: steps between two lines.
        active: False on all processes but the first.
        tensorboard: write its files, too.
        flops_per_position: for the FLOP/s estimate; 0 for none.
        peak: FLOP/s of all devices together, or None.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        steps: int,
        first: int = 0,
        every: int = 10,
        active: bool = True,
        tensorboard: bool = True,
        flops_per_position: float = 0.0,
        peak: float | None = None,
    ):
        self.steps, self.first, self.every, self.active = steps, first, every, active
        self.flops_per_position, self.peak = flops_per_position, peak
        self.last: dict[str, float] = {}
        self._file = self._board = self._bar = None
        self._clear()
        if not active:
            return
        workdir = pathlib.Path(workdir)
        file = workdir / "metrics.jsonl"
        _take_back(file, first)
        self._file = file.open("a", buffering=1)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first + 1)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True)

    def _clear(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._counts = {"positions": 0, "pictures": 0, "steps": 0}
        self._wait = 0.0
        self._since = time.perf_counter()

    def restart_clock(self) -> None:
        """Leaves out the time since the last line (compilation, a checkpoint)."""
        self._since, self._wait = time.perf_counter(), 0.0

    def say(self, text: str) -> None:
        """A line on the console, of the first process."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def step(
        self, step: int, report: Mapping, counted: Mapping[str, int], wait: float = 0.0
    ) -> dict[str, float] | None:
        """Takes in one step; at the end of a window writes the line and returns its values.

        Args:
            step: its number, from 1.
            report: of the step, read back (numpy).
            counted: `measure` of its batch, over all processes.
            wait: seconds that were spent waiting for its data.
        """
        for name, pair in values_of(report).items():
            self._sums[name] = self._sums.get(name, 0.0) + np.array(pair, np.float64)
        for name, n in counted.items():
            self._counts[name] += n
        self._counts["steps"] += 1
        self._wait += wait
        if self._bar is not None:
            self._bar.update()
        if step % self.every and step != self.steps:
            return None
        line = self._line(step)
        self._write(step, line)
        self._clear()
        return line

    def _line(self, step: int) -> dict[str, float]:
        line = {name: n / d for name, (n, d) in self._sums.items() if d > 0}
        seconds, steps = time.perf_counter() - self._since, self._counts["steps"]
        line["seconds_per_step"] = seconds / steps
        line["positions_per_second"] = self._counts["positions"] / seconds
        line["pictures_per_second"] = self._counts["pictures"] / seconds
        line["data_wait"] = min(self._wait / seconds, 1.0)
        line["seconds_left"] = (self.steps - step) * seconds / steps
        if self.flops_per_position and self._counts["positions"]:
            speed = self.flops_per_position * line["positions_per_second"]
            line["tflops_estimate"] = speed / 1e12
            if self.peak:
                line["mfu_estimate"] = speed / self.peak
        return line

    def _write(self, step: int, line: dict[str, float]) -> None:
        self.last = line
        if not self.active:
            return
        safe = {k: v if math.isfinite(v) else str(v) for k, v in line.items()}
        self._file.write(json.dumps({"step": step, **safe}) + "\n")
        if self._board is not None:
            for name, value in line.items():
                self._board.add_scalar(name, value, step)
        self.say(format_line(step, self.steps, line))

    def close(self) -> None:
        for one in (self._file, self._board, self._bar):
            if one is not None:
                one.close()


def format_line(step: int, steps: int, line: Mapping[str, float]) -> str:
    """The console line."""
    left = int(line["seconds_left"])
    pieces = [f"step {step}/{steps}", f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"]
    timing = ("seconds_per_step", "seconds_left", "data_wait", "learning_rate")
    for name, value in line.items():
        if name in timing or name.endswith("_per_second") or name.endswith("_estimate"):
            continue
        pieces.append(f"{name} {value:.4g}")
    pieces.append(f"lr {line['learning_rate']:.3g}")
    pieces.append(f"{line['seconds_per_step']:.3g} s/step")
    if line["positions_per_second"]:
        pieces.append(f"{line['positions_per_second']:.0f} positions/s")
    pieces.append(f"{line['pictures_per_second']:.3g} pictures/s")
    pieces.append(f"data wait {line['data_wait']:.0%}")
    if "tflops_estimate" in line:
        pieces.append(f"~{line['tflops_estimate']:.3g} TFLOP/s")
    if "mfu_estimate" in line:
        pieces.append(f"MFU ~{line['mfu_estimate']:.1%}")
    return "  ".join(pieces)


def _take_back(file: pathlib.Path, step: int) -> None:
    """Removes lines after `step`: steps that are now done again, and a half-written last line."""
    if not file.is_file():
        return
    kept = []
    for text in file.read_text().splitlines():
        try:
            if json.loads(text)["step"] <= step:
                kept.append(text + "\n")
        except (ValueError, KeyError):
            continue
    new = file.with_suffix(".new")
    new.write_text("".join(kept))
    new.replace(file)

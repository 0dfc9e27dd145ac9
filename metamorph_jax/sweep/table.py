"""Results of a sweep: one row per run as CSV and Markdown, and a plot against each key.

A metric of a run is its mean over the last tenth of the lines of metrics.jsonl: single lines are
noisy, and the same share of the training is compared for all runs.
"""

import csv
import io
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from metamorph_jax.errors import UserError
from metamorph_jax.eval import figures

SHARE = 0.1  # of the lines


def read_metrics(file: pathlib.Path) -> tuple[int, dict[str, float]]:
    """(last step, metric -> mean over the last tenth of the lines); (0, {}) without a file."""
    if not file.is_file():
        return 0, {}
    lines = []
    for text in file.read_text().splitlines():
        try:
            line = json.loads(text)
            lines.append((int(line.pop("step")), line))
        except (ValueError, KeyError, AttributeError):
            continue  # an incomplete line of a run that was killed
    if not lines:
        return 0, {}
    last = [line for _, line in lines[-max(1, math.ceil(len(lines) * SHARE)) :]]
    names = {name: None for line in last for name in line}
    found = {}
    for name in names:
        values = [float(line[name]) for line in last if name in line]  # "nan" is a string there
        found[name] = sum(values) / len(values)
    return lines[-1][0], found


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Dotted key -> the shortest end of it that no other key has."""
    names = {}
    for key in keys:
        parts = key.split(".")
        for n in range(1, len(parts) + 1):
            name = ".".join(parts[-n:])
            if not any(k != key and f".{k}".endswith(f".{name}") for k in keys):
                break
        names[key] = name
    return names


def show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def lower_is_better(metric: str) -> bool:
    return not any(word in metric for word in ("accuracy", "per_second", "mfu", "goodput"))


def best_first(rows: Sequence[dict], metric: str) -> list[dict]:
    """Rows in the order of their metric; those without a finite value come last."""

    def order(row):
        value = row["metrics"].get(metric, math.nan)
        finite = math.isfinite(value)
        return (not finite, (value if lower_is_better(metric) else -value) if finite else 0.0)

    return sorted(rows, key=order)


def markdown(rows: Sequence[dict], metric: str) -> str:
    """A Markdown table, best run first. Rows: {"name", "state", "step", "values", "metrics"}.

    (pandas could write it, but would bring itself and tabulate for these few lines.)
    """
    keys = list(dict.fromkeys(k for row in rows for k in row["values"]))
    names = short_names(keys)
    head = ["run", *(names[k] for k in keys), metric, "step", "state"]
    lines = [head, ["---"] * len(head)]
    for row in best_first(rows, metric):
        lines.append([
            row["name"].split("_")[0],
            *(show(row["values"].get(k)) for k in keys),
            show(row["metrics"].get(metric)),
            str(row["step"]),
            row["state"],
        ])  # fmt: skip
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def as_csv(rows: Sequence[dict]) -> str:
    """All runs in their order, with all of their metrics."""
    keys = list(dict.fromkeys(k for row in rows for k in row["values"]))
    metrics = sorted({m for row in rows for m in row["metrics"]})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "state", "step", *keys, *metrics])
    for row in rows:
        values = [row["values"].get(k, "") for k in keys]
        numbers = [row["metrics"].get(m, "") for m in metrics]
        writer.writerow([row["name"], row["state"], row["step"], *values, *numbers])
    return out.getvalue()


def plot(rows: Sequence[dict], metric: str):
    """A matplotlib figure with one panel per key that has several values; None if no key has any.

    The axis of numbers is logarithmic if they span more than a factor of 8; other values stand side
    by side. A dot is a run; the line connects the means of runs with equal values. Call it, and
    save the figure, inside `figures.style()`.
    """
    rows = [r for r in rows if math.isfinite(r["metrics"].get(metric, math.nan))]
    keys = list(dict.fromkeys(k for row in rows for k in row["values"]))
    keys = [k for k in keys if len({show(r["values"].get(k)) for r in rows}) > 1]
    if not keys:
        return None
    figure, panels = figures.subplots(len(keys), 4.2 * len(keys), 3.0)
    for axes, key in zip(panels, keys, strict=True):
        _panel(axes, [r["values"].get(key) for r in rows], [r["metrics"][metric] for r in rows])
        axes.set_xlabel(key)
    panels[0].set_ylabel(metric)
    return figure


def _panel(axes, values: Sequence[Any], heights: Sequence[float]) -> None:
    """Draws one key's values against the metric."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if numbers:
        places = values
        ticks = sorted(set(values))
        ticks = ticks[:: math.ceil(len(ticks) / 6)]
        labels = list(map(show, ticks))
        if min(values) > 0 and max(values) / min(values) > 8:
            axes.set_xscale("log")
    else:
        labels = list(dict.fromkeys(map(show, values)))
        places, ticks = [labels.index(show(v)) for v in values], range(len(labels))
    means: dict[float, list[float]] = {}
    for x, y in zip(places, heights, strict=True):
        means.setdefault(x, []).append(y)
    color = figures.COLORS[0]
    places_once = sorted(means)
    axes.plot(places_once, [np.mean(means[x]) for x in places_once], color=color)
    axes.scatter(places, heights, 36, "white", edgecolors=color, linewidths=1.7, zorder=3)
    axes.set_xticks(ticks, labels)
    if sum(map(len, labels)) > 20:  # side by side they might overlap
        axes.tick_params(axis="x", labelrotation=30)
    axes.minorticks_off()
    axes.margins(0.08)
    if not numbers:
        axes.set_xlim(-0.5, len(labels) - 0.5)


def write(folder: pathlib.Path, rows: Sequence[dict], metric: str) -> list[pathlib.Path]:
    """Writes sweep.csv, sweep.md and, if there is something to plot, sweep.png; returns them."""
    files = [folder / "sweep.csv", folder / "sweep.md"]
    files[0].write_text(as_csv(rows))
    files[1].write_text(markdown(rows, metric))
    try:
        with figures.style():
            figure = plot(rows, metric)
            if figure is not None:
                files.append(folder / "sweep.png")
                figure.savefig(files[-1], dpi=150)
    except UserError as error:  # a sweep of days should not end here
        print(f"sweep.png is not written: {error}", file=sys.stderr)
    return files

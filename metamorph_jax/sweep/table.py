"""Results of a sweep: one row per run as CSV and Markdown, and a plot against each key.

A metric of a run is its mean over the last tenth of the lines of metrics.jsonl: single lines are
noisy, and the same share of the training is compared for all runs.
"""

import csv
import io
import math
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from metamorph_jax.errors import MissingFile, UserError
from metamorph_jax.eval import figures
from metamorph_jax.files import shown
from metamorph_jax.train.metrics_file import read_metrics

SHARE = 0.1  # of the lines
LINES = 8  # of one panel, in the plot


def last_values(file: str | os.PathLike) -> tuple[int, dict[str, float]]:
    """(last step, metric -> mean over the last tenth of the lines); (0, {}) without a file.

    Raises:
        FileError: as `read_metrics`.
    """
    try:
        series = read_metrics(file, finite=False)
    except MissingFile:
        return 0, {}
    steps = sorted({step for each, _ in series.values() for step in each})
    if not steps:
        return 0, {}
    first = steps[-max(1, math.ceil(len(steps) * SHARE))]
    found = {}
    for name, (each, values) in series.items():
        last = [value for step, value in zip(each, values, strict=True) if step >= first]
        if last:
            found[name] = sum(last) / len(last)
    return steps[-1], found


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
    """A value for people: on one line, control characters escaped."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else shown(value)


def lower_is_better(metric: str) -> bool:
    """By its name; for the score of a task of one's own there is `--best`."""
    higher = ("accuracy", "cosine", "score", "right", "per_second", "mfu", "goodput")
    return "loss" in metric or not any(word in metric for word in higher)


def best_first(rows: Sequence[dict], metric: str, lower: bool | None = None) -> list[dict]:
    """Rows in the order of their metric; those without a finite value come last."""
    sign = 1.0 if (lower_is_better(metric) if lower is None else lower) else -1.0

    def order(row):
        value = row["metrics"].get(metric, math.nan)
        finite = math.isfinite(value)
        return (not finite, sign * value if finite else 0.0)

    return sorted(rows, key=order)


def markdown(rows: Sequence[dict], metric: str, lower: bool | None = None) -> str:
    """A Markdown table, best run first.

    (pandas could write it, but would bring itself and tabulate for these few lines.)

    Args:
        rows: {"name", "state", "step", "values", "metrics"}, and "steps", those that are planned.
        metric: to order by.
        lower: whether lower values are better; None: by the metric's name.
    """
    keys = list(dict.fromkeys(k for row in rows for k in row["values"]))
    names = short_names(keys)
    head = ["run", *(names[k] for k in keys), metric, "step", "state"]
    lines = [list(map(_cell, head)), ["---"] * len(head)]
    for row in best_first(rows, metric, lower):
        step, steps = row["step"], row.get("steps", row["step"])
        lines.append([
            _cell(row["name"].split("_")[0]),
            *(_cell(row["values"].get(k)) for k in keys),
            _cell(row["metrics"].get(metric)),
            str(step) if step == steps else f"{step} of {steps}",
            _cell(row["state"]),
        ])  # fmt: skip
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    """A value that Markdown and HTML show as it is."""
    text = show(value).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for mark in "|`*[]~":
        text = text.replace(mark, f"\\{mark}")
    return text


def as_csv(rows: Sequence[dict]) -> str:
    """All runs in their order, with all of their metrics."""
    keys = list(dict.fromkeys(k for row in rows for k in row["values"]))
    metrics = sorted({m for row in rows for m in row["metrics"]})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["run", "state", "step", "steps", *keys, *metrics]
    writer.writerow(map(_plain, head))
    for row in rows:
        values = [row["values"].get(k, "") for k in keys]
        numbers = [row["metrics"].get(m, "") for m in metrics]
        about = [row["name"], row["state"], row["step"], row.get("steps", "")]
        writer.writerow(map(_plain, [*about, *values, *numbers]))
    return out.getvalue()


def _plain(value: Any) -> Any:
    """A value that spreadsheets read as what it is: text is never a formula."""
    if value is None or isinstance(value, bool | int | float):
        return value
    text = shown(value, 10_000)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


# ---- the plot


def plot(rows: Sequence[dict], metric: str, lower: bool | None = None):
    """A matplotlib figure with one panel per key that has several values; None if no key has any.

    The axis is logarithmic for rates, and for numbers that span more than a factor of 8; values
    that are not numbers stand side by side. A dot is a run. A line connects the runs that differ in
    the panel's key only (the mean of those that do not differ in it either). Call it, and save the
    figure, inside `figures.style()`.
    """
    rows = [r for r in rows if _on_an_axis(r["metrics"].get(metric))]
    keys = list(dict.fromkeys(k for row in rows for k in row["values"]))
    keys = [k for k in keys if len({show(r["values"].get(k)) for r in rows}) > 1]
    if not keys:
        return None
    lower = lower_is_better(metric) if lower is None else lower
    figure, panels = figures.subplots(len(keys), 4.2 * len(keys), 3.4)
    names = short_names(keys)
    for axes, key in zip(panels, keys, strict=True):
        others = [k for k in keys if k != key]
        settings = [
            ", ".join(f"{names[k]} = {show(r['values'].get(k))}" for k in others) for r in rows
        ]
        values = [r["values"].get(key) for r in rows]
        _panel(axes, values, [r["metrics"][metric] for r in rows], settings, "rate" in key)
        axes.set_xlabel(shown(key, 60))
        axes.set_ylabel(f"{shown(metric, 40)} ({'lower' if lower else 'higher'} is better)")
    return figure


def _panel(
    axes,
    values: Sequence[Any],
    heights: Sequence[float],
    settings: Sequence[str] | None = None,
    rate: bool = False,
) -> None:
    """Draws one key's values against the metric, with a line for each of the other settings."""
    places, ticks, labels = _x_axis(axes, values, rate)
    lines: dict[str, dict[float, list[float]]] = {}
    for x, y, setting in zip(places, heights, settings or [""] * len(places), strict=True):
        lines.setdefault(setting, {}).setdefault(x, []).append(y)
    many = len(lines) > LINES  # as in a random search
    color = {s: figures.COLORS[0 if many else i % len(figures.COLORS)] for i, s in enumerate(lines)}
    for number, (setting, means) in enumerate(lines.items()):
        if not many:
            at = sorted(means)
            style = "-" if number < len(figures.COLORS) else "--"
            label = shown(setting, 40)
            axes.plot(at, [np.mean(means[x]) for x in at], style, color=color[setting], label=label)
    edges = [color[s] for s in settings or [""] * len(places)]
    axes.scatter(places, heights, 36, "white", edgecolors=edges, linewidths=1.7, zorder=3)
    if 1 < len(lines) <= LINES and axes.get_legend_handles_labels()[0]:
        axes.legend()
    axes.set_xticks(ticks, labels)
    if sum(map(len, labels)) > 20:  # side by side they might overlap
        axes.tick_params(axis="x", labelrotation=30)
    axes.minorticks_off()
    axes.margins(0.08)
    if isinstance(ticks, range):
        axes.set_xlim(-0.5, len(labels) - 0.5)


def _on_an_axis(value: Any) -> bool:
    """Is it a number that is finite, and far enough from the largest for margins?"""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -1e300 < value < 1e300


def _x_axis(axes, values: Sequence[Any], rate: bool):
    """(place of each value, places of the ticks, their labels); the axis gets its scale.

    The ticks are a range if the values are not numbers.
    """
    if not all(map(_on_an_axis, values)):
        labels = list(dict.fromkeys(shown(show(v), 30) for v in values))
        return [labels.index(shown(show(v), 30)) for v in values], range(len(labels)), labels
    ticks = sorted(set(values))
    ticks = ticks[:: math.ceil(len(ticks) / 6)]
    if ticks[0] > 0 and (rate or max(values) / min(values) > 8):
        axes.set_xscale("log")
    return values, ticks, list(map(show, ticks))


def write(
    folder: pathlib.Path, rows: Sequence[dict], metric: str, lower: bool | None = None
) -> list[pathlib.Path]:
    """Writes sweep.csv, sweep.md and, if there is something to plot, sweep.png; returns them."""
    files = [folder / "sweep.csv", folder / "sweep.md"]
    files[0].write_text(as_csv(rows))
    files[1].write_text(markdown(rows, metric, lower))
    try:
        with figures.style():
            figure = plot(rows, metric, lower)
            if figure is not None:
                files.append(folder / "sweep.png")
                figure.savefig(files[-1], dpi=150)
    except UserError as error:  # a sweep of days should not end here
        print(f"sweep.png is not written: {error}", file=sys.stderr)
    return files

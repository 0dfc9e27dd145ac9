"""Results of a sweep: one row per run as CSV and Markdown, and a plot against each key.

A metric of a run is its mean over the last tenth of the lines of metrics.jsonl: single lines are
noisy, and the same share of the training is compared for all runs.
"""

import csv
import io
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

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
    """A table, best run first. Rows: {"name", "state", "step", "values", "metrics"}."""
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
    """A figure with one panel for each key that has several values; None if no key has any.

    The axis of numbers is logarithmic if they span more than a factor of 8; other values stand side
    by side. A dot is a run; the line connects the means of runs with equal values.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows = [r for r in rows if math.isfinite(r["metrics"].get(metric, math.nan))]
    keys = list(dict.fromkeys(k for row in rows for k in row["values"]))
    keys = [k for k in keys if len({show(r["values"].get(k)) for r in rows}) > 1]
    if not keys:
        return None
    width, height, left, top, right, bottom = 420, 300, 70, 34, 20, 44
    ink, soft, accent = (40, 40, 40), (205, 205, 205), (31, 104, 180)
    picture = Image.new("RGB", (width * len(keys), height), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    ys = [r["metrics"][metric] for r in rows]
    low, high = min(ys), max(ys)
    pad = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    low, high = low - pad, high + pad
    for panel, key in enumerate(keys):
        x0, x1 = panel * width + left, (panel + 1) * width - right
        y0, y1 = height - bottom, top
        place, ticks = _axis([r["values"].get(key) for r in rows])
        xs = [x0 + place(r["values"].get(key)) * (x1 - x0) for r in rows]
        at = [(x, y0 - (y - low) / (high - low) * (y0 - y1)) for x, y in zip(xs, ys, strict=True)]
        for i in range(5):
            y = y0 + (y1 - y0) * i / 4
            draw.line([(x0, y), (x1, y)], fill=soft)
            draw.text((x0 - 6, y), show(low + (high - low) * i / 4), ink, font, anchor="rm")
        for value in ticks:
            x = x0 + place(value) * (x1 - x0)
            draw.line([(x, y0), (x, y0 + 4)], fill=ink)
            draw.text((x, y0 + 7), show(value), ink, font, anchor="mt")
        means: dict[float, list[float]] = {}
        for x, y in at:
            means.setdefault(x, []).append(y)
        draw.line([(x, sum(v) / len(v)) for x, v in sorted(means.items())], fill=accent, width=2)
        for x, y in at:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], outline=accent, fill="white", width=2)
        draw.text(((x0 + x1) / 2, height - 6), key, ink, font, anchor="mb")
        draw.text((x0, y1 - 8), metric, ink, font, anchor="lb")
    return picture


def _axis(values: Sequence[Any]):
    """(function from a value to its position between 0 and 1, values with a tick)."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers:
        kinds = list(dict.fromkeys(map(show, values)))
        return (lambda v: (kinds.index(show(v)) + 0.5) / len(kinds)), kinds
    low, high = min(values), max(values)
    scale = math.log if low > 0 and high / low > 8 else float
    a, b = scale(low), scale(high)
    place = lambda v: 0.06 + 0.88 * (scale(v) - a) / (b - a)  # noqa: E731
    marks = sorted(set(values))
    if len(marks) > 6:
        marks = marks[:: math.ceil(len(marks) / 6)]
    return place, marks


def write(folder: pathlib.Path, rows: Sequence[dict], metric: str) -> list[pathlib.Path]:
    """Writes sweep.csv, sweep.md and, if there is something to plot, sweep.png; returns them."""
    files = [folder / "sweep.csv", folder / "sweep.md"]
    files[0].write_text(as_csv(rows))
    files[1].write_text(markdown(rows, metric))
    picture = plot(rows, metric)
    if picture is not None:
        files.append(folder / "sweep.png")
        picture.save(files[-1])
    return files

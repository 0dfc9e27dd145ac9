"""Results of tasks as people read them: a table on the terminal, and a page with worst answers."""

import pathlib
from collections.abc import Sequence

import numpy as np

from metamorph_jax.data import images
from metamorph_jax.data.sources.base import IMAGE, ImageRef
from metamorph_jax.errors import BadSample
from metamorph_jax.eval import page
from metamorph_jax.eval.bench import Result
from metamorph_jax.eval.tasks.base import Record
from metamorph_jax.files import shown

WORST = 24  # answers that the page shows of each task
_SIDE = 256  # pixels of an image on the page, at most
_LONGEST = 400  # characters of a prompt or reply on the page


# ---- the terminal


def table(results: Sequence[Result]) -> str:
    """All metrics of all tasks, a line each."""
    rows = [("task", "metric", "score", "95 % interval", "questions")]
    for result in results:
        scores = result.scores or {"no scores": float("nan")}
        for metric, value in scores.items():
            first = metric == next(iter(scores))
            asked = f"{result.answered:,} of {result.questions:,}"
            if result.answered == result.questions:
                asked = f"{result.questions:,}"
            rows.append((
                shown(result.task.name, 60) if first else "", shown(metric, 60),
                number(value), interval(result, metric), asked if first else "",
            ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *(note for result in results for note in notes(result))])


def number(value: float) -> str:
    """A score as it is shown."""
    if value != value:
        return "–"
    return f"{value:,.2f}" if 0 < abs(value) < 10 else f"{value:,.1f}"


def interval(result: Result, metric: str) -> str:
    """The confidence interval of a metric, if it has one."""
    if metric not in result.intervals:
        return ""
    low, high = result.intervals[metric]
    return f"{number(low)} – {number(high)}"


def notes(result: Result) -> list[str]:
    """What one has to know about the scores of a task: what is missing in them."""
    name, found = result.task.name, []
    if result.failures:
        reasons = ", ".join(f"{count:,} {shown(why)}" for why, count in result.reasons.items())
        found.append(f"{name}: {len(result.failures):,} questions could not be asked ({reasons})")
    if result.unparsed:
        what = (
            "have no usable image"
            if result.task.form == "draw"
            else "could not be read as an answer"
        )
        found.append(f"{name}: {result.unparsed:,} replies {what}")
    if result.cut:
        found.append(f"{name}: {result.cut:,} replies were cut off by the number of new tokens")
    if result.task.judged and (left := sum(r["score"] is None for r in result.records)):
        found.append(f"{name}: {left:,} answers have no verdict of a judge")
    if result.without_intervals:
        found.append(f"{name}: {result.without_intervals}")
    return found


# ---- the page


def write(path: pathlib.Path, results: Sequence[Result], model: str) -> pathlib.Path:
    """Writes the page (whole or not at all) and returns its path.

    Args:
        model: what was evaluated, for the title.
    """
    overview = page.Table(
        ["task", "metric", *map(page.Number, ("score", "95 % interval", "questions"))],
        [_overview(result) for result in results],
        caption="95 % confidence intervals by bootstrap over what is scored together.",
    )
    sections = [page.Section("Scores", [overview])]
    for result in results:
        title = result.task.title or result.task.name
        sections.append(page.Section(f"{title} ({result.task.name})", _task(result)))
    lead = "Scores of benchmark tasks, and the answers that scored least."
    return page.write(path, page.Page(f"Evaluation of {model}", lead, sections))


def _overview(result: Result) -> list[str]:
    metric = (
        result.task.main if result.task.main in result.scores else next(iter(result.scores), "")
    )
    score = number(result.scores[metric]) if metric else "–"
    return [result.task.name, metric, score, interval(result, metric), f"{result.answered:,}"]


def _task(result: Result) -> list:
    scores = [
        [metric, number(value), interval(result, metric)] for metric, value in result.scores.items()
    ]
    columns = ["metric", page.Number("score"), page.Number("95 % interval")]
    blocks = [page.Table(columns, scores)]
    if missing := notes(result):
        blocks.append(page.Bullets(missing))
    worst = worst_of(result.records)
    if worst:
        blocks += [page.Text("Answers that scored least:"),
                   page.ImageGrid([_cell(record) for record in worst], 160)]  # fmt: skip
    example = result.records[0]["prompt"]
    decoding = ", ".join(f"{k}={v}" for k, v in result.settings.get("decoding", {}).items())
    facts = [["prompt of the first question", example], ["form", result.task.form]]
    how = "; ".join(f"{how} ({', '.join(names)})" for how, names in result.methods.items())
    facts += [["intervals", how]] if how else []
    facts += [["decoding", decoding], ["official files", ", ".join(f.name for f in result.files)]]
    return [*blocks, page.Table((), facts, code=True)]


def worst_of(records: Sequence[Record], count: int = WORST) -> list[Record]:
    """The records with the lowest scores below 1; of equal ones, some drawn by a fixed chance."""
    wrong = [record for record in records if record["score"] is not None and record["score"] < 1]
    order = np.random.default_rng(0).permutation(len(wrong))
    return sorted((wrong[i] for i in order), key=lambda record: record["score"])[:count]


def _cell(record: Record) -> page.Cell:
    pictures = [*record["images"], *record.get("drawn", ())]
    cells = [_image(path, record) for path in pictures[:4]]
    reply = shown(record["reply"], _LONGEST) or "(no answer)"
    asked = record["prompt"][:_LONGEST].removeprefix(IMAGE).splitlines()
    lines = [page.Line(shown(line, _LONGEST)) for line in asked if line.strip()]
    lines.append(page.Line(f"✗ {reply}", "bad"))
    if record["gold"] is not None:
        lines.append(page.Line(f"right: {shown(record['gold'], _LONGEST)}"))
    return page.Cell([cell for cell in cells if cell is not None], lines, record["id"])


def _image(path: str, record: Record) -> page.Image | None:
    """A small copy of an image, None if it can't be read any more."""
    try:
        (image,) = images.load([ImageRef(path)])
    except BadSample:
        return None
    image.thumbnail((_SIDE, _SIDE))
    return page.Image(np.asarray(image), f"image of question {record['id']}")

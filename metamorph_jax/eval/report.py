"""`report.html`: what a run learned, as a page (`eval/page.py`) with charts (`eval/figures.py`).

Any part of a `Report` may be left empty; its section is then not shown.

    report = Report(title=..., targets=[Target("Accuracy", 0.96, 0.9)], curves=[...], ...)
    write_report(workdir / "report.html", report)
"""

import dataclasses
import math
import pathlib

import numpy as np

from metamorph_jax.eval import figures, page
from metamorph_jax.eval.scorers.short_answers import TypeScore, blind_accuracy


@dataclasses.dataclass(frozen=True)
class Target:
    """A number that the run was meant to reach; `at_most` for times and sizes."""

    name: str
    value: float | None  # None = not measured
    goal: float
    unit: str = "%"  # "%": value and goal are shares of 1
    at_most: bool = False
    note: str = ""

    @property
    def measured(self) -> bool:
        return self.value is not None and not math.isnan(self.value)

    @property
    def reached(self) -> bool:
        if not self.measured:
            return False
        return self.value <= self.goal if self.at_most else self.value >= self.goal


@dataclasses.dataclass(frozen=True)
class Curve:
    """One chart. lines: label -> (steps, values); marks: label -> height of a dashed line."""

    title: str
    lines: dict[str, tuple]
    marks: dict[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Example:
    """A held-out question with the model's answer. image: uint8[h, w, 3]"""

    image: np.ndarray
    question: str
    answer: str
    predicted: str
    right: bool


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What was asked for, a real image of it, and what was drawn (uint8[h, w, 3] each).

    judged: what the classifier saw in each drawing; right: whether that was asked for."""

    prompt: str
    label: str
    images: list[np.ndarray]
    judged: list[str]
    right: list[bool]
    real: np.ndarray | None = None
    tokens_right: list[bool] | None = None  # the probe's verdict on the visual tokens of each


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that a report shows.

    Attributes:
        more: further sections, title -> blocks of `eval/page.py`.
        judges: judge -> property -> its accuracy on real held-out images.
        timings: stage -> seconds.
        facts: seeds, versions, sizes.
        commands: what to do next -> the command.
    """

    title: str
    lead: str = ""
    targets: list[Target] = dataclasses.field(default_factory=list)
    curves: list[Curve] = dataclasses.field(default_factory=list)
    scores: list[TypeScore] = dataclasses.field(default_factory=list)
    examples: list[Example] = dataclasses.field(default_factory=list)
    drawings: list[Drawing] = dataclasses.field(default_factory=list)
    more: dict[str, list] = dataclasses.field(default_factory=dict)
    judges: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    timings: dict[str, float] = dataclasses.field(default_factory=dict)
    facts: dict[str, object] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    commands: dict[str, str] = dataclasses.field(default_factory=dict)


def write_report(path, report: Report) -> pathlib.Path:
    """Writes the page (whole or not at all) and returns its path."""
    return page.write(path, as_page(report))


def as_page(report: Report) -> page.Page:
    """The report's parts as sections of a page."""
    parts = (
        ("Targets", report.targets, targets),
        ("Drawings", report.drawings, drawings),
        *((title, blocks, lambda blocks: blocks) for title, blocks in report.more.items()),
        ("Answers by question type", report.scores, scores),
        ("Sampled questions", report.examples, examples),
        ("Training", report.curves, curves),
        ("Judges", report.judges, judges),
        ("Time", report.timings, timings),
        ("Notes", report.notes, lambda notes: [page.Bullets(notes)]),
        ("Run", report.facts, facts),
        ("What to do next", report.commands, facts),
    )
    sections = [page.Section(title, blocks(part)) for title, part, blocks in parts if part]
    return page.Page(report.title, report.lead, sections)


def targets(items: list[Target]) -> list:
    """A card per target."""
    cards = []
    for t in items:
        verdict = "reached" if t.reached else "missed" if t.measured else "not measured"
        goal = f"· goal: at {'most' if t.at_most else 'least'} {_number(t.goal, t.unit)}"
        value = _number(t.value, t.unit) if t.measured else "–"
        cards.append(
            page.Card(t.name, value, verdict, "good" if t.reached else "bad", goal, t.note)
        )
    reached = sum(t.reached for t in items)
    return [page.Text(f"{reached} of {len(items)} targets reached."), page.Cards(cards)]


def drawings(items: list[Drawing]) -> list:
    """A cell per request: a real image, then everything that was drawn."""
    total, right = sum(len(d.right) for d in items), sum(sum(d.right) for d in items)
    text = (
        f"{right} of {total} drawings show the colour and the shape that were asked for, as the "
        "classifier sees them. The first image of each group is a real one; the others were drawn, "
        "and all that were drawn are shown. A red frame marks a drawing that the classifier takes "
        "for something else."
    )
    return [page.Text(text), page.ImageGrid([_drawing(d) for d in items])]


def _drawing(d: Drawing) -> page.Cell:
    images = [] if d.real is None else [page.Image(d.real, f"real: {d.label}", "reference")]
    for pixels, seen, right in zip(d.images, d.judged, d.right, strict=True):
        tone = "" if right else "bad"
        images.append(page.Image(pixels, f"drawn: {d.label}; classified as: {seen}", tone))
    lines = [page.Line(d.label, "strong")]
    wrong = [seen for seen, right in zip(d.judged, d.right, strict=True) if not right]
    if wrong:
        lines.append(page.Line(f"classified as: {', '.join(wrong)}", "bad"))
    if d.tokens_right and not all(d.tokens_right):
        count = d.tokens_right.count(False)
        which = "" if count == len(d.tokens_right) else f" of {count} drawing{'s' * (count > 1)}"
        lines.append(page.Line(f"visual tokens{which} already wrong", "bad"))
    return page.Cell(images, lines, d.prompt)


def scores(items: list[TypeScore]) -> list:
    """Accuracy per question type, as bars and as a table."""
    chart = figures.bar_chart(
        {s.type: 100 * s.accuracy for s in items},
        [f"{100 * s.accuracy:.1f}" for s in items],
        errors=[tuple(100 * x for x in s.interval) for s in items],
        marks=[100 * s.floor for s in items],
        limit=100,
        x_label="answered right, %",
    )
    caption = (
        "Black: 95 % confidence interval. Orange: the floor of a type, which is what always giving "
        "its most frequent answer would score."
    )
    columns = [
        "question type",
        *map(page.Number, ("asked", "right, %", "95 % interval", "floor, %")),
    ]
    columns += ["most frequent answer", page.Number("always “yes”, %")]
    rows = [
        [
            s.type,
            str(s.count),
            f"{100 * s.accuracy:.1f}",
            "{:.1f} – {:.1f}".format(*(100 * x for x in s.interval)),
            f"{100 * s.floor:.1f}",
            s.floor_answer,
            f"{100 * s.yes_floor:.1f}",
        ]
        for s in items
    ]
    typed = [row for row, s in zip(rows, items, strict=True) if s.type != "all"]
    foot = [row for row, s in zip(rows, items, strict=True) if s.type == "all"]
    note = (
        "A model that sees nothing, but knows the most frequent answer of each type, would score "
        f"{100 * blind_accuracy(items):.1f} % on all questions."
    )
    charts = page.Charts([page.Chart(chart, "Accuracy and floor", caption)])
    return [charts, page.Table(columns, typed, foot, note)]


def examples(items: list[Example]) -> list:
    """A cell per question."""
    cells = []
    for e in items:
        lines = [page.Line(e.question)]
        answer = e.predicted or "(no answer)"
        lines.append(page.Line(f"{'✓' if e.right else '✗'} {answer}", "good" if e.right else "bad"))
        if not e.right:
            lines.append(page.Line(f"right answer: {e.answer}"))
        cells.append(page.Cell([page.Image(e.image, e.question)], lines))
    return [page.ImageGrid(cells, beside=True)]


def curves(items: list[Curve]) -> list:
    """A chart per curve that has points."""
    charts = []
    for curve in items:
        lines = {label: line for label, line in curve.lines.items() if len(line[0])}
        if lines:
            chart = figures.line_chart(lines, curve.marks)
            charts.append(page.Chart(chart, curve.title, curve.note))
    return [page.Charts(charts)] if charts else []


def judges(items: dict[str, dict[str, float]]) -> list:
    """A table of the judges' own accuracy."""
    names = list(dict.fromkeys(name for row in items.values() for name in row))
    rows = [
        [judge, *(f"{100 * row[n]:.1f}" if n in row else "" for n in names)]
        for judge, row in items.items()
    ]
    columns = ["judge", *(page.Number(f"{name}, %") for name in names)]
    text = (
        "Accuracy of the judges themselves on real held-out images: what they say about a drawing "
        "is worth no more than this."
    )
    return [page.Text(text), page.Table(columns, rows)]


def timings(items: dict[str, float]) -> list:
    """A bar per stage."""
    minutes = {stage: seconds / 60 for stage, seconds in items.items()}
    chart = figures.bar_chart(minutes, [_clock(s) for s in items.values()], x_label="minutes")
    total = f"{_clock(sum(items.values()))} in total"
    return [page.Charts([page.Chart(chart, total, "Minutes and seconds of each stage.")])]


def facts(items: dict[str, object]) -> list:
    return [page.Table((), [[str(k), str(v)] for k, v in items.items()], code=True)]


def _number(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.1f}\u00a0%"
    return f"{value:.4g}\u00a0{unit}".strip()


def _clock(seconds: float) -> str:
    """Minutes and seconds, as in "12:05"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"

"""`report.html`: one self-contained page that shows what a run learned.

Pictures are PNG inside the page, curves are hand-written SVG, there is no script and nothing is
fetched. Every text that comes from data or from a model is escaped. The page is made of a `Report`;
each part of it may be left empty and is then not shown.

    report = Report(title=..., targets=[Target("Accuracy", 0.96, 0.9)], curves=[...], ...)
    write_report(workdir / "report.html", report)
"""

import base64
import dataclasses
import html
import io
import json
import math
import os
import pathlib

import numpy as np


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
    def reached(self) -> bool:
        if self.value is None or math.isnan(self.value):
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
    """A held-out question with the model's answer. picture: uint8[h, w, 3]"""

    picture: np.ndarray
    question: str
    answer: str
    predicted: str
    right: bool


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What was asked for, a real picture of it, and what was drawn (uint8[h, w, 3] each).

    judged: what the classifier saw in each drawing; right: whether that was asked for."""

    prompt: str
    label: str
    pictures: list[np.ndarray]
    judged: list[str]
    right: list[bool]
    real: np.ndarray | None = None
    tokens_right: bool | None = None  # the probe's verdict on the visual tokens


@dataclasses.dataclass(frozen=True)
class Report:
    title: str
    lead: str = ""
    targets: list[Target] = dataclasses.field(default_factory=list)
    curves: list[Curve] = dataclasses.field(default_factory=list)
    scores: list = dataclasses.field(default_factory=list)  # of scorers.TypeScore
    examples: list[Example] = dataclasses.field(default_factory=list)
    drawings: list[Drawing] = dataclasses.field(default_factory=list)
    judges: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    timings: dict[str, float] = dataclasses.field(default_factory=dict)  # stage -> seconds
    facts: dict[str, object] = dataclasses.field(default_factory=dict)  # seeds, versions, sizes
    notes: list[str] = dataclasses.field(default_factory=list)


def read_metrics(path) -> dict[str, tuple[list[int], list[float]]]:
    """metric -> (steps, values) of a metrics.jsonl with `step` on every line.

    After a resume a step may appear twice: the last one counts. A torn last line is skipped."""
    out: dict[str, dict[int, float]] = {}
    for line in pathlib.Path(path).read_text().splitlines():
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        for key, value in row.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if key != "step" and number and math.isfinite(value):
                out.setdefault(key, {})[step] = float(value)
    return {k: (sorted(v), [v[s] for s in sorted(v)]) for k, v in out.items()}


def write_report(path, report: Report) -> pathlib.Path:
    """Writes the page (whole or not at all) and returns its path."""
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render(report), encoding="utf-8")
    os.replace(partial, path)
    return path


def render(report: Report) -> str:
    """The page as text."""
    parts = [
        _section("Reached or not", _targets(report.targets), report.targets),
        _section("Drawings", _drawings(report), report.drawings),
        _section("Answers by question type", _scores(report.scores), report.scores),
        _section("Sampled questions", _examples(report.examples), report.examples),
        _section("Training", "".join(_curve(c) for c in report.curves), report.curves),
        _section("Judges", _judges(report.judges), report.judges),
        _section("Time", _timings(report.timings), report.timings),
        _section("Notes", _list(report.notes), report.notes),
        _section("Run", _facts(report.facts), report.facts),
    ]
    lead = f"<p class=lead>{_text(report.lead)}</p>" if report.lead else ""
    return (
        "<!doctype html>\n<html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{_text(report.title)}</title><style>{STYLE}</style>"
        f"<main><h1>{_text(report.title)}</h1>{lead}{''.join(parts)}</main></html>\n"
    )


def png_uri(pixels: np.ndarray) -> str:
    """A data URI. pixels: uint8[h, w, 3]"""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _text(value) -> str:
    return html.escape(str(value), quote=True)


def _section(title: str, body: str, shown) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>" if shown else ""


def _number(value, unit: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "not measured"
    if unit == "%":
        return f"{100 * value:.1f}\u00a0%"
    return f"{value:.4g}\u00a0{unit}".strip()


def _targets(targets) -> str:
    cards = []
    for t in targets:
        verdict = "reached" if t.reached else "not measured" if t.value is None else "missed"
        sign = "at most" if t.at_most else "at least"
        note = f"<p class=note>{_text(t.note)}</p>" if t.note else ""
        cards.append(
            f"<div class='card {'good' if t.reached else 'bad'}'><p class=name>{_text(t.name)}</p>"
            f"<p class=big>{_text(_number(t.value, t.unit))}</p>"
            f"<p class=goal><span class=verdict>{verdict}</span> · "
            f"goal {sign} {_text(_number(t.goal, t.unit))}</p>{note}</div>"
        )
    met = sum(t.reached for t in targets)
    return f"<p>{met} of {len(targets)} targets reached.</p><div class=cards>{''.join(cards)}</div>"


def _image(pixels, alt: str, css: str = "") -> str:
    return f"<img src='{png_uri(pixels)}' alt='{_text(alt)}' class='pic {css}'>"


def _drawings(report: Report) -> str:
    total = sum(len(d.right) for d in report.drawings)
    good = sum(sum(d.right) for d in report.drawings)
    out = [
        f"<p>{good} of {total} drawings show the colour and the shape that were asked for, as the "
        "classifier sees them. First picture of each group: a real one; the others are drawn, none "
        "picked. A red frame marks a drawing that the classifier reads as something else.</p>"
        "<div class=drawings>"
    ]
    for d in report.drawings:
        pictures = [_image(d.real, f"real {d.label}", "real")] if d.real is not None else []
        for picture, seen, right in zip(d.pictures, d.judged, d.right, strict=True):
            title = f"drawn: {d.label}; seen: {seen}"
            pictures.append(_image(picture, title, "right" if right else "wrong"))
        wrong = [seen for seen, right in zip(d.judged, d.right, strict=True) if not right]
        seen = f"<span class=no>seen: {_text(', '.join(wrong))}</span>" if wrong else ""
        if d.tokens_right is False:
            seen += " <span class=no>(tokens already wrong)</span>"
        out.append(f"<figure title='{_text(d.prompt)}'><div class=row>{''.join(pictures)}</div>"
                   f"<figcaption>{_text(d.label)} {seen}</figcaption></figure>")  # fmt: skip
    return "".join(out) + "</div>"


def _scores(scores) -> str:
    rows = []
    typed = [s for s in scores if s.type != "all"]
    blind = sum(s.floor * s.count for s in typed) / max(sum(s.count for s in typed), 1)
    for s in scores:
        bar = (
            f"<div class=bar><i style='width:{100 * s.accuracy:.1f}%'></i>"
            f"<b style='left:{100 * s.floor:.1f}%'></b></div>"
        )
        css = " class=total" if s.type == "all" else ""
        rows.append(
            f"<tr{css}><td>{_text(s.type)}<td class=n>{s.count}<td class=n>{100 * s.accuracy:.1f}"
            f"<td class=wide>{bar}<td class=n>{100 * s.floor:.1f}<td>{_text(s.floor_answer)}"
            f"<td class=n>{100 * s.yes_floor:.1f}</tr>"
        )
    return (
        "<div class=scroll><table><tr><th>question<th class=n>asked<th class=n>right, %"
        "<th class=wide><th class=n>floor, %<th>by always saying<th class=n>“yes”, %</tr>"
        f"{''.join(rows)}</table></div><p class=note>The mark on a bar is that type's own floor: "
        "what always giving its most frequent answer would score. A model that sees nothing but "
        f"knows these answers would score {100 * blind:.1f} % on all questions.</p>"
    )


def _examples(examples) -> str:
    out = []
    for e in examples:
        mark = "<span class=yes>✓</span>" if e.right else "<span class=no>✗</span>"
        truth = "" if e.right else f"<br><small>right: {_text(e.answer)}</small>"
        out.append(
            f"<figure>{_image(e.picture, e.question)}<figcaption>{_text(e.question)}<br>"
            f"{mark} <strong>{_text(e.predicted) or '(nothing)'}</strong>{truth}"
            "</figcaption></figure>"
        )
    return f"<div class=examples>{''.join(out)}</div>"


def _judges(judges) -> str:
    names = list(dict.fromkeys(name for row in judges.values() for name in row))
    head = "".join(f"<th class=n>{_text(name)}, %" for name in names)
    rows = []
    for judge, row in judges.items():
        cells = "".join(f"<td class=n>{100 * row[n]:.1f}" if n in row else "<td>" for n in names)
        rows.append(f"<tr><td>{_text(judge)}{cells}</tr>")
    return (
        "<p>Accuracy of the judges themselves on real held-out pictures; a verdict on a drawing is "
        f"worth no more.</p><div class=scroll><table><tr><th>judge{head}</tr>{''.join(rows)}"
        "</table></div>"
    )


def _timings(timings) -> str:
    total = sum(timings.values())
    rows = []
    for stage, seconds in timings.items():
        share = 100 * seconds / total if total else 0
        rows.append(f"<tr><td>{_text(stage)}<td class=n>{_clock(seconds)}<td class=wide>"
                    f"<div class=bar><i style='width:{share:.1f}%'></i></div></tr>")  # fmt: skip
    rows.append(f"<tr class=total><td>total<td class=n>{_clock(total)}<td></tr>")
    return f"<div class=scroll><table>{''.join(rows)}</table></div>"


def _clock(seconds: float) -> str:
    return f"{int(round(seconds)) // 60}:{int(round(seconds)) % 60:02d} min"


def _list(items) -> str:
    return f"<ul>{''.join(f'<li>{_text(item)}' for item in items)}</ul>"


def _facts(facts) -> str:
    rows = "".join(f"<tr><td>{_text(k)}<td><code>{_text(v)}</code></tr>" for k, v in facts.items())
    return f"<div class=scroll><table>{rows}</table></div>"


def _curve(curve: Curve) -> str:
    """One chart, about 600 x 240 units; colours come from the style sheet."""
    lines = {k: (list(s), list(v)) for k, (s, v) in curve.lines.items() if len(s)}
    if not lines:
        return ""
    W, H, left, right, top, bottom = 600, 240, 52, 12, 10, 26
    xs = [x for steps, _ in lines.values() for x in steps]
    ys = [y for _, values in lines.values() for y in values] + list(curve.marks.values())
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    ticks = _ticks(min(ys), max(ys))
    y0, y1 = ticks[0], ticks[-1]

    def px(x):
        return left + (x - x0) / (x1 - x0) * (W - left - right)

    def py(y):
        return top + (y1 - y) / (y1 - y0) * (H - top - bottom)

    out = [f"<svg viewBox='0 0 {W} {H}' role=img aria-label='{_text(curve.title)}'>"]
    for y in ticks:
        out.append(f"<line x1={left} x2={W - right} y1={py(y):.1f} y2={py(y):.1f} class=grid />"
                   f"<text x={left - 6} y={py(y) + 4:.1f} class=left>{y:g}</text>")  # fmt: skip
    for x in (t for t in _ticks(x0, x1) if x0 <= t <= x1):
        out.append(f"<text x={px(x):.1f} y={H - 8} class=mid>{x:g}</text>")
    for y in curve.marks.values():
        out.append(f"<line x1={left} x2={W - right} y1={py(y):.1f} y2={py(y):.1f} class=mark />")
    for i, (steps, values) in enumerate(lines.values()):
        thin = zip(*_thin(steps, values), strict=True)
        points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in thin)
        out.append(f"<polyline points='{points}' class='line c{i % 5}' />")
    legend = [f"<span class='key c{i % 5}'>{_text(k)}</span>" for i, k in enumerate(lines)]
    legend += [
        f"<span class='key dash'>{_text(k)} ({v:.3g})</span>" for k, v in curve.marks.items()
    ]
    note = f"<p class=note>{_text(curve.note)}</p>" if curve.note else ""
    return (f"<figure class=chart><h3>{_text(curve.title)}</h3>{''.join(out)}</svg>"
            f"<figcaption>{' '.join(legend)}</figcaption>{note}</figure>")  # fmt: skip


def _thin(steps, values, most: int = 300):
    """At most `most` points, each the mean of its bin."""
    if len(steps) <= most:
        return steps, values
    bins = np.array_split(np.arange(len(steps)), most)
    return ([float(np.mean([steps[i] for i in b])) for b in bins],
            [float(np.mean([values[i] for i in b])) for b in bins])  # fmt: skip


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from below `low` to above `high`."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-3):
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--fg:#1d1f21;--dim:#6b7075;--line:#e2e3e1;--card:#fff;
--good:#1a7f4b;--bad:#b3382c;--c0:#2f6fb5;--c1:#c9772b;--c2:#3d8f63;--c3:#8a5bb0;--c4:#9a8b2f}
@media (prefers-color-scheme:dark){:root{--bg:#16181a;--fg:#e6e6e3;--dim:#989da2;--line:#2f3336;
--card:#1e2123;--good:#52c389;--bad:#ee7d70;--c0:#74a9e3;--c1:#e6a262;--c2:#76c49b;--c3:#bb95dd;--c4:#cdbd62}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,-apple-system,"Segoe UI",
Roboto,sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .6rem;letter-spacing:-.01em}
h2{font-size:1.2rem;margin:0 0 .8rem}h3{font-size:.95rem;font-weight:600;margin:0 0 .3rem}
section{margin-top:2.6rem;padding-top:1.4rem;border-top:1px solid var(--line)}
p{margin:.2rem 0 .9rem;max-width:46rem}.lead{color:var(--dim);font-size:1.05rem}
.note,small,figcaption,.goal{color:var(--dim);font-size:.85rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr));gap:.8rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.8rem 1rem}
.card p{margin:0}.card .big{font-size:1.7rem;font-weight:600;font-variant-numeric:tabular-nums}
.card .name{font-size:.9rem}.card .note{margin-top:.3rem}
.good .verdict,.yes{color:var(--good)}.bad .verdict,.no{color:var(--bad)}.verdict{font-weight:600}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.92rem;min-width:24rem}
td,th{text-align:left;padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--line);
font-weight:400;vertical-align:top}
th{color:var(--dim);font-size:.82rem;white-space:nowrap}
.n{text-align:right;font-variant-numeric:tabular-nums}
.total td{font-weight:600}.wide{width:13rem;min-width:8rem;vertical-align:middle}
.bar{position:relative;height:.55rem;background:var(--line);border-radius:.3rem;min-width:7rem}
.bar i{position:absolute;inset:0 auto 0 0;background:var(--c0);border-radius:.3rem}
.bar b{position:absolute;top:-.2rem;bottom:-.2rem;width:2px;background:var(--fg)}
figure{margin:0}.pic{width:64px;height:64px;border-radius:4px;display:block;
box-shadow:0 0 0 1px var(--line)}
.drawings{display:grid;grid-template-columns:repeat(auto-fill,minmax(13.5rem,1fr));gap:1rem}
.row{display:flex;gap:.35rem;flex-wrap:wrap}
.real{margin-right:.6rem}.wrong{outline:2px solid var(--bad);outline-offset:1px}
.examples{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:1.1rem}
.examples figure{display:flex;gap:.7rem}.examples figcaption{line-height:1.35}
.examples strong{color:var(--fg)}.examples .pic{flex:none}
.chart{margin-bottom:1.8rem;max-width:44rem}svg{width:100%;height:auto;display:block}
.grid{stroke:var(--line)}.mark{stroke:var(--dim);stroke-dasharray:5 4}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}
.line.c3{stroke:var(--c3)}
.line.c4{stroke:var(--c4)}svg text{fill:var(--dim);font-size:11px}
.left{text-anchor:end}.mid{text-anchor:middle}
.key{margin-right:1rem;white-space:nowrap}.key::before{content:"";display:inline-block;
width:.9rem;height:0;border-top:3px solid currentColor;margin-right:.35rem;vertical-align:middle}
.key.dash::before{border-top:2px dashed}
.key.c0::before{color:var(--c0)}.key.c1::before{color:var(--c1)}.key.c2::before{color:var(--c2)}
.key.c3::before{color:var(--c3)}.key.c4::before{color:var(--c4)}
code{font:.85em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
ul{padding-left:1.2rem;margin:.2rem 0}
"""

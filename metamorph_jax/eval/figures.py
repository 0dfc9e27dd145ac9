"""Charts in one style, drawn by matplotlib: lines over steps, and horizontal bars.

The functions return the text of an SVG file, which `eval/page.py` embeds. matplotlib is not a core
dependency: `import_matplotlib` says which extra brings it.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np

from metamorph_jax.errors import UserError

COLORS = ("#2f6fb5", "#c9772b", "#3d8f63", "#8a5bb0", "#9a8b2f")
INK, DIM, GRID = "#1d1f21", "#5c6166", "#e2e3e1"
WIDTH = 4.4  # inches; narrow, so that text stays readable when a phone shrinks it
POINTS = 300  # of one line

STYLE = {
    "text.parse_math": False,  # labels come from data: a "$" is only a "$"
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": DIM,
    "axes.labelcolor": DIM,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": DIM,
    "ytick.color": DIM,
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.hashsalt": "metamorph_jax",  # the same file for the same data
}


def import_matplotlib():
    """The package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            "charts are drawn by matplotlib: pip install matplotlib (it comes with the extras "
            "[quickstart] and [sweep] of metamorph-jax)"
        ) from error
    return matplotlib


def style():
    """A context in which matplotlib draws and saves in our style."""
    return import_matplotlib().rc_context(STYLE)


def subplots(columns: int = 1, width: float = WIDTH, height: float = 2.6):
    """(figure, list of axes side by side); sizes in inches. Inside `style()`."""
    from matplotlib.figure import Figure  # unlike pyplot, it keeps no global state

    figure = Figure((width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def line_chart(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    marks: Mapping[str, float] | None = None,
    x_label: str = "step",
) -> str:
    """Curves as SVG.

    Args:
        lines: label -> (x, y), x in whole steps.
        marks: label -> height of a dashed line.
    """
    with style():
        figure, (axes,) = subplots()
        axes.grid(visible=False, axis="x")
        handles, labels = [], []
        for i, (label, (x, y)) in enumerate(lines.items()):
            handles += axes.plot(*thin(x, y), color=COLORS[i % len(COLORS)])
            labels.append(label)
        for label, height in (marks or {}).items():
            handles.append(axes.axhline(height, color=DIM, linestyle=(0, (5, 3)), linewidth=1.3))
            labels.append(f"{label} ({height:.3g})")
        axes.set_xlabel(x_label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(handles, labels, loc="outside lower left", ncols=2, handlelength=1.6)
        return svg(figure)


def bar_chart(
    values: Mapping[str, float],
    texts: Sequence[str],
    errors: Sequence[tuple[float, float]] | None = None,
    marks: Sequence[float] | None = None,
    limit: float | None = None,
    x_label: str = "",
) -> str:
    """Horizontal bars as SVG, the first on top.

    Args:
        values: label -> length.
        texts: what stands at the end of each bar.
        errors: (lower end, upper end) of each bar's interval.
        marks: where each bar gets a vertical tick: what it is to be compared with.
        limit: the largest length that is possible, if there is one.
    """
    places = np.arange(len(values))
    lengths = np.asarray(list(values.values()), float)
    with style():
        figure, (axes,) = subplots(height=0.75 + 0.29 * len(values))
        axes.grid(visible=False, axis="y")
        axes.barh(places, lengths, 0.62, color=COLORS[0])
        ends = lengths.copy()
        if errors is not None:
            low, high = np.asarray(errors, float).T
            spread = np.maximum([lengths - low, high - lengths], 0)
            axes.errorbar(lengths, places, xerr=spread, fmt="none", ecolor=INK, elinewidth=1,
                          capsize=2.5)  # fmt: skip
            ends = np.maximum(ends, high)
        if marks is not None:
            axes.vlines(marks, places - 0.42, places + 0.42, color=COLORS[1], linewidth=2.2)
            ends = np.maximum(ends, marks)
        for place, end, text in zip(places, ends, texts, strict=True):
            axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center",
                          fontsize=9, annotation_clip=False)  # fmt: skip
        axes.set_yticks(places, list(values), color=INK)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(places) - 0.4, -0.6)
        axes.margins(x=0.16)
        axes.set_xlim(left=0)
        if limit:
            axes.set_xlim(0, 1.18 * limit)  # room for the texts
            axes.spines["bottom"].set_bounds(0, limit)
        axes.set_xlabel(x_label)
        return svg(figure)


def thin(x: Sequence[float], y: Sequence[float], most: int = POINTS) -> tuple:
    """At most `most` points, each the mean of its bin."""
    if len(x) <= most:
        return x, y
    bins = np.array_split(np.arange(len(x)), most)
    x, y = np.asarray(x, float), np.asarray(y, float)
    return [float(x[b].mean()) for b in bins], [float(y[b].mean()) for b in bins]


def svg(figure) -> str:
    """A matplotlib figure as SVG text; glyphs are outlines, so that no font is needed."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()

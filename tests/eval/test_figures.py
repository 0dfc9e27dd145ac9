"""Charts: what is drawn, and that labels from data can do no harm."""

import builtins
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from metamorph_jax.errors import UserError
from metamorph_jax.eval import figures

EVIL = "<script>&</script> $\\frac{1$ \x07_"


def test_line_chart_is_whole_and_the_same_every_time():
    lines = {EVIL: (range(1000), np.linspace(2, 1, 1000)), "b": ([1, 2], [3.0, np.nan])}
    text = figures.line_chart(lines, {EVIL: 1.5})
    assert ET.fromstring(text.replace("\x07", "")).tag.endswith("svg")
    assert "<script" not in text and text == figures.line_chart(lines, {EVIL: 1.5})


def test_bar_chart_has_a_bar_and_a_mark_for_each_value():
    text = figures.bar_chart({"a": 3.0, EVIL: 0.0}, ["3", "0"], errors=[(2, 4), (0, 1)],
                             marks=[1, 1], limit=10, x_label=EVIL)  # fmt: skip
    assert ET.fromstring(text.replace("\x07", "")).tag.endswith("svg")
    assert text.count(f"fill: {figures.COLORS[0]}") == 2
    assert text.count(f"stroke: {figures.COLORS[1]}") >= 1


def test_the_callers_style_is_left_alone():
    before = dict(matplotlib.rcParams)
    figures.line_chart({"a": ([1, 2], [1, 2])})
    assert dict(matplotlib.rcParams) == before


def test_long_curves_are_thinned():
    steps, values = figures.thin(list(range(1000)), [float(i) for i in range(1000)])
    assert len(steps) == 300 and values == pytest.approx(steps)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **options):
        if name == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install matplotlib.*\[sweep\]"):
        figures.line_chart({"a": ([1, 2], [1, 2])})

"""The report: complete, escaped, self-contained."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.eval import report as R
from metamorph_jax.eval import scorers

PICTURE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
EVIL = "<script>alert('x')</script> & \"more\""


def full_report():
    rows = [{"type": "color", "answer": "red", "predicted": "red"},
            {"type": EVIL, "answer": "yes", "predicted": "no"}]  # fmt: skip
    return R.Report(
        title=f"Run {EVIL}",
        lead=EVIL,
        targets=[R.Target("Accuracy", 0.95, 0.9), R.Target("Drawings", 0.7, 0.8),
                 R.Target("Time", 20.0, 25, "min", at_most=True), R.Target("Probe", None, 0.85)],
        curves=[R.Curve("Loss", {EVIL: (range(1000), np.linspace(2, 1, 1000))}, {"floor": 1.5})],
        scores=scorers.score_by_type(rows),
        examples=[R.Example(PICTURE, EVIL, "red", EVIL, False)],
        drawings=[R.Drawing("Draw", "red circle", [PICTURE, PICTURE], ["red circle", EVIL],
                            [True, False], PICTURE, tokens_right=False)],
        judges={"probe": {"color": 1.0}, EVIL: {"color": 0.5, "shape": 0.25}},
        timings={EVIL: 61.0, "b": 20.0},
        facts={"seed": 0, EVIL: EVIL},
        notes=[EVIL],
    )  # fmt: skip


def test_page_is_escaped_and_self_contained(tmp_path):
    path = R.write_report(tmp_path / "report.html", full_report())
    page = path.read_text()
    assert "<script" not in page and "alert(&#x27;x&#x27;)" in page
    assert not re.search(r"(src|href)\s*=\s*['\"]?(?!data:image/png)[a-z/]", page)
    assert "url(" not in page and "@import" not in page
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]  # no partial file stays


def test_verdicts_are_plain():
    page = R.render(full_report())
    assert "2 of 4 targets reached" in page
    assert page.count(">reached<") == 2 and page.count(">missed<") == 1
    assert page.count("<span class=verdict>not measured<") == 1
    assert "1 of 2 drawings show" in page and "tokens already wrong" in page


@pytest.mark.parametrize(
    "target, reached",
    [
        (R.Target("a", 0.9, 0.9), True),
        (R.Target("a", 0.899, 0.9), False),
        (R.Target("a", 26, 25, "min", at_most=True), False),
        (R.Target("a", None, 0.5), False),
        (R.Target("a", float("nan"), 0.5), False),
    ],
)
def test_target(target, reached):
    assert target.reached is reached


def test_tags_are_balanced():
    void = {"meta", "img", "br", "line", "polyline", "!doctype"}
    loose = {"td", "th", "tr", "li", "html", "title"}  # HTML lets these be closed by what follows
    stack = []

    class Checker(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in void | loose:
                stack.append(tag)

        def handle_endtag(self, tag):
            if tag not in void | loose:
                assert stack.pop() == tag

    Checker().feed(R.render(full_report()))
    assert not stack


def test_png_uri_holds_the_pixels():
    data = base64.b64decode(R.png_uri(PICTURE).split(",", 1)[1])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), PICTURE)


def test_empty_parts_are_not_shown():
    page = R.render(R.Report("Nothing yet"))
    assert "<section" not in page and "Nothing yet" in page


def test_read_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 3.0, "note": "x", "flag": true}\n'
        '{"step": 2, "loss": 2.0}\n'
        "not json\n"
        '{"loss": 9.0}\n'
        '{"step": 2, "loss": 1.5}\n'  # written again after a resume
        '{"step": 3, "loss": NaN}\n'
        '{"step": 4, "lo'
    )
    assert R.read_metrics(path) == {"loss": ([1, 2], [3.0, 1.5])}


@pytest.mark.parametrize("low, high", [(0.1, 0.9), (-3, 1200), (5, 5), (0, 0), (1e-5, 2e-5)])
def test_ticks_cover_the_range(low, high):
    ticks = R._ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8


def test_long_curves_are_thinned():
    steps, values = R._thin(list(range(1000)), [float(i) for i in range(1000)])
    assert len(steps) == 300 and values == pytest.approx(steps)

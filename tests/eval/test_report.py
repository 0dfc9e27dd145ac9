"""The report: complete, escaped, self-contained."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.eval import page
from metamorph_jax.eval import report as R
from metamorph_jax.eval.scorers import short_answers

IMAGE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
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
        scores=short_answers.score_by_type(rows),
        examples=[R.Example(IMAGE, EVIL, "red", EVIL, False)],
        drawings=[R.Drawing("Draw", "red circle", [IMAGE, IMAGE], ["red circle", EVIL],
                            [True, False], IMAGE, tokens_right=[False, True])],
        judges={"probe": {"color": 1.0}, EVIL: {"color": 0.5, "shape": 0.25}},
        timings={EVIL: 61.0, "b": 20.0},
        facts={"seed": 0, EVIL: EVIL},
        notes=[EVIL],
    )  # fmt: skip


def render(report):
    return page.render(R.as_page(report))


def test_page_is_escaped_and_self_contained(tmp_path):
    path = R.write_report(tmp_path / "report.html", full_report())
    text = path.read_text()
    assert "<script" not in text and "alert(&#39;x&#39;)" in text
    sources = re.findall(r"(?:src|href)\s*=\s*(.{20})", text)
    assert sources and all(re.match('"data:image/(png|svg)', source) for source in sources)
    assert "url(" not in text and "@import" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]  # no partial file stays


def test_verdicts_are_plain():
    text = render(full_report())
    assert "2 of 4 targets reached" in text
    assert text.count(">reached<") == 2 and text.count(">missed<") == 1
    assert text.count(">not measured<") == 1
    assert "1 of 2 drawings show" in text and "tokens of 1 drawing already wrong" in text


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
    stack = []

    class Checker(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in {"meta", "img"}:
                stack.append(tag)

        def handle_endtag(self, tag):
            assert stack.pop() == tag

    Checker().feed(render(full_report()))
    assert not stack


def test_png_uri_holds_the_pixels():
    data = base64.b64decode(page.png_uri(IMAGE).split(",", 1)[1])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), IMAGE)


def test_empty_parts_are_not_shown():
    text = render(R.Report("Nothing yet"))
    assert "<section" not in text and "Nothing yet" in text


def test_charts_are_images_with_their_title():
    text = render(full_report())
    for title in ("Loss", "Accuracy and floor", "1:21 in total"):
        assert f'alt="Chart: {title}"' in text
    assert text.count("data:image/svg+xml") == 3

"""The README's figure can be drawn again."""

import pathlib
import runpy

import PIL.Image

SCRIPT = pathlib.Path(__file__).parents[1] / "docs" / "figures" / "architecture.py"


def test_architecture_figure(tmp_path):
    names = runpy.run_path(str(SCRIPT))
    names["main"].__globals__["FILE"] = tmp_path / "drawn.png"
    names["main"]()
    drawn, kept = (PIL.Image.open(f) for f in (tmp_path / "drawn.png", SCRIPT.with_suffix(".png")))
    assert drawn.size == kept.size
    assert SCRIPT.with_suffix(".png").stat().st_size < 300_000

"""Blocks of a page, and the templates that show them."""

import importlib.resources
import inspect

import jinja2
import numpy as np
import pytest

from metamorph_jax.eval import page

IMAGE = np.zeros((4, 6, 3), np.uint8)


def shown(*blocks):
    return page.render(page.Page("Title", sections=[page.Section("Section", blocks)]))


def test_every_template_is_used():
    """Each template is the page, a part of it, or belongs to one kind of block."""
    blocks = [b for _, b in inspect.getmembers(page, inspect.isclass) if hasattr(b, "template")]
    folder = importlib.resources.files("metamorph_jax.eval") / "templates"
    names = {file.name for file in folder.iterdir()}
    assert names == {b.template for b in blocks} | {"page.html", "page.css"}
    assert len({b.template for b in blocks}) == len(blocks)


def test_table():
    table = page.Table(["task", page.Number("score, %")], [["a", "1"]], [["all", "2"]], "Caption.")
    text = shown(table)
    assert '<th class="number">score, %</th>' in text and '<td class="number">1</td>' in text
    assert text.index("<tbody>") < text.index("<tfoot>") < text.index("Caption.")
    assert text.count("<th>") == 1 and "<code>" not in text


def test_table_without_headings():
    text = shown(page.Table((), [["seed", "0"]], code=True))
    assert "<thead>" not in text and "<td>seed</td>" in text and "<code>0</code>" in text


def test_images_keep_their_proportions():
    cell = page.Cell([page.Image(IMAGE, "an image", "bad")], [page.Line("a line", "good")], "why")
    text = shown(page.ImageGrid([cell], height=100, beside=True))
    assert 'style="--height: 100px"' in text and 'class="images beside"' in text
    assert 'alt="an image" class="bad"' in text and '<span class="good">a line</span>' in text
    assert 'title="why"' in text
    style = text.split("<style>")[1].split("</style>")[0]
    assert "height: var(--height); width: auto" in style


def test_text_and_bullets():
    text = shown(page.Text("plain"), page.Text("small", note=True), page.Bullets(["one", "two"]))
    assert "<p>plain</p>" in text and '<p class="note">small</p>' in text
    assert text.count("<li>") == 2


def test_sections_without_blocks_are_left_out():
    sections = [page.Section("Empty", []), page.Section("Full", [page.Text("x")])]
    text = page.render(page.Page("Title", "Lead", sections))
    assert "Empty" not in text and "<h2>Full</h2>" in text and '<p class="lead">Lead</p>' in text


def test_a_broken_page_leaves_the_old_one(tmp_path):
    path = page.write(tmp_path / "report.html", page.Page("First"))
    with pytest.raises(jinja2.UndefinedError, match="template"):
        page.write(path, page.Page("Second", sections=[page.Section("S", ["not a block"])]))
    assert "First" in path.read_text()

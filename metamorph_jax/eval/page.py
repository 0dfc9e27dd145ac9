"""Self-contained HTML pages: sections of text, tables, charts and images.

The templates are in `eval/templates/` (jinja2). Everything is escaped, images and charts are inside
the page, there is no script, and nothing is fetched. The page fits screens from a phone up.

    table = Table(["task", Number("score")], [["VQA", "61.2"]])
    write(workdir / "report.html", Page("Title", "What it shows.", [Section("Results", [table])]))

Every block names its template. For a new kind of block, write a dataclass and a template.
"""

import base64
import dataclasses
import functools
import io
import pathlib
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from metamorph_jax import files


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph; a `note` is small and grey."""

    template: ClassVar[str] = "text.html"
    text: str
    note: bool = False


@dataclasses.dataclass(frozen=True)
class Bullets:
    template: ClassVar[str] = "bullets.html"
    items: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Number:
    """A column of numbers: aligned to the right."""

    name: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that scrolls sideways where the screen is too narrow.

    Attributes:
        columns: headings, a `Number` for numeric columns. () for a table without headings.
        rows: cells as text.
        foot: rows that sum up the others.
        caption: a sentence below the table.
        code: the last column is set in a typewriter font.
    """

    template: ClassVar[str] = "table.html"
    columns: Sequence[str | Number]
    rows: Sequence[Sequence[str]]
    foot: Sequence[Sequence[str]] = ()
    caption: str = ""
    code: bool = False

    @property
    def headings(self) -> list[str]:
        return [c.name if isinstance(c, Number) else c for c in self.columns]

    def numeric(self, index: int) -> bool:
        """Whether the column holds numbers."""
        return index < len(self.columns) and isinstance(self.columns[index], Number)


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart as SVG text (`eval/figures.py`)."""

    svg: str
    title: str
    caption: str = ""

    @property
    def uri(self) -> str:
        """As an image, an SVG file runs no script and its ids can't clash with another's."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()


@dataclasses.dataclass(frozen=True)
class Charts:
    """Charts side by side, or one below the other on a narrow screen."""

    template: ClassVar[str] = "charts.html"
    charts: Sequence[Chart]


@dataclasses.dataclass(frozen=True)
class Image:
    """One image.

    Attributes:
        pixels: uint8[h, w, 3].
        alt: what it shows, for those who can't see it.
        tone: "good" or "bad" draws a frame, "reference" sets it apart from those after it.
    """

    pixels: np.ndarray
    alt: str
    tone: str = ""

    @property
    def uri(self) -> str:
        return png_uri(self.pixels)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the text that belongs to images. tone: "good", "bad", "strong" or ""."""

    text: str
    tone: str = ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """Images that belong together, and the lines of text below or beside them."""

    images: Sequence[Image]
    lines: Sequence[Line]
    title: str = ""  # shown when the mouse rests on it


@dataclasses.dataclass(frozen=True)
class ImageGrid:
    """Cells in as many columns as fit.

    Attributes:
        height: of the images in CSS pixels; their proportions are kept.
        beside: text beside the images, not below them.
    """

    template: ClassVar[str] = "images.html"
    cells: Sequence[Cell]
    height: int = 72
    beside: bool = False


@dataclasses.dataclass(frozen=True)
class Card:
    """One number that matters. tone: "good" or "bad" colours the verdict."""

    name: str
    value: str
    verdict: str = ""
    tone: str = ""
    detail: str = ""  # beside the verdict
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Cards:
    template: ClassVar[str] = "cards.html"
    cards: Sequence[Card]


@dataclasses.dataclass(frozen=True)
class Section:
    """Blocks under a heading."""

    title: str
    blocks: Sequence


@dataclasses.dataclass(frozen=True)
class Page:
    """Sections without blocks are left out."""

    title: str
    lead: str = ""
    sections: Sequence[Section] = ()


def render(page: Page) -> str:
    """The page as HTML."""
    return _templates().get_template("page.html").render(page=page)


def write(path, page: Page) -> pathlib.Path:
    """Writes the page (whole or not at all) and returns its path."""
    path = pathlib.Path(path)
    files.write_whole(path, render(page))
    return path


def png_uri(pixels: np.ndarray) -> str:
    """A data URI. pixels: uint8[h, w, 3]"""
    import PIL.Image

    buffer = io.BytesIO()
    PIL.Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@functools.cache
def _templates():
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("metamorph_jax.eval", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

"""A study: pairs of documents on one page, blinded, and the key that says which side was whose.

    DIR/page.html   for the people; everything is inside it, and nothing is fetched
    DIR/key.json    for whoever scores their answers (`votes.py`); not for the people

Items come in an order drawn by the seed, and of half of them the first system is on the left. The
page names neither systems nor questions of the benchmark: a reader of its source learns nothing.
Drawn images are shown at one width, so that their size doesn't tell whose they are.
"""

import base64
import dataclasses
import functools
import hashlib
import io
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from metamorph_jax import files
from metamorph_jax.data import images
from metamorph_jax.data.sources.base import ImageRef
from metamorph_jax.errors import BadSample, DataError
from metamorph_jax.eval.people.documents import Document, Part
from metamorph_jax.eval.tasks.base import write_json

FORMAT = 1
SIDES = ("left", "right")
TIE = "tie"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question to people. `text` stands on the page, `name` in tables."""

    key: str
    name: str
    text: str


LANGUAGE = Asked("language", "language continuity",
                 "On which side does the text follow better from what was given?")  # fmt: skip
QUALITY = Asked("quality", "image quality", "On which side do the images look better?")
COHERENCE = Asked("coherence", "multimodal coherence",
                  "On which side do text and images fit each other, and what was given, "
                  "better?")  # fmt: skip
QUESTIONS = (LANGUAGE, QUALITY, COHERENCE)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Attributes:
    items: most of them, drawn by the seed; 0: all.
    seed: of this choice, of the order and of the sides.
    side: pixels of the longer side of an image on the page, at most.
    title: of the page.
    """

    items: int = 50
    seed: int = 0
    side: int = 384
    title: str = "Which of the two is better?"


@dataclasses.dataclass(frozen=True)
class Item:
    """Attributes:
    id: on the page.
    first, second: the documents of both systems.
    swapped: the second is on the left.
    """

    id: str
    first: Document
    second: Document
    swapped: bool

    @property
    def sides(self) -> tuple[Document, Document]:
        """(left, right)"""
        pair = (self.first, self.second)
        return pair[::-1] if self.swapped else pair

    @property
    def asked(self) -> tuple[str, ...]:
        """Keys of the questions that make sense: about language where one of both wrote, about
        images where one of both drew."""
        pair = (self.first, self.second)
        wrote, drew = any(d.has_text for d in pair), any(d.has_image for d in pair)
        sense = {LANGUAGE.key: wrote, QUALITY.key: drew, COHERENCE.key: True}
        return tuple(one.key for one in QUESTIONS if sense[one.key])


def items(
    first: Mapping[str, Document], second: Mapping[str, Document], settings: Settings
) -> list[Item]:
    """The items of a study, in order. Documents that only one system has, or of which neither made
    anything, are left out.

    Raises:
        DataError: none is left.
    """
    both = [id for id in first if id in second and (first[id].made or second[id].made)]
    if not both:
        raise DataError(
            f"of {len(first)} and {len(second)} documents none is the same question: compare "
            "results of one task, asked with the same options"
        )
    rng = np.random.default_rng(settings.seed)
    order = rng.permutation(len(both))[: settings.items or None]
    swapped = rng.permutation(np.arange(len(order)) % 2)
    return [
        Item(_short(f"{settings.seed}/{both[k]}"), first[both[k]], second[both[k]], bool(swap))
        for k, swap in zip(order, swapped, strict=True)
    ]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ---- files


def write(
    folder: str | pathlib.Path, chosen: Sequence[Item], names: tuple[str, str], settings: Settings
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes page and key; their paths.

    Args:
        names: of the first and the second system, for the key.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _Images(settings.side)
    shown = [_as_shown(item, pictures) for item in chosen]
    body = {"items": shown, "images": pictures.uris}
    study = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
    asked = [dataclasses.asdict(one) for one in QUESTIONS]
    html = render(body | {"format": FORMAT, "study": study, "questions": asked}, settings)
    page = folder / "page.html"
    files.write_whole(page, html)
    key = {
        "format": FORMAT, "study": study, "systems": {"first": names[0], "second": names[1]},
        "settings": dataclasses.asdict(settings),
        "items": {
            item.id: {"question": item.first.id, "unit": item.first.unit, "asked": item.asked,
                      "left": "second" if item.swapped else "first"}
            for item in chosen
        },
    }  # fmt: skip
    return page, write_json(folder / "key.json", key)


def _as_shown(item: Item, pictures: "_Images") -> dict:
    left, right = item.sides
    return {"id": item.id, "asked": item.asked, "given": pictures.parts(item.first.given),
            "left": pictures.parts(left.made), "right": pictures.parts(right.made)}  # fmt: skip


class _Images:
    """Images as JPEG files inside the page, each once.

    Attributes:
        uris: name -> data URI.
    """

    def __init__(self, side: int):
        self.side, self.uris = side, {}
        self._names: dict[str, str] = {}

    def parts(self, parts: Sequence[Part]) -> list[dict]:
        """As the page's script reads them."""
        return [{"image": self._name(part.image)} if part.image else {"text": part.text}
                for part in parts]  # fmt: skip

    def _name(self, path: str) -> str:
        if path not in self._names:
            data = self._jpeg(path)
            name = hashlib.sha256(data).hexdigest()[:16]
            self.uris[name] = "data:image/jpeg;base64," + base64.b64encode(data).decode()
            self._names[path] = name
        return self._names[path]

    def _jpeg(self, path: str) -> bytes:
        """Raises DataError if it can't be read: a study with a gap would be unfair."""
        try:
            (image,) = images.load([ImageRef(path)])
        except BadSample as error:
            raise DataError(f"{files.shown(path)} can't be shown: {error}") from error
        image.thumbnail((self.side, self.side))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=90)
        return data.getvalue()


def render(data: Mapping, settings: Settings) -> str:
    """The page as HTML. data: for its script, see `templates/page.js`."""
    text = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    script = _source("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = _templates().get_template("page.html")
    return template.render(
        title=settings.title, side=settings.side, data=text, script=script, digest=digest
    )


def _source(name: str) -> str:
    environment = _templates()
    return environment.loader.get_source(environment, name)[0]


@functools.cache
def _templates():
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("metamorph_jax.eval.people", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

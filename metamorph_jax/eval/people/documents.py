"""What two models made of the same questions, as people are to see it.

Read from OUT/TASK/records.jsonl of `metamorph eval`, of any task. A document has what was given
(in the task's own words without what a model is told around them, where the task says so: `more`
has "given", [text, image or ""] each, or of stories "texts", "truth" and "frame"; else the prompt),
and what the model made of it.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from metamorph_jax import files
from metamorph_jax.data import reading
from metamorph_jax.data.sources.base import IMAGE
from metamorph_jax.errors import FileError

RECORDS = "records.jsonl"


@dataclasses.dataclass(frozen=True)
class Part:
    """A text, or the path of an image; the other is ""."""

    text: str = ""
    image: str = ""


@dataclasses.dataclass(frozen=True)
class Document:
    """Attributes:
    id: of the question.
    unit: what it is scored together with; answers about one unit depend on each other.
    given: the question.
    made: the reply; () if there is none.
    """

    id: str
    unit: str
    given: tuple[Part, ...]
    made: tuple[Part, ...]

    @property
    def has_text(self) -> bool:
        """Whether the model wrote."""
        return any(part.text for part in self.made)

    @property
    def has_image(self) -> bool:
        """Whether the model drew."""
        return any(part.image for part in self.made)


def read(folder: str | pathlib.Path, whole: bool = False) -> dict[str, Document]:
    """Id -> document, in the order of the file.

    Args:
        folder: OUT/TASK of `metamorph eval`.
        whole: all records of a unit make one document: a story whose frames were drawn one after
            another.

    Raises:
        FileError: it holds no records, or they are damaged.
    """
    path = str(pathlib.Path(folder, RECORDS))
    rows = list(reading.json_lines(path, "prompt", "reply", texts=("id", "unit")))
    if not rows:
        raise FileError(f"{files.shown(path)} is empty")
    try:
        found = [_document(row) for row in rows]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise FileError(f"{files.shown(path)} is not a file of records of `metamorph eval`: "
                        f"{files.shown(error)}") from error  # fmt: skip
    return {one.id: one for one in (_joined(found) if whole else found)}


def _document(row: Mapping) -> Document:
    return Document(row["id"], row["unit"], tuple(_given(row)), tuple(_made(row)))


def _given(row: Mapping) -> list[Part]:
    more = row.get("more", {})
    if "given" in more:
        return _pairs(more["given"])
    if "texts" in more and "truth" in more:
        before = more["frame"] - 1
        pairs = zip(more["texts"][:before], more["truth"][:before], strict=True)
        return _pairs([*pairs, (more["caption"], "")])
    return split(row["prompt"], row.get("images", ()))


def _pairs(pairs) -> list[Part]:
    parts = []
    for text, image in pairs:
        parts += [Part(text=text)] if text else []
        parts += [Part(image=image)] if image else []
    return parts


def _made(row: Mapping) -> list[Part]:
    drawn = row.get("drawn", ())
    text = row.get("document", row["reply"])
    if text.count(IMAGE) != len(drawn):
        text = text.replace(IMAGE, "") + IMAGE * len(drawn)
    return split(text, drawn)


def split(text: str, images: Sequence[str]) -> list[Part]:
    """The parts of a text with `<image>` where each image stands; images without a place come
    first."""
    images, pieces = list(images), text.split(IMAGE)
    parts = [Part(image=image) for image in images[: max(len(images) - len(pieces) + 1, 0)]]
    rest = iter(images[len(parts) :])
    for k, piece in enumerate(pieces):
        image = next(rest, "") if k else ""
        parts += [Part(image=image)] if image else []
        parts += [Part(text=piece.strip())] if piece.strip() else []
    return parts


def _joined(documents: Sequence[Document]) -> list[Document]:
    """A document for each unit: what was given for the first, and for all of them the text that was
    given last and what was made."""
    units: dict[str, list[Document]] = {}
    for document in documents:
        units.setdefault(document.unit, []).append(document)
    joined = []
    for unit, (first, *others) in units.items():
        made = list(first.made)
        for document in others:
            made += [part for part in document.given[-1:] if part.text]
            made += document.made
        joined.append(Document(unit, unit, first.given, tuple(made)))
    return joined

"""What is known of an image before anything is written about it: sentences, and objects' boxes.

    COCO          captions_*.json, and instances_*.json for the boxes
    JSON lines    {"id": …, "image": path, "captions": […], "instances": [{"category", "bbox"}]}
    a folder      of images, about which nothing is known yet

Boxes of JSON lines are [x1, y1, x2, y2] from 0 to 1; COCO's, in pixels, are brought to that.
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable

from metamorph_jax import files
from metamorph_jax.data import images
from metamorph_jax.data.sources.base import confined
from metamorph_jax.errors import BadSample, FileError
from metamorph_jax.files import shown

MAX_COCO = 2**31  # bytes of a file of annotations
Skipped = Callable[[BadSample], None]
Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Context:
    """One image.

    Attributes:
        id: of the sample.
        image: path below the folder of images.
        captions: sentences about it; () if nothing is known.
        boxes: ((category, (x1, y1, x2, y2)), …), from 0 to 1.
    """

    id: str
    image: str
    captions: tuple[str, ...] = ()
    boxes: tuple[tuple[str, Box], ...] = ()

    def text(self, boxes: bool) -> str:
        """The sentences, one a line; with `boxes`, an empty line and a line for each object."""
        lines = list(self.captions)
        if boxes and self.boxes:
            lines += ["", *(f"{name}: {[round(v, 3) for v in box]}" for name, box in self.boxes)]
        return "\n".join(lines)

    def record(self) -> dict:
        """As a line of a file, see the module docstring."""
        boxes = [{"category": name, "bbox": list(box)} for name, box in self.boxes]
        return {"id": self.id, "image": self.image, "captions": list(self.captions),
                "instances": boxes}  # fmt: skip


def made(id, image, captions: Iterable = (), boxes: Iterable = ()) -> Context:
    """A context from what files hold.

    Raises:
        BadSample: it can't be used.
    """
    if isinstance(id, bool) or not isinstance(id, str | int) or str(id).strip() == "":
        raise BadSample("bad_record", f"id is {shown(repr(id), 40)}, expected text or a number")
    where = f"id {shown(id, 60)}"
    if not isinstance(image, str):
        raise BadSample("bad_record", f"{where}: image is not a path")
    if os.path.isabs(image):
        raise BadSample("bad_path", f"{where}: {shown(image, 80)} is not relative to the images")
    confined(os.sep, image)
    if not isinstance(captions, list | tuple) or not all(isinstance(c, str) for c in captions):
        raise BadSample("bad_record", f"{where}: captions must be a list of texts")
    captions = tuple(" ".join(c.split()) for c in captions if c.strip())
    if any("<image" in c or "<video" in c for c in captions):
        raise BadSample("unknown_marker", f"{where}: a caption has the marker of an image")
    return Context(str(id), image, captions, tuple(_box(each, where) for each in boxes))


def _box(given, where: str) -> tuple[str, Box]:
    try:
        name, box = given
        x1, y1, x2, y2 = (float(v) for v in box)
    except (TypeError, ValueError, OverflowError):
        raise BadSample(
            "bad_box", f"{where}: {shown(repr(given), 80)} is not a category and four numbers"
        ) from None
    if not (isinstance(name, str) and name.strip() and 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1):
        raise BadSample(
            "bad_box", f"{where}: {shown(repr(given), 80)}, expected a category and "
            "[x1, y1, x2, y2] from 0 to 1"
        )  # fmt: skip
    return " ".join(name.split()), (x1, y1, x2, y2)


# ---- JSON lines


def read_lines(path: str, skipped: Skipped) -> list[Context]:
    """The contexts of a file of JSON lines.

    Args:
        skipped: told about each line that can't be used.

    Raises:
        FileError: the file can't be read.
    """
    found: dict[str, Context] = {}
    for number, line in files.lines(path):
        if not line.strip():
            continue
        try:
            value = files.parse(line, "the line", dict)
            each = value.get("instances") or []
            if not isinstance(each, list) or not all(isinstance(one, dict) for one in each):
                raise BadSample("bad_record", "instances must be a list of objects")
            boxes = [(one.get("category"), one.get("bbox")) for one in each]
            context = made(value.get("id"), value.get("image"), value.get("captions") or (), boxes)
            if context.id in found:
                raise BadSample("repeated_id", f"id {shown(context.id, 60)} appears twice")
        except (BadSample, FileError) as error:
            reason = error.reason if isinstance(error, BadSample) else "bad_json"
            detail = error.detail if isinstance(error, BadSample) else str(error)
            skipped(BadSample(reason, f"{shown(path)}, line {number}: {detail}"))
            continue
        found[context.id] = context
    return list(found.values())


# ---- COCO


def read_coco(captions: str, instances: str | None, prefix: str, skipped: Skipped) -> list[Context]:
    """The images that a file of COCO captions lists, with boxes if a file of instances is given.

    Args:
        captions, instances: annotation files.
        prefix: folder that is put before the name of each file.
        skipped: told about each image or annotation that can't be used.

    Raises:
        FileError: a file can't be read, or is not one of COCO's.
    """
    listed, notes = _coco(captions, "a file of COCO captions (captions_*.json)")
    sentences = collections.defaultdict(list)
    for note in notes:
        if isinstance(note.get("caption"), str):
            sentences[str(note.get("image_id"))].append(note["caption"])
        else:
            skipped(BadSample("bad_record", f"{shown(captions)}: an annotation without caption"))
    boxes = _coco_boxes(instances, skipped) if instances else {}
    found: dict[str, Context] = {}
    for image in listed:
        key, name = image.get("id"), image.get("file_name")
        try:
            if not isinstance(name, str):
                raise BadSample("bad_record", f"image {shown(repr(key), 40)} has no file_name")
            path = f"{prefix.rstrip('/')}/{name}" if prefix else name
            context = made(key, path, sentences.get(str(key), ()), boxes.get(str(key), ()))
        except BadSample as error:
            skipped(error)
            continue
        found.setdefault(context.id, context)
    return list(found.values())


def _coco_boxes(path: str, skipped: Skipped) -> dict:
    """Id of an image, as text -> [(category, (x1, y1, x2, y2)), …]."""
    listed, notes, names = _coco(path, "a file of COCO instances (instances_*.json)", True)
    sizes = {str(one.get("id")): (one.get("width"), one.get("height")) for one in listed}
    boxes = collections.defaultdict(list)
    for note in notes:
        try:
            (w, h), (x, y, width, height) = sizes[str(note["image_id"])], note["bbox"]
            corners = (x / w, y / h, (x + width) / w, (y + height) / h)
            clipped = tuple(min(max(v, 0.0), 1.0) for v in corners)
            boxes[str(note["image_id"])].append((names[str(note["category_id"])], clipped))
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            what = f"{type(error).__name__} {shown(error, 60)}"
            skipped(BadSample("bad_box", f"{shown(path)}: an annotation can't be read: {what}"))
    return boxes


def _coco(path: str, what: str, categories: bool = False):
    """(images, annotations) of a COCO file, and with `categories` their names by id."""
    value = files.read_json(path, dict, what=what, max_bytes=MAX_COCO, keep=_without_outline)
    lists = [value.get(key) for key in ("images", "annotations", "categories")]
    lists = lists if categories else lists[:2]
    if not all(isinstance(one, list) and all(isinstance(e, dict) for e in one) for one in lists):
        raise FileError(f"{shown(path)} is not {what}: it lacks lists of objects in `images`, "
                        f"`annotations`{' or `categories`' if categories else ''}")  # fmt: skip
    if not categories:
        return lists
    return *lists[:2], {str(each.get("id")): each.get("name") for each in lists[2]}


def _without_outline(value: dict) -> dict:
    """An object of the file without the polygons of instances, which are most of its bytes."""
    value.pop("segmentation", None)
    return value


# ---- a folder


def read_folder(folder: str, skipped: Skipped) -> list[Context]:
    """Every image below a folder, by the extension of its name, in the order of the names.

    Raises:
        MissingFile: there is none.
    """
    found = []
    for name in images.names_in(folder):
        try:
            found.append(made(name, name))
        except BadSample as error:  # the name is not UTF-8
            skipped(error)
    return found

"""Boxes in images as rows of kind `augmented`: where they are, what is in them."""

import pathlib
from collections.abc import Iterator

from PIL import Image

from metamorph_jax import files
from metamorph_jax.data import reading
from metamorph_jax.data.sets import refcoco
from metamorph_jax.errors import FileError
from metamorph_jax.files import shown
from metamorph_jax.recipes.mm_interleaved import wordings
from metamorph_jax.recipes.mm_interleaved.prepare.rows import Options, Set, row
from metamorph_jax.recipes.mm_interleaved.tuning_sources import thousandths, written

_MAX_LINE = 2**24


def _row(options: Options, id, image, text: str, box: str, question: str = "") -> dict:
    """A box and its text, as the options use them.

    text: a sentence about what is in the box; with `question`, the answer to it.
    """
    if question:
        asked = wordings.REGION_QUESTION.format(box=box, question=question)
        turns = ("user", asked), ("assistant", f" {text}")
    elif options.use == "caption":
        turns = ("user", wordings.REGION_CAPTION.format(box=box)), ("assistant", f" {text}")
    else:
        turns = ("user", wordings.BOX.format(text=text)), ("assistant", f"{box}</box>")
    return row(id, (image,), turns, **_augmented(options))


def _augmented(options: Options) -> dict:
    changes = {"flip": True, "crop": True} if options.augment else {}
    return {"kind": "augmented", "square": True, **changes}


def _box(box, size, where: str) -> str | None:
    """A box in pixels as text; None if nothing of it is in the image.

    Raises:
        FileError: it isn't four numbers, or its corners are the wrong way round.
    """
    whole = isinstance(box, list | tuple) and len(box) == 4
    if not whole or not all(isinstance(v, int | float) for v in box):
        raise FileError(f"{where}: bbox {shown(box, 60)}, expected [x1, y1, x2, y2]")
    x1, y1, x2, y2 = box
    if x2 < x1 or y2 < y1:
        raise FileError(f"{where}: bbox {shown(box, 60)} has its corners the wrong way round")
    inside = x2 > max(x1, 0) and y2 > max(y1, 0) and x1 < size[0] and y1 < size[1]
    return written(thousandths(box, size)) if inside else None


def refcoco_of(by: str):
    """A reader of RefCOCO, RefCOCO+ or RefCOCOg."""

    def read(options: Options) -> Iterator[dict]:
        """refs(unc).p (refcocog: refs(umd).p), instances.json; images train2014/."""
        refs = options.file(f"refs({options.by or by}).p")
        found = refcoco.expressions(refs, options.file("instances.json"), options.split)
        for one in found:
            where = f"{shown(refs)}, sentence {one.id}"
            if box := _box(one.box, one.size, where):
                image = options.pictures / "train2014" / one.image
                yield _row(options, one.id, image, one.text, box)

    return read


def visual_genome(options: Options) -> Iterator[dict]:
    """region_descriptions.json, image_data.json; images VG_100K/ and VG_100K_2/."""
    path, about = options.file("region_descriptions.json"), options.file("image_data.json")
    known = {}
    for number, one in enumerate(reading.json_file(about, list)):
        where = f"{shown(about)}[{number}]"
        one = reading.required(one, where, "image_id", "width", "height", texts=("url",))
        known[one["image_id"]] = one
    for number, scene in enumerate(reading.json_file(path, list)):
        where = f"{shown(path)}[{number}]"
        reading.required(scene, where, "id", "regions")
        if scene["id"] not in known:
            raise FileError(f"{where}: {shown(about)} has no image {scene['id']}")
        image = known[scene["id"]]
        size, place = (image["width"], image["height"]), "/".join(image["url"].split("/")[-2:])
        for region in scene["regions"]:
            keys = ("region_id", "x", "y", "width", "height")
            region = reading.required(region, f"{where}, a region", *keys, texts=("phrase",))
            x, y = region["x"], region["y"]
            corners = (x, y, x + region["width"], y + region["height"])
            if box := _box(corners, size, where):
                text = " ".join(region["phrase"].split())
                yield _row(options, region["region_id"], options.pictures / place, text, box)


def regions(options: Options) -> Iterator[dict]:
    """*.jsonl in MM-Interleaved's form: {"image", "caption", "bbox": [x1, y1, x2, y2] in pixels},
    with "query" a question about the box whose answer is the caption, and perhaps "width" and
    "height" (else the image is looked at)."""
    for path, number, one in _lines(options):
        where = f"{shown(path)}, line {number}"
        one = reading.required(one, where, "bbox", texts=("image", "caption"))
        image = options.pictures / one["image"]
        if not image.is_file():
            yield _row(options, "", image, "", "")  # left out and counted when it is written
            continue
        size = (one["width"], one["height"]) if "width" in one else _size(image)
        if box := _box(one["bbox"], size, where):
            id = f"{path.stem}-{number}"
            yield _row(options, id, image, one["caption"], box, one.get("query", ""))


def grounded(options: Options) -> Iterator[dict]:
    """*.jsonl in MM-Interleaved's form: {"image", "sent"}, a caption with <ref> and <box> in it,
    boxes as "(x1,y1)(x2,y2)" in thousandths."""
    for path, number, one in _lines(options):
        where = f"{shown(path)}, line {number}"
        one = reading.required(one, where, texts=("image", "sent"))
        turns = ("user", wordings.GROUNDED), ("assistant", f" {one['sent'].strip()}")
        image = options.pictures / one["image"]
        yield row(f"{path.stem}-{number}", (image,), turns, **_augmented(options))


def _lines(options: Options) -> Iterator[tuple[pathlib.Path, int, dict]]:
    paths = sorted(options.folder.glob("*.jsonl"))
    if not paths:
        options.file("*.jsonl")
    for path in paths:
        for number, line in files.lines(path, _MAX_LINE):
            if line.strip():
                yield path, number, files.parse(line, f"{shown(path)}, line {number}", dict)


def _size(path: pathlib.Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise FileError(f"{shown(path)} is not an image: {error}") from error


SETS = {
    "refcoco": Set(refcoco_of("unc"), ("box", "caption")),
    "refcoco+": Set(refcoco_of("unc"), ("box", "caption")),
    "refcocog": Set(refcoco_of("umd"), ("box", "caption")),
    "visual_genome": Set(visual_genome, ("caption", "box")),
    "regions": Set(regions, ("box", "caption")),
    "grounded": Set(grounded, ("caption",)),
}

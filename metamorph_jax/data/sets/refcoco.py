"""RefCOCO, RefCOCO+ and RefCOCOg: expressions that refer to a box in an image of COCO.

    refs(unc).p (RefCOCOg: refs(umd).p, refs(google).p)     instances.json

from github.com/lichengunc/refer. Images are those of COCO's train2014.
"""

import dataclasses
from collections.abc import Iterator

from metamorph_jax import files
from metamorph_jax.data import reading
from metamorph_jax.data.sets.pickles import plain_pickle
from metamorph_jax.errors import FileError


@dataclasses.dataclass(frozen=True)
class Expression:
    """Attributes:
    id, ref_id: of the sentence, and of the object with its sentences.
    image: file name, as in train2014.
    box: (x1, y1, x2, y2) in pixels.
    size: (width, height) of the image.
    """

    id: int
    ref_id: int
    text: str
    image: str
    box: tuple[float, float, float, float]
    size: tuple[float, float]


def expressions(refs: str, instances: str, split: str) -> Iterator[Expression]:
    """The expressions of a split.

    Args:
        refs: path of the pickle.
        instances: path of instances.json.

    Raises:
        FileError: a file can't be read, lacks something, or has nothing of this split.
    """
    where, places = files.shown(refs), files.shown(instances)
    keys = ("split", "ann_id", "image_id", "ref_id", "sentences")
    found = [reading.required(ref, f"{where}, expression {number}", *keys)
             for number, ref in enumerate(plain_pickle(refs))]  # fmt: skip
    found = [ref for ref in found if ref["split"] == split]
    if not found:
        raise FileError(f"{where} has no expressions of split {split}")
    table = reading.json_file(instances, dict)
    reading.required(table, places, "images", "annotations")
    sizes = {row["id"]: (float(row["width"]), float(row["height"])) for row in table["images"]}
    boxes = {row["id"]: row["bbox"] for row in table["annotations"]}
    for ref in found:
        if ref["ann_id"] not in boxes or ref["image_id"] not in sizes:
            raise FileError(f"{places} has no annotation {ref['ann_id']} of image "
                            f"{ref['image_id']}")  # fmt: skip
        x, y, width, height = boxes[ref["ann_id"]]
        for sentence in ref["sentences"]:
            reading.required(sentence, f"{where}, a sentence", "sent_id", texts=("sent",))
            yield Expression(
                sentence["sent_id"], ref["ref_id"], sentence["sent"],
                f"COCO_train2014_{ref['image_id']:012d}.jpg", (x, y, x + width, y + height),
                sizes[ref["image_id"]],
            )  # fmt: skip

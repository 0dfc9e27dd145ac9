"""ADE20K's benchmark of 150 classes (ADEChallengeData2016), with captions.

    images/{training,validation}/ADE_{train,val}_00000001.jpg
    annotations/{training,validation}/ADE_{train,val}_00000001.png    uint8: 0 other, k class k
    {training,validation}.json     [{"image_id": "ADE_val_00000001", "caption": "a street"}, …]

Captions are not part of the set: MM-Interleaved's are on its hub page; any others will do, but
scores depend on them.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from metamorph_jax import files
from metamorph_jax.data import reading
from metamorph_jax.errors import FileError, MissingFile

CLASSES = 150
SPLITS = ("training", "validation")


@dataclasses.dataclass(frozen=True)
class Scene:
    """Attributes:
    id: such as "ADE_val_00000001".
    caption: without a full stop at its end.
    image, labels: paths; labels hold 0 for other and 1 to 150 for classes.
    """

    id: str
    caption: str
    image: str
    labels: str


def scenes(root: str, split: str) -> Iterator[Scene]:
    """The scenes of a split, in the order of the file of captions.

    Raises:
        FileError: a file is missing or damaged; the message names it and the record.
    """
    folder, path = pathlib.Path(root), pathlib.Path(root, f"{split}.json")
    if not path.exists():
        raise MissingFile(
            f'no {files.shown(path)}: captions, [{{"image_id": "ADE_…", "caption": "…"}}, …], are '
            "not part of ADE20K; MM-Interleaved's are on its hub page"
        )
    for number, row in enumerate(reading.json_file(str(path), list)):
        where = f"{files.shown(path)}[{number}]"
        row = reading.required(row, where, texts=("image_id", "caption"))
        id = row["image_id"]
        if pathlib.PurePath(id).name != id:
            raise FileError(f"{where}: image_id {files.shown(id)} is not a name")
        image = str(folder / "images" / split / f"{id}.jpg")
        labels = str(folder / "annotations" / split / f"{id}.png")
        yield Scene(id, " ".join(row["caption"].split()).rstrip("."), image, labels)


def labels_of(path: str) -> np.ndarray:
    """uint8[h, w] of a label map.

    Raises:
        FileError: it isn't an image of one channel of 8 bits.
    """
    path = files.regular(path)
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P"):
                raise FileError(f"{files.shown(path)} has mode {image.mode}, expected labels: one "
                                "channel of 8 bits")  # fmt: skip
            return np.array(image)
    except OSError as error:
        raise FileError(f"{files.shown(path)} is not an image: {error}") from error


def palette(classes: int = CLASSES) -> np.ndarray:
    """uint8[classes + 1, 3]: black for other, then colours on a lattice of 6 x 6 x 6, from white on
    in steps of 42, as MM-Interleaved paints its maps."""
    k = np.arange(classes)
    digits = np.stack([k // 36, k % 36 // 6, k % 6], axis=-1)
    return np.concatenate([np.zeros((1, 3)), 255 - 42 * digits]).astype(np.uint8)


def painted(labels: np.ndarray, where: str = "labels") -> np.ndarray:
    """uint8[h, w, 3] colours of uint8[h, w] labels.

    Raises:
        FileError: a label is no class.
    """
    if labels.size and labels.max() > CLASSES:
        raise FileError(f"{files.shown(where)}: label {labels.max()}, expected 0 to {CLASSES}")
    return palette()[labels]

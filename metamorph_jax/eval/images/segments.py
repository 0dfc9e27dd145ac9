"""mIoU of label maps that a segmenter found in drawn images, against those of the true images.

The segmenter runs elsewhere (MM-Interleaved takes OneFormer, DiNAT-L, trained on ADE20K) and leaves
a PNG of one channel for each image, under the image's name. Numbers of different segmenters can't
be compared.
"""

import pathlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

from metamorph_jax.data.sets import ade20k
from metamorph_jax.errors import FileError, MissingFile
from metamorph_jax.eval.scorers.segmentation import Overlap
from metamorph_jax.files import shown


def overlap(
    predicted: str, truth: str, first_label: int = 0, classes: int = ade20k.CLASSES
) -> Overlap:
    """The overlap of two label maps.

    Args:
        predicted: file; one of another size is brought to that of the truth (nearest neighbour).
        truth: file; 0 is unlabelled, 1 the first class.
        first_label: of the predicted map, for the first class: 0 as segmenters have it, or 1.
        classes: how many.

    Raises:
        FileError: a file can't be read, or holds a label that is no class.
    """
    real, found = ade20k.labels_of(truth), ade20k.labels_of(predicted)
    if found.shape != real.shape:
        size = real.shape[1], real.shape[0]
        found = np.asarray(Image.fromarray(found).resize(size, Image.Resampling.NEAREST))
    try:
        return Overlap.of(found.astype(np.int32) + 1 - first_label, real, classes)
    except ValueError as error:
        raise FileError(f"{shown(predicted)} and {shown(truth)}: {error}") from error


def score_folders(
    predicted: str, truth: str, first_label: int = 0, classes: int = ade20k.CLASSES
) -> tuple[float, int, list[str]]:
    """(mIoU in [0, 1], how many maps, names of true maps that have no prediction).

    Raises:
        FileError: no map has a partner, or one can't be read.
    """
    total, lost = None, []
    paths = sorted(pathlib.Path(truth).glob("*.png"))
    for path in paths:
        mine = pathlib.Path(predicted, path.name)
        if not mine.is_file():
            lost.append(path.stem)
            continue
        one = overlap(str(mine), str(path), first_label, classes)
        total = one if total is None else total + one
    if total is None:
        example = paths[0].name if paths else "ID.png"
        raise MissingFile(f"{shown(predicted)} has no label map with the name of one in "
                          f"{shown(truth)}, such as {example}")  # fmt: skip
    return total.miou(), len(paths) - len(lost), lost


def summed(overlaps: Iterable[Overlap]) -> Overlap:
    """The overlap of a set of images; there must be one."""
    first, *rest = overlaps
    return sum(rest, first)

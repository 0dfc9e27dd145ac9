"""ADE20K: scenes with captions, and label maps in colours."""

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.data.sets import ade20k
from metamorph_jax.errors import FileError, MissingFile

from . import made


def test_scenes(tmp_path):
    first, second = ade20k.scenes(made.ade20k(tmp_path), "validation")
    assert (first.id, first.caption) == ("ADE_val_00000001", "scene 0")
    assert second.labels == str(tmp_path / "annotations/validation/ADE_val_00000002.png")
    assert ade20k.labels_of(second.labels)[0].tolist() == [0, 21, 22, 23, 24, 25]
    with pytest.raises(MissingFile, match="training.json: captions.*not part of ADE20K"):
        list(ade20k.scenes(tmp_path, "training"))
    made.put(tmp_path / "training.json", [{"image_id": "ADE_train_1"}])
    with pytest.raises(FileError, match=r"training.json\[0\]: no caption"):
        list(ade20k.scenes(tmp_path, "training"))
    made.put(tmp_path / "training.json", [{"image_id": "../x", "caption": "y"}])
    with pytest.raises(FileError, match=r"training.json\[0\]: image_id ../x is not a name"):
        list(ade20k.scenes(tmp_path, "training"))


def test_colours(tmp_path):
    colours = ade20k.palette()
    assert colours.shape == (151, 3) and len(np.unique(colours, axis=0)) == 151
    # Class k (from 0) has 255 - 42 times its digits in base 6.
    assert colours[[0, 1, 2, 7, 37]].tolist() == [
        [0, 0, 0], [255, 255, 255], [255, 255, 213], [255, 213, 255], [213, 255, 255]
    ]  # fmt: skip
    labels = np.array([[0, 150]], np.uint8)
    assert ade20k.painted(labels)[0, 1].tolist() == [255 - 42 * 4, 255, 255 - 42 * 5]
    with pytest.raises(FileError, match="here: label 151, expected 0 to 150"):
        ade20k.painted(labels + 1, "here")
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    with pytest.raises(FileError, match="x.png has mode RGB, expected labels"):
        ade20k.labels_of(str(tmp_path / "x.png"))

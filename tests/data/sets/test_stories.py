"""Stories from files in their official form."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.data.sets import stories
from metamorph_jax.errors import FileError, MissingFile

from . import made


def test_vist_as_published(tmp_path):
    found = stories.vist(made.vist(tmp_path), "test")
    assert [story.id for story in found.found] == ["1", "2"]
    first = found.found[0]
    assert [frame.text for frame in first.frames] == [f"[male] saw {100 + k} ." for k in range(5)]
    assert first.frames[4].image == str(tmp_path / "test" / "104.jpg")
    assert sum(found.left_out.values()) == 2
    assert found.message().startswith("2 stories are left out (1: not 5 frames, such as story 3; ")
    assert "402.jpg" in found.message()
    original = stories.vist(tmp_path, "test", "original_text").found[0]
    assert original.frames[0].text == "Tom saw 100."


def test_vist_as_mm_interleaved_lays_it_out(tmp_path):
    (story,) = stories.vist(made.formatted(tmp_path), "test").found
    assert [frame.text for frame in story.frames] == [f"frame {k} ." for k in range(5)]
    assert pathlib.Path(story.frames[3].image).name == "13.png"


def test_vist_as_minigpt5_lays_it_out(tmp_path):
    found = stories.vist(made.cleaned(tmp_path), "val")
    assert [story.id for story in found.found] == ["1"]
    assert [frame.text for frame in found.found[0].frames] == [f"frame {k} ." for k in range(5)]
    assert found.found[0].frames[3].image == str(tmp_path / "val_images" / "000000013.jpg")
    assert "1: an image is missing, such as" in found.message() and "24 (not in" in found.message()
    made.put(tmp_path / "val_image_mapping.json", {"10": "../x.jpg"})
    with pytest.raises(FileError, match="outside"):
        stories.vist(tmp_path, "val")


def test_vist_files_that_are_wrong(tmp_path):
    with pytest.raises(MissingFile, match="no annotations/val_formatted_filtered.json or .*val"):
        stories.vist(tmp_path, "val")
    row = made.vist_row(1, 0)
    del row[0]["text"]
    made.put(tmp_path / "val.story-in-sequence.json", {"annotations": [row]})
    with pytest.raises(FileError, match=r"val.story-in-sequence.json, annotations\[0\]: no text"):
        stories.vist(tmp_path, "val")
    row[0] |= {"text": "x", "photo_flickr_id": "../../x"}
    made.put(tmp_path / "val.story-in-sequence.json", {"annotations": [row]})
    with pytest.raises(FileError, match="outside"):
        stories.vist(tmp_path, "val")
    made.put(tmp_path / "val.story-in-sequence.json", {"annotations": [made.vist_row(1, 0)]})
    with pytest.raises(FileError, match="has no story: 1 stories are left out"):
        stories.vist(tmp_path, "val")


def test_pororo(tmp_path):
    made.pororo(tmp_path)
    (story,) = stories.pororo(tmp_path, "test").found
    assert story.id == "2"
    assert story.frames[1].text == "then Pororo met Loopy 3."
    assert [pathlib.Path(frame.image).stem for frame in story.frames] == list("34567")
    assert [story.id for story in stories.pororo(tmp_path, "train").found] == ["0"]
    np.save(tmp_path / "descriptions.npy", {"S1/E1/3": ["x"]})
    with pytest.raises(FileError, match="descriptions.npy, S1/E1/4.png: no description"):
        stories.pororo(tmp_path, "test")


def test_flintstones(tmp_path):
    made.flintstones(tmp_path)
    found = stories.flintstones(tmp_path, "test").found
    assert len(found) == 2  # the third clip has three after it, then the episode ends
    assert found[1].frames[4].text == "Fred talks to Wilma 5."
    path = found[1].frames[4].image
    assert stories.tiles(path) == 2
    second = np.asarray(stories.frame_of(path, 1))
    assert (second == np.load(path)[1]).all()
    stories.strip(path).save(tmp_path / "strip.png")
    assert stories.tiles(str(tmp_path / "strip.png")) == 2
    assert (np.asarray(stories.frame_of(str(tmp_path / "strip.png"), 1)) == second).all()
    rows = json.loads((tmp_path / "flintstones_annotations_v1-0.json").read_text())
    made.put(tmp_path / "flintstones_annotations_v1-0.json", rows[1:])
    with pytest.raises(FileError, match="annotations_v1-0.json, s_01_e_01_shot_000000.*no descr"):
        stories.flintstones(tmp_path, "test")


def test_a_clip_that_is_no_column_of_frames(tmp_path):
    Image.new("RGB", (128, 200)).save(tmp_path / "x.png")
    with pytest.raises(FileError, match="x.png: 128 x 200 pixels, expected frames of 128"):
        stories.tiles(str(tmp_path / "x.png"))
    np.save(tmp_path / "x.npy", np.zeros((2, 64, 64, 3), np.uint8))
    with pytest.raises(FileError, match=r"x.npy: \(2, 64, 64, 3\), expected \[T, 128, 128, 3\]"):
        stories.tiles(str(tmp_path / "x.npy"))

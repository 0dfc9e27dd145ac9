"""Stories: what the files say is what the images show, and the judge can tell."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from metamorph_jax.errors import UserError
from metamorph_jax.quickstart import stories
from metamorph_jax.quickstart.data import read_jsonl

COUNTS = {"train": 8, "seen": 4, "unseen": 4}


@pytest.fixture(scope="module")
def characters(tmp_path_factory) -> list[stories.Character]:
    """Ten discs and boxes as stamps in a folder like Tux Paint's; three files are no characters."""
    folder = tmp_path_factory.mktemp("stamps")
    animals = folder / "animals" / "made"
    animals.mkdir(parents=True)
    for k in range(10):
        image = Image.new("RGBA", (120, 90))
        shape = ImageDraw.Draw(image).ellipse if k % 2 else ImageDraw.Draw(image).rectangle
        shape((20, 10, 100, 80), fill=(25 * k, 255 - 25 * k, 128, 255))
        _stamp(animals / f"{k}.png", image, f"A made-up animal {chr(97 + k)}.\nde.utf8=Ein Tier.")
    _stamp(animals / "empty.png", Image.new("RGBA", (50, 50)), "Nothing.")
    line = Image.new("RGBA", (100, 100))
    ImageDraw.Draw(line).line((0, 50, 99, 50), fill="red", width=4)
    _stamp(animals / "thin.png", line, "A line.")
    _stamp(animals / "long.png", image, "A name of far too many words.")
    return stories.stamps(folder)


def _stamp(file: pathlib.Path, image: Image.Image, words: str) -> None:
    image.save(file)
    file.with_suffix(".txt").write_text(words)


@pytest.fixture(scope="module")
def root(tmp_path_factory, characters) -> pathlib.Path:
    return stories.prepare(tmp_path_factory.mktemp("stories"), lambda: characters, counts=COUNTS)


def test_stamps_that_show_something_become_characters(characters):
    assert [c.name for c in characters] == [f"made-up animal {chr(97 + k)}" for k in range(10)]
    assert all(c.pixels.shape == (stories.BOX, stories.BOX, 4) for c in characters)


def test_a_folder_without_stamps_is_an_error(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        stories.stamps(tmp_path)


@pytest.mark.parametrize("split", stories.SPLITS)
def test_files_hold_the_images_and_words_of_the_stories(split, root, characters):
    told, rows = stories.read(root, split), read_jsonl(root / f"{split}.jsonl")
    assert len(told) == len(rows) == COUNTS[split]
    for story, row in zip(told, rows, strict=True):
        for k, (name, place) in enumerate(zip(row["image"], story.places, strict=True)):
            assert np.array_equal(np.asarray(Image.open(root / name)), story.image(characters, k))
            assert place in row["conversations"][max(2 * k - 2, 0)]["value"]
        said = [turn["value"] for turn in row["conversations"]]
        assert "".join(said).count("<image>") == len(row["image"])
        assert said[1::2] == ["<image>"] * (len(row["image"]) - 1)
        assert characters[story.character].name in said[0]


def test_characters_of_the_unseen_split_are_new(root):
    split = {name: {s.character for s in stories.read(root, name)} for name in stories.SPLITS}
    assert not split["unseen"] & (split["train"] | split["seen"])


def test_neighbouring_images_differ(root):
    for story in stories.read(root, "train"):
        assert all(a != b for a, b in zip(story.places, story.places[1:], strict=False))


def test_the_same_arguments_write_nothing_anew_and_others_do(root, characters):
    file = root / "train.jsonl"
    before = file.stat().st_mtime_ns, file.read_bytes()
    stories.prepare(root, lambda: characters, counts=COUNTS)
    assert (file.stat().st_mtime_ns, file.read_bytes()) == before
    other = stories.prepare(root.parent / "other", lambda: characters, counts=COUNTS, seed=1)
    assert (other / "train.jsonl").read_bytes() != before[1]
    assert json.loads((other / "manifest.json").read_text())["seed"] == 1


def test_the_judge_accepts_the_truth_and_names_what_is_wrong(root, characters):
    for story in stories.read(root, "unseen"):
        truth = stories.judge(story.image(characters, 1), story, 1, characters)
        assert truth == stories.Verdict(True, True, 0.0, 0.0)
        moved = stories.judge(story.image(characters, 0), story, 1, characters)
        assert moved.character and not moved.place
        other = characters[(story.character + 1) % len(characters)]
        swapped = stories.compose(story, other, story.places[1])
        verdict = stories.judge(swapped, story, 1, characters)
        assert verdict.place and not verdict.character and verdict.scene == 0
        noise = np.random.default_rng(0).normal(0, 12, swapped.shape)
        noisy = np.clip(story.image(characters, 1) + noise, 0, 255).astype(np.uint8)
        verdict = stories.judge(noisy, story, 1, characters)
        assert verdict.place and verdict.character and 5 < verdict.error < 15


def test_a_scene_in_other_colours_is_measured(root, characters):
    story = stories.read(root, "seen")[0]
    other = stories.Story(story.character, (90, 90, 90), (90, 90, 90), story.places)
    drawn = other.image(characters, 1)
    wanted = np.abs(np.array([story.sky, story.ground], float) - 90).mean(1)
    share = np.array([stories.HORIZON, stories.SIDE - stories.HORIZON]) / stories.SIDE
    found = stories.judge(drawn, story, 1, characters).scene
    assert found == pytest.approx((wanted * share).sum(), rel=0.1)

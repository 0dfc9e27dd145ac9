"""Images to draw, from segmentation maps and from the story so far, as rows."""

import pathlib
import sys
from collections.abc import Iterator

from PIL import Image

from metamorph_jax.data.sets import ade20k, stories
from metamorph_jax.data.sources.base import IMAGE
from metamorph_jax.recipes.mm_interleaved import wordings
from metamorph_jax.recipes.mm_interleaved.prepare.rows import Options, Set, row

_FILES = {
    "vist": "train.story-in-sequence.json, images train/PHOTO_ID.jpg; or "
    "annotations/train_formatted_filtered.json, images images/train_images/ID.png.",
    "pororo": "descriptions.npy, img_cache4.npy, following_cache4.npy, train_seen_unseen_ids.npy; "
    "clips SEASON/EPISODE/N.png.",
    "flintstones": "train-val-test_split.json, flintstones_annotations_v1-0.json; clips "
    "video_frames_sampled/CLIP.npy, which are written to video_frames_sampled_png/CLIP.png where "
    "they aren't there yet.",
}
_SPLITS = {"train": "training", "val": "validation"}


def segmentation(options: Options) -> Iterator[dict]:
    """training.json (captions), annotations/training/ID.png, images/training/ID.jpg of
    ADEChallengeData2016; label maps in colours are written to annotations_with_color/training/
    where they aren't there yet."""
    split = _SPLITS.get(options.split, options.split)
    painted = options.folder / "annotations_with_color" / split
    painted.mkdir(parents=True, exist_ok=True)
    for scene in ade20k.scenes(str(options.folder), split):
        colours = painted / f"{scene.id}.png"
        if not colours.exists():
            labels = ade20k.painted(ade20k.labels_of(scene.labels), scene.labels)
            Image.fromarray(labels).save(colours)
        turns = (("user", wordings.SEGMENTATION.format(caption=scene.caption)),
                 ("assistant", IMAGE))  # fmt: skip
        more = {"kind": "augmented", "flip": True} if options.augment else {}
        yield row(scene.id, (colours, scene.image), turns, **more)


def story_of(name: str):
    """A reader of VIST, PororoSV or FlintstonesSV (`data/sets/stories.py`)."""

    def read(options: Options) -> Iterator[dict]:
        found = stories.READERS[name](str(options.folder), options.split)
        if found.left_out:
            print(f"{name}: {found.message()}", file=sys.stderr)
        for story in found.found:
            turns = [turn for frame in story.frames
                     for turn in (("user", frame.text), ("assistant", IMAGE))]  # fmt: skip
            if name == "vist":
                yield row(story.id, [frame.image for frame in story.frames], turns)
                continue
            images = [_as_image(pathlib.Path(frame.image)) for frame in story.frames]
            tiles = [stories.tiles(str(image)) for image in images]
            yield row(story.id, images, turns, kind="augmented", tiles=tiles)

    read.__doc__ = _FILES[name]
    return read


def _as_image(path: pathlib.Path) -> pathlib.Path:
    """The clip as an image; one of a .npy file is made."""
    if path.suffix != ".npy":
        return path
    place = path.parent.with_name("video_frames_sampled_png") / f"{path.stem}.png"
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        stories.strip(str(path)).save(place)
    return place


SETS = {
    "ade20k": Set(segmentation, ("draw",)),
    **{name: Set(story_of(name), ("draw",)) for name in stories.READERS},
}

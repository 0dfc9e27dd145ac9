"""Stories in images: VIST, PororoSV and FlintstonesSV, five captioned frames each.

VIST (Huang et al. 2016, arXiv 1604.03968), one of

    {train,val,test}.story-in-sequence.json     {split}/<photo_flickr_id>.jpg           as published
    annotations/{split}_formatted_filtered.json images/{split}_images/<image_id>.png    MM-Interleaved
    annotations/{split}_formatted.json          likewise                                GILL
    {split}_cleaned.json, {split}_image_mapping.json     the paths in the latter        MiniGPT-5

PororoSV and FlintstonesSV as StoryDALL-E (arXiv 2209.06192) hands them out:

    descriptions.npy  img_cache4.npy  following_cache4.npy  train_seen_unseen_ids.npy
    <season>/<episode>/<n>.png

    train-val-test_split.json  flintstones_annotations_v1-0.json
    video_frames_sampled/<globalID>.npy  or  video_frames_sampled_png/<globalID>.png

An image of the latter two is a clip: square frames of 128 pixels one below the other, of which one
is taken (`Clip`). Their captions are in lower case but for the names of the characters. A story of
FlintstonesSV is a clip and the four after it in the sorted list of all, if they are of the same
episode; `following_cache4.pkl`, which says the same, is not needed.

Stories without exactly five frames, or with an image that isn't there, are left out and counted.
"""  # noqa: E501

import collections
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from metamorph_jax import files
from metamorph_jax.data import images, reading
from metamorph_jax.data.sets.pickles import plain_npy
from metamorph_jax.errors import FileError, MissingFile

FRAMES = 5
TILE = 128  # pixels of a clip's frame
SPLITS = ("train", "val", "test")
PORORO = ("Pororo", "Loopy", "Eddy", "Harry", "Poby", "Tongtong", "Crong", "Rody", "Petty")
FLINTSTONES = ("Fred", "Barney", "Wilma", "Betty", "Pebbles", "Dino", "Slate")


@dataclasses.dataclass(frozen=True)
class Frame:
    """Attributes:
    text: the caption.
    image: path; of a clip, of all of its frames.
    """

    text: str
    image: str


@dataclasses.dataclass(frozen=True)
class Story:
    """Attributes:
    fault: what is wrong with it, where its frames can't be read.
    """

    id: str
    frames: tuple[Frame, ...]
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Stories:
    """Attributes:
    found: in the order of the official file.
    left_out: reason -> how many stories; an example stands in the reason.
    """

    found: list[Story]
    left_out: dict[str, int]

    def message(self) -> str:
        """What was left out, in a line; "" if nothing was."""
        if not self.left_out:
            return ""
        why = "; ".join(f"{count:,}: {reason}" for reason, count in self.left_out.items())
        return f"{sum(self.left_out.values()):,} stories are left out ({why})"


def _kept(stories: Iterator[Story], where: str) -> Stories:
    """Those of five frames whose images are there.

    Raises:
        FileError: none is left, or one can't be read.
    """
    found, first, counts = [], {}, collections.Counter()
    for story in stories:
        if story.fault:
            raise FileError(story.fault)
        gone = next((f.image for f in story.frames if not pathlib.Path(f.image).is_file()), None)
        if len(story.frames) == FRAMES and gone is None:
            found.append(story)
            continue
        short = len(story.frames) != FRAMES
        why = f"not {FRAMES} frames" if short else "an image is missing"
        example = f"story {files.shown(story.id, 60)}" if short else files.shown(gone)
        counts[why] += 1
        first.setdefault(why, f"{why}, such as {example}")
    left_out = {first[why]: count for why, count in counts.items()}
    stories = Stories(found, left_out)
    if not found:
        raise FileError(f"{where} has no story: {stories.message() or 'it is empty'}")
    return stories


def _there(root: pathlib.Path, *names: str) -> str:
    """The first of these files that is there.

    Raises:
        MissingFile: none of them is.
    """
    for name in names:
        if (root / name).exists():
            return str(root / name)
    raise MissingFile(f"no {' or '.join(names)} in {files.shown(root)}")


# ---- VIST


def vist(root: str, split: str, text: str = "text") -> Stories:
    """The stories of a split.

    Args:
        root: folder, see the module's docstring.
        split: train, val or test.
        text: of the published files, "text" (in lower case, names masked) or "original_text".

    Raises:
        FileError: a file is missing or damaged, or no story is left.
    """
    root = pathlib.Path(root)
    formatted = [f"annotations/{split}_formatted{end}.json" for end in ("_filtered", "")]
    path = _there(root, *formatted, f"{split}.story-in-sequence.json", f"{split}_cleaned.json")
    return _kept(vist_file(path, text), files.shown(path))


def vist_file(path: str, text: str = "text") -> Iterator[Story]:
    """All stories of one of VIST's files, of whatever length; images may be missing.

    Args:
        path: of a file whose name is one of those in the module's docstring, in its folder.
        text: see `vist`.

    Raises:
        FileError: the file is missing or damaged, or has another name.
    """
    file = pathlib.Path(path)
    split = re.split(r"[_.]", file.name)[0]
    if file.name.endswith("_cleaned.json"):
        places = reading.json_file(_there(file.parent, f"{split}_image_mapping.json"), dict)
        return _vist_ordered(reading.json_file(path, dict), _mapped(file.parent, places), path)
    published = file.name.endswith(".story-in-sequence.json")
    if not published and "_formatted" not in file.name:
        raise FileError(
            f"{files.shown(path)} is none of VIST's files: expected SPLIT_cleaned.json, "
            "SPLIT_formatted.json, SPLIT_formatted_filtered.json or SPLIT.story-in-sequence.json"
        )
    table = reading.required(reading.json_file(path, dict), files.shown(path), "annotations")
    rows = table["annotations"]
    if published:
        return _vist_published(rows, file.parent, split, text, path)
    if not isinstance(rows, dict):
        raise FileError(f'{files.shown(path)}: "annotations" is not an object of stories')
    folder = file.parent.parent / "images" / f"{split}_images"
    image = lambda id, where: _inside(folder, f"{id}.png", where)  # noqa: E731
    return _vist_ordered(rows, image, path)


def _mapped(root: pathlib.Path, places: dict) -> Callable[[str, str], str]:
    """(id of an image, where it is named) -> its path, by a table of paths; that of no file, if it
    isn't there."""

    def image(id, where: str) -> str:
        place = places.get(str(id), f"{id} (not in the table of images)")
        reading.text_list([place], f"{where}: the path of image {files.shown(id, 60)}")
        return _inside(root, place, where)

    return image


def _vist_ordered(rows: dict, image: Callable[[str, str], str], path: str) -> Iterator[Story]:
    """Stories of rows with caption, image_id and sequence_index, in the order of the latter."""
    for id, steps in rows.items():
        where = f"{files.shown(path)}, story {files.shown(id, 60)}"
        try:
            found = _ordered(steps if isinstance(steps, list) else [steps], where)
            frames = (Frame(row["caption"], image(row["image_id"], where)) for row in found)
            yield Story(id, tuple(frames))
        except FileError as error:
            yield Story(id, (), str(error))


def _ordered(steps: list, where: str) -> list[dict]:
    """The steps of a story in their order; FileError if they aren't any."""
    keys = ("image_id", "sequence_index")
    rows = [reading.required(row, where, *keys, texts=("caption",)) for row in steps]
    if any(type(row["sequence_index"]) not in (int, float) for row in rows):
        raise FileError(f"{where}: a sequence_index is not a number")
    return sorted(rows, key=lambda row: row["sequence_index"])


def _vist_published(rows, root: pathlib.Path, split: str, text: str, path: str) -> Iterator[Story]:
    stories: dict[str, list] = {}
    for number, row in enumerate(rows):
        where = f"{files.shown(path)}, annotations[{number}]"
        row = row[0] if isinstance(row, list) and len(row) == 1 else row
        keys = ("story_id", "photo_flickr_id", "worker_arranged_photo_order")
        row = reading.required(row, where, *keys, texts=(text,))
        image = _inside(root / split, f"{row['photo_flickr_id']}.jpg", where)
        place = row["worker_arranged_photo_order"]
        stories.setdefault(str(row["story_id"]), []).append((place, Frame(row[text], image)))
    for id, frames in stories.items():
        ordered = sorted(frames, key=lambda pair: pair[0])
        yield Story(id, tuple(frame for _, frame in ordered))


def _inside(folder: pathlib.Path, name: str, where: str) -> str:
    """The path of an image; FileError if its name leads out of the folder."""
    if pathlib.PurePath(name).is_absolute() or ".." in pathlib.PurePath(name).parts:
        raise FileError(f"{where}: the image {files.shown(name)} is outside of {folder}")
    return str(folder / name)


# ---- PororoSV


def pororo(root: str, split: str) -> Stories:
    """The stories of a split; "val" are those of episodes seen in training, "test" of others.

    Raises:
        FileError: a file is missing or damaged, or no story is left.
    """
    root = pathlib.Path(root)
    names = ("descriptions", "img_cache4", "following_cache4", "train_seen_unseen_ids")
    paths = [_there(root, f"{name}.npy") for name in names]
    descriptions, first, others, ids = map(plain_npy, paths)
    if not isinstance(descriptions, dict):
        raise FileError(f"{files.shown(paths[0])} holds no descriptions by image")
    try:
        chosen = ids[SPLITS.index(split)]
        rows = [(int(i), [_text(first[i]), *map(_text, others[i])]) for i in chosen]
    except (LookupError, TypeError, ValueError) as error:
        raise FileError(f"{files.shown(paths[3])} doesn't fit {files.shown(paths[1])} and "
                        f"{files.shown(paths[2])}: {error}") from error  # fmt: skip
    return _kept(_pororo(rows, descriptions, root, paths[0]), files.shown(paths[3]))


def _pororo(rows, descriptions: dict, root: pathlib.Path, path: str) -> Iterator[Story]:
    for number, clips in rows:
        frames = []
        for clip in clips:
            where = f"{files.shown(path)}, {files.shown(clip)}"
            given = descriptions.get(clip.removesuffix(".png"))
            if not given or not isinstance(given[0], str):
                raise FileError(f"{where}: no description of the image")
            frames.append(Frame(with_names(given[0], PORORO), _inside(root, clip, where)))
        yield Story(str(number), tuple(frames))


def _text(name) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def with_names(text: str, names: Sequence[str]) -> str:
    """The caption in lower case, on one line, but for the names of characters."""
    text = " ".join(text.lower().split())
    names = {name.lower(): name for name in names}
    return re.sub(rf"\b({'|'.join(names)})\b", lambda found: names[found[0]], text)


# ---- FlintstonesSV


def flintstones(root: str, split: str) -> Stories:
    """The stories of a split.

    Raises:
        FileError: a file is missing or damaged, or no story is left.
    """
    root = pathlib.Path(root)
    path = _there(root, "train-val-test_split.json")
    table = reading.required(reading.json_file(path, dict), files.shown(path), *SPLITS)
    for name in SPLITS:
        reading.text_list(table[name], f"{files.shown(path)}, {name}")
    path = _there(root, "flintstones_annotations_v1-0.json")
    texts = {}
    for number, row in enumerate(reading.json_file(path, list)):
        where = f"{files.shown(path)}[{number}]"
        row = reading.required(row, where, texts=("globalID", "description"))
        texts[row["globalID"]] = row["description"]
    return _kept(_flintstones(table, split, texts, root, path), files.shown(path))


def _flintstones(table, split: str, texts: dict, root: pathlib.Path, path: str) -> Iterator[Story]:
    every = sorted(id for name in SPLITS for id in table[name])
    place = {id: k for k, id in enumerate(every)}
    for id in table[split]:
        clips = every[place[id] : place[id] + FRAMES]
        if len(clips) < FRAMES or len({_episode(clip) for clip in clips}) > 1:
            continue  # the episode ends before
        frames = []
        for clip in clips:
            where = f"{files.shown(path)}, {files.shown(clip)}"
            if clip not in texts:
                raise FileError(f"{where}: no description of the clip")
            image = _inside(root / "video_frames_sampled_png", f"{clip}.png", where)
            if not pathlib.Path(image).is_file():
                image = _inside(root / "video_frames_sampled", f"{clip}.npy", where)
            frames.append(Frame(with_names(texts[clip], FLINTSTONES), image))
        yield Story(id, tuple(frames))


def _episode(clip: str) -> tuple[str, ...]:
    """Season and episode of "s_01_e_02_shot_003_…"."""
    return tuple(clip.split("_")[1:4:2])


READERS: dict[str, Callable[[str, str], Stories]] = {
    "vist": vist, "pororo": pororo, "flintstones": flintstones,
}  # fmt: skip


# ---- clips


def tiles(path: str) -> int:
    """How many frames a clip has.

    Raises:
        FileError: the file can't be read, or isn't a column of square frames.
    """
    if path.endswith(".npy"):
        return len(_sampled(path))
    files.regular(path)
    try:
        with Image.open(path) as image:
            width, height = image.size
    except OSError as error:
        raise FileError(f"{files.shown(path)} is not an image: {error}") from error
    return _count(width, height, path)


def _count(width: int, height: int, path: str) -> int:
    if width != TILE or height < TILE or height % TILE:
        raise FileError(f"{files.shown(path)}: {width} x {height} pixels, expected frames of "
                        f"{TILE} one below the other")  # fmt: skip
    return height // TILE


def _sampled(path: str) -> np.ndarray:
    """uint8[T, 128, 128, 3] of a .npy file."""
    files.regular(path)
    try:
        frames = np.load(path, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise FileError(f"{files.shown(path)} is not an array: {error}") from error
    if frames.ndim != 4 or frames.shape[1:] != (TILE, TILE, 3) or not len(frames):
        raise FileError(f"{files.shown(path)}: {frames.shape}, expected [T, {TILE}, {TILE}, 3]")
    return frames.astype(np.uint8)


def frame_of(path: str, number: int) -> Image.Image:
    """One frame of a clip; raises as `tiles`."""
    if path.endswith(".npy"):
        return Image.fromarray(_sampled(path)[number])
    return images.decode(images.read_bytes(path), path).crop(box_of(number))


def box_of(number: int) -> tuple[int, int, int, int]:
    """Where frame `number` is in a clip's image."""
    return 0, number * TILE, TILE, (number + 1) * TILE


def strip(path: str) -> Image.Image:
    """The frames of a .npy clip one below the other."""
    frames = _sampled(path)
    return Image.fromarray(frames.reshape(-1, TILE, 3))

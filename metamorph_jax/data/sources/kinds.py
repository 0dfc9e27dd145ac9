"""From a record to a `Sample`: how each kind of data is recognised and laid out.

| kind     | recognised by                                    | images              |
|----------|--------------------------------------------------|---------------------|
| text     | no `image`                                       | none                |
| images   | `image` is a list                                | all, in order       |
| video_qa | `image` is a video                               | a frame each second |
| image    | any other `image` (questions and answers, pairs) | that one            |

A recipe may bring kinds of its own (`recipe.KINDS`); they are asked first.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

from metamorph_jax.data.sources import video
from metamorph_jax.data.sources.base import IMAGE, ImageRef, Sample, Turn, confined
from metamorph_jax.errors import BadSample

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Files:
    """Where the images of a source are, and how much of a video is taken.

    Attributes:
        root: folder that their paths are relative to and must stay in.
        max_frames: frames of a video.
    """

    root: str
    max_frames: int = 45

    def image(self, path: str, **part) -> ImageRef:
        """The image, or the part of it that `ImageRef` can name, at a path of a record."""
        return ImageRef(confined(self.root, path), **part)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of record. Both are functions of a module, so that worker processes have them.

    Attributes:
        matches: whether a record is of this kind.
        build: (record, files, random generator) -> (turns, images). Files are touched only to
            learn the length of a video.
    """

    matches: Callable[[dict], bool]
    build: Callable[[dict, Files, np.random.Generator], tuple[tuple[Turn, ...], tuple]]


def paths_of(record: dict) -> list[str]:
    """The paths in `image`, whether it is one, a list or missing."""
    image = record.get("image")
    return list(image) if isinstance(image, (list, tuple)) else [image] if image else []


def turns_of(record: dict) -> tuple[Turn, ...]:
    """The turns with our role names; a leading answer is dropped, then roles must alternate."""
    conversation = record.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise BadSample("bad_record", f"{record.get('id')}: no conversations")
    turns = []
    for turn in conversation:
        role = ROLES.get(turn.get("from")) if isinstance(turn, dict) else None
        text = turn.get("value") if isinstance(turn, dict) else None
        if role is None or not isinstance(text, str):
            raise BadSample("bad_record", f"{record.get('id')}: a turn needs `from` and `value`")
        turns.append((role, text))
    if turns[0][0] == "assistant":
        turns = turns[1:]
    for k, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[k % 2]:
            raise BadSample("bad_roles", f"{record.get('id')}: turn {k} is by {role}")
    if not turns:
        raise BadSample("bad_record", f"{record.get('id')}: nothing but an answer")
    return tuple(turns)


def is_text(record: dict) -> bool:
    return not record.get("image")


def is_list(record: dict) -> bool:
    return isinstance(record.get("image"), (list, tuple)) and not is_text(record)


def is_video(record: dict) -> bool:
    return not is_text(record) and not is_list(record) and video.is_video(str(record["image"]))


def is_image(record: dict) -> bool:
    return not (is_text(record) or is_list(record) or is_video(record))


def conversation(record: dict, files: Files, rng: np.random.Generator):
    """The record's turns as they are, with all of its images."""
    turns = turns_of(record)
    return turns, tuple(files.image(path) for path in paths_of(record))


def video_conversation(record: dict, files: Files, rng: np.random.Generator):
    """The record's turns, with a frame of each second before the first question."""
    path = files.image(paths_of(record)[0]).path
    indices = video.frame_indices(video.probe(path), 1.0, files.max_frames)
    turns = turns_of(record)
    clean = tuple((role, re.sub(r"<(image|video)>\s*", "", text)) for role, text in turns)
    first = (clean[0][0], IMAGE * len(indices) + clean[0][1])
    return (first, *clean[1:]), tuple(ImageRef(path, frame=i) for i in indices)


KINDS: Mapping[str, Kind] = {
    "text": Kind(is_text, conversation),
    "images": Kind(is_list, conversation),
    "video_qa": Kind(is_video, video_conversation),
    "image": Kind(is_image, conversation),
}


def known(kinds: Mapping[str, Kind]) -> dict[str, Kind]:
    """A recipe's kinds, which are asked first and may replace ours, and ours."""
    return {**kinds, **{name: kind for name, kind in KINDS.items() if name not in kinds}}


def recognise(record: dict, kinds: Mapping[str, Kind] = KINDS) -> str:
    """Name of the first kind that a record matches."""
    return next(name for name, kind in kinds.items() if kind.matches(record))


def build(
    record: dict,
    source: str,
    files: Files,
    rng: np.random.Generator,
    kind: str = "auto",
    kinds: Mapping[str, Kind] = KINDS,
) -> Sample:
    """The sample of a record, as `kind` or, with "auto", as the first kind that it matches."""
    if kind != "auto" and kind not in kinds:
        raise ValueError(f"unknown kind {kind!r}: expected one of auto, {', '.join(kinds)}")
    try:
        turns, images = kinds[recognise(record, kinds) if kind == "auto" else kind].build(
            record, files, rng
        )
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise BadSample("bad_record", f"{record.get('id')}: {type(e).__name__} {e}") from e
    return Sample(str(record.get("id", "")), source, turns, images)

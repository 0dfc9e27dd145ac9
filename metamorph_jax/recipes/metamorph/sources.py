"""Kinds of records that MetaMorph is trained on besides the common ones (`data/sources/kinds.py`).

| kind             | recognised by                            | images                       |
|------------------|------------------------------------------|------------------------------|
| vstar            | an `image`, and "vstar" in the id        | the image, and it with boxes |
| visual_cot       | a list whose first path has "visual_cot" | the image and a crop         |
| frame_prediction | a video without "k700" in the id         | frames at a random step      |

Videos with "k700" in the id are questions about the video, as common videos are.
"""

import re

import numpy as np

from metamorph_jax.data.sources import video
from metamorph_jax.data.sources.base import IMAGE, ImageRef
from metamorph_jax.data.sources.kinds import (
    Files,
    Kind,
    is_list,
    is_text,
    is_video,
    paths_of,
    turns_of,
)
from metamorph_jax.errors import BadSample
from metamorph_jax.recipes.metamorph import wordings

_BOX_SENTENCE = re.compile(r"[^.?!\n]*\bbounding box\b.*", re.IGNORECASE | re.DOTALL)
_FOCUS_SENTENCE = re.compile(r"[^.?!\n]*\bfocus on\b.*", re.IGNORECASE | re.DOTALL)
_CROP = re.compile(r"^(.*)###\s*\[([^\]]*)\]\s*$", re.DOTALL)


def is_vstar(record: dict) -> bool:
    return not is_text(record) and "vstar" in str(record.get("id", "")).lower()


def is_visual_cot(record: dict) -> bool:
    return is_list(record) and "visual_cot" in str(record["image"][0])


def is_prediction(record: dict) -> bool:
    return is_video(record) and "k700" not in str(record.get("id", "")).lower()


def vstar(record: dict, files: Files, rng: np.random.Generator):
    """The question, then the image with the objects in question boxed, then the answer."""
    path = files.image(paths_of(record)[0]).path
    turns = turns_of(record)
    marks = tuple(
        (str(t["name"]), tuple(float(v) for v in t["bbox"])) for t in record["target_instances"]
    )
    if not marks or any(len(box) != 4 or not np.isfinite(box).all() for _, box in marks):
        raise BadSample("bad_boxes", f"{record.get('id')}: expected name and bbox [x, y, w, h]")
    question = _FOCUS_SENTENCE.sub("", turns[0][1]).rstrip()
    names = wordings.name_list([name for name, _ in marks])
    human = wordings.choose(wordings.THINK_BOXES, rng) + _with_marker(question)
    gpt = wordings.BOXES_FOUND.format(names=names) + IMAGE + wordings.BOXES_LINK + turns[1][1]
    return (("user", human), ("assistant", gpt)), (ImageRef(path), ImageRef(path, marks=marks))


def visual_cot(record: dict, files: Files, rng: np.random.Generator):
    """The question, then a crop of the region that helps, then the answer."""
    turns, paths = turns_of(record), paths_of(record)
    question = _BOX_SENTENCE.sub("", turns[0][1]).rstrip()
    answer = turns[3][1]  # 0 asks with boxes, 1 gives the box, 2 repeats, 3 is the answer
    match = _CROP.match(paths[1])
    if match is None:
        raise BadSample("bad_crop", f"{paths[1]!r}: expected path###[x1,y1,x2,y2]")
    try:
        x1, y1, x2, y2 = (float(v) for v in match.group(2).split(","))
    except ValueError as e:
        raise BadSample("bad_crop", paths[1]) from e
    if not (np.isfinite([x1, y1, x2, y2]).all() and x2 > x1 and y2 > y1):
        raise BadSample("bad_crop", paths[1])
    images = files.image(paths[0]), files.image(match.group(1), box=(x1, y1, x2, y2))
    human = wordings.choose(wordings.THINK_HUMAN, rng) + _with_marker(question)
    gpt = wordings.choose(wordings.THINK_GPT, rng) + f" {IMAGE} " + answer
    return (("user", human), ("assistant", gpt)), images


def frame_prediction(record: dict, files: Files, rng: np.random.Generator):
    """A made question that asks for frames of the video, and the frames as its answer."""
    path = files.image(paths_of(record)[0]).path
    info = video.probe(path)
    step = random_step(info, rng)
    indices = video.frame_indices(info, step, files.max_frames)
    if len(indices) < 2:
        raise BadSample("short_video", f"{path}: {len(indices)} frame at a step of {step} s")
    question, answer, which = wordings.frame_prediction(len(indices), step, rng)
    images = tuple(ImageRef(path, frame=indices[k]) for k in which)
    return (("user", question), ("assistant", answer)), images


def random_step(info: video.VideoInfo, rng: np.random.Generator) -> float:
    """Seconds between frames: uniform from max(2/fps, 0.1) to half the video, at most 10."""
    low = max(2 / info.fps, 0.1)
    return round(float(rng.uniform(low, min(10.0, max(info.length / 2, low)))), 1)


def _with_marker(text: str) -> str:
    """The text with exactly one marker: its own, or one put in front."""
    return text if IMAGE in text else f"{IMAGE}\n{text}"


KINDS = {
    "vstar": Kind(is_vstar, vstar),
    "visual_cot": Kind(is_visual_cot, visual_cot),
    "frame_prediction": Kind(is_prediction, frame_prediction),
}

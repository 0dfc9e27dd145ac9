"""Kinds of records that MetaMorph is trained on besides the common ones (`data/sources/kinds.py`).

| kind             | recognised by                      | images                       |
|------------------|------------------------------------|------------------------------|
| vstar            | `kind` of the record or its source | the image, and it with boxes |
| visual_cot       | `kind` of the record or its source | the image and a crop         |
| frame_prediction | the same, or a video about which   | frames at a random step      |
|                  | nothing is asked and nothing said  |                              |

All three write another conversation than the record has, so a name that looks like one of them is
not enough (the reference looks for "vstar" in ids, "visual_cot" in paths, and takes each video
without "k700" in its id for frame prediction).
"""

import numpy as np

from metamorph_jax.data.sources import video
from metamorph_jax.data.sources.base import IMAGE, ImageRef
from metamorph_jax.data.sources.kinds import (
    Files,
    Kind,
    is_video,
    paths_of,
    turns_of,
)
from metamorph_jax.errors import BadSample
from metamorph_jax.files import shown
from metamorph_jax.recipes.metamorph import wordings

MAX_MARKS = 1000
MAX_NAME = 200


def by_name_only(record: dict) -> bool:
    """For kinds that a record or its source must ask for."""
    return False


def is_prediction(record: dict) -> bool:
    said = record.get("conversations") or ()
    return is_video(record) and not any(turn["value"].strip() for turn in said)


def before_sentence(text: str, phrase: str) -> str:
    """The text up to the first sentence that has the phrase (in any case), without blanks after."""
    lower = text.lower() if text.isascii() else "".join(c.lower()[0] for c in text)
    at = lower.find(phrase)
    if at < 0:
        return text.rstrip()
    return text[: max(text.rfind(end, 0, at) for end in ".?!\n") + 1].rstrip()


def vstar(record: dict, files: Files, rng: np.random.Generator):
    """The question, then the image with the objects in question boxed, then the answer."""
    path = files.image(paths_of(record)[0]).path
    turns = turns_of(record)
    marks = tuple(
        (str(t["name"]), tuple(float(v) for v in t["bbox"])) for t in record["target_instances"]
    )
    if not marks or any(len(box) != 4 or not np.isfinite(box).all() for _, box in marks):
        raise BadSample("bad_boxes", "expected name and bbox [x, y, w, h] in `target_instances`")
    if len(marks) > MAX_MARKS or any(len(name) > MAX_NAME for name, _ in marks):
        raise BadSample(
            "bad_boxes", f"more than {MAX_MARKS} boxes, or {MAX_NAME} letters in a name"
        )
    question = before_sentence(turns[0][1], "focus on")
    names = wordings.name_list([name for name, _ in marks])
    human = wordings.choose(wordings.THINK_BOXES, rng) + _with_marker(question)
    gpt = wordings.BOXES_FOUND.format(names=names) + IMAGE + wordings.BOXES_LINK + turns[1][1]
    return (("user", human), ("assistant", gpt)), (ImageRef(path), ImageRef(path, marks=marks))


def visual_cot(record: dict, files: Files, rng: np.random.Generator):
    """The question, then a crop of the region that helps, then the answer."""
    turns, paths = turns_of(record), paths_of(record)
    question = before_sentence(turns[0][1], "bounding box")
    answer = turns[3][1]  # 0 asks with boxes, 1 gives the box, 2 repeats, 3 is the answer
    cut, _, corners = paths[1].rpartition("###")
    bad = BadSample("bad_crop", f"{shown(repr(paths[1]))}: expected path###[x1,y1,x2,y2]")
    corners = corners.strip()
    if not (corners.startswith("[") and corners.endswith("]")):
        raise bad
    try:
        x1, y1, x2, y2 = (float(v) for v in corners[1:-1].split(","))
    except ValueError as e:
        raise bad from e
    if not (np.isfinite([x1, y1, x2, y2]).all() and x2 > x1 and y2 > y1):
        raise bad
    images = files.image(paths[0]), files.image(cut, box=(x1, y1, x2, y2))
    wording = wordings.choose(wordings.THINK_HUMAN, rng)
    human = wordings.look_first(_with_marker(question), wording)
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
    question, answer, which = wordings.frame_prediction(len(indices), step, rng, files.max_frames)
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
    "vstar": Kind(by_name_only, vstar),
    "visual_cot": Kind(by_name_only, visual_cot),
    "frame_prediction": Kind(is_prediction, frame_prediction),
}

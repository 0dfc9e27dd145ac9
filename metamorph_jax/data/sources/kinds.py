"""From a record to a `Sample`: how each kind of data is recognised and laid out.

| kind             | recognised by                                   | pictures                  |
|------------------|-------------------------------------------------|---------------------------|
| text             | no `image`                                      | none                      |
| image            | `image` is a path (questions and answers, pairs)| that one                  |
| images           | `image` is a list                               | all, in order             |
| video_qa         | a video, and "k700" in the id                   | a frame each second       |
| frame_prediction | any other video                                 | frames at a random step   |
| visual_cot       | a list whose first path has "visual_cot"        | the picture and a crop    |
| vstar            | "vstar" in the id                               | the picture, and boxed    |
"""

import re

import numpy as np

from metamorph_jax.data.sources import templates, video
from metamorph_jax.data.sources.base import IMAGE, ImageRef, Sample, Turn, confined
from metamorph_jax.errors import BadSample

KINDS = ("text", "image", "images", "video_qa", "frame_prediction", "visual_cot", "vstar")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

_BOX_SENTENCE = re.compile(r"[^.?!\n]*\bbounding box\b.*", re.IGNORECASE | re.DOTALL)
_FOCUS_SENTENCE = re.compile(r"[^.?!\n]*\bfocus on\b.*", re.IGNORECASE | re.DOTALL)
_CROP = re.compile(r"^(.*)###\s*\[([^\]]*)\]\s*$", re.DOTALL)


def recognise(record: dict) -> str:
    image = record.get("image")
    if not image:
        return "text"
    id_ = str(record.get("id", "")).lower()
    if "vstar" in id_:
        return "vstar"
    if isinstance(image, (list, tuple)):
        return "visual_cot" if "visual_cot" in str(image[0]) else "images"
    if video.is_video(str(image)):
        return "video_qa" if "k700" in id_ else "frame_prediction"
    return "image"


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


def build(
    record: dict,
    source: str,
    root: str,
    rng: np.random.Generator,
    kind: str = "auto",
    max_frames: int = 45,
) -> Sample:
    """The sample of a record. Files are touched only to learn the length of a video."""
    kind = recognise(record) if kind == "auto" else kind
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: expected one of auto, {', '.join(KINDS)}")
    image = record.get("image")
    paths = list(image) if isinstance(image, (list, tuple)) else [image] if image else []
    try:
        if kind in ("text", "image", "images"):
            turns = turns_of(record)
            images = tuple(ImageRef(confined(root, p)) for p in paths)
        elif kind in ("video_qa", "frame_prediction"):
            turns, images = _video(record, confined(root, paths[0]), kind, rng, max_frames)
        elif kind == "visual_cot":
            turns, images = _visual_cot(record, paths, root, rng)
        else:
            turns, images = _vstar(record, confined(root, paths[0]), rng)
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise BadSample("bad_record", f"{record.get('id')}: {type(e).__name__} {e}") from e
    return Sample(str(record.get("id", "")), source, turns, images)


def _video(record, path, kind, rng, max_frames):
    info = video.probe(path)
    step = 1.0 if kind == "video_qa" else video.random_step(info, rng)
    indices = video.frame_indices(info, step, max_frames)
    if kind == "video_qa":
        turns = turns_of(record)
        clean = tuple((r, re.sub(r"<(image|video)>\s*", "", text)) for r, text in turns)
        first = (clean[0][0], IMAGE * len(indices) + clean[0][1])
        return (first, *clean[1:]), tuple(ImageRef(path, frame=i) for i in indices)
    if len(indices) < 2:
        raise BadSample("short_video", f"{path}: {len(indices)} frame at a step of {step} s")
    question, answer, which = templates.frame_prediction(len(indices), step, rng)
    images = tuple(ImageRef(path, frame=indices[k]) for k in which)
    return (("user", question), ("assistant", answer)), images


def _visual_cot(record, paths, root, rng):
    turns = turns_of(record)
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
    images = (
        ImageRef(confined(root, paths[0])),
        ImageRef(confined(root, match.group(1)), box=(x1, y1, x2, y2)),
    )
    human = templates.choose(templates.THINK_HUMAN, rng) + _with_marker(question)
    gpt = templates.choose(templates.THINK_GPT, rng) + f" {IMAGE} " + answer
    return (("user", human), ("assistant", gpt)), images


def _vstar(record, path, rng):
    turns = turns_of(record)
    marks = tuple(
        (str(t["name"]), tuple(float(v) for v in t["bbox"])) for t in record["target_instances"]
    )
    if not marks or any(len(box) != 4 or not np.isfinite(box).all() for _, box in marks):
        raise BadSample("bad_boxes", f"{record.get('id')}: expected name and bbox [x, y, w, h]")
    question = _FOCUS_SENTENCE.sub("", turns[0][1]).rstrip()
    names = templates.name_list([name for name, _ in marks])
    human = templates.choose(templates.THINK_BOXES, rng) + _with_marker(question)
    gpt = templates.BOXES_FOUND.format(names=names) + IMAGE + templates.BOXES_LINK + turns[1][1]
    return (("user", human), ("assistant", gpt)), (ImageRef(path), ImageRef(path, marks=marks))


def _with_marker(text: str) -> str:
    """The text with exactly one marker: its own, or one put in front."""
    return text if IMAGE in text else f"{IMAGE}\n{text}"

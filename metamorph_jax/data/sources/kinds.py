"""From a record to a `Sample`: how each kind of data is recognised and laid out.

| kind     | recognised by                         | images                                       |
|----------|---------------------------------------|----------------------------------------------|
| text     | no path                               | none                                         |
| images   | a list of paths                       | all, in order                                |
| video_qa | a path of a video, alone or in a list | a frame each second in place of its marker   |
| image    | one path                              | that one                                     |

The conversation of a record is always kept. A recipe may bring kinds of its own (`recipe.KINDS`),
which are asked first. Records that a recipe would lay out in another way say so: `kind` of the
record, or of its source, names the kind.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from metamorph_jax.data.sources import video
from metamorph_jax.data.sources.base import IMAGE, VIDEO, ImageRef, Sample, Turn, confined
from metamorph_jax.data.sources.schema import ROLES, canonical
from metamorph_jax.errors import BadSample
from metamorph_jax.files import shown

# What looks like a marker but is not one of ours.
_MARKER = re.compile(r"<\|?(?:image|img|video|picture|audio|frame)s?[ _-]?\d*\|?>", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Documents:
    """How documents of text and images, and images with captions, are laid out (`documents.py`).
    The defaults are MM-Interleaved's.

    Attributes:
        min_similarity: of an image of MMC4 to its sentence; others are left out.
        max_images: of a document; of more, so many are drawn by chance. 0 keeps all.
        drop_single: with this probability a document of only one image is left out.
        image_first: probability that an image comes before its sentence, or its caption.
        lower: write captions of images in lower case.
        caption: key of the caption; "" is the first of `caption`, `txt`, `text`.
        learn_before: learn the text before the first image as well; otherwise it is only read.
        drop_broken: an image of a document that can't be decoded is left out, as one that is not
            there is; otherwise the document is bad.
        cut_at, row_images: with `row.packing="concat"`, those of this source; "" and 0 take
            `row.cut_at` and `row.images`, which no source can exceed.
    """

    min_similarity: float = 0.24
    max_images: int = 6
    drop_single: float = 0.5
    image_first: float = 0.5
    lower: bool = True
    caption: str = ""
    learn_before: bool = True
    drop_broken: bool = True
    cut_at: str = ""
    row_images: int = 0

    def __post_init__(self):
        for name in ("drop_single", "image_first"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 0 to 1")
        for name in ("max_images", "row_images"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 0 (no limit) or more")
        if self.cut_at not in ("", "image", "document"):
            raise ValueError(f"cut_at is {self.cut_at!r}: expected image, document or nothing")


@dataclasses.dataclass(frozen=True)
class Files:
    """Where the images of a source are, and what else its config says about its records.

    Attributes:
        root: folder that their paths are relative to and must stay in.
        max_frames: most frames of a video.
        documents: options of documents.
        members: images that come in the same tar as the record, by name.
        record_file: the file of the record.
        blocked: paths of images that no sample may use.
        broken: images that are known not to be usable, which documents leave out.
    """

    root: str
    max_frames: int = 45
    documents: Documents = Documents()
    members: Mapping[str, ImageRef] = dataclasses.field(default_factory=dict)
    record_file: str = ""
    blocked: frozenset[str] = frozenset()
    broken: frozenset[ImageRef] = frozenset()

    def image(self, path: str, **part) -> ImageRef:
        """The image, or the part of it that `ImageRef` can name, at a path of a record."""
        if self.blocked and path in self.blocked:
            raise BadSample("blocked_image", shown(path))
        if isinstance(path, str) and path in self.members:
            return dataclasses.replace(self.members[path], **part)
        return ImageRef(confined(self.root, path), **part)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of record. Both are functions of a module, so that worker processes have them.

    Attributes:
        matches: whether a record is of this kind.
        build: (record, files, random generator) -> (turns, images). Files are touched only to
            learn the length of a video, or which images of a document are there.
        raw: the record is taken as its file has it, and not as `schema.canonical` gives it. Those
            of such a kind are recognised before all others.
        open: (path, folder for indices or None) -> records of an official file which this kind
            reads in its own way; of several samples for each entry, say. None: `open_records`.
        spares: a sample can go without some of its images: `build` leaves out `Files.broken`.
    """

    matches: Callable[[dict], bool]
    build: Callable[[dict, Files, np.random.Generator], tuple[tuple[Turn, ...], tuple]]
    raw: bool = False
    open: Callable[[str, str | None], Sequence[dict]] | None = None
    spares: bool = False


def paths_of(record: dict) -> list[str]:
    """The paths in `image`, whether it is one, a list or missing."""
    image = record.get("image")
    return list(image) if isinstance(image, (list, tuple)) else [image] if image else []


def turns_of(record: dict) -> tuple[Turn, ...]:
    """The turns but for the system's; a leading answer is dropped, then roles must alternate."""
    turns = [(ROLES[turn["from"]], turn["value"]) for turn in record.get("conversations") or ()]
    if not turns:
        raise BadSample("bad_record", "no conversations")
    if turns[0][0] == "assistant":
        turns = turns[1:]
    for k, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[k % 2]:
            raise BadSample(
                "bad_roles", f"turn {k} is by {role}: expected user and assistant in turn"
            )
    if not turns:
        raise BadSample("bad_record", "nothing but an answer")
    return tuple(turns)


def has_video(record: dict) -> bool:
    return any(video.is_video(path) for path in paths_of(record))


def is_text(record: dict) -> bool:
    return not record.get("image")


def is_list(record: dict) -> bool:
    return isinstance(record.get("image"), (list, tuple)) and not is_text(record)


def is_video(record: dict) -> bool:
    return not is_text(record) and has_video(record)


def is_images(record: dict) -> bool:
    return is_list(record) and not has_video(record)


def is_image(record: dict) -> bool:
    return not (is_text(record) or is_list(record) or is_video(record))


def conversation(record: dict, files: Files, rng: np.random.Generator):
    """The record's turns as they are, with all of its images."""
    turns = turns_of(record)
    _check_markers(turns, (IMAGE,), is_text(record))
    return turns, tuple(files.image(path) for path in paths_of(record))


def video_conversation(record: dict, files: Files, rng: np.random.Generator):
    """The record's turns, with a frame of each second of a video in place of its marker.

    The k-th marker, `<image>` or `<video>`, stands for the k-th path. A video alone may do without:
    its frames then come before the first question.
    """
    turns, refs, counts = turns_of(record), [], []
    _check_markers(turns, (IMAGE, VIDEO), False)
    for path in paths_of(record):
        found = [files.image(path)]
        if video.is_video(path):
            indices = video.frame_indices(video.probe(found[0].path), 1.0, files.max_frames)
            found = [ImageRef(found[0].path, frame=i) for i in indices]
        refs += found
        counts.append(len(found))
    markers = sum(text.count(IMAGE) + text.count(VIDEO) for _, text in turns)
    if len(counts) == 1 and not markers:
        turns = ((turns[0][0], IMAGE + turns[0][1]), *turns[1:])
    elif markers != len(counts):
        raise BadSample("marker_mismatch", f"{markers} markers, {len(counts)} images and videos")
    left = iter(counts)
    fill = lambda match: IMAGE * next(left)  # noqa: E731
    turns = tuple((role, re.sub(f"{IMAGE}|{VIDEO}", fill, text)) for role, text in turns)
    return turns, tuple(refs)


def _check_markers(turns: tuple[Turn, ...], ours: tuple[str, ...], text_only: bool) -> None:
    """BadSample for markers that mean nothing here.

    In a record without images, words like `<video>` may be about HTML: there they are markers only
    at the beginning or the end of a message.
    """
    for k, (_, text) in enumerate(turns):
        for match in _MARKER.finditer(text):
            found = match.group()
            inside = text[: match.start()].strip() and text[match.end() :].strip()
            if found not in ours and not (text_only and inside):
                raise BadSample(
                    "unknown_marker", f"turn {k}: {shown(found)!r}, expected {' or '.join(ours)}"
                )


KINDS: Mapping[str, Kind] = {
    "text": Kind(is_text, conversation),
    "images": Kind(is_images, conversation),
    "video_qa": Kind(is_video, video_conversation),
    "image": Kind(is_image, conversation),
}


def known(kinds: Mapping[str, Kind]) -> dict[str, Kind]:
    """A recipe's kinds, which are asked first and may replace ours, and ours."""
    return {**kinds, **{name: kind for name, kind in KINDS.items() if name not in kinds}}


def recognise(record: dict, kinds: Mapping[str, Kind] = KINDS) -> str:
    """Name of the first kind that a record matches."""
    return next(name for name, kind in kinds.items() if kind.matches(record))


def _raw_kind(record: dict, kind: str, kinds: Mapping[str, Kind]) -> str:
    """The kind of a record, if that is one of those which take it as it is; else ""."""
    named = record.get("kind") or kind
    if named != "auto":
        return named if isinstance(named, str) and named in kinds and kinds[named].raw else ""
    return next((name for name, k in kinds.items() if k.raw and k.matches(record)), "")


def build(
    record: dict,
    source: str,
    files: Files,
    rng: np.random.Generator,
    kind: str = "auto",
    kinds: Mapping[str, Kind] = KINDS,
    ignore: Collection[str] = (),
) -> Sample:
    """The sample of a record.

    Args:
        record: as its file has it, see `schema`.
        source: its name.
        files: where its images are.
        rng: of all random choices.
        kind: of all records of the source that don't say themselves, or "auto": the first kind
            that a record matches.
        kinds: there are.
        ignore: keys of records that are passed over.

    Raises:
        BadSample: whatever is wrong with it.
    """
    if kind != "auto" and kind not in kinds:
        raise ValueError(f"unknown kind {kind!r}: expected one of auto, {', '.join(kinds)}")
    raw = _raw_kind(record, kind, kinds)
    read = record if raw else canonical(record, ignore)
    own = raw or read.get("kind") or kind
    if not isinstance(own, str) or own not in ("auto", *kinds):
        raise BadSample(
            "unknown_kind",
            f"`kind` is {shown(own, 60)!r}, expected one of auto, {', '.join(kinds)}",
        )
    kind = recognise(read, kinds) if own == "auto" else own
    try:
        turns, images = kinds[kind].build(read, files, rng)
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as e:
        what = f"{type(e).__name__} {shown(e)}"
        raise BadSample("bad_record", f"not a record of kind {kind}: {what}") from e
    if "system" in read and not raw and turns[0][0] != "system":
        turns = (("system", read["system"]), *turns)
    spares = kinds[kind].spares and files.documents.drop_broken
    return Sample(str(record.get("id", "")), source, turns, images, kind, spares=spares)

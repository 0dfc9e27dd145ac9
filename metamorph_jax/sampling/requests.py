"""Requests to a generator: prompts, and the images that go with them."""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from metamorph_jax import files
from metamorph_jax.data import images
from metamorph_jax.data.chat import LONGEST
from metamorph_jax.data.config import MAX_FRAMES
from metamorph_jax.data.sources import kinds, video
from metamorph_jax.data.sources.base import IMAGE, VIDEO, Sample, Turn
from metamorph_jax.errors import BadSample

KEYS = ("id", "prompt", "image", "images", "video", "think")
LONGEST_ID = 1000
# What is wrong with one request; the others can be answered.
FAULTS = (BadSample, ValueError, OSError, ImportError)


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        id: names the reply, and its files.
        prompt: text; images stand where it has `<image>`, a video where it has `<video>`, else they
            come before it.
        images: files; video: a file, of which one frame a second is read.
        think: ask the model to draw the relevant detail before it answers.
        sample: number of this reply among those to the same prompt, each drawn by chance.
        before: turns that come first, without images: a system message, questions with answers.
    """

    id: str
    prompt: str
    images: tuple[str, ...] = ()
    video: str = ""
    think: bool = False
    sample: int = 0
    before: tuple[Turn, ...] = ()

    @property
    def name(self) -> str:
        """What messages call it, ready to be printed."""
        return files.shown(self.id) + (f" (sample {self.sample})" if self.sample else "")


def checked(request: Request) -> Request:
    """The request, if its texts are texts.

    Raises:
        ValueError: the prompt is empty or far too long, a text holds half of a surrogate pair, or
            the video's name is not that of a video.
    """
    for what in ("id", "prompt", "video"):
        if not isinstance(getattr(request, what), str):
            raise ValueError(f"{what} must be text")
    for text in (request.id, request.prompt):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("a text has half of a surrogate pair (\\ud800 … \\udfff)") from None
    if len(request.prompt) > LONGEST:
        raise ValueError(f"the prompt has {len(request.prompt)} characters, at most {LONGEST}")
    if not (request.prompt.strip() or request.images or request.video):
        raise ValueError("the prompt is empty")
    if not all(isinstance(path, str) and path for path in request.images):
        raise ValueError("an image must be a path")
    if request.video and not video.is_video(request.video):
        ends = ", ".join(video.EXTENSIONS)
        raise ValueError(f"{files.shown(request.video)} is not the name of a video ({ends})")
    return request


# ---- files of prompts


def read_requests(path: str, think: bool = False) -> tuple[list[Request], int]:
    """(requests of a JSONL file, how many lines were bad and reported).

    Raises:
        FileError: it can't be read, or is not UTF-8.
    """
    folder, where = pathlib.Path(path).parent, files.shown(path)
    found, bad, ids = [], 0, set()
    for number, line in files.lines(path):
        if not line.strip():
            continue
        try:
            value = files.parse(line, "the line", dict, unique=True)
            request = checked(_request(value, number, folder, think))
            if request.id in ids:
                raise ValueError(f"id {files.shown(request.id)!r} appears twice")
        except ValueError as error:  # FileError is one
            print(f"{where}, line {number}: {error}; skipped", file=sys.stderr)
            bad += 1
            continue
        ids.add(request.id)
        found.append(request)
    return found, bad


def _request(value: dict, number: int, folder: pathlib.Path, think: bool) -> Request:
    if not isinstance(value.get("prompt"), str):
        raise ValueError('expected {"prompt": "…"}')
    unknown = value.keys() - {*KEYS}
    if unknown:
        raise ValueError(f"unknown key {files.shown(', '.join(sorted(unknown)))}")
    if "image" in value and "images" in value:
        raise ValueError("both image and images: put all paths into images")
    given = value.get("images", value.get("image", []))
    paths = [given] if isinstance(given, str) else given
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError("images must be a list of paths")
    clip = value.get("video", "")
    if not isinstance(clip, str):
        raise ValueError("video must be a path")
    thinks = value.get("think", think)
    if not isinstance(thinks, bool):
        raise ValueError("think must be true or false")
    return Request(
        _id(value.get("id", number)),
        value["prompt"],
        tuple(str(folder / path) for path in paths),
        str(folder / clip) if clip else "",
        thinks,
    )


def _id(value) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("id must be text or a whole number")
    text = str(value)
    if not text or len(text) > LONGEST_ID:
        raise ValueError(f"id must have 1 to {LONGEST_ID} characters")
    return text


# ---- as records of training


def as_sample(
    request: Request, think: Callable[[str], str] | None = None, frames: int = MAX_FRAMES
) -> Sample:
    """The request as a sample without an answer, laid out by the functions that training uses.

    Args:
        think: asks for the relevant detail before the question, for requests that want it.
        frames: most frames of a video.

    Raises:
        BadSample: markers and files don't match, or a video can't be read.
        ValueError: see `checked`.
    """
    request = checked(request)
    text = place(request)
    if request.think and think is not None:
        text = think(text)
    paths = [*request.images, *([request.video] if request.video else ())]
    turns = [{"from": role, "value": said} for role, said in (*request.before, ("user", text))]
    record = {"id": request.id, "conversations": turns}
    if paths:
        record["image"] = [os.path.abspath(path) for path in paths]
    where = kinds.Files(os.path.abspath(os.sep), frames)  # a user may name any file
    made = kinds.build(record, "", where, np.random.default_rng(0))
    return made.checked(max(len(made.images), 1))


def place(request: Request) -> str:
    """The prompt with a marker for each image and video: its own, or else before it."""
    text, count = request.prompt, len(request.images)
    if IMAGE in text or VIDEO in text:
        return text
    clip = VIDEO if request.video else ""
    return f"{IMAGE * count}{clip}\n{text}" if count else clip + text


def check_files(
    requests: Iterable[Request], failed: Callable[[Request, Exception], None]
) -> Iterator[Request]:
    """The requests whose files are there and are images and videos, by their headers.

    Args:
        failed: told about the others.
    """
    for request in requests:
        try:
            images.sizes(as_sample(request).images)
        except FAULTS as error:
            failed(request, error)
        else:
            yield request

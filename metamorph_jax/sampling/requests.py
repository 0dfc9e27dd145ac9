"""Requests to a generator: prompts, and the images that go with them."""

import dataclasses
import pathlib
import sys

from metamorph_jax import files
from metamorph_jax.data.sources.base import IMAGE, ImageRef


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        id: names the reply, and its files.
        prompt: text; images stand where it has `<image>`, else before it.
        images: files; video: a file, of which one frame a second is read.
        think: ask the model to draw the relevant detail before it answers.
    """

    id: str
    prompt: str
    images: tuple[str, ...] = ()
    video: str = ""
    think: bool = False


def read_requests(path: str, think: bool = False) -> tuple[list[Request], int]:
    """(requests of a JSONL file, how many lines were bad and reported).

    Raises:
        FileError: it can't be read, or is not UTF-8.
    """
    folder = pathlib.Path(path).parent
    found, bad, ids = [], 0, set()
    for number, line in files.lines(path):
        if not line.strip():
            continue
        where = f"{files.shown(path)}, line {number}"
        try:
            request = _request(files.parse(line, where), number, folder, think)
            if request.id in ids:
                raise ValueError(f"id {files.shown(repr(request.id))} appears twice")
        except ValueError as error:  # FileError is one
            said = files.shown(str(error).removeprefix(where).lstrip(" :,"))
            print(f"{where}: {said}; skipped", file=sys.stderr)
            bad += 1
            continue
        ids.add(request.id)
        found.append(request)
    return found, bad


def _request(value, number: int, folder: pathlib.Path, think: bool) -> Request:
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise ValueError('expected {"prompt": "…"}')
    unknown = value.keys() - {"id", "prompt", "image", "images", "video", "think"}
    if unknown:
        raise ValueError(f"unknown key {', '.join(sorted(unknown))}")
    images = value.get("images", value.get("image")) or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(i, str) for i in images):
        raise ValueError("images must be a list of paths")
    video = value.get("video") or ""
    if not isinstance(video, str):
        raise ValueError("video must be a path")
    return Request(
        str(value.get("id", number)),
        value["prompt"],
        tuple(str(folder / i) for i in images),
        str(folder / video) if video else "",
        bool(value.get("think", think)),
    )


def place_images(text: str, count: int) -> str:
    """The prompt with one `<image>` for each image: where it has them, else before it."""
    markers = text.count(IMAGE)
    if not markers:
        return IMAGE * count + "\n" + text if count else text
    if markers != count:
        raise ValueError(
            f"the prompt has {markers} {IMAGE} markers, but {count} images are given"
        )
    return text


def image_refs(request: Request) -> list[ImageRef]:
    refs = [ImageRef(path) for path in request.images]
    if request.video:
        from metamorph_jax.data.sources import video

        info = video.probe(request.video)
        frames = video.frame_indices(info, 1.0)
        refs += [ImageRef(request.video, frame=i) for i in frames]
    return refs

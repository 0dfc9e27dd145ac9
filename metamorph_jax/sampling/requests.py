"""Requests to a generator: prompts, and the images that go with them."""

import dataclasses
import functools
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from metamorph_jax import files
from metamorph_jax.data import images
from metamorph_jax.data.chat import LONGEST
from metamorph_jax.data.chat_templates import SOURCE
from metamorph_jax.data.config import MAX_FRAMES
from metamorph_jax.data.sources import kinds, video
from metamorph_jax.data.sources.base import IMAGE, VIDEO, Sample, Turn
from metamorph_jax.errors import BadSample

KEYS = (
    "id", "prompt", "image", "images", "video", "think", "mode", "rounds", "literal", "confirm",
)  # fmt: skip
MODES = ("text", "image", "both")
LONGEST_ID = 1000
MOST_ROUNDS = 1000
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
        mode: what is asked for, of `MODES`, where the model doesn't decide it on its own; "" leaves
            it to the model.
        rounds: with mode "both", how many times text or an image is added; 0 for no limit.
        literal: the prompt is all that the model reads, in a wording of its own: no chat template
            is put around it. Without `before`.
        confirm: questions to which "yes" is the answer if an image is right, for the best of
            several samples (`sampling/best_of.py`); (): one that is made of the prompt.
    """

    id: str
    prompt: str
    images: tuple[str, ...] = ()
    video: str = ""
    think: bool = False
    sample: int = 0
    before: tuple[Turn, ...] = ()
    mode: str = ""
    rounds: int = 0
    literal: bool = False
    confirm: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What messages call it, ready to be printed."""
        return files.shown(self.id) + (f" (sample {self.sample})" if self.sample else "")


def checked(request: Request) -> Request:
    """The request, if its texts are texts.

    Raises:
        ValueError: the prompt or a question is empty or far too long, a text holds half of a
            surrogate pair, or the video's name is not that of a video.
    """
    for what in ("id", "prompt", "video"):
        if not isinstance(getattr(request, what), str):
            raise ValueError(f"{what} must be text")
    for text in (request.id, request.prompt, *request.confirm):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("a text has half of a surrogate pair (\\ud800 … \\udfff)") from None
    for question in request.confirm:
        if not question.strip() or len(question) > LONGEST or question.count(IMAGE) > 1:
            raise ValueError(f"a question to confirm an image by has at most one {IMAGE}, and a "
                             f"text of 1 to {LONGEST} characters")  # fmt: skip
    if len(request.prompt) > LONGEST:
        raise ValueError(f"the prompt has {len(request.prompt)} characters, at most {LONGEST}")
    if request.literal and (request.before or request.video):
        raise ValueError("a literal prompt has no turns before it, and no video")
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
    """(requests of a JSONL file, or of a .json file as `annotation` has it; how many were bad and
    reported).

    Raises:
        FileError: it can't be read, or is not UTF-8; or a .json file is not a list of objects.
    """
    where = files.shown(path)
    found, bad, ids = [], 0, set()
    for place, read in _each(path, think):
        try:
            request = checked(read())
            if request.id in ids:
                raise ValueError(f"id {files.shown(request.id)!r} appears twice")
        except ValueError as error:  # FileError is one
            print(f"{where}, {place}: {error}; skipped", file=sys.stderr)
            bad += 1
            continue
        ids.add(request.id)
        found.append(request)
    return found, bad


def _each(path: str, think: bool) -> Iterator[tuple[str, Callable[[], Request]]]:
    """(where it stands, a function that reads it) of every request of a file."""
    folder = pathlib.Path(path).parent
    if path.endswith(".json"):
        for k, value in enumerate(files.read_json(path, list, what="a list of records")):
            yield f"record {k}", functools.partial(annotation, value, k, folder)
        return
    for number, line in files.lines(path):
        if line.strip():
            yield f"line {number}", functools.partial(_of_line, line, number, folder, think)


def _of_line(line: str, number: int, folder: pathlib.Path, think: bool) -> Request:
    return _request(files.parse(line, "the line", dict, unique=True), number, folder, think)


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
    literal = value.get("literal", False)
    if not isinstance(literal, bool):
        raise ValueError("literal must be true or false")
    return Request(
        _id(value.get("id", number)),
        value["prompt"],
        tuple(str(folder / path) for path in paths),
        str(folder / clip) if clip else "",
        thinks,
        mode=_mode(value.get("mode", "")),
        rounds=_rounds(value.get("rounds", 0)),
        literal=literal,
        confirm=_questions(value.get("confirm", [])),
    )


def _questions(value) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise ValueError("confirm must be a question or a list of them")
    return tuple(given)


def _mode(value) -> str:
    if value not in ("", *MODES):
        raise ValueError(f"mode is {files.shown(repr(value), 40)}, expected {', '.join(MODES)}")
    return value


def _rounds(value) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_ROUNDS:
        raise ValueError(f"rounds must be a whole number of 0 to {MOST_ROUNDS}")
    return value


# ---- MM-Interleaved's file of prompts: sentences and images apart from each other

_ANNOTATION = (
    "id", "sentences", "images", "sentence_ixs", "image_first", "generate_mode", "num_iter",
)  # fmt: skip
_GENERATE = {
    **dict.fromkeys(("text", "texts", "generate_text", "generate_texts"), "text"),
    **dict.fromkeys(("image", "images", "generate_image", "generate_images"), "image"),
    **dict.fromkeys(("both", "generate_both", "interleaved"), "both"),
}


def annotation(value, number: int, folder: pathlib.Path) -> Request:
    """The request of one record of an `annt.json`.

    {"sentences": ["A kite.", "It falls."], "images": ["kite.png"], "sentence_ixs": [0],
     "image_first": true, "generate_mode": "generate_both", "num_iter": 4}

    Sentence k has the images whose `sentence_ixs` is k before it (`image_first`, of all images or
    of each) or after it. Blanks join sentences, but none stand beside an image.

    Args:
        value: of the record.
        number: of the record from 0, its id if it has none.
        folder: that its paths are relative to.

    Raises:
        ValueError: naming the field, and what was expected.
    """
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    unknown = value.keys() - {*_ANNOTATION}
    if unknown:
        raise ValueError(f"unknown key {files.shown(', '.join(sorted(unknown)))}")
    sentences = _texts(value, "sentences")
    paths = _texts(value, "images")
    if any(IMAGE in sentence or VIDEO in sentence for sentence in sentences):
        raise ValueError(f"sentences must not have {IMAGE}: images are placed by sentence_ixs")
    places, first = value.get("sentence_ixs", []), value.get("image_first", False)
    whole = all(isinstance(k, int) and not isinstance(k, bool) for k in _list(places))
    if not isinstance(places, list) or not whole or len(places) != len(paths):
        raise ValueError(f"sentence_ixs must be a list of {len(paths)} numbers, one for each image")
    if not all(0 <= k < len(sentences) for k in places):
        raise ValueError(f"sentence_ixs must be 0 to {len(sentences) - 1}, of the sentences")
    first = first if isinstance(first, list) else [first] * len(paths)
    if len(first) != len(paths) or not all(isinstance(one, bool) for one in first):
        raise ValueError("image_first must be true or false, or a list of it for each image")
    mode = value.get("generate_mode", "")
    if mode != "" and (not isinstance(mode, str) or mode not in _GENERATE):
        raise ValueError(
            f"generate_mode is {files.shown(repr(mode), 40)}, expected generate_texts, "
            "generate_images or generate_both"
        )
    rounds = value.get("num_iter", 0)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 0 <= rounds <= MOST_ROUNDS:
        raise ValueError(f"num_iter must be a whole number of 0 to {MOST_ROUNDS}")
    prompt, order = _placed(sentences, places, first)
    return Request(
        _id(value.get("id", number)),
        prompt,
        tuple(str(folder / paths[k]) for k in order),
        mode=_GENERATE.get(mode, ""),
        rounds=rounds,
    )


def _placed(sentences, places, first) -> tuple[str, list[int]]:
    """(the prompt with its markers, which image stands at each)."""
    pieces, order = [], []
    for k, sentence in enumerate(sentences):
        here = [i for i, place in enumerate(places) if place == k]
        before, after = ([i for i in here if first[i] is way] for way in (True, False))
        pieces += [IMAGE] * len(before) + [sentence] + [IMAGE] * len(after)
        order += before + after
    return re.sub(rf" *{IMAGE} *", IMAGE, " ".join(pieces)).strip(), order


def _list(value) -> list:
    return value if isinstance(value, list) else []


def _texts(value: dict, key: str) -> list[str]:
    texts = value.get(key, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key} must be a list of texts")
    return texts


def _id(value) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("id must be text or a whole number")
    text = str(value)
    if not text or len(text) > LONGEST_ID:
        raise ValueError(f"id must have 1 to {LONGEST_ID} characters")
    return text


# ---- as records of training


def as_sample(
    request: Request,
    think: Callable[[str], str] | None = None,
    frames: int = MAX_FRAMES,
    lead: str = "\n",
) -> Sample:
    """The request as a sample without an answer, laid out by the functions that training uses.

    Args:
        think: asks for the relevant detail before the question, for requests that want it.
        frames: most frames of a video.
        lead: see `place`.

    Raises:
        BadSample: markers and files don't match, or a video can't be read.
        ValueError: see `checked`.
    """
    request = checked(request)
    text = place(request, lead)
    if request.think and think is not None:
        text = think(text)
    where = kinds.Files(os.path.abspath(os.sep), frames)  # a user may name any file
    if request.literal:  # what looks like a marker in it isn't one, but for <image>
        refs = tuple(where.image(os.path.abspath(path)) for path in request.images)
        return Sample(request.id, "", ((SOURCE, text),), refs).checked(max(len(refs), 1))
    paths = [*request.images, *([request.video] if request.video else ())]
    turns = [{"from": role, "value": said} for role, said in (*request.before, ("user", text))]
    record = {"id": request.id, "conversations": turns}
    if paths:
        record["image"] = [os.path.abspath(path) for path in paths]
    made = kinds.build(record, "", where, np.random.default_rng(0))
    return made.checked(max(len(made.images), 1))


def place(request: Request, lead: str = "\n") -> str:
    """The prompt with a marker for each image and video: its own, or else before it.

    Args:
        lead: what then stands between images and prompt (`ChatTemplate.lead`).
    """
    text, count = request.prompt, len(request.images)
    if IMAGE in text or VIDEO in text:
        return text
    clip = VIDEO if request.video else ""
    return f"{IMAGE * count}{clip}{lead}{text}" if count else clip + text


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

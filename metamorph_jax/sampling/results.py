"""Replies, and what becomes of them: on the terminal, and in the folder `--out`."""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Mapping

import numpy as np
from PIL import Image

from metamorph_jax.errors import UserError
from metamorph_jax.sampling.requests import Request


@dataclasses.dataclass(frozen=True)
class TextPart:
    """Text of a reply, and its ids."""

    text: str
    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ImagePart:
    """An image of a reply.

    Attributes:
        features: float32[n, C] its visual tokens.
        complete: whether all of them came.
        drawn: guidance -> uint8[h, w, 3]; empty without an image decoder.
    """

    features: np.ndarray
    complete: bool
    drawn: Mapping[float, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a model answered.

    Attributes:
        segments: texts and images in order.
        ended: whether the model ended it; otherwise the number of new tokens did.
    """

    segments: tuple[TextPart | ImagePart, ...]
    ended: bool

    @property
    def text(self) -> str:
        """All text, with "[image 0]" where the first image stands."""
        pieces, images = [], 0
        for part in self.segments:
            if isinstance(part, TextPart):
                pieces.append(part.text)
            else:
                pieces.append(f"[image {images}]")
                images += 1
        return "".join(pieces)

    @property
    def image_parts(self) -> list[ImagePart]:
        return [part for part in self.segments if isinstance(part, ImagePart)]

    @property
    def images(self) -> list[Image.Image]:
        """The drawn images; of each the one with the first guidance."""
        drawn = [part.drawn for part in self.image_parts if part.drawn]
        return [Image.fromarray(next(iter(one.values()))) for one in drawn]

    def show(self) -> None:
        """Shows text and images: in a notebook there, else on the terminal and in a viewer."""
        images = iter(self.images)
        try:
            from IPython import get_ipython
            from IPython.display import display

            inside = get_ipython() is not None
        except ImportError:
            inside = False
        for part in self.segments:
            if isinstance(part, TextPart):
                print(part.text)
            elif part.drawn:
                image = next(images)
                display(image) if inside else image.show()

    def save(self, folder: str | pathlib.Path, name: str = "reply") -> None:
        """Writes NAME.json, and the images' visual tokens and drawings beside it."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record, files = describe(self, name)
        for file, value in files.items():
            _write(folder / file, value)
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


class Stream:
    """Writes text to the terminal as its tokens come, with a mark for each image."""

    def __init__(self, generator, file=None):
        chat = generator.prompts.chat
        self._tokenizer, self._file = generator.prompts.tokenizer, file or sys.stdout
        self._starts, self._ends = set(chat.markers.before), set(chat.markers.after)
        self._hidden = self._starts | self._ends | set(generator.prompts.eos)
        self._ids, self._shown, self._images = [], "", 0

    def __call__(self, records) -> None:
        for token in np.asarray(records).tolist():
            if token in self._starts:
                self._flush(last=True)
                self._print(f"[image {self._images}]")
                self._images += 1
            elif token >= 0 and token not in self._hidden:
                self._ids.append(token)
        self._flush()

    def _flush(self, last: bool = False) -> None:
        text = self._tokenizer.decode(self._ids)
        # The bytes of a character may be spread over several tokens.
        if last or not text.endswith("\ufffd"):
            self._print(text[len(self._shown) :])
            self._shown = text
        if last:
            self._ids, self._shown = [], ""

    def _print(self, text: str) -> None:
        print(text, end="", file=self._file, flush=True)

    def end(self) -> None:
        self._flush(last=True)
        self._print("\n")


def describe(reply: Reply, name: str) -> tuple[dict, dict]:
    """(a JSON-able record of a reply, file name -> array of its images).

    `name` is what the files' names begin with.
    """
    name = re.sub(r"[^\w.-]", "_", name)[:80] or "_"
    segments, files = [], {}
    for part in reply.segments:
        if isinstance(part, TextPart):
            segments.append({"type": "text", "text": part.text, "ids": list(part.ids)})
            continue
        number = sum(segment["type"] == "image" for segment in segments)
        stem = f"{name}_image{number}"
        entry = {"type": "image", "image": number, "complete": part.complete}
        entry |= {"tokens": len(part.features), "features": f"{stem}.npy", "drawings": {}}
        files[f"{stem}.npy"] = part.features
        for scale, drawn in part.drawn.items():
            file = f"{stem}_scale{scale:g}.png"
            files[file] = drawn
            entry["drawings"][f"{scale:g}"] = file
        segments.append(entry)
    ended = "eos" if reply.ended else "budget"
    return {"text": reply.text, "segments": segments, "ended": ended}, files


def _write(file: pathlib.Path, value: np.ndarray) -> None:
    if file.suffix == ".npy":
        np.save(file, value)
    else:
        Image.fromarray(value).save(file)


class Output:
    """The folder of results; what is in it already is not generated again."""

    def __init__(self, folder: str, settings: dict):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        saved = self.folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        self._file = self.folder / "results.jsonl"
        if saved.is_file() and self._file.is_file():
            before = json.loads(saved.read_text())
            changed = sorted(k for k in settings if settings[k] != before.get(k))
            if changed:
                raise UserError(
                    f"{folder} holds results made with other settings ({', '.join(changed)}); "
                    "choose another --out or remove it"
                )
        saved.write_text(json.dumps(settings, indent=1) + "\n")
        self._records = {}
        if self._file.is_file():
            whole = []
            for line in self._file.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # cut off while it was written
                self._records[record["id"]] = record
                whole.append(line + "\n")
            self._file.write_text("".join(whole))

    def has(self, request: Request) -> bool:
        record = self._records.get(request.id)
        wanted = dataclasses.asdict(request) | {"images": list(request.images)}
        return record is not None and record["request"] == wanted

    def write(self, request: Request, reply: Reply) -> None:
        record, files = describe(reply, request.id)
        for name, value in files.items():
            _write(self.folder / name, value)
        asked = dataclasses.asdict(request) | {"images": list(request.images)}
        record = {"id": request.id, "request": asked, **record}
        self._records[request.id] = record
        with self._file.open("a") as f:
            f.write(json.dumps(record) + "\n")

    def finish(self, requests) -> None:
        records = [self._records[r.id] for r in requests if r.id in self._records]
        (self.folder / "segments.json").write_text(json.dumps(records, indent=1) + "\n")

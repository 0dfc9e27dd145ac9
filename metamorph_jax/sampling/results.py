"""Replies, and what becomes of them: on the terminal, and in the folder `--out`."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image

from metamorph_jax import files
from metamorph_jax.errors import FileError, UserError
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
        features: float32[n, C] its visual tokens; of shape [0, 0] where it was drawn from something
            else.
        complete: whether all of them came.
        drawn: guidance -> uint8[h, w, 3]; empty without an image decoder.
    """

    features: np.ndarray
    complete: bool
    drawn: Mapping[float, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The samples that a reply was chosen from, see `sampling/best_of.py`.

    Attributes:
        questions: that the model was asked about each.
        scores: of each, a log-likelihood; None if it has no whole image.
        kept: which of them is the reply.
    """

    questions: tuple[str, ...]
    scores: tuple[float | None, ...]
    kept: int


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a model answered.

    Attributes:
        segments: texts and images in order.
        ended: whether the model ended it; otherwise the number of new tokens did.
        candidates: where it is the best of several, else None.
    """

    segments: tuple[TextPart | ImagePart, ...]
    ended: bool
    candidates: Candidates | None = None

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
                print(printable(part.text))
            elif part.drawn:
                image = next(images)
                display(image) if inside else image.show()

    def save(self, folder: str | pathlib.Path, name: str = "reply") -> None:
        """Writes NAME.json, and the images' visual tokens and drawings beside it."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record, arrays = describe(self, name)
        write_arrays(folder, arrays)
        (folder / f"{stem(name)}.json").write_text(json.dumps(record, indent=1) + "\n")


class Stream:
    """Writes text to the terminal as its tokens come, with a mark for each image."""

    def __init__(self, generator, file=None):
        chat = generator.prompts.chat
        self._tokenizer, self._file = generator.prompts.tokenizer, file or sys.stdout
        self._starts, self._ends = set(generator.image_start), set(chat.markers.after)
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
        print(printable(text), end="", file=self._file, flush=True)

    def end(self) -> None:
        self._flush(last=True)
        self._print("\n")


def printable(text: str) -> str:
    """Text of several lines as a terminal may show it: other control characters are escaped."""
    return re.sub(r"[^\n\t]+", lambda match: files.shown(match[0], 10 * len(match[0])), text)


# ---- files

_PLAIN = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,63}")


def stem(id: str, sample: int = 0) -> str:
    """What names of a reply's files begin with; it differs between any two ids and samples.

    An id that is not a short, lower-case file name itself gets a hash: file systems fold cases.
    """
    name = id
    if not _PLAIN.fullmatch(id):
        short = re.sub(r"[^A-Za-z0-9_-]", "_", id)[:48]
        name = f"{short}+{hashlib.sha256(id.encode()).hexdigest()[:12]}"
    return f"{name}+s{sample}" if sample else name


def scale_name(scale: float) -> str:
    """A guidance scale in file names: short, but no two scales have the same."""
    return f"{scale:g}" if float(f"{scale:g}") == scale else repr(scale)


def describe(reply: Reply, id: str, sample: int = 0) -> tuple[dict, dict]:
    """(a JSON-able record of a reply, file name -> array of its images)."""
    segments, arrays = [], {}
    for part in reply.segments:
        if isinstance(part, TextPart):
            segments.append({"type": "text", "text": part.text, "ids": list(part.ids)})
            continue
        number = sum(segment["type"] == "image" for segment in segments)
        name = f"{stem(id, sample)}_image{number}"
        entry = {"type": "image", "image": number, "complete": part.complete}
        entry |= {"tokens": len(part.features), "drawings": {}}
        if part.features.shape[-1]:
            entry["features"] = f"{name}.npy"
            arrays[f"{name}.npy"] = part.features
        for scale, drawn in part.drawn.items():
            file = f"{name}_scale{scale_name(scale)}.png"
            arrays[file] = drawn
            entry["drawings"][scale_name(scale)] = file
        segments.append(entry)
    ended = "eos" if reply.ended else "budget"
    record = {"text": reply.text, "segments": segments, "ended": ended}
    if reply.candidates is not None:
        record["candidates"] = dataclasses.asdict(reply.candidates)
    return record, arrays


def write_arrays(folder: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> list[pathlib.Path]:
    """Writes visual tokens (.npy) and drawings (.png); returns their files."""
    for name, value in arrays.items():
        if name.endswith(".npy"):
            np.save(folder / name, value)
        else:
            Image.fromarray(value).save(folder / name)
    return [folder / name for name in arrays]


class Output:
    """The folder of results; what is in it already is not generated again.

    Raises:
        UserError: the folder can't be used, or holds results of other settings or of something
            else.
    """

    def __init__(self, folder: str, settings: dict):
        self.folder, where = pathlib.Path(folder), files.shown(folder)
        self._saved, self._file = self.folder / "settings.json", self.folder / "results.jsonl"
        self._settings = json.loads(json.dumps(settings))
        self._records: dict[tuple[str, int], dict] = {}
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {where} is not a folder")
        if os.path.lexists(self._file) and files.regular(self._file).stat().st_size:
            self._check_settings(where)
            self._read()

    def _check_settings(self, where: str) -> None:
        if not os.path.lexists(self._saved):
            raise UserError(
                f"{where} holds a results.jsonl without settings.json, which is not of this "
                "command: choose another --out"
            )
        before = files.read_json(self._saved)
        changed = sorted(k for k, v in self._settings.items() if v != before.get(k))
        if changed:
            raise UserError(
                f"{where} holds results made with other settings ({', '.join(changed)}); "
                "choose another --out or remove it"
            )

    def _read(self) -> None:
        """The records of an earlier start; those that are damaged are made again."""
        damaged = []
        for number, _, line in files.raw_lines(self._file):
            try:
                record = files.parse(line, "the line", dict)
                request, _ = record["request"], [*_named(record), record["text"]]
                self._records[request["id"], request["sample"]] = record
            except (FileError, KeyError, TypeError, AttributeError):
                # The last line may have been cut off while it was written.
                if line.endswith(b"\n"):
                    damaged.append(number)
        if damaged:
            print(
                f"{files.shown(self._file)}: {len(damaged)} damaged lines (the first is line "
                f"{damaged[0]}); their prompts are answered again",
                file=sys.stderr,
            )

    def open(self) -> None:
        """Makes the folder, and leaves only whole records in results.jsonl."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write_whole(self._saved, json.dumps(self._settings, indent=1) + "\n")
            if self._file.is_file():
                lines = [json.dumps(record) + "\n" for record in self._records.values()]
                files.write_whole(self._file, "".join(lines))
        except (OSError, ValueError) as error:  # ValueError: of a name that is none
            why = getattr(error, "strerror", None) or error
            raise UserError(f"--out {files.shown(self.folder)} can't be written: {why}") from error

    def has(self, request: Request) -> bool:
        """Whether this very request was answered, and the files of its reply are there."""
        record = self._records.get((request.id, request.sample))
        if record is None or record["request"] != _asked(request):
            return False
        return all((self.folder / name).is_file() for name in _named(record))

    def write(self, request: Request, reply: Reply) -> None:
        record, arrays = describe(reply, request.id, request.sample)
        write_arrays(self.folder, arrays)
        record = {"id": request.id, "request": _asked(request), **record}
        self._records[request.id, request.sample] = record
        with self._file.open("a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")

    def finish(self, requests: Iterable[Request]) -> None:
        found = (self._records.get((r.id, r.sample)) for r in requests)
        records = [record for record in found if record is not None]
        files.write_whole(self.folder / "segments.json", json.dumps(records, indent=1) + "\n")


def _asked(request: Request) -> dict:
    asked = dataclasses.asdict(request) | {"images": list(request.images)}
    asked["before"] = [list(turn) for turn in asked["before"]]
    asked["confirm"] = list(request.confirm)
    # Left out where they say nothing, so that records of before there were such fields still count.
    newer = ("before", "mode", "rounds", "literal", "confirm")
    return {k: v for k, v in asked.items() if v or k not in newer}


def _features(segment: Mapping) -> list[str]:
    """The file of an image's visual tokens, where it has some."""
    return [segment["features"]] if segment["tokens"] or "features" in segment else []


def _named(record: Mapping) -> list[str]:
    """The files that a record names; KeyError, TypeError or AttributeError if it is damaged."""
    images = [s for s in record["segments"] if s["type"] == "image"]
    names = [n for s in images for n in (*_features(s), *s["drawings"].values())]
    return [pathlib.PurePath(name).name for name in names]

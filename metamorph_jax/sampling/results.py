"""What comes out of `metamorph generate`: on the terminal, and in the folder `--out`."""

import dataclasses
import json
import pathlib
import re
import sys

import numpy as np
from PIL import Image

from metamorph_jax.errors import UserError
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.segments import Text


class Voice:
    """Writes text to the terminal as its tokens come; a picture is a mark in it."""

    def __init__(self, speaker, file=None):
        self._speaker, self._file = speaker, file or sys.stdout
        self._ids, self._said, self._pictures = [], "", 0

    def __call__(self, records) -> None:
        decoder = self._speaker.decoder
        for token in np.asarray(records).tolist():
            if token == decoder.start:
                self._flush(last=True)
                self._print(f"[picture {self._pictures}]")
                self._pictures += 1
            elif token >= 0 and token != decoder.end and token not in self._speaker.options.eos:
                self._ids.append(token)
        self._flush()

    def _flush(self, last: bool = False) -> None:
        text = self._speaker.tokenizer.decode(self._ids)
        # The bytes of a character may be spread over several tokens.
        if last or not text.endswith("\ufffd"):
            self._print(text[len(self._said) :])
            self._said = text
        if last:
            self._ids, self._said = [], ""

    def _print(self, text: str) -> None:
        print(text, end="", file=self._file, flush=True)

    def end(self) -> None:
        self._flush(last=True)
        self._print("\n")


def describe(speaker, image_decoder, request: Request, result, args) -> tuple[dict, dict]:
    """(the record of a result, file name -> array of its pictures)."""
    name = re.sub(r"[^\w.-]", "_", request.id)[:80] or "_"
    segments, files, text, count = [], {}, "", 0
    for segment in result.segments:
        if isinstance(segment, Text):
            words = speaker.tokenizer.decode(segment.ids.tolist())
            segments.append({"type": "text", "text": words, "ids": segment.ids.tolist()})
            text += words
            continue
        stem = f"{name}_picture{count}"
        entry = {"type": "picture", "picture": count, "complete": segment.complete}
        entry |= {"tokens": len(segment.features), "features": f"{stem}.npy", "drawings": {}}
        files[f"{stem}.npy"] = segment.features
        if image_decoder is not None and segment.complete:
            for scale in args.guidance or (image_decoder.sampling.guidance,):
                file = f"{stem}_scale{scale:g}.png"
                files[file] = image_decoder.draw(segment.features, scale, args.seed + count)
                entry["drawings"][f"{scale:g}"] = file
        segments.append(entry)
        text += f"[picture {count}]"
        count += 1
    record = {
        "id": request.id,
        "request": dataclasses.asdict(request) | {"images": list(request.images)},
        "text": text,
        "segments": segments,
        "ended": "eos" if result.ended else "budget",
    }
    return record, files


class Output:
    """The folder of results; what is in it already is not made again."""

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

    def write(self, request: Request, record: dict, files: dict) -> None:
        for name, value in files.items():
            if name.endswith(".npy"):
                np.save(self.folder / name, value)
            else:
                Image.fromarray(value).save(self.folder / name)
        self._records[request.id] = record
        with self._file.open("a") as f:
            f.write(json.dumps(record) + "\n")

    def finish(self, requests) -> None:
        records = [self._records[r.id] for r in requests if r.id in self._records]
        (self.folder / "segments.json").write_text(json.dumps(records, indent=1) + "\n")

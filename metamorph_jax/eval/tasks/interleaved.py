"""Documents of text and images that a model writes: do neighbours belong together?

    ROOT/prompts.jsonl      {"id": "1", "prompt": "<image>A day at the sea.", "images": ["1.png"]}

Where a prompt has no `<image>`, its images come first. There is no standard benchmark of this kind;
what is measured here is

    neighbouring image and text     mean CLIP cosine of each image with the text before and after it
    neighbouring images             mean CLIP cosine of each image with the one before it
    coherence                       1 to 10, as a judge says who reads the whole document

of pairs of which the model made one at least. A model that repeats one image has the best score of
images, so none of these says much alone.
"""

import dataclasses
import hashlib
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import jax
import numpy as np

from metamorph_jax import distributed, files
from metamorph_jax.data import reading
from metamorph_jax.data.sources.base import IMAGE
from metamorph_jax.endpoint import Endpoint
from metamorph_jax.errors import ConfigError, FileError
from metamorph_jax.eval.answers import Store
from metamorph_jax.eval.images import features, statistics
from metamorph_jax.eval.images.features import ImageSet
from metamorph_jax.eval.images.judging import ENDPOINT, check_judge
from metamorph_jax.eval.judges import EndpointModel
from metamorph_jax.eval.tasks.base import Answer, File, Protocol, Question, Record, Task
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.requests import MOST_ROUNDS, Request

TEXT_IMAGE = "100 x CLIP, neighbouring image and text"
IMAGES = "100 x CLIP, neighbouring images"
COHERENCE = "coherence, 1 to 10"
ASKED = (
    "Here is a document of text and images. Does each image fit the text around it, do the images "
    "belong to the same story, and does the text read as one? Answer with a number from 1 (nothing "
    "belongs together) to 10 (all of it does), and nothing else.\n\n{document}"
)


@dataclasses.dataclass(frozen=True)
class Part:
    """A text or an image of a document; `made` by the model or given."""

    text: str = ""
    image: str = ""
    made: bool = True


@dataclasses.dataclass(frozen=True)
class Interleaved(Task):
    """Documents of text and images, continued by the model.

    Attributes:
        clip: weights of CLIP with both towers; "": no cosines.
        judged_by: "endpoint:MODEL", or the workdir of a run; "": nobody judges.
        turns: how many times the model adds text or an image, where it has to be told; 0 lets it
            end on its own.
        protocol: "mm-interleaved" writes as its paper does: nucleus 0.9, repetition penalty 1.3.
    """

    clip: str = ""
    judged_by: str = ""
    turns: int = 0
    protocol: str = ""

    title: ClassVar[str] = "Documents of text and images"
    form: ClassVar[str] = "draw"
    main: ClassVar[str] = TEXT_IMAGE
    other_scores: ClassVar[tuple[str, ...]] = (IMAGES, COHERENCE, "images of a document")
    max_new_tokens: ClassVar[int] = 512
    scored_by: ClassVar[tuple[str, ...]] = ("clip", "judged_by")
    files: ClassVar[tuple[File, ...]] = (
        File("prompts.jsonl", "how documents begin, with their images", "you"),
    )
    protocols: ClassVar = {
        "mm-interleaved": Protocol(
            {}, {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3}
        )
    }

    @property
    def reply(self):
        return {"mode": "both", "rounds": self.turns}

    def __post_init__(self):
        if not 0 <= self.turns <= MOST_ROUNDS:
            raise ConfigError(f"task {self.name}: turns={self.turns}, expected 0 to {MOST_ROUNDS}")

    def questions(self) -> Iterable[Question]:
        path = self.find("prompts.jsonl")
        if self.judged_by:
            check_judge(self.judged_by)  # now, not after the last answer
        for number, row in enumerate(reading.json_lines(path, texts=("prompt",)), 1):
            where = f"{files.shown(path)}, line {number}"
            names = reading.text_list(row.get("images", []), f"{where}, images")
            prompt = row["prompt"] if IMAGE in row["prompt"] else IMAGE * len(names) + row["prompt"]
            if prompt.count(IMAGE) != len(names):
                raise FileError(f"{where}: {prompt.count(IMAGE)} markers, {len(names)} images")
            yield Question(str(row.get("id", number)), prompt, tuple(map(self.path, names)))

    def record(self, question: Question, answer: Answer) -> Record:
        text = answer.document or answer.text
        return {"score": None, "parsed": bool(answer.images), "document": text}

    def finish(self, records: Sequence[Record]) -> list[Record]:
        """With the mean cosines of each document, and the judge's number."""
        records = list(records)
        if self.clip:
            records = with_cosines(records, features.open_clip(self.clip))
        if self.judged_by and any(record.get("drawn") for record in records):
            told = Grader(self.judged_by)(records)
            records = [
                record | {"coherence": mark, "score": None if mark is None else (mark - 1) / 9}
                for record, mark in zip(records, told, strict=True)
            ]
        return records

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        found = {
            name: 100 * float(np.mean(values))
            for name, key in ((TEXT_IMAGE, "text_image"), (IMAGES, "image_image"))
            if (values := [r[key] for r in records if r.get(key) is not None])
        }
        told = [r["coherence"] for r in records if r.get("coherence") is not None]
        if told:
            found[COHERENCE] = float(np.mean(told))
        drawn = [len(r.get("drawn", ())) for r in records]
        return found | {"images of a document": float(np.mean(drawn))}


def parts(record: Record) -> list[Part]:
    """The document: the prompt and what the model wrote, in order, without empty texts."""
    given, made = iter(record["images"]), iter(record.get("drawn", ()))
    found = []
    for text, images, own in ((record["prompt"], given, False), (record["document"], made, True)):
        for k, piece in enumerate(text.split(IMAGE)):
            if k:
                found.append(Part(image=next(images), made=own))
            if piece.strip():
                found.append(Part(text=piece.strip(), made=own))
    return found


def pairs(document: Sequence[Part]) -> Iterator[tuple[Part, Part]]:
    """Neighbours of which the model made one at least: (image, text) and (image, image before it).

    The image before is the last one, whatever text stands between."""
    last = None
    for k, part in enumerate(document):
        if not part.image:
            continue
        for text in (document[j] for j in (k - 1, k + 1) if 0 <= j < len(document)):
            if text.text and (part.made or text.made):
                yield part, text
        if last is not None and (part.made or last.made):
            yield part, last
        last = part


def with_cosines(records: Sequence[Record], network: features.Clip) -> list[Record]:
    """The records with "text_image" and "image_image", mean cosines of their pairs, or None."""
    documents = [list(pairs(parts(record))) for record in records]
    every = [pair for document in documents for pair in document]
    paths = tuple(dict.fromkeys(p.image for pair in every for p in pair if p.image))
    texts = list(dict.fromkeys(p.text for pair in every for p in pair if p.text))
    if not paths:
        return [record | {"text_image": None, "image_image": None} for record in records]
    found = network.features(ImageSet(paths))
    vectors = {paths[i]: row for i, row in zip(found.kept, found.values, strict=True)}
    if texts:
        values, cut = network.texts(texts)
        vectors |= {f"text {text}": row for text, row in zip(texts, values, strict=True)}
        if cut:
            print(f"{cut} texts were cut to CLIP's {network.length} tokens", file=sys.stderr)

    def mean(document, with_text: bool) -> float | None:
        keys = [(a.image, b.image or f"text {b.text}") for a, b in document
                if bool(b.text) == with_text]  # fmt: skip
        both = [(vectors[a], vectors[b]) for a, b in keys if a in vectors and b in vectors]
        if not both:
            return None
        first, second = (np.stack(side) for side in zip(*both, strict=True))
        return float(statistics.cosines(first, second).mean())

    return [
        record | {"text_image": mean(one, True), "image_image": mean(one, False)}
        for record, one in zip(records, documents, strict=True)
    ]


# ---- the judge


class Grader:
    """Who reads whole documents; what was said is kept in OUT/TASK/document_verdicts.jsonl.

    Args:
        spec: "endpoint:MODEL", or the workdir of a run.
    """

    def __init__(self, spec: str):
        self.spec = spec
        if spec.startswith(ENDPOINT):
            self._model = EndpointModel(Endpoint(), spec.removeprefix(ENDPOINT))
        else:
            from metamorph_jax import api

            self._model = api.load(spec).generator

    def __call__(self, records: Sequence[Record]) -> list[float | None]:
        """A number from 1 to 10 for each document, None where the judge gave none."""
        drawn = next(record["drawn"][0] for record in records if record.get("drawn"))
        store = None
        if jax.process_index() == 0:
            folder = pathlib.Path(drawn).parents[1]  # OUT/TASK/images/…
            sound = lambda line: isinstance(line["text"], str)  # noqa: E731
            store = Store(folder, {"judge": self.spec}, "document_verdicts", sound)
        requests = [_request(record) for record in records]
        keys = {r.id: hashlib.sha256(repr((r.prompt, r.images)).encode()).hexdigest()[:32]
                for r in requests}  # fmt: skip
        lines = {id: store.get(id, key) for id, key in keys.items()} if store is not None else {}
        known = {id: line["text"] for id, line in lines.items() if line}
        known = distributed.gather(known)[0]  # those of the first host
        todo = [request for request in requests if request.id not in known]
        options = Options(max_new_tokens=16)
        for request, reply in self._model.replies(todo, options, _failed, draw=False):
            known[request.id] = reply.text
            if store is not None:
                store.add(request.id, keys[request.id], text=reply.text)
        known = distributed.gather(known)[0]
        return [mark_in(known.get(request.id, "")) for request in requests]


def _request(record: Record) -> Request:
    """A document as a judge reads it."""
    text = ASKED.replace("{document}", f"{record['prompt']} {record['document']}")
    return Request(record["id"], text, tuple(p.image for p in parts(record) if p.image))


def _failed(request: Request, error: Exception) -> None:
    print(f"judge, document {request.name}: {files.shown(error, 500)}", file=sys.stderr)


def mark_in(reply: str) -> float | None:
    """The first number of a reply, if it is from 1 to 10."""
    found = re.search(r"\d+(?:\.\d+)?", reply)
    value = float(found[0]) if found else 0.0
    return value if 1 <= value <= 10 else None

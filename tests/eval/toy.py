"""A task on colours, and a model that is a function: what the bench does, without a model."""

import dataclasses
import io
import json
from typing import ClassVar

from PIL import Image

from metamorph_jax.data import images, reading
from metamorph_jax.data.sources.base import ImageRef
from metamorph_jax.errors import BadSample
from metamorph_jax.eval.tasks.base import (
    File,
    Question,
    Task,
    by_group,
    by_unit,
    mean,
    write_json,
)
from metamorph_jax.sampling.likelihood import Likelihood
from metamorph_jax.sampling.results import ImagePart, Reply, TextPart

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def png(colour, size=(8, 6)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, COLOURS.get(colour, colour)).save(data, "PNG")
    return data.getvalue()


@dataclasses.dataclass(frozen=True)
class Colours(Task):
    """Two questions about each image."""

    form: str = "generate"
    judge_it: bool = False

    title: ClassVar = "Colours"
    main: ClassVar = "pairs"
    max_new_tokens: ClassVar = 5
    files: ClassVar = (File("questions.jsonl", "a question a line", "nowhere"),)

    @property
    def judged(self):
        return self.judge_it

    def questions(self):
        for row in reading.json_lines(self.find("questions.jsonl"), "id", "colour"):
            picture = self.path(row["image"]) if "image" in row else png(row["colour"])
            if row.get("lazy"):
                picture = lambda colour=row["colour"]: png(colour)  # noqa: E731
            yield Question(
                row["id"], "Which colour?", (picture,), choices=tuple(COLOURS), gold=row["colour"],
                unit=row.get("unit", ""), groups={"kind": row.get("kind", "plain")},
            )  # fmt: skip

    def record(self, question, answer):
        score = None if self.judge_it else float(answer.text == question.gold)
        return {"score": score, "parsed": answer.text in COLOURS}

    def scores(self, records):
        pairs = by_unit(records).values()
        both = sum(min(r["score"] for r in pair) for pair in pairs) / len(pairs)
        found = {"pairs": 100 * both, "accuracy": mean(records)}
        return found | {k: mean(rows) for k, rows in by_group(records, "kind").items()}

    def write(self, records, folder):
        replies = {record["id"]: record["reply"] for record in records}
        return [write_json(folder / "colours.json", replies)]

    def judge(self, records, ask):
        verdicts = ask([f"Is {r['reply']} the colour {r['gold']}?" for r in records])
        return [
            record | {"score": None if v is None else float(v == "yes"), "parsed": v is not None}
            for record, v in zip(records, verdicts, strict=True)
        ]


def write_questions(folder, rows) -> str:
    """The task's file; images that rows name are made. The folder as text."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        if "image" in row and row["image"] != "missing.png":
            (folder / row["image"]).write_bytes(png(row["colour"]))
        lines.append(json.dumps(row) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines))
    return str(folder)


class Killed(BaseException):
    """As if the process were killed."""


class Model:
    """Answers by a function of (prompt, images); in batches, in reverse order within each.

    Attributes:
        asked: ids of the requests that were answered.
        last: after so many answers it is killed.
    """

    def __init__(self, answer=None, last: int | None = None, drawn=()):
        self.answer, self.last, self.drawn = answer or self.colour, last, drawn
        self.asked: list[str] = []
        self.options = None

    @staticmethod
    def colour(prompt, pictures) -> str:
        """The name of the first image's colour."""
        pixel = pictures[0].getpixel((0, 0))
        return next((name for name, value in COLOURS.items() if value == pixel), "none")

    def _answered(self, requests, options_or_size, failed):
        size = getattr(options_or_size, "batch_size", options_or_size)
        good = []
        for request in requests:
            try:
                pictures = images.load([ImageRef(path) for path in request.images])
                good.append((request, self.answer(request.prompt, pictures)))
            except BadSample as error:
                failed(request, error)
        for start in range(0, len(good), size):
            for request, text in reversed(good[start : start + size]):
                if self.last is not None and len(self.asked) >= self.last:
                    raise Killed
                self.asked.append(request.id)
                yield request, text

    def replies(self, requests, options, failed, stream=None, draw=True):
        self.options = options
        for request, text in self._answered(requests, options, failed):
            parts = [TextPart(f" {text} ", (1,))]
            if draw:
                parts += [ImagePart(None, True, {1.0: array}) for array in self.drawn]
            yield request, Reply(tuple(parts), text != "cut")

    def likelihoods(self, requests, answers, failed, batch_size=8):
        for request, text in self._answered(requests, batch_size, failed):
            found = [Likelihood(-1.0 if a == text else -2.0 - k, 2) for k, a in
                     enumerate(answers[request.id])]  # fmt: skip
            yield request, found

"""V*Bench (Wu and Xie 2023): small details in large images; four or two options.

The official score takes the option with the smallest loss per token (`vstar:form=choose`). In
lettered prompts the order of options is that of test_questions.jsonl, or else drawn from the
question's name, as in the folders the first option is always right.
"""

import dataclasses
import hashlib
import pathlib
import re
from typing import ClassVar

from metamorph_jax.data import reading
from metamorph_jax.eval.tasks.base import File, by_group, mean, mean_terms, write_json_lines
from metamorph_jax.eval.tasks.choice import MultipleChoice

KINDS = ("direct_attributes", "relative_position")
_SOURCE = "huggingface.co/datasets/craigwu/vstar_bench"
_OPTION = re.compile(r"^\(([A-Z])\) *(.*)$", re.M)


@dataclasses.dataclass(frozen=True)
class VStar(MultipleChoice):
    """Options: `form`, `parser`.

    Attributes:
        normalise: the official rule is the mean loss of a token.
    """

    normalise: bool = True

    title: ClassVar = "V*Bench"
    scores_of_groups: ClassVar = ("{category}",)
    files: ClassVar = (
        File("test_questions.jsonl", "the questions with letters (or from the folders)", _SOURCE),
        *(File(kind, "an image and a .json for each question", _SOURCE) for kind in KINDS),
    )

    def questions(self):
        self.find(*KINDS)
        lines = pathlib.Path(self.path("test_questions.jsonl"))
        yield from self._lines(str(lines)) if lines.is_file() else self._folders()

    def _lines(self, path: str):
        for row in reading.json_lines(path, "image", "text", "category", "label"):
            options = [text for _, text in _OPTION.findall(row["text"])]
            yield self.ask(
                row["image"], row["text"].split("\n(A)")[0], options, row["label"],
                prompt=row["text"], images=(self.path(row["image"]),),
                groups={"category": row["category"]},
            )  # fmt: skip

    def _folders(self):
        for kind in KINDS:
            for file in sorted(pathlib.Path(self.path(kind)).glob("*.json")):
                row = reading.json_file(str(file), dict)
                reading.required(row, str(file), "options", texts=("question",))
                reading.text_list(row["options"], f"{file}, options")
                order = sorted(range(len(row["options"])), key=lambda k: _draw(file.name, k))
                images = [p for p in sorted(file.parent.glob(f"{file.stem}.*")) if p != file]
                yield self.ask(
                    f"{kind}/{file.stem}", row["question"], [row["options"][k] for k in order],
                    order.index(0), images=(images[0] if images else file.with_suffix(".jpg"),),
                    groups={"category": kind},
                )  # fmt: skip

    def scores(self, records):
        found = {"accuracy": mean(records)}
        return found | {name: mean(rows) for name, rows in by_group(records, "category").items()}

    def terms(self, record):
        return mean_terms(record, "category")

    def write(self, records, folder):
        lines = ({"question_id": r["id"], "text": r["reply"]} for r in records)
        return [write_json_lines(folder / "vstar_answers.jsonl", lines)]


def _draw(name: str, number: int) -> bytes:
    return hashlib.sha256(f"{name}/{number}".encode()).digest()

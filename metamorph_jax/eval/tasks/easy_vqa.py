"""easy-vqa (Zhou 2019): short questions about one coloured shape; the quick start's own benchmark.

It reads the files of `metamorph quickstart`, or the package `easy-vqa` as it is installed.
"""

import dataclasses
import pathlib
from typing import ClassVar

from metamorph_jax.data import reading
from metamorph_jax.eval.scorers.short_answers import is_right
from metamorph_jax.eval.tasks.base import (
    File,
    Question,
    Task,
    by_group,
    mean,
    mean_terms,
    write_json,
)
from metamorph_jax.quickstart.data import question_type

TEXTS = ("question", "answer")


@dataclasses.dataclass(frozen=True)
class EasyVQA(Task):
    """No options."""

    title: ClassVar = "easy-vqa"
    scores_of_groups: ClassVar = ("{type}",)
    max_new_tokens: ClassVar = 8  # more than "rectangle" and the end of the turn
    files: ClassVar = (
        File("questions_test.jsonl", "the test questions", "`metamorph quickstart`, folder data"),
        File("images", "the images", "the same folder"),
        File("test/questions.json", "or the files of the package", "pip install easy-vqa, "
             "easy_vqa/data"),
    )  # fmt: skip

    def questions(self):
        found = self.find("questions_test.jsonl", "test/questions.json")
        for id, question, answer, image in self._rows(found):
            yield Question(
                id, f"<image>\n{question}", (image,), gold=answer,
                groups={"type": question_type(question)},
            )  # fmt: skip

    def _rows(self, found: str):
        if found.endswith(".jsonl"):
            for row in reading.json_lines(found, "id", "image", texts=TEXTS):
                image = self.path("images", row["image"])
                yield row["id"], row["question"], row["answer"], image
            return
        images = pathlib.Path(found).with_name("images")
        for number, (question, answer, image) in enumerate(reading.json_file(found, list)):
            yield str(number), question, answer, images / f"{image}.png"

    def record(self, question, answer):
        return {"score": float(is_right(answer.text, question.gold))}

    def scores(self, records):
        found = {"accuracy": mean(records)}
        return found | {name: mean(rows) for name, rows in by_group(records, "type").items()}

    def terms(self, record):
        return mean_terms(record, "type")

    def write(self, records, folder):
        replies = {record["id"]: record["reply"] for record in records}
        return [write_json(folder / "easy_vqa_answers.json", replies)]

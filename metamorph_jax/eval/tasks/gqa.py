"""GQA: questions made from scene graphs, one right answer each.

| file under the task's root | what | from |
|---|---|---|
| testdev_balanced_questions.json | 12,578 questions with answers | cs.stanford.edu/people/dorarad/gqa, questions1.2.zip |
| images/IMAGE_ID.jpg | images | the same, images.zip |

Prompt: question, newline, "Answer the question using a single word or phrase." The official tool's
validity, plausibility and consistency need files that were not released for testdev and are left
out; accuracy, binary, open, the types and the distribution are those of the tool.
"""  # noqa: E501

import dataclasses
import re
from typing import ClassVar

from metamorph_jax.data import reading
from metamorph_jax.eval.scorers import gqa
from metamorph_jax.eval.tasks.base import (
    SHORT,
    Answer,
    File,
    Question,
    Record,
    Task,
    one_of,
    write_json,
)

_SOURCE = "cs.stanford.edu/people/dorarad/gqa/download.html"
_PUNCTUATION = re.compile(r"[^\w\s]")


@dataclasses.dataclass(frozen=True)
class GQA(Task):
    """GQA: compositional questions about real images, exact match.

    Attributes:
        split: testdev_balanced, val_balanced, testdev_all, …
        parser: "official": equality after lower-casing and cutting the full stop; "lmms_eval"
            ignores all punctuation, which may give a little more.
    """

    split: str = "testdev_balanced"
    parser: str = "official"

    title: ClassVar = "GQA"
    other_scores: ClassVar = ("binary", "open", "distribution")
    scores_of_groups: ClassVar = ("structural/{structural}", "semantic/{semantic}")
    files: ClassVar = (
        File("testdev_balanced_questions.json", "questions and answers", _SOURCE),
        File("images", "the images", _SOURCE),
    )

    def __post_init__(self):
        one_of(self, parser=("official", "lmms_eval"))

    def questions(self):
        path = self.find(f"{self.split}_questions.json")
        for key, row in reading.json_file(path, dict).items():
            reading.required(row, f"{path}, question {key}", "imageId", "types", "groups",
                             texts=("question", "answer"))  # fmt: skip
            reading.required(row["types"], f"{path}, types of {key}", "structural", "semantic")
            reading.required(row["groups"], f"{path}, groups of {key}", "global")
            types = {kind: row["types"][kind] for kind in ("structural", "semantic")}
            yield Question(
                key,
                f"{row['question']}\n{SHORT}",
                (self.path("images", f"{row['imageId']}.jpg"),),
                gold=row["answer"],
                groups=types | {"group": row["groups"]["global"] or ""},
            )

    def record(self, question: Question, answer: Answer) -> Record:
        prediction = gqa.gqa_prediction(answer.text)
        if self.parser == "lmms_eval":
            prediction = _PUNCTUATION.sub("", prediction).strip()
        return {"answer": prediction, "score": float(prediction == question.gold)}

    def scores(self, records):
        """Accuracy, binary, open, by structural and semantic type; distribution (low is good)."""
        questions = {
            str(number): {
                "answer": record["gold"],
                "types": record["groups"],
                "groups": {"global": record["groups"]["group"] or None},
            }
            for number, record in enumerate(records)
        }
        predictions = {str(number): record["answer"] for number, record in enumerate(records)}
        return gqa.gqa_scores(questions, predictions)

    def terms(self, record):
        """Of all but the distribution."""
        right, types = float(record["answer"] == record["gold"]), record["groups"]
        names = ["accuracy", *gqa.parts(types)]
        return {name: (right, 1.0) for name in names}

    def write(self, records, folder):
        """[{"questionId", "prediction"}], as the official tool reads it."""
        rows = gqa.gqa_submission((r["id"], r["answer"]) for r in records)
        return [write_json(folder / f"{self.split}_predictions.json", rows)]

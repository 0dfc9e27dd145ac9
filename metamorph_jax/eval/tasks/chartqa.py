"""ChartQA: questions about charts, with a tolerance for numbers.

| file under the task's root | what | from |
|---|---|---|
| test/test_human.json | 1,250 questions that people wrote | github.com/vis-nlp/ChartQA |
| test/test_augmented.json | 1,250 generated questions | the same |
| test/png/IMGNAME | images | the same |

Prompts: see `PROMPTS`.
"""

import dataclasses
from typing import ClassVar

from metamorph_jax.data import reading
from metamorph_jax.eval.scorers.charts import relaxed_match
from metamorph_jax.eval.tasks.base import (
    Answer,
    File,
    Question,
    Record,
    Task,
    by_group,
    mean,
    mean_terms,
    one_of,
    write_json,
)

PROMPTS = {
    "phrase": "{question}\nAnswer the question using a single number or phrase.",  # Cambrian
    "word": "{question}\nAnswer the question with a single word.",  # LMMs-eval
}
_SOURCE = "github.com/vis-nlp/ChartQA"
_PARTS = ("human", "augmented")


@dataclasses.dataclass(frozen=True)
class ChartQA(Task):
    """ChartQA: relaxed accuracy of answers about charts (numbers may be 5 % off).

    Attributes:
        split: test or val.
        style: of the prompt: "phrase" (Cambrian) or "word" (LMMs-eval).
    """

    split: str = "test"
    style: str = "phrase"

    title: ClassVar = "ChartQA"
    other_scores: ClassVar = ("mean of parts",)
    scores_of_groups: ClassVar = ("{part}",)
    max_new_tokens: ClassVar = 32
    files: ClassVar = (
        File("test/test_human.json", "questions that people wrote", _SOURCE),
        File("test/test_augmented.json", "generated questions", _SOURCE),
        File("test/png", "the images", _SOURCE),
    )

    def __post_init__(self):
        one_of(self, style=PROMPTS)

    def questions(self):
        for part in _PARTS:
            path = self.find(f"{self.split}/{self.split}_{part}.json")
            for number, row in enumerate(reading.json_file(path, list)):
                reading.required(row, f"{path}[{number}]", texts=("imgname", "query", "label"))
                yield Question(
                    f"{part}/{number}",
                    PROMPTS[self.style].format(question=row["query"]),
                    (self.path(self.split, "png", row["imgname"]),),
                    gold=row["label"],
                    groups={"part": part},
                    more={"imgname": row["imgname"], "query": row["query"]},
                )

    def record(self, question: Question, answer: Answer) -> Record:
        return {"score": float(relaxed_match(answer.text, question.gold))}

    def scores(self, records):
        """Accuracy over all questions, of both parts, and the mean of the parts."""
        parts = {name: mean(group) for name, group in by_group(records, "part").items()}
        both = {"mean of parts": sum(parts.values()) / 2} if len(parts) == len(_PARTS) else {}
        return {"accuracy": mean(records)} | parts | both

    def terms(self, record):
        return mean_terms(record, "part")

    def write(self, records, folder):
        """[{"imgname", "query", "label", "prediction"}]; the benchmark has no format of its own."""
        rows = [
            {**r["more"], "label": r["gold"], "prediction": r["reply"], "part": r["groups"]["part"]}
            for r in records
        ]
        return [write_json(folder / f"chartqa_{self.split}_results.json", rows)]

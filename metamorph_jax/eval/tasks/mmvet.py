"""MM-Vet: open questions that need several capabilities at once, graded by a judge.

| file under the task's root | what | from |
|---|---|---|
| mm-vet.json | 218 questions, what is right, capabilities | github.com/yuweihao/MM-Vet |
| images/v1_0.png | images | the same |
| the file of `grader` | the official prompt of the judge, if wanted | mm-vet_evaluator.py there |

Prompt: the question alone; LMMs-eval puts a request to think step by step before it (`think`).

The official judge is gpt-4-0613 at temperature 0 with a few-shot prompt. `GRADER` below is our own
wording of that prompt: for numbers to put beside published ones, give the official text as a file
(`grader`), and say which judge it was; later versions grade differently. A verdict without a grade
is asked for once more; without one the question counts as not graded and is left out of the means
(the official tool asks up to five times, at higher temperatures, and then gives 0).
"""

import dataclasses
from typing import ClassVar

from metamorph_jax import files
from metamorph_jax.data import reading
from metamorph_jax.eval.scorers import judged
from metamorph_jax.eval.tasks.base import Answer, File, Question, Record, Task, write_json

THINK = (
    "First please perform reasoning, and think step by step to provide best answer to the "
    "following question: \n\n"
)
GRADER = """\
You grade answers to questions about images. Compare the prediction with the ground truth and \
give a grade from 0.0 (all wrong) to 1.0 (all right) in steps of 0.1. Where the ground truth has \
<AND>, the prediction must contain all parts for a full grade; where it has <OR>, any one of them \
will do. Complete the last row of the table with the grade, and write nothing else.

Question | Ground truth | Prediction | Grade
--- | --- | --- | ---
Which numbers are on the dice? | 2 <AND> 5 | a four | 0.0
Which numbers are on the dice? | 2 <AND> 5 | I see a 5 | 0.5
Which numbers are on the dice? | 2 <AND> 5 | 5 and 2 | 1.0
What is this animal called? | puma <OR> cougar <OR> mountain lion | It is a cougar. | 1.0
What is this animal called? | puma <OR> cougar <OR> mountain lion | a big wild cat | 0.3
What is funny about the sign? | It warns of wet paint, but somebody has left a hand print right on \
its freshly painted board. | The sign says that the paint is wet. | 0.4
"""
_AGAIN = "\nGrade (a number from 0.0 to 1.0): "
_SOURCE = "github.com/yuweihao/MM-Vet"


@dataclasses.dataclass(frozen=True)
class MMVet(Task):
    """MM-Vet: judged answers, the mean grade × 100, by capability and by set of them.

    Attributes:
        think: ask for reasoning first, as LMMs-eval does.
        grader: file with the prompt of the judge; "": our own.
    """

    think: bool = False
    grader: str = ""

    title: ClassVar = "MM-Vet"
    main: ClassVar = "total"
    max_new_tokens: ClassVar = 1024
    judged: ClassVar = True
    files: ClassVar = (
        File("mm-vet.json", "questions and what is right", _SOURCE),
        File("images", "the images", _SOURCE),
    )

    def questions(self):
        if self.grader:
            files.regular(self.grader)  # now, not after the last answer
        path = self.find("mm-vet.json")
        for key, row in reading.json_file(path, dict).items():
            reading.required(row, f"{path}, {key}", "capability",
                             texts=("imagename", "question", "answer"))  # fmt: skip
            reading.text_list(row["capability"], f"{path}, {key}, capability")
            yield Question(
                key,
                THINK * self.think + row["question"],
                (self.path("images", row["imagename"]),),
                gold=row["answer"],
                groups={"capabilities": "+".join(sorted(row["capability"]))},
                more={"question": row["question"]},
            )

    def record(self, question: Question, answer: Answer) -> Record:
        return {"score": None}

    def judge(self, records, ask):
        """A grade for each; "verdict" is what the judge wrote."""
        start = files.read_text(self.grader) if self.grader else GRADER
        rows = [f"{start}\n{_row(record)}" for record in records]
        verdicts = list(ask(rows))
        grades = [judged.mmvet_grade(verdict or "") for verdict in verdicts]
        again = [k for k, grade in enumerate(grades) if grade is None and verdicts[k] is not None]
        for k, verdict in zip(again, ask([rows[k] + _AGAIN for k in again]), strict=True):
            verdicts[k], grades[k] = verdict, judged.mmvet_grade(verdict or "")
        return [
            record | {"verdict": verdict, "score": grade, "parsed": grade is not None}
            for record, verdict, grade in zip(records, verdicts, grades, strict=True)
        ]

    def score_names(self) -> set[str]:
        sets = {question.groups["capabilities"] for question in self.questions()}
        return {self.main} | sets | {name for together in sets for name in together.split("+")}

    def scores(self, records):
        """Mean grades × 100: total, each capability, each set of them; of graded ones alone."""
        graded = [
            (record["groups"]["capabilities"].split("+"), record["score"])
            for record in records
            if record["score"] is not None
        ]
        found = judged.mmvet_scores(graded)
        return {name: found[name] for name in sorted(found, key=lambda n: (n != "total", n))}

    def write(self, records, folder):
        """{"v1_0": reply}, as the official grader reads it."""
        replies = {record["id"]: record["reply"] for record in records}
        return [write_json(folder / "mm-vet_answers.json", replies)]


def _row(record: Record) -> str:
    """The last row of the judge's table; what would break the table is replaced by spaces."""
    gold = record["gold"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    cells = [record["more"]["question"], gold, record["reply"]]
    return " | ".join([" ".join(cell.replace("|", " ").split()) for cell in cells] + [""])

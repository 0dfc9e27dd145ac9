"""MMVP (Tong et al. 2024): 150 pairs of images that CLIP takes for alike, with opposite answers.

A pair counts when both answers are right; guessing gives 25 %. The paper has GPT-4 judge free
replies; here, as in Cambrian and lmms-eval, the model writes a letter.
"""

import dataclasses
import re
from typing import ClassVar

from metamorph_jax import files
from metamorph_jax.data import reading
from metamorph_jax.errors import FileError
from metamorph_jax.eval.tasks.base import File, by_unit, lettered, mean, one_of, write_json_lines
from metamorph_jax.eval.tasks.choice import MultipleChoice

_SOURCE = "huggingface.co/datasets/MMVP/MMVP"
_OPTION = re.compile(r"\(([a-z])\)\s*(.*?)\s*(?=\([a-z]\)|$)", re.S)
_SWAPPED = {99: 100, 100: 99, 279: 280, 280: 279}  # rows whose labels are those of their partner


@dataclasses.dataclass(frozen=True)
class MMVP(MultipleChoice):
    """Options: `style` (cambrian, lmms_eval, official), `corrected` (undo two swaps of labels).

    Attributes:
        style: of the prompt.
        corrected: the official file has the labels of rows 99/100 and 279/280 swapped.
    """

    style: str = "cambrian"
    corrected: bool = False

    title: ClassVar = "MMVP"
    main: ClassVar = "pairs"
    other_scores: ClassVar = ("accuracy",)
    files: ClassVar = (
        File("Questions.csv", "the questions", _SOURCE),
        File("MMVP Images", "the images 1.jpg … 300.jpg", _SOURCE),
    )

    def __post_init__(self):
        super().__post_init__()
        one_of(self, style=("cambrian", "lmms_eval", "official"))

    def questions(self):
        path = self.find("Questions.csv")
        columns = ("Index", "Question", "Options", "Correct Answer")
        rows = {}
        for row in reading.table(path, *columns):
            try:
                rows[int(row["Index"])] = row
            except ValueError:
                raise FileError(f"{files.shown(path)}: Index {row['Index']!r}") from None
        for number, row in rows.items():
            options = [text for _, text in _OPTION.findall(row["Options"])]
            labelled = _SWAPPED.get(number, number) if self.corrected else number
            gold = rows.get(labelled, row)["Correct Answer"].strip().strip("()").upper()
            yield self.ask(
                str(number), row["Question"], options, gold, prompt=self._prompt(row, options),
                images=(self.path("MMVP Images", f"{number}.jpg"),),
                unit=f"pair {(number + 1) // 2}", more={"question": row["Question"]},
            )  # fmt: skip

    def _prompt(self, row, options) -> str | None:
        if self.style == "official":
            return f"{row['Question']} {row['Options']}"
        if self.style == "cambrian":
            return f"{row['Question']} Options:\n{lettered(options)}\n{self.suffix}"
        return None

    def scores(self, records):
        pairs = [pair for pair in by_unit(records).values() if len(pair) == 2]
        found = {"accuracy": mean(records)}
        if pairs:
            right = sum(all(r["score"] for r in pair) for pair in pairs)
            found = {"pairs": 100 * right / len(pairs)} | found
        return found

    def write(self, records, folder):
        lines = (
            {
                "question_id": int(r["id"]), "prompt": r["more"]["question"],
                "answer": f"({r['gold'].lower()})", "response": r["reply"],
                "answer_id": r["id"], "model_id": "",
            }
            for r in records
        )  # fmt: skip
        return [write_json_lines(folder / "answer.jsonl", lines)]

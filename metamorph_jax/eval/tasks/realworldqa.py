"""RealWorldQA (xAI 2024): 765 questions about photographs; the instruction is in the question."""

import dataclasses
import pathlib
import re
from typing import ClassVar

from metamorph_jax.data import reading
from metamorph_jax.eval.scorers.choices import mmbench_letter
from metamorph_jax.eval.tasks.base import (
    File,
    Question,
    Task,
    by_group,
    mean,
    mean_terms,
    one_of,
    write_json,
)

_SOURCE = "huggingface.co/datasets/xai-org/RealworldQA"


@dataclasses.dataclass(frozen=True)
class RealWorldQA(Task):
    """Options: `parser` (lmms_eval, cambrian).

    Attributes:
        parser: "lmms_eval": a letter is looked for where the answer is one, other replies must
            equal the answer but for case and a final dot; "cambrian": the first word of the reply,
            or of what follows "answer is", must equal it.
    """

    parser: str = "lmms_eval"

    title: ClassVar = "RealWorldQA"
    scores_of_groups: ClassVar = ("{kind}",)
    files: ClassVar = (
        File("data", "Parquet files with columns image, question, answer", _SOURCE),
        File("annotations.json", "or the list of {image, question, answer}, images beside it",
             "realworldqa.zip of x.ai"),
    )  # fmt: skip

    def __post_init__(self):
        one_of(self, parser=("lmms_eval", "cambrian"))

    def questions(self):
        for number, row in enumerate(self._rows()):
            image = row["image"]
            picture = image["bytes"] if isinstance(image, dict) else self.path(image)
            options = dict(re.findall(r"^\(?([A-Z])[.)] *(.*)$", row["question"], re.M))
            yield Question(
                str(number), row["question"], (picture,), gold=str(row["answer"]),
                groups={"kind": "choice" if options else "open"}, more={"options": options},
            )  # fmt: skip

    def _rows(self):
        found = self.find("annotations.json", "data")
        if not found.endswith(".json"):
            for path in sorted(pathlib.Path(found).glob("*.parquet")):
                yield from reading.parquet(str(path), "image", "question", "answer")
            return
        for k, row in enumerate(reading.json_file(found, list)):
            texts = ("image", "question", "answer")
            yield reading.required(row, f"{found}, record {k}", texts=texts)

    def record(self, question, answer):
        gold, reply, options = question.gold, answer.text, question.more["options"]
        said = reply.strip().lower().removesuffix(".")
        if self.parser == "cambrian":
            said = re.split(r"answer(?: is|:)\s*", reply, flags=re.I)[-1]
            said = (said.split() or [""])[0].lower().strip(".:,")
        elif options and gold in options:
            letter = mmbench_letter(reply, options)
            return {"score": float(letter == gold), "parsed": letter is not None}
        return {"score": float(said == gold.strip().lower().removesuffix("."))}

    def scores(self, records):
        found = {"accuracy": mean(records)}
        return found | {name: mean(rows) for name, rows in by_group(records, "kind").items()}

    def terms(self, record):
        return mean_terms(record, "kind")

    def write(self, records, folder):
        replies = {record["id"]: record["reply"] for record in records}
        return [write_json(folder / "realworldqa_answers.json", replies)]

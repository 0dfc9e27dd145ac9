"""VisDial 1.0: the answers to a question of a dialog, 100 of them, ranked by their likelihood.

| file under the task's root | what | from |
|---|---|---|
| visdial_1.0_val.json, visdial_1.0_test.json | dialogs | visualdialog.org/data |
| visdial_1.0_val_dense_annotations.json | relevance of the answers in one round | the same |
| VisualDialog_val2018/VisualDialog_val2018_….jpg | images, and _test2018 likewise | the same |

Prompt, that of MM-Interleaved, with all rounds before the one that is asked:
"<image> caption: CAPTION. question: Q? answer: A. question: Q? answer: A. … question: Q? answer:".
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from metamorph_jax.data import reading
from metamorph_jax.errors import FileError
from metamorph_jax.eval.scorers import dialog
from metamorph_jax.eval.tasks.base import (
    Answer,
    File,
    Question,
    Record,
    Task,
    mean,
    one_of,
    write_json,
)

_SOURCE = "visualdialog.org/data"
_DENSE = "visdial_1.0_val_dense_annotations.json"


@dataclasses.dataclass(frozen=True)
class VisDial(Task):
    """VisDial 1.0: NDCG of the round with dense annotations; MRR and recall of the right answer.

    Attributes:
        split: val (scored here) or test (server; the last round of each dialog).
        rounds: of val: "dense", the one round that has relevances, or "all" ten.
        normalise: rank by log-likelihood per token, not by the sum.
        legacy_history: leave out the round just before the one that is asked, as the code did that
            MM-Interleaved's published numbers were made with.
    """

    split: str = "val"
    rounds: str = "dense"
    normalise: bool = False
    legacy_history: bool = False

    title: ClassVar = "VisDial 1.0"
    form: ClassVar = "choose"
    main: ClassVar = "NDCG"
    other_scores: ClassVar = ("R@1", "R@5", "R@10", "MRR", "mean rank")
    files: ClassVar = (
        File("visdial_1.0_val.json", "the dialogs", _SOURCE),
        File(_DENSE, "how relevant the answers are in one round of each dialog", _SOURCE),
        File("VisualDialog_val2018", "the images", _SOURCE),
    )

    def __post_init__(self):
        one_of(self, split=("val", "test"), rounds=("dense", "all"))

    def questions(self):
        path = self.find(f"visdial_1.0_{self.split}.json")
        data = reading.required(reading.json_file(path, dict), path, "data")["data"]
        reading.required(data, f"{path}, data", "questions", "answers", "dialogs")
        for key in ("questions", "answers"):
            reading.text_list(data[key], f"{path}, {key}")
        dense = self._dense() if self.split == "val" else {}
        for row in data["dialogs"]:
            reading.required(row, f"{path}, a dialog", "image_id", "dialog", texts=("caption",))
            for number in self._rounds(row, dense):
                yield self._question(data, row, number, dense.get(row["image_id"]))

    def _dense(self) -> dict[int, tuple[int, list[float]]]:
        """Image -> (round from 1, relevance of each answer)."""
        path, found = self.find(_DENSE), {}
        for number, row in enumerate(reading.json_file(path, list)):
            reading.required(row, f"{path}[{number}]", "image_id", "round_id", "gt_relevance")
            found[row["image_id"]] = row["round_id"], row["gt_relevance"]
        return found

    def _rounds(self, row: dict, dense: dict) -> Sequence[int]:
        """Numbers, from 1, of the rounds of a dialog that are asked."""
        if self.split == "test":
            return (len(row["dialog"]),)
        if self.rounds == "all":
            return range(1, len(row["dialog"]) + 1)
        if row["image_id"] not in dense:
            raise FileError(f"{self.path(_DENSE)} has no round of image {row['image_id']}")
        return (dense[row["image_id"]][0],)

    def _question(self, data: dict, row: dict, number: int, dense) -> Question:
        texts, answers = data["questions"], data["answers"]
        asked, image = row["dialog"][number - 1], row["image_id"]
        where = f"visdial_1.0_{self.split}.json, image {image}, round {number}"
        reading.required(asked, where, "question", "answer_options")
        before = row["dialog"][: max(number - 1 - self.legacy_history, 0)]
        history = "".join(
            f" question: {texts[turn['question']]}? answer: {answers[turn['answer']]}."
            for turn in before
        )
        relevance = dense[1] if dense and dense[0] == number else None
        folder = f"VisualDialog_{self.split}2018"
        return Question(
            f"{image}/{number}",
            f"<image> caption: {row['caption']}.{history} question: {texts[asked['question']]}? "
            "answer:",
            (self.path(folder, f"{folder}_{image:012d}.jpg"),),
            choices=tuple(answers[k] for k in asked["answer_options"]),
            gold=asked.get("gt_index"),
            unit=str(image),
            more={"image_id": image, "round_id": number, "relevance": relevance},
        )

    def record(self, question: Question, answer: Answer) -> Record:
        ranked = dialog.ranks(answer.likelihoods)
        relevance = question.more["relevance"]
        found = {"ranks": ranked, "score": None}
        if question.gold is not None:
            found |= {"rank": ranked[question.gold], "score": 1 / ranked[question.gold]}
        return found | ({"ndcg": dialog.ndcg(ranked, relevance)} if relevance else {})

    def scores(self, records):
        """NDCG, R@1, 5, 10 and MRR (× 100), and the mean rank of the right answer."""
        dense = [record for record in records if "ndcg" in record]
        right = [record["rank"] for record in records if "rank" in record]
        found = {"NDCG": mean(dense, "ndcg")} if dense else {}
        return found | (dialog.retrieval(right) if right else {})

    def write(self, records, folder):
        """[{"image_id", "round_id", "ranks"}], as the server reads it."""
        rows = [
            {key: r["more"][key] for key in ("image_id", "round_id")} | {"ranks": r["ranks"]}
            for r in records
        ]
        return [write_json(folder / f"visdial_{self.split}_ranks.json", rows)]

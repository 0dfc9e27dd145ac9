"""POPE (Li et al. 2023): does the model see objects that aren't there? Yes or no, three settings.

The score of the LLaVA papers is the mean of the three F1. A reply counts as "no" by the rule of the
official script, and as "yes" otherwise; those that hold neither word are counted as unread.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

from metamorph_jax.data import reading
from metamorph_jax.eval.scorers.yes_no import pope_answer, pope_scores
from metamorph_jax.eval.tasks.base import (
    SHORT,
    File,
    Question,
    Task,
    by_group,
    one_of,
    write_json_lines,
)

SETTINGS = ("random", "popular", "adversarial")
_SOURCE = "github.com/AoiDragon/POPE, output/coco"

_MEASURES = ("f1", "accuracy", "precision", "recall", "yes_ratio")


@dataclasses.dataclass(frozen=True)
class Pope(Task):
    """Options: `setting` (all, random, popular, adversarial), `images` (folder of COCO's val2014).

    Attributes:
        setting: which questions.
        images: folder of the images; "": val2014 under the root.
    """

    setting: str = "all"
    images: str = ""

    title: ClassVar = "POPE"
    main: ClassVar = "f1"
    other_scores: ClassVar = _MEASURES
    scores_of_groups: ClassVar = tuple(f"{{setting}}/{name}" for name in _MEASURES)
    files: ClassVar = (
        *(File(f"coco_pope_{s}.json", f"the questions of the {s} setting", _SOURCE)
          for s in SETTINGS),
        File("val2014", "the images COCO_val2014_*.jpg", "cocodataset.org, 2014 val images"),
    )  # fmt: skip

    def __post_init__(self):
        one_of(self, setting=("all", *SETTINGS))

    def questions(self):
        for setting in SETTINGS if self.setting == "all" else (self.setting,):
            path = self.find(f"coco_pope_{setting}.json")
            for row in reading.json_lines(path, "question_id", "image", texts=("text", "label")):
                image = f"{self.images or self.path('val2014')}/{row['image']}"
                yield Question(
                    f"{setting}/{row['question_id']}", f"{row['text']}\n{SHORT}", (image,),
                    gold=row["label"], groups={"setting": setting}, more={"question": row["text"]},
                )  # fmt: skip

    def record(self, question, answer):
        said = pope_answer(answer.text)
        read = re.search(r"\b(yes|no|not)\b", answer.text, re.I) is not None
        return {"score": float(said == question.gold), "said": said, "parsed": read}

    def scores(self, records: Sequence):
        settings = {}
        for name, group in by_group(records, "setting").items():
            pairs = [r["said"] for r in group], [r["gold"] for r in group]
            settings[name] = pope_scores(*pairs)
        values = {
            name: {metric: 100 * getattr(one, metric) for metric in _MEASURES}
            for name, one in settings.items()
        }
        found = {m: sum(v[m] for v in values.values()) / len(values) for m in _MEASURES}
        return found | {f"{name}/{m}": v for name, one in values.items() for m, v in one.items()}

    def write(self, records, folder):
        return [
            write_json_lines(
                folder / f"coco_pope_{setting}_answers.json",
                ({"question": r["more"]["question"], "answer": r["reply"]} for r in group),
            )
            for setting, group in by_group(records, "setting").items()
        ]

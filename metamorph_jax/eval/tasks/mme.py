"""MME (Fu et al. 2023): 14 sub-tasks, two yes-or-no questions about each image.

A sub-task scores 100 (accuracy + share of images with both answers right); the sums are perception
(at most 2000) and cognition (at most 800). An image of which one question could not be asked is
left out.
"""

import dataclasses
import pathlib
from typing import ClassVar

from metamorph_jax import files
from metamorph_jax.errors import FileError
from metamorph_jax.eval.scorers.yes_no import (
    COGNITION,
    PERCEPTION,
    mme_answer,
    mme_score,
    mme_totals,
)
from metamorph_jax.eval.tasks.base import SHORT, File, Question, Task, by_group, by_unit, one_of

CATEGORIES = (*PERCEPTION, *COGNITION)
_OWN = " Please answer yes or no."  # how the questions of the files end
_IMAGES = (".jpg", ".png", ".jpeg", ".JPG", ".PNG")
_SOURCE = "MME_Benchmark_release_version.zip, as its authors send it on request"


@dataclasses.dataclass(frozen=True)
class MME(Task):
    """Options: `category` (one sub-task alone), `style` (llava_1.5, cambrian, official).

    Attributes:
        category: "": all that are there.
        style: the questions' own last sentence is replaced by the short-answer suffix
            ("llava_1.5"), followed by it ("cambrian"), or left alone ("official").
    """

    category: str = ""
    style: str = "llava_1.5"

    title: ClassVar = "MME"
    main: ClassVar = "perception"
    other_scores: ClassVar = ("cognition",)
    scores_of_groups: ClassVar = ("{category}",)
    files: ClassVar = (
        File("existence", "images and question files (or images/ and questions_answers_YN/); "
             "likewise the 13 other sub-tasks", _SOURCE),
    )  # fmt: skip

    def __post_init__(self):
        one_of(self, style=("llava_1.5", "cambrian", "official"), category=("", *CATEGORIES))

    def questions(self):
        self.find(*([self.category] if self.category else CATEGORIES))
        for category in CATEGORIES:
            there = pathlib.Path(self.path(category)).is_dir()
            if there and self.category in ("", category):
                yield from self._of(category)

    def _of(self, category: str):
        folder = pathlib.Path(self.path(category))
        texts = folder / "questions_answers_YN"
        texts, images = (texts, folder / "images") if texts.is_dir() else (folder, folder)
        for text in sorted(texts.glob("*.txt")):
            image = next((p for e in _IMAGES if (p := images / f"{text.stem}{e}").is_file()),
                         images / f"{text.stem}.jpg")  # fmt: skip
            lines = [line for line in files.read_text(text).splitlines() if line.strip()]
            for number, line in enumerate(lines):
                question, tab, gold = line.rstrip().rpartition("\t")
                if not tab or gold.lower() not in ("yes", "no") or len(lines) != 2:
                    raise FileError(f"{files.shown(text)}: expected two lines QUESTION, tab, "
                                    "Yes or No")  # fmt: skip
                unit = f"{category}/{image.name}"
                yield Question(
                    f"{unit}/{number}", self._prompt(question), (str(image),), gold=gold, unit=unit,
                    groups={"category": category}, more={"image": image.name, "question": question},
                )  # fmt: skip

    def _prompt(self, question: str) -> str:
        if self.style == "llava_1.5":
            question = question.removesuffix(_OWN)
        return question if self.style == "official" else f"{question}\n{SHORT}"

    def record(self, question, answer):
        said = mme_answer(answer.text)
        return {"score": float(said == question.gold.lower()), "parsed": said != "other"}

    def scores(self, records):
        found = {}
        for category, group in by_group(records, "category").items():
            pairs = [pair for pair in by_unit(group).values() if len(pair) == 2]
            rows = [(r["unit"], r["gold"], r["reply"]) for pair in pairs for r in pair]
            if rows:
                found[category] = mme_score(rows)
        totals = mme_totals(found)
        ordered = {c: found[c] for c in CATEGORIES if c in found}
        sums = {"perception": totals["Perception"], "cognition": totals["Cognition"]}
        has = {"perception": PERCEPTION, "cognition": COGNITION}
        return {k: v for k, v in sums.items() if found.keys() & {*has[k]}} | ordered

    def write(self, records, folder):
        written = []
        for category, group in by_group(records, "category").items():
            lines = []
            for record in group:
                reply = " ".join(record["reply"].split())
                cells = record["more"]["image"], record["more"]["question"], record["gold"], reply
                lines.append("\t".join(cells) + "\n")
            path = folder / f"{category}.txt"
            path.write_text("".join(lines), encoding="utf-8")
            written.append(path)
        return written

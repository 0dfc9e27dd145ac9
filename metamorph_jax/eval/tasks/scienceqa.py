"""ScienceQA (Lu et al. 2022): 4,241 test questions, 2,017 of them with an image.

The papers' numbers come from different files and prompts. LLaVA 1.5 and 1.6 report the accuracy of
the questions with an image ("image") with the prompt of style "llava_1.5" and a letter as the
answer; lmms-eval's `scienceqa_img` is the same with style "lmms_eval"; LLaVA 1's 90.9 is the
accuracy over all questions ("accuracy") of a model that was trained on ScienceQA and writes its
reasoning first (`scienceqa:style=reasoning`).

With `gpt4=FILE`, the answers of a text-only model ({"outputs": {id: text}}), there are the scores
of LLaVA 1's ensembles: "complement" takes its answer, ours where it can't be read. With a judge,
"judge" has it decide where the two differ.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import ClassVar

from metamorph_jax.data import reading
from metamorph_jax.errors import FileError
from metamorph_jax.eval.scorers.choices import (
    FAILED,
    choice_index,
    ensemble_letter,
    ensemble_scores,
    scienceqa_letter,
)
from metamorph_jax.eval.tasks.base import (
    LETTER,
    File,
    Question,
    Task,
    lettered,
    mean,
    one_of,
    write_json,
)

_SOURCE = "github.com/lupantech/ScienceQA, data/scienceqa and its images"
_CAMBRIAN = "Please answer directly with only the letter of the correct option and nothing else."
_LETTERS = "ABCDE"
STYLES = ("llava_1.5", "lmms_eval", "cambrian", "reasoning")
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}

# Part of the accuracy -> whether a question of these groups belongs to it.
_PARTS = {
    "image": lambda g: g["image"] == "yes", "accuracy": lambda g: True,
    **{n: (lambda g, n=n: g["subject"] == n) for n in _SUBJECTS.values()},
    "TXT": lambda g: g["text"] == "yes", "NO": lambda g: g["image"] == g["text"] == "no",
    "G1-6": lambda g: g["grade"] == "G1-6", "G7-12": lambda g: g["grade"] == "G7-12",
}  # fmt: skip
_JUDGED = ("gpt4", "complement", "judge")  # accuracies of a judge's files, where there are any


@dataclasses.dataclass(frozen=True)
class ScienceQA(Task):
    """Options: `split`, `style` (llava_1.5, lmms_eval, cambrian, reasoning), `file`, `gpt4`.

    Attributes:
        split: of pid_splits.json.
        style: of the prompt, see `prompt_of`.
        file: LLaVA's own file of prompts under the root (llava_test_CQM-A.json), taken word for
            word in place of the style's.
        gpt4: file under the root with the answers of a text-only model.
    """

    split: str = "test"
    style: str = "llava_1.5"
    file: str = ""
    gpt4: str = ""

    title: ClassVar = "ScienceQA"
    main: ClassVar = "image"
    other_scores: ClassVar = (*_PARTS, *_JUDGED)
    max_new_tokens: ClassVar = 1024
    files: ClassVar = (
        File("problems.json", "the problems", _SOURCE),
        File("pid_splits.json", "the ids of each split", _SOURCE),
        File("images", "the images SPLIT/ID/image.png", _SOURCE),
    )

    def __post_init__(self):
        one_of(self, style=STYLES)

    @property
    def judged(self) -> bool:
        return bool(self.gpt4)

    def questions(self):
        path = self.find("problems.json")
        problems = reading.json_file(path, dict)
        splits = reading.json_file(self.find("pid_splits.json"), dict)
        if self.split not in splits:
            raise FileError(f"{self.path('pid_splits.json')}: no split {self.split!r}")
        given = self._given() if self.file else {}
        other = {}
        if self.gpt4:
            table = reading.json_file(self.find(self.gpt4), dict)
            other = reading.required(table, self.gpt4, "outputs")["outputs"]
        for id in splits[self.split]:
            where = f"{path}, problem {id}"
            row = reading.required(problems.get(id, {}), where, "choices", "answer",
                                   texts=("question",))  # fmt: skip
            choices = reading.text_list(row["choices"], where)
            if type(row["answer"]) is not int or row["answer"] not in range(len(choices)):
                raise FileError(f"{where}: the answer is none of the choices")
            image = row.get("image")
            kept = {"problem": {k: row.get(k) for k in ("question", "choices", "answer", "hint")}}
            if self.gpt4:
                kept["gpt4"] = other.get(id, "")
            yield Question(
                id, given.get(id) or prompt_of(row, self.style),
                (self.path("images", row.get("split", self.split), id, image),) if image else (),
                gold=_LETTERS[row["answer"]], groups=_groups(row), more=kept,
            )  # fmt: skip

    def _given(self) -> dict[str, str]:
        """id -> prompt of LLaVA's own file."""
        found = {}
        for k, row in enumerate(reading.json_file(self.find(self.file), list)):
            reading.required(row, f"{self.file}, record {k}", "id", "conversations")
            text = row["conversations"][0]["value"].replace("<image>", "").strip()
            found[row["id"]] = f"{text}\n{LETTER}"
        return found

    def record(self, question, answer):
        problem = question.more["problem"]
        letter = scienceqa_letter(answer.text)
        chosen = choice_index(letter, problem["choices"])
        found = {
            "score": float(chosen == problem["answer"]), "chosen": chosen,
            "parsed": letter != FAILED,
        }  # fmt: skip
        return found | self._ensemble(question.more, answer.text, None)

    def _ensemble(self, more: Mapping, reply: str, second: str | None) -> dict:
        """The ensembles' scores of one question, each 0 or 1."""
        if not self.gpt4:
            return {}
        problem = {"0": more["problem"]}
        # What the ensemble reads is a sentence, whatever form our reply has.
        said = scienceqa_letter(reply)
        ours = reply if said == FAILED else f"The answer is {said}."
        again = {} if second is None else {"0": second}
        scores = ensemble_scores(problem, {"0": ours}, {"0": more["gpt4"]}, again)
        found = {"gpt4": float(scores.other), "complement": float(scores.complement)}
        return found | ({"judge": float(scores.judged)} if second is not None else {})

    def judge(self, records, ask):
        """Where our answer and the other model's differ, it is asked again with both outputs."""
        pairs = [(r["reply"], r["more"]["gpt4"]) for r in records]
        pairs = [(scienceqa_letter(ours), ensemble_letter(other)) for ours, other in pairs]
        differ = [k for k, (ours, other) in enumerate(pairs) if ours != other]
        second = ask([second_prompt(records[k]) for k in differ])
        said = dict(zip(differ, second, strict=True))
        return [
            record | self._ensemble(record["more"], record["reply"], said.get(k) or "")
            for k, record in enumerate(records)
        ]

    def scores(self, records):
        found = {}
        for name, belongs in _PARTS.items():
            if rows := [r for r in records if belongs(r["groups"])]:
                found[name] = mean(rows)
        for name in _JUDGED:
            if all(name in r for r in records):
                found[name] = mean(records, name)
        return found

    def terms(self, record):
        names = [name for name, belongs in _PARTS.items() if belongs(record["groups"])]
        judged = {name: (float(record[name]), 1.0) for name in _JUDGED if name in record}
        return {name: (float(record["score"]), 1.0) for name in names} | judged

    def write(self, records, folder: pathlib.Path):
        count, right = len(records), sum(r["score"] for r in records)
        table = {
            "acc": 100 * right / count, "correct": int(right), "count": count,
            "results": {r["id"]: r["chosen"] for r in records},
            "outputs": {r["id"]: r["reply"] for r in records},
        }  # fmt: skip
        return [write_json(folder / "scienceqa_results.json", table)]


def _groups(row: Mapping) -> dict[str, str]:
    """What the official script breaks scores down by."""
    grade = str(row.get("grade", "")).removeprefix("grade")
    return {
        "image": "yes" if row.get("image") else "no",
        "text": "yes" if row.get("hint") else "no",
        "subject": _SUBJECTS.get(row.get("subject"), ""),
        "grade": ("G1-6" if int(grade) <= 6 else "G7-12") if grade.isdecimal() else "",
    }


def prompt_of(row: Mapping, style: str) -> str:
    """The prompt of a problem; its image comes before it.

    llava_1.5   Context: …, Question: …, Options: (A) … (B) …, and the instruction for a letter
    reasoning   …, Context: …, Options: (A) … (B) …, as LLaVA 1 was trained on ScienceQA ("QCM")
    lmms_eval   Context: … if there is one, the question, A. … a line each, the instruction
    cambrian    hint and question on one line, A. … a line each, its own instruction
    """
    question, hint = row["question"], (row.get("hint") or "").strip()
    options = " ".join(f"({_LETTERS[k]}) {text}" for k, text in enumerate(row["choices"]))
    if style in ("llava_1.5", "reasoning"):
        first = style == "llava_1.5"
        context = f"Context: {hint or 'N/A'}"
        asked = (context, f"Question: {question}") if first else (question, context)
        text = "\n".join((*asked, f"Options: {options}")).replace("  ", " ").strip()
        return f"{text}\n{LETTER}" if first else text
    if style == "cambrian":
        return f"{hint} {question}".strip() + f"\n{lettered(row['choices'])}\n{_CAMBRIAN}"
    context = f"Context: {hint}\n" if hint else ""
    return f"{context}{question}\n{lettered(row['choices'])}\n{LETTER}"


def second_prompt(record: Mapping) -> str:
    """What a text-only model is asked where its answer and ours differ."""
    question = prompt_of(record["more"]["problem"], "reasoning")
    return (
        f"{question}\n\nTwo people answered this question. The first one saw the picture that "
        f"belongs to it, if there is one.\nFirst answer: {record['reply']}\nSecond answer: "
        f"{record['more']['gpt4']}\n\nWhich option is right? Say why, and end with a sentence of "
        'the form "The answer is X." with the letter of the option.'
    )

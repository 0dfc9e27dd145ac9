"""MMMU (Yue et al. 2023): college-level questions with one to seven images, 30 subjects.

Images stand where the question or an option names them. The official parser draws a random option
where it finds none in a reply; here such a reply is wrong and counted as unread, so that scores
don't move from run to run.
"""

import ast
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

from metamorph_jax.data import reading
from metamorph_jax.errors import FileError, MissingFile
from metamorph_jax.eval.tasks.base import (
    LETTER,
    LETTERS,
    SHORT,
    File,
    Question,
    Task,
    by_group,
    lettered,
    mean,
    mean_terms,
    one_of,
    write_json,
)

DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine "
    "Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Humanities and Social Science": "History Literature Psychology Sociology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics "
    "Energy_and_Power Materials Mechanical_Engineering",
}
_DOMAIN = {subject: name for name, subjects in DOMAINS.items() for subject in subjects.split()}
_MARK = re.compile(r"<image (\d)>")
_SOURCE = "huggingface.co/datasets/MMMU/MMMU"


@dataclasses.dataclass(frozen=True)
class MMMU(Task):
    """Options: `split` (validation, dev, test), `style` (official, lmms_eval, cambrian).

    Attributes:
        split: which files.
        style: "official": options as (A), images in place; "lmms_eval": as A.; "cambrian": the
            images come first, and the marks of images are left out.
    """

    split: str = "validation"
    style: str = "official"

    title: ClassVar = "MMMU"
    scores_of_groups: ClassVar = ("{domain}", "{subject}")
    max_new_tokens: ClassVar = 1024
    files: ClassVar = (
        File("SUBJECT", "SPLIT-*.parquet of each subject, such as Art/validation-00000-of-00001"
             ".parquet", _SOURCE),
    )  # fmt: skip

    def __post_init__(self):
        one_of(self, style=("official", "lmms_eval", "cambrian"))

    def questions(self):
        found = sorted(pathlib.Path(self.root).glob(f"*/{self.split}-*.parquet"))
        if not found:
            raise MissingFile(
                f"task {self.name}: no SUBJECT/{self.split}-*.parquet in {self.root}; they hold "
                f"questions and images, from {_SOURCE}"
            )
        for path in found:
            for row in reading.parquet(str(path), "id", "question", "options", "answer"):
                yield self._of(row, path)

    def _of(self, row: dict, path: pathlib.Path) -> Question:
        options = _literal(row["options"], path)
        choice = row.get("question_type", "multiple-choice") == "multiple-choice"
        prompt = self._prompt(row["question"], options if choice else ())
        pictures = {k: row[f"image_{k}"] for k in range(1, 8) if row.get(f"image_{k}")}
        numbers = [int(k) for k in _MARK.findall(prompt)]
        if self.style == "cambrian" or not {*numbers} <= pictures.keys():
            prompt, numbers = " ".join(_MARK.split(prompt)[::2]), list(pictures)
        gold = row["answer"]
        if not choice and str(gold).startswith("["):
            gold = _literal(gold, path)
        subject = row["id"].split("_", 1)[1].rsplit("_", 1)[0]
        return Question(
            row["id"], _MARK.sub("<image>", prompt),
            tuple(pictures[k]["bytes"] for k in numbers), gold=gold if gold != "?" else None,
            groups={"subject": subject, "domain": _DOMAIN.get(subject, "other")},
            more={"options": list(options) if choice else None},
        )  # fmt: skip

    def _prompt(self, question: str, options: Sequence[str]) -> str:
        if not options:
            return f"{question}\n\n{SHORT}"
        if self.style == "official":
            return f"{question}\n\n{lettered(options, '({letter}) {text}')}\n\n{LETTER}"
        before = "\nOptions:" if self.style == "cambrian" else ""
        return f"{question}{before}\n{lettered(options)}\n\n{LETTER}"

    def record(self, question, answer):
        options, gold = question.more["options"], question.gold
        if options is None:
            said = open_answers(answer.text)
            golds = gold if isinstance(gold, list) else [gold]
            return {"score": None if gold is None else float(open_match(said, golds)),
                    "said": said}  # fmt: skip
        letter = choice(answer.text, options)
        score = None if gold is None else float(letter == gold)
        return {"score": score, "said": letter, "parsed": letter is not None}

    def scores(self, records):
        records = [record for record in records if record["score"] is not None]
        if not records:
            return {}
        found = {"accuracy": mean(records)}
        for group in ("domain", "subject"):
            found |= {name: mean(rows) for name, rows in by_group(records, group).items()}
        return found

    def terms(self, record):
        return mean_terms(record, "domain", "subject")

    def write(self, records, folder):
        said = {
            r["id"]: r["reply"] if r["more"]["options"] is None else r["said"] or r["reply"]
            for r in records
        }
        return [write_json(folder / f"mmmu_{self.split}.json", said)]


def _literal(text, path) -> list[str]:
    """A Python list that is written as text."""
    try:
        value = ast.literal_eval(text) if isinstance(text, str) else list(text)
        return [str(each) for each in value]
    except (ValueError, SyntaxError, TypeError) as error:
        raise FileError(f"{path}: {text!r} is not a list ({error})") from error


# ---- the official parser

_PUNCTUATION = ",.!?;:'"
_BEFORE = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def choice(reply: str, options: Sequence[str]) -> str | None:
    """The letter that a reply chooses: of several, the one that comes last; None if it has none."""
    for mark in _PUNCTUATION:
        reply = reply.strip(mark)
    reply, letters = f" {reply} ", LETTERS[: len(options)]
    for form in ("({})", " {} "):
        places = {letter: reply.rfind(form.format(letter)) for letter in letters}
        if max(places.values(), default=-1) >= 0:
            return max(places, key=places.__getitem__)
    if len(reply.split()) > 5:
        places = {x: reply.lower().rfind(o.lower()) for x, o in zip(letters, options, strict=True)}
        if max(places.values(), default=-1) >= 0:
            return max(places, key=places.__getitem__)
    return None


def open_answers(reply: str) -> list[str | float]:
    """What an open reply may mean: the tails of its lines, and the numbers in them."""
    reply = reply.strip().strip(".").lower()
    lines, tails = reply.split("\n"), []
    for number, line in enumerate(lines):
        before = (*_BEFORE, "=") if number == len(lines) - 1 else _BEFORE
        found = [line.split(word)[-1].strip() for word in before if word in line]
        shortest = min(found, key=len, default="")
        if shortest and shortest not in _PUNCTUATION:
            tails.append(shortest)
    tails = tails or [reply]
    numbers = [n for tail in tails for pattern in _NUMBERS for n in pattern.findall(tail)]
    return list(dict.fromkeys(v for text in (*tails, *numbers) for v in normal(text)))


def normal(text: str) -> list[str | float]:
    """A number as float with two decimals; other text in lower case."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_match(said: Iterable[str | float], golds: Iterable[str]) -> bool:
    """Whether a right text is part of what was said, or a right number is among it."""
    right = [value for gold in golds for value in normal(str(gold))]
    for value in said:
        if isinstance(value, str):
            if any(isinstance(one, str) and one in value for one in right):
                return True
        elif value in right:
            return True
    return False

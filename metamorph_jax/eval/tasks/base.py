"""What a benchmark task is: official files in, questions out; answers in, scores out.

    @dataclasses.dataclass(frozen=True)
    class Colours(Task):
        \"\"\"One line for `metamorph eval --list`.\"\"\"

        title: ClassVar = "Colours"
        files: ClassVar = (File("colours.jsonl", "a question a line", "github.com/…"),)
        main: ClassVar = "accuracy"
        max_new_tokens: ClassVar = 16

        def questions(self):
            for row in reading.json_lines(self.path("colours.jsonl")):
                yield Question(row["id"], f"{row['text']}\\n{SHORT}", (self.path(row["image"]),),
                               gold=row["answer"])

        def record(self, question, answer):
            return {"score": float(answer.text.lower() == question.gold)}

        def scores(self, records):
            return {"accuracy": mean(records)}

A task knows no model: `eval/bench.py` asks the questions and has the answers scored, so anything
that answers requests (`sampling.generator.Generator`, an endpoint) can stand behind it. Options of
a task are the fields of its dataclass; `tasks.TASKS` gives it its name.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from metamorph_jax import files
from metamorph_jax.errors import ConfigError, FileError, MissingFile

# What prompts of many benchmarks end with, after a newline.
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# How a task is answered: text is generated, the most likely of given answers is chosen, or images
# are drawn.
FORMS = ("generate", "choose", "draw")


@dataclasses.dataclass(frozen=True)
class File:
    """A file or folder that a task reads.

    Attributes:
        path: relative to the task's root.
        what: it holds.
        source: where one gets it.
    """

    path: str
    what: str
    source: str


@dataclasses.dataclass(frozen=True)
class AnswerImage:
    """An image that a question gets from the answer to an earlier one, of which it is the first.

    Attributes:
        id: of the earlier question.
    """

    id: str


# An image of a question: the path of a file, the bytes of one, a function that gives the bytes
# (called when the question's turn comes, so that a data set need not be in memory), or one that was
# drawn in answer to an earlier question.
Picture = str | pathlib.Path | bytes | Callable[[], bytes] | AnswerImage


@dataclasses.dataclass(frozen=True)
class Question:
    """One request to a model, and what its answer is compared with.

    Attributes:
        id: differs from that of all others of the task.
        prompt: text; images stand where it has `<image>`, else before it.
        images: see `Picture`.
        video: path of a video, of which one frame a second is read.
        choices: the texts among which the form "choose" ranks; () for other forms.
        gold: what is right, in the form that the task's `record` wants.
        unit: questions that are scored together (both of a pair, all rotations of one) share it;
            "": the question is its own. Confidence intervals are over units.
        groups: what scores are broken down by: {"category": "color"}. JSON-able.
        more: further fields of the official answer file. JSON-able.
        literal: the prompt is all that the model reads, in a wording of its own: no chat template
            is put around it.
    """

    id: str
    prompt: str
    images: tuple[Picture, ...] = ()
    video: str = ""
    choices: tuple[str, ...] = ()
    gold: Any = None
    unit: str = ""
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    literal: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text: of the reply, stripped; for the form "choose", the chosen text.
        choice: index of the chosen text; None for other forms.
        likelihoods: log-likelihood of each choice.
        images: files of the drawn images.
        document: of the form "draw", text with `<image>` where each of these stands.
        cut: whether the number of new tokens ended it, not the model.
    """

    text: str
    choice: int | None = None
    likelihoods: tuple[float, ...] = ()
    images: tuple[str, ...] = ()
    document: str = ""
    cut: bool = False


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a publication asked, for tasks with an option `protocol` that names it.

    Attributes:
        options: of the task; those that are given win.
        decoding: of the generator (`sampling.options.Options`); those that are not at their
            defaults win.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decoding: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Record = dict[str, Any]
# Texts (each a whole prompt for a judge) -> replies, None where the judge failed.
Judge = Callable[[Sequence[str]], Sequence[str | None]]


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark. Subclasses are frozen dataclasses too; their fields are the task's options.

    Attributes:
        root: folder with the files of this task.
        name: under which it was asked for, with its options; names files of results.

    Class attributes:
        title: of the benchmark.
        files: that it reads, for documentation and messages.
        form: one of `FORMS`; a subclass may make it an option.
        normalise: for the form "choose": divide log-likelihoods by the number of tokens.
        max_new_tokens: of a reply.
        main: name of the score that counts.
        other_scores: names of the scores that it may have beside the main one.
        scores_of_groups: forms of the names of scores that it has for each value of a group:
            "{kind}", or "CIDEr {domain}".
        judged: `judge` needs one.
        resamples: most resamples of a bootstrap; 0 where `scores` takes minutes.
        scored_by: options that scores depend on, but not what is asked: with other values of them
            the answers that are there are scored again.
        protocols: name -> what the option `protocol`, which such a task has, fixes.
        without_intervals: why scores have none, for the table.
    """

    root: str
    name: str = ""

    title: ClassVar[str] = ""
    files: ClassVar[tuple[File, ...]] = ()
    form: ClassVar[str] = "generate"
    normalise: ClassVar[bool] = False
    max_new_tokens: ClassVar[int] = 128
    main: ClassVar[str] = "accuracy"
    other_scores: ClassVar[tuple[str, ...]] = ()
    scores_of_groups: ClassVar[tuple[str, ...]] = ()
    judged: ClassVar[bool] = False
    resamples: ClassVar[int] = 1000
    scored_by: ClassVar[tuple[str, ...]] = ()
    protocols: ClassVar[Mapping[str, Protocol]] = {}
    without_intervals: ClassVar[str] = ""

    # ---- to be written for each task

    def questions(self) -> Iterable[Question]:
        """All questions, in the order of the official file.

        Raises:
            FileError: a file is missing (`path` says so well) or damaged.
        """
        raise NotImplementedError

    def record(self, question: Question, answer: Answer) -> Record:
        """What is kept of one answer: "score" (0 to 1, None if only `scores` or a judge can tell),
        and what `scores` and `write` need. JSON-able.

        Where a reply can't be parsed, "parsed" is False: these are counted and shown. The bench
        adds id, prompt, reply, gold, unit, groups and more.
        """
        raise NotImplementedError

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        """Metrics of the answered questions, in the unit that papers use, the `main` one first.

        `record["unit"]` tells what belongs together. Must not depend on the order of units and
        must bear repeated ones: a bootstrap draws units (and gives each draw a unit of its own).
        Metrics of which there is no record are left out.
        """
        raise NotImplementedError

    def score_names(self) -> set[str] | None:
        """Names of all scores that its questions may give, so that a wrong one is noticed before a
        run; which of them there are, depends on the answers, and some need a judge. None for a task
        that states neither `other_scores` nor `scores_of_groups`. Raises as `questions` does."""
        if not (self.other_scores or self.scores_of_groups):
            return None
        questions = self.questions() if self.scores_of_groups else ()
        return {self.main, *self.other_scores} | {
            form.format(**question.groups)
            for question in questions
            for form in self.scores_of_groups
            if all(question.groups.get(name) for name in re.findall(r"{(\w+)}", form))
        }

    def terms(self, record: Record) -> dict[str, tuple[float, float]]:
        """Metric -> (a, b) of a record, of the metrics that are 100 times the sum of all a over the
        sum of all b. A bootstrap of these takes seconds where `scores` would take minutes."""
        return {}

    def write(self, records: Sequence[Record], folder: pathlib.Path) -> list[pathlib.Path]:
        """Writes the official answer file(s), in the order of the question file; their paths."""
        return []

    def judge(self, records: Sequence[Record], ask: Judge) -> list[Record]:
        """The records with a judge's verdicts, for tasks with `judged`; those without a verdict
        have "score": None and "parsed": False. `ask` remembers replies across starts."""
        return list(records)

    def finish(self, records: Sequence[Record]) -> list[Record]:
        """The records with what is found about all of them together: how rare a word is, or what a
        network sees in drawn images, which wants them in batches. Called once, before `scores`,
        which may see a part of them or some of them repeated."""
        return list(records)

    @property
    def decoding(self) -> Mapping[str, Any]:
        """Options of the generator that the protocol fixes."""
        return self.protocols.get(vars(self).get("protocol", ""), Protocol()).decoding

    @property
    def reply(self) -> Mapping[str, Any]:
        """What a reply is to be, for models that have to be told: `mode` and `rounds` of
        `requests.Request`."""
        return {"mode": {"draw": "image", "generate": "text"}.get(self.form, ""), "rounds": 0}

    def intervals(self, records: Sequence[Record]) -> dict[str, tuple[float, float]]:
        """Metric -> 95 % interval, of metrics for which the task has found it by itself."""
        return {}

    # ---- for tasks to use

    def path(self, *parts: str) -> str:
        """A path under the root.

        Raises:
            FileError: it would leave the root: official files name images, but only their own.
        """
        path = str(pathlib.Path(self.root, *parts))
        if not self.holds(path):
            raise FileError(f"task {self.name or type(self).__name__}: {files.shown(path)} is "
                            "outside of the task's folder")  # fmt: skip
        return path

    def holds(self, path: str | pathlib.Path) -> bool:
        """Whether a path, by its text alone, is in the root or in the folder of the option
        `images`. A link there may point elsewhere."""
        path = os.path.join(os.path.abspath(path), "")
        folders = (self.root or ".", vars(self).get("images"))
        return any(path.startswith(os.path.join(os.path.abspath(f), "")) for f in folders if f)

    def find(self, *names: str) -> str:
        """The first of these files or folders under the root that is there.

        Raises:
            MissingFile: naming the file, the task, and where one gets it.
        """
        for name in names:
            path = pathlib.Path(self.root, name)  # an option may name a file elsewhere
            if path.exists():
                return str(path)
        known = next(
            (f for f in self.files for n in names if f"{n}/".startswith(f"{f.path}/")), None
        )
        raise MissingFile(
            f"task {self.name or type(self).__name__}: no {' or '.join(names)} in "
            f"{files.shown(self.root)}"
            + (f"; it holds {known.what}, from {known.source}" if known else "")
        )


def one_of(task: Task, **allowed) -> None:
    """Raises ConfigError if an option of a task has none of the allowed values."""
    for name, values in allowed.items():
        value = getattr(task, name)
        if value not in values:
            raise ConfigError(
                f"task {task.name or type(task).__name__}: {name}={value}, expected one of "
                + ", ".join(str(v) or "(empty)" for v in values)
            )


def mean(records: Sequence[Record], key: str = "score") -> float:
    """100 times the mean of a value of the records."""
    return 100 * sum(record[key] for record in records) / len(records)


def mean_terms(record: Record, *groups: str, all: str = "accuracy") -> dict:
    """`Task.terms` of the mean score, called `all`, and of its means by the values of groups; none
    of a record without a score."""
    score = record["score"]
    names = [all, *(record["groups"].get(group, "") for group in groups)]
    return {} if score is None else {name: (float(score), 1.0) for name in names if name}


def by_group(records: Sequence[Record], group: str) -> dict[str, list[Record]]:
    """Records by their value of a group, in the order in which values first appear."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["groups"].get(group, ""), []).append(record)
    return found


def by_unit(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records that are scored together."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["unit"], []).append(record)
    return found


def lettered(choices: Sequence[str], form: str = "{letter}. {text}") -> str:
    """The choices a line each: "A. red\\nB. blue"."""
    rows = zip(LETTERS, choices, strict=False)
    return "\n".join(form.format(letter=letter, text=text) for letter, text in rows)


def write_json(path: pathlib.Path, value) -> pathlib.Path:
    """Writes a JSON file."""
    files.write_whole(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")
    return path


def write_json_lines(path: pathlib.Path, values: Iterable) -> pathlib.Path:
    """Writes a value a line."""
    with path.open("w", encoding="utf-8") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
    return path

"""Runs tasks: a model is asked the questions (`eval/asking.py`), and the task scores its answers.

    OUT/scores.json            scores of all tasks, confidence intervals, and what they depend on
    OUT/report.html            the same as a page, with the worst answers and their images
    OUT/TASK/answers.jsonl     see `eval/answers.py`
    OUT/TASK/records.jsonl     a line per question: prompt, reply, what is right, score
    OUT/TASK/official/         the answer file(s) of the benchmark itself
    OUT/TASK/images/           images that the benchmark's own files hold, or that the model drew

Every host asks all questions together (the generator shares rows over the mesh); the first one
reads and writes what is in OUT. A question that can't be asked, because its image is missing for
instance, is left out, counted and named.
"""

import collections
import contextlib
import dataclasses
import pathlib
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from metamorph_jax import files
from metamorph_jax.errors import BadSample, FileError, UserError
from metamorph_jax.eval import intervals, tasks
from metamorph_jax.eval.answers import Store, chosen
from metamorph_jax.eval.asking import Answering, Asking, decoding, needed
from metamorph_jax.eval.tasks.base import (
    FORMS,
    Answer,
    Judge,
    Question,
    Record,
    Task,
    write_json,
    write_json_lines,
)
from metamorph_jax.sampling.options import Options

# What code raises that meets a value of another type or form than official files have.
_ODD = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How tasks are run.

    Attributes:
        options: of the generator; `max_new_tokens` None takes the task's own.
        limit: most questions of a task, drawn by chance; 0: all.
        resamples: of the bootstrap; None: as the task says, 0: no confidence intervals.
        model: what names the model, for files and pages. Answers that were made with another one
            are never mixed with its own.
    """

    options: Options = Options()
    limit: int = 0
    resamples: int | None = None
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a task gave.

    Attributes:
        task: it.
        questions: how many were asked.
        records: of those that were answered, and, with "missed", of those that could not be asked
            because the model had not drawn the image that they need.
        failures: id of a question that could not be asked -> why.
        settings: what the answers depend on.
        scores: metric -> value; intervals: metric -> (low, high); methods: how intervals were
            found, and how many resamples were drawn -> metrics.
        files: official answer files.
        seconds: that the model took, in this start.
    """

    task: Task
    questions: int
    records: Sequence[Record]
    failures: Mapping[str, str]
    settings: Mapping[str, Any]
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    methods: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    files: Sequence[pathlib.Path] = ()
    seconds: float = 0.0

    @property
    def unparsed(self) -> int:
        """Replies that the task, or a judge, could not make sense of."""
        return sum(r.get("parsed") is False and not r.get("missed") for r in self.records)

    @property
    def answered(self) -> int:
        """Questions that have an answer."""
        return sum(not record.get("missed") for record in self.records)

    @property
    def cut(self) -> int:
        """Replies that the number of new tokens cut off."""
        return sum(record["cut"] for record in self.records)

    @property
    def reasons(self) -> dict[str, int]:
        """Why questions could not be asked -> how many."""
        return dict(collections.Counter(why.partition(":")[0] for why in self.failures.values()))

    @property
    def without_intervals(self) -> str:
        """Why scores that could have an interval have none; "" where there is nothing to say."""
        missing = self.scores.keys() - self.intervals.keys()
        return self.task.without_intervals if missing else ""

    def summary(self) -> dict[str, Any]:
        """For scores.json."""
        return {
            "title": self.task.title, "main": self.task.main, "scores": dict(self.scores),
            "intervals": {name: list(pair) for name, pair in self.intervals.items()},
            "bootstrap": {how: list(names) for how, names in self.methods.items()},
            "without_intervals": self.without_intervals,
            "questions": self.questions, "answered": self.answered, "failed": self.reasons,
            "failures": dict(self.failures), "unparsed": self.unparsed, "cut": self.cut,
            "settings": dict(self.settings), "prompt": self.records[0]["prompt"],
            "files": [str(file) for file in self.files], "seconds": round(self.seconds, 1),
        }  # fmt: skip


def run_task(
    task: Task, model: Answering, out: str | pathlib.Path, settings: Settings,
    judge: Callable[[pathlib.Path], Judge] | None = None,
) -> Result:  # fmt: skip
    """Asks what isn't answered yet, and scores all answers.

    Args:
        task: of `tasks.make`.
        model: who answers.
        out: folder; that of the task is made in it.
        settings: see there.
        judge: for tasks with `judged`: gives the judge for a folder (`judges.Judge.of`); None
            leaves their records without a verdict.

    Raises:
        UserError: the files of the task or the folder can't be used, or no question was answered.
    """
    folder = pathlib.Path(out, tasks.file_name(task.name))
    try:
        return _run(task, model, folder, settings, judge)
    except UserError:
        raise
    except OSError as error:
        why = f"{error.strerror or error}"
        where = files.shown(error.filename or folder)
        raise UserError(f"task {task.name}: {where} can't be read or written: {why}") from error


def _run(task: Task, model: Answering, folder: pathlib.Path, settings: Settings, judge) -> Result:
    if task.form not in FORMS:
        raise UserError(f"task {task.name}: form {task.form!r} is none of {', '.join(FORMS)}")
    questions, depends = chosen(questions_of(task), settings.limit), describe(task, settings)
    asked = {k: v for k, v in depends["task"].items() if k not in task.scored_by}
    store = Store(folder, depends | {"task": asked}) if jax.process_index() == 0 else None
    began = time.monotonic()
    asking = Asking(task, model, folder, settings.options, store)
    asking.all(questions)
    seconds = time.monotonic() - began
    with sound(task):
        records = [
            _record(task, question, asking.answers[question.id], asking.shown[question.id])
            if question.id in asking.answers
            else _record(task, question, Answer(""), ()) | {"missed": True}
            for question in questions
            if question.id in asking.answers.keys() | asking.missed
        ]
    if not asking.answers:
        why = next(iter(asking.failures.values()), "it has none")
        raise UserError(f"task {task.name}: no question could be answered: {why}")
    if judge is not None and task.judged:
        records = task.judge(records, judge(folder))
    with sound(task):
        records = task.finish(records)
        result = Result(task, len(questions), records, asking.failures, depends, seconds=seconds)
        return _scored(result, folder, settings.resamples)


def _scored(result: Result, folder: pathlib.Path, resamples: int | None) -> Result:
    """The result with scores; records and official files are written."""
    task, records = result.task, result.records
    # Of a judged task, records without a verdict don't count.
    scored = [r for r in records if not (task.judged and r["score"] is None)]
    scores = task.scores(scored) if scored else {}
    if jax.process_index():
        return dataclasses.replace(result, scores=scores)
    write_json_lines(folder / "records.jsonl", records)
    (folder / "official").mkdir(exist_ok=True)
    written = task.write(records, folder / "official")
    drawn = intervals.bootstrap(task, scored, resamples=resamples)
    own = task.intervals(scored) if resamples != 0 else {}
    methods = drawn.methods() | ({"by the task itself": list(own)} if own else {})
    return dataclasses.replace(
        result, scores=scores, intervals={**drawn.ranges, **own}, methods=methods, files=written
    )


def describe(task: Task, settings: Settings) -> dict[str, Any]:
    """What the answers to a task, and their scores, depend on, JSON-able."""
    options = dataclasses.asdict(decoding(task, settings.options))
    del options["batch_size"]
    asked = {k: v for k, v in dataclasses.asdict(task).items() if k not in ("name", "root")}
    return {"model": dict(settings.model), "task": asked, "form": task.form, "decoding": options}


@contextlib.contextmanager
def sound(task: Task):
    """FileError in place of what a task raises where its files hold something unexpected."""
    try:
        yield
    except (UserError, BadSample):
        raise
    except _ODD as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {files.shown(error)}"
        raise FileError(
            f"task {task.name}: its files in {files.shown(task.root)} hold something unexpected "
            f"({what}; {pathlib.Path(place.filename).name}, line {place.lineno})"
        ) from error


def questions_of(task: Task) -> Iterator[Question]:
    """The questions of a task, checked before any of them is asked.

    Raises:
        UserError: two have the same id, as answers are found by it; or one needs an image of a
            question that doesn't come before it.
        FileError: the files hold something unexpected, or name an image that is not in the task's
            folders.
    """
    seen = set()
    with sound(task):
        for question in task.questions():
            _check(task, question)
            if question.id in seen:
                raise UserError(f"task {task.name}: two questions have the id "
                                f"{files.shown(question.id)!r}")  # fmt: skip
            if later := needed(question) - seen:
                raise UserError(f"task {task.name}: question {files.shown(question.id)!r} needs an "
                                f"image of {files.shown(min(later))!r}, which doesn't come before "
                                "it")  # fmt: skip
            seen.add(question.id)
            yield question


def _check(task: Task, question: Question) -> None:
    texts = [question.id, question.prompt, question.video, question.unit, *question.choices,
             *question.groups.values()]  # fmt: skip
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"{wrong[0]!r} where a text should be, of question {question.id!r}")
    if not question.id.strip():
        raise ValueError("an empty id")
    if task.form == "choose" and not question.choices:
        raise ValueError(f"question {question.id!r} has no choices")
    for picture in (*question.images, *filter(None, [question.video])):
        if isinstance(picture, str | pathlib.Path) and not task.holds(picture):
            raise FileError(f"task {task.name}: question {files.shown(question.id)} names the file "
                            f"{files.shown(picture)}, outside of the task's folders")  # fmt: skip


def _record(task: Task, question: Question, answer: Answer, images: Sequence[str]) -> Record:
    common = {
        "id": question.id, "prompt": question.prompt, "images": list(images),
        "gold": question.gold, "reply": answer.text, "cut": answer.cut,
        "unit": question.unit or question.id, "groups": dict(question.groups),
        "more": dict(question.more),
    }  # fmt: skip
    if answer.choice is not None:
        common |= {"choice": answer.choice, "likelihoods": list(answer.likelihoods)}
    if answer.images:
        common |= {"drawn": list(answer.images), "document": answer.document}
    return common | task.record(question, answer)


def save(results: Sequence[Result], out: str | pathlib.Path) -> pathlib.Path:
    """Writes scores.json; what it has of other tasks, asked of the same model, stays."""
    path = pathlib.Path(out, "scores.json")
    found = {result.task.name: result.summary() for result in results}
    models = [result.settings["model"] for result in results]
    if path.exists():
        for name, earlier in files.read_json(path, dict, max_bytes=2**30).items():
            same = isinstance(earlier, dict) and earlier.get("settings", {}).get("model") in models
            if same and name not in found:
                found[name] = earlier
    return write_json(path, found)


# ---- during training


def during_training(name: str) -> Callable[..., "TaskDuringTraining"]:
    """What a config's `task="NAME"` stands for, see `train.evals`."""

    def make(**options) -> TaskDuringTraining:
        return TaskDuringTraining(name, **options)

    return make


class TaskDuringTraining:
    """A task as an evaluation of a run: scores alone, nothing is kept.

    Args:
        name: of the task, with options.
        bench_root: folder with a folder for each task.
        limit: most questions; batch_size, max_new_tokens: of the generator.
        options: further ones of the task.

    Raises:
        ConfigError: there is no such task or option.
        FileError: its files are missing or damaged.
    """

    def __init__(
        self, name: str, bench_root: str = "", limit: int = 0, batch_size: int = 8,
        max_new_tokens: int | None = None, **options,
    ):  # fmt: skip
        self._task = tasks.make(name, bench_root, **options)
        next(iter(self._task.questions()), None)  # now, not after hours of training
        decoding = Options(max_new_tokens, batch_size=batch_size)
        self._settings = Settings(decoding, limit, 0)

    def score_names(self) -> set[str] | None:
        """Of all scores that `run` may give; None if the task does not say them."""
        if self._task.judged:  # there is no judge in training
            return {"failed"}
        found = self._task.score_names()
        return found and {"failed", *found}

    def run(self, generator: Answering) -> Mapping[str, float]:
        """Scores of the model, and "failed", the number of questions that could not be asked."""
        with tempfile.TemporaryDirectory() as folder:
            result = run_task(self._task, generator, folder, self._settings)
        return {**result.scores, "failed": float(len(result.failures))}

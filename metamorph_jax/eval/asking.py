"""Puts the questions of a task to a model and keeps the answers.

Images that a benchmark's own files hold are written to OUT/TASK/images a chunk at a time, so that a
question is always about files: what the model read is what the page shows.
"""

import dataclasses
import hashlib
import io
import math
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import jax
from tqdm import tqdm

from metamorph_jax import distributed, files
from metamorph_jax.data.images import sniff
from metamorph_jax.data.sources.base import IMAGE
from metamorph_jax.errors import BadSample, ConfigError
from metamorph_jax.eval.answers import Store, as_line, key_of, of_line
from metamorph_jax.eval.tasks.base import Answer, AnswerImage, Question, Task
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.requests import FAULTS, Request, checked
from metamorph_jax.sampling.results import Reply, TextPart, stem

_CHUNK = 32  # batches whose images are written, and whose lengths are sorted, at a time
_NAMED = 5  # failures of a task that are printed; all of them are in scores.json
_NOT_DRAWN = "not_drawn"

Failed = Callable[[Request, Exception], None]


class Answering(Protocol):
    """What tasks may ask of whatever answers them: `sampling.generator.Generator`, an endpoint."""

    def replies(
        self,
        requests: Iterable[Request],
        options: Options,
        failed: Failed,
        stream: None = None,
        draw: bool = True,
    ) -> Iterator[tuple[Request, Reply]]:
        """See `Generator.replies`."""
        ...

    def likelihoods(
        self,
        requests: Iterable[Request],
        answers: Mapping[str, Sequence[str]],
        failed: Failed,
        batch_size: int = 8,
    ) -> Iterator[tuple[Request, list]]:
        """See `Generator.likelihoods`."""
        ...


def decoding(task: Task, options: Options) -> Options:
    """The options with what the task says where they are at their defaults.

    Raises:
        ConfigError: together they make no sense.
    """
    default = Options()
    fixed = {k: v for k, v in task.decoding.items() if getattr(options, k) == getattr(default, k)}
    if options.max_new_tokens is None:
        fixed.setdefault("max_new_tokens", task.max_new_tokens)
    try:
        return dataclasses.replace(options, **fixed)
    except ValueError as error:
        raise ConfigError(f"task {task.name}: {error}") from error


class Asking:
    """The questions of one task, and a model.

    Args:
        task: it.
        model: who answers.
        folder: for images.
        options: of the generator.
        store: of the answers; None on all hosts but the first.

    Attributes:
        answers: id of a question -> answer.
        failures: id of a question that could not be asked -> why.
        missed: ids of those of them that needed an image which the model had not drawn.
        shown: id of a question -> files of its images.
    """

    def __init__(
        self, task: Task, model: Answering, folder: pathlib.Path, options: Options,
        store: Store | None = None,
    ):  # fmt: skip
        self.task, self.model, self.folder, self.store = task, model, folder, store
        self.options = decoding(task, options)
        self.answers: dict[str, Answer] = {}
        self.failures: dict[str, str] = {}
        self.missed: set[str] = set()
        self.shown: dict[str, tuple[str, ...]] = {}

    def all(self, questions: Sequence[Question]) -> None:
        """Asks what is not in the store yet."""
        keys = {question.id: key_of(question, self.task.root) for question in questions}
        known = {}
        if self.store is not None:
            lines = {id: self.store.get(id, key) for id, key in keys.items()}
            known = {id: line for id, line in lines.items() if line and _whole(line)}
        known = distributed.gather(known)[0]  # those of the first host
        for question in questions:
            if question.id in known and needed(question) <= self.answers.keys():
                self.answers[question.id] = of_line(known[question.id])
                self.shown[question.id] = self._places(question)
        known = self.answers.copy()
        before = f", {len(known):,} answered before" if known else ""
        self._say(f"{len(questions):,} questions{before}")
        todo = [question for question in questions if question.id not in known]
        size, done = _CHUNK * self.options.batch_size, 0
        with self._progress(len(questions), len(known)) as bar:
            for wave in waves(todo):
                for start in range(0, len(wave), size):
                    part = wave[start : start + size]
                    self._ask(part, keys, bar)
                    done += len(part)
                    if not sys.stderr.isatty() and len(todo) > size:
                        self._say(f"{done:,} of {len(todo):,} asked")
        if len(self.failures) > _NAMED:
            self._say(f"{len(self.failures):,} questions could not be asked; scores.json names all")

    def _ask(self, questions: Sequence[Question], keys: Mapping[str, str], bar) -> None:
        def failed(request, error):
            self._failed(request, error)
            bar.update()

        # A model that can't be told what to write has no modes.
        told = self.task.reply["mode"] in getattr(self.model, "modes", ())
        asked = self.task.reply if told else {}
        requests = []
        for question in questions:
            request = Request(question.id, question.prompt, (), question.video,
                              literal=question.literal, **asked)  # fmt: skip
            try:
                places = tuple(self._file(question, k) for k in range(len(question.images)))
                requests.append(checked(dataclasses.replace(request, images=places)))
                self.shown[question.id] = places
            except FAULTS as error:
                failed(request, error)
                if isinstance(error, BadSample) and error.reason == _NOT_DRAWN:
                    self.missed.add(question.id)
        ask = self._compared if self.task.form == "choose" else self._generated
        for id, answer in ask({q.id: q for q in questions}, requests, failed):
            self.answers[id] = answer
            if self.store is not None:
                self.store.add(id, keys[id], **as_line(answer))
            bar.update()

    def _generated(self, questions, requests, failed):
        drawing = self.task.form == "draw"
        for request, reply in self.model.replies(requests, self.options, failed, draw=drawing):
            text = "".join(p.text for p in reply.segments if isinstance(p, TextPart)).strip()
            images = self._drawn(request.id, reply) if drawing else ()
            whole = document(reply) if images else ""
            yield request.id, Answer(text, images=images, document=whole, cut=not reply.ended)

    def _compared(self, questions, requests, failed):
        choices = {request.id: questions[request.id].choices for request in requests}
        size = self.options.batch_size
        for request, found in self.model.likelihoods(requests, choices, failed, batch_size=size):
            values = [one.mean if self.task.normalise else one.total for one in found]
            if not all(map(math.isfinite, values)):
                failed(request, BadSample("not_finite", "a likelihood is not a number"))
                continue
            best = max(range(len(values)), key=values.__getitem__)
            yield request.id, Answer(choices[request.id][best], best, tuple(values))

    # ---- images

    def _file(self, question: Question, number: int) -> str:
        """The path of an image; one that is not a file yet is written."""
        picture = question.images[number]
        if isinstance(picture, AnswerImage):
            return self._of_answer(picture)
        if not (isinstance(picture, bytes) or callable(picture)):
            return str(picture)
        data = picture if isinstance(picture, bytes) else picture()
        found = sniff(data[:16])
        path = self._place(question, number).with_suffix(f".{found[0] if found else 'bin'}")
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(data)
            pathlib.Path(file.name).replace(path)
        return str(path)

    def _of_answer(self, picture: AnswerImage) -> str:
        """The file of an image that was drawn for an earlier question."""
        answer = self.answers.get(picture.id)
        if answer is None or not answer.images:
            raise BadSample(_NOT_DRAWN, f"no image was drawn for question {picture.id}")
        return answer.images[0]

    def _place(self, question: Question, number: int) -> pathlib.Path:
        """Where an image that a benchmark's file holds is kept, without its extension."""
        picture = question.images[number]
        name = f"{stem(question.id).replace('.', '_')}-{number}"
        if isinstance(picture, bytes):  # questions may share it
            name = hashlib.sha256(picture).hexdigest()[:24]
        return self.folder / "images" / name

    def _places(self, question: Question) -> tuple[str, ...]:
        """The paths of the images of a question that was asked in an earlier start."""

        def found(number: int, picture) -> str:
            if isinstance(picture, AnswerImage):
                return self._of_answer(picture)
            if not (isinstance(picture, bytes) or callable(picture)):
                return str(picture)
            place = self._place(question, number)
            return str(next(iter(sorted(place.parent.glob(f"{place.name}.*"))), place))

        return tuple(found(*item) for item in enumerate(question.images))

    def _drawn(self, id: str, reply: Reply) -> tuple[str, ...]:
        """Writes the drawn images of a reply; their paths."""
        paths = []
        for number, image in enumerate(reply.images):
            path = self.folder / "images" / f"{stem(id)}_drawn{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            data = io.BytesIO()
            image.save(data, "PNG")
            files.write_whole(path, data.getvalue())  # by every host: a later question may read it
            paths.append(str(path))
        return tuple(paths)

    # ---- what people see

    def _failed(self, request: Request, error: Exception) -> None:
        why = str(error) if isinstance(error, BadSample) else f"{type(error).__name__}: {error}"
        self.failures[request.id] = files.shown(why, 500)
        if len(self.failures) <= _NAMED:
            self._say(f"question {request.name}: {files.shown(error, 500)}; left out")

    def _say(self, text: str) -> None:
        if jax.process_index() == 0:
            tqdm.write(f"{self.task.name}: {text}", file=sys.stderr)

    def _progress(self, total: int, done: int):
        """A bar, where standard error is a terminal."""
        off = True if jax.process_index() else None
        return tqdm(total=total, initial=done, desc=self.task.name, unit="q", disable=off)


def needed(question: Question) -> set[str]:
    """The questions of whose answers it has images."""
    return {picture.id for picture in question.images if isinstance(picture, AnswerImage)}


def waves(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """The questions in groups, each after those of which they need drawn images."""
    depth: dict[str, int] = {}
    for question in questions:
        before = [depth[id] for id in needed(question) if id in depth]
        depth[question.id] = 1 + max(before, default=-1)
    for level in range(max(depth.values(), default=-1) + 1):
        yield [question for question in questions if depth[question.id] == level]


def document(reply: Reply) -> str:
    """The text of a reply, with `<image>` where each drawn image stands."""
    parts = [part.text if isinstance(part, TextPart) else IMAGE * bool(part.drawn)
             for part in reply.segments]  # fmt: skip
    return "".join(parts).strip()


def _whole(line: Mapping) -> bool:
    """Whether the files of drawn images that a line names are there."""
    return all(pathlib.Path(path).is_file() for path in line.get("images", ()))

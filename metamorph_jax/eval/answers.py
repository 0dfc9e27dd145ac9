"""Answers on disk: a line each as soon as it is there, so that a run that was killed resumes.

OUT/TASK/settings.json     what answers depend on; another model or prompt form is refused
OUT/TASK/answers.jsonl     {"id", "key", "text", …}; the key is a hash of what was asked
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from metamorph_jax import files
from metamorph_jax.errors import FileError, UserError
from metamorph_jax.eval.tasks.base import Answer, AnswerImage, Question


def key_of(question: Question, root: str = "") -> str:
    """A hash of what is asked.

    Of files, the path under `root` counts, so that a benchmark may be moved; of an image that is
    made on demand, only that it is there.
    """

    def named(picture) -> str:
        if isinstance(picture, bytes):
            return hashlib.sha256(picture).hexdigest()
        if isinstance(picture, AnswerImage):
            return f"drawn for {picture.id}"
        return "made" if callable(picture) else str(picture).removeprefix(root)

    asked = [question.prompt, [named(p) for p in question.images], named(question.video)]
    text = json.dumps([*asked, list(question.choices)], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_answer(line: Mapping[str, Any]) -> bool:
    """Whether a line has what `of_line` needs."""
    numbers, choice = line.get("likelihoods", ()), line.get("choice")
    return (
        all(
            isinstance(text, str)
            for text in (line["text"], *line.get("images", ()), line.get("document", ""))
        )
        and all(isinstance(number, float) for number in numbers)
        and (choice is None or type(choice) is int and 0 <= choice)
        and (not numbers or choice is not None and choice < len(numbers))
    )


class Store:
    """The lines of one file of JSON lines with an id and a key each, added one by one.

    Args:
        folder: of the task.
        settings: what the lines depend on; JSON-able.
        name: of the file.
        sound: whether a line has what its reader needs, besides id and key; may raise KeyError or
            TypeError where it hasn't.

    Raises:
        UserError: the folder holds lines made with other settings, or can't be written.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        settings: Mapping[str, Any],
        name: str = "answers",
        sound: Callable[[Mapping[str, Any]], bool] = is_answer,
    ):
        self._file, self._sound = folder / f"{name}.jsonl", sound
        saved = folder / ("settings.json" if name == "answers" else f"{name}_settings.json")
        self._lines: dict[str, dict] = {}
        settings = json.loads(json.dumps(settings))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(self._file):
                _check_settings(folder, saved, settings)
                self._read()
            files.write_whole(saved, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
            files.write_whole(self._file, "".join(_line(value) for value in self._lines.values()))
        except OSError as error:
            raise UserError(f"{files.shown(folder)} can't be written: {error.strerror}") from error

    def _read(self) -> None:
        damaged = []
        for number, _, line in files.raw_lines(self._file, 2**27):
            try:
                value = files.parse(line, "the line", dict)
                texts = isinstance(value["id"], str) and isinstance(value["key"], str)
                if not (texts and self._sound(value)):
                    raise TypeError("not a line of this file")
                self._lines[value["id"]] = value
            except (FileError, KeyError, TypeError):
                if line.endswith(b"\n"):  # the last line may have been cut off when it was written
                    damaged.append(number)
        if damaged:
            print(
                f"{files.shown(self._file)}: {len(damaged)} damaged lines (the first is line "
                f"{damaged[0]}); they are made again",
                file=sys.stderr,
            )

    def __len__(self) -> int:
        return len(self._lines)

    def get(self, id: str, key: str) -> dict | None:
        """The line of this id, if it is of this key."""
        found = self._lines.get(id)
        return found if found is not None and found["key"] == key else None

    def add(self, id: str, key: str, **values) -> dict:
        """Adds a line, which is on disk when this returns."""
        line = {"id": id, "key": key, **values}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(_line(line))
        self._lines[id] = line
        return line


def _line(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _check_settings(folder: pathlib.Path, saved: pathlib.Path, settings: dict) -> None:
    if not saved.is_file():
        raise UserError(f"{files.shown(folder)} holds answers without {saved.name}: choose another "
                        "--out")  # fmt: skip
    before = files.read_json(saved, dict)
    changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if changed:
        name = changed[0]
        raise UserError(
            f"{files.shown(folder)} holds answers made with other settings ({', '.join(changed)}; "
            f"{name}: {files.shown(before.get(name))} then, {files.shown(settings.get(name))} "
            "now): choose another --out or remove it"
        )


def as_line(answer: Answer) -> dict:
    """An answer as the fields of a line."""
    return {name: value for name, value in dataclasses.asdict(answer).items() if value}  | {
        "text": answer.text, "choice": answer.choice,
    }  # fmt: skip


def of_line(line: Mapping[str, Any]) -> Answer:
    """The answer of a line."""
    return Answer(
        line["text"], line.get("choice"), tuple(line.get("likelihoods", ())),
        tuple(line.get("images", ())), line.get("document", ""), line.get("cut", False),
    )  # fmt: skip


def chosen(questions: Iterable[Question], limit: int, seed: int = 0) -> list[Question]:
    """At most `limit` questions (0: all), whole units, drawn by chance but in their order.

    A larger limit has all questions of a smaller one.
    """
    questions = list(questions)
    if not limit or limit >= len(questions):
        return questions
    units: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        units.setdefault(question.unit or question.id, []).append(number)

    def draw(unit: str) -> bytes:
        return hashlib.sha256(f"{seed}/{unit}".encode()).digest()

    taken: list[int] = []
    for unit in sorted(units, key=draw):
        if taken and len(taken) + len(units[unit]) > limit:
            break
        taken += units[unit]
    return [questions[number] for number in sorted(taken)]

"""A task's questions, answered by a function, scored and written, without the bench."""

import pathlib

from metamorph_jax.eval import intervals, tasks
from metamorph_jax.eval.tasks.base import Answer


def run(spec, root, say, folder: pathlib.Path | None = None):
    """(questions, records, scores, files) of a task.

    Args:
        say: a function of a question, or a dict by id, that gives a text, or an `Answer`.
        folder: for the official files.
    """
    task = tasks.make(spec, root=str(root))
    questions = list(task.questions())
    assert len({q.id for q in questions}) == len(questions)
    records = []
    for question in questions:
        said = say[question.id] if isinstance(say, dict) else say(question)
        answer = said if isinstance(said, Answer) else Answer(said)
        common = {
            "id": question.id, "gold": question.gold, "reply": answer.text, "cut": False,
            "unit": question.unit or question.id, "groups": dict(question.groups),
            "more": dict(question.more), "prompt": question.prompt,
        }  # fmt: skip
        records.append(common | task.record(question, answer))
    files = task.write(records, folder) if folder is not None else []
    stated = {metric for record in records for metric in task.terms(record)}
    assert not stated & intervals.bootstrap(task, records, resamples=2).rescored  # terms are right
    scores = task.scores(records)
    assert scores.keys() <= task.score_names()
    return questions, records, scores, files


def picture(question, number=0) -> bytes:
    """The bytes of an image of a question, whatever form it has."""
    one = question.images[number]
    if callable(one):
        return one()
    return one if isinstance(one, bytes) else pathlib.Path(one).read_bytes()

"""Judges of drawn images: whoever says how likely the answer to a question is "yes".

    judge(files of images, questions) -> float64[N] in [0, 1], NaN where there is no answer

A model of ours compares the likelihoods of "Yes" and "No" (`LikelihoodJudge`); an endpoint answers
in words (`WordsJudge`). How often a judge is right is measured by the task `made_images`, on
images whose contents are known.
"""

import hashlib
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np

from metamorph_jax import distributed, endpoint
from metamorph_jax.errors import UserError
from metamorph_jax.eval.answers import Store
from metamorph_jax.eval.judges import ENDPOINT, EndpointModel, check_judge
from metamorph_jax.files import shown
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.requests import Request

VERDICTS = ("Yes", "No")
_NAMED = 5  # failures that are printed
_CHUNK = 256  # questions that a judge is asked at a time

ImageJudge = Callable[[Sequence[str], Sequence[str]], np.ndarray]


def asked(question: str) -> str:
    """A question as a judge reads it."""
    return f"{question}\nAnswer with yes or no."


class LikelihoodJudge:
    """A model whose generator compares answers: P(Yes) / (P(Yes) + P(No)).

    Args:
        generator: `sampling.generator.Generator`, or what has its `likelihoods`.
        batch_size: questions that are read together.
    """

    def __init__(self, generator, batch_size: int = 8):
        self._generator, self._size = generator, batch_size

    def __call__(self, images: Sequence[str], questions: Sequence[str]) -> np.ndarray:
        told, requests = _Failures(), _requests(images, questions)
        out = np.full(len(requests), np.nan)
        answers = {request.id: VERDICTS for request in requests}
        pairs = self._generator.likelihoods(requests, answers, told, batch_size=self._size)
        for request, (yes, no) in pairs:
            out[int(request.id)] = 1 / (1 + np.exp(no.total - yes.total))
        told.summary()
        return out


class WordsJudge:
    """A model that answers in words, such as one behind an endpoint: 1 for yes, 0 for no.

    Args:
        model: `judges.EndpointModel`, or what has its `replies`.
    """

    def __init__(self, model):
        self._model = model

    def __call__(self, images: Sequence[str], questions: Sequence[str]) -> np.ndarray:
        told, requests = _Failures(), _requests(images, questions)
        out = np.full(len(requests), np.nan)
        for request, reply in self._model.replies(requests, Options(max_new_tokens=16), told):
            out[int(request.id)] = verdict(reply.text)
        told.summary()
        return out


def _requests(images: Sequence[str], questions: Sequence[str]) -> list[Request]:
    return [
        Request(str(i), asked(question), (image,))
        for i, (image, question) in enumerate(zip(images, questions, strict=True))
    ]


class Remembered:
    """A judge whose answers are kept in FOLDER/image_verdicts.jsonl as they come: a run that was
    killed resumes, and no question is paid for twice.

    Args:
        judge: who is asked what isn't known.
        folder: of the task's results.
        name: of the judge; answers of another one are refused.

    Raises:
        UserError: the folder holds answers of another judge, or can't be written.
    """

    def __init__(self, judge: ImageJudge, folder: pathlib.Path, name: str):
        self._judge, self._store = judge, None
        if jax.process_index() == 0:
            sound = lambda line: isinstance(line["yes"], float)  # noqa: E731
            self._store = Store(folder, {"judge": name}, "image_verdicts", sound)

    def __call__(self, images: Sequence[str], questions: Sequence[str]) -> np.ndarray:
        pairs = list(zip(images, questions, strict=True))
        keys = [hashlib.sha256(f"{i}\n{q}".encode()).hexdigest()[:32] for i, q in pairs]
        known = {}
        if self._store is not None:
            lines = {key: self._store.get(key, key) for key in keys}
            known = {key: line["yes"] for key, line in lines.items() if line}
        known = distributed.gather(known)[0]  # those of the first host
        todo = list({key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}
                    .items())  # fmt: skip
        for start in range(0, len(todo), _CHUNK):
            part = todo[start : start + _CHUNK]
            found = self._judge([image for _, (image, _) in part], [q for _, (_, q) in part])
            for (key, (image, question)), yes in zip(part, map(float, found), strict=True):
                known[key] = yes
                if self._store is not None and not np.isnan(yes):
                    self._store.add(key, key, image=image, question=question, yes=yes)
        return np.array([known[key] for key in keys], np.float64)


class _Failures:
    """Prints the first questions that could not be asked, and how many there were."""

    def __init__(self):
        self._count = 0

    def __call__(self, request, error: Exception) -> None:
        self._count += 1
        if self._count <= _NAMED:
            print(f"judge: {shown(error, 500)}", file=sys.stderr)

    def summary(self) -> None:
        if self._count:
            print(f"judge: {self._count:,} questions could not be asked", file=sys.stderr)


def verdict(reply: str) -> float:
    """1 for "yes" at the begin of a reply, 0 for "no", NaN for anything else."""
    word = reply.strip().lower().lstrip("*\"' ")
    for text, value in (("yes", 1.0), ("no", 0.0)):
        if word.startswith(text) and not word[len(text) : len(text) + 1].isalpha():
            return value
    return float("nan")


def open_judge(spec: str, config: str = "", batch_size: int = 8) -> ImageJudge:
    """A judge.

    Args:
        spec: workdir of a run, published weights, or "endpoint:MODEL".
        config: FILE[:SIZE] of published weights whose config.json doesn't say what they are.
        batch_size: questions that are read together.

    Raises:
        UserError: there is no such model.
    """
    if not spec:
        raise UserError("no judge: give the workdir of a run, published weights or endpoint:MODEL")
    check_judge(spec)
    if spec.startswith(ENDPOINT):
        return WordsJudge(EndpointModel(endpoint.Endpoint(), spec.removeprefix(ENDPOINT)))
    from metamorph_jax import api

    return LikelihoodJudge(api.load(spec, config=config or None).generator, batch_size)

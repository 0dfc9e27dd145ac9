"""Judges of drawn images: whoever says how likely the answer to a question is "yes".

    judge(files of images, questions) -> float64[N] in [0, 1], NaN where there is no answer

A model of ours compares the likelihoods of "Yes" and "No" (`LikelihoodJudge`); an endpoint answers
in words (`EndpointJudge`). How often a judge is right is measured by the task `made_images`, on
images whose contents are known.
"""

import concurrent.futures
import sys
from collections.abc import Callable, Sequence

import numpy as np

from metamorph_jax import endpoint
from metamorph_jax.convert import hf
from metamorph_jax.errors import FileError, RequestRefused, UserError
from metamorph_jax.files import shown
from metamorph_jax.sampling.requests import Request

VERDICTS = ("Yes", "No")
ENDPOINT = "endpoint:"
_NAMED = 5  # failures that are printed

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
        requests = [
            Request(str(i), asked(question), (image,))
            for i, (image, question) in enumerate(zip(images, questions, strict=True))
        ]
        out = np.full(len(requests), np.nan)
        told = _Failures()
        answers = {request.id: VERDICTS for request in requests}
        pairs = self._generator.likelihoods(requests, answers, told, batch_size=self._size)
        for request, (yes, no) in pairs:
            out[int(request.id)] = 1 / (1 + np.exp(no.total - yes.total))
        told.summary()
        return out


class EndpointJudge:
    """A model behind an endpoint, which answers in words.

    Args:
        client: `endpoint.Endpoint`.
        model: as the endpoint names it.
        concurrency: questions at the same time.
    """

    def __init__(self, client: endpoint.ChatClient, model: str, concurrency: int = 8):
        self._client, self._model, self._concurrency = client, model, concurrency

    def __call__(self, images: Sequence[str], questions: Sequence[str]) -> np.ndarray:
        told = _Failures()

        def ask(image: str, question: str) -> float:
            try:
                parts = [endpoint.image_part(image), endpoint.text_part(asked(question))]
                message = {"role": "user", "content": parts}
                done = self._client.complete(
                    [message], model=self._model, temperature=0.0, max_tokens=16
                )
            except (RequestRefused, FileError) as error:
                told(None, error)
                return np.nan
            return verdict(done.text)

        with concurrent.futures.ThreadPoolExecutor(self._concurrency) as pool:
            out = np.array(list(pool.map(ask, images, questions)), np.float64)
        told.summary()
        return out


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


def check_judge(spec: str) -> None:
    """Raises what `open_judge` would for a judge that is not there, before images are drawn.

    Raises:
        UserError: there is no such folder, or no endpoint is set up.
    """
    if spec.startswith(ENDPOINT):
        endpoint.Endpoint()
    elif spec and not spec.startswith(hf.PREFIX):
        hf.find(spec)


def open_judge(spec: str, config: str = "", batch_size: int = 8) -> ImageJudge:
    """A judge.

    Args:
        spec: workdir of a run, published weights (with `config`), or "endpoint:MODEL".
        config: FILE[:SIZE] of published weights.
        batch_size: questions that are read together.

    Raises:
        UserError: there is no such model.
    """
    if not spec:
        raise UserError("no judge: give the workdir of a run, published weights or endpoint:MODEL")
    if spec.startswith(ENDPOINT):
        client = endpoint.Endpoint()
        name = spec.removeprefix(ENDPOINT)
        return EndpointJudge(client, name, client.limits.concurrency)
    from metamorph_jax import api

    return LikelihoodJudge(api.load(spec, config=config or None).generator, batch_size)

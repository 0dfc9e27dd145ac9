"""Best of N: of N samples of an image, the one that the model itself confirms is kept.

A request leaves much of an image open, and not every sample of it is a good one. A model that
reads images can tell, in the space of visual tokens and before a pixel is drawn:

    request ─┬─ visual tokens 0 ─┐
             ├─ visual tokens 1 ─┼─ "<image> Is there a red circle?" ── log P(yes) / P(yes or no)
             └─ …                ┘  each in a conversation of its own

The samples of a request are decoded in one batch. As a score, the likelihood of "yes" is VQAScore's
(Lin et al. 2024, arXiv 2404.01291), which asks another model about the drawn image; to take the
best of many samples by a score is how DALL·E drew (Ramesh et al. 2021, arXiv 2102.12092).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from metamorph_jax.data.sources.base import IMAGE, VIDEO
from metamorph_jax.errors import WeightError
from metamorph_jax.sampling import likelihood
from metamorph_jax.sampling.requests import FAULTS, Request
from metamorph_jax.sampling.results import Candidates
from metamorph_jax.sampling.segments import BROKEN, Result, VisualTokens

MOST = 64
YES, NO = ("yes", "Yes"), ("no", "No")  # however the model was taught to write them


def check(generator, policy, temperature: float) -> None:
    """Raises ValueError, for the user, where a model has nothing to choose from, or can't choose.

    Args:
        policy: with which the samples are decoded, with text of this temperature.
    """
    if not generator.draws:
        raise ValueError("this model writes text only, and best_of is for images: leave it at 1")
    if not policy.visual:
        raise ValueError(
            "what this model draws images from are not visual tokens that it could read again: "
            "leave best_of at 1"
        )
    if not generator.reader.projects:
        raise ValueError(
            "this model was trained on cached features and has no tower, so it reads no image, "
            "not even its own: leave best_of at 1"
        )
    if not (policy.varies or temperature > 0):
        raise ValueError(
            "nothing varies, so all samples would be the same: best_of needs a head that samples "
            "visual tokens (with a temperature above 0), or text of a temperature above 0"
        )


def questions(request: Request) -> tuple[str, ...]:
    """The yes-or-no questions that an image of a request is confirmed by."""
    if request.confirm:
        return request.confirm
    text = " ".join(request.prompt.replace(IMAGE, " ").replace(VIDEO, " ").split())
    return (f'Does this image match the request "{text}"? Answer yes or no.',)


def askable(
    prompts, requests: Iterable[Request], failed: Callable[[Request, Exception], None]
) -> Iterator[Request]:
    """The requests whose questions fit into the context.

    Args:
        prompts: `prompts.Prompts`.
        failed: told about the others.
    """
    for request in requests:
        try:
            for question in questions(request):
                likelihood.about(prompts, question, YES + NO)
        except FAULTS as error:
            failed(request, error)
        else:
            yield request


def scores(generator, images: np.ndarray, asked: Sequence[str], batch_size: int) -> np.ndarray:
    """float64[N]: how sure the model is that "yes" answers all questions about each image.

    The sum over the questions of the log-likelihood of "yes" against "no".

    Args:
        generator: of the model.
        images: float32[N, P, C] visual tokens.
        asked: questions; the image stands where one has `<image>`, else before it.
        batch_size: images that are read together.

    Raises:
        ValueError: a question does not fit.
        WeightError: a likelihood is not finite.
    """
    total = np.zeros(len(images))
    for question in asked:
        found = generator.likelihoods_about(images, question, YES + NO, batch_size)
        answers = np.array([[answer.total for answer in one] for one in found])
        if not np.isfinite(answers).all():
            raise WeightError("the likelihoods of yes and no are not finite: damaged weights")
        either = np.logaddexp.reduce(answers, axis=1)
        total += np.logaddexp.reduce(answers[:, : len(YES)], axis=1) - either
    return total


def choose(generator, request: Request, results: Sequence[Result]) -> Candidates:
    """Which of the results for a request is kept, and how each scored.

    A result with several images has the mean of their scores, one without a whole image has none.
    Where none has a score, or the best ones have the same, the first is kept.

    Args:
        request: one of those that are `askable`.

    Raises:
        WeightError: see `scores`.
    """
    asked = questions(request)
    images = [_images(result) for result in results]
    flat = [image for of_result in images for image in of_result]
    each = scores(generator, np.stack(flat), asked, len(results)) if flat else np.zeros(0)
    parts = np.split(each, np.cumsum([len(of_result) for of_result in images])[:-1])
    means = [float(part.mean()) if len(part) else None for part in parts]
    kept = int(np.argmax([-np.inf if mean is None else mean for mean in means]))
    return Candidates(asked, tuple(means), kept)


def _images(result: Result) -> list[np.ndarray]:
    """float32[P, C] of each whole image; none of a row whose numbers are not finite."""
    if (result.record == BROKEN).any():
        return []
    whole = [x for x in result.segments if isinstance(x, VisualTokens) and x.complete]
    return [image.features for image in whole if np.isfinite(image.features).all()]

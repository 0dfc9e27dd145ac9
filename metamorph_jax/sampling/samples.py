"""The first samples of a data set, put to a model: what it answers, beside what the data answer."""

import collections
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from metamorph_jax.data import images, pipeline
from metamorph_jax.data.chat_templates import SOURCE
from metamorph_jax.data.config import InputConfig
from metamorph_jax.data.sources.base import ImageRef, Sample
from metamorph_jax.data.sources.kinds import Kind
from metamorph_jax.data.stream import choices
from metamorph_jax.errors import BadSample
from metamorph_jax.files import shown
from metamorph_jax.recipe import Shown
from metamorph_jax.sampling.generator import Generator
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.requests import IMAGE, Request

TOKENS = 64  # of an answer, besides the visual tokens of one image
LOOKED_AT = 50  # samples of each source for one that is wanted
SIDE = 256  # pixels of an image that is shown


def ask(
    generator: Generator, data: InputConfig, kinds: Mapping[str, Kind], count: int,
    draw: bool = False,
) -> list[Shown]:  # fmt: skip
    """The model's answers to the first user turns of the first usable samples.

    Args:
        generator: of the model.
        data: where the samples come from.
        kinds: of the recipe's own records.
        count: number of samples; they are taken from the sources in turn. Those that are passed
            over on the way are counted, by reason, in a line on the console.
        draw: have images drawn in the answers, which are then shown, too.
    """
    skipped: collections.Counter[str] = collections.Counter()
    samples = {str(k): sample for k, sample in enumerate(first(data, kinds, count, skipped))}
    tell(skipped, len(samples))
    requests = {name: _request(name, sample) for name, sample in samples.items()}
    budget = min(TOKENS + generator.feature_shape[0], generator.prompts.length // 2)
    answers: dict[str, str] = {}
    drawn: dict[str, list] = {}

    def failed(request: Request, error: Exception) -> None:
        answers[request.id] = f"(no answer: {error})"

    options = Options(budget, batch_size=count)
    for request, reply in generator.replies(requests.values(), options, failed, draw=draw):
        answers[request.id], drawn[request.id] = reply.text, reply.images
    return [
        _shown(samples[name], requests[name], answers[name], drawn.get(name, ()))
        for name in samples
    ]


def tell(skipped: collections.Counter[str], asked: int) -> None:
    """Prints what was passed over before so many samples could be asked; on one host."""
    if skipped and jax.process_index() == 0:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in skipped.most_common())
        print(f"samples: {skipped.total():,} were passed over before {asked} could be asked "
              f"({shown(reasons, 500)})", file=sys.stderr, flush=True)  # fmt: skip


def first(
    data: InputConfig, kinds: Mapping[str, Kind], count: int, skipped: collections.Counter[str]
) -> Iterator[Sample]:
    """The first samples that can be asked again: with whole image files, as they are, and an
    answer.

    Args:
        skipped: gets the others, "source/reason" -> number.
    """
    unchanged = dataclasses.replace(data.images, mirror=0.0)
    sources = pipeline.open_sources(dataclasses.replace(data, images=unchanged), kinds)
    looked = range(min(max(map(len, sources)), LOOKED_AT * count))
    usable = (
        _usable(source, number, k, data, skipped)
        for k in looked
        for number, source in enumerate(sources)
        if k < len(source)
    )
    return itertools.islice((sample for sample in usable if sample is not None), count)


def _usable(source, number: int, k: int, data: InputConfig, skipped) -> Sample | None:
    """Sample k of source `number`; None if it is bad or its images are cut out of something."""
    try:
        sample = source.sample(k, choices(data.order.seed, number, 0, k))
        data.images.load(sample.images)
    except BadSample as error:
        skipped[f"{source.name}/{error.reason}"] += 1
        return None
    if all(map(_whole, sample.images)):
        return sample
    skipped[f"{source.name}/part_of_a_file"] += 1
    return None


def _whole(ref) -> bool:
    return ref == ImageRef(ref.path)


def _turns(sample: Sample) -> tuple[str, str]:
    """(text of the first user turn, text of the answer to it)."""
    texts = [text for role, text in sample.turns if role != "system"]
    return texts[0], "".join(texts[1:2])


def _request(name: str, sample: Sample) -> Request:
    question, _ = _turns(sample)
    refs = sample.images[: question.count(IMAGE)]
    literal = sample.turns[0][0] == SOURCE
    return Request(name, question, tuple(ref.path for ref in refs), literal=literal)


def _shown(sample: Sample, request: Request, reply: str, drawn: Sequence) -> Shown:
    question, answer = _turns(sample)
    loaded = images.load(sample.images[: (question + answer).count(IMAGE)])
    asked = len(request.images)
    labels = [
        f"given {k + 1}" if k < asked else f"wanted {k - asked + 1}" for k in range(len(loaded))
    ]
    labels += [f"drawn {k + 1}" for k in range(len(drawn))]
    text = {"question": question, "wanted": answer, "answer": reply}
    shown = {
        label: thumbnail(image) for label, image in zip(labels, [*loaded, *drawn], strict=True)
    }
    return Shown(f"{sample.source} {sample.id}", text, shown)


def thumbnail(image) -> np.ndarray:
    """uint8[h, w, 3] of a Pillow image, at most `SIDE` pixels on a side."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    return np.asarray(small)

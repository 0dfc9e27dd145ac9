"""How likely a model finds given answers to a prompt: what multiple choice is ranked by.

An answer is written as in training, and the log-probabilities of its tokens are those of the
training loss. The prompt, with its images, is read once for all answers to it:

    prompt    [header user] <image> What colour? [header assistant]
    block 0                                                         red  <eot>
    block 1                                                         blue <eot>     <eot>: not scored

Blocks of all rows of a batch are read together, the first ones, then the second ones, …, each after
the same cache.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from metamorph_jax.data.chat import SENTINEL, Chat
from metamorph_jax.data.interleave import Row, build_row, read_place
from metamorph_jax.data.sources.base import IMAGE, Turn
from metamorph_jax.errors import WeightError
from metamorph_jax.sampling.cached_llm import CachedLLM
from metamorph_jax.sampling.loop import BUCKETS, Loop, RowImages, bucket
from metamorph_jax.sampling.prompt_reader import batches
from metamorph_jax.sampling.prompts import Prompts
from metamorph_jax.sampling.requests import FAULTS, Request
from metamorph_jax.sampling.segments import WHY_BROKEN
from metamorph_jax.sharding import constrain

_BLOCKS = (2, 4, 8, 16, *BUCKETS)  # lengths that blocks are padded to


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of one answer.

    Attributes:
        total: log-probability, the sum over its tokens.
        tokens: how many they are.
    """

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Log-probability for each token."""
        return self.total / self.tokens


@dataclasses.dataclass(frozen=True)
class Block:
    """What follows the prompt for one answer.

    Attributes:
        ids: int32[n].
        scored: bool[n], the tokens whose probabilities count.
    """

    ids: np.ndarray
    scored: np.ndarray


def of_requests(
    generator,
    requests: Iterable[Request],
    answers: Mapping[str, Sequence[str]],
    failed: Callable[[Request, Exception], None],
    batch_size: int,
    closing: bool,
) -> Iterator[tuple[Request, list[Likelihood]]]:
    """See `Generator.likelihoods`."""
    requests = list(requests)
    size = min(batch_size, max(len(requests), 1))
    prompts = _read_all(generator, requests, answers, closing, failed)
    for batch in batches(prompts, size):
        filled = batch + [batch[0]] * (size - len(batch))  # needs no compilation of its own
        _, embeds, blocks, images = zip(*filled, strict=True)
        images = None if all(one is None for one in images) else images
        found = of_batch(generator.loop, embeds, blocks, images)
        for (request, *_), one in zip(batch, found, strict=False):
            if all(math.isfinite(answer.total) for answer in one):
                yield request, one
            else:
                failed(request, WeightError(f"{WHY_BROKEN}, so its answers can't be compared"))


def of_images(
    generator, images: np.ndarray, question: str, answers: Sequence[str], batch_size: int
) -> list[list[Likelihood]]:
    """See `Generator.likelihoods_about`."""
    row, blocks = about(generator.prompts, question, answers)
    embeds = [generator.reader.placed(row, image[None]).embeds for image in images]
    found = []
    for start in range(0, len(images), batch_size):
        part = embeds[start : start + batch_size]
        filled = part + part[:1] * (batch_size - len(part))
        found += of_batch(generator.loop, filled, [blocks] * batch_size)[: len(part)]
    return found


# ---- prompts, and the blocks after them


def _read_all(generator, requests, answers, closing: bool, failed):
    """(request, embeds, blocks, images) of those requests that can be answered."""
    for request in requests:
        try:
            row, pixels, blocks = _compared(
                generator.prompts, request, answers[request.id], closing
            )
            prompt = generator.reader.embedded(row, pixels)
            yield request, prompt.embeds, blocks, prompt.images
        except FAULTS as error:
            failed(request, error)


def _compared(prompts: Prompts, request: Request, answers: Sequence[str], closing: bool):
    """(row, pixels) as `Prompts.row`, and a block for each of the answers.

    Raises:
        ValueError, BadSample: with a message for the user.
    """
    blocks = []

    def write(turns):
        prompt, found = split(prompts.chat, turns, answers, closing)
        blocks.extend(found)
        return prompt

    row, pixels = prompts.row(request, 1, write)
    _check_room(prompts, row, blocks)
    return row, pixels, blocks


def about(prompts: Prompts, question: str, answers: Sequence[str]) -> tuple[Row, list[Block]]:
    """(row, a block for each of the answers) of a question about an image that is seen already.

    Args:
        question: the image stands where it has `<image>`, else before it.

    Raises:
        ValueError: it does not fit.
    """
    text = question if IMAGE in question else f"{IMAGE}{prompts.chat.template.lead}{question}"
    ids, blocks = split(prompts.chat, [("user", text)], answers)
    place = read_place(*prompts.views.plan(None))
    row = build_row(ids, None, [place], prompts.views.tokens, len(ids) + len(place))
    _check_room(prompts, row, blocks)
    return row, blocks


def _check_room(prompts: Prompts, row: Row, blocks: Sequence[Block]) -> None:
    need = len(row) + max(len(block.ids) for block in blocks)
    if need > prompts.length:
        raise ValueError(
            f"prompt and answer make {need} positions, but the context has {prompts.length}"
        )


def split(
    chat: Chat, turns: Sequence[Turn], answers: Sequence[str], closing: bool = False
) -> tuple[np.ndarray, list[Block]]:
    """(int32[n] ids of what all answers share, -200 for an image; a block for each answer).

    Args:
        turns: up to the question.
        closing: score the token that closes an answer, too.

    Raises:
        ValueError: there are no answers, or one has no token of its own.
    """
    if not answers:
        raise ValueError("no answers to compare")
    written = [chat.conversation([*turns, ("assistant", answer)]) for answer in answers]
    first = [np.argmax(one.labels >= 0) for one in written]
    shared = int(min(first))
    for one in written:
        same = one.ids[:shared] == written[0].ids[:shared]
        shared = shared if same.all() else int(np.argmin(same))
    blocks = []
    for answer, one in zip(answers, written, strict=True):
        ids, scored = one.ids[shared:], one.labels[shared:] >= 0
        closes = np.flatnonzero(scored & (ids == chat.close)) if chat.close is not None else ()
        if len(closes) and not closing:
            scored[closes[-1] :] = False
        last = np.flatnonzero(scored)
        if not len(last) or (ids == SENTINEL).any():
            raise ValueError(f"an answer to be compared must be text, not {answer!r}")
        blocks.append(Block(ids[: last[-1] + 1], scored[: last[-1] + 1]))
    return written[0].ids[:shared], blocks


# ---- a batch


def of_batch(
    loop: Loop,
    prompts: Sequence[np.ndarray],
    blocks: Sequence[Sequence[Block]],
    images: Sequence[RowImages | None] | None = None,
) -> list[list[Likelihood]]:
    """Likelihoods of each row's answers.

    Args:
        prompts: per row float[L, D], the embeddings that the language model reads first.
        blocks: per row its answers; rows may have different numbers.
        images: see `Loop.prefill`.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    L = bucket(int(lengths.max()))
    n = bucket(max(len(block.ids) for row in blocks for block in row), _BLOCKS)
    embeds = np.zeros((len(prompts), L, loop.llm.cfg.width), np.float32)
    for to, prompt in zip(embeds, prompts, strict=True):
        to[: len(prompt)] = prompt
    found: list[list[Likelihood]] = [[] for _ in blocks]
    with loop.on_mesh():
        weights = loop.weights["llm"]
        joined = loop.joined(images)
        *cache, placed = _read_prompts(weights, embeds, lengths, joined, llm=loop.llm, slots=L + n)
    for k in range(max(map(len, blocks))):
        ids, scored, count = _stacked([row[k] if k < len(row) else None for row in blocks], n)
        with loop.on_mesh():
            totals = _score(weights, *cache, lengths, ids, scored, count, placed, llm=loop.llm)
        (totals,) = loop.read(totals)
        for row, total, of_it in zip(found, totals, scored, strict=True):
            if len(row) == k and of_it.any():
                row.append(Likelihood(float(total), int(of_it.sum())))
    return found


def _stacked(blocks: Sequence[Block | None], n: int):
    """(ids int32[B, n], scored bool[B, n], lengths int32[B]); nothing where there is no block."""
    ids, scored = np.zeros((len(blocks), n), np.int32), np.zeros((len(blocks), n), bool)
    for row, block in enumerate(blocks):
        if block is not None:
            ids[row, : len(block.ids)], scored[row, : len(block.ids)] = block.ids, block.scored
    lengths = np.array([0 if block is None else len(block.ids) for block in blocks], np.int32)
    return ids, scored, lengths


@partial(jax.jit, static_argnames=("llm", "slots"))
def _read_prompts(weights, embeds, lengths, images, *, llm: CachedLLM, slots: int):
    """What `CachedLLM.read_prompts` gives, and the images of the rows or None."""
    embeds = constrain(embeds.astype(weights["table"].dtype), "act_batch", None, None)
    placed = None if images is None else llm.place(weights, *images[:3])
    return *llm.read_prompts(weights, embeds, lengths, slots, placed), placed


@partial(jax.jit, static_argnames=("llm",))
def _score(weights, keys, values, hidden, length, ids, scored, count, images, *, llm: CachedLLM):
    """float32[B] log-probabilities of blocks, after rows of a cache and their last hidden states.

    The logits of one position of all rows exist at a time.
    """
    after = llm.read_whole_block(
        weights, keys, values, length, llm.embed(weights, ids), count, images
    )
    before = jnp.concatenate([hidden[None], after[:-1]])  # [n, D, B]: what predicts each token

    def one(inputs):
        state, targets = inputs
        logits = llm.logits(weights, state)
        right = jnp.take_along_axis(logits, targets[None], axis=0)[0]
        return right - jax.nn.logsumexp(logits, axis=0)

    each = lax.map(one, (before, ids.T))
    return jnp.sum(jnp.where(scored.T, each, 0.0), axis=0)

"""How a MetaMorph model decodes interleaved text and visual tokens.

In text mode the hidden state gives logits and an id; after the start id a row is in image mode,
where the state gives the next visual token (the head regresses or samples it) and that token's
embedding (connector) is read next; after P of them the row writes text again.

    emitted     A   <   o   o   o   o   >   B  eos        (P = 4)
    mode        t   t   i   i   i   i   t   t   t
    record      A   <  -1  -1  -1  -1   >   B  eos        (-1: a visual token)
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from metamorph_jax import sharding
from metamorph_jax.convert.export import listed_eos
from metamorph_jax.data.chat import Chat
from metamorph_jax.errors import UserError
from metamorph_jax.models.heads.visual_flow import FlowHead
from metamorph_jax.recipe import Shown
from metamorph_jax.recipes.metamorph.input import input_spec
from metamorph_jax.recipes.metamorph.model import MetaMorph
from metamorph_jax.recipes.metamorph.published import generation_fields, load_tokenizer, markers
from metamorph_jax.recipes.metamorph.sources import KINDS
from metamorph_jax.recipes.metamorph.wordings import look_first
from metamorph_jax.sampling import samples
from metamorph_jax.sampling.cached_llm import once
from metamorph_jax.sampling.generator import Generator
from metamorph_jax.sampling.llm_weights import take_over
from metamorph_jax.sampling.loop import Loop
from metamorph_jax.sampling.policy import BROKEN, Emission, Model, Policy, Step, TextPolicy
from metamorph_jax.sampling.prompt_reader import PromptReader
from metamorph_jax.sampling.prompts import Prompts
from metamorph_jax.sampling.segments import VISUAL, Result, read_record


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What a row is in the middle of.

    Attributes:
        drawing: bool[B] image mode; count: int32[B] visual tokens of the image so far.
        close: bool[B] the image was filled in the last step.
        text: what the policy for text remembers.
    """

    drawing: jax.Array
    count: jax.Array
    close: jax.Array
    text: Any


@dataclasses.dataclass(frozen=True)
class VisualPolicy:
    """After the start id, P visual tokens; eos ids are looked at in text mode only.

    Attributes:
        text: how text ids are chosen, and which end a row.
        parts: what visual tokens go through.
        force_end: write the end id after the last visual token, whatever the model predicts.
            Trained models learn to write it.
    """

    text: TextPolicy
    parts: "VisualParts"
    force_end: bool = False

    extra_steps = 0
    visual = True

    @property
    def width(self) -> int:
        return self.parts.width

    @property
    def varies(self) -> bool:
        return self.parts.sampled

    def init(self, rows: int, prompt_ids, vocabulary: int) -> Memory:
        no = jnp.zeros(rows, bool)
        return Memory(no, jnp.zeros(rows, jnp.int32), no,
                      self.text.init(rows, prompt_ids, vocabulary))  # fmt: skip

    def emit(self, memory: Memory, hidden, step: Step, model: Model):
        drawing = memory.drawing & step.active  # never more than P tokens: `full` ends the mode
        z, projected = self.next_visual(drawing, hidden, step, model)
        ids = self.text_ids(step.active & ~drawing, memory, hidden, step, model)
        starts = ~drawing & (ids == self.parts.start)
        count = memory.count + drawing
        full = drawing & (count == self.parts.tokens)
        emission = Emission(
            ids=jnp.where(drawing, VISUAL, ids),
            value=z,
            embed=jnp.where(drawing[:, None], projected, model.embed(ids)),
            pause=jnp.zeros_like(full),
            stop=self.text.ends(ids) & ~drawing,
        )
        text = self.text.remember(memory.text, jnp.where(drawing, self.parts.start, ids))
        memory = Memory((drawing | starts) & ~full, jnp.where(starts, 0, count), full, text)
        return memory, emission

    def read(self, record, values, ended: bool) -> Result:
        parts = self.parts
        ids = dict(start=parts.start, end=parts.end, eos=self.text.eos)
        return read_record(record, values, ended, P=parts.tokens, **ids)

    # ---- pieces that `ReferencePolicy` shares

    def next_visual(self, drawing, hidden, step: Step, model: Model):
        """(float32[B, C] next visual tokens, float[B, D] their embeddings).

        Zeros if no row draws.
        """

        def draw(hidden):
            parts = self.parts.merged(model.parts)
            keys = jax.vmap(jax.random.fold_in, (0, None))(step.keys, 1)  # text takes the others
            z = parts.predict_visual(hidden.T, keys).astype(jnp.float32)
            return z, parts.project(z).astype(hidden.dtype)

        def no_draw(hidden):
            D, B = hidden.shape
            return jnp.zeros((B, self.width), jnp.float32), jnp.zeros((B, D), hidden.dtype)

        return lax.cond(drawing.any(), draw, no_draw, hidden)

    def text_ids(self, writing, memory: Memory, hidden, step: Step, model: Model):
        """int32[B] ids; the output table is read only if some row writes text."""
        ids = lax.cond(
            writing.any(),
            lambda hidden: self.text.choose(memory.text, hidden, step, model),
            lambda hidden: jnp.zeros(hidden.shape[1], jnp.int32),
            hidden,
        )
        if self.force_end:
            ids = jnp.where(memory.close, self.parts.end, ids)
        return self.text.forced(ids, step)


@dataclasses.dataclass(frozen=True)
class ReferencePolicy(VisualPolicy):
    """As the public reference decodes, including its known bugs.

    One token more than the budget. The count of visual tokens is reset by the end id only. In image
    mode, logits of the projected prediction can end the sequence or, once the count is exhausted,
    give text.
    """

    extra_steps = 1

    def emit(self, memory: Memory, hidden, step: Step, model: Model):
        drawing = memory.drawing & step.active
        visual = drawing & (memory.count < self.parts.tokens)
        z, projected = self.next_visual(drawing, hidden, step, model)
        hidden = once(jnp.where(drawing, projected.T, hidden))
        ids = self.text_ids(step.active, memory, hidden, step, model)
        starts = ~drawing & (ids == self.parts.start)
        ends = ~visual & ~starts & (ids == self.parts.end)
        count = memory.count + visual
        full = visual & (count == self.parts.tokens)
        emission = Emission(
            ids=jnp.where(visual & (ids != BROKEN), VISUAL, ids),
            value=z,
            embed=jnp.where(visual[:, None], projected, model.embed(ids)),
            pause=jnp.zeros_like(full),
            stop=self.text.ends(ids),
        )
        text = self.text.remember(memory.text, jnp.where(visual, self.parts.start, ids))
        drawing = (drawing | starts) & ~ends & ~full
        return Memory(drawing, jnp.where(ends, 0, count), full, text), emission


class VisualParts:
    """What visual tokens go through while a model decodes: head, normalisation and connector.

    Policies with the same `VisualParts` share a compiled loop.

    Attributes:
        weights: an `nnx.State`.
        start, end: ids around an image; tokens, width: P and C.
        sampled: whether chance decides visual tokens.
    """

    def __init__(self, model: MetaMorph):
        parts = nnx.merge(*nnx.split(model))  # the same arrays, another module
        del parts.llm
        if parts.vision.tower is not None:
            del parts.vision.tower
        self._graph, self.weights = nnx.split(parts)
        self.start, self.end = model.image_start, model.image_end
        self.tokens, self.width = model.feature_shape
        self.sampled = isinstance(model.head, FlowHead) and model.head.cfg.temperature > 0

    def merged(self, weights) -> MetaMorph:
        """The model with `predict_visual` and `project`; it has no language model."""
        return nnx.merge(self._graph, weights)


# ---- a generator


def make_loop(model: MetaMorph, parts: VisualParts | None, weights: str = "auto") -> Loop:
    """The decoding loop over a model, whose language model it takes over (see `take_over`).

    `parts` is None for a model without a head, which emits text only.
    """
    mesh = sharding.mesh_of(nnx.state(model))
    llm, kept = take_over(model.llm, weights, mesh)
    return Loop(llm, kept, None if parts is None else parts.weights, mesh)


def make_policy(
    parts: VisualParts | None, text: TextPolicy, force_end: bool = False, parity: bool = False
) -> Policy:
    """How a model decodes.

    Args:
        parts: of the model, None if it emits text only.
        text: how text ids are chosen.
        force_end: see `VisualPolicy`.
        parity: reproduce the reference decoder, including its known bugs.
    """
    if parts is None:
        return text
    return (ReferencePolicy if parity else VisualPolicy)(text, parts, force_end)


def generator(
    model: MetaMorph, cfg, data, *, weights: str = "auto", force_end=False, parity=False,
    flow: Mapping[str, float] | None = None,
) -> Generator:  # fmt: skip
    """A generator over this model, whose language model it takes over.

    Args:
        weights: how those of the language model are kept, see `take_over`.
        force_end, parity: see `make_policy`.
        flow: fields of `FlowConfig` to sample with, for a head that samples.

    Raises:
        UserError: the head does not sample, or not so.
    """
    if flow:
        _sample_with(model.head, flow)
    views = data.images.change(input_spec(cfg).views)
    chat = Chat.of(load_tokenizer(cfg), data.row, markers(cfg))
    parts = None if model.head is None else VisualParts(model)
    loop = make_loop(model, parts, weights)
    encoder = None
    if model.vision.tower is not None:
        encoder = nnx.merge(*nnx.split(model))
        del encoder.llm
    policy = partial(make_policy, parts, force_end=force_end, parity=parity)
    ends = tuple(listed_eos(generation_fields(cfg)))
    prompts = Prompts(chat, views, data.images, data.row.length, look_first, data.frames, ends)
    reader = PromptReader(loop, encoder, model.feature_shape[1])
    return Generator(loop, policy, prompts, reader)


def _sample_with(head, flow: Mapping[str, float]) -> None:
    """Changes how a head samples, in place."""
    if not isinstance(head, FlowHead):
        raise UserError("the head of this model regresses visual tokens, it does not sample them")
    try:
        head.cfg = dataclasses.replace(head.cfg, **flow)
    except ValueError as error:
        raise UserError(error) from error


def show(model: MetaMorph, cfg, data, count: int) -> list[Shown]:
    """Answers to the first questions of the data; images are read, not drawn."""
    return samples.ask(generator(model, cfg, data), data, KINDS, count)

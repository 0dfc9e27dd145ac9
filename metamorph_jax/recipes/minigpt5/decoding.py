"""How a MiniGPT-5 model writes and draws.

In text mode, ids are chosen as in any language model. After `[IMG0]` a row goes on with the other
vokens, whatever the model predicts, and then with text again. The states that predict the vokens
are what the image is drawn from, once all rows of the batch are written.

    emitted     A   0   1   2   3   B   eos        (four vokens)
    record      A   0  -1  -1  -1   B   eos        (-1: a visual token)
    value       .   s   s   s   s   .   .          s: the state that the voken was predicted from

The reference reads all vokens in one step and draws the first image of a reply only; the states are
the same. On its own, a row never chooses a voken but the first one, nor the placeholder of images
that are read.

What a request asks for (`Request.mode`): "" leaves it to the model; "text" ends at `[IMG0]`;
"image" begins with an image and ends after it; "both" has `[IMG0]` in the place of the reply's end,
or after `TURN` tokens, until there is an image. With `Request.rounds`, texts and images alternate,
so many of them. (The reference has a mode that makes `[IMG0]` the likeliest token until it comes,
if any score is positive.)
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from metamorph_jax import sharding
from metamorph_jax.convert import specs
from metamorph_jax.convert.export import listed_eos
from metamorph_jax.data.chat import Chat
from metamorph_jax.errors import WeightError
from metamorph_jax.recipe import Shown
from metamorph_jax.recipes.minigpt5.config import Config, voken_ids
from metamorph_jax.recipes.minigpt5.input import input_spec, load_tokenizer
from metamorph_jax.recipes.minigpt5.model import MiniGPT5
from metamorph_jax.recipes.minigpt5.published import base
from metamorph_jax.recipes.minigpt5.sources import KINDS
from metamorph_jax.sampling import samples
from metamorph_jax.sampling.generator import Drawn, Generator
from metamorph_jax.sampling.image_decoder import ImageDecoder
from metamorph_jax.sampling.llm_weights import take_over
from metamorph_jax.sampling.loop import Loop
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.policy import Emission, Model, Policy, Step, TextPolicy, stopping
from metamorph_jax.sampling.prompt_reader import Prompt, PromptReader
from metamorph_jax.sampling.prompts import Prompts
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.segments import BROKEN, VISUAL, Result, VisualTokens

TURN = 90  # most tokens of a text before the next image, in mode "both"
# How the reference answers.
REFERENCE = Options(256, temperature=1.0, top_p=0.9, repetition_penalty=2.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What a row is in the middle of.

    Attributes:
        place: int32[B] the voken that comes next; 0 where the row writes text.
        turn: int32[B] tokens of the text so far; rounds: int32[B] texts and images that are done.
        text: what the policy for text remembers.
    """

    place: jax.Array
    turn: jax.Array
    rounds: jax.Array
    text: Any


@dataclasses.dataclass(frozen=True)
class VokenPolicy:
    """Text, in which a first voken is followed by the others.

    Attributes:
        text: how text ids are chosen, and which end a row.
        first: id of `[IMG0]`; the ids after it are those of the other vokens and the placeholder.
        vokens: of an image.
        width: of the states.
        mode, rounds: of the requests, see the module docstring.
        turn_tokens: most tokens of a text, where images are asked for.
    """

    text: TextPolicy
    first: int
    vokens: int
    width: int
    mode: str = ""
    rounds: int = 0
    turn_tokens: int = TURN

    extra_steps = 0
    visual = varies = False

    def init(self, rows: int, prompt_ids, vocabulary: int) -> Memory:
        zero = jnp.zeros(rows, jnp.int32)
        return Memory(zero, zero, zero, self.text.init(rows, prompt_ids, vocabulary))

    def emit(self, memory: Memory, hidden, step: Step, model: Model):
        drawing = memory.place > 0
        ids = self.text_ids(step.active & ~drawing, memory, hidden, step, model)
        ids, ends = self.directed(ids, memory)
        starts = ~drawing & (ids == self.first)
        inside = drawing | starts
        full = inside & (memory.place == self.vokens - 1)
        rounds = memory.rounds + starts + full
        enough = (self.mode == "image") | (self.rounds > 0) & (rounds >= self.rounds)
        emission = Emission(
            ids=jnp.where(drawing, VISUAL, ids),
            value=jnp.where(inside[:, None], hidden.T.astype(jnp.float32), 0.0),
            embed=model.embed(jnp.where(drawing, self.first + memory.place, ids)),
            pause=jnp.zeros_like(full),
            stop=jnp.where(inside, full & enough, ends),
        )
        place = jnp.where(inside & ~full, memory.place + 1, 0)
        turn = jnp.where(inside, 0, memory.turn + 1)
        return Memory(place, turn, rounds, self.remembered(drawing, memory, ids)), emission

    def text_ids(self, writing, memory: Memory, hidden, step: Step, model: Model):
        """int32[B] ids; the output table is read only if some row writes text."""
        model = _Writing(model.llm, model.weights, model.parts, self.first, self.vokens)
        ids = lax.cond(
            writing.any(),
            lambda hidden: self.text.choose(memory.text, hidden, step, model),
            lambda hidden: jnp.zeros(hidden.shape[1], jnp.int32),
            hidden,
        )
        return self.text.forced(ids, step)

    def directed(self, ids, memory: Memory):
        """(ids, bool[B] whether the row ends), of rows that write text, as the request asks."""
        ends, broken = self.text.finishes(memory.text, ids), ids == BROKEN
        none = memory.rounds == 0
        if self.mode == "image":
            draws = none & ~broken
        elif self.mode == "both":
            full = memory.turn >= self.turn_tokens
            last = memory.rounds + 1 >= self.rounds  # no image may follow
            ends |= full & last if self.rounds else False
            draws = (ends | full) & ~broken & (~last if self.rounds else none)
        else:
            return ids, ends
        return jnp.where(draws, self.first, ids), ends & ~draws

    def remembered(self, drawing, memory: Memory, ids):
        """What the policy for text remembers of these ids; nothing of vokens after the first."""
        new = self.text.remember(memory.text, ids)
        keep = lambda old, new: jnp.where(drawing[:, None], old, new)  # noqa: E731
        return jax.tree.map(keep, memory.text, new)

    def read(self, record, values, ended: bool) -> Result:
        """Texts, and images with the states that they are drawn from."""
        segments, words, tokens = [], [], record.tolist()
        inside = (record == VISUAL) | (record == self.first)

        def flush(ended=False):
            found = self.text.read(np.array(words, np.int32), values[: len(words)], ended)
            segments.extend(found.segments)
            words.clear()

        for k, token in enumerate(tokens):
            if token == self.first:
                flush()
                n = next((n for n, i in enumerate(tokens[k + 1 :], 1) if i != VISUAL),
                         len(tokens) - k)  # fmt: skip
                segments.append(VisualTokens(values[k : k + n], n == self.vokens))
            elif token != VISUAL:
                words.append(token)
        flush(ended)
        return Result(tuple(segments), record[record >= 0], values[inside], record, bool(ended))


@dataclasses.dataclass(frozen=True)
class _Writing(Model):
    """The model where it writes text: of the added ids, it may choose the first."""

    first: int
    vokens: int

    def logits(self, hidden: jax.Array) -> jax.Array:
        logits = super().logits(hidden)
        after = jnp.arange(len(logits))[:, None] - self.first
        return jnp.where((after > 0) & (after <= self.vokens), -jnp.inf, logits)


class Drawing(nnx.Module):
    """The parts that draw, as `image_decoder.DrawingModel` asks for them."""

    def __init__(self, model: MiniGPT5):
        self.cfg, self.mapper, self.decoder = model.cfg, model.mapper, model.decoder

    def draw(self, features, noise, sampler, *, steps: int, guidance: float):
        """float32[n, h, w, 3] images in [0, 1] of features: float[n, vokens, D], the states."""
        return self.decoder.sample(
            self.mapper(features), self.mapper.null_condition(), sampler, steps=steps,
            guidance=guidance, noise=noise,
        )  # fmt: skip


class VokenReader(PromptReader):
    """A reader that tells no ids of prompts.

    A repetition penalty looks at replies only, as in the reference: prompts hold the text that ends
    a reply.
    """

    def embedded(self, row, pixels: np.ndarray | None) -> Prompt:
        """See `PromptReader.embedded`."""
        prompt = super().embedded(row, pixels)
        return prompt._replace(ids=np.full_like(prompt.ids, -1))


class VokenGenerator(Generator):
    """A generator whose rows have vokens, from which images are drawn when a batch is written.

    Args:
        loop, prompts, reader: see `Generator`.
        image_decoder: draws the states of vokens.
        cfg: of the model.
        turn_tokens: see `VokenPolicy`.
    """

    modes = ("text", "image", "both")

    def __init__(
        self, loop: Loop, prompts: Prompts, reader: PromptReader, image_decoder: ImageDecoder,
        cfg: Config, turn_tokens: int = TURN,
    ):  # fmt: skip
        super().__init__(loop, self._policy, prompts, reader)
        self.image_decoder, self.turn_tokens = image_decoder, turn_tokens
        self.vokens = voken_ids(cfg)

    @property
    def image_start(self) -> tuple[int, ...]:
        """See `Generator.image_start`."""
        return self.vokens[:1]

    def renew(self, other: "VokenGenerator") -> None:
        """See `Generator.renew`."""
        super().renew(other)
        self.image_decoder.weights = other.image_decoder.weights

    def release(self) -> None:
        """See `Generator.release`."""
        super().release()
        self.image_decoder.weights = None

    def policy_of(self, options: Options, requests: Sequence[Request] = ()) -> Policy:
        """With beams, and in mode "text", a voken ends a reply as the end of a sequence does."""
        policy = self._policy(options.text(self.prompts.eos))
        mode, rounds = (requests[0].mode, requests[0].rounds) if requests else ("", 0)
        if options.beams > 1 or mode == "text":
            eos = {*policy.text.eos, *self.vokens, self.vokens[-1] + 1}
            return dataclasses.replace(policy.text, eos=tuple(sorted(eos)))
        if mode != "both":
            return dataclasses.replace(policy, mode=mode)
        # An image that is asked for is whole, if the budget has room for one.
        turn = min(self.turn_tokens, max(self.budget(options) - len(self.vokens), 0))
        return dataclasses.replace(policy, mode=mode, rounds=rounds, turn_tokens=turn)

    def _policy(self, text: TextPolicy) -> VokenPolicy:
        text = stopping(text, self.prompts.chat.stops)
        return VokenPolicy(text, self.vokens[0], len(self.vokens), self.loop.llm.cfg.width)

    def decode(
        self, embeds, budgets, policy: Policy, drawn: Sequence[Drawn], options: Options,
        stream=None, draw: bool = True, **prompts,
    ) -> list[Result]:  # fmt: skip
        """See `Generator.decode`; the images of all rows are drawn together."""
        results = super().decode(embeds, budgets, policy, drawn, options, stream, draw, **prompts)
        if draw:
            for scale in self.scales(options):
                self._draw(results, drawn, scale, options.batch_size)
        return results

    def _draw(self, results: Sequence[Result], drawn: Sequence[Drawn], scale: float, at_once: int):
        """Puts the images of the rows into `drawn`.

        An image with values that are not finite is left out, with those beside it: `reply` draws
        them one by one, and says of which it is true.
        """
        jobs = []
        for result, own in zip(results, drawn, strict=False):
            whole = [x for x in result.segments if isinstance(x, VisualTokens) and x.complete]
            own.images += [{} for _ in whole[len(own.images) :]]
            jobs += [
                (own.images[k], one.features, own.seed + k) for k, one in enumerate(whole)
                if np.isfinite(one.features).all() and not (result.record == BROKEN).any()
            ]  # fmt: skip
        for at in range(0, len(jobs), at_once):
            to, features, seeds = zip(*jobs[at : at + at_once], strict=True)
            try:
                images = self.image_decoder.draw_each(np.stack(features), scale, seeds)
            except WeightError:
                continue
            for own, image in zip(to, images, strict=True):
                own[scale] = image


def generator(
    model: MiniGPT5, cfg, data, *, weights: str = "auto", turn_tokens: int = TURN
) -> VokenGenerator:
    """A generator over this model, whose language model it takes over.

    Args:
        weights: how those of the language model are kept, see `take_over`.
        turn_tokens: most tokens of a text before an image that a request asks for.
    """
    encoder = nnx.merge(*nnx.split(model))  # the same arrays, another module
    del encoder.llm, encoder.mapper, encoder.decoder, encoder.text_encoder
    mesh = sharding.mesh_of(nnx.state(model))
    llm, kept = take_over(model.llm, weights, mesh)
    views = data.images.change(input_spec(cfg).views)
    chat = Chat.of(load_tokenizer(cfg), data.row)
    ends = tuple(listed_eos(specs.generation_fields(base(cfg), llm.cfg.vocab_size)))
    prompts = Prompts(chat, views, data.images, data.row.length, None, data.frames, ends)
    loop = Loop(llm, kept, None, mesh)
    reader = VokenReader(loop, encoder, cfg.qformer.resampler.width)
    return VokenGenerator(loop, prompts, reader, ImageDecoder(Drawing(model)), cfg, turn_tokens)


def show(model: MiniGPT5, cfg, data, count: int) -> list[Shown]:
    """Answers to the first questions of the data, with the images that are drawn in them."""
    return samples.ask(generator(model, cfg, data), data, KINDS, count, draw=True)

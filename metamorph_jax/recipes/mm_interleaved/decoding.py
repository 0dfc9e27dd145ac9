"""How an MM-Interleaved model writes and draws.

In text mode, ids are chosen as in any language model. After `soi` the row pauses: its image is
drawn from the states that it has read so far, prepared and encoded as an image of a prompt is, and
appended, and the row goes on.

    emitted     A   <   .   |   o o o o   |   B   eos        < soi, o visual tokens of the image
    read        …   A   <   |   o o o o   |   o   B
    row         t   t   pause   extended      t   stop       `soi` is read before it pauses

What a request asks for (`Request.mode`): "" leaves it to the model; "text" ends at `soi`; "image"
begins with an image and ends after it; "both" alternates between texts and images, `Request.rounds`
of them, as the reference's loop does: where a text ends, or has `TURN` tokens, an image comes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from metamorph_jax import sharding
from metamorph_jax.convert import specs
from metamorph_jax.convert.export import listed_eos
from metamorph_jax.data.chat import Chat
from metamorph_jax.errors import WeightError
from metamorph_jax.models.diffusion.samplers import Sampler
from metamorph_jax.recipe import Shown
from metamorph_jax.recipes.mm_interleaved.input import input_spec, load_tokenizer, markers
from metamorph_jax.recipes.mm_interleaved.model import MMInterleaved
from metamorph_jax.recipes.mm_interleaved.published import base
from metamorph_jax.recipes.mm_interleaved.sources import KINDS
from metamorph_jax.sampling import samples
from metamorph_jax.sampling.generator import Drawn, Generator
from metamorph_jax.sampling.image_decoder import with_steps
from metamorph_jax.sampling.llm_weights import take_over
from metamorph_jax.sampling.loop import Loop, RowImages, State
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.policy import Emission, Model, Policy, Step, TextPolicy
from metamorph_jax.sampling.prompt_reader import Prompt, PromptReader
from metamorph_jax.sampling.prompts import Prompts
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.segments import BROKEN, NOTHING, Result, Text, VisualTokens
from metamorph_jax.types import TEXT

PLACES = 8  # images of a row that its layers look at; the oldest are forgotten
TURN = 90  # most tokens of a text before the next image, in mode "both"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What a row is in the middle of.

    Attributes:
        starts: bool[B] `soi` was emitted, and is still to be read.
        turn: int32[B] tokens of the text so far; rounds: int32[B] texts and images that are done.
        text: what the policy for text remembers.
    """

    starts: jax.Array
    turn: jax.Array
    rounds: jax.Array
    text: Any


@dataclasses.dataclass(frozen=True)
class DrawingPolicy:
    """Text; after `soi` a row waits for its image.

    Attributes:
        text: how text ids are chosen, and which end a row.
        soi: id of the token before an image.
        mode, rounds: of the requests, see the module docstring.
        turn_tokens: most tokens of a text, where images are asked for.
    """

    text: TextPolicy
    soi: int
    mode: str = ""
    rounds: int = 0
    turn_tokens: int = TURN

    width = 0
    extra_steps = 0
    visual = varies = False

    def init(self, rows: int, prompt_ids, vocabulary: int) -> Memory:
        zero = jnp.zeros(rows, jnp.int32)
        text = self.text.init(rows, prompt_ids, vocabulary)
        return Memory(jnp.zeros(rows, bool), zero, zero, text)

    def emit(self, memory: Memory, hidden, step: Step, model: Model):
        ids = self.text.forced(self.text.choose(memory.text, hidden, step, model), step)
        ids, ends = self.directed(ids, memory)
        waits = memory.starts  # this step read `soi`: there is nothing to emit
        starts = ~waits & (ids == self.soi)
        rounds = memory.rounds + starts + waits
        enough = (self.mode == "image") | (self.rounds > 0) & (rounds >= self.rounds)
        emission = Emission(
            ids=jnp.where(waits, NOTHING, ids),
            value=jnp.zeros((len(ids), 0), jnp.float32),
            embed=embedded(ids, self.soi, model),
            pause=waits,
            stop=jnp.where(waits, enough, ends),
        )
        text = self.text.remember(memory.text, ids)
        if text is not None:
            text = jnp.where(waits[:, None], memory.text, text)
        turn = jnp.where(starts | waits, 0, memory.turn + 1)
        return Memory(starts, turn, rounds, text), emission

    def directed(self, ids, memory: Memory):
        """(ids, bool[B] whether the row ends), as the request asks for it."""
        ends, broken = self.text.ends(ids), ids == BROKEN
        if self.mode == "image":
            first = (memory.rounds == 0) & ~broken
            return jnp.where(first, self.soi, ids), ends & ~first
        if self.mode != "both":
            return ids, ends
        full = memory.turn >= self.turn_tokens
        last = (self.rounds > 0) & (memory.rounds + 1 >= self.rounds)  # no image may follow
        draws = ~last & ~broken & (full | (ends & (self.rounds > 0)))
        return jnp.where(draws, self.soi, ids), (ends | last & full) & ~draws

    def read(self, record, values, ended: bool) -> Result:
        """Texts, and images without features; the last of these is not complete."""
        segments, words = [], []
        for token in record.tolist():
            if token == self.soi:
                segments += [Text.of(words)] if words else []
                segments.append(VisualTokens(np.zeros((0, 0), np.float32), True))
                words = []
            elif token >= 0 and token not in self.text.eos:
                words.append(token)
        segments += [Text.of(words)] if words else []
        return Result(tuple(segments), record[record >= 0], values, record, bool(ended))


def embedded(ids, soi: int, model: Model):
    """float[B, D] embeddings of ids, with the learned vector of `soi`."""
    x = model.embed(ids)
    return x + jnp.where((ids == soi)[:, None], model.parts["soi"].astype(x.dtype), 0)


class Painter:
    """Draws images from states of the language model, and reads them again.

    Its compiled functions take so many images at a time as a power of two. Drawing is compiled once
    for each guidance and number of steps.

    Args:
        parts: the model without its language model.

    Attributes:
        sampling: how it draws where nothing else is asked for.
        weights: of the parts.
    """

    def __init__(self, parts: MMInterleaved):
        self.cfg = cfg = parts.cfg
        self.sampling, decoder = cfg.sampling, cfg.decoder
        sampler = self.set_steps(cfg.sampling.steps)
        self._graph, self.weights = nnx.split(parts)

        def see(weights, pixels):
            return nnx.merge(self._graph, weights).read(pixels)

        def draw(weights, states, start, begin, maps, mask, seeds, steps, guidance):
            model = nnx.merge(self._graph, weights)
            condition = model.context(states, start, begin)
            condition = dataclasses.replace(condition, maps=maps, maps_mask=mask)
            one = lambda seed: jax.random.normal(jax.random.key(seed), decoder.sample_shape)  # noqa: E731
            return model.decoder.sample(
                condition, model.context.null_condition(), sampler, steps=steps,
                guidance=guidance, noise=jax.vmap(one)(seeds),
            )  # fmt: skip

        self._see = jax.jit(see)
        self._draw = jax.jit(draw, static_argnames=("steps", "guidance"))

    def set_steps(self, steps: int) -> Sampler:
        """The sampler, which draws in so many steps from now on; see `with_steps`."""
        self.sampling, sampler = with_steps(self.sampling, self.cfg.decoder, steps)
        return sampler

    def see(self, pixels: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """(float32[n, P, D] visual tokens, maps float32[n, side, side, C]) of uint8[n, h, w, 3]."""
        n = len(pixels)
        with jax.set_mesh(sharding.mesh_of(self.weights)):
            found = jax.device_get(self._see(self.weights, _filled(pixels)))
        return jax.tree.map(lambda x: np.asarray(x, np.float32)[:n], found)

    def no_maps(self, count: int) -> tuple[np.ndarray, ...]:
        """Maps of so many images, all zeros."""
        vision = self.cfg.vision
        return tuple(
            np.zeros((count, side, side, vision.vit.width), np.float32) for side in vision.sides
        )

    def for_llm(self, maps: tuple) -> tuple:
        """Those maps that the language model samples."""
        return maps[len(maps) - self.cfg.insert.levels :]

    def draw(
        self, states, start: np.ndarray, maps: Sequence[Sequence], seeds, guidance: float
    ) -> np.ndarray:
        """uint8[n, h, w, 3] images.

        Args:
            states: float[n, S, D] of the rows; start: int32[n] where `soi` stands.
            maps: of each row, those of the images that it has read.
            seeds: of each image.

        Raises:
            WeightError: an image would have values that are not finite.
        """
        n, M = len(start), self.cfg.images_before
        before = [list(one)[-M:] for one in maps]
        mask = np.array([[k >= M - len(one) for k in range(M)] for one in before])
        missing = tuple(x[0] for x in self.no_maps(1))
        rows = [[missing] * (M - len(one)) + one for one in before]
        stacked = tuple(np.stack([[x[k] for x in one] for one in rows])
                        for k in range(len(missing)))  # fmt: skip
        inputs = (states, start[:, None].astype(np.int32), np.zeros((n, 1), np.int32), stacked,
                  mask, np.asarray(seeds, np.uint32))  # fmt: skip
        inputs = jax.tree.map(_filled, inputs)
        with jax.set_mesh(sharding.mesh_of(self.weights)):
            images = self._draw(self.weights, *inputs, self.sampling.steps, float(guidance))
            images = np.asarray(images)[:n]
        if not np.isfinite(images).all():
            raise WeightError(
                f"an image came out with values that are not finite (guidance {guidance:g}): the "
                "model's weights are damaged, or the guidance is too high"
            )
        return np.round(images * 255).astype(np.uint8)


def _after(shown: np.ndarray, stream: Callable) -> Callable:
    """`stream`, which is not told again of as many places of each row's record."""
    left = shown.copy()

    def told(new):
        fresh = [row[n:] for row, n in zip(new, left, strict=True)]
        left[:] = np.maximum(left - [len(row) for row in new], 0)
        stream(fresh)

    return told


def _filled(x):
    """Repeats the first row until there are as many as a power of two."""
    n = len(x)
    more = (1 << max(n - 1, 0).bit_length()) - n
    join = np.concatenate if isinstance(x, np.ndarray) else jnp.concatenate
    return join([x, *[x[:1]] * more]) if more else x


@dataclasses.dataclass(frozen=True)
class _OwnImages(RowImages):
    """`RowImages` that know all maps of their images, for the decoder.

    Attributes:
        all_maps: a tuple of float[m, h, w, C].
    """

    all_maps: tuple = ()

    def each(self) -> list[tuple]:
        return [tuple(x[k] for x in self.all_maps) for k in range(len(self.start))]


class DrawingReader(PromptReader):
    """Reads prompts in whose images the layers of the language model look, too.

    Args:
        loop: see `PromptReader`.
        painter: reads images.
        soi: its id, which has a learned vector beside its embedding.
    """

    def __init__(self, loop: Loop, painter: Painter, soi: int):
        super().__init__(loop)
        self.painter, self.soi = painter, soi

    def embedded(self, row, pixels: np.ndarray | None) -> Prompt:
        """See `PromptReader.embedded`."""
        embeds = self.embed(row.tokens)
        visual, maps, starts = row.image_slots >= 0, self.painter.no_maps(0), ()
        if pixels is not None:
            tokens, maps = self.painter.see(pixels)
            embeds[visual] = tokens.reshape(-1, embeds.shape[-1])[row.image_slots[visual]]
            starts = row.view_starts
        ids = np.where(row.image_slots == TEXT, row.tokens, -1)
        return Prompt(embeds, ids, _OwnImages(self.painter.for_llm(maps), starts, all_maps=maps))

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """float32[n, D] of ids, with the learned vector of `soi`."""
        embeds = self.loop.embed(ids)
        embeds[ids == self.soi] += np.asarray(self.loop.weights["parts"]["soi"], np.float32)
        return embeds


class DrawingGenerator(Generator):
    """A generator whose rows wait while their images are drawn.

    Args:
        painter: draws and reads images.
        policy, prompts, loop: see `Generator`.
    """

    modes = ("text", "image", "both")
    places = PLACES

    def __init__(self, loop: Loop, prompts: Prompts, painter: Painter, soi: int):
        reader = DrawingReader(loop, painter, soi)
        super().__init__(loop, lambda text: DrawingPolicy(text, soi), prompts, reader)
        self.painter = self.image_decoder = painter
        self.soi = soi

    def renew(self, other: "DrawingGenerator") -> None:
        """See `Generator.renew`."""
        super().renew(other)
        self.painter.weights = other.painter.weights

    def release(self) -> None:
        """See `Generator.release`."""
        super().release()
        self.painter.weights = None

    def policy_of(self, options: Options, requests: Sequence[Request] = ()) -> Policy:
        """With beams, and in mode "text", `soi` ends a reply as the end of a sequence does."""
        modes = {(one.mode, one.rounds if one.mode == "both" else 0) for one in requests}
        mode, rounds = modes.pop() if len(modes) == 1 else ("", 0)
        text = options.text(self.prompts.eos)
        if options.beams > 1 or mode == "text":
            return dataclasses.replace(text, eos=tuple(sorted({*text.eos, self.soi})))
        return DrawingPolicy(text, self.soi, mode, rounds)

    def decode(
        self, embeds, budgets, policy: Policy, drawn: Sequence[Drawn], options: Options,
        stream=None, draw: bool = True, **prompts,
    ) -> list[Result]:  # fmt: skip
        """See `Generator.decode`."""
        state = self.loop.prefill(embeds, budgets, policy, **prompts)
        state = self.finish(state, policy, drawn, options, stream, draw)
        return self.loop.results(state, policy)

    def finish(
        self, state: State, policy: Policy, drawn: Sequence[Drawn], options: Options,
        stream=None, draw: bool = True,
    ) -> State:  # fmt: skip
        """Advances until all rows are done; draws the images that they wait for."""
        painter, shown = self.painter, np.zeros(len(state.count), int)
        while True:
            state = self.loop.finish(state, policy, stream and _after(shown, stream))
            paused, length, count, budget, done = self.loop.read(
                state.paused, state.length, state.count, state.budget, state.done
            )
            P, shown = self.prompts.views.tokens, count
            rows = [k for k in range(len(drawn)) if paused[k] and budget[k] - count[k] >= P]
            if not rows or not draw:
                return state
            images = self.drawings(state, rows, length, drawn, options)
            visual, maps = painter.see(images)
            for row, own in zip(rows, zip(*maps, strict=True), strict=True):
                drawn[row].maps.append(own)
            used = np.isin(np.arange(len(paused)), rows) * np.int32(P)  # visual tokens count
            state = dataclasses.replace(
                state, budget=state.budget - used, paused=state.paused & ~state.done
            )
            onward = [k for k, row in enumerate(rows) if not done[row]]
            if not onward:
                return state
            state = self.loop.extend(
                state, [visual[k] for k in onward], [rows[k] for k in onward], policy,
                images=[RowImages(painter.for_llm(tuple(x[k : k + 1] for x in maps)), [0])
                        for k in onward],
            )  # fmt: skip

    def drawings(self, state: State, rows, length, drawn: Sequence[Drawn], options: Options):
        """uint8[n, side, side, 3]: the images that these rows wait for, as the tower takes them.

        The drawings themselves go to `drawn`. The first guidance draws what the row goes on with.
        """
        painter = self.painter
        states = state.states[np.array(rows)]
        seeds = [drawn[row].seed + len(drawn[row].images) for row in rows]
        made: list[dict] = [{} for _ in rows]
        for scale in options.guidance or (painter.sampling.guidance,):
            images = painter.draw(
                states, length[rows] - 1, [drawn[row].maps for row in rows], seeds, scale
            )
            for one, image in zip(made, images, strict=True):
                one[scale] = image
        for row, one in zip(rows, made, strict=True):
            drawn[row].images.append(one)
        first = [Image.fromarray(next(iter(one.values()))) for one in made]
        return np.concatenate([self.prompts.views.pixels(image) for image in first])

    def reply(self, result, options, seed, draw=True, own=None):
        """See `Generator.reply`; an image that was not drawn is not complete."""
        count, segments = len(own.images) if own else 0, []
        for segment in result.segments:
            if isinstance(segment, VisualTokens):
                segment = dataclasses.replace(segment, complete=count > 0)
                count -= 1
            segments.append(segment)
        result = dataclasses.replace(result, segments=tuple(segments))
        return super().reply(result, options, seed, False, own)


def generator(model: MMInterleaved, cfg, data, *, weights: str = "auto") -> DrawingGenerator:
    """A generator over this model, whose language model it takes over.

    Args:
        weights: how those of the language model are kept, see `take_over`.
    """
    parts = nnx.merge(*nnx.split(model))  # the same arrays, another module
    del parts.llm
    mesh, (soi,) = sharding.mesh_of(nnx.state(model)), markers(cfg).before
    llm, kept = take_over(model.llm, weights, mesh)
    loop = Loop(llm, kept, {"soi": model.soi[...]}, mesh, keeps_states=True)
    views = data.images.change(input_spec(cfg).views)
    chat = Chat.of(load_tokenizer(cfg), data.row, markers(cfg))
    ends = tuple(listed_eos(specs.generation_fields(base(cfg), llm.cfg.vocab_size)))
    prompts = Prompts(chat, views, data.images, data.row.length, None, data.frames, ends)
    return DrawingGenerator(loop, prompts, Painter(parts), soi)


def show(model: MMInterleaved, cfg, data, count: int) -> list[Shown]:
    """Answers to the first questions of the data, with the images that are drawn in them."""
    return samples.ask(generator(model, cfg, data), data, KINDS, count, draw=True)

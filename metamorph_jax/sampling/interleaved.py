"""Decoding of interleaved text and visual tokens: one `lax.while_loop`, a static cache.

Every row of a batch is on its own: while one writes text, another draws a picture. In text mode the
hidden state gives logits and an id; after the start id a row is in picture mode, where the state
gives the next visual token (head) and that token's embedding (connector) is read next; after P of
them it writes text again.

    emitted     A   <   o   o   o   o   >   B  eos        (P = 4)
    mode        t   t   p   p   p   p   t   t   t
    record      A   <  -1  -1  -1  -1   >   B  eos  -2    (-1 a visual token, -2 nothing any more)

Prompts are padded on the left to a bucket, so that the slot of the cache that is written next is
the same in all rows.

The weights are laid out for decoding once (`Decoder`), as `layers.py` says. What a row emitted is
read as texts and pictures by `segments.py`.

`parity=True` decodes as the public reference does, in what we consider faults as well: one token
more than the budget; the count of visual tokens is reset by the end id only; logits of visual steps
(of the projected prediction) can end the sequence or, when the count is exhausted, give text.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from metamorph_jax.models import lora
from metamorph_jax.nn import rope
from metamorph_jax.nn.attention import attend
from metamorph_jax.sampling.layers import attend_cached, layout, linear, norm, once, run_layer
from metamorph_jax.sampling.segments import NOTHING, VISUAL, Result, read_record
from metamorph_jax.sampling.text import Sampler, row_keys, step_keys

BUCKETS = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768)


def by_head(x, order):
    """[B, L, K, H] in this order of axes, the first two as one."""
    x = x.transpose(order)
    return x.reshape(-1, *x.shape[2:])


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled into the loop.

    Attributes:
        sampler: how text ids are chosen.
        eos: ids that end a row.
        force_end: write the end id after the last visual token of a picture, whatever the model
            would say. Models learn to write it by themselves.
        parity: decode as the public reference does (module docstring).
    """

    sampler: Sampler = Sampler()
    eos: tuple[int, ...] = ()
    force_end: bool = False
    parity: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What the loop carries. M is the capacity in new tokens, S = bucket + M.

    Attributes:
        keys, values: per layer [B * K, H, S] and [B * K, S, H].
        first: int32[B] first slot that is not padding.
        slot: int32[] where the next token goes; step: int32[] how many were emitted.
        embed: [B, D] embedding of the token emitted last, to be read next.
        drawing: bool[B] picture mode; count: int32[B] visual tokens of the picture so far.
        close: bool[B] the picture was filled in the last step.
        done: bool[B]; ended: bool[B] by an eos id; budget: int32[B].
        rng: keys[B].
        record: int32[B, M]; vectors: float32[B, M, C] (row s is step s); forced: int32[B, M].
    """

    keys: list[jax.Array]
    values: list[jax.Array]
    first: jax.Array
    slot: jax.Array
    step: jax.Array
    embed: jax.Array
    drawing: jax.Array
    count: jax.Array
    close: jax.Array
    done: jax.Array
    ended: jax.Array
    budget: jax.Array
    rng: jax.Array
    record: jax.Array
    vectors: jax.Array
    forced: jax.Array


def bucket(length: int, buckets: Sequence[int] = BUCKETS) -> int:
    """The smallest bucket that holds `length` positions."""
    for size in buckets:
        if length <= size:
            return size
    raise ValueError(f"a prompt of {length} positions fits no bucket (largest: {buckets[-1]})")


class Decoder:
    """A model made ready for decoding; keep it, for it holds the compiled loops.

    Args:
        recipe: an NNX module with `llm` (Llama), `project` (visual tokens -> embeddings),
            `predict_visual` (hidden states -> normalised visual tokens), `feature_shape` (P, C),
            `image_start` and `image_end` (ids). Adapters are merged into its weights.
        weights: how the language model's are kept, see `layers.layout`.
    """

    def __init__(self, recipe, weights: str = "auto"):
        recipe = lora.merged(recipe)
        self.cfg = recipe.llm.cfg
        self.start, self.end = int(recipe.image_start), int(recipe.image_end)
        self.P, self.C = recipe.feature_shape
        parts = nnx.merge(*nnx.split(recipe))  # the same arrays, another module
        del parts.llm
        if parts.vision.tower is not None:
            del parts.vision.tower
        self._parts, parts_state = nnx.split(parts)
        self.weights = {"llm": layout(recipe.llm, weights), "parts": parts_state}
        self._begin = jax.jit(self._run_prompt, static_argnames=("options", "capacity"))
        self._advance = jax.jit(
            self._run_loop, static_argnames=("options",), donate_argnames=("state",)
        )

    # ---- one call

    def __call__(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int | Sequence[int],
        options: Options = Options(),
        *,
        seeds: Sequence[int] | None = None,
        forced_ids: np.ndarray | None = None,
        stream: Callable[[list[np.ndarray]], None] | None = None,
        chunk: int = 16,
        buckets: Sequence[int] = BUCKETS,
    ) -> list[Result]:
        """Decodes a batch.

        Args:
            prompts: per row float[L, D], the embeddings that the language model reads first.
            max_new_tokens: budget, one for all rows or one each; visual tokens count.
            options: see `Options`.
            seeds: one a row, for sampling; default 0, 1, …
            forced_ids: int32[B, n]; the id to take at step s of a row if it is in text mode then,
                -1 to let the model choose.
            stream: called after every `chunk` steps with the rows' new records.
            buckets: lengths that prompts are padded to.

        Returns:
            One `Result` a row.
        """
        state = self.begin(
            prompts, max_new_tokens, options, seeds=seeds, forced_ids=forced_ids, buckets=buckets
        )
        total = state.record.shape[1]
        shown = 0
        while stream is not None:
            record, done, step = jax.device_get((state.record, state.done, state.step))
            new = record[:, shown : int(step)]
            stream([row[row != NOTHING] for row in new])
            shown = int(step)
            if done.all():
                break
            state = self.advance(state, options, shown + chunk)
        if stream is None:
            state = self.advance(state, options, total)
        return self.results(state, options)

    def begin(
        self,
        prompts,
        max_new_tokens,
        options=Options(),
        *,
        seeds=None,
        forced_ids=None,
        buckets=BUCKETS,
    ) -> State:
        """The state after the prompts are read and the first token of each row is emitted."""
        B, D = len(prompts), self.cfg.width
        budget = np.broadcast_to(np.asarray(max_new_tokens, np.int32), (B,))
        if budget.min() < 1:
            raise ValueError("max_new_tokens must be at least 1")
        if options.parity:
            budget = budget + 1
        lengths = np.array([len(p) for p in prompts], np.int32)
        if lengths.min() < 1:
            raise ValueError("a prompt is empty")
        L = bucket(int(lengths.max()), buckets)
        capacity = -(-int(budget.max()) // 8) * 8
        embeds = np.zeros((B, L, D), np.float32)
        for row, prompt in zip(embeds, prompts, strict=True):
            row[L - len(prompt) :] = np.asarray(prompt, np.float32)
        forced = np.full((B, capacity), -1, np.int32)
        if forced_ids is not None:
            forced_ids = np.asarray(forced_ids, np.int32)[:, :capacity]
            forced[:, : forced_ids.shape[1]] = forced_ids
        seeds = np.arange(B) if seeds is None else np.asarray(seeds)
        return self._begin(
            self.weights, embeds, lengths, budget, seeds.astype(np.uint32), forced,
            options=options, capacity=capacity,
        )  # fmt: skip

    def advance(self, state: State, options: Options, until: int) -> State:
        """Runs until all rows are done or `until` tokens were emitted. Consumes `state`."""
        return self._advance(self.weights, state, np.int32(until), options=options)

    def results(self, state: State, options: Options = Options()) -> list[Result]:
        rows = zip(*jax.device_get((state.record, state.vectors, state.ended)), strict=True)
        ids = dict(start=self.start, end=self.end, eos=options.eos)
        return [read_record(*row, P=self.P, **ids) for row in rows]

    # ---- what is compiled

    def _run_prompt(self, weights, embeds, lengths, budget, seeds, forced, *, options, capacity):
        cfg, llm = self.cfg, weights["llm"]
        B, L, D = embeds.shape
        dtype = llm["table"].dtype
        first = L - lengths
        order = jnp.arange(L)
        real = order >= first[:, None]
        mask = real[:, None, :] & real[:, :, None] & (order[:, None] >= order[None, :])
        cos, sin = self._angles(jnp.maximum(order - first[:, None], 0))
        keys, values = [], []

        def mix(q, k, v):
            keys.append(jnp.pad(by_head(k, (0, 2, 3, 1)), ((0, 0), (0, 0), (0, capacity))))
            values.append(jnp.pad(by_head(v, (0, 2, 1, 3)), ((0, 0), (0, capacity), (0, 0))))
            return attend(q, k, v, mask)

        x = embeds.astype(dtype).reshape(B * L, D).T
        for w in llm["layers"]:
            x = run_layer(cfg, w, x, cos, sin, mix)
        last = x.reshape(D, B, L)[:, :, -1]
        no = jnp.zeros(B, bool)
        state = State(
            keys=keys,
            values=values,
            first=first,
            slot=jnp.int32(L),
            step=jnp.int32(0),
            embed=jnp.zeros((B, D), dtype),
            drawing=no,
            count=jnp.zeros(B, jnp.int32),
            close=no,
            done=no,
            ended=no,
            budget=budget,
            rng=row_keys(seeds),
            record=jnp.full((B, capacity), NOTHING, jnp.int32),
            vectors=jnp.zeros((B, capacity, self.C), jnp.float32),
            forced=forced,
        )
        return self._emit(weights, state, norm(last, llm["norm"], cfg.norm_eps), options)

    def _run_loop(self, weights, state, until, *, options):
        def go_on(s):
            return ~s.done.all() & (s.step < jnp.minimum(until, s.record.shape[1]))

        return lax.while_loop(go_on, lambda s: self.step(weights, s, options), state)

    def step(self, weights, s: State, options: Options) -> State:
        """Reads each row's last token and emits its next; what the loop repeats."""
        s, hidden = self._read(weights["llm"], s)
        return self._emit(weights, s, hidden, options)

    def _angles(self, positions):
        cfg = self.cfg
        freq = rope.frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        return rope.angles(positions, freq)

    def _read(self, llm, s: State):
        """Reads the token emitted last: (state with it in the cache, float[D, B] hidden)."""
        cos, sin = self._angles((s.slot - s.first)[:, None])
        slots = jnp.arange(s.values[0].shape[1])
        mask = (slots >= s.first[:, None]) & (slots <= s.slot)
        keys, values = [], []

        def mix(i, q, k, v):
            k, v = k.astype(s.keys[i].dtype), v.astype(s.values[i].dtype)
            here = lax.dynamic_update_slice(s.keys[i], by_head(k, (0, 2, 3, 1)), (0, 0, s.slot))
            there = lax.dynamic_update_slice(s.values[i], by_head(v, (0, 2, 1, 3)), (0, s.slot, 0))
            keys.append(here)
            values.append(there)
            return attend_cached(q, here, there, mask)

        x = s.embed.T
        for i, w in enumerate(llm["layers"]):
            x = run_layer(self.cfg, w, x, cos, sin, partial(mix, i))
        s = dataclasses.replace(s, keys=keys, values=values, slot=s.slot + 1)
        return s, norm(x, llm["norm"], self.cfg.norm_eps)

    def _emit(self, weights, s: State, hidden, options: Options) -> State:
        """Decides on each row's next token from float[D, B] hidden states."""
        llm = weights["llm"]
        drawing = s.drawing & ~s.done
        visual = drawing & (s.count < self.P)  # otherwise never more than P, but under parity

        def draw(hidden):
            parts = nnx.merge(self._parts, weights["parts"])
            z = parts.predict_visual(hidden.T).astype(jnp.float32)
            return z, parts.project(z).astype(hidden.dtype)

        def no_draw(hidden):
            D, B = hidden.shape
            return jnp.zeros((B, self.C), jnp.float32), jnp.zeros((B, D), hidden.dtype)

        z, projected = lax.cond(drawing.any(), draw, no_draw, hidden)
        if options.parity:
            hidden = once(jnp.where(drawing, projected.T, hidden))

        def choose(hidden):
            logits = linear(llm["head"], hidden, jnp.float32)
            if options.sampler.greedy:
                return jnp.argmax(logits, axis=0).astype(jnp.int32)
            return options.sampler(logits.T, step_keys(s.rng, s.step))

        writing = ~s.done if options.parity else ~s.done & ~visual
        ids = lax.cond(
            writing.any(), choose, lambda hidden: jnp.zeros(hidden.shape[1], jnp.int32), hidden
        )
        if options.force_end:
            ids = jnp.where(s.close, self.end, ids)
        forced = lax.dynamic_index_in_dim(s.forced, s.step, axis=1, keepdims=False)
        ids = jnp.where(forced >= 0, forced, ids)

        starts = ~drawing & (ids == self.start)
        ends = ~visual & ~starts & (ids == self.end)
        count = s.count + visual
        full = visual & (count == self.P)
        stops = jnp.isin(ids, jnp.array(options.eos, jnp.int32)) & ~s.done
        if options.parity:
            count = jnp.where(ends, 0, count)
        else:
            count = jnp.where(starts, 0, count)
            stops &= ~visual
        step = s.step + 1
        record = jnp.where(s.done, NOTHING, jnp.where(visual, VISUAL, ids))
        return dataclasses.replace(
            s,
            step=step,
            embed=jnp.where(visual[:, None], projected, llm["table"][ids]),
            drawing=(drawing | starts) & ~ends & ~full,
            count=count,
            close=full,
            done=s.done | stops | (step >= s.budget),
            ended=s.ended | stops,
            record=lax.dynamic_update_slice(s.record, record[:, None], (0, s.step)),
            vectors=lax.dynamic_update_slice(s.vectors, z[:, None], (0, s.step, 0)),
        )


def prepare(recipe, weights: str = "auto") -> Decoder:
    """Lays the weights of a recipe out for decoding, once; `weights`: see `layers.layout`."""
    return Decoder(recipe, weights)

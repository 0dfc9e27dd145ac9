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

The weights are laid out for decoding once (`Decoder`): at a few rows a step is bound by reading
weights, and products of the form [F, D] @ [D, rows] read each weight once, in order. Activations
are columns therefore, and the tied table needs no transposed copy. Keys are kept as [B, K, H, S],
values as [B, K, S, H], so that attention streams both, too.

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
from metamorph_jax.nn.norms import rms_norm
from metamorph_jax.sampling.text import Sampler, row_keys, step_keys
from metamorph_jax.sharding import platform

BUCKETS = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768)
VISUAL, NOTHING = -1, -2  # in the record of what a row emitted
_MASKED = -1e30
# XLA would fold small producers into the big loops over weights and cache and compute them again
# for every element; behind a barrier they are computed once.
_once = lax.optimization_barrier


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


@dataclasses.dataclass(frozen=True)
class Text:
    """Ids without the start and end of pictures and without the end of the sequence."""

    ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class Picture:
    """float32[n, C] visual tokens; `complete` when n is P."""

    features: np.ndarray
    complete: bool


@dataclasses.dataclass(frozen=True)
class Result:
    """What one row said.

    Attributes:
        segments: texts and pictures in order.
        ids: int32[n] all text ids, with those of start, end and eos.
        vectors: float32[m, C] all visual tokens.
        record: int32[n + m] the steps in order: an id, or VISUAL.
        ended: whether an eos id ended the row (otherwise the budget did).
    """

    segments: tuple[Text | Picture, ...]
    ids: np.ndarray
    vectors: np.ndarray
    record: np.ndarray
    ended: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What the loop carries. M is the capacity in new tokens, S = bucket + M.

    Attributes:
        keys, values: per layer [B, K, H, S] and [B, K, S, H].
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


# ---- weights


def layout(llm) -> dict:
    """The language model's weights as decoding reads them: kernels [out, in], few and large.

    Returns:
        table, head: [V + n, D], one array when tied; norm; layers: one dict each.
    """
    dtype, V = jnp.dtype(llm.cfg.dtype), llm.cfg.vocab_size

    def rows(*linears):
        out = {"w": jnp.concatenate([m.kernel[...].T.astype(dtype) for m in linears])}
        if linears[0].bias is not None:
            out["b"] = jnp.concatenate([m.bias[...].astype(dtype) for m in linears])
        return out

    def table(holder, value):
        value = value.astype(dtype)
        if llm.cfg.added_tokens:
            value = jnp.concatenate([value, holder.added[...].astype(dtype)])
        return value

    embed = table(llm.embed_tokens, llm.embed_tokens.embedding[:V])
    head = embed if llm.cfg.tied else table(llm.lm_head, llm.lm_head.kernel[:, :V].T)
    layers = []
    stacked = not isinstance(llm.layers, nnx.List)
    graph, weights = nnx.split(llm.layers) if stacked else (None, None)
    for i in range(llm.cfg.layers):
        if stacked:
            layer = nnx.merge(graph, jax.tree.map(lambda w, i=i: w[i], weights))
        else:
            layer = llm.layers[i]
        attn, mlp = layer.self_attn, layer.mlp
        layers.append(
            {
                "norm1": layer.input_layernorm.scale[...],
                "qkv": rows(attn.q_proj, attn.k_proj, attn.v_proj),
                "o": rows(attn.o_proj),
                "norm2": layer.post_attention_layernorm.scale[...],
                "gate_up": rows(mlp.gate_proj, mlp.up_proj),
                "down": rows(mlp.down_proj),
            }
        )
        if llm.cfg.qk_norm:
            layers[-1] |= {"q_norm": attn.q_norm.scale[...], "k_norm": attn.k_norm.scale[...]}
    return {"table": embed, "head": head, "norm": llm.norm.scale[...], "layers": layers}


def _linear(m, x):
    """float[out, R] of columns float[in, R]."""
    y = m["w"] @ x
    return y + m["b"][:, None] if "b" in m else y


def _norm(x, scale, eps):
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=0, keepdims=True) + eps)
    return _once((y * scale[:, None]).astype(x.dtype))


def _layer(cfg, w, x, cos, sin, mix):
    """One layer on columns x: float[D, B * L]; cos, sin: [B, L, 1, H/2].

    `mix(q, k, v)` attends with q: [B, L, N, H], k and v: [B, L, K, H] and keeps what it must.
    """
    B, L = cos.shape[:2]
    H = cfg.head_dim
    qkv = _once(_linear(w["qkv"], _norm(x, w["norm1"], cfg.norm_eps))).T.reshape(B, L, -1, H)
    q, k, v = jnp.split(qkv, [cfg.heads, cfg.heads + cfg.kv_heads], axis=2)
    if cfg.qk_norm:
        q, k = rms_norm(q, w["q_norm"], cfg.norm_eps), rms_norm(k, w["k_norm"], cfg.norm_eps)
    mixed = mix(rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v)
    x = x + _linear(w["o"], _once(mixed.reshape(B * L, -1).T))
    hidden = _linear(w["gate_up"], _norm(x, w["norm2"], cfg.norm_eps))
    gate, up = jnp.split(hidden, 2)
    return x + _linear(w["down"], _once(nnx.silu(gate) * up))


def _attend_cached(q, keys, values, mask):
    """float[B, 1, N, H] of q like it, keys [B, K, H, S], values [B, K, S, H], mask bool[B, S]."""
    B, _, N, H = q.shape
    K = keys.shape[1]
    q = _once((q * H**-0.5).reshape(B, K, N // K, H))
    if platform() != "cpu":
        scores = jnp.einsum("BKGH,BKHS->BKGS", q, keys, preferred_element_type=jnp.float32)
        weights = _softmax(scores, mask).astype(values.dtype)
        return jnp.einsum("BKGS,BKSH->BKGH", weights, values).reshape(B, 1, N, H)
    # Dots would be one tiny product for every head; sums of products are single loops over the
    # cache. The compiler vectorises them for two queries of a group but not for one, which takes
    # ten times as long.
    out = []
    for g in range(0, N // K, 2):
        pair = _once(jnp.stack([q[:, :, g], q[:, :, min(g + 1, N // K - 1)]], axis=2))
        scores = _once(jnp.sum(_wide(pair[..., None] * keys[:, :, None]), axis=3))
        weights = _once(_softmax(scores, mask).astype(values.dtype))
        out.append(_once(jnp.sum(_wide(weights[..., None] * values[:, :, None]), axis=3)))
    out = jnp.concatenate(out, axis=2)[:, :, : N // K]
    return out.astype(q.dtype).reshape(B, 1, N, H)


def _wide(x):
    return x.astype(jnp.float32)


def _softmax(scores, mask):
    """Over the slots that mask: bool[B, S] shows; scores: float32[B, K, G, S]."""
    scores = jnp.where(mask[:, None, None], scores, _MASKED)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


class Decoder:
    """A model made ready for decoding; keep it, for it holds the compiled loops.

    Args:
        recipe: an NNX module with `llm` (Llama), `project` (visual tokens -> embeddings),
            `predict_visual` (hidden states -> normalised visual tokens), `feature_shape` (P, C),
            `image_start` and `image_end` (ids). Adapters are merged into its weights.
    """

    def __init__(self, recipe):
        recipe = lora.merged(recipe)
        self.cfg = recipe.llm.cfg
        self.start, self.end = int(recipe.image_start), int(recipe.image_end)
        self.P, self.C = recipe.feature_shape
        parts = nnx.merge(*nnx.split(recipe))  # the same arrays, another module
        for name in ("llm", "tower"):
            if hasattr(parts, name):
                delattr(parts, name)
        self._parts, parts_state = nnx.split(parts)
        self.weights = {"llm": layout(recipe.llm), "parts": parts_state}
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
        record, vectors, ended = jax.device_get((state.record, state.vectors, state.ended))
        return [self._result(*row, options.eos) for row in zip(record, vectors, ended, strict=True)]

    def _result(self, record, vectors, ended, eos) -> Result:
        record = record[record != NOTHING]
        vectors = vectors[: len(record)][record == VISUAL]
        segments, text, picture, used = [], [], None, 0

        def flush():
            nonlocal picture
            if text:
                segments.append(Text(np.array(text, np.int32)))
                text.clear()
            if picture is not None:
                begin, n = picture
                segments.append(Picture(vectors[begin : begin + n], n == self.P))
                picture = None

        for token in record.tolist():
            if token == VISUAL:
                if picture is None:
                    flush()
                    picture = (used, 0)
                used += 1
                picture = (picture[0], picture[1] + 1)
                if picture[1] == self.P:
                    flush()
                continue
            if token == self.start or picture is not None:
                flush()
            if token == self.start:
                picture = (used, 0)
            elif token != self.end and token not in eos:
                text.append(token)
        flush()
        return Result(tuple(segments), record[record >= 0], vectors, record, bool(ended))

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
        pad = ((0, 0), (0, 0), (0, 0), (0, capacity))

        def mix(q, k, v):
            keys.append(jnp.pad(k.transpose(0, 2, 3, 1), pad))
            values.append(jnp.pad(v.transpose(0, 2, 3, 1), pad).swapaxes(2, 3))
            return attend(q, k, v, mask)

        x = embeds.astype(dtype).reshape(B * L, D).T
        for w in llm["layers"]:
            x = _layer(cfg, w, x, cos, sin, mix)
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
        return self._emit(weights, state, _norm(last, llm["norm"], cfg.norm_eps), options)

    def _run_loop(self, weights, state, until, *, options):
        def go_on(s):
            return ~s.done.all() & (s.step < jnp.minimum(until, s.record.shape[1]))

        def body(s):
            s, hidden = self._read(weights["llm"], s)
            return self._emit(weights, s, hidden, options)

        return lax.while_loop(go_on, body, state)

    def _angles(self, positions):
        cfg = self.cfg
        freq = rope.frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        return rope.angles(positions, freq)

    def _read(self, llm, s: State):
        """Reads the token emitted last: (state with it in the cache, float[D, B] hidden)."""
        cos, sin = self._angles((s.slot - s.first)[:, None])
        slots = jnp.arange(s.values[0].shape[2])
        mask = (slots >= s.first[:, None]) & (slots <= s.slot)
        keys, values = [], []

        def mix(i, q, k, v):
            k, v = k.astype(s.keys[i].dtype), v.astype(s.values[i].dtype)
            here = lax.dynamic_update_slice(s.keys[i], k.transpose(0, 2, 3, 1), (0, 0, 0, s.slot))
            there = lax.dynamic_update_slice(s.values[i], v.swapaxes(1, 2), (0, 0, s.slot, 0))
            here, there = _once((here, there))
            keys.append(here)
            values.append(there)
            return _attend_cached(q, here, there, mask)

        x = s.embed.T
        for i, w in enumerate(llm["layers"]):
            x = _layer(self.cfg, w, x, cos, sin, partial(mix, i))
        s = dataclasses.replace(s, keys=keys, values=values, slot=s.slot + 1)
        return s, _norm(x, llm["norm"], self.cfg.norm_eps)

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
            hidden = _once(jnp.where(drawing, projected.T, hidden))

        def choose(hidden):
            logits = jnp.matmul(llm["head"], hidden, preferred_element_type=jnp.float32)
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


def prepare(recipe) -> Decoder:
    """Lays the weights of a recipe out for decoding, once."""
    return Decoder(recipe)

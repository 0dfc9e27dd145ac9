"""The language model's one forward pass for decoding: its layers and its cache.

Its weights come from the layout of training by `llm_weights.take_over`.

At a few rows a step is bound by reading weights, and products of the form [F, D] @ [D, rows] read
each weight once, in order. Activations are columns therefore, and a tied table needs no transposed
copy. Queries, keys and values are one product, gate and up another. Keys are kept as [B * K, H, S],
values as [B * K, S, H], the form in which products take them: a step writes into the cache in
place, and attention streams it.

Where products of float32 are rounded to bfloat16 (`nn/linear.py`), weights are kept rounded; on
request everywhere, or in 8 bits with a scale per output, which a step reads as they are, or in 4
bits with a scale per block of inputs (NF4), which a step unpacks in each product.

On a mesh, heads, hidden units and vocabulary are sharded over "tensor", rows over all other axes.
Fused kernels are then ordered by shard ([q0 k0 v0 q1 k1 v1] on two), so that splitting their
product moves nothing, and the cache has rows and heads as two axes, [B, K, H, S].

Where the model has a `Prefix`, its keys and values are kept once for each layer, beside the cache.

Where the model has an `Insert`, its blocks run as in training, on rows. What they read of an image
is projected once, when the image is placed, and kept beside the cache (`PlacedImages`).
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from metamorph_jax import sharding
from metamorph_jax.models.llm.llama import Insert, LlamaConfig
from metamorph_jax.models.prefix import before
from metamorph_jax.nn import quantized, rope
from metamorph_jax.nn.attention import attend
from metamorph_jax.nn.norms import rms_norm
from metamorph_jax.sharding import BATCH_AXES, constrain

_MASKED = -1e30
NOWHERE = 2**31 - 1  # a position that no row reaches
# XLA would fold small producers into the big loops over weights and cache and compute them again
# for every element; after a barrier they are computed once.
once = lax.optimization_barrier


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlacedImages:
    """The images of rows as the blocks of an `Insert` see them, oldest first; M places a row.

    Attributes:
        values: of each block, what it projected, with leaves [B, M, ...].
        start: int32[B, M] position of the image's first visual token, from which on it is seen;
            `NOWHERE` where the place is free.
        end: int32[B, M] position from which on it is not: the begin of the next document.
    """

    values: tuple[Any, ...]
    start: jax.Array
    end: jax.Array

    def visible(self, positions: jax.Array) -> jax.Array:
        """bool[B, L, M] of positions int32[B, L]."""
        at = positions[:, :, None]
        return (self.start[:, None] <= at) & (at < self.end[:, None])

    def before(self, position: jax.Array) -> "PlacedImages":
        """The same images, hidden from position int32[B] on."""
        return dataclasses.replace(self, end=jnp.minimum(self.end, position[:, None]))

    def and_then(self, new: "PlacedImages") -> "PlacedImages":
        """With newer images, left-aligned in `new`; those that no longer fit are the oldest."""
        M = self.start.shape[1]
        count, more = (jnp.sum(x.start < NOWHERE, axis=1, keepdims=True) for x in (self, new))
        at = jnp.arange(M) + jnp.maximum(count + more - M, 0)
        source = jnp.where(at < count, at, at - count + M)
        source = jnp.where(at < count + more, source, 0)

        def take(a, b):
            both = jnp.concatenate([a, b.astype(a.dtype)], axis=1)
            index = source.reshape(*source.shape, *(1,) * (a.ndim - 2))
            return jnp.take_along_axis(both, index, axis=1)

        kept = jax.tree.map(take, self, new)
        start = jnp.where(at < count + more, kept.start, NOWHERE)
        return dataclasses.replace(kept, start=start)

    def until(self, position: jax.Array) -> "PlacedImages":
        """Without what was placed at position int32[B] or later."""
        forget = lambda x: jnp.where(x < position[:, None], x, NOWHERE)  # noqa: E731
        return dataclasses.replace(self, start=forget(self.start), end=forget(self.end))

    def of_rows(self, rows: jax.Array) -> "PlacedImages":
        """The images of the rows int32[R]."""
        return jax.tree.map(lambda x: x[rows], self)


@dataclasses.dataclass(frozen=True)
class CachedLLM:
    """The functions of a language model that decodes; its weights are an argument.

    Attributes:
        cfg: of the `Llama` whose weights they are.
        tensor: size of the mesh's axis "tensor".
        insert: of the `Llama`.
    """

    cfg: LlamaConfig
    tensor: int = 1
    insert: Insert | None = None

    @property
    def head_shards(self) -> int:
        """Into how many shards the heads are cut: all of "tensor" or, if they don't divide, 1."""
        return 1 if self.cfg.kv_heads % self.tensor else self.tensor

    @property
    def mlp_shards(self) -> int:
        return 1 if self.cfg.mlp_width % self.tensor else self.tensor

    @property
    def table_rows(self) -> int:
        """Rows of the tables as they are kept: a multiple of `tensor`; those added are zeros."""
        return -(-self.cfg.tokens // self.tensor) * self.tensor

    # ---- the forward pass

    def embed(self, weights: dict, ids: jax.Array) -> jax.Array:
        """float[..., D] of int32[...] ids."""
        return weights["table"][ids]

    def logits(self, weights: dict, hidden: jax.Array) -> jax.Array:
        """float32[V + n, R] of hidden states float[D, R]; -inf for rows that pad the table."""
        logits = linear(weights["head"], hidden, jnp.float32)
        if self.table_rows == self.cfg.tokens:
            return logits
        real = jnp.arange(self.table_rows)[:, None] < self.cfg.tokens
        return jnp.where(real, logits, -jnp.inf)

    def place(self, weights: dict, maps, start, end, places: int = 0) -> PlacedImages:
        """Images of rows, projected for every block of the insert.

        Args:
            maps: a tuple of float[B, m, h, w, C]; a row's images are left-aligned.
            start, end: int32[B, m], see `PlacedImages`.
            places: M, if there shall be more than m.
        """
        run = lambda block: block.project(maps)  # noqa: E731
        values = tuple(run(self._block(state)) for state in weights["inserts"])
        more = max(places - start.shape[1], 0)
        pad = lambda x, fill: jnp.pad(  # noqa: E731
            x, [(0, more if axis == 1 else 0) for axis in range(x.ndim)], constant_values=fill
        )
        values = jax.tree.map(lambda x: pad(x, 0), values)
        return PlacedImages(values, pad(start, NOWHERE), pad(end, NOWHERE))

    def read_prompts(
        self, weights: dict, embeds, lengths, slots: int, images: PlacedImages | None = None,
        *, whole: bool = False,
    ):  # fmt: skip
        """Reads rows into a new cache.

        Args:
            embeds: float[B, L, D], padded on the right; lengths: int32[B] of them are real.
            slots: S of the cache, at least L.
            images: of the rows, for a model with an insert.
            whole: return the states at all positions, too.

        Returns:
            (keys, values, float[D, B] hidden states at each row's last position); and with `whole`,
            float[B, L, D] at all of them.
        """
        L = embeds.shape[1]
        order = jnp.arange(L)
        real = order < lengths[:, None]
        mask = real[:, None, :] & (order[:, None] >= order[None, :])
        keys, values = [], []

        def mix(_, q, k, v, prefix):
            k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
            keys.append(self._cut(jnp.pad(k, ((0, 0), (0, 0), (0, 0), (0, slots - L)))))
            values.append(self._cut(jnp.pad(v, ((0, 0), (0, 0), (0, slots - L), (0, 0)))))
            k, v = k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3)
            return attend(q, *before(prefix, k, v, mask))

        positions = jnp.broadcast_to(order, embeds.shape[:2])
        x = self._run(weights, embeds, positions, mix, images)
        return keys, values, *self._ends(weights, x, lengths, whole)

    def read_block(
        self, weights: dict, keys, values, length, embeds, lengths, images=None,
        *, whole: bool = False,
    ):  # fmt: skip
        """Appends a block to rows of a cache.

        Args:
            length: int32[B] slots of each row that are filled.
            embeds: float[B, n, D]; lengths: int32[B] of them are appended, 0 leaves a row as it is.
            images, whole: see `read_prompts`; the images of the block are among them.

        Returns:
            As `read_prompts`; hidden states of rows that got nothing mean nothing.
        """
        *kept, x = self._append(weights, keys, values, length, embeds, lengths, images)
        return *kept, *self._ends(weights, x, jnp.maximum(lengths, 1), whole)

    def read_whole_block(self, weights: dict, keys, values, length, embeds, lengths, images=None):
        """float[n, D, B] hidden states at all positions of a block; arguments as `read_block`.

        The cache stays as it is.
        """
        B, n = embeds.shape[:2]
        *_, x = self._append(weights, keys, values, length, embeds, lengths, images)
        x = norm(x, weights["norm"], self.cfg.norm_eps)
        return x.reshape(self.cfg.width, B, n).transpose(2, 0, 1)

    def _append(self, weights: dict, keys, values, length, embeds, lengths, images):
        """(keys, values, what the layers make of a block, float[D, B * n]); see `read_block`."""
        n, S = embeds.shape[1], values[0].shape[-2]
        new = jnp.arange(n)
        positions = length[:, None] + new
        # What is not to be written goes to a slot after the last one, which drops it.
        slots = jnp.where(new < lengths[:, None], positions, S)
        mask = jnp.arange(S) <= positions[:, :, None]
        kept = ([], [])

        def mix(i, q, k, v, prefix):
            kept[0].append(self._local(_append_keys, keys[i], k, slots))
            kept[1].append(self._local(_append_values, values[i], v, slots))
            k, v = (x.reshape(*q.shape[:1], -1, *x.shape[-2:]) for x in (kept[0][i], kept[1][i]))
            k, v = k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3)
            return attend(q, *before(prefix, k, v, mask))

        x = self._run(weights, embeds, positions, mix, images)
        return *kept, x

    def read_token(self, weights: dict, keys, values, length, embed, images=None):
        """Reads one more position of every row, float[B, D], into slot `length` of the row.

        Returns:
            As `read_prompts`.
        """
        mask = jnp.arange(values[0].shape[-2]) <= length[:, None]
        kept = ([], [])

        def mix(i, q, k, v, prefix):
            kept[0].append(self._local(_write_keys, keys[i], k, length))
            kept[1].append(self._local(_write_values, values[i], v, length))
            return attend_cached(q, kept[0][i], kept[1][i], mask, prefix)

        x = self._run(weights, embed[:, None], length[:, None], mix, images)
        return *kept, norm(x, weights["norm"], self.cfg.norm_eps)

    def _run(self, weights: dict, embeds, positions, mix: Callable, images):
        """All layers on embeds: float[B, L, D], as columns float[D, B * L].

        `mix(layer, q, k, v, prefix)` attends with q: [B, L, N, H], k and v: [B, L, K, H] and keeps
        what it must; the prefix is (keys, values) of the layer, [n, K, H] each, or None.
        """
        cfg = self.cfg
        freq = rope.frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        cos, sin = rope.angles(positions, freq)
        x = embeds.astype(weights["table"].dtype).reshape(-1, cfg.width).T
        for i, w in enumerate(weights["layers"]):
            insert = None
            if self.insert is not None and i % self.insert.every == 0:
                insert = partial(self._look, weights, i // self.insert.every, positions, images)
            x = constrain(x, None, "act_batch")
            x = self._layer(w, x, cos, sin, partial(mix, i), insert)
        return x

    def _look(self, weights: dict, number: int, positions, images: PlacedImages | None, x):
        """What a block of the insert adds to columns float[D, B * L]."""
        rows = x.T.reshape(*positions.shape, -1)
        values, visible = None, None
        if images is not None:
            values, visible = images.values[number], images.visible(positions)
        out = self._block(weights["inserts"][number])(rows, values, visible)
        return once(out.reshape(x.shape[1], -1).T)

    def _block(self, state: nnx.State):
        """A block of the insert with its weights."""
        return nnx.merge(_structure(self.insert), state)

    def _layer(self, w: dict, x, cos, sin, mix: Callable, insert: Callable | None):
        cfg = self.cfg
        B, L = cos.shape[:2]
        H, T = cfg.head_dim, self.head_shards
        qkv = once(linear(w["qkv"], norm(x, w["norm1"], cfg.norm_eps)))
        qkv = qkv.T.reshape(B, L, T, -1, H)
        parts = jnp.split(qkv, [cfg.heads // T, (cfg.heads + cfg.kv_heads) // T], axis=3)
        q, k, v = (part.reshape(B, L, -1, H) for part in parts)
        if cfg.qk_norm:
            q, k = rms_norm(q, w["q_norm"], cfg.norm_eps), rms_norm(k, w["k_norm"], cfg.norm_eps)
        prefix = (w["prefix"]["k"], w["prefix"]["v"]) if "prefix" in w else None
        mixed = mix(rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v, prefix)
        x = x + linear(w["o"], once(mixed.reshape(B * L, -1).T))
        if insert is not None:
            x = x + insert(x)
        hidden = linear(w["gate_up"], norm(x, w["norm2"], cfg.norm_eps))
        hidden = hidden.reshape(self.mlp_shards, 2, -1, B * L)
        gate, up = (hidden[:, part].reshape(-1, B * L) for part in range(2))
        return x + linear(w["down"], once(nnx.silu(gate) * up))

    def _ends(self, weights: dict, x, lengths, whole: bool) -> tuple:
        """(each row's last state,) and with `whole` all states; see `read_prompts`."""
        if not whole:
            return (self._last(weights, x, lengths),)
        x = norm(x, weights["norm"], self.cfg.norm_eps).reshape(self.cfg.width, len(lengths), -1)
        last = jnp.take_along_axis(x, (lengths - 1)[None, :, None], axis=2)[:, :, 0]
        return last, x.transpose(1, 2, 0)

    def _last(self, weights: dict, x, lengths):
        """float[D, B] of columns float[D, B * L]: each row's position lengths - 1, normed."""
        B = len(lengths)
        x = x.reshape(self.cfg.width, B, -1)
        x = jnp.take_along_axis(x, (lengths - 1)[None, :, None], axis=2)[:, :, 0]
        return norm(x, weights["norm"], self.cfg.norm_eps)

    # ---- on a mesh

    def cache_spec(self, rows: int, mesh) -> P:
        """Where keys and values of so many rows lie; on one device their rows are not an axis."""
        if mesh.size == 1:
            return P()
        batch = sharding.fit(P(BATCH_AXES), (rows,), mesh)
        return P(*batch, "tensor" if self.head_shards > 1 else None, None, None)

    def _cut(self, cache):
        """Keys or values [B, K, ...] in the form in which they are kept."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return _flat(cache)
        return lax.with_sharding_constraint(cache, self.cache_spec(len(cache), mesh))

    def _local(self, function, cache, new, slots):
        """`function(cache, new: [B, L, K, H], slots)` on each device's own rows and heads.

        Left to itself, XLA gathers a cache whose rows are written at different slots.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return function(cache, new, slots)
        spec = self.cache_spec(len(cache), mesh)
        rows = P(spec[0], *(None for _ in slots.shape[1:]))
        run = jax.shard_map(
            lambda cache, new, slots: function(_flat(cache), new, slots).reshape(cache.shape),
            mesh=mesh, in_specs=(spec, P(spec[0], None, spec[1], None), rows), out_specs=spec,
            check_vma=False,
        )  # fmt: skip
        return run(cache, new, slots)

    def take_rows(self, cache, rows, requests: int):
        """Keys or values of the rows int32[R] of a cache, in this order.

        Args:
            requests: both the cache and `rows` have equally many rows for each of so many requests,
                and those of a request come from the same request: nothing moves between devices
                if these divide the requests.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return _flat(cache.reshape(-1, self.cfg.kv_heads, *cache.shape[1:])[rows])
        before, after = (self.cache_spec(n, mesh) for n in (len(cache), len(rows)))
        if not before[0] == after[0] == self.cache_spec(requests, mesh)[0]:
            return lax.with_sharding_constraint(cache[rows], after)
        run = jax.shard_map(
            lambda cache, rows: cache[rows % len(cache)],
            mesh=mesh, in_specs=(before, P(before[0])), out_specs=after, check_vma=False,
        )  # fmt: skip
        return run(cache, rows)

    def specs(self, weights: dict) -> dict:
        """Where the leaves of weights lie: a PartitionSpec for each."""
        each = lambda name, kept: (  # noqa: E731
            {leaf: self.spec(name, leaf) for leaf in kept}
            if isinstance(kept, dict) else self.spec(name)
        )  # fmt: skip
        apart = ("layers", "inserts")
        outer = {name: each(name, kept) for name, kept in weights.items() if name not in apart}
        inner = [{name: each(name, kept) for name, kept in w.items()} for w in weights["layers"]]
        if self.insert is not None:
            outer["inserts"] = [self.block_specs(state) for state in weights["inserts"]]
        return outer | {"layers": inner}

    def block_specs(self, state: nnx.State) -> nnx.State:
        """Where the leaves of a block of the insert lie: over "tensor" where their names say so."""

        def one(variable):
            names = variable.get_metadata().get("logical", ())
            names = (None,) * (len(variable.shape) - len(names)) + tuple(names)
            rules = (None if name is None else sharding.RULES[name] for name in names)
            cut = (
                "tensor" if rule == "tensor" and size % self.tensor == 0 else None
                for rule, size in zip(rules, variable.shape, strict=True)
            )  # fmt: skip
            return variable.replace(P(*cut))

        return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def spec(self, name: str, leaf: str = "w") -> P:
        """Where a leaf of the weights lies."""
        heads = "tensor" if self.head_shards > 1 else None
        mlp = "tensor" if self.mlp_shards > 1 else None
        if name == "prefix":
            return P(None, heads, None)
        cut = {"qkv": heads, "gate_up": mlp, "table": "tensor", "head": "tensor"}
        matrix = leaf in ("w", "codes", "blocks")
        if name in cut:
            return P(cut[name], None) if matrix else P(cut[name])
        if name in ("o", "down") and matrix:
            inputs = self.cfg.heads * self.cfg.head_dim if name == "o" else self.cfg.mlp_width
            whole = leaf == "w" or inputs % (quantized.BLOCK * self.tensor) == 0  # no block is cut
            return P(None, (heads if name == "o" else mlp) if whole else None)
        return P(None)


@cache
def _structure(insert: Insert):
    """The structure of the insert's blocks."""
    return nnx.graphdef(nnx.eval_shape(lambda: insert.block(insert.cfg, rngs=nnx.Rngs(0))))


def _flat(cache):
    """[B * K, ...] of [B, K, ...].

    It has to be kept like this on one device. Where the cache is an array [B, K, ...] of which a
    product takes the flat form, XLA's CPU backend writes it twice, and copies it for that.
    """
    return cache.reshape(-1, *cache.shape[2:])


def _write_keys(cache, new, slot):
    """Keys [B * K, H, S] with one position, new: [B, 1, K, H], in slot int32[B] of its row."""
    return _write(cache, new.astype(cache.dtype).transpose(0, 2, 3, 1), slot, axis=2)


def _write_values(cache, new, slot):
    """As `_write_keys`, for values [B * K, S, H]."""
    return _write(cache, new.astype(cache.dtype).transpose(0, 2, 1, 3), slot, axis=1)


_FEW = 16  # rows up to which updates in place, one each, are faster than a scatter


def _write(cache, new, slot, axis: int):
    rows, heads = new.shape[:2]
    if rows > _FEW:
        at = (jnp.arange(rows), *(slice(None),) * axis, slot)
        whole = cache.reshape(rows, heads, *cache.shape[1:])
        return _flat(whole.at[at].set(new.squeeze(axis + 1)))
    for row in range(rows):
        at = [row * heads, 0, 0]
        at[axis] = slot[row]
        cache = lax.dynamic_update_slice(cache, new[row], at)
    return cache


def _append_keys(cache, new, slots):
    """Keys [B * K, H, S] with new: [B, n, K, H] in slots int32[B, n]; S drops a position."""
    B, _, K, _ = new.shape
    whole = cache.reshape(B, K, *cache.shape[1:])
    at = jnp.arange(B)[:, None], slice(None), slice(None), slots
    return _flat(whole.at[at].set(new.astype(cache.dtype), mode="drop"))


def _append_values(cache, new, slots):
    """As `_append_keys`, for values [B * K, S, H]."""
    B, _, K, _ = new.shape
    whole = cache.reshape(B, K, *cache.shape[1:])
    at = jnp.arange(B)[:, None], slice(None), slots
    return _flat(whole.at[at].set(new.astype(cache.dtype), mode="drop"))


# ---- products on columns


def product(w, x, dtype=None):
    """[out, R] of weights [out, in] and columns [in, R], both in the dtype of the weights.

    Codes of 8 bits are taken in the dtype of the columns. The result is in `dtype`, by default that
    of `x`; sums are float32 anyway.
    """
    R, dtype = x.shape[1], dtype or x.dtype
    if w.dtype == jnp.int8:
        w = w.astype(x.dtype)
    if w.dtype != x.dtype:  # see `nn.linear.rounded_product`; one column alone would go without
        x = jnp.pad(x.astype(w.dtype), ((0, 0), (0, int(R == 1))))
        x = with_layout_constraint(x, Layout(major_to_minor=(0, 1)))
    return jnp.matmul(w, x, preferred_element_type=dtype)[:, :R]


def linear(m, x, dtype=None):
    """float[out, R] of columns float[in, R], in `dtype`, by default that of `x`."""
    dtype = dtype or x.dtype
    if "codes" in m:
        packed = {"kernel_codes": m["codes"].T, "kernel_scale": m["blocks"].T}
        y = product(quantized.unpack(packed, len(x), x.dtype).T, x, dtype)
    elif "scale" in m:
        y = (product(m["w"], x, jnp.float32) * m["scale"][:, None]).astype(dtype)
    else:
        y = product(m["w"], x, dtype)
    return y + m["b"][:, None] if "b" in m else y


def norm(x, scale, eps):
    """RMSNorm of columns float[D, R]."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=0, keepdims=True) + eps)
    return once((y * scale[:, None]).astype(x.dtype))


def attend_cached(q, keys, values, mask, prefix=None):
    """Attention of one query a row over the cache, and over a prefix that all rows see.

    Args:
        q: float[B, 1, N, H].
        keys, values: [B * K, H, S] and [B * K, S, H], or [B, K, H, S] and [B, K, S, H].
        mask: bool[B, S], True where a row may look.
        prefix: (keys, values), [n, K, H] each, or None.

    Returns:
        float[B, 1, N, H].
    """
    B, _, N, H = q.shape
    if prefix is not None:
        return _attend_with_prefix(q, keys, values, mask, *prefix)
    q = once((q * H**-0.5).reshape(*keys.shape[:-2], -1, H))
    scores = jnp.einsum("...GH,...HS->...GS", q, keys, preferred_element_type=jnp.float32)
    weights = _softmax(scores.reshape(B, N, -1), mask).astype(values.dtype)
    weights = once(weights).reshape(scores.shape)
    return jnp.einsum("...GS,...SH->...GH", weights, values).reshape(B, 1, N, H)


def _attend_with_prefix(q, keys, values, mask, first_keys, first_values):
    """As `attend_cached`. Scores are joined, and not the keys: the cache stays where it is."""
    B, _, N, H = q.shape
    n, K, _ = first_keys.shape
    q = once((q * H**-0.5).reshape(*keys.shape[:-2], -1, H))
    scores = jnp.einsum("...GH,...HS->...GS", q, keys, preferred_element_type=jnp.float32)
    first = jnp.einsum("BKGH,nKH->BKGn", q.reshape(B, K, -1, H), first_keys.astype(q.dtype),
                       preferred_element_type=jnp.float32)  # fmt: skip
    both = jnp.concatenate([first.reshape(B, N, n), scores.reshape(B, N, -1)], axis=-1)
    mask = jnp.pad(mask, ((0, 0), (n, 0)), constant_values=True)
    weights = once(_softmax(both, mask).astype(values.dtype))
    first, weights = weights[..., :n].reshape(first.shape), weights[..., n:].reshape(scores.shape)
    out = jnp.einsum("...GS,...SH->...GH", weights, values).reshape(B, 1, N, H)
    first = jnp.einsum("BKGn,nKH->BKGH", first, first_values.astype(values.dtype))
    return out + first.reshape(B, 1, N, H)


def _softmax(scores, mask):
    """Over the slots that mask: bool[B, S] shows; scores: float32[B, N, S]."""
    scores = jnp.where(mask[:, None], scores, _MASKED)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)

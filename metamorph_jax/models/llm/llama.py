"""The Llama family: Llama 2 / 3 / 3.1 / 3.2, Vicuna, TinyLlama, SmolLM2; Qwen2 and 2.5 by biases,
Qwen3 by norms of queries and keys.

Touvron et al. 2023 (arXiv 2307.09288), Grattafiori et al. 2024 (arXiv 2407.21783). Pre-norm
decoder with grouped-query attention, SwiGLU and rotary positions. Names follow the published
checkpoints. Four things are our own:

* Layers are stacked on a leading axis and scanned. This is the forward pass of training; decoding
  has its own, with a cache, in `sampling/cached_llm.py`.
* Tokens that a recipe adds (start and end of an image) are leaves of their own, `added`, so that
  they can be trained while the tables they extend stay frozen. Id `vocab_size + j` is row j.
* A `Prefix` (`models/prefix.py`) stands before the keys and values of every layer.
* An `Insert` puts blocks between attention and MLP of some layers, as MM-Interleaved does.
"""

import dataclasses
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from metamorph_jax.config import check_numbers
from metamorph_jax.flops import Work
from metamorph_jax.models.prefix import Prefix, PrefixConfig, before
from metamorph_jax.nn import rope
from metamorph_jax.nn.attention import Segments, attend, packed_mask
from metamorph_jax.nn.linear import gathering_dot_general
from metamorph_jax.nn.norms import RMSNorm
from metamorph_jax.sharding import constrain

# What is kept for the backward pass: from the fastest, which takes the most memory, to the slowest.
REMAT = {
    "none": None,
    # Keeps matrix products that no batch dimension enters, recomputes the cheap rest.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # Keeps the layer inputs and what attention gives, recomputes the products.
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    # Keeps nothing but the layer inputs.
    "full": jax.checkpoint_policies.nothing_saveable,
    # Keeps the layer inputs in the host's memory.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Structure of a model.

    Attributes:
        vocab_size: V, ids of the published model; added_tokens: n ids after them.
        tied: the output table is the input table.
        qkv_bias, o_bias, mlp_bias: which linears have biases.
        qk_norm: RMSNorm over the channels of each query and key head.
        head_bias: the output table has biases, zeros at first: `bias` and, for added tokens,
            `added_bias`. Published models have none.
        vocab_multiple: tables have V rows, rounded up to a multiple of this, to shard evenly.
        max_positions: context length of the published model; only exports use it.
        dtype: of the computation; parameters are float32.
        remat: see `REMAT`.
    """

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    added_tokens: int = 0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: rope.RopeScaling = rope.RopeScaling()
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    head_bias: bool = False
    vocab_multiple: int = 1
    max_positions: int = 2048
    init_std: float = 0.02
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        check_numbers(
            self,
            "vocab_size width mlp_width layers heads kv_heads head_dim vocab_multiple",
            "norm_eps rope_theta",
        )
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads don't divide over {self.kv_heads} kv heads")
        if self.remat not in REMAT:
            raise ValueError(f"remat {self.remat!r} is none of {', '.join(REMAT)}")
        if self.head_bias and self.tied:
            raise ValueError("head_bias needs an output table of its own: tied must be false")

    @property
    def tokens(self) -> int:
        """Ids that can stand in the input or be predicted."""
        return self.vocab_size + self.added_tokens

    @property
    def rows(self) -> int:
        """Rows of the tables: V rounded up to `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class InsertBlock(Protocol):
    """An `nnx.Module` that looks at images from within a layer (`models.mmfs.LLMBlock`)."""

    def __init__(self, cfg, *, rngs: nnx.Rngs): ...

    def project(self, maps):
        """What the block reads of images, computed once per image.

        Args:
            maps: of M images a row, a tuple of float[B, M, h, w, C].

        Returns:
            A pytree of arrays [B, M, ...].
        """

    def __call__(self, x: jax.Array, values, visible: jax.Array | None) -> jax.Array:
        """float[B, L, D] to be added to x: float[B, L, D].

        Args:
            values: from `project`; None: there are no images.
            visible: bool[B, L, M] which images a position sees.
        """

    @staticmethod
    def products(cfg, positions: int, images: int) -> float:
        """FLOPs of a block's forward products on so many positions and images."""


@dataclasses.dataclass(frozen=True)
class Insert:
    """Blocks between attention and MLP of the layers 0, every, 2 * every, …

    Training and decoding (`sampling/cached_llm.py`) run the same blocks.

    Attributes:
        every: layers from one block to the next.
        block: the class of the blocks, an `InsertBlock`.
        cfg: of each block.
    """

    every: int
    block: type
    cfg: Any

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")

    def count(self, layers: int) -> int:
        """Blocks of a model with so many layers."""
        return -(-layers // self.every)


_PLAIN = rope.RopeScaling()
_LLAMA31 = rope.RopeScaling("llama3", factor=8.0)
_LLAMA32 = rope.RopeScaling("llama3", factor=32.0)


def _llama(*shape, theta=1e4, positions=2048, scaling=_PLAIN, tied=False):
    return LlamaConfig(
        *shape, rope_theta=theta, rope_scaling=scaling, max_positions=positions, tied=tied
    )


def _llama3(*shape, scaling=_PLAIN, positions=131072, tied=False):
    return _llama(128256, *shape, theta=5e5, scaling=scaling, positions=positions, tied=tied)


def _qwen2(*shape, rows=152064, positions=32768, tied=False):
    return LlamaConfig(
        rows, *shape, norm_eps=1e-6, rope_theta=1e6, qkv_bias=True, tied=tied,
        max_positions=positions,
    )  # fmt: skip


def _qwen3(*shape, tied=False):
    return LlamaConfig(
        151936, *shape, 128, norm_eps=1e-6, rope_theta=1e6, qk_norm=True, tied=tied,
        max_positions=40960,
    )  # fmt: skip


# Numbers: vocabulary, width, width of the MLP, layers, heads, kv heads, channels of a head.
SIZES: dict[str, LlamaConfig] = {
    "tiny": LlamaConfig(320, 64, 160, 2, 4, 2, 16, tied=True),
    "bench-68m": LlamaConfig(32000, 512, 2048, 8, 8, 8, 64, rope_theta=5e5),
    "smollm2-135m": _llama(49152, 576, 1536, 30, 9, 3, 64, theta=1e5, positions=8192, tied=True),
    "smollm2-360m": _llama(49152, 960, 2560, 32, 15, 5, 64, theta=1e5, positions=8192, tied=True),
    "smollm2-1.7b": _llama(
        49152, 2048, 8192, 24, 32, 32, 64, theta=1.3e5, positions=8192, tied=True
    ),
    "tinyllama-1.1b": _llama(32000, 2048, 5632, 22, 32, 4, 64),
    "llama2-7b": _llama(32000, 4096, 11008, 32, 32, 32, 128, positions=4096),
    "llama2-13b": _llama(32000, 5120, 13824, 40, 40, 40, 128, positions=4096),
    "llama2-70b": _llama(32000, 8192, 28672, 80, 64, 8, 128, positions=4096),
    "vicuna-7b": _llama(32000, 4096, 11008, 32, 32, 32, 128, positions=4096),
    "vicuna-13b": _llama(32000, 5120, 13824, 40, 40, 40, 128, positions=4096),
    # v0.2 and v0.3, which have no sliding window.
    "mistral-7b": _llama(32000, 4096, 14336, 32, 32, 8, 128, theta=1e6, positions=32768),
    "yi-34b": _llama(64000, 7168, 20480, 60, 56, 8, 128, theta=5e6, positions=4096),
    "llama3-8b": _llama3(4096, 14336, 32, 32, 8, 128, positions=8192),
    "llama3-70b": _llama3(8192, 28672, 80, 64, 8, 128, positions=8192),
    "llama3.1-8b": _llama3(4096, 14336, 32, 32, 8, 128, scaling=_LLAMA31),
    "llama3.1-70b": _llama3(8192, 28672, 80, 64, 8, 128, scaling=_LLAMA31),
    "llama3.2-1b": _llama3(2048, 8192, 16, 32, 8, 64, scaling=_LLAMA32, tied=True),
    "llama3.2-3b": _llama3(3072, 8192, 28, 24, 8, 128, scaling=_LLAMA32, tied=True),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 64, rows=151936, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, 128, rows=151936, tied=True),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, 128, rows=151936, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 128),
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8, 128),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, 128),
    "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8, 128),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8),
}


def _linear(cfg: LlamaConfig, d_in, d_out, names, bias, rngs):
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=bias,
        kernel_init=nnx.initializers.normal(cfg.init_std),
        dtype=jnp.dtype(cfg.dtype),
        dot_general=partial(gathering_dot_general, names),
        kernel_metadata={"logical": names},
        bias_metadata={"logical": (names[1],)},
        rngs=rngs,
    )


class Attention(nnx.Module):
    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        D, q, kv = cfg.width, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.cfg = cfg
        self.q_proj = _linear(cfg, D, q, ("embed", "heads"), cfg.qkv_bias, rngs)
        self.k_proj = _linear(cfg, D, kv, ("embed", "heads"), cfg.qkv_bias, rngs)
        self.v_proj = _linear(cfg, D, kv, ("embed", "heads"), cfg.qkv_bias, rngs)
        self.o_proj = _linear(cfg, q, D, ("heads", "embed"), cfg.o_bias, rngs)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, rngs=rngs)
            self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, rngs=rngs)

    def __call__(self, x, cos, sin, mask, prefix=None):
        """float[B, L, D] of x: float[B, L, D]; `prefix`: keys and values before all others, see
        `models.prefix.before`."""
        B, L, _ = x.shape
        H = self.cfg.head_dim
        q = self.q_proj(x).reshape(B, L, -1, H)
        k = self.k_proj(x).reshape(B, L, -1, H)
        v = self.v_proj(x).reshape(B, L, -1, H)
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        q = constrain(q, "act_batch", "act_len", "act_heads", None)
        k, v, mask = before(prefix, k, v, mask)
        mixed = checkpoint_name(attend(q, k, v, mask).reshape(B, L, -1), "attention")
        return self.o_proj(mixed)


@jax.custom_vjp
def swiglu(gate, up):
    """silu(gate) * up; the backward pass keeps its two arguments and recomputes the sigmoid."""
    return nnx.silu(gate) * up


def _swiglu_backward(saved, gradient):
    gate, up = saved
    s = jax.nn.sigmoid(gate)
    return gradient * up * (s * (1 + gate * (1 - s))), gradient * (gate * s)


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        D, F = cfg.width, cfg.mlp_width
        self.gate_proj = _linear(cfg, D, F, ("embed", "mlp"), cfg.mlp_bias, rngs)
        self.up_proj = _linear(cfg, D, F, ("embed", "mlp"), cfg.mlp_bias, rngs)
        self.down_proj = _linear(cfg, F, D, ("mlp", "embed"), cfg.mlp_bias, rngs)

    def __call__(self, x):
        hidden = swiglu(self.gate_proj(x), self.up_proj(x))
        return self.down_proj(constrain(hidden, "act_batch", "act_len", "act_mlp"))


class Layer(nnx.Module):
    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(cfg.width, cfg.norm_eps, rngs=rngs)
        self.self_attn = Attention(cfg, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(cfg.width, cfg.norm_eps, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)

    def __call__(self, x, cos, sin, mask, insert=None, prefix=None):
        """float[B, L, D] of x: float[B, L, D]; `insert` maps such states to what is added, `prefix`
        is this layer's."""
        x = checkpoint_name(x, "layer_input")
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, prefix)
        if insert is not None:
            x = x + insert(x)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return constrain(x, "act_batch", "act_len", "act_embed")


class Embed(nnx.Module):
    """A table of V rows and, apart from it, the rows of added tokens."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(cfg.init_std)
        self.cfg = cfg
        self.embedding = nnx.Param(
            init(rngs.params(), (cfg.rows, cfg.width)), logical=("vocab", "embed")
        )
        if cfg.added_tokens:
            self.added = nnx.Param(
                init(rngs.params(), (cfg.added_tokens, cfg.width)), logical=("added", "embed")
            )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """float[..., D] of int[...] ids below `cfg.tokens`."""
        V = self.cfg.vocab_size
        dtype = jnp.dtype(self.cfg.dtype)
        x = self.embedding[...].astype(dtype)[jnp.minimum(tokens, V - 1)]
        if self.cfg.added_tokens:
            new = self.added[...].astype(dtype)[jnp.clip(tokens - V, 0)]
            x = jnp.where((tokens >= V)[..., None], new, x)
        return x


class Head(nnx.Module):
    """The output table of an untied model: kernel [D, V] and `added` [n, D]; see `head_bias`."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(cfg.init_std)
        self.kernel = nnx.Param(
            init(rngs.params(), (cfg.width, cfg.rows)), logical=("embed", "vocab")
        )
        if cfg.added_tokens:
            self.added = nnx.Param(
                init(rngs.params(), (cfg.added_tokens, cfg.width)), logical=("added", "embed")
            )
        if cfg.head_bias:
            self.bias = nnx.Param(jnp.zeros(cfg.rows), logical=("vocab",))
            if cfg.added_tokens:
                self.added_bias = nnx.Param(jnp.zeros(cfg.added_tokens), logical=("added",))


class Llama(nnx.Module):
    """The model; with an `insert`, its blocks are stacked in `inserts`.

    Raises:
        ValueError: both an insert and a prefix are asked for.
    """

    def __init__(
        self,
        cfg: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        insert: Insert | None = None,
        prefix: PrefixConfig | None = None,
    ):
        if insert is not None and prefix is not None:
            raise ValueError("a language model with an insert has no prefix")
        self.cfg, self.insert = cfg, insert
        self.embed_tokens = Embed(cfg, rngs=rngs)
        self.layers = nnx.vmap(lambda r: Layer(cfg, rngs=r))(rngs.split(cfg.layers))
        self.norm = RMSNorm(cfg.width, cfg.norm_eps, rngs=rngs)
        if not cfg.tied:
            self.lm_head = Head(cfg, rngs=rngs)
        if insert is not None:
            make = nnx.vmap(lambda r: insert.block(insert.cfg, rngs=r))
            self.inserts = make(rngs.split(insert.count(cfg.layers)))
        shape = (cfg.layers, cfg.kv_heads, cfg.head_dim)
        self.prefix = None if prefix is None else Prefix(prefix, cfg.width, shape, rngs=rngs)

    def __call__(self, embeds: jax.Array, positions: jax.Array, mask, extra=None) -> jax.Array:
        """Runs the layers and the final norm.

        Args:
            embeds: float[B, L, D] text embeddings with visual ones already in place.
            positions: int32[B, L].
            mask: bool[B, L, L], or from `nn.attention.row_mask`.
            extra: what a model with an `insert` looks at: (maps of M images a row, a tuple of
                float[B, M, h, w, C]; bool[B, L, M] which of them a position sees). None: no images.

        Returns:
            float[B, L, D] hidden states after the final RMSNorm.
        """
        freq = rope.frequencies(self.cfg.head_dim, self.cfg.rope_theta, self.cfg.rope_scaling)
        cos, sin = rope.angles(positions, freq)
        x = constrain(embeds.astype(jnp.dtype(self.cfg.dtype)), "act_batch", "act_len", "act_embed")
        graph, weights = nnx.split(self.layers)

        prefix = None
        if self.prefix is not None:
            prefix = self.prefix()
            # The kernel for packed rows has no place for keys that belong to no segment.
            mask = packed_mask(mask.numbers) if isinstance(mask, Segments) else mask

        def layer(x, weights, insert=None, prefix=None):
            return nnx.merge(graph, weights)(x, cos, sin, mask, insert, prefix)

        if self.insert is None:
            body = lambda x, w: (layer(x, w[0], prefix=w[1]), None)  # noqa: E731
            if self.cfg.remat != "none":
                body = jax.checkpoint(body, policy=REMAT[self.cfg.remat], prevent_cse=False)
            x, _ = jax.lax.scan(body, x, (weights, prefix))
        else:
            x = self._with_inserts(x, layer, weights, extra)
        return self.norm(x)

    def _with_inserts(self, x, layer, weights, extra):
        """All layers, in groups that begin with a block; whole groups are scanned.

        Layers are read where they lie: as slices of a group, XLA would copy a group's weights
        first. Their gradients are added in place.
        """
        graph, blocks = nnx.split(self.inserts)
        maps, visible = (None, None) if extra is None else extra
        every, layers = self.insert.every, self.cfg.layers
        policy = REMAT[self.cfg.remat] or _save_all_but_slices

        def group(x, number, size, prevent_cse):
            for i in range(size):

                def one(x, number, i=i):
                    insert = None
                    if i == 0:
                        block = nnx.merge(graph, _layer_of(blocks, number))
                        values = None if maps is None else block.project(maps)
                        insert = lambda x: block(x, values, visible)  # noqa: E731
                    return layer(x, _layer_of(weights, number * every + i), insert)

                x = jax.checkpoint(one, policy=policy, prevent_cse=prevent_cse)(x, number)
            return x

        step = lambda x, number: (group(x, number, every, False), None)  # noqa: E731
        x, _ = jax.lax.scan(step, x, jnp.arange(layers // every))
        if layers % every:  # outside of a loop, where XLA could undo the recomputation
            x = group(x, layers // every, layers % every, True)
        return x

    def head_tables(self) -> tuple[jax.Array, jax.Array | None]:
        """The output table as ([D, V], [n, D] or None for the added tokens)."""
        if self.cfg.tied:
            table, holder = self.embed_tokens.embedding[...].T, self.embed_tokens
        else:
            table, holder = self.lm_head.kernel[...], self.lm_head
        table = table[:, : self.cfg.vocab_size]
        return table, holder.added[...] if self.cfg.added_tokens else None

    def head_bias(self) -> tuple[jax.Array, jax.Array | None] | None:
        """What is added to the logits: (float[V], float[n] of the added tokens or None), if any."""
        if not self.cfg.head_bias:
            return None
        bias = self.lm_head.bias[: self.cfg.vocab_size]
        return bias, self.lm_head.added_bias[...] if self.cfg.added_tokens else None

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32[..., V + n] next-token logits of float[..., D] (after the final norm)."""
        table, added = self.head_tables()
        product = partial(jnp.matmul, preferred_element_type=jnp.float32)
        logits = product(hidden, table.astype(hidden.dtype))
        if added is not None:
            extra = product(hidden, added.T.astype(hidden.dtype))
            logits = jnp.concatenate([logits, extra], axis=-1)
        if self.cfg.head_bias:
            biases = [b for b in self.head_bias() if b is not None]
            logits += jnp.concatenate(biases).astype(jnp.float32)
        return logits


def _save_all_but_slices(primitive, *_, **options) -> bool:
    """The policy "none" where weights are sliced out of stacks: the slices are no results."""
    return primitive.name not in ("dynamic_slice", "squeeze")


def _layer_of(weights, i):
    """The weights of layer i, of stacked ones."""
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), weights)


def work(
    cfg: LlamaConfig, rows: int, length: int, insert: Insert | None = None, images: int = 0
) -> tuple[Work, ...]:
    """Products of a training step on `rows` rows of `length` positions, text loss included.

    Args:
        insert: of the model; `images`: how many of them a row has places for.
    """
    positions = rows * length
    layer = cfg.width * (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim
    layer += cfg.heads * cfg.head_dim * cfg.width + 3 * cfg.width * cfg.mlp_width
    products = 2.0 * layer * cfg.layers * positions
    pairs = 4.0 * cfg.heads * cfg.head_dim * cfg.layers * positions * length / 2
    table = 2.0 * cfg.width * cfg.tokens * positions
    kept = {"none": ("products", "pairs"), "dots": ("products",), "attention": ("pairs",)}
    kept = kept.get(cfg.remat, ())
    mesh = jax.sharding.get_abstract_mesh()
    twice = not mesh.empty and mesh.size > 1  # see `losses.text_loss`
    inserted = ()
    if insert is not None:
        forward = insert.count(cfg.layers) * insert.block.products(
            insert.cfg, positions, rows * images
        )
        again = 0.0 if cfg.remat == "none" else forward
        inserted = (Work("llm inserts", forward, "llm.inserts", 1, again),)
    return (
        Work("llm", products, "llm.layers", 1, 0.0 if "products" in kept else products),
        Work("llm", pairs, "", 2, 0.0 if "pairs" in kept else pairs),
        Work(
            "head table", table,
            "llm.embed_tokens.embedding" if cfg.tied else "llm.lm_head.kernel",
            1, table if twice else 0.0,
        ),
        *inserted,
    )  # fmt: skip


def init_added_tokens(llm: Llama) -> None:
    """Sets the rows of added tokens to the mean of all rows of the table they extend.

    As the reference does when it resizes its tables; in place.
    """
    if not llm.cfg.added_tokens:
        return
    n, V = llm.cfg.added_tokens, llm.cfg.vocab_size
    embed = llm.embed_tokens
    embed.added[...] = jnp.tile(embed.embedding[:V].mean(0, keepdims=True), (n, 1))
    if not llm.cfg.tied:
        head = llm.lm_head
        head.added[...] = jnp.tile(head.kernel[:, :V].mean(1)[None], (n, 1))

"""From the hidden states of generative vokens to the context of a diffusion decoder (MiniGPT-5).

Zheng et al. 2023, arXiv 2310.02239. The states that predict the vokens of an image take the place
of the text features that Stable Diffusion was trained with:

    states [vokens, D] ─ fc1 ─ GELU ─ fc2 ─┬─ encoder ─ memory ┐
                                           │                   ├─ decoder ─ context [queries, inner]
                                  queries ─│───────────────────┘

Encoder and decoder are pre-norm transformers with ReLU, without positions and without masks; each
has a LayerNorm at its end (`torch.nn.Transformer`, `norm_first`). What an image is drawn from
without a condition is what zero states give, see `null_condition`.

Two ablations: `kind="mlp"` has no transformer, but one linear along the tokens that makes `queries`
of `vokens`, to which the queries are added; with `learned_queries=False` they are sin-cos codes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax.config import check_known, check_numbers
from metamorph_jax.models.connectors.mlp import torch_linear
from metamorph_jax.nn.attention import attend
from metamorph_jax.nn.linear import flat_dot_general
from metamorph_jax.nn.sincos import table_1d
from metamorph_jax.sharding import constrain
from metamorph_jax.types import Conditioning

KINDS = ("transformer", "mlp")


@dataclasses.dataclass(frozen=True)
class MapperConfig:
    """Defaults: MiniGPT-5's with a 7B language model and Stable Diffusion 2.1.

    Attributes:
        width: of the hidden states.
        vokens: states per image.
        inner: width of everything after `fc1`, and of the context.
        heads, encoder_layers, decoder_layers, mlp_width: of the transformer.
        queries: tokens of the context.
        kind: one of `KINDS`.
        learned_queries: they are trained; else they are fixed.
        remat: layers are recomputed in the backward pass.
    """

    width: int = 4096
    vokens: int = 8
    inner: int = 1024
    heads: int = 8
    encoder_layers: int = 4
    decoder_layers: int = 4
    mlp_width: int = 4096
    queries: int = 77
    kind: str = "transformer"
    learned_queries: bool = True
    norm_eps: float = 1e-5
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        counts = "width vokens inner heads encoder_layers decoder_layers mlp_width queries"
        check_numbers(self, counts, "norm_eps")
        check_known("kind", self.kind, KINDS)
        if self.inner % self.heads:
            raise ValueError(f"inner {self.inner} doesn't divide over {self.heads} heads")


def _linear(cfg: MapperConfig, d_in, d_out, names, rngs, fan_out=0):
    """A linear as torch's module starts it: Xavier-uniform; `fan_out`: of a larger matrix that the
    kernel is a part of there."""
    bound = (6 / (d_in + (fan_out or d_out))) ** 0.5
    return nnx.Linear(
        d_in,
        d_out,
        dtype=jnp.dtype(cfg.dtype),
        kernel_init=lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(
            key, shape, dtype, -bound, bound
        ),
        kernel_metadata={"logical": names},
        bias_metadata={"logical": (names[1],)},
        dot_general=flat_dot_general,
        rngs=rngs,
    )


def _norm(cfg: MapperConfig, rngs):
    return nnx.LayerNorm(
        cfg.inner,
        epsilon=cfg.norm_eps,
        dtype=jnp.dtype(cfg.dtype),
        use_fast_variance=False,
        scale_metadata={"logical": ("norm",)},
        bias_metadata={"logical": ("norm",)},
        rngs=rngs,
    )


class Attention(nnx.Module):
    def __init__(self, cfg: MapperConfig, *, rngs: nnx.Rngs):
        D, self.heads = cfg.inner, cfg.heads
        inside = lambda: _linear(cfg, D, D, ("embed", "heads"), rngs, 3 * D)  # noqa: E731
        self.q_proj, self.k_proj, self.v_proj = inside(), inside(), inside()
        self.out_proj = _linear(cfg, D, D, ("heads", "embed"), rngs)

    def __call__(self, x, source):
        """float[N, L, D] of x: float[N, L, D] and source: float[N, S, D]."""
        N, L, D = x.shape
        projected = (self.q_proj(x), self.k_proj(source), self.v_proj(source))
        q, k, v = (y.reshape(N, -1, self.heads, D // self.heads) for y in projected)
        return self.out_proj(attend(q, k, v).reshape(N, L, D))


class Layer(nnx.Module):
    """Of the encoder; with `crosses`, of the decoder, whose second attention reads the memory."""

    def __init__(self, cfg: MapperConfig, crosses: bool, *, rngs: nnx.Rngs):
        D, self.crosses = cfg.inner, crosses
        self.self_norm = _norm(cfg, rngs)
        self.self_attn = Attention(cfg, rngs=rngs)
        if crosses:
            self.cross_norm = _norm(cfg, rngs)
            self.cross_attn = Attention(cfg, rngs=rngs)
        self.mlp_norm = _norm(cfg, rngs)
        self.fc1 = _linear(cfg, D, cfg.mlp_width, ("embed", "mlp"), rngs)
        self.fc2 = _linear(cfg, cfg.mlp_width, D, ("mlp", "embed"), rngs)

    def __call__(self, x, memory):
        """Like x: float[N, L, D]; memory: float[N, S, D], or None in the encoder."""
        y = self.self_norm(x)
        x = x + self.self_attn(y, y)
        if self.crosses:
            x = x + self.cross_attn(self.cross_norm(x), memory)
        x = x + self.fc2(nnx.relu(self.fc1(self.mlp_norm(x))))
        return constrain(x, "act_batch", None, "act_embed")


class Stack(nnx.Module):
    """Layers, scanned, and the norm after them."""

    def __init__(self, cfg: MapperConfig, layers: int, crosses: bool, *, rngs: nnx.Rngs):
        self.remat = cfg.remat
        self.layers = nnx.vmap(lambda r: Layer(cfg, crosses, rngs=r))(rngs.split(layers))
        self.norm = _norm(cfg, rngs)

    def __call__(self, x, memory=None):
        graph, weights = nnx.split(self.layers)

        def body(x, weights):
            return nnx.merge(graph, weights)(x, memory), None

        if self.remat:
            body = jax.checkpoint(body, prevent_cse=False)
        x, _ = jax.lax.scan(body, x, weights)
        return self.norm(x)


class Mapper(nnx.Module):
    def __init__(self, cfg: MapperConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.fc1 = torch_linear(cfg.width, cfg.inner, cfg.dtype, rngs)
        self.fc2 = torch_linear(cfg.inner, cfg.inner, cfg.dtype, rngs)
        if cfg.learned_queries:
            normal = jax.random.normal(rngs.params(), (1, cfg.queries, cfg.inner))
            self.queries = nnx.Param(normal, logical=(None, None, "embed"))
        if cfg.kind == "transformer":
            self.encoder = Stack(cfg, cfg.encoder_layers, False, rngs=rngs)
            self.decoder = Stack(cfg, cfg.decoder_layers, True, rngs=rngs)
        else:
            self.spread = torch_linear(cfg.vokens, cfg.queries, cfg.dtype, rngs)

    def features(self, states: jax.Array) -> jax.Array:
        """float[N, vokens, inner] of states: float[N, vokens, D]."""
        x = states.astype(jnp.dtype(self.cfg.dtype))
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))

    def __call__(self, states: jax.Array) -> Conditioning:
        """What N images are drawn from: a context float[N, queries, inner].

        Args:
            states: float[N, vokens, D] after the final norm, those that predict the vokens.
        """
        cfg, x = self.cfg, self.features(states)
        x = constrain(x, "act_batch", None, "act_embed")
        queries = self.table().astype(x.dtype)
        if cfg.kind == "mlp":
            spread = self.spread(x.swapaxes(1, 2)).swapaxes(1, 2)
            return Conditioning(spread + queries)
        queries = jnp.broadcast_to(queries, (len(x), cfg.queries, cfg.inner))
        return Conditioning(self.decoder(queries, self.encoder(x)))

    def table(self) -> jax.Array:
        """float[1, queries, inner] what the context starts from."""
        cfg = self.cfg
        if cfg.learned_queries:
            return self.queries[...]
        return jnp.asarray(table_1d(cfg.queries, cfg.inner))[None]

    def null_condition(self) -> Conditioning:
        """What zero states give, of a single row: an image without a condition."""
        return self(jnp.zeros((1, self.cfg.vokens, self.cfg.width), jnp.dtype(self.cfg.dtype)))

"""Conditioning projectors: visual tokens of a language model -> context of the denoiser.

MetaMorph's visualiser (Tong et al. 2024, arXiv 2412.14164). Four modes,
float[B, P, input_dim] -> float[B, P', output_dim]:

    mlp          (Linear, LayerNorm, ReLU) x (n - 1), Linear, LayerNorm; P' = P
    xattn        learned queries, n post-norm cross attentions to the tokens; P' = num_tokens
    xattnffn     the same with a post-norm feed-forward after each attention
    transformer  encoder-decoder, n + n pre-norm layers, 4 heads; P' = num_tokens

Packed attention weights keep the published layout [3D, D] (rows q, k, v).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax.models.diffusion.blocks import LayerNorm, Nothing, linear

MODES = ("mlp", "xattn", "xattnffn", "transformer")


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    mode: str = "mlp"
    input_dim: int = 1152
    hidden_dim: int = 2048
    output_dim: int = 768
    num_tokens: int = 77
    num_layers: int = 2
    num_heads: int = 8
    dtype: str = "float32"

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"projector mode={self.mode!r}, expected one of {MODES}")
        if self.num_layers < 1:
            raise ValueError(f"projector num_layers={self.num_layers}, expected at least 1")

    @classmethod
    def from_dict(cls, fields: dict, dtype: str = "float32"):
        own = {f.name for f in dataclasses.fields(cls)} - {"dtype"}
        if odd := sorted(set(fields) - own):
            raise ValueError(f"projector config: unknown fields {odd}, known: {sorted(own)}")
        return cls(**fields, dtype=dtype)


def pad_context(context, length: int = 77):
    """Appends zero tokens up to `length`; a longer context stays as it is."""
    missing = max(length - context.shape[1], 0)
    return jnp.pad(context, ((0, 0), (0, missing), (0, 0)))


class PackedAttention(nnx.Module):
    """Multi-head attention, one packed input projection. query: [B, L, D]; source: [B, S, D]."""

    def __init__(self, width, heads, dtype, rngs):
        self.heads, self.dtype = heads, dtype
        init = nnx.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        self.in_proj_weight = nnx.Param(init(rngs.params(), (3 * width, width)))
        self.in_proj_bias = nnx.Param(jnp.zeros((3 * width,)))
        self.out_proj = linear(width, width, rngs, dtype)

    def __call__(self, query, source):
        weights = jnp.split(self.in_proj_weight[...].astype(self.dtype), 3)
        biases = jnp.split(self.in_proj_bias[...].astype(self.dtype), 3)
        inputs = (query, source, source)
        parts = (x @ w.T + b for x, w, b in zip(inputs, weights, biases, strict=True))
        q, k, v = (x.reshape(*x.shape[:2], self.heads, -1) for x in parts)
        out = jax.nn.dot_product_attention(q, k, v, implementation="xla")
        return self.out_proj(out.reshape(query.shape))


class MLPProjector(nnx.Module):
    def __init__(self, cfg: ProjectorConfig, rngs):
        widths = [cfg.input_dim] + [cfg.hidden_dim] * (cfg.num_layers - 1) + [cfg.output_dim]
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.layers = nnx.List([linear(i, o, rngs, cfg.dtype) for i, o in pairs])
        self.norms = nnx.List([LayerNorm(o, rngs, cfg.dtype) for _, o in pairs])

    def __call__(self, x):
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = norm(layer(x))
            x = nnx.relu(x) if i + 1 < len(self.layers) else x
        return x


class CrossAttentionLayer(nnx.Module):
    """Post-norm cross attention, and with `ffn` a post-norm feed-forward."""

    def __init__(self, cfg: ProjectorConfig, rngs):
        width, dtype = cfg.output_dim, cfg.dtype
        self.cross_attn = PackedAttention(width, cfg.num_heads, dtype, rngs)
        self.norm1 = LayerNorm(width, rngs, dtype)
        if cfg.mode == "xattnffn":
            up, down = linear(width, 4 * width, rngs, dtype), linear(4 * width, width, rngs, dtype)
            self.ffn = nnx.List([up, Nothing(), down])
            self.norm2 = LayerNorm(width, rngs, dtype)

    def __call__(self, q, kv):
        q = self.norm1(q + self.cross_attn(q, kv))
        if hasattr(self, "ffn"):
            q = self.norm2(q + self.ffn[2](nnx.relu(self.ffn[0](q))))
        return q


class CrossAttentionProjector(nnx.Module):
    def __init__(self, cfg: ProjectorConfig, rngs):
        shape = (1, cfg.num_tokens, cfg.output_dim)
        self.token_embeddings = nnx.Param(jax.random.normal(rngs.params(), shape))
        self.proj = linear(cfg.input_dim, cfg.output_dim, rngs, cfg.dtype)
        self.input_norm = LayerNorm(cfg.output_dim, rngs, cfg.dtype)
        layers = [CrossAttentionLayer(cfg, rngs) for _ in range(cfg.num_layers)]
        self.cross_attn_layers = nnx.List(layers)

    def __call__(self, x):
        kv = self.input_norm(self.proj(x))
        q = jnp.broadcast_to(self.token_embeddings[...], (len(x), *self.token_embeddings.shape[1:]))
        q = q.astype(kv.dtype)
        for layer in self.cross_attn_layers:
            q = layer(q, kv)
        return q


class TransformerLayer(nnx.Module):
    """Pre-norm layer; a decoder layer also attends to the encoder's output."""

    def __init__(self, width, heads, dtype, rngs, *, decoder: bool):
        self.self_attn = PackedAttention(width, heads, dtype, rngs)
        self.norm1 = LayerNorm(width, rngs, dtype)
        if decoder:
            self.multihead_attn = PackedAttention(width, heads, dtype, rngs)
            self.norm3 = LayerNorm(width, rngs, dtype)
        self.norm2 = LayerNorm(width, rngs, dtype)
        self.linear1 = linear(width, 4 * width, rngs, dtype)
        self.linear2 = linear(4 * width, width, rngs, dtype)

    def __call__(self, x, memory=None):
        y = self.norm1(x)
        x = x + self.self_attn(y, y)
        if memory is not None:
            x = x + self.multihead_attn(self.norm2(x), memory)
        y = (self.norm2 if memory is None else self.norm3)(x)
        return x + self.linear2(nnx.relu(self.linear1(y)))


class TransformerStack(nnx.Module):
    def __init__(self, cfg: ProjectorConfig, rngs, *, decoder: bool):
        self.layers = nnx.List([
            TransformerLayer(cfg.hidden_dim, 4, cfg.dtype, rngs, decoder=decoder)
            for _ in range(cfg.num_layers)
        ])  # fmt: skip
        self.norm = LayerNorm(cfg.hidden_dim, rngs, cfg.dtype)

    def __call__(self, x, memory=None):
        for layer in self.layers:
            x = layer(x, memory)
        return self.norm(x)


class EncoderDecoder(nnx.Module):
    def __init__(self, cfg: ProjectorConfig, rngs):
        self.encoder = TransformerStack(cfg, rngs, decoder=False)
        self.decoder = TransformerStack(cfg, rngs, decoder=True)

    def __call__(self, source, queries):
        return self.decoder(queries, self.encoder(source))


class TransformerProjector(nnx.Module):
    def __init__(self, cfg: ProjectorConfig, rngs):
        self.fc = linear(cfg.input_dim, cfg.hidden_dim, rngs, cfg.dtype)
        self.tfm = EncoderDecoder(cfg, rngs)
        self.model = linear(cfg.hidden_dim, cfg.output_dim, rngs, cfg.dtype)
        shape = (1, cfg.num_tokens, cfg.hidden_dim)
        self.query_embs = nnx.Param(jax.random.normal(rngs.params(), shape))

    def __call__(self, x):
        x = self.fc(x)
        q = jnp.broadcast_to(self.query_embs[...], (len(x), *self.query_embs.shape[1:]))
        return self.model(self.tfm(x, q.astype(x.dtype)))


def make_projector(cfg: ProjectorConfig, rngs: nnx.Rngs) -> nnx.Module:
    """The module of `cfg.mode`: float[B, P, input_dim] -> float[B, P', output_dim]."""
    kinds = {"mlp": MLPProjector, "transformer": TransformerProjector}
    return kinds.get(cfg.mode, CrossAttentionProjector)(cfg, rngs)

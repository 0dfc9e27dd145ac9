"""CLIP's text tower as Stable Diffusion uses it (`CLIPTextModel`): causal, pre-norm.

Learning Transferable Visual Models From Natural Language Supervision (Radford et al. 2021).
The pipelines give no padding mask, so padding is attended like any other id; with a mask it is
hidden (MiniGPT-5's caption loss). Stable Diffusion 1.5 reads the last hidden state; 2.1 the
penultimate one after the final norm (its published tower lacks the last layer, so the last state is
the right one there, too).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from metamorph_jax.config import check_numbers
from metamorph_jax.models.diffusion import blocks
from metamorph_jax.models.diffusion.blocks import LayerNorm, linear

_ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}

_ACCEPTED = {
    "model_type": ("clip_text_model",), "architectures": (["CLIPTextModel"],),
    "attention_dropout": (0.0,), "dropout": (0.0,), "bos_token_id": range(1 << 31),
    "pad_token_id": range(1 << 31), "torch_dtype": (None, "float16", "float32", "bfloat16"),
    "dtype": (None, "float16", "float32", "bfloat16"), "initializer_factor": (1, 1.0),
    "initializer_range": (0.02,), "projection_dim": range(1 << 31),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    eos_token_id: int = 2
    dtype: str = "float32"

    def __post_init__(self):
        check_numbers(
            self,
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
            " max_position_embeddings",
            "layer_norm_eps",
        )
        if self.hidden_act not in _ACTIVATIONS:
            known = f"expected one of {sorted(_ACTIVATIONS)}"
            raise ValueError(f"CLIPTextModel config: hidden_act={self.hidden_act!r}, {known}")
        if type(self.eos_token_id) is not int or self.eos_token_id < 0:
            raise ValueError(
                f"CLIPTextModel config: eos_token_id={self.eos_token_id!r} is not a token's id"
            )

    @classmethod
    def tiny(cls, **kw):
        size = dict(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=16,
        )  # fmt: skip
        return cls(**(size | kw))

    @classmethod
    def sd15(cls, **kw):
        return cls(**kw)

    @classmethod
    def sd21(cls, **kw):
        size = dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
            hidden_act="gelu",
        )  # fmt: skip
        return cls(**(size | kw))

    @classmethod
    def from_dict(cls, fields: dict, dtype: str = "float32"):
        """Reads the library's config.json; anything that is not implemented is an error."""
        own = {f.name for f in dataclasses.fields(cls)} - {"dtype"}
        free = {"transformers_version", "pad_token_id", "bos_token_id"}
        blocks.require("CLIPTextModel", fields, _ACCEPTED, own | free)
        return cls(**{k: v for k, v in fields.items() if k in own}, dtype=dtype)


class CLIPAttention(nnx.Module):
    def __init__(self, cfg: CLIPTextConfig, rngs):
        width = cfg.hidden_size
        self.heads = cfg.num_attention_heads
        self.q_proj = linear(width, width, rngs, cfg.dtype)
        self.k_proj = linear(width, width, rngs, cfg.dtype)
        self.v_proj = linear(width, width, rngs, cfg.dtype)
        self.out_proj = linear(width, width, rngs, cfg.dtype)

    def __call__(self, x, mask=None):
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in parts)
        seen = None if mask is None else mask[:, None, None]
        out = jax.nn.dot_product_attention(q, k, v, mask=seen, is_causal=True, implementation="xla")
        return self.out_proj(out.reshape(x.shape))


class CLIPMLP(nnx.Module):
    def __init__(self, cfg: CLIPTextConfig, rngs):
        self.act = cfg.hidden_act
        self.fc1 = linear(cfg.hidden_size, cfg.intermediate_size, rngs, cfg.dtype)
        self.fc2 = linear(cfg.intermediate_size, cfg.hidden_size, rngs, cfg.dtype)

    def __call__(self, x):
        return self.fc2(_ACTIVATIONS[self.act](self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
    def __init__(self, cfg: CLIPTextConfig, rngs):
        self.layer_norm1 = LayerNorm(cfg.hidden_size, rngs, cfg.dtype, cfg.layer_norm_eps)
        self.self_attn = CLIPAttention(cfg, rngs)
        self.layer_norm2 = LayerNorm(cfg.hidden_size, rngs, cfg.dtype, cfg.layer_norm_eps)
        self.mlp = CLIPMLP(cfg, rngs)

    def __call__(self, x, mask=None):
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbeddings(nnx.Module):
    def __init__(self, cfg: CLIPTextConfig, rngs):
        self.token_embedding = nnx.Embed(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.position_embedding = nnx.Embed(cfg.max_position_embeddings, cfg.hidden_size, rngs=rngs)

    def __call__(self, ids):
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class CLIPEncoder(nnx.Module):
    def __init__(self, cfg: CLIPTextConfig, rngs):
        layers = [CLIPEncoderLayer(cfg, rngs) for _ in range(cfg.num_hidden_layers)]
        self.layers = nnx.List(layers)


class CLIPTextTransformer(nnx.Module):
    def __init__(self, cfg: CLIPTextConfig, rngs):
        self.embeddings = CLIPEmbeddings(cfg, rngs)
        self.encoder = CLIPEncoder(cfg, rngs)
        self.final_layer_norm = LayerNorm(cfg.hidden_size, rngs, cfg.dtype, cfg.layer_norm_eps)


@dataclasses.dataclass(frozen=True)
class CLIPTextOutput:
    """last: after the final norm; hidden: before it, embeddings first; pooled: float[B, D]."""

    last: jnp.ndarray
    pooled: jnp.ndarray
    hidden: tuple
    penultimate: jnp.ndarray


def end_id(cfg: CLIPTextConfig) -> int:
    """The id that ends a text. Old published configs say 2, although it is the largest."""
    return cfg.vocab_size - 1 if cfg.eos_token_id == 2 else cfg.eos_token_id


def not_padding(ids, cfg: CLIPTextConfig):
    """bool[B, L] of ids int[B, L]: those up to the first that ends the text, which is seen, too."""
    ends = ids == end_id(cfg)
    return jnp.cumsum(ends, axis=1) - ends == 0


def without_text(ids, cfg: CLIPTextConfig, pad: int = 0):
    """int[B, L]: the ids of the empty text, padded with `pad`, of ids that begin with the start
    id."""
    at = jnp.arange(ids.shape[1])
    return jnp.where(at == 0, ids, jnp.where(at == 1, end_id(cfg), pad))


class CLIPTextModel(nnx.Module):
    def __init__(self, cfg: CLIPTextConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.text_model = CLIPTextTransformer(cfg, rngs)

    def __call__(self, ids, mask=None) -> CLIPTextOutput:
        """ids: int[B, L]; mask: bool[B, L] which of them are seen, or None for all."""
        cfg, model = self.cfg, self.text_model
        x = model.embeddings(ids).astype(cfg.dtype)
        hidden = [x]
        for layer in model.encoder.layers:
            hidden.append(layer(hidden[-1], mask))
        last = model.final_layer_norm(hidden[-1])
        end = (ids == end_id(cfg)).astype(jnp.int32)
        pooled = jnp.take_along_axis(last, jnp.argmax(end, axis=-1)[:, None, None], axis=1)[:, 0]
        return CLIPTextOutput(last, pooled, tuple(hidden), model.final_layer_norm(hidden[-2]))

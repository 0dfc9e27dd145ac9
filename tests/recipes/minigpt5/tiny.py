"""A MiniGPT-5 model that compiles in seconds, and a batch for it."""

import jax
import numpy as np
from flax import nnx

from metamorph_jax.models import build
from metamorph_jax.models.connectors.perceiver import PerceiverConfig
from metamorph_jax.models.connectors.qformer import QFormerConfig
from metamorph_jax.models.diffusion.clip_text import CLIPTextConfig
from metamorph_jax.models.diffusion.decoder import DiffusionConfig
from metamorph_jax.models.diffusion.samplers import SamplingConfig
from metamorph_jax.models.diffusion.unet import UNetConfig
from metamorph_jax.models.heads.mapper import MapperConfig
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.recipes import minigpt5 as recipe
from metamorph_jax.types import Batch, Drawings, Images

SIDE, P, I, J, L = 32, 4, 2, 3, 40
VOKENS = 3
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TINY = recipe.Config(
    llm="tiny",
    llm_options={"tied": False},
    vision=VisionConfig("eva-tiny", tokens=17, normalize=False),
    qformer=QFormerConfig(
        PerceiverConfig(queries=P, width=16, heads=2, layers=2, mlp_width=16, key_width=32,
                        qk_norm=False)
    ),
    mapper=MapperConfig(width=64, vokens=VOKENS, inner=16, heads=2, encoder_layers=1,
                        decoder_layers=1, mlp_width=16, queries=6),
    decoder=DiffusionConfig(
        UNetConfig.tiny(in_channels=3, out_channels=3, block_out_channels=(8, 16),
                        num_heads=(2, 2), norm_num_groups=4, cross_attention_dim=16),
        vae=None, min_snr=5.0,
    ),
    text_encoder=CLIPTextConfig.tiny(hidden_size=16, max_position_embeddings=6, eos_token_id=63),
    sampling=SamplingConfig("pndm", 2, 2.0),
    unsupervised_tail=1,
    drop_condition=0.5,
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


def caption(*ids: int) -> list[int]:
    """Between start and end id, padded with 0."""
    found = [62, *ids, 63]
    return found + [0] * (6 - len(found))


def make_batch(cfg=TINY, seed=0) -> Batch:
    """Two rows. The first has two samples, of which the first reads an image and draws one, the
    second draws two; the second row has one sample, without images to draw.

    Of the three drawings, the first and the last have a caption.
    """
    rng, vokens = np.random.default_rng(seed), recipe.voken_ids(cfg)
    tokens = rng.integers(10, 300, (2, L)).astype(np.int32)
    slots, targets = np.full((2, L), -1, np.int32), np.full((2, L), -1, np.int32)
    slots[0, 2 : 2 + P] = np.arange(P)
    slots[1, 4 : 4 + P] = np.arange(P) + P
    columns = (9, 19, 27)
    for first in columns:
        tokens[0, first : first + VOKENS] = vokens
        targets[0, first - 1], targets[0, first + 1] = vokens[0], vokens[-1]
    targets[1, 10:14] = tokens[1, 11:15]
    segments = np.ones((2, L), np.int32)
    segments[0, 15:] = 2
    segments[:, L - 4 :] = 0
    positions = np.tile(np.arange(L, dtype=np.int32), (2, 1))
    positions[0, 15:] -= 15
    start = np.array([[c - 1 for c in columns], [0, 0, 0]], np.int32)
    valid = np.array([[True] * 3, [False] * 3])
    captions = np.full((2, J, 6), 0, np.int32)
    captions[0] = [caption(7, 8), [-1] * 6, caption(9)]
    side = cfg.decoder.image_side
    pixels = lambda *shape: rng.integers(0, 256, (*shape, 3), dtype=np.uint8)  # noqa: E731
    return Batch(
        tokens=tokens, positions=positions, segments=segments, text_targets=targets,
        image_slots=slots, visual_targets=np.full((2, L), -1, np.int32),
        sources=(segments > 1).astype(np.int32),
        images=Images(np.array([[True, False], [True, True]]), np.zeros((2, I), np.int32),
                      pixels(2, I, SIDE, SIDE)),
        drawings=Drawings(valid, start, pixels(2, J, side, side), captions=captions),
        source_names=("one", "two"),
    )  # fmt: skip

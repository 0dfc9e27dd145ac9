"""A MetaMorph model that compiles in a second, and a batch for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax.models import build
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.recipes import metamorph as recipe
from metamorph_jax.sharding import make_mesh
from metamorph_jax.types import Batch, Images

TINY = recipe.Config(llm="tiny", vision=VisionConfig("siglip-tiny", tokens=4), text_chunk=16)
L, I, P = 14, 2, 4
# Compiling is what these tests spend their time on.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def fast(f):
    return jax.jit(f, compiler_options=FAST)


def change(cfg, vision=None, **changes):
    """The config with other values; `vision` has those of its VisionConfig."""
    changed = dataclasses.replace(cfg.vision, **(vision or {}))
    return dataclasses.replace(cfg, vision=changed, **changes)


def make(cfg=TINY, seed=0):
    mesh = make_mesh(devices=jax.devices()[:1])
    return build.build(lambda rngs: recipe.create(cfg, rngs), mesh, seed)


def sums_of(model, batch):
    """`loss_sums`, compiled."""
    graph, state = nnx.split(model)
    return fast(lambda state, batch: nnx.merge(graph, state).loss_sums(batch))(state, batch)


def make_batch(cfg=TINY, answers=True, text=True, seed=0) -> Batch:
    """Two rows: words, a context picture, words, an answer picture."""
    r = np.random.default_rng(seed)
    slots = np.full((2, L), -1, np.int32)
    slots[:, 2:6], slots[:, 8:12] = range(4), range(4, 8)
    visual_targets = np.full((2, L), -1, np.int32)
    text_targets = r.integers(0, 322, (2, L)).astype(np.int32)
    text_targets[:, :7], text_targets[:, 8:12] = -1, -1
    if answers:
        visual_targets[:, 7:11] = range(4, 8)
    if not text:
        text_targets[:] = -1
    return Batch(
        tokens=r.integers(0, 322, (2, L)).astype(np.int32),
        positions=np.tile(np.arange(L, dtype=np.int32), (2, 1)),
        segments=np.ones((2, L), np.int32),
        text_targets=text_targets,
        image_slots=slots,
        visual_targets=visual_targets,
        sources=np.array([[0], [1]], np.int32).repeat(L, 1),
        images=Images(
            valid=np.ones((2, I), bool),
            start=np.tile(np.int32([2, 8]), (2, 1)),
            pixels=r.integers(0, 256, (2, I, 32, 32, 3)).astype(np.uint8),
        ),
        source_names=("a", "b"),
    )


def grads(model, batch, filter_=nnx.Param):
    graph, trained, rest = nnx.split(model, filter_, ...)

    def total(trained):
        model = nnx.merge(graph, trained, rest)
        sums, metrics = model.loss_sums(batch, jax.random.key(0))
        counts = model.loss_counts(batch)
        loss = sum(model.loss_weights[k] * s / jnp.maximum(counts[k], 1) for k, s in sums.items())
        return loss, metrics

    (loss, metrics), found = fast(jax.value_and_grad(total, has_aux=True))(trained)
    flat = {".".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(found)}
    return float(loss), metrics, flat

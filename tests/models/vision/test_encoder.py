"""The way from images to visual tokens, and the name of the caches of these."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.models.vision import reduce
from metamorph_jax.models.vision.encoder import VisionConfig, VisionEncoder

TINY = VisionConfig("siglip-tiny", tokens=4)
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)


def test_it_is_tower_reduction_and_normalisation():
    encoder = VisionEncoder(TINY, rngs=nnx.Rngs(0))
    found = encoder(jnp.asarray(PIXELS))
    assert found.shape == (2, *encoder.feature_shape) == (2, 4, 32)
    assert found.dtype == jnp.float32
    x = encoder.tower(jnp.asarray(PIXELS))
    half = x.reshape(2, 2, 2, 2, 2, -1) if x.shape[1] == 16 else None
    assert half is not None  # a grid of 4 x 4, of which each 2 x 2 makes one visual token
    cells = half.mean((2, 4)).reshape(2, 4, -1)
    expected = cells / np.linalg.norm(cells, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [dict(normalize=False), dict(softmax=True), dict(reduction="mlpmixer", tokens=5),
     dict(reduction="concat_interpolation"), dict(tokens=-1), dict(tower="dinov2-tiny")],
    ids=str,
)  # fmt: skip
def test_shapes_follow_from_the_config(options):
    encoder = VisionEncoder(dataclasses.replace(TINY, **options), rngs=nnx.Rngs(0))
    found = encoder(jnp.asarray(PIXELS))
    assert found.shape == (2, *encoder.feature_shape)
    np.testing.assert_array_equal(encoder.normalize(found).shape, found.shape)


def test_zero_tokens_take_a_side_at_every_call():
    encoder = VisionEncoder(dataclasses.replace(TINY, tokens=0), rngs=nnx.Rngs(0))
    assert encoder(jnp.asarray(PIXELS), 3).shape == (2, 9, 32)
    with pytest.raises(ValueError, match="side"):
        encoder(jnp.asarray(PIXELS))


def test_gradients_reach_the_reducer_and_only_a_trained_tower():
    cfg = dataclasses.replace(TINY, reduction="mlpmixer", tokens=5)
    encoder = VisionEncoder(cfg, rngs=nnx.Rngs(0))
    for train in (False, True):
        grads = nnx.grad(lambda m, t=train: m(jnp.asarray(PIXELS), train_tower=t).sum())(encoder)
        moved = {path[0] for path, g in nnx.to_flat_state(grads) if np.any(np.asarray(g[...]))}
        assert moved == ({"tower", "reducer"} if train else {"reducer"})


def test_without_a_tower_features_are_normalised_only():
    encoder = VisionEncoder(VisionConfig("none", feature_width=6, tokens=4), rngs=nnx.Rngs(0))
    assert encoder.feature_shape == (4, 6)
    assert not jax.tree.leaves(nnx.state(encoder))
    with pytest.raises(ValueError, match="no tower"):
        encoder(jnp.asarray(PIXELS))


@pytest.mark.parametrize(
    ("options", "words"),
    [(dict(tower="vit"), "tower 'vit' is none of none, "), (dict(tower="none"), "feature_width"),
     (dict(tower_options={"depth": 3}), "depth"), (dict(reduction="nearest"), "nearest")],
    ids=str,
)  # fmt: skip
def test_a_config_that_makes_no_sense(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        VisionEncoder(dataclasses.replace(TINY, **options), rngs=nnx.Rngs(0))


CHANGED = dict(
    tower="clip-tiny", tower_options={"select_layer": -2}, weights="pkg:other", tokens=16,
    reduction="area", normalize=False, softmax=True, dtype="bfloat16",
)  # fmt: skip


@pytest.mark.parametrize("field", CHANGED)
def test_a_cache_of_other_features_has_another_name(field):
    assert dataclasses.replace(TINY, **{field: CHANGED[field]}).identity != TINY.identity


def test_every_field_is_either_part_of_the_name_or_changes_nothing():
    # feature_width only counts without a tower, and then no cache is made.
    same = {"remat": True, "feature_width": 7}
    assert set(CHANGED) | set(same) == {f.name for f in dataclasses.fields(VisionConfig)}
    assert dataclasses.replace(TINY, **same).identity == TINY.identity
    assert set(reduce.KINDS) >= {TINY.reduction, CHANGED["reduction"]}


def test_the_class_token_may_come_out():
    """In front of the patches, and with a feature cache of its own."""
    options = {"class_out": True}
    with_class = VisionConfig("clip-tiny", options, tokens=17, normalize=False)
    without = VisionConfig("clip-tiny", tokens=16, normalize=False)
    encoder = VisionEncoder(with_class, rngs=nnx.Rngs(0))
    found = encoder(jnp.asarray(PIXELS))
    other = VisionEncoder(without, rngs=nnx.Rngs(0))(jnp.asarray(PIXELS))
    np.testing.assert_array_equal(found[:, 1:], other)
    assert "class_out" in with_class.identity and "class_out" not in without.identity
    for tower in ("siglip-tiny", "dinov2-b14-registers"):
        with pytest.raises(ValueError, match="class_out needs a class token"):
            VisionConfig(tower, options)

"""Token reductions against direct definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.models.vision import reduce


def reducer(tokens, kind="interpolation", tokens_in=64, width=3):
    cfg = reduce.ReduceConfig(tokens, kind, tokens_in, width)
    return reduce.TokenReducer(cfg, rngs=nnx.Rngs(0))


def features(tokens=64, width=3, n=2):
    return np.random.default_rng(0).normal(size=(n, tokens, width)).astype(np.float32)


@pytest.mark.parametrize("side_in, side_out", [(27, 8), (8, 4), (7, 5), (4, 8), (16, 1)])
def test_interpolation_equals_jax_image_without_antialias(side_in, side_out):
    x = features(side_in**2)
    ours = reducer(side_out**2, tokens_in=side_in**2)(x)
    grid = jax.image.resize(
        x.reshape(2, side_in, side_in, 3), (2, side_out, side_out, 3), "bilinear", antialias=False
    )
    np.testing.assert_allclose(ours, grid.reshape(2, -1, 3), atol=2e-6)


def test_halving_is_the_mean_of_cells():
    x = features()
    cells = x.reshape(2, 4, 2, 4, 2, 3).mean((2, 4)).reshape(2, 16, 3)
    np.testing.assert_allclose(reducer(16)(x), cells, atol=1e-6)
    np.testing.assert_allclose(reducer(16, "area")(x), cells, atol=1e-6)
    np.testing.assert_allclose(reducer(4, "area")(x)[:, 0], x.reshape(2, 2, 4, 2, 4, 3)[:, 0, :, 0]
                               .mean((1, 2)), atol=1e-6)  # fmt: skip


def test_nothing_happens_at_the_same_number_of_tokens():
    x = features()
    assert reducer(64)(x) is x


def test_concat_joins_blocks_on_channels():
    x = features()
    made = reducer(16, "concat_interpolation")
    assert made.cfg.width_out == 12
    grid = x.reshape(2, 8, 8, 3)  # twice the side of 4: no resizing
    expected = np.concatenate(
        [grid[:, 0::2, 0::2], grid[:, 0::2, 1::2], grid[:, 1::2, 0::2], grid[:, 1::2, 1::2]], -1
    )
    np.testing.assert_allclose(made(x), expected.reshape(2, 16, 12), atol=1e-6)


def test_mlpmixer_mixes_tokens_then_channels():
    x, made = features(), reducer(10, "mlpmixer")
    y = np.einsum("ntc,tp->npc", x, made.token_mixing.kernel[...])
    y = y @ np.asarray(made.channel_mixing.kernel[...])
    np.testing.assert_allclose(made(x), y, atol=1e-5)


def test_parity_options_of_the_reference():
    x = features(width=3)
    assert not np.any(reducer(-1)(x)) and reducer(-1)(x).shape == x.shape
    assert reducer(0)(x, side=5).shape == (2, 25, 3)
    with pytest.raises(ValueError, match="the side"):
        reducer(0)(x)
    drawn = {reduce.draw_side(np.random.default_rng(i)) for i in range(300)}
    assert min(drawn) == 1 and max(drawn) == 24


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="nearest"):
        reducer(16, "nearest")
    with pytest.raises(ValueError, match="square"):
        reducer(15)
    with pytest.raises(ValueError, match="8 doesn't divide into 3"):
        reducer(9, "area")(features())


def test_normalisations():
    x = features()
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(reduce.normalize_features(x), unit, atol=1e-6)
    np.testing.assert_allclose(
        reduce.normalize_features(x, softmax=True), jax.nn.softmax(unit / 0.07), atol=1e-6
    )
    np.testing.assert_array_equal(reduce.normalize_features(x, normalize=False), x)
    zero = jnp.zeros((1, 1, 4))
    assert np.isfinite(jax.grad(lambda z: reduce.normalize_features(z).sum())(zero)).all()

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.models.diffusion import dit
from metamorph_jax.models.diffusion import schedule as sch
from metamorph_jax.models.diffusion.dit import DiT, DiTConfig
from metamorph_jax.types import Conditioning

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TINY = DiTConfig.tiny(patch=2, sample_size=8, num_context=4)


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("local", [False, True])
def test_shape_and_that_context_and_time_matter_after_a_step(grid, local):
    model = DiT(dataclasses.replace(TINY, grid_context=grid, local=local), nnx.Rngs(0))
    graph, _ = nnx.split(model)
    jitted = jax.jit(lambda state, *args: nnx.merge(graph, state)(*args), compiler_options=FAST)

    def run(x, t, context):
        return jitted(nnx.state(model), x, t, Conditioning(context))

    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    context = jax.random.normal(jax.random.key(2), (2, 4, 32))
    assert run(x, 10, context).shape == x.shape
    # The output layer starts at zero: give it weights, so that something comes through.
    model.out.kernel[...] = jnp.ones_like(model.out.kernel[...])
    y = run(x, 10, context)
    assert not np.allclose(y, run(x, 10, context[::-1]))
    for block in model.blocks:
        block.modulation.kernel[...] = jnp.full_like(block.modulation.kernel[...], 0.01)
    assert not np.allclose(run(x, 10, context), run(x, 900, context))


@pytest.mark.parametrize("h,w", [(1, 1), (1, 4), (3, 5)])
def test_depthwise_is_a_convolution(h, w):
    """Values and both gradients, against XLA's convolution."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, wanted = (jax.random.normal(key, (2, h, w, 6)) for key in keys[:2])
    kernel = jax.random.normal(keys[2], (9, 6))

    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel.reshape(3, 3, 1, 6), (1, 1), "SAME", feature_group_count=6,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    def everything(f):
        return jax.vjp(f, x, kernel)[0], *jax.vjp(f, x, kernel)[1](wanted)

    for a, b in zip(everything(dit.depthwise), everything(convolution), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_neighbours_of_a_position():
    x = np.arange(12.0).reshape(1, 3, 4, 1)
    got = np.asarray(dit.with_neighbours(jnp.asarray(x)))
    assert got[0, 1, 1].tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert got[0, 0, 3].tolist() == [0, 0, 0, 2, 3, 0, 6, 7, 0]
    two = dit.with_neighbours(jnp.asarray(np.concatenate([x, 100 + x], axis=-1)))
    assert two[0, 0, 0].tolist() == [0] * 8 + [0, 100, 1, 101] + [0, 0, 4, 104, 5, 105]


def test_a_grid_that_does_not_tile_is_refused():
    with pytest.raises(ValueError, match="num_context 9 is not a square"):
        dataclasses.replace(TINY, grid_context=True, num_context=9)


@pytest.mark.parametrize("shift", [0.125, 2.0])
def test_shifted_noise_levels_have_the_shifted_ratio(shift):
    plain = sch.Schedule(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    moved = dataclasses.replace(plain, snr_shift=shift)
    t = jnp.arange(0, 1000, 50)
    np.testing.assert_allclose(sch.snr(moved, t), shift**2 * sch.snr(plain, t), rtol=1e-3)


def test_velocity_weight_is_capped_and_wants_x0():
    plain = sch.Schedule(prediction_type="sample")
    t = jnp.array([0, 500, 999])
    weight = sch.velocity_weight(plain, t, 5.0)
    np.testing.assert_allclose(weight, np.minimum(np.asarray(sch.snr(plain, t)) + 1, 5.0))
    with pytest.raises(ValueError, match="x0"):
        sch.velocity_weight(sch.Schedule(), t)

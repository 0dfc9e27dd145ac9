import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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

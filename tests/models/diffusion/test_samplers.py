"""Properties of the samplers; their trajectories are pinned by the golden cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metamorph_jax.models.diffusion import samplers
from metamorph_jax.models.diffusion import schedule as sch
from metamorph_jax.models.diffusion.samplers import (
    DDIM,
    DDPM,
    PNDM,
    DPMSolverPP,
    Euler,
    SamplingConfig,
    make_sampler,
)
from metamorph_jax.models.diffusion.schedule import PREDICTIONS, Schedule

RULES = [
    DDIM(to_one=True), DDIM(spacing="trailing", offset=0, to_one=True), DPMSolverPP(),
    DPMSolverPP(karras=True), DPMSolverPP(spacing="trailing"), Euler(), Euler(spacing="linspace"),
    Euler(karras=True), PNDM(to_one=True), DDPM(), DDPM(spacing="trailing"),
]  # fmt: skip


def perfect(schedule, x0, table):
    """A denoiser that knows x0: predicts what the schedule asks for from x and x0."""

    def predict(x, t):
        a = jnp.interp(t, jnp.arange(1000.0), jnp.asarray(schedule.alphas_cumprod, jnp.float32))
        if schedule.prediction_type == "sample":
            return x0
        noise = (x - jnp.sqrt(a) * x0) / jnp.sqrt(1 - a)
        if schedule.prediction_type == "epsilon":
            return noise
        return jnp.sqrt(a) * noise - jnp.sqrt(1 - a) * x0

    return predict


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_perfect_denoiser_leads_to_x0(rule, prediction):
    s = Schedule(prediction_type=prediction)
    x0 = jnp.linspace(-1, 1, 8).reshape(1, 2, 4, 1)
    noise = jax.random.normal(jax.random.key(0), x0.shape)
    found = rule.integrate(perfect(s, x0, None), noise, s, 12)
    # Fractional and Karras timesteps meet the interpolated level only nearly.
    np.testing.assert_allclose(found, x0, atol=0.05)


@pytest.mark.parametrize("rule", [DDIM(spacing="trailing", offset=0), DPMSolverPP(), Euler(),
                                  DDPM(spacing="trailing")])  # fmt: skip
def test_zero_terminal_snr_is_finite(rule):
    s = Schedule(prediction_type="v_prediction", zero_snr=True)
    noise = jnp.ones((1, 2, 2, 1))
    out = rule.integrate(lambda x, t: -x, noise, s, 5)
    assert np.isfinite(out).all()


def test_pndm_calls_the_network_once_more():
    assert len(PNDM().table(Schedule(), 10).t) == 11
    assert len(PNDM().table(Schedule(), 2).t) == 3
    with pytest.raises(ValueError, match="at least 2"):
        PNDM().table(Schedule(), 1)


def test_one_step_works():
    s = Schedule()
    for rule in (DDIM(), DDPM(), DPMSolverPP(), Euler()):
        x = rule.integrate(lambda x, t: 0.1 * x, jnp.ones((1, 1, 1, 1)), s, 1)
        assert np.isfinite(x).all()


def test_trajectory_ends_in_the_result_and_clip_bounds_it():
    s = Schedule(prediction_type="sample")
    predict = lambda x, t: 9 * jnp.ones_like(x)  # noqa: E731
    noise = jnp.ones((1, 2, 2, 1))
    rule = DDIM(to_one=True)
    x, (states, outputs) = rule.integrate(
        predict, noise, s, 4, clip=(-1.0, 1.0), return_trajectory=True
    )
    assert states.shape[0] == 5 and outputs.shape[0] == 4
    np.testing.assert_array_equal(states[-1], x)
    np.testing.assert_allclose(x, 1.0, atol=1e-6)


def test_names_of_samplers():
    """A decoder of pixels or with a zero terminal SNR starts at the very last timestep."""
    assert make_sampler("auto", False) == DPMSolverPP()
    assert make_sampler("auto", True) == DDIM(spacing="trailing", to_one=True)
    for name in samplers.SAMPLERS:
        t = make_sampler(name, True).table(Schedule(), 4).t
        assert t[0] == 999, name
        assert make_sampler(name, False) == samplers.SAMPLERS[name]()
    with pytest.raises(ValueError, match="'heun' is none of auto, ddim"):
        SamplingConfig("heun")
    with pytest.raises(ValueError, match="steps"):
        SamplingConfig(steps=0)


def test_spacing_is_checked():
    with pytest.raises(ValueError, match="spacing='even'"):
        DDIM(spacing="even").table(Schedule(), 4)


@pytest.mark.parametrize("clip", [None, (-9.0, 9.0)])
def test_ddpm_takes_the_ancestral_steps(clip):
    s = Schedule()
    rng = np.random.default_rng(0)
    start, *fresh = rng.standard_normal((6, 2, 2, 2, 1)).astype(np.float32)
    predict = lambda x, t: jnp.tanh(x) + t / 1000  # noqa: E731
    noise = jnp.asarray(fresh)
    found = DDPM().integrate(predict, start, s, 5, clip=clip, fresh=lambda i: noise[i])
    x = start
    for i, t in enumerate((801, 601, 401, 201, 1)):
        x = sch.ancestral_step(s, predict(x, t), x, t, t - 200, fresh[i])
    np.testing.assert_allclose(found, x, atol=1e-4)


def test_the_noise_of_a_step_belongs_to_one_image():
    noise = jax.random.normal(jax.random.key(0), (64, 3, 3, 2))
    first, second = (samplers.step_noise(noise, i) for i in range(2))
    np.testing.assert_array_equal(samplers.step_noise(noise[5:7], 1), second[5:7])
    for a, b in ((first, second), (first, noise), (first[1:], first[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.12
    assert abs(first.mean()) < 0.12 and abs(first.std() - 1) < 0.1
    x = DDPM().integrate(lambda x, t: 0.1 * x, noise[:4], Schedule(), 3)
    alone = DDPM().integrate(lambda x, t: 0.1 * x, noise[3:4], Schedule(), 3)
    np.testing.assert_allclose(x[3:], alone, rtol=1e-6)


def test_dpm_beats_euler_on_a_gaussian():
    """Data from N(0, 0.5^2): the exact flow is linear, so the solvers' errors can be compared."""
    s = Schedule()
    a = jnp.asarray(s.alphas_cumprod, jnp.float32)

    def predict(x, t):
        level = jnp.interp(t, jnp.arange(1000.0), a)
        return x * jnp.sqrt(1 - level) / (level * 0.25 + 1 - level)

    noise = jnp.ones((1, 1, 1, 1))

    def ends(rule, steps):
        return float(rule.integrate(predict, noise, s, steps)[0, 0, 0, 0])

    exact = ends(DPMSolverPP(), 400)
    assert abs(ends(DPMSolverPP(), 16) - exact) < abs(ends(DDIM(to_one=True), 16) - exact)


def test_add_noise_then_one_perfect_ddim_step_reaches_the_next_level():
    s = Schedule()
    rng = np.random.default_rng(0)
    x0, noise = (rng.standard_normal((1, 2, 2, 1)).astype(np.float32) for _ in range(2))
    table = DDIM().table(s, 10)
    row = {k: v[3] for k, v in table.rows().items()}
    t, following = (jnp.array([int(v)]) for v in (table.t[3], table.t[3] - 100))
    x = sch.add_noise(s, x0, noise, t)
    new, _ = samplers.step(row, lambda x, t: noise, {"x": x})
    np.testing.assert_allclose(new["x"], sch.add_noise(s, x0, noise, following), atol=1e-5)


@pytest.mark.parametrize("steps", [0, -1, 1000, 1001, 2000])
@pytest.mark.parametrize("rule", [DDIM(), DDPM(), DPMSolverPP(), DPMSolverPP("trailing"), Euler(),
                                  PNDM()], ids=repr)  # fmt: skip
def test_more_steps_than_a_schedule_has_are_an_error(rule, steps):
    """They used to draw noise or black, from timesteps that fall together or lie outside."""
    s = Schedule()
    if (rule, steps) != (DPMSolverPP("trailing"), 1000):  # which takes each timestep once
        with pytest.raises(ValueError, match=rf"{steps} steps"):
            rule.integrate(lambda x, t: x, jnp.zeros((1, 2, 2, 1)), s, steps)
    for fine in (2, 50, 998):
        assert rule.checked_table(s, fine).fits(1000)

"""The noising process: golden arrays of golden/metamorph, and its algebra."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metamorph_jax.models.diffusion import schedule as sch
from metamorph_jax.models.diffusion.schedule import PREDICTIONS, Schedule


@pytest.mark.golden
def test_noise_schedule(golden_root):
    data = np.load(golden_root / "metamorph" / "noise_schedule.npz")
    meta = json.loads((golden_root / "metamorph" / "meta.json").read_text())
    words = r"(\S+) betas (\S+)\.\.(\S+), (\d+) steps"
    kind, start, end, steps = re.match(words, meta["arrays"]["noise_schedule.npz"]["desc"]).groups()
    s = Schedule(int(steps), float(start), float(end), kind.replace("-", "_"))
    read = {"latents", "noise", "timesteps", "noisy", "alphas_cumprod"}
    assert set(data.files) == read
    np.testing.assert_allclose(s.alphas_cumprod, data["alphas_cumprod"], rtol=1e-5)
    noisy = sch.add_noise(s, data["latents"], data["noise"], data["timesteps"])
    np.testing.assert_allclose(noisy, data["noisy"], rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 999),
    st.sampled_from(PREDICTIONS),
    st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
)
def test_a_perfect_prediction_gives_x0_back(t, prediction, betas):
    s = Schedule(prediction_type=prediction, beta_schedule=betas)
    rng = np.random.default_rng(t)
    x0, noise = (rng.standard_normal((1, 4)).astype(np.float32) for _ in range(2))
    t = jnp.array([t])
    x = sch.add_noise(s, x0, noise, t)
    found = sch.predict_x0(s, sch.target(s, x0, noise, t), x, t)
    # Noise prediction divides by sqrt(a), which amplifies rounding at late steps.
    scale = 1 / float(np.sqrt(s.alphas_cumprod[t[0]])) if prediction == "epsilon" else 1.0
    np.testing.assert_allclose(found, x0, atol=2e-6 * scale + 1e-6)


def test_zero_snr_ends_in_pure_noise_and_starts_as_before():
    s = Schedule(prediction_type="v_prediction", zero_snr=True)
    assert abs(s.alphas_cumprod[-1]) < 1e-12
    np.testing.assert_allclose(s.alphas_cumprod[0], Schedule().alphas_cumprod[0])
    assert np.isfinite(sch.min_snr_weight(s, jnp.arange(1000))).all()


@pytest.mark.parametrize(
    "kw, word",
    [
        ({"prediction_type": "v"}, "prediction_type"),
        ({"beta_schedule": "cosine"}, "beta_schedule"),
        ({"zero_snr": True}, "zero_snr"),
    ],
)
def test_errors_name_the_field(kw, word):
    with pytest.raises(ValueError, match=word):
        Schedule(**kw)


def test_the_last_ancestral_step_is_without_noise():
    s = Schedule()
    x0, noise = np.ones((1, 3), np.float32), np.full((1, 3), 0.3, np.float32)
    x = sch.add_noise(s, x0, noise, jnp.array([0]))
    np.testing.assert_allclose(sch.ancestral_step(s, noise, x, 0, -1, 99.0), x0, rtol=1e-5)

"""RoPE's frequencies and angles against the reference's formula, in float32 and in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metamorph_jax.nn import rope
from metamorph_jax.nn.rope import RopeScaling
from tests.convert.conftest import ORACLE

SCALINGS = {
    "default": RopeScaling(),
    "linear": RopeScaling("linear", 4.0),
    "llama3.1": RopeScaling("llama3", 8.0),
    "llama3.2": RopeScaling("llama3", 32.0),
    "llama3, other factors": RopeScaling("llama3", 4.0, 2.0, 8.0, 1024),
}
SIZES = [(32, 1e4), (64, 5e5), (128, 5e5), (128, 1e6), (96, 1e4)]
POSITIONS = np.array([0, 1, 4096, 131071], np.int32)
cases = pytest.mark.parametrize(("head_dim", "theta"), SIZES)
scalings = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)


def reference(head_dim, theta, s, dtype):
    """The formula as published, in one precision from beginning to end."""
    x = np.arange(0, head_dim, 2).astype(dtype) / dtype(head_dim)
    freq = (1 / np.power(dtype(theta), x)).astype(dtype)
    if s.kind == "default":
        return freq
    if s.kind == "linear":
        return freq / dtype(s.factor)
    wave = dtype(2 * math.pi) / freq
    out = np.where(wave > s.original_max_position / s.low_freq_factor, freq / dtype(s.factor), freq)
    smooth = (dtype(s.original_max_position) / wave - dtype(s.low_freq_factor)) / dtype(
        s.high_freq_factor - s.low_freq_factor
    )
    blended = (1 - smooth) * out / dtype(s.factor) + smooth * out
    short, long = (s.original_max_position / f for f in (s.high_freq_factor, s.low_freq_factor))
    return np.where((wave >= short) & (wave <= long), blended, out)


@cases
@scalings
def test_frequencies_are_the_formula_s(head_dim, theta, scaling):
    found = rope.frequencies(head_dim, theta, scaling)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    # Blending subtracts numbers that may be nearly equal, which magnifies what they are off by.
    # numpy's own float32 power is off by a rounding here and there, so bits are not compared.
    tolerance = 5e-6 if scaling.kind == "llama3" else 5e-7
    for dtype in (np.float64, np.float32):
        expected = reference(head_dim, theta, scaling, dtype)
        np.testing.assert_allclose(found, expected, rtol=tolerance)


@cases
@scalings
def test_frequencies_are_the_library_s_to_the_bit(head_dim, theta, scaling):
    torch = pytest.importorskip("torch", reason=ORACLE)
    x = torch.arange(0, head_dim, 2, dtype=torch.int64).to(dtype=torch.float32) / head_dim
    freq = 1.0 / (theta**x)
    s = scaling
    if s.kind == "linear":
        freq = freq / s.factor
    if s.kind == "llama3":
        long, short = (s.original_max_position / f for f in (s.low_freq_factor, s.high_freq_factor))
        wave = 2 * math.pi / freq
        out = torch.where(wave > long, freq / s.factor, freq)
        smooth = (s.original_max_position / wave - s.low_freq_factor) / (
            s.high_freq_factor - s.low_freq_factor
        )
        blended = (1 - smooth) * out / s.factor + smooth * out
        medium = ~(wave < short) * ~(wave > long)
        freq = torch.where(medium, blended, out)
    found, theirs = rope.frequencies(head_dim, theta, scaling), freq.numpy()
    ulps = np.abs(found - theirs) / np.spacing(theirs)
    # torch's own power is rounded wrongly once in some hundred numbers, which blending may double.
    assert ulps.max() <= 2 and (ulps > 0).sum() <= 1, ulps


@cases
@scalings
def test_angles_up_to_long_positions(head_dim, theta, scaling):
    """They are those of the float32 table, multiplied in float32; so far from the exact ones as
    that rounding takes them."""
    freq = rope.frequencies(head_dim, theta, scaling)
    cos, sin = jax.jit(lambda p: rope.angles(p, freq))(jnp.asarray(POSITIONS)[None])
    cos, sin = (np.asarray(x)[0, :, 0] for x in (cos, sin))
    phase = POSITIONS[:, None].astype(np.float32) * freq
    np.testing.assert_allclose(cos, np.cos(phase.astype(np.float64)), atol=2e-7)
    np.testing.assert_allclose(sin, np.sin(phase.astype(np.float64)), atol=2e-7)
    exact = POSITIONS[:, None] * reference(head_dim, theta, scaling, np.float64)
    error = np.maximum(np.abs(cos - np.cos(exact)), np.abs(sin - np.sin(exact))).max(1)
    # Half a rounding of the product, and up to four of the frequency.
    assert (error <= 5 * POSITIONS * np.float64(2.0**-24) + 2e-7).all(), error


def test_the_program_has_no_power_in_it():
    """The table is a constant: neither XLA's `pow` nor its `exp` makes it."""

    def run(positions):
        return rope.angles(positions, rope.frequencies(64, 5e5, SCALINGS["llama3.1"]))

    text = str(jax.make_jaxpr(run)(jnp.zeros((1, 3), jnp.int32)))
    assert "cos" in text and "pow" not in text and "exp " not in text

"""Moments of an autoencoder for caches: ours, and files that were made elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert import families, moments, stable_diffusion
from metamorph_jax.convert.export import Source, Writer
from metamorph_jax.data.images import Preprocess
from metamorph_jax.errors import ConfigError, DataError, WeightError
from metamorph_jax.models import build
from metamorph_jax.models.diffusion.vae import AutoencoderKL, VAEConfig
from tests.data.conftest import make_image

CFG = VAEConfig.tiny(sample_size=16, block_out_channels=(8, 8))


@pytest.fixture(scope="module")
def vae():
    rng = np.random.default_rng(3)
    shapes = nnx.eval_shape(lambda: AutoencoderKL(CFG, build.rngs(0)))
    graph, state = nnx.split(shapes)
    value = lambda x: jnp.asarray(rng.normal(0.0, 0.2, x.shape), jnp.float32)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(value, state))


@pytest.fixture(scope="module")
def of_values(vae):
    """Moments of values float32[n, h, w, 3], as they are."""
    return jax.jit(lambda values: vae.moments(values))


@pytest.fixture(scope="module")
def folder(vae, tmp_path_factory):
    """Of Stable Diffusion, with an autoencoder only."""
    folder = tmp_path_factory.mktemp("sd")
    families.known()["sd-vae"].write(folder / "vae", vae, Source(), Writer())
    return folder


@pytest.fixture(scope="module")
def pixels():
    process = Preprocess(16, "pad", mean=(1.0, 1.0, 1.0))
    return np.stack([process(make_image(k, 20, 30)) for k in range(3)])


@pytest.fixture(scope="module")
def compute(folder):
    return stable_diffusion.moment_function(str(folder), CFG)


def test_moments_are_of_pixels_around_zero(of_values, compute, pixels):
    wanted = of_values(pixels.astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(compute(pixels), wanted, atol=1e-4)


def test_another_autoencoder_is_refused(folder):
    with pytest.raises(ConfigError, match="norm_num_groups"):
        stable_diffusion.moment_function(str(folder), dataclasses.replace(CFG, norm_num_groups=8))


def test_range_of_pixels(of_values, compute, pixels):
    """Right ones pass, also those of an image that was resized in another way; those of [0, 1], of
    another image, and unscaled latents are told apart."""
    right = compute(pixels)
    near = compute(np.clip(pixels.astype(int) + 1, 0, 255).astype(np.uint8))
    wrong = np.asarray(of_values(pixels.astype(np.float32) / 255))
    check = lambda found: list(moments.checked(  # noqa: E731
        ((f"{k}.pt", pixels[k], found[k]) for k in range(3)), compute
    ))  # fmt: skip
    np.testing.assert_array_equal(check(right), right)
    check(near)
    with pytest.raises(DataError, match=r"0.pt was made from pixels in \[0, 1\].*leave these"):
        check(wrong)
    for other in (right[::-1], right * 0.18215):
        with pytest.raises(DataError, match=r"0.pt is not what the autoencoder .* makes of the"):
            check(other)


def test_files(compute, pixels, tmp_path):
    torch = pytest.importorskip("torch")
    wanted = compute(pixels[:1])[0]
    shape = wanted.shape
    for found in (wanted, wanted[None]):  # with and without a batch
        torch.save(torch.tensor(np.moveaxis(found, -1, -3).copy()), tmp_path / "a_output.pt")
        np.testing.assert_array_equal(moments.read(tmp_path / "a_output.pt", shape), wanted)
    with pytest.raises(WeightError, match=r"holds numbers of shape .* expected \(4, 4, 8\)"):
        moments.read(tmp_path / "a_output.pt", (4, 4, 8))
    torch.save({"a": torch.zeros(2)}, tmp_path / "a_output.pt")
    with pytest.raises(WeightError, match="not a file of one tensor"):
        moments.read(tmp_path / "a_output.pt", shape)
    (tmp_path / "a_output.pt").write_bytes(b"no torch file")
    with pytest.raises(WeightError, match="a_output.pt"):
        moments.read(tmp_path / "a_output.pt", shape)

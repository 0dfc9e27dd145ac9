"""The three files of MetaMorph's public decoder."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert.export import Source, Writer
from metamorph_jax.models.diffusion.decoder import DiffusionConfig
from metamorph_jax.models.diffusion.projector import ProjectorConfig
from metamorph_jax.models.diffusion.schedule import Schedule
from metamorph_jax.models.diffusion.unet import UNetConfig
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.recipes import decoder
from metamorph_jax.recipes.decoder import published
from metamorph_jax.recipes.decoder.config import pixels
from tests.convert.conftest import ORACLE


def small_decoder(mode="mlp", seed=0):
    """On 3 channels of pixels, so that there is no autoencoder to build."""
    unet = UNetConfig.tiny(
        in_channels=3, out_channels=3, block_out_channels=(16,), num_heads=(2,),
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    projector = ProjectorConfig(
        mode, 24, 32, unet.cross_attention_dim, num_tokens=5, num_layers=2, num_heads=4
    )
    cfg = decoder.Config(
        vision=VisionConfig("none", feature_width=24, tokens=5),
        projector=projector,
        decoder=DiffusionConfig(unet, None, Schedule()),
        context_length=7,
    )
    return decoder.create(cfg, nnx.Rngs(seed))


def save(model, folder, torch_files=False):
    return published.save_reference(folder, model, Source(), Writer(), torch_files)


@pytest.mark.parametrize("torch_files", [False, True])
def test_decoder_files_survive_both_ways(torch_files, tmp_path):
    if torch_files:
        pytest.importorskip("torch", reason=ORACLE)
    first, second = small_decoder(seed=0), small_decoder(seed=1)
    save(first, tmp_path, torch_files)
    ending = ".pt" if torch_files else ".safetensors"
    names = {"model_config.json", "unet_checkpoint" + ending, "adapter_checkpoint" + ending}
    assert {file.name for file in tmp_path.iterdir()} == names
    fields = json.loads((tmp_path / "model_config.json").read_text())
    assert fields == {"mode": "mlp", "input_dim": 24, "hidden_dim": 32, "output_dim": 32,
                      "num_tokens": 5, "num_layers": 2, "num_heads": 4}  # fmt: skip
    published.load_reference(second, tmp_path)
    for part in ("projector", "decoder"):
        a, b = (nnx.to_flat_state(nnx.state(getattr(m, part))) for m in (first, second))
        for (path, x), (_, y) in zip(a, b, strict=True):
            np.testing.assert_array_equal(x[...], y[...], err_msg=str(path))


@pytest.mark.parametrize("mode", ["mlp", "xattn", "transformer"])
def test_standardisation_is_folded_into_the_projector(mode, tmp_path):
    first, second = small_decoder(mode), small_decoder(mode, seed=1)
    rng = np.random.default_rng(0)
    features = rng.normal(2, 3, (2, 5, 24)).astype(np.float32)
    first.set_statistics(features)
    save(first, tmp_path)
    published.load_reference(second, tmp_path)
    assert not np.asarray(second.feature_mean[...]).any()
    context = [np.asarray(m.conditioning(jnp.asarray(features)).context) for m in (first, second)]
    np.testing.assert_allclose(*context, atol=2e-4)


def test_decoder_files_out_of_a_wrapper_and_without_a_unet(tmp_path):
    torch = pytest.importorskip("torch", reason=ORACLE)
    first, second = small_decoder(seed=0), small_decoder(seed=1)
    save(first, tmp_path, torch_files=True)
    state = torch.load(tmp_path / "adapter_checkpoint.pt", weights_only=True)
    torch.save({"module." + k: v for k, v in state.items()}, tmp_path / "adapter_checkpoint.pt")
    (tmp_path / "unet_checkpoint.pt").unlink()
    before = np.asarray(second.decoder.denoiser.conv_in.kernel[...])
    published.load_reference(second, tmp_path)
    np.testing.assert_array_equal(before, second.decoder.denoiser.conv_in.kernel[...])
    np.testing.assert_array_equal(
        first.projector.layers[0].kernel[...], second.projector.layers[0].kernel[...]
    )


def test_wrong_decoder_folders(tmp_path):
    model = small_decoder()
    with pytest.raises(FileNotFoundError, match="model_config.json"):
        published.load_reference(model, tmp_path)
    save(model, tmp_path)
    with pytest.raises(ValueError, match="num_layers=2"):
        published.load_reference(small_decoder("xattn"), tmp_path)
    (tmp_path / "adapter_checkpoint.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_checkpoint"):
        published.load_reference(model, tmp_path)
    cfg = pixels(8, 4, side=8, width=64)
    with pytest.raises(ValueError, match="DiT"):
        save(decoder.create(cfg, nnx.Rngs(0)), tmp_path / "b")

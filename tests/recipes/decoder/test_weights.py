"""A decoder starts from Stable Diffusion's weights, and from adapters."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from metamorph_jax import config as configs
from metamorph_jax.convert import diffusion, export, hf, names, peft, stable_diffusion
from metamorph_jax.errors import ConfigError
from metamorph_jax.models import build, lora
from metamorph_jax.models.diffusion import samplers
from metamorph_jax.recipes import decoder
from metamorph_jax.recipes.decoder import published as files
from metamorph_jax.sampling import image_decoder, trained
from metamorph_jax.types import Conditioning
from tests.convert.conftest import make as published
from tests.recipes.decoder.tiny import fast, latent_config


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    """unet/ and vae/ of a tiny random Stable Diffusion, saved by diffusers."""
    folder = tmp_path_factory.mktemp("sd")
    for part in ("unet", "vae"):
        published(f"sd-{part}").save_pretrained(folder / part)
    return folder


def sd_config(folder, **kw):
    """A config as a config file has it: one table."""
    parts = {}
    for name, part, read in (
        ("denoiser", "unet", diffusion.unet_from_hf),
        ("vae", "vae", diffusion.vae_from_hf),
    ):
        parts[name] = dataclasses.asdict(read(hf.read_config(folder / part)))
    table = dict(
        projector=dict(input_dim=32, hidden_dim=16, output_dim=32),
        context_length=7,
        decoder=parts,
        vision=dict(tower="siglip-tiny", tokens=4),
        sd_weights=str(folder),
    )
    return configs.build(decoder.Config, table | kw, "config.model")


def outputs(unet, vae):
    """One step of the UNet, one decoded image."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    condition = Conditioning(jax.random.normal(jax.random.key(1), (2, 7, 32)))
    (graph, state), t = nnx.split((unet, vae)), jnp.array([3, 700])

    def run(state):
        unet, vae = nnx.merge(graph, state)
        return unet(x, t, condition), vae.decode(x)

    return fast(run)(state)


@pytest.mark.parametrize("from_scratch", [False, True])
def test_sd_weights(sd_folder, from_scratch):
    """The recipe's parts compute what the loader's own do; from scratch, only the autoencoder."""
    cfg = sd_config(sd_folder, unet_from_scratch=from_scratch)
    model = decoder.create(cfg, nnx.Rngs(0))
    random = nnx.clone(model.decoder.denoiser)
    decoder.load_pretrained(model, cfg)
    unet, vae = (diffusion.load_part(sd_folder, part) for part in ("unet", "vae"))
    found = outputs(model.decoder.denoiser, model.decoder.vae)
    expected = outputs(random if from_scratch else unet, vae)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_sd_weights_of_another_structure(sd_folder):
    """Four heads have the shapes of two."""
    cfg = sd_config(sd_folder)
    denoiser = dataclasses.replace(cfg.decoder.denoiser, num_heads=(4, 4))
    wrong = dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, denoiser=denoiser))
    message = (
        r"denoiser\.num_heads is \(4, 4\), in the checkpoint \(2, 2\)\. config\.model\.decoder "
    )
    with pytest.raises(ConfigError, match=message):
        decoder.load_pretrained(decoder.create(wrong, nnx.Rngs(0)), wrong)


def test_sd_weights_go_beneath_adapters(sd_folder, tmp_path):
    """Published weights load into a UNet with adapters; merged, it is written as it came."""
    cfg = sd_config(sd_folder, lora=dict(rank=2))
    model = decoder.create(cfg, nnx.Rngs(0))
    decoder.load_pretrained(model, cfg)
    files.save(tmp_path / "out", lora.merged(model), export.Source(), export.Writer())
    written, came = (hf.Tensors(f / "unet") for f in (tmp_path / "out", sd_folder))
    assert set(written) == set(came)
    for key in came:
        np.testing.assert_array_equal(written[key], came[key], err_msg=key)


def test_adapters_start_from_pefts_files(tmp_path):
    def adapted(**options):
        found = dict(rank=2, alpha=4.0) | options
        cfg = latent_config(lora=configs.build(decoder.DecoderLora, found))
        return cfg, nnx.eval_shape(lambda: decoder.create(cfg, build.rngs(0)))

    rng, (_, model) = np.random.default_rng(0), adapted()
    for _, linear in lora.adapters(model):
        for leaf in (linear.lora_a, linear.lora_b):
            leaf.set_raw_value(jnp.asarray(rng.normal(size=leaf.shape), jnp.float32))
    peft.export_peft(model.decoder.denoiser, tmp_path)
    cfg, again = adapted(weights=str(tmp_path))
    decoder.load_pretrained(again, cfg)
    mine, theirs = (peft.tensors(m.decoder.denoiser) for m in (model, again))
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[k], theirs[k]) for k in mine)


def test_a_model_that_predicts_something_else(sd_folder, tmp_path):
    """A velocity model is not drawn as one of noise; structure and schedule are in one error."""
    shutil.copytree(sd_folder, tmp_path / "sd")
    cfg = sd_config(sd_folder, sd_weights=str(tmp_path / "sd"))
    file = tmp_path / "sd" / "scheduler" / "scheduler_config.json"
    schedule = dataclasses.replace(cfg.decoder.schedule, prediction_type="v_prediction")
    export.write_json(file, diffusion.scheduler_to_hf(schedule, samplers.DDIM()))
    model = nnx.eval_shape(lambda: decoder.create(cfg, build.rngs(0)))
    message = "schedule.prediction_type is 'epsilon', in the checkpoint 'v_prediction'"
    with pytest.raises(ConfigError, match=message):
        decoder.load_pretrained(model, cfg)
    parts = model.decoder.denoiser, model.decoder.vae
    stable_diffusion.load_parts(cfg.sd_weights, schedule, *parts)


def test_the_reference_s_files_are_an_image_decoder(sd_folder, tmp_path):
    """`--decoder` takes a folder with the three files, and Stable Diffusion's parts beside them."""
    cfg = sd_config(sd_folder)
    shapes = names.lazy_torch_dict(
        nnx.eval_shape(lambda: decoder.create(cfg, build.rngs(1)).projector)
    )
    rng, folder = np.random.default_rng(0), tmp_path / "public"
    adapter = {k: rng.normal(size=shapes.shape_of(k)).astype(np.float32) for k in shapes}
    for part in ("unet", "vae"):
        shutil.copytree(sd_folder / part, folder / part)
    save_file(adapter, folder / "adapter_checkpoint.safetensors")
    shutil.copy(
        sd_folder / "unet" / "diffusion_pytorch_model.safetensors",
        folder / "unet_checkpoint.safetensors",
    )
    fields = {k: v for k, v in vars(cfg.projector).items() if k != "dtype"}
    export.write_json(folder / "model_config.json", fields)
    schedule = diffusion.scheduler_to_hf(cfg.decoder.schedule, samplers.DDIM())
    export.write_json(folder / "scheduler" / "scheduler_config.json", schedule)

    found = trained.load_published(str(folder))
    assert found.decoder.cfg == cfg.decoder and found.cfg.unet_from_scratch
    loaded = names.lazy_torch_dict(found.projector)
    for key, value in adapter.items():
        np.testing.assert_array_equal(loaded[key], value, err_msg=key)
    assert isinstance(image_decoder.load_image_decoder(str(folder), 3), image_decoder.ImageDecoder)
    assert trained.load_published(str(tmp_path)) is None  # a workdir, or nothing

    shutil.rmtree(folder / "vae")
    with pytest.raises(ConfigError, match="output_dim 32, which no Stable Diffusion"):
        image_decoder.load_image_decoder(str(folder))

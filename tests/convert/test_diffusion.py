"""Stable Diffusion folders: configs, complete key lists, and whole pipelines both ways."""

import inspect
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from metamorph_jax.convert import command, diffusion, families, hf
from metamorph_jax.convert.export import Source, Writer
from metamorph_jax.errors import ConfigError
from metamorph_jax.models import build
from metamorph_jax.models.diffusion import samplers
from metamorph_jax.models.diffusion.decoder import guided
from metamorph_jax.models.diffusion.schedule import Schedule
from metamorph_jax.models.diffusion.unet import UNetConfig
from metamorph_jax.models.diffusion.vae import VAEConfig
from metamorph_jax.types import Conditioning
from tests.convert.conftest import ORACLE, make

FAMILIES = families.known()
# config.json of the published repositories, as they are.
SD15_UNET = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
    "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
    "sample_size": 64, "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
SD21_UNET = SD15_UNET | {
    "_diffusers_version": "0.10.0.dev0", "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024, "dual_cross_attention": False, "num_class_embeds": None,
    "only_cross_attention": False, "sample_size": 96, "upcast_attention": True,
    "use_linear_projection": True,
}  # fmt: skip
SD15_VAE = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
    "out_channels": 3, "sample_size": 512, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
    "clip_sample": False,
}  # fmt: skip
SD21_SCHEDULER = SD15_SCHEDULER | {
    "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0",
    "prediction_type": "v_prediction",
}  # fmt: skip


def shapes(mapping) -> dict:
    return {key: tuple(mapping.shape_of(key)) for key in mapping}


def abstract(family, cfg):
    return nnx.eval_shape(lambda: family.create(cfg, rngs=build.rngs(0)))


def meta(library, fields) -> dict:
    """name -> shape of the library's model, which holds no numbers."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    models = pytest.importorskip("diffusers.models", reason=ORACLE)
    with torch.device("meta"):
        model = getattr(models, library).from_config(fields)
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


@pytest.mark.parametrize(
    "family, fields",
    [("sd-unet", SD15_UNET), ("sd-unet", SD21_UNET), ("sd-vae", SD15_VAE),
     ("sd-vae", SD15_VAE | {"sample_size": 768})],
)  # fmt: skip
def test_full_sizes_have_exactly_the_published_tensors(family, fields):
    family = FAMILIES[family]
    ours = shapes(family.export(abstract(family, family.config_from_hf(fields))))
    assert sorted(family.published(fields)) == sorted(ours)
    assert ours == meta(fields["_class_name"], fields)


def test_published_configs_are_our_sizes():
    assert diffusion.unet_from_hf(SD15_UNET) == UNetConfig.sd15()
    assert diffusion.unet_from_hf(SD21_UNET) == UNetConfig.sd21()
    assert diffusion.vae_from_hf(SD15_VAE) == VAEConfig.sd15()


@pytest.mark.parametrize("size", ["sd15", "sd21", "tiny"])
@pytest.mark.parametrize("family", ["sd-unet", "sd-vae", "clip-text"])
def test_configs_survive_both_ways(family, size):
    family = FAMILIES[family]
    cfg = family.sizes[size]
    assert family.config_from_hf(json.loads(json.dumps(family.config_to_hf(cfg)))) == cfg


@pytest.mark.parametrize("kind", ["sd-unet", "sd-unet-21", "sd-vae"])
def test_tensors_survive_both_ways(kind, tiny, tmp_path):
    folder = tiny(kind)
    family = families.detect(folder)
    model = abstract(family, family.config_from_hf(hf.read_config(folder)))
    tensors = hf.Tensors(folder)
    family.load(model, tensors)
    out = family.export(model)
    assert set(out) == set(tensors) == set(family.published(hf.read_config(folder)))
    for key, value in tensors.items():
        assert out[key].tobytes() == np.ascontiguousarray(value).tobytes(), key
    part = "vae" if kind == "sd-vae" else "unet"
    family.write(tmp_path / part, model, Source(), Writer())
    models = pytest.importorskip("diffusers.models", reason=ORACLE)
    name = hf.read_config(folder)["_class_name"]
    again, info = getattr(models, name).from_pretrained(tmp_path / part, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for key, value in again.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), tensors[key], err_msg=key)


def test_old_names_of_the_autoencoder(tiny, tmp_path):
    """Those of the published 1.5 and 2.1 files; what goes out has the new names."""
    family, folder = FAMILIES["sd-vae"], tiny("sd-vae")
    fields, new = hf.read_config(folder), dict(hf.Tensors(folder))
    old = {diffusion.old_vae_name(k): np.asarray(v) for k, v in new.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in old
    assert sorted(old) == sorted(diffusion.published_vae(fields, old=True))
    model = abstract(family, family.config_from_hf(fields))
    family.load(model, old)
    out = family.export(model)
    assert set(out) == set(new)
    for key, value in new.items():
        np.testing.assert_array_equal(out[key], value, err_msg=key)
    del old["decoder.mid_block.attentions.0.key.bias"]
    old["decoder.extra"] = np.zeros(1)
    with pytest.raises(ValueError) as error:
        family.load(model, old)
    assert "attentions.0.key.bias" in str(error.value) and "decoder.extra" in str(error.value)


def test_published_schedulers():
    schedule, sampler = diffusion.scheduler_from_hf(SD15_SCHEDULER)
    assert schedule == Schedule() and sampler == samplers.PNDM()
    schedule, sampler = diffusion.scheduler_from_hf(SD21_SCHEDULER)
    assert schedule == Schedule(prediction_type="v_prediction") and sampler == samplers.DDIM()


@pytest.mark.parametrize(
    "sampler",
    [samplers.DDIM(), samplers.DDIM("trailing", 0, True), samplers.DDPM(), samplers.PNDM(),
     samplers.DPMSolverPP(karras=True), samplers.DPMSolverPP(final_zero=False),
     samplers.Euler("linspace", 0), samplers.Euler(karras=True)],
)  # fmt: skip
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_schedulers_survive_both_ways_and_diffusers_reads_them(sampler, prediction, tmp_path):
    schedule = Schedule(prediction_type=prediction, beta_end=0.02, num_train_timesteps=500)
    fields = diffusion.scheduler_to_hf(schedule, sampler)
    assert diffusion.scheduler_from_hf(json.loads(json.dumps(fields))) == (schedule, sampler)
    library = pytest.importorskip("diffusers.schedulers", reason=ORACLE)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(fields))
    theirs = getattr(library, fields["_class_name"]).from_pretrained(tmp_path)
    np.testing.assert_allclose(theirs.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-4)
    theirs.set_timesteps(12)
    table = sampler.table(schedule, 12)
    np.testing.assert_allclose(theirs.timesteps, table.t, atol=1e-3)


@pytest.mark.parametrize(
    "fields, words",
    [({"_class_name": "LMSDiscreteScheduler"}, "LMSDiscreteScheduler"),
     (SD15_SCHEDULER | {"trained_betas": [0.1]}, "trained_betas"),
     (SD15_SCHEDULER | {"skip_prk_steps": False}, "skip_prk_steps"),
     (SD21_SCHEDULER | {"clip_sample": True}, "clip_sample"),
     (SD15_SCHEDULER | {"beta_schedule": "sigmoid"}, "sigmoid")],
)  # fmt: skip
def test_schedulers_that_are_not_ours(fields, words):
    with pytest.raises(ValueError, match=words):
        diffusion.scheduler_from_hf(fields)
    with pytest.raises(ValueError, match="snr_shift"):
        diffusion.scheduler_to_hf(Schedule(snr_shift=0.5), samplers.DDIM())


def test_every_field_of_a_scheduler_is_known():
    """What we don't implement of a class is an error unless it is at its default; what belongs to
    another class is passed over."""
    pytest.importorskip("diffusers", reason=ORACLE)
    import diffusers as library

    for kind, (_, defaults, required) in diffusion._SAMPLERS.items():
        signature = inspect.signature(getattr(library, kind).__init__).parameters
        theirs = {n: p.default for n, p in signature.items() if n != "self"}
        ours = set(diffusion._SCHEDULE) | {"trained_betas", "rescale_betas_zero_snr"}
        assert theirs.keys() <= ours | defaults.keys() | required.keys(), kind
        stated = defaults | {n: default for n, (default, _) in required.items()}
        assert stated == {n: theirs[n] for n in stated}, kind
    dpm = {"_class_name": "DPMSolverMultistepScheduler"}
    diffusion.scheduler_from_hf(dpm | {"lambda_min_clipped": float("-inf"), "sigma_min": 3.0})
    with pytest.raises(ConfigError, match="lambda_min_clipped=-5.1") as caught:
        diffusion.scheduler_from_hf(dpm | {"lambda_min_clipped": -5.1, "solver_order": 3})
    assert "solver_order=3" in str(caught.value)
    pndm = SD15_SCHEDULER | {"rescale_betas_zero_snr": True, "lambda_min_clipped": -5.1}
    assert not diffusion.scheduler_from_hf(pndm)[0].zero_snr


def test_more_steps_than_were_trained():
    schedule = Schedule(num_train_timesteps=10)
    with pytest.raises(ValueError, match="11 steps: expected 1 to 10"):
        samplers.DDIM().integrate(None, np.zeros((1, 2, 2, 1)), schedule, 11)


@pytest.fixture(scope="module")
def pipeline_folder(tiny, tokenizer_folder, tmp_path_factory):
    """A tiny StableDiffusionPipeline, saved by diffusers."""
    pytest.importorskip("torch", reason=ORACLE)
    pipelines = pytest.importorskip("diffusers.pipelines.stable_diffusion", reason=ORACLE)
    from diffusers.schedulers import DDIMScheduler
    from transformers import CLIPTokenizer

    parts = dict(unet=make("sd-unet-21"), vae=make("sd-vae"), text_encoder=make("clip-text"))
    scheduler = DDIMScheduler.from_config(SD21_SCHEDULER)
    pipe = pipelines.StableDiffusionPipeline(
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer_folder), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(folder)
    return folder


def test_a_whole_pipeline_goes_in_and_out(pipeline_folder, tmp_path):
    import torch
    from diffusers.pipelines.stable_diffusion import StableDiffusionPipeline

    ours = diffusion.load_pipeline(pipeline_folder)
    assert ours.schedule.prediction_type == "v_prediction"
    assert ours.unet.cfg.num_heads == (1, 2) and ours.unet.cfg.use_linear_projection
    out = str(tmp_path / "out")
    assert command.convert(str(pipeline_folder), out) == sum(
        value.nbytes
        for part in diffusion.PARTS
        for value in hf.Tensors(pipeline_folder / part).values()
    )
    pictures = []
    for folder in (pipeline_folder, tmp_path / "out"):
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        pictures.append(pipe("ab c", latents=latents, num_inference_steps=3, output_type="np",
                             guidance_scale=3.0).images)  # fmt: skip
        embeds = pipe.encode_prompt("ab c", "cpu", 1, True)
    np.testing.assert_array_equal(*pictures)

    context, uncond = (jnp.asarray(x.detach().numpy()) for x in embeds)
    picture = draw(ours, jnp.asarray(latents.numpy().transpose(0, 2, 3, 1)), context, uncond)
    np.testing.assert_allclose(picture, pictures[0], atol=1e-4)


def draw(ours, noise, context, uncond):
    import jax

    graphs, states = zip(*(nnx.split(m) for m in (ours.unet, ours.vae)), strict=True)

    @jax.jit
    def run(states, noise, context, uncond):
        unet, vae = (nnx.merge(g, s) for g, s in zip(graphs, states, strict=True))
        predict = guided(unet, Conditioning(context), Conditioning(uncond), 3.0)
        x = ours.sampler.integrate(predict, noise, ours.schedule, 3)
        return jnp.clip(vae.decode(x / vae.cfg.scaling_factor) / 2 + 0.5, 0.0, 1.0)

    with jax.default_matmul_precision("highest"):
        return run(states, noise, context, uncond)


def test_broken_pipelines(pipeline_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        diffusion.load_pipeline(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(pipeline_folder, broken)
    (broken / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="vae"):
        diffusion.load_pipeline(broken)
    index = json.loads((broken / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionXLPipeline"
    (broken / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline"):
        diffusion.load_pipeline(broken)
    ours = diffusion.load_pipeline(pipeline_folder)
    with pytest.raises(FileExistsError, match="not empty"):
        diffusion.save_pipeline(ours, broken, pipeline_folder / "tokenizer", Writer())


def test_a_text_tower_without_its_prefix_and_the_wrong_one(tiny):
    family, folder = FAMILIES["clip-text"], tiny("clip-text")
    tensors = dict(hf.Tensors(folder))
    model = abstract(family, family.config_from_hf(hf.read_config(folder)))
    family.load(model, {"text_model." + k: v for k, v in tensors.items()})
    first = dict(family.export(model))
    family.load(model, tensors)
    assert {k: v.tobytes() for k, v in family.export(model).items()} == {
        k: v.tobytes() for k, v in first.items()
    }
    with pytest.raises(ValueError, match="fc9"):
        family.load(model, tensors | {"encoder.layers.0.mlp.fc9.bias": np.zeros(1)})


def test_clip_text_both_halves_and_files(tiny, tmp_path):
    """The text half of a two-tower checkpoint; what goes out loads in transformers."""
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    pytest.importorskip("torch", reason=ORACLE)
    family, folder = FAMILIES["clip-text"], tiny("clip-both")
    fields, tensors = hf.read_config(folder), hf.Tensors(folder)
    model = abstract(family, family.config_from_hf(fields))
    family.load(model, tensors)
    out = family.export(model)
    assert sorted(out) == sorted(family.published(fields))
    assert set(out) == {k for k in tensors if k.startswith("text_model.")}
    for key, value in out.items():
        assert value.tobytes() == np.ascontiguousarray(tensors[key]).tobytes()
    (tmp_path / "config.json").write_text(json.dumps(family.config_to_hf(model.cfg)))
    save_file(dict(out), tmp_path / "model.safetensors", {"format": "pt"})
    again, info = transformers.CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = {
        "text_model." + k.removeprefix("text_model."): v for k, v in again.state_dict().items()
    }
    for key, value in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(state[key].numpy(), value)

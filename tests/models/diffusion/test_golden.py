"""Every case of golden/diffusion: configurations, shapes and case list come from its descriptor.

A case is checked by the function of its class. It returns our value for each `out.` tensor by name;
the test fails when a tensor of the file has no value, so nothing that is listed stays unread.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from metamorph_jax.convert.names import load_torch_dict, to_torch_dict
from metamorph_jax.models.build import rngs
from metamorph_jax.models.diffusion import samplers
from metamorph_jax.models.diffusion import schedule as sch
from metamorph_jax.models.diffusion.clip_text import CLIPTextConfig, CLIPTextModel
from metamorph_jax.models.diffusion.decoder import guided
from metamorph_jax.models.diffusion.schedule import Schedule
from metamorph_jax.models.diffusion.unet import UNet, UNetConfig
from metamorph_jax.models.diffusion.vae import AutoencoderKL, VAEConfig
from metamorph_jax.types import Conditioning

pytestmark = pytest.mark.golden

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
FORWARD = dict(rtol=1e-4, atol=1e-5)
GRADIENT = dict(rtol=1e-3, atol=1e-5)


def pytest_generate_tests(metafunc):
    root = pathlib.Path(metafunc.config.getoption("--golden-root")) / "diffusion"
    cases = json.loads((root / "descriptor.json").read_text())["cases"]
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases)


@pytest.fixture(scope="module")
def golden(golden_root):
    root = golden_root / "diffusion"
    return root, json.loads((root / "descriptor.json").read_text())["cases"]


def nchw(x):
    return jnp.moveaxis(x, -1, 1)


def nhwc(x):
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def weights(data):
    return {k[2:]: v for k, v in data.items() if k.startswith("w.")}


def build(cls, config_cls, config, data):
    """The module with the case's weights; also checks that names and layouts survive both ways."""
    model = nnx.eval_shape(lambda: cls(config_cls.from_dict(config), rngs(0)))
    load_torch_dict(model, weights(data))
    for key, value in to_torch_dict(model).items():
        np.testing.assert_array_equal(value, data["w." + key])
    return model


def run(model, function, *args):
    """function(model, *args), compiled once: eager tiny operations would take seconds."""
    graph, state = nnx.split(model)
    whole = jax.jit(lambda s, *a: function(nnx.merge(graph, s), *a), compiler_options=FAST)
    return whole(state, *args)


def check_vae(case, data, golden):
    vae = build(AutoencoderKL, VAEConfig, case["config"], data)

    def outputs(vae, image, eps):
        posterior = vae.encode(image)
        z = posterior.sample(eps)
        return {
            "out.moments": nchw(vae.moments(image)), "out.mean": nchw(posterior.mean),
            "out.logvar": nchw(posterior.logvar), "out.std": nchw(posterior.std),
            "out.sample": nchw(z), "out.scaled_latent": nchw(z * vae.cfg.scaling_factor),
            "out.decode_sample": nchw(vae.decode(z)), "out.kl": posterior.kl(),
            "out.decode_mode": nchw(vae.decode(posterior.mean)),
        }  # fmt: skip

    return run(vae, outputs, nhwc(data["in.image"]), nhwc(data["in.eps"]))


def check_unet(case, data, golden):
    unet = build(UNet, UNetConfig, case["config"], data)
    x, context = nhwc(data["in.latent"]), jnp.asarray(data["in.context"])

    def outputs(unet, x, t, context):
        probes = {}
        sample = unet(x, t, Conditioning(context), probes=probes)
        first = unet(x[:1], jnp.int32(500), Conditioning(context[:1]))
        return probes | {"sample": sample, "sample_first_item_scalar_t500": first}

    found = run(unet, outputs, x, jnp.asarray(data["in.timesteps"]), context)
    return {f"out.{k}": nchw(v) if v.ndim == 4 else v for k, v in found.items()}


def check_clip_text(case, data, golden):
    model = build(CLIPTextModel, CLIPTextConfig, case["config"], data)

    def outputs(model, ids):
        out = model(ids)
        return {
            "out.last_hidden_state": out.last, "out.pooler_output": out.pooled,
            "out.hidden_states": jnp.stack(out.hidden),
            "out.penultimate_after_final_norm": out.penultimate,
        }  # fmt: skip

    return run(model, outputs, jnp.asarray(data["in.input_ids"]))


def schedule_of(config) -> Schedule:
    """The schedule part of a scheduler's configuration."""
    assert config["trained_betas"] is None and not config.get("thresholding")
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    zero_snr = config.get("rescale_betas_zero_snr", False)
    return Schedule(**{k: config[k] for k in names}, zero_snr=zero_snr)


def sampler_of(kind, config):
    """Our sampler for a library scheduler and its configuration."""
    grid = dict(spacing=config["timestep_spacing"], offset=config["steps_offset"])
    if kind == "DDIMScheduler":
        assert not config["clip_sample"]
        return samplers.DDIM(**grid, to_one=config["set_alpha_to_one"])
    if kind == "PNDMScheduler":
        assert config["skip_prk_steps"]
        return samplers.PNDM(**grid, to_one=config["set_alpha_to_one"])
    grid |= dict(
        karras=config["use_karras_sigmas"], final_zero=config["final_sigmas_type"] == "zero"
    )
    if kind == "DPMSolverMultistepScheduler":
        wanted = dict(solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint")
        wanted |= dict(euler_at_final=False, use_lu_lambdas=False, variance_type=None)
        assert {k: config[k] for k in wanted} == wanted
        return samplers.DPMSolverPP(**grid, lower_order_final=config["lower_order_final"])
    if kind == "EulerDiscreteScheduler":
        wanted = dict(interpolation_type="linear", timestep_type="discrete")
        wanted |= dict(sigma_min=None, sigma_max=None)
        assert {k: config[k] for k in wanted} == wanted
        return samplers.Euler(**grid)
    raise ValueError(f"no sampler for {kind}")


def check_ddpm(case, data, golden):
    cfg = case["config"]
    s = schedule_of(cfg)
    x0, noise, t = (data[f"in.{k}"] for k in ("x0", "noise", "timesteps"))
    total, steps = cfg["num_train_timesteps"], 10
    grid = samplers.timesteps(cfg["timestep_spacing"], total, steps, cfg["steps_offset"])
    v_schedule = schedule_of(cfg | {"prediction_type": "v_prediction"})
    out = {
        "out.betas": s.betas, "out.alphas_cumprod": s.alphas_cumprod,
        "out.add_noise": sch.add_noise(s, x0, noise, t),
        "out.velocity": sch.velocity(s, x0, noise, t), "out.snr": sch.snr(s, t),
        "out.min_snr5_weight_eps": sch.min_snr_weight(s, t, 5.0),
        "out.min_snr5_weight_v": sch.min_snr_weight(v_schedule, t, 5.0),
        "out.timesteps_10_leading": np.round(grid),
    }  # fmt: skip
    for key in (k for k in data if k.startswith("out.step_")):
        kind = key.removeprefix("out.step_").removesuffix("_prev")
        names = ("model_output", "sample", "t", "variance_noise")
        y, x, t, extra = (data[f"in.step_{kind}_{k}"] for k in names)
        one = schedule_of(cfg | {"prediction_type": kind})
        out[key] = sch.ancestral_step(one, y, x, int(t), int(t) - total // steps, extra)
    return out


def check_sampler(case, data, golden):
    s = schedule_of(case["config"])
    sampler = sampler_of(case["class"].split(".")[-1], case["config"])
    steps = case["num_inference_steps"]

    def stand_in(x, t):
        return 0.6 * jnp.tanh(x) + 0.15 * jnp.sin(t / 60) * jnp.cos(x)

    noise = jnp.asarray(data["in.unit_noise"])
    _, seen = sampler.integrate(stand_in, noise, s, steps, return_trajectory=True)
    table = sampler.table(s, steps)
    return {
        "out.trajectory": seen[0], "out.model_outputs": seen[1], "out.timesteps": table.t,
        "out.init_noise_sigma": table.init_sigma, "out.sigmas": table.sigmas,
    }  # fmt: skip


def check_pipeline(case, data, golden):
    root, cases = golden
    parts = {}
    for kind, cls, config in (("unet", UNet, UNetConfig), ("vae", AutoencoderKL, VAEConfig)):
        word = {"unet": "UNet from ", "vae": "VAE from "}[kind]
        file = case["weights"].split(word)[1].split(",")[0].strip()
        source = next(c for c in cases.values() if c["file"] == file)
        parts[kind] = build(cls, config, source["config"], load_file(root / file))
    s = schedule_of(case["scheduler_config"])
    sampler = sampler_of(case["scheduler"], case["scheduler_config"])
    (unet_graph, unet), (vae_graph, vae) = nnx.split(parts["unet"]), nnx.split(parts["vae"])

    @functools.partial(jax.jit, compiler_options=FAST)
    def draw(unet, vae, noise, context, uncond):
        unet, vae = nnx.merge(unet_graph, unet), nnx.merge(vae_graph, vae)
        scale = case["guidance_scale"]
        predict = guided(unet, Conditioning(context), Conditioning(uncond), scale, unet.prepare)
        latent, (states, _) = sampler.integrate(
            predict, noise, s, case["num_inference_steps"], return_trajectory=True
        )
        return {
            "out.step_latents": jnp.moveaxis(states[1:], -1, 2), "out.final_latents": nchw(latent),
            "out.decoded_unclipped_nchw": nchw(vae.decode(latent / vae.cfg.scaling_factor)),
            "out.image": jnp.clip(vae.decode(latent / vae.cfg.scaling_factor) / 2 + 0.5, 0.0, 1.0),
        }  # fmt: skip

    context, uncond = data["in.prompt_embeds"], data["in.negative_prompt_embeds"]
    return draw(unet, vae, nhwc(data["in.latents"]), context, uncond)


CHECKS = {
    "diffusers.AutoencoderKL": check_vae,
    "diffusers.UNet2DConditionModel": check_unet,
    "transformers.CLIPTextModel": check_clip_text,
    "diffusers.DDPMScheduler": check_ddpm,
    "diffusers.DDIMScheduler": check_sampler,
    "diffusers.PNDMScheduler": check_sampler,
    "diffusers.DPMSolverMultistepScheduler": check_sampler,
    "diffusers.EulerDiscreteScheduler": check_sampler,
    "diffusers.StableDiffusionPipeline": check_pipeline,
}


def test_case(case, golden):
    root, cases = golden
    spec = cases[case]
    assert spec["class"] in CHECKS, f"{case}: nothing here reads class {spec['class']}"
    data = load_file(root / spec["file"])
    for key, (shape, _) in spec["tensors"].items():
        assert list(data[key].shape) == shape, f"{key} is not as its descriptor says"
    with jax.default_matmul_precision("highest"):
        found = CHECKS[spec["class"]](spec, data, golden)
    expected = {k for k in data if k.startswith("out.")}
    assert expected <= set(found), f"{case}: nothing here computes {sorted(expected - set(found))}"
    for key in sorted(expected):
        tolerance = dict(GRADIENT if key.startswith("out.grad") else FORWARD)
        if "guidance_scale" in spec:
            # Guidance multiplies the rounding of the network, step after step, so a latent near
            # zero carries the absolute error of its large neighbours.
            tolerance["atol"] *= max(1.0, np.abs(data[key]).max())
        np.testing.assert_allclose(found[key], data[key], err_msg=f"{case}/{key}", **tolerance)

"""Stable Diffusion 1.5 and 2.1 in the folder layout of diffusers.

    folder             ours                        published keys
    unet/              UNet                        our paths; matrices [o, i], convolutions [o, i, h, w]
    vae/               AutoencoderKL               the same; in older files the parts of the middle
                                                   attention are query, key, value and proj_attn, here
                                                   and in what is written to_q, to_k, to_v, to_out.0
    text_encoder/      CLIPTextModel               convert/clip_text.py
    scheduler/         Schedule and a sampler      fields of scheduler_config.json
    tokenizer/         (files, copied)

`proj_in` and `proj_out` are 1x1 convolutions in 1.5 and linear in 2.1; heads are 8 per level in 1.5
and 5, 10, 20, 20 in 2.1 (`attention_head_dim` of the published configs is their number); 2.1 at 768
pixels predicts velocity. The safety checker and the feature extractor are left out: diffusers loads
a folder without them unchanged.
"""  # noqa: E501

import dataclasses
import math
import pathlib
import shutil
from collections.abc import Mapping

import numpy as np
from flax import nnx

from metamorph_jax import files
from metamorph_jax.convert import compare, export, families, hf, names
from metamorph_jax.convert.export import Source, Writer
from metamorph_jax.convert.families import Family, Reference
from metamorph_jax.errors import ConfigError
from metamorph_jax.models import build
from metamorph_jax.models.diffusion import samplers
from metamorph_jax.models.diffusion.clip_text import CLIPTextModel
from metamorph_jax.models.diffusion.schedule import Schedule
from metamorph_jax.models.diffusion.unet import UNet, UNetConfig
from metamorph_jax.models.diffusion.vae import OLD_NAMES, AutoencoderKL, VAEConfig

_CLASSES = {UNetConfig: "UNet2DConditionModel", VAEConfig: "AutoencoderKL"}
_OWN = ("num_heads", "dtype", "remat")  # fields of `UNetConfig` that the library has not
VERSION = "0.21.0"  # of the layout, for `_diffusers_version`


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


def unet_to_hf(cfg: UNetConfig) -> dict:
    """config.json of `UNet2DConditionModel`."""
    fields = {k: _listed(v) for k, v in vars(cfg).items() if k not in _OWN}
    heads = cfg.num_heads
    fields["attention_head_dim"] = heads[0] if len(set(heads)) == 1 else list(heads)
    return {"_class_name": "UNet2DConditionModel", "_diffusers_version": VERSION, **fields}


def vae_to_hf(cfg: VAEConfig) -> dict:
    """config.json of `AutoencoderKL`."""
    levels = len(cfg.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        **{k: _listed(v) for k, v in vars(cfg).items() if k != "dtype"},
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def unet_from_hf(fields: Mapping, **overrides) -> UNetConfig:
    return dataclasses.replace(UNetConfig.from_dict(dict(fields)), **overrides)


def vae_from_hf(fields: Mapping, **overrides) -> VAEConfig:
    return dataclasses.replace(VAEConfig.from_dict(dict(fields)), **overrides)


def load_unet(unet: UNet, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills `unet` in place from tensors by diffusers' names; anything else is an error."""
    names.load_torch_dict(unet, tensors)


def old_vae_name(key: str) -> str:
    """The name that older files have for one of ours."""
    for old, new in OLD_NAMES.items():
        key = key.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
    return key


def load_vae(vae: AutoencoderKL, tensors: Mapping[str, np.ndarray]) -> None:
    """Fills `vae` in place, from old or new names of its attention; anything else is an error."""
    old = any(".attentions.0.query." in key for key in tensors)
    names.load_torch_dict(vae, tensors, rename=old_vae_name if old else lambda key: key)


# ---- the complete lists of published keys


def _both(*parts: str) -> list[str]:
    return [f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")]


def _resnet(name: str, *, time: bool, shortcut: bool) -> list[str]:
    parts = ["norm1", "conv1", "norm2", "conv2"]
    parts += ["time_emb_proj"] * time + ["conv_shortcut"] * shortcut
    return _both(*(f"{name}.{part}" for part in parts))


def _transformer(name: str) -> list[str]:
    block = f"{name}.transformer_blocks.0"
    keys = _both(f"{name}.norm", f"{name}.proj_in", f"{name}.proj_out")
    keys += _both(*(f"{block}.{part}" for part in ("norm1", "norm2", "norm3", "ff.net.0.proj")))
    keys += _both(f"{block}.ff.net.2")
    for attention in ("attn1", "attn2"):
        keys += [f"{block}.{attention}.to_{x}.weight" for x in "qkv"]
        keys += _both(f"{block}.{attention}.to_out.0")
    return keys


def published_unet(fields: Mapping) -> list[str]:
    """Every key of the UNet that a config.json belongs to."""
    cfg = UNetConfig.from_dict(dict(fields))
    widths, n = cfg.block_out_channels, cfg.layers_per_block
    keys = _both("conv_in", "conv_out", "conv_norm_out")
    keys += _both("time_embedding.linear_1", "time_embedding.linear_2")
    for i, kind in enumerate(cfg.down_block_types):
        block = f"down_blocks.{i}"
        for j in range(n):
            changes = j == 0 and widths[max(i - 1, 0)] != widths[i]
            keys += _resnet(f"{block}.resnets.{j}", time=True, shortcut=changes)
            keys += _transformer(f"{block}.attentions.{j}") if "CrossAttn" in kind else []
        keys += _both(f"{block}.downsamplers.0.conv") if i + 1 < len(widths) else []
    for j in range(2):
        keys += _resnet(f"mid_block.resnets.{j}", time=True, shortcut=False)
    keys += _transformer("mid_block.attentions.0")
    for i, kind in enumerate(cfg.up_block_types):
        block = f"up_blocks.{i}"
        for j in range(n + 1):  # each meets a map of the way down, so its width changes
            keys += _resnet(f"{block}.resnets.{j}", time=True, shortcut=True)
            keys += _transformer(f"{block}.attentions.{j}") if "CrossAttn" in kind else []
        keys += _both(f"{block}.upsamplers.0.conv") if i + 1 < len(widths) else []
    return keys


def published_vae(fields: Mapping, old: bool = False) -> list[str]:
    """Every key of the autoencoder that a config.json belongs to; `old`: attention names of the
    files that Stable Diffusion 1.5 and 2.1 were published with."""
    cfg = VAEConfig.from_dict(dict(fields))
    keys = _both("quant_conv", "post_quant_conv")
    for side, widths, n, change in (
        ("encoder.", cfg.block_out_channels, cfg.layers_per_block, "down"),
        ("decoder.", cfg.block_out_channels[::-1], cfg.layers_per_block + 1, "up"),
    ):
        keys += _both(*(f"{side}{part}" for part in ("conv_in", "conv_out", "conv_norm_out")))
        for i, width in enumerate(widths):
            block = f"{side}{change}_blocks.{i}"
            for j in range(n):
                changes = j == 0 and widths[max(i - 1, 0)] != width
                keys += _resnet(f"{block}.resnets.{j}", time=False, shortcut=changes)
            if i + 1 < len(widths):
                keys += _both(f"{block}.{change}samplers.0.conv")
        for j in range(2):
            keys += _resnet(f"{side}mid_block.resnets.{j}", time=False, shortcut=False)
        parts = ["group_norm", "to_q", "to_k", "to_v", "to_out.0"]
        keys += _both(*(f"{side}mid_block.attentions.0.{part}" for part in parts))
    return [old_vae_name(key) for key in keys] if old else keys


# ---- scheduler_config.json

# The library's defaults for fields that a file lacks.
_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02,
             "beta_schedule": "linear", "prediction_type": "epsilon"}  # fmt: skip
_SAMPLERS = {
    "DDIMScheduler": (
        samplers.DDIM,
        {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True},
        {"clip_sample": (True, (False,)), "thresholding": (False, (False,)),
         "dynamic_thresholding_ratio": (0.995, (0.995,)), "clip_sample_range": (1.0, (1.0,)),
         "sample_max_value": (1.0, (1.0,))},
    ),
    "DDPMScheduler": (
        samplers.DDPM,
        {"timestep_spacing": "leading", "steps_offset": 0},
        {"variance_type": ("fixed_small", ("fixed_small",)), "clip_sample": (True, (False,)),
         "thresholding": (False, (False,)), "clip_sample_range": (1.0, (1.0,)),
         "dynamic_thresholding_ratio": (0.995, (0.995,)), "sample_max_value": (1.0, (1.0,))},
    ),
    "PNDMScheduler": (
        samplers.PNDM,
        {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": False},
        {"skip_prk_steps": (False, (True,))},
    ),
    "DPMSolverMultistepScheduler": (
        samplers.DPMSolverPP,
        {"timestep_spacing": "linspace", "steps_offset": 0, "use_karras_sigmas": False,
         "final_sigmas_type": "zero", "lower_order_final": True},
        {"solver_order": (2, (2,)), "algorithm_type": ("dpmsolver++", ("dpmsolver++",)),
         "solver_type": ("midpoint", ("midpoint",)), "thresholding": (False, (False,)),
         "euler_at_final": (False, (False,)), "use_lu_lambdas": (False, (False,)),
         "use_exponential_sigmas": (False, (False,)), "use_beta_sigmas": (False, (False,)),
         "use_flow_sigmas": (False, (False,)), "variance_type": (None, (None,)),
         "dynamic_thresholding_ratio": (0.995, (0.995,)), "sample_max_value": (1.0, (1.0,)),
         "flow_shift": (1.0, (1.0,)), "lambda_min_clipped": (-math.inf, (-math.inf,)),
         "use_dynamic_shifting": (False, (False,)),
         "time_shift_type": ("exponential", ("exponential",))},
    ),
    "EulerDiscreteScheduler": (
        samplers.Euler,
        {"timestep_spacing": "linspace", "steps_offset": 0, "use_karras_sigmas": False,
         "final_sigmas_type": "zero"},
        {"interpolation_type": ("linear", ("linear",)), "sigma_min": (None, (None,)),
         "timestep_type": ("discrete", ("discrete",)), "sigma_max": (None, (None,)),
         "use_exponential_sigmas": (False, (False,)), "use_beta_sigmas": (False, (False,))},
    ),
}  # fmt: skip
_FIELDS = {"timestep_spacing": "spacing", "steps_offset": "offset", "set_alpha_to_one": "to_one",
           "use_karras_sigmas": "karras", "lower_order_final": "lower_order_final"}  # fmt: skip


def schedule_from_hf(fields: Mapping) -> Schedule:
    """The training schedule of a scheduler_config.json of any scheduler of diffusers.

    Raises:
        ConfigError: for a schedule that is not ours.
    """
    kind = fields.get("_class_name")
    if fields.get("trained_betas") is not None:
        raise ConfigError(f"{kind}: trained_betas={fields['trained_betas']!r}, only None")
    # The class of PNDM doesn't have this field, and passes over it in a file.
    zero_snr = kind != "PNDMScheduler" and bool(fields.get("rescale_betas_zero_snr", False))
    return Schedule(**{k: fields.get(k, v) for k, v in _SCHEDULE.items()}, zero_snr=zero_snr)


def scheduler_from_hf(fields: Mapping) -> tuple[Schedule, samplers.Sampler]:
    """(training schedule, sampler) of a scheduler_config.json.

    Fields of other classes, which published files also contain, are passed over.

    Raises:
        ConfigError: for another scheduler, and for fields of this one that we don't implement,
            unless they have the value that we compute with; names all of them.
    """
    kind = fields.get("_class_name")
    if kind not in _SAMPLERS:
        raise ConfigError(f"scheduler {kind!r} is none of {', '.join(_SAMPLERS)}")
    sampler, defaults, required = _SAMPLERS[kind]
    wrong = [
        f"{name}={fields.get(name, default)!r}, only {accepted[0]!r}"
        for name, (default, accepted) in required.items()
        if fields.get(name, default) not in accepted
    ]
    if wrong:
        raise ConfigError(f"{kind}: {'; '.join(wrong)}")
    schedule = schedule_from_hf(fields)
    given = {k: fields.get(k, v) for k, v in defaults.items()}
    final = given.pop("final_sigmas_type", None)
    values = {_FIELDS[k]: v for k, v in given.items()}
    return schedule, sampler(**values, **({} if final is None else {"final_zero": final == "zero"}))


def scheduler_to_hf(schedule: Schedule, sampler: samplers.Sampler) -> dict:
    """scheduler_config.json of a schedule and a sampler."""
    if schedule.snr_shift != 1:
        raise ValueError(f"no scheduler of diffusers has snr_shift ({schedule.snr_shift})")
    kind = next(k for k, v in _SAMPLERS.items() if isinstance(sampler, v[0]))
    _, defaults, required = _SAMPLERS[kind]
    fields = {k: getattr(schedule, k) for k in _SCHEDULE}
    for name in defaults:
        if name == "final_sigmas_type":
            fields[name] = "zero" if sampler.final_zero else "sigma_min"
        else:
            fields[name] = getattr(sampler, _FIELDS[name])
    fields |= {name: accepted[0] for name, (_, accepted) in required.items()}
    fields |= {"trained_betas": None}
    if kind != "PNDMScheduler":
        fields["rescale_betas_zero_snr"] = schedule.zero_snr
    elif schedule.zero_snr:
        raise ValueError("diffusers' PNDMScheduler has no zero_snr; use DDIM")
    return {"_class_name": kind, "_diffusers_version": VERSION, **fields}


# ---- whole folders


@dataclasses.dataclass
class Pipeline:
    """The parts of a Stable Diffusion folder."""

    unet: UNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    schedule: Schedule
    sampler: samplers.Sampler


PARTS = {"unet": "sd-unet", "vae": "sd-vae", "text_encoder": "clip-text"}
_LIBRARY = {"unet": "diffusers", "vae": "diffusers", "text_encoder": "transformers"}


def is_pipeline(folder: pathlib.Path) -> bool:
    return (pathlib.Path(folder) / "model_index.json").is_file()


def _fields(file: pathlib.Path) -> dict:
    return files.read_json(file)


def load_part(folder: pathlib.Path, part: str, **overrides) -> nnx.Module:
    """One of `PARTS` with its weights, built as its config.json says."""
    family = families.known()[PARTS[part]]
    folder = pathlib.Path(folder) / part
    cfg = family.config_from_hf(_fields(folder / "config.json"), **overrides)
    model = nnx.eval_shape(lambda: family.create(cfg, rngs=build.rngs(0)))
    family.load(model, hf.Tensors(folder))
    return model


def load_pipeline(folder: str | pathlib.Path) -> Pipeline:
    """All parts of a diffusers folder."""
    folder = pathlib.Path(folder)
    kind = _fields(folder / "model_index.json").get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise ValueError(f"{folder}: {kind!r} is not a StableDiffusionPipeline")
    schedule, sampler = scheduler_from_hf(_fields(folder / "scheduler" / "scheduler_config.json"))
    return Pipeline(*(load_part(folder, part) for part in PARTS), schedule, sampler)


def save_pipeline(
    pipeline: Pipeline,
    folder: str | pathlib.Path,
    tokenizer: str | pathlib.Path,
    writer: Writer,
) -> int:
    """Writes a folder that `StableDiffusionPipeline.from_pretrained` loads unchanged.

    Args:
        folder: must not exist yet, or be empty.
        tokenizer: folder whose files become `tokenizer/`.
        writer: says how the weights are written.

    Returns:
        Bytes of all tensors.
    """
    folder, tokenizer = pathlib.Path(folder), pathlib.Path(tokenizer)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    if not tokenizer.is_dir():
        raise FileNotFoundError(f"no tokenizer folder {tokenizer}")
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": VERSION}
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    total = 0
    for part in PARTS:
        module = getattr(pipeline, part)
        total += families.known()[PARTS[part]].write(folder / part, module, Source(), writer)
        cfg = module.cfg
        index[part] = [_LIBRARY[part], _CLASSES.get(type(cfg), "CLIPTextModel")]
    scheduler = scheduler_to_hf(pipeline.schedule, pipeline.sampler)
    export.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    shutil.copytree(tokenizer, folder / "tokenizer")
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    export.write_json(folder / "model_index.json", index)  # last: a folder without it is incomplete
    return total


# ---- families

UNET_SIZES = {
    "sd15": UNetConfig.sd15(), "sd21": UNetConfig.sd21(), "small": UNetConfig.small(),
    "tiny": UNetConfig.tiny(),
}  # fmt: skip
VAE_SIZES = {"sd15": VAEConfig.sd15(), "sd21": VAEConfig.sd21(), "tiny": VAEConfig.tiny()}

FAMILIES = (
    Family(
        "sd-unet",
        ("UNet2DConditionModel",),
        unet_from_hf,
        unet_to_hf,
        lambda cfg, *, rngs: UNet(cfg, rngs),
        load_unet,
        names.lazy_torch_dict,
        UNET_SIZES,
        published_unet,
        Reference(
            compare.diffusers_model("UNet2DConditionModel"), compare.unet, library="diffusers"
        ),
    ),
    Family(
        "sd-vae",
        ("AutoencoderKL",),
        vae_from_hf,
        vae_to_hf,
        lambda cfg, *, rngs: AutoencoderKL(cfg, rngs),
        load_vae,
        names.lazy_torch_dict,
        VAE_SIZES,
        published_vae,
        Reference(compare.diffusers_model("AutoencoderKL"), compare.vae, library="diffusers"),
    ),
)

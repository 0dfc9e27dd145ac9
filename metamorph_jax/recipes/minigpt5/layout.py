"""Every key of a checkpoint with a whole MiniGPT-5, and of those with what it trained, from its
config alone.

Put together from what was published, and not from our own model, which is compared with it.
"""

from metamorph_jax.convert import blip2, clip_text, diffusion, mapper
from metamorph_jax.convert import llama as llama_names
from metamorph_jax.convert import vit as vit_names
from metamorph_jax.models.vision import vit
from metamorph_jax.recipes.minigpt5 import keys as names
from metamorph_jax.recipes.minigpt5.config import Config, llm_config


def published_keys(cfg: Config) -> list[str]:
    """The names of all tensors of a whole model without adapters."""
    decoder, llm = cfg.decoder, llama_names.config_to_hf(llm_config(cfg))
    found = [
        *(names.INSIDE + blip2.TOWER + key for key in _tower(cfg.vision.vit)),
        *(names.INSIDE + key for key in blip2.published_qformer(cfg.qformer.resampler)),
        *(names.INSIDE + names.LLM + key for key in llama_names.published(llm)),
        *(names.INSIDE + key for key in _prefix(cfg)),
        *mapper.published(cfg.mapper),
        *(
            f"unet.{key}"
            for key in diffusion.published_unet(diffusion.unet_to_hf(decoder.denoiser))
        ),
    ]
    if decoder.vae is not None:
        found += [f"vae.{k}" for k in diffusion.published_vae(diffusion.vae_to_hf(decoder.vae))]
    else:  # nothing like it was published
        found += ["pixel_mean", "pixel_scale"]
    if cfg.learns_captions:
        text = clip_text.published(clip_text.config_to_hf(cfg.text_encoder))
        found += [f"sd_text_encoder.{key}" for key in text]
    return found


def _tower(cfg: vit.ViTConfig) -> list[str]:
    """EVA, or another tower by its own names, as far as it is held."""
    if cfg.layout == "eva":
        return blip2.published_tower(cfg.held)
    found = vit_names.published(vit_names.config_to_hf(cfg))
    found = [key.removeprefix(vit_names.PREFIXES[cfg.layout]) for key in found]
    return [key for key in found if not vit_names.dropped(cfg, key)]


def _prefix(cfg: Config) -> list[str]:
    if cfg.prefix is None:
        return []
    start = "llama_model.prompt_encoder.default."
    linears = ("transform.0", "transform.2") if cfg.prefix.hidden else ()
    rest = [f"{start}{linear}.{leaf}" for linear in linears for leaf in ("weight", "bias")]
    return [f"{start}embedding.weight", *rest]


def stage1_keys(cfg: Config) -> list[str]:
    """The names in a file of stage 1."""
    llm = [f"model.llama_model.{key}" for key in ("model.embed_tokens.weight", "lm_head.weight")]
    return [*llm, *mapper.published(cfg.mapper)]


def stage2_keys(cfg: Config) -> list[str]:
    """The names in a file of stage 2 with adapters on queries and values, as in the public code:
    what stayed frozen is not in it."""
    start = "model.llama_model.base_model.model."
    found = [f"{start}{part}.modules_to_save.default.weight"
             for part in ("model.embed_tokens", "lm_head")]  # fmt: skip
    for n in range(llm_config(cfg).layers):
        for linear in ("q_proj", "v_proj"):
            part = f"{start}model.layers.{n}.self_attn.{linear}."
            found += [f"{part}lora_{half}.default.weight" for half in "AB"]
    whole = mapper.published(cfg.mapper)
    return [*found, *(key for key in whole if key.startswith(mapper.TRANSFORMER))]

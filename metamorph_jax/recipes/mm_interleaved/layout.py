"""Every key of a checkpoint in MM-Interleaved's layout, from its config alone.

Put together from what was published, and not from our own model, which is compared with it.
"""

from metamorph_jax.convert import diffusion, vit
from metamorph_jax.convert import llama as llama_names
from metamorph_jax.models.connectors.perceiver import PerceiverConfig
from metamorph_jax.models.diffusion.unet_mmfs import skips_of
from metamorph_jax.recipes.mm_interleaved import keys as names
from metamorph_jax.recipes.mm_interleaved.config import Config, llm_config


def published_keys(cfg: Config) -> list[str]:
    """The names of all tensors, those of buffers included."""
    visual = ["clip_mean", "clip_std", "pos_embed", *_both("pos_proj", "pos_ln", "post_ln", "proj")]
    return [
        names.SOI,
        names.NULL,
        *_both("context_feat_proj", "text_decoder.head", "text_decoder.head_new"),
        *(f"visual_tokenizer.{key}" for key in visual),
        *(f"{names.TOWER}vision_model.{key}" for key in _tower(cfg)),
        *(names.VISUAL + key for key in _resampler(cfg.vision.resampler)),
        *(names.CONTEXT + key for key in _resampler(cfg.context.resampler)),
        *(names.LLM + key for key in _llm(cfg)),
        *(names.DRAWING + key for key in _image_decoder(cfg)),
    ]


def _both(*parts: str) -> list[str]:
    return [f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")]


def _tower(cfg: Config) -> list[str]:
    """CLIP without its final norm, and the adapter."""
    own = vit.published(vit.config_to_hf(cfg.vision.vit))
    own = [key.removeprefix("vision_model.") for key in own if "post_layernorm" not in key]
    adapter = ["level_embed", *_both("up")]
    for n in (0, 3, 6):
        adapter += [f"spm.stem.{n}.weight", *_both(f"spm.stem.{n + 1}")]
    for n in (2, 3, 4):
        adapter += [f"spm.conv{n}.0.weight", *_both(f"spm.conv{n}.1")]
    adapter += _both(*(f"spm.fc{n}" for n in (1, 2, 3, 4)))
    for n in range(4):
        stage = f"interactions.{n}."
        adapter += [f"{stage}injector.gamma", *_attention(f"{stage}injector.")]
        adapter += _extractor(f"{stage}extractor.")
    for n in range(2):
        adapter += _extractor(f"interactions.3.extra_extractors.{n}.")
    return [*own, "embeddings.position_ids", *(f"adapter_{key}" for key in adapter)]


def _attention(prefix: str) -> list[str]:
    parts = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    return _both(f"{prefix}query_norm", f"{prefix}feat_norm", *(f"{prefix}attn.{p}" for p in parts))


def _extractor(prefix: str) -> list[str]:
    parts = ("ffn_norm", "ffn.fc1", "ffn.dwconv.dwconv", "ffn.fc2")
    return _attention(prefix) + _both(*(prefix + part for part in parts))


def _resampler(cfg: PerceiverConfig) -> list[str]:
    found = ["queries", *_both("blip2qformer.layernorm")]
    for n in range(cfg.layers):
        layer = f"blip2qformer.encoder.layer.{n}."
        crosses = [] if n % cfg.cross_every else ["crossattention"]
        for part in ("attention", *crosses):
            normed = ("q_norm", "k_norm") if cfg.qk_norm else ()
            inside = (f"attention.{x}" for x in ("query", "key", "value", *normed))
            outside = ("output.dense", "output.LayerNorm")
            found += _both(*(f"{layer}{part}.{x}" for x in (*inside, *outside)))
        rest = ("intermediate_query.dense", "output_query.dense", "output_query.LayerNorm")
        found += _both(*(layer + x for x in rest))
    return found


def _mmfs(prefix: str) -> list[str]:
    linears = ("dynamic_offset_mask", "sampling_offsets", "attention_weights", "value_proj",
               "output_proj")  # fmt: skip
    alone = [f"{prefix}query_relpos.weight", f"{prefix}ignore_token"]
    return alone + _both(*(prefix + linear for linear in linears))


def _llm(cfg: Config) -> list[str]:
    """Llama without the output table, and MMFS in every nth layer."""
    llm = llm_config(cfg)
    own = llama_names.published(llama_names.config_to_hf(llm))
    found = [key.removeprefix("model.") for key in own if key != llama_names.HEAD]
    for n in range(llm.layers):
        found.append(f"layers.{n}.self_attn.rotary_emb.inv_freq")
        if n % cfg.insert.every == 0:
            block = f"layers.{n}.llama_cross_attn."
            found += [f"{block}{x}" for x in ("gate", "norm1.weight", "norm2.weight")]
            found += _mmfs(f"{block}attn.")
    return found


def _image_decoder(cfg: Config) -> list[str]:
    """UNet, autoencoder, and MMFS on every skip and in the middle."""
    decoder = cfg.decoder
    unet = decoder.denoiser.unet
    found = [f"unet.{k}" for k in diffusion.published_unet(diffusion.unet_to_hf(unet))]
    if decoder.vae is not None:
        found += [f"vae.{k}" for k in diffusion.published_vae(diffusion.vae_to_hf(decoder.vae))]
    else:  # nothing like it was published
        found += ["pixel_mean", "pixel_scale"]
    blocks = [f"mmfs_down_blocks.{n}" for n in range(len(skips_of(unet)))]
    for block in (*blocks, "mmfs_mid_block"):
        block = f"mmfs_module.{block}."
        found += [
            f"{block}pos_embed",
            *_both(*(block + x for x in ("query_norm", "feat_norm", "conv"))),
        ]
        found += _mmfs(f"{block}mmfs.")
    return found

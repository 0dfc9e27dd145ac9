"""The tiny model of the golden set's end-to-end cases, and its batch."""

import numpy as np
from flax import nnx

from metamorph_jax.data.images import Preprocess
from metamorph_jax.models import build
from metamorph_jax.models.connectors.perceiver import PerceiverConfig
from metamorph_jax.models.diffusion.decoder import DiffusionConfig
from metamorph_jax.models.diffusion.unet import UNetConfig
from metamorph_jax.models.diffusion.unet_mmfs import UNetMMFSConfig
from metamorph_jax.models.diffusion.vae import VAEConfig
from metamorph_jax.models.heads.context import ContextConfig
from metamorph_jax.models.vision.vit import SIZES
from metamorph_jax.models.vision.vit_adapter import AdapterConfig
from metamorph_jax.recipes import mm_interleaved as recipe
from metamorph_jax.recipes.mm_interleaved.config import InsertConfig, VisualConfig
from metamorph_jax.recipes.mm_interleaved.keys import load_mm_interleaved
from metamorph_jax.types import TEXT, Batch, Drawings, Images

GROUPS = 4  # of the group norms in UNet and autoencoder, which the descriptor doesn't tell
DENSE = "dense"  # compiles in half the time of "gather", and gives the same numbers


def config(case) -> recipe.Config:
    """The config that a case's descriptor describes."""
    c, shapes = case.config, {k: v["shape"] for k, v in case._params().items()}
    count = lambda *parts: sum(  # noqa: E731
        1 for k in shapes if k.startswith(parts[0]) and k.endswith(parts[1])
    )
    llm, ids = c["llm"], c["special_tokens"]
    side = case["in/image_tensors_14x14"].shape[-1] * 16
    insert = shapes["mm_decoder.layers.0.llama_cross_attn.attn.value_proj.weight"]
    return recipe.Config(
        llm="tiny",
        llm_options=dict(
            vocab_size=llm["vocab"], width=llm["dim"], mlp_width=llm["inter"],
            layers=llm["layers"], heads=llm["heads"], kv_heads=llm["heads"],
            head_dim=llm["dim"] // llm["heads"], norm_eps=1e-6, tied=False,
        ),
        vision=_visual(c, shapes, side, count),
        insert=InsertConfig(
            c["freq"], c["llm_mmfs"]["heads"], c["llm_mmfs"]["points"], insert[0] / llm["dim"],
            len(c["spatial"]), c["llm_mmfs"]["base"], c["llm_mmfs"]["max_images"], method=DENSE,
        ),
        context=ContextConfig(llm["dim"], c["seq_len"], _perceiver(
            c["perc_i"], llm["dim"], c["perc_i"]["num_queries"], qk_norm=False, cross_every=1
        )),
        decoder=_decoder(c, shapes, count),
        max_drawings=int(case["in/num_image_per_seq"].max()),
        drop_context=c["uncond_prob"],
        document_bos=ids["bos_token_id"],
        text_chunk=64,
    )  # fmt: skip


def _perceiver(c, key_width, queries, **more) -> PerceiverConfig:
    return PerceiverConfig(
        queries, c["hidden_size"], c["num_attention_heads"], c.get("num_hidden_layers", 1),
        c["intermediate_size"], key_width, **more,
    )  # fmt: skip


def _visual(c, shapes, side, count) -> VisualConfig:
    clip, adapter = c["clip"], c["adapter"]
    layers = count("visual_tokenizer.encoder.vision_model.encoder.layers.", "layer_norm1.bias")
    queries = shapes["visual_tokenizer.perceiver_resampler.queries"][1]
    crosses = count("visual_tokenizer.perceiver_resampler.", "crossattention.output.dense.bias")
    options = dict(
        image_size=side, patch=clip["patch"], width=clip["dim"], mlp_width=clip["inter"],
        layers=layers, heads=clip["heads"], select_layer=-1,
    )  # fmt: skip
    every = -(-c["perc_v"]["num_hidden_layers"] // crosses)
    return VisualConfig(
        "clip-tiny",
        options,
        adapter=AdapterConfig(
            points=adapter["points"], value_ratio=adapter["deform_ratio"],
            prior_width=adapter["conv_inplane"], method=DENSE,
        ),
        resampler=_perceiver(c["perc_v"], clip["dim"], queries, cross_every=every),
    )  # fmt: skip


def _decoder(c, shapes, count) -> DiffusionConfig:
    mmfs, unet = c["mmfs_unet"], "image_decoder.decoder.unet."
    vae = "image_decoder.decoder.vae.encoder.down_blocks."
    levels = len(c["unet"])
    width = shapes["image_decoder.decoder.mmfs_module.mmfs_mid_block.mmfs.value_proj.weight"][0]
    assert width == mmfs["attn_dim"]
    crossing = [f"{unet}down_blocks.{k}.attentions.0.norm.bias" in shapes for k in range(levels)]
    down = tuple("CrossAttnDownBlock2D" if x else "DownBlock2D" for x in crossing)
    up = tuple("CrossAttnUpBlock2D" if x else "UpBlock2D" for x in crossing[::-1])
    return DiffusionConfig(
        UNetMMFSConfig(
            UNetConfig(
                sample_size=mmfs["grid_size"], block_out_channels=tuple(c["unet"]),
                down_block_types=down, up_block_types=up,
                layers_per_block=count(f"{unet}down_blocks.0.resnets.", "norm1.bias"),
                cross_attention_dim=c["perc_i"]["hidden_size"], num_heads=(c["heads_u"],) * levels,
                use_linear_projection=len(
                    shapes[f"{unet}mid_block.attentions.0.proj_in.weight"]) == 2,
                norm_num_groups=GROUPS,
            ),
            value_width=c["img_dim"], inner_width=width, heads=mmfs["heads"],
            points=mmfs["points"],
            sides=tuple(mmfs["spatial_shapes_for_scale"]),
            relative_rows=shapes[
                "image_decoder.decoder.mmfs_module.mmfs_mid_block.mmfs.query_relpos.weight"][0],
            middle_base=mmfs["base_shapes_per_resolution"][-1], method=DENSE,
        ),
        VAEConfig(
            block_out_channels=tuple(
                shapes[f"{vae}{k}.resnets.0.conv1.weight"][0]
                for k in range(count(vae, "resnets.0.norm1.bias"))
            ),
            layers_per_block=count(f"{vae}0.resnets.", "norm1.bias"), norm_num_groups=GROUPS,
        ),
    )  # fmt: skip


def model(case, cfg: recipe.Config) -> recipe.MMInterleaved:
    """The model with the case's weights, loaded by the published names."""
    made = nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0)))
    load_mm_interleaved(made, case.weights())
    for statistic, value in ((made.decoder.pixel_mean, 0.0), (made.decoder.pixel_scale, 1.0)):
        statistic.set_raw_value(np.full(3, value, np.float32))
    return made


def pixels(case, cfg: recipe.Config) -> np.ndarray:
    """float32[n, h, w, 3]: the case's images, normalised for the tower."""
    images = np.moveaxis(case["in/image_tensors_14x14"], 1, -1).repeat(16, 1).repeat(16, 2)
    tower = SIZES[cfg.vision.tower]
    return Preprocess(mean=tower.mean, std=tower.std).normalise(images * 255)


def batch(case, cfg: recipe.Config, setting: str) -> Batch:
    """The case's rows, each of them one segment, with the targets of a dataset setting."""
    ids, real = case["in/text_ids"], case["in/attention_mask"] > 0
    special, counts = case.config["special_tokens"], case["in/num_image_per_seq"]
    (B, L), most, P = ids.shape, int(counts.max()), cfg.vision.tokens
    targets = case[f"out/{setting}/gt_text_ids"]
    here = ids == special["image_token_id"]
    slots = np.where(here, np.cumsum(here, axis=1) - 1, TEXT)
    valid = np.arange(most) < counts[:, None]
    start = np.zeros((B, most), np.int32)
    start[valid] = np.argwhere(ids == special["soi_token_id"])[:, 1] + 1
    side = cfg.decoder.image_side
    shown = _rows(pixels(case, cfg), valid)
    drawn = np.moveaxis(case["in/image_tensors_dec_16x16"], 1, -1).repeat(4, 1).repeat(4, 2) * 255
    assert drawn.shape[1] == side and (slots.max(1) + 1 == counts * P).all()
    return Batch(
        tokens=np.where(here, 0, ids).astype(np.int32),
        positions=np.broadcast_to(np.arange(L, dtype=np.int32), (B, L)),
        segments=real.astype(np.int32),
        text_targets=np.pad(np.where(targets < 0, -1, targets), ((0, 0), (0, 1)),
                            constant_values=-1).astype(np.int32),
        image_slots=slots.astype(np.int32),
        visual_targets=np.full((B, L), -1, np.int32),
        sources=np.zeros((B, L), np.int32),
        images=Images(valid, start, shown),
        drawings=Drawings(valid, np.maximum(start - 1, 0), _rows(drawn, valid)),
        source_names=(setting,),
    )  # fmt: skip


def _rows(flat: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[B, I, ...] of what a flat list of images has, zeros at the other places."""
    out = np.zeros((*valid.shape, *flat.shape[1:]), np.float32)
    out[valid] = flat
    return out

"""The reference's whole tiny system as a model of ours, and the batches of its cases."""

import re

import numpy as np
from flax import nnx

from metamorph_jax.convert import blip2, clip_text, diffusion, mapper, vit
from metamorph_jax.convert.llama import load_llama
from metamorph_jax.models import build
from metamorph_jax.models.connectors.perceiver import PerceiverConfig
from metamorph_jax.models.connectors.qformer import QFormerConfig
from metamorph_jax.models.diffusion.clip_text import CLIPTextConfig
from metamorph_jax.models.diffusion.decoder import DiffusionConfig
from metamorph_jax.models.heads.mapper import MapperConfig
from metamorph_jax.models.lora import LoraConfig
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.recipes import minigpt5 as recipe
from metamorph_jax.types import Batch, Drawings, Images
from tests.recipes.minigpt5 import golden

IGNORE = -100


def system(root, case) -> golden.Case:
    """The case that has the weights of this one."""
    return golden.Case(root, case.about["weights"].removesuffix(".safetensors"))


def config(case: golden.Case, **changes) -> recipe.Config:
    """Of a case with weights."""
    about, weights = case.about, case.weights()
    fields = about["vision"]
    tower = dict(
        image_size=fields["img_size"], patch=fields["patch"], width=fields["dim"],
        heads=fields["heads"], mlp_width=len(weights["visual_encoder.blocks.0.mlp.fc1.bias"]),
        layers=_count(weights, "visual_encoder.blocks."),
    )  # fmt: skip
    tokens = (tower["image_size"] // tower["patch"]) ** 2 + 1
    return recipe.Config(
        llm="tiny",
        llm_options=_llm(about["llama_config"]),
        vision=VisionConfig("eva-tiny", tower, tokens=tokens, normalize=False),
        qformer=QFormerConfig(_resampler(about["qformer"], weights, tower["width"])),
        mapper=_mapper(about["mapper"]),
        decoder=DiffusionConfig(
            diffusion.unet_from_hf(about["unet_config"]),
            diffusion.vae_from_hf(about["vae_config"]),
            min_snr=5.0,
        ),
        text_encoder=_text(about["sd_text_encoder_config"], weights),
        lora=_lora(about["lora"]),
        **changes,
    )


def _count(weights, prefix: str) -> int:
    return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in weights if k.startswith(prefix))


def _llm(fields) -> dict:
    assert fields["rope"] == "rotate-half"
    heads, width = fields["num_heads"], fields["hidden_size"]
    return dict(
        vocab_size=fields["vocab_size_original"], width=width, layers=fields["num_layers"],
        mlp_width=fields["intermediate_size"], heads=heads, kv_heads=heads, head_dim=width // heads,
        norm_eps=fields["rms_norm_eps"], rope_theta=float(fields["rope_base"]), tied=False,
    )  # fmt: skip


def _resampler(fields, weights, key_width: int) -> PerceiverConfig:
    layers = [f"Qformer.bert.encoder.layer.{n}.crossattention.self.key.weight" in weights
              for n in range(fields["layers"])]  # fmt: skip
    every = fields["layers"] // sum(layers)
    assert layers == [n % every == 0 for n in range(len(layers))]
    return PerceiverConfig(
        queries=fields["queries"], width=fields["hidden"], heads=fields["heads"],
        layers=fields["layers"], key_width=key_width, cross_every=every, qk_norm=False,
        mlp_width=len(weights["Qformer.bert.encoder.layer.0.intermediate_query.dense.bias"]),
    )  # fmt: skip


def _mapper(fields) -> MapperConfig:
    assert fields["activation"] == "relu" and fields["norm_first"] is True
    return MapperConfig(
        width=fields["llm_hidden"], vokens=fields["vokens"], inner=fields["d_model"],
        heads=fields["nhead"], encoder_layers=fields["encoder_layers"],
        decoder_layers=fields["decoder_layers"], mlp_width=fields["dim_feedforward"],
        queries=fields["queries"], norm_eps=fields["layer_norm_eps"],
    )  # fmt: skip


def _text(fields, weights) -> CLIPTextConfig:
    inside = "sd_text_encoder.text_model."
    return CLIPTextConfig(
        vocab_size=len(weights[f"{inside}embeddings.token_embedding.weight"]),
        hidden_size=fields["hidden"], num_hidden_layers=fields["layers"],
        intermediate_size=len(weights[f"{inside}encoder.layers.0.mlp.fc1.bias"]),
        num_attention_heads=fields["heads"], max_position_embeddings=fields["max_positions"],
        hidden_act=fields["act"], eos_token_id=fields["eos"],
    )  # fmt: skip


def _lora(fields) -> LoraConfig | None:
    if fields is None:
        return None
    assert fields["scaling"] == fields["alpha"] / fields["r"]
    targets = "|".join(fields["targets"])
    return LoraConfig(rf"llm\.layers\.self_attn\.({targets})", fields["r"], float(fields["alpha"]))


def model(case: golden.Case, cfg: recipe.Config) -> recipe.MiniGPT5:
    """With the case's weights, loaded by the published names of its parts."""
    made = nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0)))
    weights = case.weights()

    def inside(*prefixes: str) -> dict:
        return {k: v for k, v in weights.items() if k.startswith(prefixes)}

    def without(prefix: str) -> dict:
        return {k.removeprefix(prefix): v for k, v in inside(prefix).items()}

    vit.load_vit(made.vision.tower, inside("visual_encoder."))
    blip2.load_qformer(
        made.connector, inside("ln_vision.", "Qformer.", "query_tokens", "llama_proj.")
    )
    _load_llm(made, without("llama_model."))
    mapper.load_mapper(made.mapper, inside("fc.", "t2i_decoder_prompt", "llm_to_t2i_mapping."))
    diffusion.load_unet(made.decoder.denoiser, without("unet."))
    diffusion.load_vae(made.decoder.vae, without("vae."))
    clip_text.load_clip_text(made.text_encoder, without("sd_text_encoder."))
    for statistic, value in ((made.decoder.pixel_mean, 0.0), (made.decoder.pixel_scale, 1.0)):
        statistic.set_raw_value(np.full(3, value, np.float32))
    return made


def _load_llm(made: recipe.MiniGPT5, tensors: dict) -> None:
    """By the names of transformers, or those of PEFT around them."""
    plain, halves = {}, {}
    for key, value in tensors.items():
        key = key.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        (halves if ".lora_" in key else plain)[key.replace(".base_layer", "")] = value
    load_llama(made.llm, plain)
    attention = made.llm.layers.self_attn
    for key in halves:
        _, _, _, _, name, half, *_ = key.split(".")
        layers = [halves[key.replace(".0.", f".{n}.", 1)].T for n in range(made.llm.cfg.layers)]
        if ".0." in key:
            vars(vars(attention)[name])[half.lower()].set_raw_value(np.stack(layers))


def of_adapter(made: recipe.MiniGPT5, name: str) -> np.ndarray:
    """What the model has for a tensor with PEFT's name: of layer N, in torch's layout."""
    layer, projection, half = re.search(r"layers\.(\d+)\.self_attn\.(\w+)\.(lora_.)", name).groups()
    linear = vars(made.llm.layers.self_attn)[projection]
    return np.asarray(vars(linear)[half.lower()][...])[int(layer)].T


def ids_of(about: dict, text: str | None, cfg: CLIPTextConfig) -> np.ndarray:
    """int32[P] of a caption given as ids separated by spaces; -1 where there is none."""
    found = np.zeros(cfg.max_position_embeddings, np.int32)
    if text is None:
        return found - 1
    ids = [cfg.eos_token_id - 1, *map(int, text.split()), cfg.eos_token_id]
    found[: len(ids)] = ids
    return found


def spliced(case: golden.Case, cfg: recipe.Config):
    """(tokens, labels, slots, real), int32[B, L] each: a begin token in front, and the queries of
    an image at its placeholder."""
    *_, placeholder = voken_and_placeholder(cfg)
    rows, P = [], cfg.qformer.tokens
    for ids, labels, mask in zip(
        case["in.input_ids"], case["in.labels"], case["in.attention_mask"], strict=True
    ):
        row, image = [(1, IGNORE, -1, 1)], 0
        for one, label, real in zip(ids, labels, mask, strict=True):
            if one == placeholder and real:
                row += [(0, IGNORE, image * P + k, 1) for k in range(P)]
                image += 1
            else:
                row.append((one, label, -1, real))
        rows.append(row)
    length = max(map(len, rows))
    rows = [row + [(0, IGNORE, -1, 0)] * (length - len(row)) for row in rows]
    return np.moveaxis(np.array(rows, np.int32), 2, 0)


def longest(root) -> int:
    """Columns of the longest row of all training cases."""
    about = golden.descriptors(root).values()
    shapes = [x["tensors"].get("out.llm_logits") for x in about if "tensors" in x]
    return max(shape[0][1] for shape in shapes if shape)


def voken_and_placeholder(cfg: recipe.Config) -> tuple[int, ...]:
    ids = recipe.voken_ids(cfg)
    return *ids, ids[-1] + 1


def batch(case: golden.Case, cfg: recipe.Config, root) -> Batch:
    """The case's rows, each of them one segment; drawings are a row's, if it has vokens. Rows are
    padded to the longest of all cases, so that all have one shape.

    Pixels to draw are float32, in the units of uint8.
    """
    length = longest(root)
    pad = lambda x, fill: np.pad(  # noqa: E731
        x, ((0, 0), (0, length - x.shape[1])), constant_values=fill
    )
    found = zip(spliced(case, cfg), (0, IGNORE, -1, 0), strict=True)
    tokens, labels, slots, real = (pad(x, fill) for x, fill in found)
    first = recipe.voken_ids(cfg)[0]
    B, L = tokens.shape
    stacks = [case[f"in.input_images_{b}"] for b in range(B)]
    shown = np.zeros(
        (B, max(map(len, stacks)), *np.moveaxis(stacks[0], 1, -1).shape[1:]), np.float32
    )
    for b, stack in enumerate(stacks):
        shown[b, : len(stack)] = np.moveaxis(stack, 1, -1)
    targets = np.full((B, L), -1, np.int32)
    targets[:, :-1] = np.where(labels == IGNORE, -1, labels)[:, 1:]
    drawn = np.argwhere(targets == first)
    np.testing.assert_array_equal(drawn, case["out.voken_start_index"].reshape(-1, 2))
    valid, start = np.zeros((B, 1), bool), np.zeros((B, 1), np.int32)
    valid[drawn[:, 0], 0], start[drawn[:, 0], 0] = True, drawn[:, 1]
    captions = [ids_of(case.about, text, cfg.text_encoder)
                for text in case.about["captions_as_sd_token_ids"]]  # fmt: skip
    images = {}
    if "in.output_image" in case.arrays:
        images["pixels"] = (np.moveaxis(case["in.output_image"], 1, -1)[:, None] + 1) * 127.5
    return Batch(
        tokens=tokens,
        positions=np.broadcast_to(np.arange(L, dtype=np.int32), (B, L)),
        segments=real,
        text_targets=targets,
        image_slots=slots,
        visual_targets=np.full((B, L), -1, np.int32),
        sources=np.zeros((B, L), np.int32),
        images=Images(np.ones(shown.shape[:2], bool), np.zeros(shown.shape[:2], np.int32), shown),
        drawings=Drawings(valid, start, **images, captions=np.stack(captions)[:, None]),
        source_names=("reference",),
    )

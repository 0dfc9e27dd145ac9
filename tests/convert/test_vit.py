"""Towers: complete key lists, configs, and whole checkpoints both ways."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from metamorph_jax.convert import blip2, check, compare, families, hf, vit
from metamorph_jax.models import build
from metamorph_jax.models.vision.vit import SIZES, ViT, resize_positions
from tests.convert.conftest import ORACLE

# The vision half of config.json of the published repositories, as it is.
SO400M = {
    "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
    "model_type": "siglip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 27,
    "patch_size": 14,
}  # fmt: skip
SO400M_TEXT = {
    "hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_text_model",
    "num_attention_heads": 16, "num_hidden_layers": 27,
}  # fmt: skip
CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336,
    "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
    "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-05, "projection_dim": 768,
}  # fmt: skip
CLIP_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
             "num_hidden_layers": 12}  # fmt: skip
DINO_B = {
    "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 768,
    "image_size": 518, "layer_norm_eps": 1e-06, "mlp_ratio": 4, "num_attention_heads": 12,
    "num_hidden_layers": 12, "patch_size": 14, "qkv_bias": True, "use_swiglu_ffn": False,
}  # fmt: skip
PUBLISHED = {
    "siglip-so400m-384": {"model_type": "siglip", "vision_config": SO400M,
                          "text_config": SO400M_TEXT},
    "siglip-base-224": {"model_type": "siglip", "vision_config": {}, "text_config": {}},
    "siglip2-so400m-512": {"model_type": "siglip", "text_config": SO400M_TEXT | {
        "vocab_size": 256000}, "vision_config": SO400M | {"image_size": 512, "patch_size": 16}},
    "clip-l-336": {"model_type": "clip", "vision_config": CLIP_L, "text_config": CLIP_TEXT,
                   "projection_dim": 768},
    "dinov2-b14": DINO_B,
    "dinov2-b14-registers": DINO_B | {"model_type": "dinov2_with_registers",
                                      "num_register_tokens": 4},
}  # fmt: skip


def abstract(cfg):
    return nnx.eval_shape(lambda: ViT(cfg, rngs=build.rngs(0)))


def meta(fields) -> dict:
    """name -> shape of transformers' whole model, which holds no numbers."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    config = transformers.AutoConfig.for_model(**fields)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    return {file_name(k): tuple(v.shape) for k, v in model.state_dict().items()}


def file_name(key: str) -> str:
    """transformers 5 renames DINOv2's attention in memory; files keep the old names."""
    for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        if key.startswith("encoder.layer."):
            key = key.replace(f"attention.{new}", f"attention.attention.{old}")
    return key.replace("attention.o_proj", "attention.output.dense")


@pytest.mark.parametrize("size", PUBLISHED)
def test_full_sizes_have_exactly_the_published_tensors(size):
    fields = PUBLISHED[size]
    keys, cfg = vit.published(fields), vit.config_from_hf(fields)
    out = vit.export_vit(abstract(cfg))
    theirs = meta(fields)
    assert sorted(keys) == sorted(theirs)
    # What is not ours is the other half of a two-tower model, and nothing else.
    assert set(keys) - set(out) == {k for k in keys if k.startswith(vit.OTHER)}
    assert {k: out.shape_of(k) for k in out} == {k: theirs[k] for k in out}
    same = dict(select_layer=-1, final_norm=True, whole=True, pool=cfg.layout == "siglip")
    assert dataclasses.replace(SIZES[size], **same) == cfg


@pytest.mark.parametrize("kind", ["siglip", "siglip-both", "clip-vision", "clip-both", "dinov2",
                                  "dinov2-registers"])  # fmt: skip
def test_whole_checkpoints_survive_both_ways(kind, tiny, tmp_path):
    """Every tensor comes back in its bytes, and transformers loads the folder unchanged."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    folder = tiny(kind)
    fields, tensors = hf.read_config(folder), hf.Tensors(folder)
    family = families.detect(folder)
    model = abstract(family.config_from_hf(fields))
    family.load(model, tensors)
    out = dict(family.export(model))
    own = {k.removeprefix("vision_model."): v for k, v in tensors.items()
           if not k.startswith(vit.OTHER)}  # fmt: skip
    assert {k.removeprefix("vision_model.") for k in out} == set(own)
    for key, value in out.items():
        given = np.ascontiguousarray(own[key.removeprefix("vision_model.")])
        assert value.tobytes() == given.tobytes() and value.shape == given.shape, key
    config = family.config_to_hf(model.cfg)
    assert family.config_from_hf(json.loads(json.dumps(config))) == model.cfg
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(out, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = getattr(transformers, config["architectures"][0])
    again, info = theirs.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert sum(v.numel() for v in again.state_dict().values()) == sum(v.size for v in out.values())
    assert torch.is_tensor(next(iter(again.state_dict().values())))


def test_a_tower_that_holds_less_says_so(tiny):
    """Layers behind the selected one are dropped: the config has as many as there are weights."""
    tensors = hf.Tensors(tiny("siglip"))
    cfg = dataclasses.replace(SIZES["siglip-tiny"], select_layer=1, input_size=16)
    tower = abstract(cfg)
    vit.load_vit(tower, tensors)
    fields = vit.config_to_hf(cfg)
    assert fields["num_hidden_layers"] == 1 and fields["image_size"] == 16
    assert not fields["vision_use_head"]
    out = set(vit.export_vit(tower))
    norm = {f"vision_model.post_layernorm.{leaf}" for leaf in ("weight", "bias")}
    assert out == set(vit.published(fields)) - norm


def test_a_whole_tower_gives_the_state_that_was_asked_for(tiny):
    """It has the layers behind that state, but doesn't run them."""
    tensors = hf.Tensors(tiny("clip-vision"))
    pixels = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    states = []
    for whole in (False, True):
        tower = abstract(dataclasses.replace(SIZES["clip-tiny"], mlp_width=64, whole=whole))
        vit.load_vit(tower, tensors)
        states.append(np.asarray(tower(pixels)))
    np.testing.assert_array_equal(*states)


def test_keys_of_no_part_are_errors(tiny):
    tensors = dict(hf.Tensors(tiny("siglip-both"))) | {"stray.weight": np.zeros(1)}
    with pytest.raises(ValueError, match=r"left over \(1\): stray.weight"):
        vit.load_vit(abstract(vit.config_from_hf(hf.read_config(tiny("siglip-both")))), tensors)


@pytest.mark.parametrize(
    "fields, words",
    [({"model_type": "siglip2"}, "NaFlex"), ({"model_type": "vit"}, "'vit'"),
     (DINO_B | {"use_swiglu_ffn": True}, "use_swiglu_ffn"),
     (SO400M | {"hidden_act": "relu"}, "relu"), (SO400M | {"num_channels": 1}, "RGB")],
)  # fmt: skip
def test_what_is_not_supported_is_named(fields, words):
    with pytest.raises(ValueError, match=words):
        vit.config_from_hf(fields)


def test_positions_of_towers_with_registers_are_resized_as_torch_does():
    torch = pytest.importorskip("torch", reason=ORACLE)
    table = np.random.default_rng(0).normal(size=(1 + 81, 5)).astype(np.float32)
    for grid in (4, 12):
        square = torch.from_numpy(table[1:].reshape(1, 9, 9, 5).transpose(0, 3, 1, 2).copy())
        theirs = torch.nn.functional.interpolate(
            square, size=(grid, grid), mode="bicubic", antialias=True
        )
        theirs = theirs.numpy()[0].transpose(1, 2, 0).reshape(-1, 5)
        np.testing.assert_allclose(
            resize_positions(table, grid, 1, antialias=True)[1:], theirs, atol=2e-6
        )


# ---- EVA

# config.json of a published BLIP-2, as far as it belongs to the tower.
BLIP2 = {"model_type": "blip-2", "vision_config": {"model_type": "blip_2_vision_model"}}
EVA = SIZES["eva-tiny"]


def eva_tensors(prefix: str = "", cfg=EVA) -> dict[str, np.ndarray]:
    """Random float16 tensors, as the tower's own file has them."""
    out, rng = vit.export_vit(abstract(cfg), prefix), np.random.default_rng(0)
    return {key: rng.normal(size=out.shape_of(key)).astype(np.float16) for key in out}


def test_eva_full_size():
    """Every block of the published file but the last one, which BLIP-2 doesn't run."""
    cfg = SIZES["eva-g-224"]
    assert vit.config_from_hf(BLIP2) == cfg and vit.disagreements(cfg, BLIP2) == []
    out = vit.export_vit(abstract(cfg), "")
    assert sorted(out) == sorted(blip2.published_tower(39))
    shapes = {"cls_token": (1, 1, 1408), "pos_embed": (1, 257, 1408),
              "patch_embed.proj.weight": (1408, 3, 14, 14), "patch_embed.proj.bias": (1408,),
              "blocks.38.attn.qkv.weight": (4224, 1408), "blocks.0.attn.q_bias": (1408,),
              "blocks.38.mlp.fc1.weight": (6144, 1408)}  # fmt: skip
    assert {key: out.shape_of(key) for key in shapes} == shapes
    D, F = 1408, 6144
    block = 4 * D * D + 2 * D * F + (3 + 1 + 4) * D + F  # three biases, that of fc2, two norms
    total = sum(int(np.prod(out.shape_of(key))) for key in out)
    assert total == 39 * block + (257 + 1 + 3 * 14**2 + 1) * D


def test_eva_in_and_out():
    """The tower's own file, with a block more, a norm and a head; and inside a larger one."""
    own = eva_tensors()
    more = {f"blocks.{EVA.layers}{key[8:]}": value for key, value in own.items()
            if key.startswith("blocks.0")}  # fmt: skip
    more |= {f"{part}.{leaf}": np.zeros(3) for part in ("norm", "fc_norm", "head")
             for leaf in ("weight", "bias")}  # fmt: skip
    tower = abstract(EVA)
    vit.load_vit(tower, own | more)
    out = vit.export_vit(tower, "")
    assert sorted(out) == sorted(own)
    for key, value in own.items():
        np.testing.assert_array_equal(out[key], value, err_msg=key)
    assert not np.any(tower.layers.self_attn.k_proj.bias[...])
    others = ("ln_vision.weight", "Qformer.bert.embeddings.position_ids", "query_tokens",
              "t5_proj.bias", "llama_proj.bias", "language_model.lm_head.weight")  # fmt: skip
    others = dict.fromkeys(others, np.zeros(3))
    inside = {f"visual_encoder.{key}": value for key, value in own.items()}
    again = abstract(EVA)
    vit.load_vit(again, inside | others)
    assert sorted(vit.export_vit(again)) == sorted(inside)
    stray = {f"blocks.{EVA.layers + 1}.norm1.bias": np.zeros(32), "rel_pos": np.zeros(3)}
    with pytest.raises(ValueError, match="rel_pos") as error:
        vit.load_vit(abstract(EVA), own | stray)
    assert "blocks.3.norm1.bias" in str(error.value)


def test_eva_against_transformers():
    """Under transformers' names, and the numbers that its tower computes."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    own = vit.config_to_hf(EVA)
    fields = {k: v for k, v in own.items() if k not in ("model_type", "architectures")}
    model = transformers.Blip2VisionModel(
        transformers.Blip2VisionConfig(**fields, attn_implementation="eager")
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
            if name.endswith("qkv.bias"):  # as published
                parameter[32:64] = 0
    tensors = {f"vision_model.{k}": v.numpy() for k, v in model.state_dict().items()}
    tower = abstract(vit.config_from_hf(own))
    assert tower.cfg == EVA
    vit.load_vit(tower, tensors)
    rows = compare.vit(tower, model, np.random.default_rng(0))
    assert len(rows) == EVA.layers + 1 and check.report(rows, 1e-4)
    found = {f"vision_model.{key}": value for key, value in blip2.for_transformers(
        vit.export_vit(tower)).items()}  # fmt: skip
    assert found.keys() == {key for key in tensors if "post_layernorm" not in key}
    for key, value in found.items():
        np.testing.assert_array_equal(value, tensors[key], err_msg=key)

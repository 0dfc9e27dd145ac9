"""LLaVA 1.5: three namings in, two out, transformers' model loads what we write."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from metamorph_jax.convert import check, hf, vit
from metamorph_jax.recipes.metamorph import llava, llm_config
from tests.convert.conftest import ORACLE

# config.json of llava-hf/llava-1.5-7b-hf, and of the original liuhaotian/llava-v1.5-7b.
PUBLISHED = {
    "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100,
    "image_token_index": 32000, "model_type": "llava", "pad_token_id": 32001,
    "projector_hidden_act": "gelu", "tie_word_embeddings": False, "torch_dtype": "float16",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
        "torch_dtype": "float16", "vocab_size": 32064,
    },
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
        "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
        "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
    },
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
}  # fmt: skip
ORIGINAL = {
    "_name_or_path": "llava-v1.5-7b", "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1, "eos_token_id": 2, "freeze_mm_mlp_adapter": False, "hidden_act": "silu",
    "hidden_size": 4096, "image_aspect_ratio": "pad", "initializer_range": 0.02,
    "intermediate_size": 11008, "max_length": 4096, "max_position_embeddings": 4096,
    "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
    "tune_mm_mlp_adapter": False, "use_cache": True, "use_mm_proj": True, "vocab_size": 32000,
}  # fmt: skip


def abstract(cfg):
    return nnx.eval_shape(lambda: llava.create(cfg, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def loaded(tiny):
    """(config, model, tensors) of the tiny checkpoint that transformers saved."""
    folder = tiny("llava")
    cfg = llava.config_from_hf(hf.read_config(folder))
    model = abstract(cfg)
    tensors = hf.Tensors(folder)
    llava.load_llava(model, tensors)
    return cfg, model, {k: np.asarray(v) for k, v in tensors.items()}


@pytest.mark.parametrize("fields", [PUBLISHED, ORIGINAL], ids=["hf", "original"])
def test_full_size_has_exactly_the_published_tensors(fields):
    cfg = llava.config_from_hf(fields)
    naming = "original" if fields is ORIGINAL else "hf"
    out = llava.export_llava(abstract(cfg), naming)
    assert sorted(out) == sorted(llava.published(fields))
    table = "lm_head.weight" if fields is ORIGINAL else "language_model.lm_head.weight"
    assert out.shape_of(table) == (32000 if fields is ORIGINAL else 32064, 4096)
    tower = cfg.vision.vit
    assert tower.tokens == 576 and tower.depth == 23 and tower.held == 24


def test_full_size_against_transformers():
    """Names as published (4.37): of them, transformers 5 makes its own when it loads."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    config = transformers.LlavaConfig(**{k: v for k, v in PUBLISHED.items() if k != "torch_dtype"})
    with torch.device("meta"):
        theirs = transformers.LlavaForConditionalGeneration(config).state_dict()
    theirs = {k: tuple(v.shape) for k, v in theirs.items()}
    out = llava.export_llava(abstract(llava.config_from_hf(PUBLISHED)))
    ours = {new_name(k): out.shape_of(k) for k in out}
    assert ours == theirs


def new_name(key: str) -> str:
    key = key.replace("vision_tower.vision_model.", "vision_tower.")
    key = key.replace("language_model.model.", "language_model.")
    if key.startswith("language_model.lm_head."):
        return key.removeprefix("language_model.")
    return "model." + key


def test_our_size_is_the_published_one():
    assert llava.config_from_hf(PUBLISHED) == llava.SIZES["llava-1.5-7b"]


def test_configs_survive_both_ways(loaded):
    for cfg in (loaded[0], llava.SIZES["llava-1.5-7b"]):
        fields = json.loads(json.dumps(llava.config_to_hf(cfg)))
        assert llava.config_from_hf(fields) == cfg


def named(tensors, naming):
    """The tensors that transformers 5 saved (second naming, no vision_model.) in another naming."""
    a, b, out = llava.NAMINGS["hf"], llava.NAMINGS[naming], {}
    for key, value in tensors.items():
        if key == a.table:
            key = b.table
        for part in ("llm", "tower"):
            if key.startswith(getattr(a, part)):
                key = getattr(b, part) + key.removeprefix(getattr(a, part))
                key = key.replace(b.tower, b.tower + "vision_model.")
                break
        for old, new in zip(a.linears, b.linears, strict=True):
            key = key.replace(a.connector + old, b.connector + new)
        out[key] = value
    return out


@pytest.mark.parametrize("naming", llava.NAMINGS)
def test_every_naming_gives_the_same_model(naming, loaded):
    cfg, first, tensors = loaded
    renamed = named(tensors, naming)
    assert llava.naming_of(renamed) == naming
    model = abstract(cfg)
    llava.load_llava(model, renamed)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (first, model)), strict=True):
        np.testing.assert_array_equal(a, b)
    out = llava.export_llava(model, naming)
    assert set(out) == set(renamed)
    for key in out:
        assert out[key].tobytes() == renamed[key].tobytes(), key


def test_an_original_checkpoint_gets_a_row_for_the_picture_token(loaded):
    """72 rows become 73; the original naming leaves the new one out again."""
    cfg, _, tensors = loaded
    renamed = named(tensors, "original") | {"model.image_newline": np.zeros(32, np.float32)}
    llm = dataclasses.replace(llm_config(cfg), added_tokens=1)
    cfg = llava.make_config(cfg.vision.vit, llm, 72)
    model = abstract(cfg)
    llava.load_llava(model, renamed)
    out = llava.export_llava(model)
    table = out["language_model.model.embed_tokens.weight"]
    assert table.shape == (73, 32)
    np.testing.assert_allclose(table[72], table[:72].mean(0), atol=1e-6)
    assert llava.config_to_hf(cfg)["text_config"]["vocab_size"] == 73
    again = llava.export_llava(model, "original")
    assert {k: again[k].tobytes() for k in again} == {
        k: v.tobytes() for k, v in renamed.items() if k != "model.image_newline"
    }


def test_a_checkpoint_without_its_tower(loaded):
    cfg, first, tensors = loaded
    tower = vit.export_vit(first.vision.tower)
    rest = {k: v for k, v in tensors.items() if not k.startswith("vision_tower.")}
    with pytest.raises(ValueError, match="saved without its tower"):
        llava.load_llava(abstract(cfg), rest)
    model = abstract(cfg)
    llava.load_llava(model, rest, tower)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (first, model)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_problems_of_all_parts_are_listed_together(loaded):
    cfg, _, tensors = loaded
    bad = dict(tensors) | {"language_model.model.extra": np.zeros(1), "stray": np.zeros(1)}
    del bad["multi_modal_projector.linear_2.bias"]
    del bad["vision_tower.encoder.layers.1.mlp.fc1.bias"]
    with pytest.raises(ValueError) as error:
        llava.load_llava(abstract(cfg), bad)
    for words in ("model.extra", "stray", "linear_2.bias", "layers.1.mlp.fc1.bias"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="not a LLaVA checkpoint"):
        llava.load_llava(abstract(cfg), {"a": np.zeros(1)})


@pytest.mark.parametrize("whole", [True, False])
def test_transformers_loads_what_we_write(whole, loaded, tmp_path, capsys):
    """Also from a tower that holds only the layers it runs."""
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    cfg, _, tensors = loaded
    if not whole:
        tower = dataclasses.replace(cfg.vision.vit, whole=False)
        cfg = llava.make_config(tower, llm_config(cfg), cfg.image_token)
    model = abstract(cfg)
    llava.load_llava(model, tensors)
    (tmp_path / "config.json").write_text(json.dumps(llava.config_to_hf(cfg)))
    save_file(dict(llava.export_llava(model)), tmp_path / "model.safetensors", {"format": "pt"})
    kind = transformers.LlavaForConditionalGeneration
    theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    if whole:
        assert len(theirs.state_dict()) == len(tensors)
    assert check.run(str(tmp_path), tolerance=1e-4)
    assert "projected" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fields, words",
    [(PUBLISHED | {"projector_hidden_act": "relu"}, "projector_hidden_act"),
     (PUBLISHED | {"vision_feature_layer": [-2, -5]}, "vision_feature_layer"),
     (PUBLISHED | {"vision_feature_select_strategy": "full"}, "full"),
     (PUBLISHED | {"text_config": {"model_type": "mistral"}}, "mistral"),
     (PUBLISHED | {"vision_config": {"model_type": "siglip_vision_model"}}, "siglip"),
     (ORIGINAL | {"mm_vision_tower": "eva"}, "eva"),
     (ORIGINAL | {"mm_patch_merge_type": "spatial_unpad"}, "spatial_unpad"),
     (ORIGINAL | {"mm_projector_type": "linear"}, "linear")],
)  # fmt: skip
def test_what_is_not_supported_is_named(fields, words):
    with pytest.raises(ValueError, match=words):
        llava.config_from_hf(fields)
    with pytest.raises(ValueError, match="none for token"):
        cfg = llava.SIZES["llava-1.5-7b"]
        llava.config_to_hf(dataclasses.replace(cfg, image_token=40000))


def test_a_model_without_head_reads_and_draws_nothing(loaded):
    model = loaded[1]
    assert model.head is None and model.loss_weights == {"text": 1.0}
    with pytest.raises(ValueError, match="predicts none"):
        model.predict_visual(np.zeros((1, 32), np.float32))

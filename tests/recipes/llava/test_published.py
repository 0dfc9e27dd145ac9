"""LLaVA 1.0 to 1.6: three namings in, two out; transformers loads what we write."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from metamorph_jax.convert import check, export, families, hf, library, vit
from metamorph_jax.errors import ConfigError
from metamorph_jax.models import build
from metamorph_jax.recipes.llava import fields, keys, published
from metamorph_jax.recipes.llava.config import GRIDS, llm_config
from tests.convert.conftest import ORACLE, make

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
# Of 1.6: transformers' list has (height, width), the original one (width, height).
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
TEXTS = {
    "llava-1.6-vicuna-7b": {
        "max_position_embeddings": 4096, "model_type": "llama", "pad_token_id": 0,
        "rms_norm_eps": 1e-05, "vocab_size": 32064,
    },
    "llava-1.6-vicuna-13b": {
        "hidden_size": 5120, "intermediate_size": 13824, "max_position_embeddings": 4096,
        "model_type": "llama", "num_attention_heads": 40, "num_hidden_layers": 40,
        "num_key_value_heads": 40, "pad_token_id": 0, "rms_norm_eps": 1e-05, "vocab_size": 32064,
    },
    "llava-1.6-mistral-7b": {
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "vocab_size": 32064,
    },
    "llava-1.6-34b": {
        "eos_token_id": 7, "hidden_size": 7168, "intermediate_size": 20480,
        "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 56,
        "num_hidden_layers": 60, "num_key_value_heads": 8, "pad_token_id": 0,
        "rms_norm_eps": 1e-05, "rope_theta": 5000000.0, "vocab_size": 64064,
    },
}  # fmt: skip
NEXT = {
    name: PUBLISHED | {
        "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
        "image_grid_pinpoints": PINPOINTS, "use_image_newline_parameter": True,
        "text_config": text, "image_token_index": 64000 if "34b" in name else 32000,
    }
    for name, text in TEXTS.items()
}  # fmt: skip
ANYRES = {
    "image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS,
    "mm_patch_merge_type": "spatial_unpad", "unfreeze_mm_vision_tower": True,
}  # fmt: skip
ORIGINAL_MISTRAL = ORIGINAL | ANYRES | {
    "architectures": ["LlavaMistralForCausalLM"], "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "llava_mistral", "num_key_value_heads": 8,
    "rope_theta": 1000000.0, "sliding_window": None,
}  # fmt: skip
FULL = {"1.5 hf": PUBLISHED, "1.5 original": ORIGINAL, "1.6 original": ORIGINAL_MISTRAL, **NEXT}


def abstract(cfg):
    return nnx.eval_shape(lambda: published.create(cfg, rngs=build.rngs(0)))


def same_weights(a, b):
    a, b = (nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (a, b))
    for (path, one), (_, two) in zip(a, b, strict=True):
        np.testing.assert_array_equal(one[...], two[...], err_msg=str(path))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(kind): what transformers saved of a tiny random model, "llava" or "llava-next"."""

    @functools.cache
    def folder(kind):
        where = tmp_path_factory.mktemp(kind)
        make(kind).save_pretrained(where)
        return where

    return folder


@pytest.fixture(scope="module", params=["llava", "llava-next"])
def loaded(request, folders):
    """(config, model, tensors) of such a checkpoint."""
    folder = folders(request.param)
    cfg = fields.config_from_hf(hf.read_config(folder))
    model, tensors = abstract(cfg), hf.Tensors(folder)
    keys.load_llava(model, tensors)
    return cfg, model, {k: np.asarray(v) for k, v in tensors.items()}


# ---- full size, by shapes


@pytest.mark.parametrize("name", FULL)
def test_full_size_has_exactly_the_published_tensors(name):
    stated = FULL[name]
    cfg = fields.config_from_hf(stated)
    naming = "original" if "original" in name else "hf"
    out = keys.export_llava(abstract(cfg), naming)
    assert sorted(out) == sorted(published.published(stated))
    table = keys.NAMINGS[naming].table
    text = stated if naming == "original" else library.resolved("llama", stated["text_config"])
    rows = stated.get("text_config", stated)["vocab_size"]
    assert out.shape_of(table) == (rows, text["hidden_size"])
    tower = cfg.vision.vit
    assert tower.tokens == 576 and tower.depth == 23 and tower.held == 24
    assert (keys.NAMINGS[naming].newline in out) == ("1.6" in name)


@pytest.mark.parametrize("name", ["1.5 hf", "llava-1.6-mistral-7b", "llava-1.6-34b"])
def test_full_size_against_transformers(name):
    """Names as published (4.37): of them, transformers 5 makes its own when it loads."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    kind = FULL[name]["architectures"][0].removesuffix("ForConditionalGeneration")
    stated = {k: v for k, v in FULL[name].items() if k != "torch_dtype"}
    config = getattr(transformers, f"{kind}Config")(**stated)
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}ForConditionalGeneration")(config).state_dict()
    theirs = {k: tuple(v.shape) for k, v in theirs.items()}
    out = keys.export_llava(abstract(fields.config_from_hf(FULL[name])))
    assert {new_name(k): out.shape_of(k) for k in out} == theirs


def new_name(key: str) -> str:
    key = key.replace("vision_tower.vision_model.", "vision_tower.")
    key = key.replace("language_model.model.", "language_model.")
    if key.startswith("language_model.lm_head."):
        return key.removeprefix("language_model.")
    return "model." + key


def test_our_sizes_are_the_published_ones():
    assert fields.config_from_hf(PUBLISHED) == published.SIZES["llava-1.5-7b"]
    for name, stated in NEXT.items():
        assert fields.config_from_hf(stated) == published.SIZES[name], name


# ---- configs


def test_configs_survive_both_ways(loaded):
    for cfg in (loaded[0], *published.SIZES.values()):
        stated = json.loads(json.dumps(fields.config_to_hf(cfg)))
        assert fields.config_from_hf(stated) == cfg
        stated = json.loads(json.dumps(fields.config_to_original(cfg)))
        again = fields.config_from_hf(stated)
        llm = dataclasses.replace(llm_config(cfg), vocab_size=cfg.image_token)
        wanted = dataclasses.replace(cfg, image_token=-1, llm_options=fields.fields_of(llm))
        if cfg.image_mode != "anyres":  # the grids are not stated, as nothing reads them
            assert again.image_mode == "pad"
        assert again == wanted


def test_grids_are_turned_between_the_forms():
    assert fields.config_from_hf(ORIGINAL_MISTRAL).grids == GRIDS
    cfg = fields.config_from_hf(NEXT["llava-1.6-34b"])
    assert cfg.grids == tuple((w, h) for h, w in PINPOINTS) != GRIDS
    assert fields.config_to_hf(cfg)["image_grid_pinpoints"] == PINPOINTS
    assert fields.config_to_original(cfg)["image_grid_pinpoints"] == [list(g) for g in cfg.grids]
    early = NEXT["llava-1.6-34b"] | {"model_type": "llava"}  # saved under the class of 1.5
    assert fields.config_from_hf(early) == cfg


def test_silent_fields_have_the_defaults_of_the_library():
    cfg = fields.config_from_hf({"model_type": "llava_next"})
    llm, tower = llm_config(cfg), cfg.vision.vit
    assert (llm.width, llm.layers, llm.vocab_size, llm.norm_eps) == (4096, 32, 32000, 1e-6)
    assert (tower.image_size, tower.width, tower.depth) == (336, 1024, 23)
    assert cfg.image_token == 32000 and len(cfg.grids) == 5
    bare = PUBLISHED | {"text_config": {"model_type": "mistral"}}
    with pytest.raises(ConfigError, match="sliding_window 4096"):
        fields.config_from_hf(bare)
    tied = PUBLISHED | {"text_config": {"tie_word_embeddings": True}}
    assert llm_config(fields.config_from_hf(tied)).tied


def test_version_1_and_start_tokens():
    """A linear connector where the config names none; the rows of start and end come last."""
    absent = ("mm_projector_type", "image_aspect_ratio")
    old = {k: v for k, v in ORIGINAL.items() if k not in absent}
    old |= {"mm_use_im_start_end": True, "vocab_size": 32003, "model_type": "llama",
            "mm_vision_tower": "openai/clip-vit-large-patch14"}  # fmt: skip
    assert families.of_fields(old) is published.FAMILY
    assert families.of_fields(old | {"model_type": "llama", "mm_vision_tower": "x"}).name == "llava"
    assert families.of_fields({"model_type": "llama"}).name == "llama"
    cfg = fields.config_from_hf(old)
    llm = llm_config(cfg)
    assert cfg.connector == "linear" and cfg.image_mode == "crop" and cfg.start_end
    assert (llm.vocab_size, llm.added_tokens, cfg.vision.vit.tokens) == (32001, 2, 256)
    out = keys.export_llava(abstract(cfg), "original")
    assert sorted(out) == sorted(published.published(old))
    assert out.shape_of("model.mm_projector.weight") == (4096, 1024)
    assert out.shape_of("lm_head.weight") == (32003, 4096)
    deep = fields.config_from_hf(ORIGINAL | {"mm_projector_type": "mlp3x_gelu"})
    out = keys.export_llava(abstract(deep), "original")
    assert out.shape_of("model.mm_projector.4.weight") == (4096, 4096)
    for other in (cfg, deep):
        with pytest.raises(ConfigError, match="only mlp2x_gelu"):
            fields.config_to_hf(other)


def test_siglip_has_no_class_token_to_drop():
    vision = {"model_type": "siglip_vision_model", "hidden_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    stated = PUBLISHED | {"vision_config": vision, "vision_feature_select_strategy": "full"}
    cfg = fields.config_from_hf(stated)
    assert cfg.vision.vit.layout == "siglip" and cfg.vision.tokens == 4
    assert fields.config_to_hf(cfg)["vision_feature_select_strategy"] == "full"
    assert fields.config_from_hf(fields.config_to_original(cfg)).vision == cfg.vision
    with pytest.raises(ValueError, match="vision_feature_select_strategy='default'"):
        fields.config_from_hf(PUBLISHED | {"vision_config": vision})


@pytest.mark.parametrize(
    "stated, words",
    [(PUBLISHED | {"projector_hidden_act": "relu"}, "projector_hidden_act"),
     (PUBLISHED | {"multimodal_projector_bias": False}, "multimodal_projector_bias"),
     (PUBLISHED | {"vision_feature_layer": [-2, -5]}, "vision_feature_layer"),
     (PUBLISHED | {"vision_feature_select_strategy": "full"}, "full"),
     (PUBLISHED | {"text_config": {"model_type": "mpt"}}, "mpt"),
     (PUBLISHED | {"text_config": [1]}, "text_config is not a table"),
     (NEXT["llava-1.6-34b"] | {"image_grid_pinpoints": [[336, 600]]}, "multiples of 336"),
     (NEXT["llava-1.6-34b"] | {"image_grid_pinpoints": "(1x1)"}, "image_grid_pinpoints"),
     (ORIGINAL | {"mm_vision_tower": "eva"}, "eva"),
     (ORIGINAL | {"mm_vision_select_feature": "cls_patch"}, "cls_patch"),
     (ORIGINAL | {"mm_patch_merge_type": "spiral"}, "spiral"),
     (ORIGINAL | {"image_aspect_ratio": "anyres_max_9"}, "anyres_max_9"),
     (ORIGINAL | {"mm_projector_type": "resampler"}, "resampler")],
)  # fmt: skip
def test_what_is_not_supported_is_named(stated, words):
    with pytest.raises(ValueError, match=words):
        fields.config_from_hf(stated)


def test_what_transformers_lacks_is_named():
    cfg = published.SIZES["llava-1.5-7b"]
    for change, words in (
        ({"image_mode": "anyres"}, "'anyres' with merge 'flat'"),
        ({"merge": "spatial_unpad"}, "spatial_unpad"),
        ({"connector": "linear"}, "connector 'linear'"),
        ({"vision": dataclasses.replace(cfg.vision, tokens=64)}, "reduced"),
    ):
        with pytest.raises(ConfigError, match=words):
            fields.config_to_hf(dataclasses.replace(cfg, **change))


# ---- weights


def named(tensors, naming):
    """The tensors that transformers 5 saved (second naming) in another one."""
    a, b, out = keys.NAMINGS["hf"], keys.NAMINGS[naming], {}
    pairs = [(a.table, b.table), (a.llm, b.llm), (a.newline, b.newline), (a.tower, b.tower)]
    if naming == "original":
        pairs += [(a.connector + f"linear_{i + 1}.", f"{b.connector}{2 * i}.") for i in (0, 1)]
    pairs += [(a.connector, b.connector)]
    for key, value in tensors.items():
        old, new = next(pair for pair in pairs if key.startswith(pair[0]))
        inside = key.removeprefix(old)
        if old == a.tower:
            inside = "vision_model." + inside.removeprefix("vision_model.")
        out[new + inside] = value
    return out


@pytest.mark.parametrize("naming", keys.NAMINGS)
def test_every_naming_gives_the_same_model(naming, loaded):
    cfg, first, tensors = loaded
    renamed = named(tensors, naming)
    model = abstract(cfg)
    keys.load_llava(model, renamed)
    same_weights(first, model)
    out = keys.export_llava(model, naming)
    assert set(out) == set(renamed)
    for key in out:
        value = renamed[key]
        if naming == "original" and len(value) == 72:  # rows below the image token
            value = value[: cfg.image_token]
        assert out[key].tobytes() == value.tobytes(), key


def test_a_mixed_file_is_read_key_by_key(loaded):
    cfg, first, tensors = loaded
    old, new = named(tensors, "hf"), named(tensors, "hf-2025")
    mixed = dict([*list(old.items())[::2], *list(new.items())[1::2]])
    mixed |= {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
        "vision_tower.vision_model.embeddings.position_ids": np.zeros((1, 17), np.int64),
    }
    model = abstract(cfg)
    keys.load_llava(model, mixed)
    same_weights(first, model)
    with pytest.raises(ValueError, match="under two names: .*linear_1.bias"):
        keys.load_llava(model, mixed | {"multi_modal_projector.linear_1.bias": np.zeros(32),
                                        "model.mm_projector.0.bias": np.zeros(32)})  # fmt: skip


def test_an_original_checkpoint_gets_a_row_for_the_image_token(loaded):
    cfg, _, tensors = loaded
    renamed = named(tensors, "original")
    llm = fields.fields_of(llm_config(cfg))
    cfg = dataclasses.replace(cfg, llm_options=llm, image_token=-1)
    model = abstract(cfg)
    keys.load_llava(model, renamed | {"model.image_newline": np.zeros(32, np.float32)})
    table = keys.export_llava(model)["language_model.model.embed_tokens.weight"]
    assert table.shape == (128, 32)  # filled up to a multiple of 64
    np.testing.assert_allclose(table[72:], np.tile(table[:72].mean(0), (56, 1)), atol=1e-6)
    stated = fields.config_to_hf(cfg)
    assert stated["text_config"]["vocab_size"] == 128 and stated["image_token_index"] == 72
    again = keys.export_llava(model, "original")
    assert again.keys() == renamed.keys()
    assert all(again[k].tobytes() == v.tobytes() for k, v in renamed.items() if "newline" not in k)


def test_a_checkpoint_without_its_tower(loaded, tmp_path, monkeypatch):
    """It comes from what the config names, which is on the hub."""
    cfg, first, tensors = loaded
    rest = {k: v for k, v in tensors.items() if not k.startswith("vision_tower.")}
    with pytest.raises(ValueError, match="no tower in this checkpoint"):
        keys.load_llava(abstract(cfg), rest)
    (tmp_path / "tower").mkdir()
    tower = {**vit.export_vit(first.vision.tower), "logit_scale": np.ones(1, np.float32)}
    save_file(tower, tmp_path / "tower" / "model.safetensors")
    save_file(named(rest, "original"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL))
    monkeypatch.setattr(hf, "fetch", lambda name: tmp_path / "tower")
    model = abstract(cfg)
    keys.load_llava(model, keys.read(tmp_path))
    same_weights(first, model)


def test_problems_of_all_parts_are_listed_together(loaded):
    cfg, _, tensors = loaded
    bad = dict(tensors) | {"language_model.model.extra": np.zeros(1), "stray": np.zeros(1)}
    del bad["multi_modal_projector.linear_2.bias"]
    del bad["vision_tower.encoder.layers.1.mlp.fc1.bias"]
    bad.pop("image_newline", None)
    with pytest.raises(ValueError) as error:
        keys.load_llava(abstract(cfg), bad)
    for words in ("model.extra", "stray", "linears.1.bias", "layers.1.mlp.fc1.bias"):
        assert words in str(error.value)
    assert ("newline" in str(error.value)) == cfg.newline
    with pytest.raises(ValueError, match="not a LLaVA checkpoint"):
        keys.load_llava(abstract(cfg), {"a": np.zeros(1)})


# ---- what is written, read by transformers


def write(folder, cfg, model):
    writer = export.Writer()
    published._save_published(published.FAMILY, folder, model, export.Source(), writer)
    return folder


def test_transformers_loads_what_we_write(loaded, tmp_path):
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    cfg, model, tensors = loaded
    stated = hf.read_config(write(tmp_path, cfg, model))
    kind = getattr(transformers, stated["architectures"][0])
    theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[name], info[name]
    state = theirs.state_dict()
    assert len(state) == len(tensors)
    for key, value in keys.export_llava(model).items():
        np.testing.assert_array_equal(state[new_name(key)].numpy(), value, err_msg=key)


def test_a_tower_that_holds_only_the_layers_it_runs(folders, tmp_path, capsys):
    pytest.importorskip("transformers", reason=ORACLE)
    cfg = fields.config_from_hf(hf.read_config(folders("llava")))
    tower = dataclasses.replace(cfg.vision.vit, whole=False)
    cfg = dataclasses.replace(
        cfg, vision=dataclasses.replace(cfg.vision, tower_options=fields.fields_of(tower))
    )
    model = abstract(cfg)
    keys.load_llava(model, hf.Tensors(folders("llava")))
    assert check.run(str(write(tmp_path, cfg, model)), tolerance=1e-4)
    assert "projected" in capsys.readouterr().out


# ---- a whole checkpoint against the config that loads it

CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336},
        "crop_size": 336, "resample": 3}  # fmt: skip
LLAVA = {"image_processor_type": "LlavaImageProcessor", "size": {"shortest_edge": 336},
         "crop_size": 336, "do_pad": True}  # fmt: skip


def put(folder, stated, processor=None):
    (folder / "config.json").write_text(json.dumps(stated))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_a_config_is_compared_with_all_files(tmp_path, capsys):
    cfg = published.SIZES["llava-1.5-7b"]
    published.check_config(cfg, put(tmp_path, PUBLISHED, LLAVA))
    assert capsys.readouterr().err == ""
    odd = CLIP | {"image_mean": [0.5, 0.5, 0.5], "crop_size": 224, "resample": 2}
    other = dataclasses.replace(cfg, llm_options=cfg.llm_options | {"norm_eps": 1e-6})
    with pytest.raises(ConfigError) as error:
        published.check_config(other, put(tmp_path, PUBLISHED, odd))
    for words in ("llm.norm_eps is 1e-06", "tower.mean", "tower.size is 336, in the checkpoint 224",
                  "tower.resample is 'bicubic', in the checkpoint 'bilinear'"):  # fmt: skip
        assert words in str(error.value)
    deep = PUBLISHED | {"vision_feature_layer": -3}
    with pytest.raises(ConfigError, match="tower.depth is 23, in the checkpoint 22"):
        published.check_config(cfg, put(tmp_path, deep, CLIP))
    with pytest.raises(ConfigError, match="connector is 'mlp2x_gelu', in the checkpoint 'linear'"):
        linear = ORIGINAL | {"mm_projector_type": "linear"}
        published.check_config(cfg, put(tmp_path, linear, CLIP))


def test_how_images_become_views_may_differ_and_is_said(tmp_path, capsys):
    cfg = published.SIZES["llava-1.5-7b"]
    assert fields.config_from_hf(PUBLISHED, processor=LLAVA).image_mode == "pad"
    assert fields.config_from_hf(PUBLISHED, processor=CLIP).image_mode == "crop"
    assert fields.config_from_hf(ORIGINAL, processor=CLIP).image_mode == "pad"
    published.check_config(cfg, put(tmp_path, PUBLISHED, CLIP))
    assert "image_mode 'pad' takes the place of 'crop'" in capsys.readouterr().err
    grids = {"image_processor_type": "LlavaNextImageProcessor", "do_pad": True, "crop_size": 336,
             "size": {"shortest_edge": 336}, "image_grid_pinpoints": [[336, 1008]]}  # fmt: skip
    cfg = published.SIZES["llava-1.6-34b"]
    put(tmp_path, NEXT["llava-1.6-34b"], grids)
    published.check_config(cfg, tmp_path)
    assert "takes the place of ((1008, 336),)" in capsys.readouterr().err
    published.check_config(dataclasses.replace(cfg, grids=((1008, 336),)), tmp_path)
    assert capsys.readouterr().err == ""


def test_the_image_token_of_the_tokenizer_counts(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"a": 0, "<image>": 1}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    put(tmp_path, PUBLISHED | {"image_token_index": 1})
    published.check_config(published.SIZES["llava-1.5-7b"], tmp_path)
    with pytest.raises(ConfigError, match="token <image> is 32000, in the checkpoint 1"):
        published.check_config(published.SIZES["llava-1.5-7b"], put(tmp_path, PUBLISHED))


ODD = ["x", "", -1, 1.5, True, [1], {"a": 1}, float("nan"), 10**30, None]
READ = ["model_type", "image_aspect_ratio", "image_grid_pinpoints", "mm_patch_merge_type",
        "mm_projector_type", "mm_vision_select_feature", "mm_vision_select_layer",
        "mm_vision_tower", "mm_use_im_start_end", "image_mode", "vision_config",
        "vocab_size"]  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_values_of_any_kind_are_errors_that_say_so(name):
    for value in ODD:
        for stated in (ORIGINAL_MISTRAL, NEXT["llava-1.6-34b"]):
            try:
                fields.config_to_original(fields.config_from_hf(stated | {name: value}))
            except ValueError as error:
                assert str(error)

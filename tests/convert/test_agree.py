"""A checkpoint's config is followed or compared, never passed over, and understood as transformers
understands it."""

import dataclasses
import json
import math

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from metamorph_jax.convert import (
    diffusion,
    export,
    gguf,
    hf,
    library,
    llama,
    specs,
    vit,
)
from metamorph_jax.convert.command import convert
from metamorph_jax.data import tokenizers
from metamorph_jax.errors import ConfigError, UserError, WeightError
from metamorph_jax.models import build
from metamorph_jax.models.llm.llama import LlamaConfig
from metamorph_jax.models.vision.vit import SIZES as TOWERS
from metamorph_jax.nn.rope import RopeScaling
from metamorph_jax.recipes import metamorph as recipe
from metamorph_jax.recipes.metamorph.published import check_config
from tests.convert.conftest import LLM, ORACLE
from tests.recipes.metamorph.tiny import TINY

SMALL = dict(vocab_size=72, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=2)  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0}


# ---- where two places speak, or none


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        {"rope_theta": 5e5, "rope_parameters": LINEAR},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": LINEAR | {"rope_theta": 7.0}},
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 3.0, "rope_type": "default"}},
        {"rope_scaling": None},
    ],
)
@pytest.mark.parametrize("kind", llama.KINDS)
def test_rotary_fields_mean_what_transformers_reads_in_them(kind, change):
    from transformers import CONFIG_MAPPING

    fields = SMALL | {"model_type": kind, "sliding_window": None, "num_key_value_heads": 1}
    theirs = CONFIG_MAPPING[kind].from_dict(json.loads(json.dumps(fields | change)))
    ours, rope = llama.config_from_hf(fields | change), theirs.rope_parameters
    assert ours.rope_theta == rope["rope_theta"]
    assert ours.rope_scaling.kind == rope["rope_type"]
    assert ours.rope_scaling.factor == rope.get("factor", 1.0)


def test_the_inner_theta_gives_transformers_numbers():
    pytest.importorskip("torch", reason=ORACLE)
    import transformers

    fields = LLM | {"model_type": "llama", "rope_theta": 5e5,
                    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}}  # fmt: skip
    theirs = transformers.LlamaModel(transformers.LlamaConfig.from_dict(dict(fields)))
    cfg = llama.config_from_hf(fields)
    from metamorph_jax.nn import rope

    found = rope.frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    np.testing.assert_allclose(found, theirs.rotary_emb.inv_freq.numpy(), rtol=1e-6)


def test_absent_fields_have_the_defaults_of_their_model_type():
    with pytest.raises(ConfigError, match="sliding_window 4096 is not supported"):
        llama.config_from_hf(SMALL | {"model_type": "mistral"})
    mistral = SMALL | {"model_type": "mistral", "sliding_window": None}
    eight = mistral | {"num_attention_heads": 16}
    assert llama.config_from_hf(eight).kv_heads == 8  # Mistral's own
    assert llama.config_from_hf(eight | {"num_key_value_heads": None}).kv_heads == 16
    qwen = llama.config_from_hf(SMALL | {"model_type": "qwen3", "num_key_value_heads": 2})
    assert (qwen.head_dim, qwen.max_positions) == (128, 32768)
    assert vit.config_from_hf({"model_type": "clip_vision_model"}).activation == "quick_gelu"


@pytest.mark.parametrize("scaling", [{"factor": 2.0}, {"rope_type": "llama3", "factor": 2.0}])
def test_a_scaling_that_lacks_its_type_or_numbers_is_refused(scaling):
    with pytest.raises(ConfigError, match="RoPE scaling|rope"):
        llama.config_from_hf(SMALL | {"rope_scaling": scaling})


@pytest.mark.parametrize("head", ["different", "equal", "only", "none"])
def test_tied_tables_are_those_of_transformers(head, tmp_path):
    torch = pytest.importorskip("torch", reason=ORACLE)
    import transformers

    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLM))
    theirs.save_pretrained(tmp_path)
    file, tensors = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    if head == "equal":
        tensors[llama.HEAD] = tensors[llama.EMBED].copy()
    elif head != "different":
        del tensors[llama.EMBED if head == "only" else llama.HEAD]
    save_file(tensors, file, {"format": "pt"})
    fields = hf.read_config(tmp_path) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)

    cfg = llama.config_from_hf(specs.llm_fields(str(tmp_path)))
    assert cfg.tied == (head != "different")
    llm = nnx.eval_shape(lambda: llama.create(cfg, rngs=build.rngs(0)))
    llama.load_llama(llm, specs.llm_tensors(str(tmp_path)))
    np.testing.assert_array_equal(llm.embed_tokens.embedding[...],
                                  theirs.model.embed_tokens.weight.detach())  # fmt: skip
    out = llama.export_llama(llm)
    table = out[llama.EMBED if cfg.tied else llama.HEAD]
    np.testing.assert_array_equal(table, theirs.lm_head.weight.detach())
    if head == "different":
        convert(str(tmp_path), str(tmp_path / "out"))
        again = load_file(tmp_path / "out" / "model.safetensors")
        np.testing.assert_array_equal(again[llama.HEAD], tensors[llama.HEAD])
        assert hf.read_config(tmp_path / "out")["tie_word_embeddings"] is False
        tied = dataclasses.replace(cfg, tied=True)
        with pytest.raises(WeightError, match="lm_head.weight is not model.embed_tokens"):
            llama.load_llama(llama.create(tied, rngs=nnx.Rngs(0)), tensors)


# ---- values with which nothing can be computed

BAD = (0, -1e-5, math.nan, math.inf, {}, "x", True)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta", "hidden_size"])
def test_wrong_numbers_of_a_language_model_are_named(field, value):
    if field == "hidden_size" and value is True:
        pytest.skip("1 in JSON's terms")
    with pytest.raises(ConfigError):
        llama.config_from_hf(SMALL | {field: value})


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("kind", ["siglip_vision_model", "clip_vision_model", "dinov2"])
def test_wrong_numbers_of_a_tower_are_named(kind, value):
    with pytest.raises(ConfigError):
        vit.config_from_hf({"model_type": kind, "layer_norm_eps": value})
    if value is not True:
        with pytest.raises(ConfigError):
            vit.config_from_hf({"model_type": kind, "hidden_size": value})


@pytest.mark.parametrize("value", BAD)
def test_wrong_numbers_of_stable_diffusion_are_named(value):
    with pytest.raises(ConfigError, match="norm_eps"):
        diffusion.unet_from_hf({"norm_eps": value})
    with pytest.raises(ConfigError, match="scaling_factor"):
        diffusion.vae_from_hf({"scaling_factor": value})
    with pytest.raises(ConfigError, match="beta_end"):
        diffusion.schedule_from_hf({"beta_end": value})


def test_quantised_weights_are_refused_by_name(tmp_path):
    for fields in ({"quantization_config": {"quant_method": "gptq"}},
                   {"text_config": {"quantization_config": {"bits": 4}}}):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(SMALL | fields))
        with pytest.raises(WeightError, match="config.json has quantization_config"):
            hf.read_config(tmp_path)


def test_no_code_of_a_config_is_run():
    fields = SMALL | {"auto_map": {"AutoConfig": "evil.Config"}}
    assert library.resolved("llama", fields)["hidden_size"] == 32


# ---- models that are configured by name


LLAMA = LlamaConfig(72, 32, 64, 2, 4, 2, 8, norm_eps=1e-6)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rope_theta": 5e5}, "llm.rope_theta is 10000.0, in the checkpoint 500000.0"),
        ({"rope_scaling": LINEAR}, "llm.rope_scaling"),
        ({"rms_norm_eps": 1e-5}, "llm.norm_eps"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, "llm.heads is 4"),
    ],
)
def test_what_shapes_do_not_show_of_a_language_model(change, words):
    fields = llama.config_to_hf(LLAMA)
    assert llama.disagreements(LLAMA, fields) == []
    found = llama.disagreements(LLAMA, fields | change)
    assert words in "; ".join(found)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_act": "gelu"}, "tower.activation is 'quick_gelu', in the checkpoint 'gelu'"),
        ({"num_attention_heads": 4}, "tower.heads"),
        ({"layer_norm_eps": 1e-6}, "tower.norm_eps"),
    ],
)
def test_what_shapes_do_not_show_of_a_tower(change, words):
    tower = TOWERS["clip-tiny"]
    fields = vit.config_to_hf(tower)
    assert vit.disagreements(tower, fields) == []
    assert words in "; ".join(vit.disagreements(tower, fields | change))


def folder_of(path, fields):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(fields))
    return path


def test_a_language_model_and_a_tower_by_name(tmp_path):
    """Differences are listed together, before any weight is read; "auto" follows the file."""
    llm = llama.config_to_hf(recipe.llm_config(TINY)) | {"tie_word_embeddings": False}
    wrong = folder_of(tmp_path / "llm", llm | {"rope_theta": 3e5, "rms_norm_eps": 1e-4})
    cfg = dataclasses.replace(TINY, llm_weights=str(wrong))
    model = nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0)))
    with pytest.raises(UserError, match=r"norm_eps .*rope_theta .* config.model.llm=\"auto\""):
        recipe.load_pretrained(model, cfg)
    auto = recipe.llm_config(dataclasses.replace(cfg, llm="auto", llm_options={}))
    assert (auto.rope_theta, auto.norm_eps) == (3e5, 1e-4)

    fields = vit.config_to_hf(TOWERS["siglip-tiny"]) | {"hidden_act": "gelu"}
    tower = folder_of(tmp_path / "tower", fields)
    vision = dataclasses.replace(TINY.vision, weights=str(tower))
    cfg = dataclasses.replace(TINY, vision=vision)
    with pytest.raises(UserError, match=r"tower.activation is 'gelu_tanh'.*tower_options"):
        recipe.load_pretrained(model, cfg)


def test_a_whole_checkpoint_by_name(tmp_path):
    """All parts in one error: the public implementation's fields, and the folders we write."""
    from metamorph_jax.recipes.metamorph.published import config_to_hf

    fields = config_to_hf(TINY)
    check_config(TINY, folder_of(tmp_path / "right", fields))
    wrong = fields | {"rope_theta": 3e5, "normalize_vision": False}
    wrong["vision_config"] = wrong["vision_config"] | {"layer_norm_eps": 1e-3}
    with pytest.raises(ConfigError, match=r"llm.rope_theta.*vision.normalize.*tower.norm_eps"):
        check_config(TINY, folder_of(tmp_path / "wrong", wrong))

    ours = folder_of(tmp_path / "ours", llama.config_to_hf(recipe.llm_config(TINY)))
    tower = folder_of(ours / "tower", vit.config_to_hf(TINY.vision.vit))
    connector = {"image_tokens": 4, "reduction": "interpolation", "normalize_vision": True}
    folder_of(ours / "connector", connector)
    process = {"image_processor_type": "SiglipImageProcessor", "do_resize": True,
               "size": {"height": 32, "width": 32}, "resample": 3, "do_normalize": True,
               "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    export.write_json(tower / "preprocessor_config.json", process)
    check_config(TINY, ours)
    short = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 36},
             "crop_size": {"height": 32, "width": 32}, "resample": 2}  # fmt: skip
    export.write_json(tower / "preprocessor_config.json", process | short)
    with pytest.raises(ConfigError) as error:
        check_config(TINY, ours)
    stated = ("mode is 'square', in the checkpoint 'crop'", "resize is None, in the checkpoint 36",
              "resample is 'bicubic', in the checkpoint 'bilinear'")  # fmt: skip
    assert all(f"tower.{text}" in str(error.value) for text in stated)
    vision = dataclasses.replace(TINY.vision, weights=str(tower))  # where its pixels come from
    check_config(dataclasses.replace(TINY, vision=vision), ours)
    export.write_json(tower / "preprocessor_config.json", process | {"image_mean": [0.4] * 3})
    export.write_json(ours / "connector" / "config.json", connector | {"image_tokens": 16})
    with pytest.raises(ConfigError, match=r"vision.tokens is 4.*16.*tower.mean"):
        check_config(TINY, ours)


def test_gguf_metadata_is_compared_too(monkeypatch, tmp_path):
    """Float32 numbers of a GGUF count as the decimals that they stand for."""
    fields = llama.config_to_hf(LLAMA) | {"rms_norm_eps": float(np.float32(1e-6))}
    monkeypatch.setattr(gguf, "open_gguf", lambda file: file)
    monkeypatch.setattr(gguf, "read_config", lambda file: fields)
    assert specs.has_fields("gguf:x.gguf")
    assert llama.disagreements(LLAMA, specs.llm_fields("gguf:x.gguf")) == []
    fields["rope_scaling"], other = LINEAR, RopeScaling("linear", 2.0)
    assert len(llama.disagreements(LLAMA, specs.llm_fields("gguf:x.gguf"))) == 1
    same = dataclasses.replace(LLAMA, rope_scaling=other)
    assert llama.disagreements(same, specs.llm_fields("gguf:x.gguf")) == []


# ---- tokenizers


def test_a_tokenizer_with_more_ids_than_rows(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def made(*extra):
        words = {f"w{i}": i for i in range(8)} | {text: 8 + i for i, text in enumerate(extra)}
        inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
        return PreTrainedTokenizerFast(tokenizer_object=inner)

    added = ["<s>", "</s>"]
    tokenizers.check_ids(made(), 8, added)
    tokenizers.check_ids(made("<s>", "</s>"), 8, added)  # as we write them
    tokenizers.check_ids(made("[PAD]"), 9, added)
    for extra in (("[PAD]",), ("[PAD]", "[X]")):
        with pytest.raises(ConfigError, match=r"table has 8 rows, none for '\[PAD\]' \(8\)"):
            tokenizers.check_ids(made(*extra), 8, added)
    with pytest.raises(ConfigError, match="<s> has id 9 in the tokenizer, 8 in the model"):
        tokenizers.check_ids(made("[PAD]", "<s>"), 8, added)

    file = tmp_path / "tokenizer.json"
    V = recipe.llm_config(TINY).vocab_size
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V + 1)}, unk_token="w0"))
    inner.save(str(file))
    with pytest.raises(ConfigError, match=f"table has {V} rows"):  # before training
        recipe.load_tokenizer(dataclasses.replace(TINY, tokenizer=str(file)))

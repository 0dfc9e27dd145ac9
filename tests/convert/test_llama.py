"""The Llama family: configs both ways, key lists of full sizes, greedy answers, padded tables."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from metamorph_jax import losses
from metamorph_jax.convert import hf
from metamorph_jax.convert.families import detect, known
from metamorph_jax.convert.llama import (
    config_from_hf,
    config_to_hf,
    export_llama,
    load_llama,
    published,
)
from metamorph_jax.models import build
from metamorph_jax.models.llm import llama
from metamorph_jax.sampling import llm_weights, loop, policy
from tests.recipes.minigpt5 import golden

ORACLE = "needs the oracle extra: pip install 'metamorph_jax[oracle]'"
SMALL = llama.LlamaConfig(50, 32, 48, 2, 4, 2, 8, max_positions=64)
KINDS = {
    "llama": SMALL,
    "llama-biases": dataclasses.replace(SMALL, qkv_bias=True, o_bias=True, mlp_bias=True),
    "llama3.1": dataclasses.replace(
        SMALL, rope_theta=5e5, rope_scaling=dataclasses.replace(llama._LLAMA31,
                                                                original_max_position=16)),
    "smollm2": dataclasses.replace(SMALL, tied=True, rope_theta=1e5),
    "vicuna-long": dataclasses.replace(SMALL, rope_scaling=llama.rope.RopeScaling("linear", 4.0)),
    "qwen2": dataclasses.replace(SMALL, qkv_bias=True, norm_eps=1e-6, tied=True),
    "qwen3": dataclasses.replace(SMALL, qk_norm=True, head_dim=16, norm_eps=1e-6),
}  # fmt: skip
GREEDY = ("llama3.1", "qwen2", "qwen3")  # these differ in what a step of decoding does


def random_llm(cfg, seed=0):
    """A model whose leaves all are random, norms and biases too."""
    llm = llama.Llama(cfg, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    shake = lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    nnx.update(llm, jax.tree.map(shake, nnx.state(llm)))
    return llm


def folder_of(llm, folder, **extra):
    """What an export writes, at its least: config.json and weights."""
    fields = config_to_hf(llm.cfg, **extra)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(dict(export_llama(llm)), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_the_export_and_answers_alike(kind, tmp_path):
    """Our random model, read by transformers: logits and greedy continuations, left padded."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    llm = random_llm(KINDS[kind])
    folder = folder_of(llm, tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    again = hf.read_config(folder)
    assert config_from_hf(again) == llm.cfg
    assert config_from_hf(model.config.to_dict()) == llm.cfg  # as transformers would save it

    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 50, n) for n in (7, 4)]
    with torch.no_grad():
        logits = model(torch.from_numpy(prompts[0][None])).logits.numpy()
    hidden = llm(
        llm.embed_tokens(prompts[0][None]), np.arange(7)[None], np.tri(7, dtype=bool)[None]
    )
    np.testing.assert_allclose(llm.logits(hidden), logits, atol=1e-4)
    if kind in GREEDY:
        embeds = [np.asarray(llm.embed_tokens(p)) for p in prompts]
        graph, state = nnx.split(llm)
        alone = nnx.merge(graph, jax.tree.map(lambda x: x, state))
        ours = decode(alone, embeds, 8)
        ids = np.stack([np.pad(p, (7 - len(p), 0)) for p in prompts])
        mask = np.stack([np.arange(7) >= 7 - len(p) for p in prompts])
        theirs = model.generate(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).long(), max_new_tokens=8,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )[:, 7:].tolist()  # fmt: skip
        assert ours == theirs

    back = llama.Llama(llm.cfg, rngs=nnx.Rngs(5))
    load_llama(back, hf.Tensors(folder))
    for key, value in export_llama(back).items():
        np.testing.assert_array_equal(value, export_llama(llm)[key], err_msg=key)


def decode(llm, prompts, new):
    """Greedy ids of the decoding loop around a language model alone; it is taken over."""
    model, weights = llm_weights.take_over(llm)
    results = loop.Loop(model, weights)(prompts, new, policy.TextPolicy(), buckets=(8,))
    return [r.ids.tolist() for r in results]


# ---- full sizes


def _fields(size):
    return config_to_hf(llama.SIZES[size])


@pytest.mark.parametrize("size", [s for f in ("llama", "qwen2", "qwen3") for s in known()[f].sizes])
def test_full_sizes_cover_the_published_keys(size):
    """Names and shapes of ours, of our list, and of transformers' own model of this config."""
    fields = _fields(size)
    assert config_from_hf(fields) == llama.SIZES[size]
    llm = nnx.eval_shape(lambda: llama.Llama(llama.SIZES[size], rngs=build.rngs(0)))
    out = export_llama(llm)
    assert set(out) == set(published(fields))
    torch = pytest.importorskip("torch", reason=ORACLE)
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{k: v for k, v in fields.items() if k != "architectures"})
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config).state_dict()
    shapes = {k: tuple(v.shape) for k, v in theirs.items()}
    if llm.cfg.tied:
        del shapes["lm_head.weight"]
    assert {k: out.shape_of(k) for k in out} == shapes


@pytest.mark.parametrize(
    "size, total",
    [
        ("llama2-13b", 13_015_864_320),
        ("llama2-70b", 68_976_648_192),
        ("llama3.2-3b", 3_212_749_824),
        ("tinyllama-1.1b", 1_100_048_384),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-72b", 72_706_203_648),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_published_parameter_counts(size, total):
    llm = nnx.eval_shape(lambda: llama.Llama(llama.SIZES[size], rngs=build.rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(llm, nnx.Param))) == total


# ---- configs


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "mistral", "sliding_window": 32}, "sliding_window 32"),
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True}, "window 32"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_size": None, "vocab_size": None}, "lacks vocab_size, hidden_size"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"model_type": "gemma"}, "gemma"),
    ],
)
def test_what_would_change_the_numbers_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**config_to_hf(SMALL), **change})


def test_a_layout_that_no_one_published():
    odd = dataclasses.replace(SMALL, qkv_bias=True, mlp_bias=True)
    with pytest.raises(ValueError, match="no published layout has qkv_bias=True, o_bias=False"):
        config_to_hf(odd)


def test_detect(tmp_path):
    for kind, family in (("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")):
        (tmp_path / "config.json").write_text(json.dumps(config_to_hf(KINDS[kind])))
        assert detect(tmp_path).name == family
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="'gpt2' is not supported; known: .*llama, llava"):
        detect(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="neither model_type nor"):
        detect(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="one of its parts: unet"):
        detect(tmp_path)


# ---- rows behind the vocabulary


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_pad_the_table_are_never_predicted_or_trained(tied):
    """Their rows are made the best match of every state; still no one can say them."""
    plain = random_llm(dataclasses.replace(SMALL, tied=tied, added_tokens=2))
    cfg = dataclasses.replace(plain.cfg, vocab_multiple=64)
    padded = llama.Llama(cfg, rngs=nnx.Rngs(1))
    load_llama(padded, export_llama(plain))
    assert padded.embed_tokens.embedding.shape == (64, 32) and cfg.tokens == 52
    tokens = np.array([[3, 50, 51, 7, 49]])
    mask = np.tri(5, dtype=bool)[None]

    def states(llm):
        return llm(llm.embed_tokens(tokens), np.arange(5)[None], mask)

    hidden = states(plain)
    np.testing.assert_array_equal(states(padded), hidden)
    loud = 100 * hidden[0, -1]
    padded.embed_tokens.embedding[...] = padded.embed_tokens.embedding[...].at[50:].set(loud)
    if not tied:
        padded.lm_head.kernel[...] = padded.lm_head.kernel[...].at[:, 50:].set(loud[:, None])
    logits = padded.logits(states(padded))
    np.testing.assert_allclose(logits, plain.logits(hidden), rtol=1e-5, atol=1e-5)

    def loss(llm):
        table, added = llm.head_tables()
        targets = np.array([[50, 51, 7, 49, 0]])
        return losses.text_loss(states(llm), table, added, targets)[0]

    graph, weights = nnx.split(padded)
    value, grads = jax.value_and_grad(lambda w: loss(nnx.merge(graph, w)))(weights)
    np.testing.assert_allclose(value, loss(plain), rtol=1e-5)
    grads = nnx.merge(graph, grads)
    assert not jnp.any(grads.embed_tokens.embedding[50:])
    assert jnp.any(grads.embed_tokens.embedding[:50]) and jnp.any(grads.embed_tokens.added[...])
    if not tied:
        assert not jnp.any(grads.lm_head.kernel[:, 50:])

    for key, value in export_llama(padded).items():  # cut off again
        np.testing.assert_array_equal(value, export_llama(plain)[key], err_msg=key)
    prompt = [np.asarray(plain.embed_tokens(tokens[0]))]
    assert decode(plain, prompt, 8) == decode(padded, prompt, 8)


def test_a_sharded_module_without_values_gets_the_mean_for_added_rows():
    tensors = dict(export_llama(random_llm(SMALL)))
    empty = nnx.eval_shape(
        lambda: llama.Llama(dataclasses.replace(SMALL, added_tokens=2), rngs=nnx.Rngs(0))
    )
    load_llama(empty, tensors)
    mean = tensors["lm_head.weight"].mean(0)
    np.testing.assert_allclose(empty.lm_head.added[...], [mean, mean], rtol=1e-5, atol=1e-6)


@pytest.mark.golden
@pytest.mark.parametrize("loaded", [False, True])
def test_added_rows_equal_the_reference(golden_root, loaded):
    """Rows added to both tables: as a checkpoint without them is read, and as a model that has
    weights gets them."""
    case = golden.Case(golden_root, "vocab_extension")
    tables = {key: case[f"in.{key}"] for key in ("embed_tokens", "lm_head")}
    V, D = tables["embed_tokens"].shape
    ids = case["out.new_token_ids"]
    cfg = dataclasses.replace(SMALL, vocab_size=V, width=D, layers=1, added_tokens=len(ids))
    assert ids.tolist() == list(range(V, cfg.tokens))
    llm = nnx.eval_shape(lambda: llama.Llama(cfg, rngs=build.rngs(0)))
    found = export_llama(llm)
    rest = {key: np.zeros(found.shape_of(key), np.float32) for key in found}
    named = {
        "model.embed_tokens.weight": tables["embed_tokens"],
        "lm_head.weight": tables["lm_head"],
    }
    load_llama(llm, rest | named)
    if not loaded:
        for part in (llm.embed_tokens, llm.lm_head):
            part.added[...] = jnp.zeros_like(part.added[...])
        llama.init_added_tokens(llm)
    out = export_llama(llm)
    for name, key in zip(tables, named, strict=True):
        np.testing.assert_allclose(out[key], case[f"out.{name}"], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(out[key][:V], tables[name])
    case.check_all_read()


def test_problems_of_all_kinds_in_one_error():
    tensors = dict(export_llama(random_llm(KINDS["qwen3"])))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4)  # dropped on purpose
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    tensors["model.embed_tokens.weight"] = np.zeros((49, 32), np.float32)
    tensors["model.layers.1.self_attn.g_idx"] = np.zeros(1)
    with pytest.raises(ValueError) as error:
        load_llama(llama.Llama(KINDS["qwen3"], rngs=nnx.Rngs(0)), tensors)
    for text in ("layers.1.self_attn.q_norm.weight", "(49, 32), expected (50, 32)", "g_idx"):
        assert text in str(error.value)
    assert "inv_freq" not in str(error.value)

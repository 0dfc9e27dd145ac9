"""Llama against transformers on tiny random weights: scalings, ties, biases, packing."""

import dataclasses
import json
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert import hf
from metamorph_jax.convert.llama import config_from_hf, export_llama, load_llama
from metamorph_jax.models.build import rngs
from metamorph_jax.models.llm import llama
from metamorph_jax.nn import rope
from metamorph_jax.nn.attention import packed_mask

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
ORACLE = "needs the oracle extra: pip install 'metamorph_jax[oracle]'"
SMALL = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
KINDS = {
    "plain": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "one_kv_head": ("Llama", {"num_key_value_heads": 1}),
    "wide_heads": ("Llama", {"head_dim": 16}),
    "linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama3": ("Llama", {"rope_theta": 5e5, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-6}),
    "qwen3": ("Qwen3", {"rms_norm_eps": 1e-6, "head_dim": 16}),
}  # fmt: skip


def oracle(kind):
    """(transformers' model in eval mode, its config.json, its saved tensors)."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    family, options = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**{**SMALL, **options})
    model = getattr(transformers, family + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = {k: np.array(v) for k, v in hf.Tensors(folder).items()}
        return model, hf.read_config(folder), tensors


def build(fields, tensors, **options) -> llama.Llama:
    llm = llama.Llama(config_from_hf(fields, **options), rngs=nnx.Rngs(0))
    load_llama(llm, tensors)
    return llm


def fast(f):
    return jax.jit(f, compiler_options=FAST)


def run(llm, tokens, positions, segments, turns=None):
    def logits(tokens, positions, segments, turns):
        hidden = llm(llm.embed_tokens(tokens), positions, packed_mask(segments, turns))
        return llm.logits(hidden)

    return np.asarray(fast(logits)(tokens, positions, segments, turns))


def theirs(model, tokens, mask=None):
    import torch

    with torch.no_grad():
        mask = None if mask is None else torch.from_numpy(mask)
        return model(torch.from_numpy(np.asarray(tokens)), attention_mask=mask).logits.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_names(kind):
    model, fields, tensors = oracle(kind)
    llm = build(fields, tensors)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 40))
    positions = np.tile(np.arange(40), (2, 1))
    ours = run(llm, tokens, positions, np.ones((2, 40), int))
    np.testing.assert_allclose(ours, theirs(model, tokens), atol=1e-4)
    out = export_llama(llm)
    assert set(out) == set(tensors) - ({"lm_head.weight"} if llm.cfg.tied else set())
    for name, array in out.items():
        np.testing.assert_array_equal(array, tensors[name], err_msg=name)


def test_padding_and_packing_equal_the_samples_alone():
    model, fields, tensors = oracle("llama3")
    llm = build(fields, tensors)
    r = np.random.default_rng(0)
    a, b = r.integers(0, 50, 9), r.integers(0, 50, 6)
    tokens = np.concatenate([a, b, [0, 0, 0]])[None]
    positions = np.concatenate([np.arange(9), np.arange(6), [0, 0, 0]])[None]
    segments = np.array([[1] * 9 + [2] * 6 + [0] * 3])
    packed = run(llm, tokens, positions, segments)
    np.testing.assert_allclose(packed[0, :9], theirs(model, a[None])[0], atol=1e-4)
    np.testing.assert_allclose(packed[0, 9:15], theirs(model, b[None])[0], atol=1e-4)
    assert np.isfinite(packed).all()  # padding rows see no key
    # Left padding, as transformers does it.
    left = np.stack([np.concatenate([[0] * 3, b]), a])
    mask = np.stack([[0] * 3 + [1] * 6, [1] * 9])
    positions = np.stack([np.concatenate([[0] * 3, np.arange(6)]), np.arange(9)])
    ours = run(llm, left, positions, mask)
    np.testing.assert_allclose(ours[mask > 0], theirs(model, left, mask)[mask > 0], atol=1e-4)


def test_turns_equal_each_turn_alone_behind_the_prefix():
    cfg = llama.SIZES["tiny"]
    llm = llama.Llama(cfg, rngs=nnx.Rngs(0))
    r = np.random.default_rng(0)
    prefix, one, two = r.integers(0, 320, 5), r.integers(0, 320, 4), r.integers(0, 320, 3)
    tokens = np.concatenate([prefix, one, two])[None]
    positions = np.concatenate([np.arange(5), 5 + np.arange(4), 5 + np.arange(3)])[None]
    turns = np.array([[0] * 5 + [1] * 4 + [2] * 3])
    shared = run(llm, tokens, positions, np.ones_like(tokens), turns)[0]
    for turn, part in ((one, shared[5:9]), (two, shared[9:])):
        alone = np.concatenate([prefix, turn])[None]
        logits = run(llm, alone, np.arange(alone.shape[1])[None], np.ones_like(alone))[0]
        np.testing.assert_allclose(part, logits[5:], atol=1e-5)


def test_added_tokens_are_rows_behind_the_table():
    _, fields, tensors = oracle("plain")
    tensors = {k: np.array(v) for k, v in tensors.items()}
    whole = build(fields, tensors)
    cut = build({**fields, "vocab_size": 47}, tensors, added_tokens=3)
    assert cut.embed_tokens.added.shape == (3, 32) and cut.lm_head.added.shape == (3, 32)
    tokens = np.arange(40, 50)[None]
    args = tokens, np.arange(10)[None], np.ones((1, 10), int)
    np.testing.assert_allclose(run(cut, *args), run(whole, *args), atol=1e-5)
    for name, array in export_llama(cut).items():
        np.testing.assert_array_equal(array, tensors[name], err_msg=name)


def test_a_table_without_added_rows_leaves_them():
    _, fields, tensors = oracle("plain")
    llm = llama.Llama(config_from_hf(fields, added_tokens=2), rngs=nnx.Rngs(0))
    load_llama(llm, tensors)
    llama.init_added_tokens(llm)
    mean = tensors["model.embed_tokens.weight"].mean(0)
    np.testing.assert_allclose(llm.embed_tokens.added[...], np.stack([mean, mean]), atol=1e-6)


def test_mismatches_are_named_at_once():
    _, fields, tensors = oracle("plain")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:7]
    tensors["model.layers.0.mlp.surprise"] = np.zeros(2)
    with pytest.raises(ValueError) as error:
        build(fields, tensors)
    for name in ("layers.1.mlp.up_proj", "lm_head.weight: (7, 32)", "surprise"):
        assert name in str(error.value)


@pytest.mark.parametrize("remat", ["dots", "attention", "full", "offload"])
def test_remat_gives_the_same_gradients(remat):
    def grads(remat):
        cfg = dataclasses.replace(llama.SIZES["tiny"], remat=remat)
        graph, weights = nnx.split(llama.Llama(cfg, rngs=nnx.Rngs(0)))
        tokens = np.arange(12).reshape(1, 12)

        def loss(weights):
            llm = nnx.merge(graph, weights)
            x = llm.embed_tokens(tokens)
            hidden = llm(x, tokens, packed_mask(np.ones_like(tokens)))
            return jnp.square(llm.logits(hidden)).mean()

        return fast(jax.grad(loss))(weights)

    same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)  # noqa: E731
    jax.tree.map(same, grads("none"), grads(remat))


def test_swiglu_has_the_gradients_of_its_formula():
    gate, up, out = np.random.default_rng(0).normal(0, 3, (3, 4, 7)).astype(np.float32)
    formula = lambda g, u: jnp.sum(jax.nn.silu(g) * u * out)  # noqa: E731
    ours = jax.grad(lambda g, u: jnp.sum(llama.swiglu(g, u) * out), argnums=(0, 1))(gate, up)
    for mine, theirs in zip(ours, jax.grad(formula, argnums=(0, 1))(gate, up), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_unknown_rope_scaling_and_family():
    fields = {**SMALL, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    with pytest.raises(ValueError, match="yarn"):
        config_from_hf(fields)
    with pytest.raises(ValueError, match="gpt2"):
        config_from_hf({**SMALL, "model_type": "gpt2"})
    with pytest.raises(ValueError, match="none of"):
        rope.RopeScaling("ntk")


def test_old_and_new_config_files_say_the_same():
    new = {**SMALL, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e4}}
    old = {**SMALL, "rope_theta": 7e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert config_from_hf(json.loads(json.dumps(new))) == config_from_hf(old)


@pytest.mark.parametrize(
    "size, total",
    [
        ("llama3.1-8b", 8_030_261_248),
        ("llama3.1-70b", 70_553_706_496),
        ("llama3.2-1b", 1_235_814_400),
        ("llama2-7b", 6_738_415_616),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_published_sizes(size, total):
    llm = nnx.eval_shape(lambda: llama.Llama(llama.SIZES[size], rngs=rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(llm, nnx.Param))) == total

"""The Q-Former connector against the reference, and its names in BLIP-2's files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert import blip2
from metamorph_jax.errors import WeightError
from metamorph_jax.models import build
from metamorph_jax.models.connectors.perceiver import PerceiverConfig
from metamorph_jax.models.connectors.qformer import QFormer, QFormerConfig
from tests.recipes.minigpt5 import golden

TINY = QFormerConfig(
    PerceiverConfig(queries=3, width=8, heads=2, layers=3, mlp_width=12, key_width=6, qk_norm=False)
)
WIDTH = 10


def config_of(fields: dict) -> QFormerConfig:
    """Of the case; fields that have no meaning here must say what this module does."""
    assert fields["hidden_act"].startswith("gelu (exact")
    return QFormerConfig(
        PerceiverConfig(
            queries=fields["num_queries"],
            width=fields["hidden_size"],
            heads=fields["num_heads"],
            layers=fields["num_layers"],
            mlp_width=fields["intermediate_size"],
            key_width=fields["encoder_width"],
            cross_every=fields["cross_attention_freq"],
            qk_norm=False,
            norm_eps=fields["layer_norm_eps"],
        )
    )


def abstract(cfg: QFormerConfig = TINY, width: int = WIDTH) -> QFormer:
    return nnx.eval_shape(lambda: QFormer(cfg, width, rngs=build.rngs(0)))


def tensors_of(cfg: QFormerConfig = TINY) -> dict[str, np.ndarray]:
    """Random tensors of a connector, by LAVIS's names."""
    out, rng = blip2.export_qformer(abstract(cfg)), np.random.default_rng(0)
    return {key: rng.normal(size=out.shape_of(key)).astype(np.float32) for key in out}


@pytest.mark.golden
def test_equals_the_reference(golden_root):
    """Every layer's states, with all tokens and with some masked, and the linear at the end. The
    case has no norm before the Q-Former, which is filled so that it does nothing to the tokens."""
    case = golden.Case(golden_root, "qformer")
    cfg, weights = config_of(case.config), case.weights()
    tensors = {k.replace("bert.", blip2.QFORMER + "bert.", 1): v for k, v in weights.items()}
    for leaf in ("weight", "bias"):
        tensors[blip2.NORM + leaf] = np.zeros(cfg.resampler.key_width, np.float32)
    model = abstract(cfg, case["out.llama_proj"].shape[-1])
    blip2.load_qformer(model, tensors)
    tokens, mask = case["in.encoder_hidden_states"], case["in.partial_mask"] > 0
    inside = model.resampler

    @jax.jit
    def run(state, tokens, mask):
        inside, proj = nnx.merge(graph, state)
        x = inside.norm(inside.queries[...])
        states = [jnp.broadcast_to(x, (len(tokens), *x.shape[1:]))]
        for layer in inside.layers:
            states.append(layer(states[-1], tokens, None, None))
        last = inside(tokens)
        return jnp.stack(states), last, inside(tokens, mask), proj(last)

    graph, state = nnx.split((inside, model.proj))
    with jax.default_matmul_precision("highest"):
        found = run(state, tokens, mask)
    names = ("hidden_states", "last_hidden_state", "last_hidden_state_partial_mask", "llama_proj")
    for name, value in zip(names, found, strict=True):
        np.testing.assert_allclose(value, case[f"out.{name}"], rtol=1e-4, atol=1e-5, err_msg=name)
    case.check_all_read()


def test_the_norm_is_computed_in_float32():
    cfg = dataclasses.replace(TINY, resampler=dataclasses.replace(TINY.resampler, dtype="bfloat16"))
    tokens = jax.ShapeDtypeStruct((2, 7, 6), jnp.bfloat16)
    graph, state = nnx.split(abstract(cfg))

    def run(state, tokens):
        model = nnx.merge(graph, state)
        return model.norm(tokens), model(tokens)

    normed, found = jax.eval_shape(run, state, tokens)
    assert normed.dtype == jnp.float32
    assert found.shape == (2, 3, WIDTH) and found.dtype == jnp.bfloat16


def test_full_size():
    """All that BLIP-2 trained, with the linear of MiniGPT-4."""
    cfg = QFormerConfig()
    out = blip2.export_qformer(abstract(cfg, 4096))
    assert sorted(out) == sorted(blip2.published_qformer(cfg.resampler)) and cfg.tokens == 32
    # BLIP-2's file has 108,314,880 values, with a linear of the same shape.
    assert sum(int(np.prod(out.shape_of(key))) for key in out) == 108_314_880
    shapes = {
        "query_tokens": (1, 32, 768),
        "ln_vision.weight": (1408,),
        "llama_proj.weight": (4096, 768),
        "Qformer.bert.encoder.layer.10.crossattention.self.key.weight": (768, 1408),
        "Qformer.bert.encoder.layer.11.output_query.LayerNorm.bias": (768,),
    }
    assert {key: out.shape_of(key) for key in shapes} == shapes


# What belongs to text, in files of BLIP-2.
TEXT = ("Qformer.bert.embeddings.word_embeddings.weight", "Qformer.bert.embeddings.position_ids",
        "Qformer.bert.encoder.layer.0.intermediate.dense.weight",
        "Qformer.bert.encoder.layer.1.output.LayerNorm.bias", "Qformer.cls.predictions.bias",
        "t5_proj.weight", "itm_head.bias", "vision_proj.weight", "text_proj.bias", "temp",
        "language_model.lm_head.weight")  # fmt: skip


def same(model: QFormer, tensors) -> None:
    for key, value in blip2.export_qformer(model).items():
        np.testing.assert_array_equal(value, tensors[key], err_msg=key)


def test_in_and_out_with_what_belongs_to_text():
    """Text is left out; so is the linear to another language model, whatever its shape."""
    tensors = tensors_of()
    stray = {key: np.full((WIDTH, 8), 9, np.float32) for key in TEXT}
    tower = {"visual_encoder.cls_token": np.zeros((1, 1, 6), np.float32)}
    model = abstract()
    blip2.load_qformer(model, tensors | stray | tower)
    same(model, tensors)


def test_without_the_linear_and_then_the_linear():
    """As from BLIP-2's file and MiniGPT-4's."""
    tensors, model = tensors_of(), abstract()
    proj = {key: value for key, value in tensors.items() if key.startswith("llama_proj.")}
    rest = {key: value for key, value in tensors.items() if key not in proj}
    blip2.load_qformer(model, rest | {"t5_proj.weight": proj["llama_proj.weight"] + 1}, proj=False)
    assert isinstance(model.proj.kernel.get_raw_value(), jax.ShapeDtypeStruct)
    others = {"Qformer.bert.embeddings.position_ids": np.zeros((1, 9), np.int64)}
    blip2.load_proj(model, proj | others)
    same(model, tensors)
    with pytest.raises(WeightError, match="no llama_proj.weight"):
        blip2.load_proj(model, rest)


def test_names_of_transformers():
    tensors = tensors_of()
    theirs = {}
    for key, value in tensors.items():
        key = key.replace("Qformer.bert.embeddings.LayerNorm", "qformer.layernorm")
        key = key.replace("Qformer.bert.", "qformer.").replace(
            "attention.self.", "attention.attention."
        )
        theirs[key.replace("ln_vision", "vision_model.post_layernorm")] = value
    for prefix in ("", "model."):  # newer versions of transformers have one in memory
        model = abstract()
        named = {k if k.startswith("llama_proj") else prefix + k: v for k, v in theirs.items()}
        blip2.load_qformer(model, named | {f"{prefix}language_projection.bias": np.zeros(3)})
        same(model, tensors)


def test_what_is_missing_and_left_over_is_named():
    tensors = tensors_of()
    del (
        tensors["query_tokens"],
        tensors["Qformer.bert.encoder.layer.2.crossattention.self.key.bias"],
    )
    tensors["Qformer.bert.encoder.layer.1.crossattention.self.key.bias"] = np.zeros(8, np.float32)
    with pytest.raises(WeightError) as error:
        blip2.load_qformer(abstract(), tensors)
    for name in ("query_tokens", "layer.2.crossattention.self.key", "layer.1.crossattention"):
        assert name in str(error.value)

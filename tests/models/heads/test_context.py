"""The context of drawings: which states it is made of, and its numbers against the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.convert import perceiver as published
from metamorph_jax.convert.names import load_torch_dict
from metamorph_jax.models import build
from metamorph_jax.models.connectors.perceiver import PerceiverConfig
from metamorph_jax.models.heads.context import (
    ContextConfig,
    ContextHead,
    lengths,
    newest_first,
)
from tests.recipes.mm_interleaved import golden

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def test_states_from_the_soi_back_to_the_documents_begin():
    table = [  # start, begin, columns that are read
        (5, 2, [5, 4, 3, 2]),
        (6, 1, [6, 5, 4, 3]),  # room for 4: the oldest go
        (2, 2, [2]),
        (1, 0, [1, 0]),  # nothing before the row's begin
        (7, 7, [7]),
        (0, 3, []),  # an unused place
    ]
    start, begin, columns = (list(x) for x in zip(*table, strict=True))
    start, begin = jnp.asarray([start]), jnp.asarray([begin])
    found, mask = newest_first(jnp.arange(8.0).reshape(1, 8, 1), start, begin, 4)
    assert found.shape == (1, len(table), 4, 1) and mask.shape == (1, len(table), 4)
    for states, seen, wanted in zip(found[0, :, :, 0], mask[0], columns, strict=True):
        assert np.asarray(states)[np.asarray(seen)].tolist() == wanted
    assert np.minimum(lengths(start, begin), 4).tolist() == [[len(c) for c in columns]]


def drawings(case):
    """(rows, columns of `soi`, begins) of the images of a batch, in their order."""
    ids, count = case["in/text_ids"], case["in/num_image_per_seq"]
    soi = case.config["special_tokens"]["soi_token_id"]
    starts = [np.flatnonzero(row == soi)[:n] for row, n in zip(ids, count, strict=True)]
    return starts, np.split(case["in/nearest_bos_idxs"], np.cumsum(count)[:-1])


def head_of(case) -> ContextHead:
    size = case.config["perc_i"]
    width = case.config["llm"]["dim"]
    resampler = PerceiverConfig(
        queries=size["num_queries"],
        width=size["hidden_size"],
        heads=size["num_attention_heads"],
        layers=size.get("num_hidden_layers", 1),
        mlp_width=size["intermediate_size"],
        key_width=width,
        cross_every=1,
        qk_norm=False,
    )
    cfg = ContextConfig(width, 2048, resampler)
    head = nnx.eval_shape(lambda: ContextHead(cfg, rngs=build.rngs(0)))
    weights = case.weights("image_decoder.perceiver_resampler.")
    load_torch_dict(head.resampler, weights, rename=published.rename)
    load_torch_dict(head.proj, case.weights("context_feat_proj."))
    null = case.weights("image_decoder.neg_prompt_embeds")
    head.null.set_raw_value(jnp.asarray(null[""]))
    return head


@pytest.mark.golden
def test_equals_the_reference(golden_root):
    case = golden.Case(golden_root, "end_to_end_train")
    graph, state = nnx.split(head_of(case))
    starts, begins = drawings(case)
    most = max(map(len, starts))
    pad = lambda rows: np.stack([np.pad(row, (0, most - len(row))) for row in rows])  # noqa: E731
    valid = np.concatenate([np.arange(most) < len(row) for row in starts])

    def outputs(state, hidden, start, begin):
        head = nnx.merge(graph, state)
        condition, null = head(hidden, start, begin), head.null_condition()
        return *head.features(hidden, start, begin), condition.context, null.context

    run = jax.jit(outputs, compiler_options=FAST)
    with jax.default_matmul_precision("highest"):
        found = run(state, case["mid/llm_last_hidden"], pad(starts), pad(begins))
    features, mask, context, null = map(np.asarray, found)
    room = case["mid/context_attention_mask"].shape[1]
    features, mask = (x.reshape(-1, *x.shape[2:])[valid] for x in (features, mask))
    assert not mask[:, room:].any()
    features, mask = features[:, :room], mask[:, :room]
    np.testing.assert_array_equal(mask, case["mid/context_attention_mask"] > 0)
    wanted = case["mid/context_features"]
    np.testing.assert_allclose(features[mask], wanted[mask], atol=1e-4 * np.abs(wanted).max())
    wanted = case["mid/resampled_condition"]
    np.testing.assert_allclose(context[valid], wanted, atol=1e-4 * np.abs(wanted).max())
    dropped = case["in/uncond_uniform"].ravel() < case.config["uncond_prob"]
    chosen = np.where(dropped[:, None, None], null, context[valid])
    wanted = case["mid/unet_condition"]
    np.testing.assert_allclose(chosen, wanted, atol=1e-4 * np.abs(wanted).max())


def test_what_lies_outside_of_the_document_changes_nothing():
    resampler = PerceiverConfig(queries=2, width=8, heads=2, layers=1, mlp_width=8, key_width=6)
    graph, shapes = nnx.split(
        nnx.eval_shape(lambda: ContextHead(ContextConfig(6, 4, resampler), rngs=build.rngs(0)))
    )
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    start, begin = jnp.asarray([[2, 7]]), jnp.asarray([[1, 3]])
    total = lambda hidden: nnx.merge(graph, state)(hidden, start, begin).context  # noqa: E731
    hidden = jnp.asarray(rng.normal(size=(1, 9, 6)), jnp.float32)
    run = jax.jit(jax.jacobian(lambda h: total(h).sum((1, 2))), compiler_options=FAST)
    read = np.abs(run(hidden)).sum(-1)[:, 0] > 1e-6
    # The second drawing's document is one state longer than the room.
    np.testing.assert_array_equal(np.flatnonzero(read[0]), [1, 2])
    np.testing.assert_array_equal(np.flatnonzero(read[1]), [4, 5, 6, 7])


def test_widths_must_fit():
    cfg = ContextConfig()
    assert (cfg.resampler.queries, cfg.resampler.width, cfg.max_context) == (77, 1024, 512)
    with pytest.raises(ValueError, match="reads width 5120, the hidden states have 4096"):
        dataclasses.replace(cfg, width=4096)

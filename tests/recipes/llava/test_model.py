"""What a LLaVA model is made of, what its stages train, and training with anyres."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.config import build
from metamorph_jax.data import pipeline
from metamorph_jax.errors import ConfigError
from metamorph_jax.models.build import rngs
from metamorph_jax.models.lora import LoraConfig
from metamorph_jax.recipe import Shard
from metamorph_jax.recipes import llava as recipe
from metamorph_jax.sampling.requests import Request
from metamorph_jax.train.state import trained_filter
from metamorph_jax.types import NEWLINE
from tests.recipes.llava.tiny import ANYRES, SIZES, TINY, P, data_config, fast, make, write

change = dataclasses.replace


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def model():
    return make(ANYRES)


def batches(cfg, data, rows=1):
    stream = recipe.open_data(data, cfg, Shard(rows))
    found = [*stream]
    assert not dict(stream.skipped)
    stream.close()
    return found


# ---- parts and stages


def trained(cfg, stage) -> set[str]:
    model = nnx.eval_shape(lambda: recipe.create(cfg, rngs(0)))
    state = nnx.state(model, trained_filter(recipe.STAGES[stage](cfg)))
    return {model.param_group(path) for path, _ in nnx.to_flat_state(state)}


LORA = LoraConfig(rank=2)


@pytest.mark.parametrize(
    ("changes", "connector", "instruct"),
    [
        ({}, {"connector"}, {"connector", "llm"}),
        ({"merge": "spatial_unpad"}, {"connector", "newline"}, {"connector", "newline", "llm"}),
        ({"start_end": True}, {"connector", "tokens"}, {"connector", "tokens", "llm"}),
        ({"start_end": True, "trained_tokens": "none"}, {"connector", "tokens"},
         {"connector", "llm"}),
        ({"train_tower": True}, {"connector"}, {"connector", "llm", "tower"}),
        ({"lora": LORA, "frozen_weights": "nf4_double"}, {"connector"}, {"connector", "lora"}),
        ({"lora": LORA, "merge": "spatial_unpad"}, {"connector", "newline"},
         {"connector", "newline", "lora"}),
    ],
)  # fmt: skip
def test_stages(changes, connector, instruct):
    """The tower is frozen unless asked for; adapters leave connector and newline trained."""
    cfg = change(TINY, **changes)
    assert trained(cfg, "connector") - {"lora"} == connector
    assert trained(cfg, "instruct") == instruct


def test_packed_weights_without_adapters_are_refused():
    with pytest.raises(ConfigError, match="set config.model.lora, too"):
        recipe.STAGES["instruct"](change(TINY, frozen_weights="nf4"))


@pytest.mark.parametrize(
    ("option", "value"),
    [("image_mode", "stretch"), ("merge", "unpad"), ("connector", "mlp"), ("llm", "gpt2"),
     ("trained_tokens", "new"), ("text_chunk", 0), ("frozen_weights", "int3")],
)  # fmt: skip
def test_wrong_options_are_named(option, value):
    with pytest.raises(ValueError, match=f"{option} .*{value}"):
        change(TINY, **{option: value})


def test_grids_come_from_a_config():
    cfg = build(recipe.Config, {"grids": [[336, 672], [672, 336]], "llm": "tiny"}, "config.model")
    assert cfg.grids == ((336, 672), (672, 336))


def test_newline_starts_at_the_scale_of_embeddings():
    """N(0, 1) / sqrt(D)."""
    cfg = change(ANYRES, llm_options={"width": 1024, "layers": 1, "mlp_width": 8})
    found = np.asarray(recipe.create(cfg, nnx.Rngs(0)).newline[...])
    np.testing.assert_allclose(found.std(), 1 / 32, rtol=0.1)


def test_start_and_end_around_every_image(file):
    cfg = change(TINY, start_end=True)
    model = make(cfg)
    table, added = model.llm.embed_tokens.embedding[...], model.llm.embed_tokens.added[...]
    np.testing.assert_allclose(added, np.tile(table.mean(0), (2, 1)), rtol=1e-5)
    (batch,) = batches(cfg, data_config(file))
    tokens, slots = batch.tokens[0], batch.image_slots[0]
    starts = np.flatnonzero((slots >= 0) & (slots % P == 0))
    assert len(starts) == len(SIZES)
    V = recipe.llm_config(cfg).vocab_size
    assert (tokens[starts - 1] == V).all() and (tokens[starts + P] == V + 1).all()


# ---- anyres


def test_images_of_all_shapes_are_packed(file):
    """Static shapes; the number of tokens follows from each image's size; none of them is cut."""
    data = data_config(file)
    found = batches(ANYRES, data)
    spec = recipe.batch_spec(data, ANYRES, 1)
    views = recipe.input_spec(ANYRES).views
    slots = np.concatenate([b.image_slots[b.segments > 0] for b in found])
    plans = [views.plan(size) for size in SIZES]
    assert len(plans[-1][1]) == P  # 500 x 1: only the whole image is left
    assert (slots >= 0).sum() == sum((plan >= 0).sum() for _, plan in plans)
    assert (slots == NEWLINE).sum() == sum((plan == NEWLINE).sum() for _, plan in plans)
    assert sum(b.images.valid.sum() for b in found) == sum(count for count, _ in plans)
    assert max(b.segments.max() for b in found) > 1
    for batch in found:
        assert jax.tree.map(np.shape, batch) == jax.tree.map(np.shape, spec)


def gradients(model, batch):
    graph, trained, rest = nnx.split(
        model, trained_filter(recipe.STAGES["instruct"](model.cfg)), ...
    )

    def loss(trained):
        sums, _ = nnx.merge(graph, trained, rest).loss_sums(batch)
        return sums["text"]

    total, found = fast(jax.value_and_grad(loss))(trained)
    return float(total), {
        ".".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(found)
    }


@pytest.fixture(scope="module")
def anyres_batch(file):
    """One row with all samples."""
    (batch,) = batches(ANYRES, data_config(file, length=512))
    return batch


def test_anyres_trains_newline_connector_and_tower(model, anyres_batch):
    whole = nnx.merge(nnx.split(make(change(ANYRES, train_tower=True)))[0], nnx.state(model))
    total, found = gradients(whole, anyres_batch)
    assert np.isfinite(total) and all(np.isfinite(x).all() for x in found.values())
    assert np.abs(found["newline"]).max() > 0
    assert np.abs(found["connector.linears.0.kernel"]).max() > 0
    assert np.abs(found["vision.tower.patch_embedding.kernel"]).max() > 0


def test_packing_changes_no_loss(model, anyres_batch, file):
    """All samples in one row, or one in each: the same sum."""
    alone = batches(ANYRES, data_config(file, length=512, packing="pad"), rows=1)
    assert len(alone) == len(SIZES) + 1
    graph, weights = nnx.split(model)
    run = fast(lambda weights, batch: nnx.merge(graph, weights).loss_sums(batch)[0]["text"])
    each = sum(float(run(weights, batch)) for batch in alone)
    np.testing.assert_allclose(float(run(weights, anyres_batch)), each, rtol=1e-5)


def test_features_from_a_cache_give_the_same_embeddings(model, anyres_batch, file, tmp_path):
    data = data_config(file, length=512)
    cache = dataclasses.replace(data.cache, features=str(tmp_path))
    data = dataclasses.replace(data, cache=cache)
    # The tower's weights are random here, so the cache is filled by this model's own tower.
    spec, sources = recipe.input_spec(ANYRES), pipeline.open_sources(data, recipe.KINDS)
    see = lambda: lambda pixels: model.visual_features(jnp.asarray(pixels))  # noqa: E731
    pipeline.fill_feature_cache(data, spec, sources, see)
    (cached,) = batches(ANYRES, data)
    assert cached.images.pixels is None
    a, b = model.embed(cached), model.embed(anyres_batch)
    valid = anyres_batch.segments > 0
    np.testing.assert_allclose(a[valid], b[valid], atol=5e-3)  # features are kept in 16 bits


def test_a_tower_that_is_trained_has_no_feature_cache(file, tmp_path):
    data = data_config(file)
    data = change(data, cache=change(data.cache, features=str(tmp_path)))
    with pytest.raises(ConfigError, match="train_tower has no use for config.data.cache.features"):
        recipe.open_data(data, change(TINY, train_tower=True), Shard(1))


def test_a_prompt_is_embedded_as_in_training(model, anyres_batch, file):
    """The generator's prompt of a sample is the beginning of its row, newline vectors included."""
    data = data_config(file, length=512)
    embeds = np.asarray(model.embed(anyres_batch))[0]
    copy = nnx.merge(*nnx.split(model))
    generator = recipe.generator(copy, ANYRES, data)
    for k in (0, len(SIZES) - 1):
        request = Request(str(k), "<image>\nWhat is it?", (str(file.parent / f"{k}.png"),))
        got, ids, *_ = generator.prompt(request, 8)
        row = anyres_batch.segments[0] == k + 1
        np.testing.assert_allclose(got, embeds[row][: len(got)], atol=1e-5)
        read = anyres_batch.image_slots[0][row][: len(ids)] != -1
        assert ((ids == -1) == read).all()
    (reply,) = generator.generate([request], draw=False)
    assert isinstance(reply.text, str)

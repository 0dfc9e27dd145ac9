"""The MetaMorph model: losses, options, fixes, stages; numbers are in the golden test."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.models import build
from metamorph_jax.models.heads.visual_flow import FlowConfig
from metamorph_jax.recipes import metamorph as recipe
from metamorph_jax.recipes.metamorph.model import hidden_tokens
from metamorph_jax.train.state import trained_filter
from metamorph_jax.types import Images
from tests.recipes.metamorph.tiny import (
    TINY,
    I,
    L,
    P,
    change,
    fast,
    grads,
    make,
    make_batch,
    sums_of,
)


def test_metrics_and_sources():
    model = make()
    sums, metrics = sums_of(model, make_batch())
    counts = model.loss_counts(make_batch())
    assert {k: int(v) for k, v in counts.items()} == {"text": 2 * 3, "visual": 2 * 4}
    for kind in ("text", "visual"):
        a, b = metrics[f"{kind}_loss/a"], metrics[f"{kind}_loss/b"]
        np.testing.assert_allclose(a[0] + b[0], sums[kind], rtol=1e-5)
        assert a[1] + b[1] == counts[kind]
    assert 0 < float(metrics["visual_cosine_floor"][0] / metrics["visual_cosine_floor"][1]) <= 1


def test_a_batch_without_targets_is_finite():
    for batch in (make_batch(answers=False), make_batch(answers=False, text=False)):
        loss, _, found = grads(make(), batch)
        assert np.isfinite(loss) and all(np.isfinite(g).all() for g in found.values())
        assert not any(g.any() for k, g in found.items() if k.startswith("head"))


def test_a_batch_without_pictures():
    batch = dataclasses.replace(
        make_batch(answers=False), image_slots=np.full((2, L), -1, np.int32),
        images=Images(np.zeros((2, 0), bool), np.zeros((2, 0), np.int32)),
    )  # fmt: skip
    assert np.isfinite(grads(make(), batch)[0])


@pytest.mark.parametrize("limit", [4, 6, 100])
def test_max_visual_targets_changes_nothing(limit):
    whole = make()
    graph, weights = nnx.split(whole)
    few = make(dataclasses.replace(TINY, max_visual_targets=limit))
    nnx.update(few, weights)
    a, b = grads(whole, make_batch()), grads(few, make_batch())
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
    for name in a[2]:
        np.testing.assert_allclose(a[2][name], b[2][name], atol=1e-6, err_msg=name)


def test_more_visual_targets_than_allowed_is_not_silent():
    model = make(dataclasses.replace(TINY, max_visual_targets=3))
    assert np.isnan(sums_of(model, make_batch())[0]["visual"])


def test_features_give_the_numbers_of_pixels():
    model, batch = make(), make_batch()
    features = model.visual_features(batch.images.pixels.reshape(4, 32, 32, 3))

    def with_features(x):
        return dataclasses.replace(
            batch, images=dataclasses.replace(batch.images, pixels=None, features=x)
        )

    cached = with_features(np.asarray(features).reshape(2, I, P, -1))
    a, b = grads(model, batch), grads(model, cached)
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    towerless = change(TINY, dict(tower="none", feature_width=32))
    other = make(towerless)
    nnx.update(other, nnx.state(model, lambda path, _: path[0] != "vision"))
    np.testing.assert_allclose(grads(other, cached)[0], a[0], rtol=1e-6)
    with pytest.raises(ValueError, match="no tower"):
        other.loss_sums(batch)
    wide = with_features(np.zeros((2, I, P, 5), np.float32))
    with pytest.raises(ValueError, match="features are 5 wide, the model takes 32"):
        model.loss_sums(wide)


def test_gradients_reach_the_tower_only_when_it_is_trained():
    for train in (False, True):
        model = make(dataclasses.replace(TINY, train_tower=train))
        _, _, found = grads(model, make_batch())
        assert any(g.any() for k, g in found.items() if k.startswith("vision.tower")) == train


def test_no_gradient_through_targets():
    """With the text loss off, an answer picture that nothing reads as input has no gradient."""
    model = make(dataclasses.replace(TINY, train_tower=True))
    batch = make_batch(text=False)
    slots = np.where(batch.image_slots >= 4, -1, batch.image_slots)  # the answer is target only

    def loss(pixels):
        images = dataclasses.replace(batch.images, pixels=pixels)
        one = dataclasses.replace(batch, image_slots=slots, images=images)
        return model.loss_sums(one)[0]["visual"]

    found = fast(jax.grad(loss))(batch.images.pixels.astype(np.float32) / 255)
    assert np.abs(found[:, 0]).max() > 0 and not np.abs(found[:, 1]).any()


def names(model, stage):
    state = nnx.state(model, trained_filter(recipe.STAGES[stage](model.cfg)))
    return {".".join(map(str, p)) for p, _ in nnx.to_flat_state(state)}


def test_stages():
    untied = dataclasses.replace(TINY, llm_options={"tied": False})
    everything = names(make(untied), "vpit") | {
        ".".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(make(untied), nnx.Param))
    }
    connector = {n for n in everything if n.startswith("connector.")}
    embed = {n for n in everything if n.startswith("llm.embed_tokens")}
    added, head_added = "llm.embed_tokens.added", "llm.lm_head.added"
    tower = {n for n in everything if n.startswith("vision.tower.")}
    assert tower and connector and len(embed) == 2

    def stage(name, **options):
        return names(make(dataclasses.replace(untied, **options)), name)

    assert stage("connector") == connector | {added}
    assert stage("connector", connector_tokens="all") == connector | embed
    assert stage("connector", connector_tokens="none") == connector
    assert stage("vpit") == everything - tower
    assert stage("vpit", train_tower=True) == everything
    frozen = {"llm.embed_tokens.embedding", "llm.lm_head.kernel"}
    assert stage("vpit", vpit_tokens="added") == everything - tower - frozen
    assert stage("vpit", vpit_tokens="none") == everything - tower - frozen - {added, head_added}


def test_param_groups():
    model = make(change(TINY, dict(reduction="mlpmixer")))
    groups = {model.param_group(p) for p, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert groups == {"tower", "connector", "llm", "tokens", "head"}


@pytest.mark.parametrize(
    "options",
    [
        dict(head="linear"),
        dict(head="mlp2x_gelu"),
        dict(vision=dict(reduction="concat_interpolation")),
        dict(vision=dict(reduction="mlpmixer", tokens=5)),
        dict(vision=dict(reduction="area")),
        dict(connector="linear"),
        dict(connector="mlpsoftmax"),
        dict(connector="mlp3x_gelu"),
        dict(connector="identity", llm_options={"width": 32}),
        dict(vision=dict(normalize=False)),
        dict(vision=dict(softmax=True)),
        dict(visual_loss="smooth_l1"),
        dict(visual_loss="infonce"),
        dict(vision=dict(tower="clip-tiny")),
        dict(
            vision=dict(tower="dinov2-tiny", dtype="bfloat16", remat=True),
            dtype="bfloat16",
            remat="full",
        ),
        dict(vision=dict(tokens=-1)),
    ],
)
def test_every_option_trains(options):
    cfg = change(TINY, **options)
    model = make(cfg)
    tokens = model.feature_shape[0]
    batch = make_batch()
    if tokens != P:  # another number of slots: the first 4 of each picture will do
        move = lambda x: np.where(x >= 4, x - 4 + tokens, x).astype(np.int32)  # noqa: E731
        batch = dataclasses.replace(
            batch, image_slots=move(batch.image_slots), visual_targets=move(batch.visual_targets)
        )
    loss, metrics, found = grads(model, batch, trained_filter(recipe.STAGES["vpit"](model.cfg)))
    assert np.isfinite(loss)
    silent = {n for n, g in found.items() if not g.any()}
    if cfg.vision.tokens != -1:
        assert not {n for n in silent if n.startswith(("connector", "head"))}, silent
    hidden = jnp.ones((1, 3, model.llm.cfg.width))
    assert model.predict_visual(hidden).shape == (1, 3, model.feature_shape[1])


def test_a_head_that_samples_trains():
    """Every part of it, with another loss for another key, and no NaN without answer images."""
    cfg = change(TINY, head="flow", flow=FlowConfig(width=16, depth=2, draws=2, drop_state=0.3))
    model, batch = make(cfg), make_batch()
    for block in (*model.head.blocks, model.head):
        block.modulation.kernel[...] += 0.1
    model.head.out.kernel[...] += 0.1
    pattern = trained_filter(recipe.STAGES["vpit"](cfg))
    loss, metrics, found = grads(model, batch, pattern)
    assert np.isfinite(loss) and "visual_cosine" not in metrics
    assert not {n for n, g in found.items() if n.startswith(("connector", "head")) and not g.any()}
    of_key = lambda n: model.loss_sums(batch, jax.random.key(n))[0]["visual"]  # noqa: E731
    assert of_key(0) != of_key(1) and of_key(0) == of_key(0)
    empty, _, _ = grads(model, make_batch(answers=False), pattern)
    assert np.isfinite(empty)
    parts = {work.part: work for work in model.work(batch)}
    with_one_draw = change(cfg, flow=dataclasses.replace(cfg.flow, draws=1))
    other = {work.part: work for work in make(with_one_draw).work(batch)}
    assert parts["visual head"].forward == 2 * other["visual head"].forward > 0


def test_full_size_by_shapes():
    model = nnx.eval_shape(lambda: recipe.create(recipe.Config(), build.rngs(0)))
    count = lambda f: sum(x.size for x in jax.tree.leaves(nnx.state(model, f)))  # noqa: E731
    llm = lambda path, _: path[0] == "llm"  # noqa: E731
    assert count(llm) == 8_030_261_248 + 4 * 4096  # two new rows in each table
    assert model.feature_shape == (64, 1152)
    assert (model.image_start, model.image_end) == (128256, 128257)
    trained = count(trained_filter(recipe.STAGES["connector"](model.cfg)))
    assert trained == 1152 * 4096 + 4096 + 4096 * 4096 + 4096 + 2 * 4096


def test_visual_dropout_hides_tokens_of_answer_pictures_only():
    batch = make_batch()
    hide = jax.jit(jax.vmap(lambda key, share: hidden_tokens(key, batch, P, share), (0, None)))
    keys = jax.random.split(jax.random.key(0), 400)
    hidden = np.asarray(hide(keys, 1.0))  # [400, B, I * P]; tokens 4…7 are the answer
    assert not hidden[..., :P].any()
    answers = hidden[:, :, P:]
    assert 0.65 < answers.mean() < 0.85
    assert 0.5 < answers.all(-1).mean() < 0.8  # whole pictures: what drawing starts from
    assert not np.asarray(hide(keys, 0.0)).any()
    assert not np.asarray(hidden_tokens(keys[0], make_batch(answers=False), P, 1.0)).any()


def test_visual_dropout_needs_a_key_and_leaves_targets_alone():
    model = make(dataclasses.replace(TINY, visual_dropout=1.0))
    batch = make_batch()
    _, shown = model.embed(batch)
    plain, _ = model.embed(batch)
    dropped, targets = model.embed(batch, jax.random.key(1))
    np.testing.assert_array_equal(shown, targets)
    changed = np.abs(np.asarray(dropped - plain)).max(-1) > 0
    assert changed[:, 8:12].any() and not changed[:, :8].any() and not changed[:, 12:].any()

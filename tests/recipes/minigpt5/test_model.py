"""What is trained, what the losses are means over, and what a dropped condition is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.models import build
from metamorph_jax.models.diffusion import clip_text
from metamorph_jax.models.prefix import PrefixConfig
from metamorph_jax.recipes import minigpt5 as recipe
from metamorph_jax.recipes.minigpt5.config import LORA
from metamorph_jax.recipes.minigpt5.weights import shrink_old_rows
from metamorph_jax.train.state import trained_filter
from tests.recipes.minigpt5.tiny import TINY, VOKENS, J, caption, fast, make, make_batch

ADAPTED = dataclasses.replace(LORA, rank=2, dropout=0.0)


def changed(**changes) -> recipe.Config:
    return dataclasses.replace(TINY, **changes)


def trained(cfg, stage: str) -> set[str]:
    """Parts of what a stage trains; of the mapper, its parts."""
    model = nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0)))
    pattern = recipe.STAGES[stage](cfg)
    paths = [p for p, _ in nnx.to_flat_state(nnx.state(model, trained_filter(pattern)))]
    named = {".".join(map(str, p[:2])) if p[0] == "mapper" else model.param_group(p) for p in paths}
    rows = {p[1] for p in paths if model.param_group(p) == "tokens"}
    assert rows == {"embed_tokens", "lm_head"}
    return named - {"tokens"}


_MAPPER = {f"mapper.{name}" for name in ("fc1", "fc2", "queries", "encoder", "decoder")}
_TRANSFORMER = {"mapper.encoder", "mapper.decoder"}


@pytest.mark.parametrize(
    ("stage", "changes", "wanted"),
    [
        ("uas", {}, _MAPPER),
        ("uas", {"lora": ADAPTED}, _MAPPER),
        ("mls", {}, _TRANSFORMER),
        ("mls", {"lora": ADAPTED}, _TRANSFORMER | {"lora"}),
        ("mls", {"prefix": PrefixConfig(2, 4)}, _TRANSFORMER | {"prefix"}),
        ("mls", {"train_fc": True}, _MAPPER),
        ("mls", {"mapper": dataclasses.replace(TINY.mapper, kind="mlp")},
         {"mapper.fc1", "mapper.fc2", "mapper.queries", "mapper.spread"}),
        ("uas", {"mapper": dataclasses.replace(TINY.mapper, learned_queries=False)},
         _MAPPER - {"mapper.queries"}),
        ("uas", {"train_connector": True, "train_denoiser": True},
         _MAPPER | {"connector", "denoiser"}),
    ],
)  # fmt: skip
def test_stages(stage, changes, wanted):
    assert trained(changed(**changes), stage) == wanted


def test_frozen_matrices_are_kept_in_bfloat16_and_trained_ones_are_not():
    cfg = changed(frozen_dtype="bfloat16", lora=ADAPTED, prefix=PrefixConfig(2, 4))
    model = nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0)))
    kinds = {True: set(), False: set()}
    chosen = [trained_filter(recipe.STAGES[stage](cfg)) for stage in recipe.STAGES]
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name, value = ".".join(map(str, path)), variable.get_raw_value()
        matrix = path[-1] in ("kernel", "embedding") and "prefix" not in path
        if matrix or any(f(path, variable) for f in chosen):
            is_trained = any(f(path, variable) for f in chosen)
            kinds[is_trained].add(str(value.dtype))
            assert (value.dtype == jnp.bfloat16) is not is_trained, name
    assert kinds == {True: {"float32"}, False: {"bfloat16"}}


def test_widths_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="mapper.width is 65, the width of llm is 64"):
        changed(mapper=dataclasses.replace(TINY.mapper, width=65))
    with pytest.raises(ValueError, match="vision.tokens to 17"):
        changed(vision=dataclasses.replace(TINY.vision, tokens=16))
    with pytest.raises(ValueError, match="unsupervised_tail is 3"):
        changed(unsupervised_tail=3)


# ---- losses


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def run(model):
    """(batch, key) -> (counts, sums, metrics, gradients of the image loss), compiled once."""
    own = trained_filter(recipe.STAGES["uas"](TINY))
    graph, own, rest = nnx.split(model, own, ...)

    @fast
    def compute(own, rest, batch, key):
        def loss(own):
            sums, metrics = nnx.merge(graph, own, rest).loss_sums(batch, key)
            return sums["image"], (sums, metrics)

        grads, (sums, metrics) = jax.grad(loss, has_aux=True)(own)
        return nnx.merge(graph, own, rest).loss_counts(batch), sums, metrics, grads

    return lambda batch, key=0: compute(own, rest, batch, jax.random.key(key))


def test_losses_count_what_is_there(run):
    """Text targets, drawings in places that are filled, and those that have a caption."""
    batch = make_batch()
    counts, sums, metrics, _ = run(batch)
    assert counts == {"text": 6 + 4, "image": 3, "caption": 2}
    assert all(np.isfinite(x) and x > 0 for x in sums.values())
    assert metrics["image_loss"][1] == 3 and metrics["image_loss/one"][1] == 1
    assert metrics["caption_loss/two"][1] == 1
    # What stands in places that are not filled changes nothing, and neither do missing captions.
    rng = np.random.default_rng(1)
    drawings = batch.drawings
    pixels = np.where(drawings.valid[..., None, None, None], drawings.pixels,
                      rng.integers(0, 256, drawings.pixels.shape, np.uint8))  # fmt: skip
    captions = drawings.captions.copy()
    captions[0, 1, 1:] = 5
    other = dataclasses.replace(drawings, pixels=pixels, captions=captions)
    _, again, *_ = run(dataclasses.replace(batch, drawings=other))
    for name in sums:
        np.testing.assert_allclose(again[name], sums[name], rtol=1e-6)


def test_a_batch_without_drawings_has_a_loss_of_text_alone(run):
    batch = make_batch()
    nothing = dataclasses.replace(batch.drawings, valid=np.zeros((2, J), bool))
    counts, sums, *_ = run(dataclasses.replace(batch, drawings=nothing))
    assert counts["image"] == counts["caption"] == sums["image"] == sums["caption"] == 0
    assert sums["text"] > 0


def test_a_dropped_condition_is_zero_vokens_and_the_empty_caption(model):
    batch = make_batch()
    states = np.random.default_rng(0).normal(size=(2, batch.tokens.shape[1], 64))
    states = states.astype(np.float32)
    kept = np.array([True, False, True, True, True, False])
    graph, weights = nnx.split(model)

    @fast
    def compute(weights, states):
        model, start = nnx.merge(graph, weights), batch.drawings.start
        one = model.mapper(states[:1, start[0, 1] : start[0, 1] + VOKENS])
        conditions = (model.conditions(states, start, kept), model.conditions(states, start), one)
        features = model.caption_features(ids, np.array([True, False, True]))
        return [c.context for c in (*conditions, model.mapper.null_condition())], features

    ids = np.array([caption(7, 8), caption(7, 8), caption()], np.int32)
    (found, whole, one, null), features = compute(weights, states)
    wanted = np.where(kept[:, None, None], whole, null)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(whole[1], one[0], atol=1e-5)
    np.testing.assert_allclose(features[1], features[2], atol=1e-6)
    assert not np.allclose(features[0], features[1], atol=1e-3)


def test_chance_leaves_the_text_as_it_is(run):
    """Which conditions are dropped, and which noise is drawn, is nothing to the text loss."""
    one, other = (run(make_batch(), key)[1] for key in (0, 1))
    np.testing.assert_allclose(one["text"], other["text"], rtol=1e-6)
    assert one["caption"] != other["caption"] and one["image"] != other["image"]


def test_padding_of_captions_is_hidden(model):
    """From all that stands before it; the features at padding are its own."""
    ids = np.array([caption(7), caption(7)], np.int32)
    ids[1, 3:] = 40
    seen = np.asarray(model.caption_features(ids, np.array([True, True])))
    np.testing.assert_allclose(seen[0, :3], seen[1, :3], atol=1e-6)
    cfg = TINY.text_encoder
    np.testing.assert_array_equal(clip_text.not_padding(ids, cfg), [[True] * 3 + [False] * 3] * 2)
    np.testing.assert_array_equal(clip_text.without_text(ids, cfg, 5)[0], [62, 63, 5, 5, 5, 5])
    unmasked = np.asarray(model.text_encoder(ids).last)
    assert not np.allclose(unmasked[0, 3:], seen[0, 3:], atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "left"),
    [({"caption_coef": 0.0}, {"text", "image"}), ({"text_encoder": None}, {"text", "image"}),
     ({"image_coef": 0.0}, {"text", "caption"})],
)  # fmt: skip
def test_losses_without_weight_are_not_computed(changes, left):
    cfg, batch = changed(**changes), make_batch()
    model = nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0)))
    graph, weights = nnx.split(model)
    shapes = jax.eval_shape(
        lambda w: (nnx.merge(graph, w).loss_counts(batch),
                   nnx.merge(graph, w).loss_sums(batch, jax.random.key(0))[0]), weights
    )  # fmt: skip
    assert {*model.loss_weights} == {*shapes[0]} == {*shapes[1]} == left
    parts = {work.part for work in model.work(batch)}
    assert ("denoiser" in parts) is ("image" in left)
    assert ("text encoder" in parts) is ("caption" in left)


def test_gradients_flow_through_what_is_frozen(run):
    """Of the image loss alone, through denoiser and language model to the rows of vokens."""
    *_, found = run(make_batch())
    rows = np.abs(found["llm"]["embed_tokens"]["added"][...]).max(1)
    # The placeholder is never read. The last voken is, before the second image of a sample.
    assert (rows[:VOKENS] > 0).all() and rows[VOKENS] == 0
    assert not np.any(found["llm"]["lm_head"]["added"][...])
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(found["mapper"]))


def test_old_rows_shrink(model):
    llm = nnx.merge(*nnx.split(make().llm))
    before = jax.tree.map(np.asarray, nnx.state(llm))
    shrink_old_rows(llm, 0.5)
    after = nnx.state(llm)
    for table, leaf in (("embed_tokens", "embedding"), ("lm_head", "kernel")):
        np.testing.assert_array_equal(after[table][leaf][...], before[table][leaf][...] * 0.5)
        np.testing.assert_array_equal(after[table]["added"][...], before[table]["added"][...])

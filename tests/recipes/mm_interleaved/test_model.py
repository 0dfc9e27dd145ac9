"""The MM-Interleaved model: what stages train, dtypes, options, losses' counts; numbers are in the
golden test."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.data.config import DataConfig, RowConfig
from metamorph_jax.errors import ConfigError
from metamorph_jax.models import build
from metamorph_jax.models.heads.context import ContextConfig
from metamorph_jax.recipe import Shard
from metamorph_jax.recipes import mm_interleaved as recipe
from metamorph_jax.recipes.mm_interleaved.config import insert_config
from metamorph_jax.train.state import trained_filter
from tests.recipes.mm_interleaved.tiny import TINY, change, fast, make, make_batch


def outline(cfg):
    return nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0)))


def names(state) -> set[str]:
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


def trained(model, stage: str) -> set[str]:
    return names(nnx.state(model, trained_filter(recipe.STAGES[stage](model.cfg))))


def test_stages():
    model = outline(TINY)
    everything = names(nnx.state(model, nnx.Param))
    found = trained(model, "pretrain")
    frozen = everything - found
    parts = ("vision.adapter.tower.", "llm.layers.", "llm.embed_tokens.", "llm.norm.")
    alone = {"llm.lm_head.kernel", "llm.lm_head.bias"}
    tokens = {n for n in frozen if n.startswith("decoder.") and n.endswith(".ignore_token")}
    assert frozen == {n for n in everything if n.startswith(parts)} | alone | tokens and tokens
    assert {"llm.lm_head.added", "llm.lm_head.added_bias", "soi", "context.null"} <= found
    assert {"llm.inserts.gate", "llm.inserts.attn.ignore_token"} <= found
    assert trained(model, "sft") == found
    model = outline(change(TINY, train_llm=True, train_tower=True))
    assert trained(model, "sft") - found == {
        n for n in everything if n.startswith(("vision.adapter.tower.", "llm.layers.", "llm.norm."))
    }
    tied = outline(change(TINY, llm_options={"vocab_size": 49152}))
    assert "llm.embed_tokens.added" in trained(tied, "pretrain")
    assert "llm.embed_tokens.embedding" not in trained(tied, "sft")


def test_param_groups():
    model = outline(TINY)
    groups = {model.param_group(p) for p, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert groups == {
        "tower", "adapter", "resampler", "llm", "mmfs", "tokens", "context", "denoiser"
    }  # fmt: skip


def test_frozen_weights_are_small():
    """Kernels and tables that no stage trains take the dtype; what is trained stays float32."""
    model = outline(change(TINY, frozen_dtype="bfloat16"))
    small = {
        ".".join(map(str, path))
        for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if x.dtype == jnp.bfloat16
    }
    assert not small & trained(model, "sft")
    assert {"llm.embed_tokens.embedding", "llm.lm_head.kernel"} < small
    assert any(n.startswith("vision.adapter.tower.layers") for n in small)
    more = outline(change(TINY, frozen_dtype="bfloat16", train_llm=True))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(more.llm.layers)))
    assert {x.dtype for x in jax.tree.leaves(nnx.state(outline(TINY), nnx.Param))} == {
        jnp.dtype("float32")
    }


def reads_alone(trained_names: set[str]) -> set[str]:
    """Without what draws, and what makes the map that only the UNet samples."""
    drawing = ("decoder.", "context.", "vision.adapter.up.", "vision.adapter.prior.projections.0.")
    return {n for n in trained_names if not n.startswith(drawing)}


def test_a_model_that_only_reads():
    """Its text loss is that of one that draws; its step has no work of drawing."""
    both, alone = make_batch(), dataclasses.replace(make_batch(), drawings=None)
    model, found, flops, trained = make(), [], [], []
    for cfg, batch in ((TINY, both), (change(TINY, max_drawings=0), alone)):
        model.cfg = cfg
        graph, weights = nnx.split(model)

        def sums(weights, batch, graph=graph):
            return nnx.merge(graph, weights).loss_sums(batch, jax.random.key(3))[0]

        step = fast(sums).lower(weights, batch).compile()
        found.append(step(weights, batch))
        flops.append({w.part: w.forward for w in model.work(batch)})
        flops[-1]["step"] = step.cost_analysis()["flops"]
        trained.append(names(nnx.state(model, trained_filter(recipe.STAGES["sft"](cfg)))))
        assert model.loss_counts(batch).keys() == model.loss_weights.keys() == found[-1].keys()
    assert found[1].keys() == {"text"} and float(found[1]["text"]) == float(found[0]["text"])
    assert trained[1] == reads_alone(trained[0]) != trained[0]
    spared = {part: work for part, work in flops[0].items() if part not in flops[1]}
    assert spared.keys() == {"context", "denoiser"}
    assert flops[0]["step"] - flops[1]["step"] > sum(spared.values())


def test_input_of_a_model_that_only_reads():
    cfg = change(TINY, max_drawings=0)
    assert recipe.input_spec(cfg).drawings is None
    spec = recipe.batch_spec(DataConfig(row=RowConfig(length=64, images=4)), cfg, 3)
    assert spec.drawings is None and spec.images.pixels.shape[1] == 4
    model = outline(cfg)
    recipe.initialize(model, [spec])  # has no images to measure
    with pytest.raises(ValueError, match="max_drawings must be at least 0, not -1"):
        change(TINY, max_drawings=-1)


@pytest.mark.parametrize(("mean", "images"), [("images", 4), ("drawings", 3)])
def test_counts(mean, images):
    """The reference divides by all images, drawn or not."""
    batch = make_batch()
    model = outline(change(TINY, image_mean=mean))
    counts = {k: int(v) for k, v in model.loss_counts(batch).items()}
    assert counts == {"text": int((batch.text_targets >= 0).sum()), "image": images}


def test_parts_that_do_not_fit():
    narrow = ContextConfig(32, 8, dataclasses.replace(TINY.context.resampler, key_width=32))
    with pytest.raises(ValueError, match="context.width is 32, the width of llm is 64"):
        change(TINY, context=narrow)
    with pytest.raises(ValueError, match="images_before is 4"):
        change(TINY, images_before=4)
    with pytest.raises(ValueError, match="image_mean 'all' is none of images, drawings"):
        change(TINY, image_mean="all")
    with pytest.raises(ValueError, match="resampler.key_width is 32, but dinov2-b14 is 768"):
        dataclasses.replace(TINY.vision, tower="dinov2-b14", tower_options={})


def test_the_default_is_the_published_model():
    cfg = recipe.Config()
    mmfs = insert_config(cfg)
    assert (mmfs.width, mmfs.inner_width, mmfs.sides, mmfs.base) == (5120, 1024, (32, 16, 8), 16)
    assert cfg.vision.sides == (64, 32, 16, 8) and cfg.vision.tokens == 64
    assert cfg.decoder.image_side == 512 and recipe.llm_config(cfg).tokens == 32002


def test_caches_and_crossing_documents_are_refused():
    data = DataConfig(row=RowConfig(template="document", length=64, images=4))
    cached = dataclasses.replace(data, cache=dataclasses.replace(data.cache, features="folder"))
    with pytest.raises(ConfigError, match="an adapter works inside of it"):
        recipe.open_data(cached, TINY, Shard(1))
    crossing = dataclasses.replace(data, row=dataclasses.replace(data.row, crossing=True))
    with pytest.raises(ConfigError, match="config.model.document_bos"):
        recipe.open_data(crossing, TINY, Shard(1))


def test_input():
    """`soi` stands before an image; what follows a supervised one is drawn."""
    spec = recipe.input_spec(TINY)
    assert spec.views.tokens == TINY.vision.tokens and spec.drawings.places == TINY.max_drawings
    assert spec.drawings.preprocess.size == 8 and spec.drawings.rule.start == 49152
    tokenizer = recipe.load_tokenizer(TINY)
    assert len(tokenizer) <= 49152
    spec = recipe.batch_spec(DataConfig(row=RowConfig(length=64, images=4)), TINY, 3)
    assert spec.drawings.pixels.shape == (3, 2, 8, 8, 3) and spec.images.pixels.shape[1] == 4
    assert np.dtype(spec.images.pixels.dtype) == np.uint8

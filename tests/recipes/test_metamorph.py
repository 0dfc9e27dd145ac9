"""The MetaMorph recipe: options, fixes, stages, weights, data; numbers are in the golden test."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from metamorph_jax import config as configs
from metamorph_jax.convert.llama import export_llama
from metamorph_jax.convert.metamorph import export_metamorph
from metamorph_jax.convert.vit import export_vit
from metamorph_jax.recipes import metamorph as recipe
from metamorph_jax.types import Batch

TINY = recipe.Config(llm="tiny", tower="siglip-tiny", image_tokens=4, text_chunk=16)
L, I, P = 14, 2, 4
# Compiling is what these tests spend their time on.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def fast(f):
    return jax.jit(f, compiler_options=FAST)


def make(cfg=TINY, seed=0):
    graph, _ = nnx.split(nnx.eval_shape(lambda: recipe.create(cfg, nnx.Rngs(0))))
    state = fast(lambda key: nnx.state(recipe.create(cfg, nnx.Rngs(key))))(jax.random.key(seed))
    return nnx.merge(graph, state)


def sums_of(model, batch):
    """`loss_sums`, compiled."""
    graph, state = nnx.split(model)
    return fast(lambda state, batch: nnx.merge(graph, state).loss_sums(batch))(state, batch)


def make_batch(cfg=TINY, answers=True, text=True, seed=0) -> Batch:
    """Two rows: words, a context picture, words, an answer picture."""
    r = np.random.default_rng(seed)
    slots = np.full((2, L), -1, np.int32)
    slots[:, 2:6], slots[:, 8:12] = range(4), range(4, 8)
    visual_targets = np.full((2, L), -1, np.int32)
    text_targets = r.integers(0, 322, (2, L)).astype(np.int32)
    text_targets[:, :7], text_targets[:, 8:12] = -1, -1
    if answers:
        visual_targets[:, 7:11] = range(4, 8)
    if not text:
        text_targets[:] = -1
    return Batch(
        tokens=r.integers(0, 322, (2, L)).astype(np.int32),
        positions=np.tile(np.arange(L, dtype=np.int32), (2, 1)),
        segments=np.ones((2, L), np.int32),
        text_targets=text_targets,
        image_slots=slots,
        visual_targets=visual_targets,
        sources=np.array([[0], [1]], np.int32).repeat(L, 1),
        image_valid=np.ones((2, I), bool),
        pixels=r.integers(0, 256, (2, I, 32, 32, 3)).astype(np.uint8),
    )


def grads(model, batch, filter_=nnx.Param):
    graph, trained, rest = nnx.split(model, filter_, ...)

    def total(trained):
        model = nnx.merge(graph, trained, rest)
        sums, metrics = model.loss_sums(batch, jax.random.key(0))
        counts = model.loss_counts(batch)
        loss = sum(model.loss_coefs[k] * s / jnp.maximum(counts[k], 1) for k, s in sums.items())
        return loss, metrics

    (loss, metrics), found = fast(jax.value_and_grad(total, has_aux=True))(trained)
    flat = {".".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(found)}
    return float(loss), metrics, flat


def test_metrics_and_sources():
    model = make(dataclasses.replace(TINY, sources=("a", "b")))
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
        pixels=None, image_valid=np.zeros((2, 0), bool),
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
    features = model.visual_features(batch.pixels.reshape(4, 32, 32, 3))
    cached = dataclasses.replace(
        batch, pixels=None, features=np.asarray(features).reshape(2, I, P, -1)
    )
    a, b = grads(model, batch), grads(model, cached)
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    towerless = dataclasses.replace(TINY, tower="none", feature_width=32)
    other = make(towerless)
    nnx.update(other, nnx.state(model, lambda path, _: path[0] != "tower"))
    np.testing.assert_allclose(grads(other, cached)[0], a[0], rtol=1e-6)
    with pytest.raises(ValueError, match="no tower"):
        other.loss_sums(batch)
    wide = dataclasses.replace(cached, features=np.zeros((2, I, P, 5), np.float32))
    with pytest.raises(ValueError, match="features are 5 wide, the model takes 32"):
        model.loss_sums(wide)


def test_gradients_reach_the_tower_only_when_it_is_trained():
    for train in (False, True):
        model = make(dataclasses.replace(TINY, train_tower=train))
        _, _, found = grads(model, make_batch())
        assert any(g.any() for k, g in found.items() if k.startswith("tower")) == train


def test_no_gradient_through_targets():
    """With the text loss off, an answer picture that nothing reads as input has no gradient."""
    model = make(dataclasses.replace(TINY, train_tower=True))
    batch = make_batch(text=False)
    slots = np.where(batch.image_slots >= 4, -1, batch.image_slots)  # the answer is target only

    def loss(pixels):
        one = dataclasses.replace(batch, image_slots=slots, pixels=pixels)
        return model.loss_sums(one)[0]["visual"]

    found = fast(jax.grad(loss))(batch.pixels.astype(np.float32) / 255)
    assert np.abs(found[:, 0]).max() > 0 and not np.abs(found[:, 1]).any()


def names(model, stage):
    state = nnx.state(model, model.trainable(stage))
    return {".".join(map(str, p)) for p, _ in nnx.to_flat_state(state)}


def test_stages():
    untied = dataclasses.replace(TINY, llm_options={"tied": False})
    everything = names(make(untied), "vpit") | {
        ".".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(make(untied), nnx.Param))
    }
    connector = {n for n in everything if n.startswith("connector.")}
    embed = {n for n in everything if n.startswith("llm.embed_tokens")}
    added, head_added = "llm.embed_tokens.added", "llm.lm_head.added"
    tower = {n for n in everything if n.startswith("tower.")}
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
    with pytest.raises(ValueError, match="stage 'decoder'"):
        make(untied).trainable("decoder")


def test_param_groups():
    model = make(dataclasses.replace(TINY, reduction="mlpmixer"))
    groups = {model.param_group(p) for p, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert groups == {"tower", "connector", "llm", "tokens", "head"}


@pytest.mark.parametrize(
    "options",
    [
        dict(head="linear"),
        dict(head="mlp2x_gelu"),
        dict(reduction="concat_interpolation", image_tokens=4),
        dict(reduction="mlpmixer", image_tokens=5),
        dict(reduction="area"),
        dict(connector="linear"),
        dict(connector="mlpsoftmax"),
        dict(connector="mlp3x_gelu"),
        dict(connector="identity", llm_options={"width": 32}),
        dict(normalize_vision=False),
        dict(apply_softmax=True),
        dict(visual_loss="smooth_l1"),
        dict(visual_loss="infonce"),
        dict(tower="clip-tiny"),
        dict(tower="dinov2-tiny", dtype="bfloat16", remat="full"),
        dict(image_tokens=-1),
    ],
)
def test_every_option_trains(options):
    cfg = dataclasses.replace(TINY, **options)
    model = make(cfg)
    tokens = model.feature_shape[0]
    batch = make_batch()
    if tokens != P:  # another number of slots: the first 4 of each picture will do
        move = lambda x: np.where(x >= 4, x - 4 + tokens, x).astype(np.int32)  # noqa: E731
        batch = dataclasses.replace(
            batch, image_slots=move(batch.image_slots), visual_targets=move(batch.visual_targets)
        )
    loss, metrics, found = grads(model, batch, model.trainable("vpit"))
    assert np.isfinite(loss)
    silent = {n for n, g in found.items() if not g.any()}
    if cfg.image_tokens != -1:
        assert not {n for n in silent if n.startswith(("connector", "head"))}, silent
    hidden = jnp.ones((1, 3, model.llm.cfg.width))
    assert model.predict_visual(hidden).shape == (1, 3, model.feature_shape[1])


def test_wrong_options_are_errors():
    for key, value in dict(llm="gpt", tower="vit", visual_loss="l2", vpit_tokens="some").items():
        with pytest.raises(configs.ConfigError, match="none of"):
            configs.build(recipe.Config, {key: value})
    with pytest.raises(configs.ConfigError, match="feature_width"):
        configs.build(recipe.Config, {"tower": "none"})
    with pytest.raises(configs.ConfigError, match="did you mean"):
        configs.build(recipe.Config, {"tokens_per_img": 3, "image_token": 4})
    with pytest.raises(ValueError, match="connector"):
        make(dataclasses.replace(TINY, connector="mlp_gelu"))
    with pytest.raises(ValueError, match="head"):
        make(dataclasses.replace(TINY, head="None"))


def test_full_size_by_shapes():
    model = nnx.eval_shape(lambda: recipe.create(recipe.Config(), nnx.Rngs(0)))
    count = lambda f: sum(x.size for x in jax.tree.leaves(nnx.state(model, f)))  # noqa: E731
    llm = lambda path, _: path[0] == "llm"  # noqa: E731
    assert count(llm) == 8_030_261_248 + 4 * 4096  # two new rows in each table
    assert model.feature_shape == (64, 1152)
    assert (model.image_start, model.image_end) == (128256, 128257)
    trained = count(model.trainable("connector"))
    assert trained == 1152 * 4096 + 4096 + 4096 * 4096 + 4096 + 2 * 4096


def test_calibrated_connector_speaks_at_the_scale_of_text():
    model = make(dataclasses.replace(TINY, llm_options={"width": 128}))
    r = np.random.default_rng(0)
    x = 3 + 0.01 * r.normal(size=(500, 32)) * r.uniform(0.1, 2, 32)
    x = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    table = np.asarray(model.llm.embed_tokens.embedding[...])
    recipe.calibrate_connector(model, x)
    out = np.asarray(model.project(x))
    np.testing.assert_allclose(out.std(0).mean(), table.std(), rtol=1e-3)
    np.testing.assert_allclose(out.mean(0), 0, atol=1e-4)
    unit = out / np.linalg.norm(out, axis=-1, keepdims=True)
    assert abs(np.mean(unit[::2] * unit[1::2]) * out.shape[-1]) < 0.1  # no common direction


def test_prepare_measures_valid_pictures_only():
    a, b = make(), make()
    batch = make_batch()
    recipe.prepare(a, [batch])
    extra = np.concatenate([batch.pixels, 255 * np.ones_like(batch.pixels)], axis=1)
    valid = np.concatenate([batch.image_valid, ~batch.image_valid], axis=1)
    recipe.prepare(b, [dataclasses.replace(batch, pixels=extra, image_valid=valid)])
    for x, y in zip(a.connector.linears, b.connector.linears, strict=True):
        np.testing.assert_allclose(x.kernel[...], y.kernel[...], rtol=1e-3, atol=1e-4)


# ---- weights and data


def llama_fields(cfg) -> dict:
    return dict(model_type="llama", vocab_size=cfg.vocab_size, hidden_size=cfg.width,
                intermediate_size=cfg.mlp_width, num_hidden_layers=cfg.layers,
                num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads,
                head_dim=cfg.head_dim, rms_norm_eps=cfg.norm_eps, rope_theta=cfg.rope_theta,
                tie_word_embeddings=cfg.tied)  # fmt: skip


def same(a, b, path=()):
    for (name, x), (_, y) in zip(
        nnx.to_flat_state(nnx.state(a)), nnx.to_flat_state(nnx.state(b)), strict=True
    ):
        if name[: len(path)] == path:
            np.testing.assert_array_equal(x[...], y[...], err_msg=str(name))


def test_weights_from_folders(tmp_path):
    model = make(seed=1)
    llm, tower, whole = (tmp_path / n for n in ("llm", "tower", "whole"))
    for folder in (llm, tower, whole):
        folder.mkdir()
    tensors = export_llama(model.llm)
    V = model.llm.cfg.vocab_size
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:V]
    keys = sorted(tensors)
    for k in range(2):  # in shards
        save_file({n: tensors[n] for n in keys[k::2]}, llm / f"model-{k}.safetensors")
    (llm / "config.json").write_text(json.dumps(llama_fields(model.llm.cfg)))
    save_file(dict(export_vit(model.tower)), tower / "model.safetensors")
    save_file(dict(export_metamorph(model)), whole / "model.safetensors")

    cfg = dataclasses.replace(TINY, llm="auto", llm_weights=str(llm), tower_weights=str(tower))
    other = make(cfg)
    recipe.load_pretrained(other, cfg)
    same(model, other, ("tower",))
    same(model, other, ("llm", "layers"))
    mean = tensors["model.embed_tokens.weight"].mean(0)
    np.testing.assert_allclose(other.llm.embed_tokens.added[...], [mean, mean], atol=1e-6)

    cfg = dataclasses.replace(TINY, weights=str(whole))
    other = make(cfg)
    recipe.load_pretrained(other, cfg)
    same(model, other)
    with pytest.raises(FileNotFoundError, match="hf:owner/name"):
        recipe.load_pretrained(other, dataclasses.replace(TINY, llm_weights="no/such/folder"))
    with pytest.raises(ValueError, match="auto"):
        recipe.llm_config(dataclasses.replace(TINY, llm="auto"))


def write_data(folder, n=6):
    from PIL import Image

    r = np.random.default_rng(0)
    lines = []
    for i in range(n):
        Image.fromarray(r.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / f"{i}.png")
        question = {"from": "human", "value": "<image>\nwhat is it?"}
        turns = [question, {"from": "gpt", "value": "noise"}]
        if i % 2:
            turns = [{"from": "human", "value": "draw it"}, {"from": "gpt", "value": "<image>"}]
        lines.append(json.dumps({"id": str(i), "image": f"{i}.png", "conversations": turns}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.golden  # takes the small tokenizer from there
def test_data_with_and_without_a_feature_cache(tmp_path, golden_root):
    tokenizer = str(golden_root / "metamorph" / "tokenizer.json")
    data = dict(sources=[dict(path=str(write_data(tmp_path)), name="pairs")], batch_size=2,
                length=64, images_per_row=2, template="llama3")  # fmt: skip
    vocab = recipe.load_tokenizer(dataclasses.replace(TINY, tokenizer=tokenizer))
    options = {"vocab_size": len(vocab)}
    cfg = dataclasses.replace(TINY, tokenizer=tokenizer, llm_options=options)
    model = make(cfg)
    folder = tmp_path / "tower"
    folder.mkdir()
    save_file(dict(export_vit(model.tower)), folder / "model.safetensors")
    cfg = dataclasses.replace(cfg, tower_weights=str(folder))
    plain = recipe.make_data(data, cfg)
    cached = recipe.make_data(data | {"feature_cache": str(tmp_path / "cache")}, cfg)
    assert plain.sources == ["pairs"] and plain.skipped == {}
    state = plain.get_state()
    a, b = next(plain), next(cached)
    assert a.pixels is not None and a.features is None
    assert b.pixels is None and b.features.shape == (2, 2, 4, 32)
    assert (a.tokens >= model.image_start).any() and (a.visual_targets >= 0).any()
    np.testing.assert_array_equal(a.tokens, b.tokens)
    found = [sums_of(model, x)[0] for x in (a, b)]
    for kind in ("text", "visual"):
        np.testing.assert_allclose(found[0][kind], found[1][kind], rtol=1e-5)
    plain.set_state(state)
    np.testing.assert_array_equal(next(plain).tokens, a.tokens)
    plain.close()
    cached.close()


def test_visual_dropout_hides_tokens_of_answer_pictures_only():
    batch = make_batch()
    hide = jax.jit(
        jax.vmap(lambda key, share: recipe.hidden_tokens(key, batch, P, share), (0, None))
    )
    keys = jax.random.split(jax.random.key(0), 400)
    hidden = np.asarray(hide(keys, 1.0))  # [400, B, I * P]; tokens 4…7 are the answer
    assert not hidden[..., :P].any()
    answers = hidden[:, :, P:]
    assert 0.65 < answers.mean() < 0.85
    assert 0.5 < answers.all(-1).mean() < 0.8  # whole pictures: what drawing starts from
    assert not np.asarray(hide(keys, 0.0)).any()
    assert not np.asarray(
        recipe.hidden_tokens(keys[0], make_batch(answers=False), P, 1.0)
    ).any()


def test_visual_dropout_needs_a_key_and_leaves_targets_alone():
    model = make(dataclasses.replace(TINY, visual_dropout=1.0))
    batch = make_batch()
    _, shown = model.embed(batch)
    plain, _ = model.embed(batch)
    dropped, targets = model.embed(batch, jax.random.key(1))
    np.testing.assert_array_equal(shown, targets)
    changed = np.abs(np.asarray(dropped - plain)).max(-1) > 0
    assert changed[:, 8:12].any() and not changed[:, :8].any() and not changed[:, 12:].any()


@pytest.mark.golden  # takes the small tokenizer from there
def test_a_tokenizer_larger_than_the_vocabulary_is_an_error(tmp_path, golden_root):
    tokenizer = str(golden_root / "metamorph" / "tokenizer.json")
    data = dict(sources=[dict(path=str(write_data(tmp_path)), name="pairs")])
    cfg = dataclasses.replace(TINY, tokenizer=tokenizer, llm_options={"vocab_size": 425})
    with pytest.raises(ValueError, match="the tokenizer has 428 ids, the language model 427"):
        recipe.make_data(data, cfg)

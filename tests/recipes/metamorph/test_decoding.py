"""Decoding of a MetaMorph model: golden cases, and what must not change results."""

import argparse
import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from metamorph_jax.errors import UserError
from metamorph_jax.models.heads.visual_flow import FlowConfig
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.nn import quantized
from metamorph_jax.nn.rope import RopeScaling
from metamorph_jax.recipes import metamorph as recipe
from metamorph_jax.recipes.metamorph import decoding
from metamorph_jax.recipes.metamorph.decoding import VisualParts, make_loop, make_policy
from metamorph_jax.recipes.metamorph.published import load_metamorph
from metamorph_jax.sampling import generate
from metamorph_jax.sampling.loop import BUCKETS, bucket
from metamorph_jax.sampling.policy import TextPolicy
from metamorph_jax.sampling.segments import NOTHING, VISUAL, Text, VisualTokens
from metamorph_jax.sampling.text import Sampler

GREEDY = Sampler()


class Decoder:
    """A model with its loop, called with the options of its policy."""

    def __init__(self, model, weights="auto"):
        graph, state = nnx.split(model)  # the loop takes the language model of a copy over
        model = nnx.merge(graph, jax.tree.map(lambda x: x, state))
        self.start, self.end = model.image_start, model.image_end
        self.P, self.C = model.feature_shape
        self.parts = VisualParts(model)
        self.loop = make_loop(model, self.parts, weights)

    def policy(self, sampler=GREEDY, eos=(), **options):
        return make_policy(self.parts, TextPolicy(sampler, eos), **options)

    def __call__(self, prompts, budget, options=None, **more):
        return self.loop(prompts, budget, self.policy(**options or {}), **more)


prepare = Decoder

# ---- golden cases


def _meta(root: pathlib.Path) -> dict:
    return json.loads((root / "metamorph" / "meta.json").read_text())


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        root = pathlib.Path(metafunc.config.getoption("--golden-root"))
        metafunc.parametrize("case", _meta(root)["arrays"]["decode.npz"]["cases"])


def _golden_model(root: pathlib.Path, meta: dict):
    c, start = meta["config"], meta["special_ids"]["image_start"]
    rope = dict(c["rope"])
    scaling = RopeScaling(rope.pop("rope_type"), **{
        k.replace("original_max_position_embeddings", "original_max_position"): v
        for k, v in rope.items()
    })  # fmt: skip
    llm = dict(
        vocab_size=start, added_tokens=c["vocab"] - start, width=c["hidden"], mlp_width=c["inter"],
        layers=c["layers"], heads=c["heads"], kv_heads=c["kv"], head_dim=c["hidden"] // c["heads"],
        rope_theta=c["theta"], rope_scaling=scaling, tied=False,
    )  # fmt: skip
    cfg = recipe.Config(
        llm="tiny", llm_options=llm, head=c["head"],
        vision=VisionConfig("none", feature_width=c["v"]["hidden"], tokens=c["ntok"]),
    )  # fmt: skip
    tensors = load_file(root / "model.safetensors")
    return cfg, {k: v for k, v in tensors.items() if "vision_tower" not in k}


@pytest.fixture(scope="module")
def golden(golden_root):
    """(arrays, meta, decoder for a case): all cases share one compiled loop per setting."""
    root = golden_root / "metamorph"
    meta = _meta(golden_root)
    cfg, tensors = _golden_model(root, meta)
    heads = load_file(root / "decode_lm_heads.safetensors")
    model = recipe.create(cfg, nnx.Rngs(0))
    load_metamorph(model, tensors)
    decoder = prepare(model)

    def with_head(case):
        head = jnp.asarray(heads[f"{case}/lm_head.weight"])
        loop = decoder.loop
        loop.weights = {**loop.weights, "llm": {**loop.weights["llm"], "head": {"w": head}}}
        return decoder

    return dict(np.load(root / "decode.npz")), meta, with_head


def _options(meta, parity):
    return dict(eos=tuple(meta["special_ids"]["eos"]), parity=parity)


@pytest.mark.golden
def test_golden(golden, case):
    """Ids and vectors as the reference; quirks under parity, everything else in both modes."""
    arrays, meta, with_head = golden
    about = meta["arrays"]["decode.npz"]["cases"][case]
    prompt = arrays[f"{case}/prompt_embeds"][0]
    budget = about["max_new_tokens"]
    decoder = with_head(case)
    for parity in (True,) if case.startswith("quirk_") else (True, False):
        # The reference makes one step more than it was asked for.
        options = _options(meta, parity)
        (result,) = decoder([prompt], budget + (not parity), options)
        np.testing.assert_array_equal(result.ids, arrays[f"{case}/output_ids"])
        vectors = arrays[f"{case}/image_embeds"].reshape(-1, decoder.C)
        np.testing.assert_allclose(result.vectors, vectors, atol=1e-4)
        assert len(result.record) == about["steps"]
        images = [s for s in result.segments if isinstance(s, VisualTokens)]
        assert sum(len(p.features) for p in images) == about["n_image_tokens"]
        assert all(p.complete == (len(p.features) == decoder.P) for p in images)


@pytest.mark.golden
def test_golden_cases_are_the_ones_with_arrays(golden):
    arrays, meta, _ = golden
    assert {k.split("/")[0] for k in arrays} == set(meta["arrays"]["decode.npz"]["cases"])


@pytest.mark.golden
def test_quirks_are_fixed_by_default(golden):
    """A second start id begins a whole new image; eos does not end a row inside a image."""
    arrays, meta, with_head = golden
    eos = meta["special_ids"]["eos"]
    for case in meta["arrays"]["decode.npz"]["cases"]:
        if not case.startswith("quirk_"):
            continue
        decoder = with_head(case)
        prompt = arrays[f"{case}/prompt_embeds"][0]
        (result,) = decoder([prompt], 200, _options(meta, False))
        (parity,) = decoder([prompt], 200, _options(meta, True))
        images = [s for s in result.segments if isinstance(s, VisualTokens)]
        assert images and all(p.complete for p in images)
        assert not np.array_equal(result.record, parity.record)
        # Both agree until the reference goes astray, and every start id is followed by P vectors.
        starts = np.flatnonzero(result.record == decoder.start)
        for at in starts[: len(images)]:
            assert (result.record[at + 1 : at + 1 + decoder.P] == VISUAL).all()
        assert result.ended == (result.record[-1] in eos)


# ---- invariants, on a small random model


@pytest.fixture(scope="module")
def model():
    cfg = recipe.Config(
        llm="tiny",
        llm_options={"qkv_bias": True},
        vision=VisionConfig("none", feature_width=12, tokens=4),
    )
    model = recipe.create(cfg, nnx.Rngs(1))
    scale = lambda x: x * 8  # noqa: E731  (random weights of the usual size say one thing only)
    nnx.update(model, jax.tree.map(scale, nnx.state(model, nnx.Param)))
    return model


@pytest.fixture(scope="module")
def decoder(model):
    return prepare(model)


def _prompts(model, lengths, seed=0):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, model.llm.cfg.vocab_size, n) for n in lengths]
    return ids, [np.asarray(model.embed_text(jnp.asarray(i))) for i in ids]


def _force(decoder, rows, steps):
    """forced ids: row -> steps at which it starts a image; elsewhere never start or end."""
    forced = np.full((len(rows), steps), -1, np.int32)
    for row, starts in zip(forced, rows, strict=True):
        row[list(starts)] = decoder.start
    return forced


def _same(a, b):
    np.testing.assert_array_equal(a.record, b.record)
    # Each visual token is read again, so rounding grows from one to the next; how much it is at
    # first depends on the processor.
    np.testing.assert_allclose(a.vectors, b.vectors, atol=1e-4)
    assert a.ended == b.ended
    assert [type(s) for s in a.segments] == [type(s) for s in b.segments]


def test_cached_equals_uncached(model, decoder):
    """Every emitted token follows from one plain forward pass over all that came before."""
    _, (prompt,) = _prompts(model, [9])
    forced = _force(decoder, [[2, 9]], 14)
    (result,) = decoder([prompt], 14, forced_ids=forced)
    assert (result.record == VISUAL).sum() == 8
    embeds, vectors = [prompt], iter(result.vectors)
    for token in result.record:
        if token == VISUAL:
            embeds.append(np.asarray(model.project(jnp.asarray(next(vectors))))[None])
        else:
            embeds.append(np.asarray(model.embed_text(jnp.array([token]))))
    x = jnp.concatenate(embeds)[None, :-1]
    n = x.shape[1]
    hidden = model.llm(x, jnp.arange(n)[None], jnp.tril(jnp.ones((1, n, n), bool)))
    hidden = hidden[0, len(prompt) - 1 :]
    best = np.asarray(model.llm.logits(hidden).argmax(-1))
    seen = np.asarray(model.predict_visual(hidden))
    free = (result.record != VISUAL) & (forced[0] < 0)
    np.testing.assert_array_equal(result.record[free], best[free])
    visual = result.record == VISUAL
    np.testing.assert_allclose(result.vectors, seen[visual], atol=2e-5)


@pytest.mark.parametrize("sampler", [GREEDY, Sampler(1.5, top_k=40, top_p=0.95)])
def test_batched_equals_single(model, decoder, sampler):
    """Prompts of many lengths, images at different times, budgets of their own."""
    _, prompts = _prompts(model, [5, 11, 30, 1])
    options = dict(sampler=sampler, eos=(7,))
    forced = _force(decoder, [[0, 8], [3], [], [10]], 16)
    budgets = [16, 12, 9, 13]
    together = decoder(prompts, budgets, options, forced_ids=forced)
    for i, result in enumerate(together):
        (alone,) = decoder(
            prompts[i : i + 1], budgets[i], options, seeds=[i], forced_ids=forced[i : i + 1]
        )
        _same(result, alone)
        assert len(result.record) == budgets[i] or result.ended


def test_a_head_that_samples_draws_by_each_row_s_seed(model):
    """The same image whatever else is in the batch, another one with another seed."""
    flow = FlowConfig(width=32, depth=1, steps=4, guidance=1.5)
    own = recipe.create(dataclasses.replace(model.cfg, head="flow", flow=flow), nnx.Rngs(0))
    spread = np.random.default_rng(0)
    for _, leaf in nnx.iter_graph(own.head):
        if isinstance(leaf, nnx.Param):
            value = leaf.get_raw_value()
            leaf.set_raw_value(value + 0.1 * spread.standard_normal(value.shape, np.float32))
    decoder = prepare(own)
    _, prompts = _prompts(own, [5, 9, 5])
    prompts[2] = prompts[0]
    forced = _force(decoder, [[0], [3], [0]], 10)
    together = decoder(prompts, 10, forced_ids=forced, seeds=[0, 1, 2])
    assert [int((one.record == VISUAL).sum()) for one in together] == [4, 4, 4]
    for i, result in enumerate(together[:2]):
        (alone,) = decoder(prompts[i : i + 1], 10, seeds=[i], forced_ids=forced[i : i + 1])
        _same(result, alone)
        np.testing.assert_allclose(np.linalg.norm(result.vectors, axis=1), 1, atol=1e-5)
    assert not np.allclose(together[0].vectors, together[2].vectors, atol=1e-2)


def test_how_a_head_samples_can_be_changed(model):
    """By `--flow`; a head that regresses has nothing to change."""
    said = generate.parse_flow("steps=2, temperature=0.5")
    assert said == {"steps": 2, "temperature": 0.5}
    outline = lambda head: nnx.eval_shape(  # noqa: E731
        lambda: recipe.create(dataclasses.replace(model.cfg, head=head), nnx.Rngs(0))
    )
    flow = outline("flow").head
    decoding._sample_with(flow, said)
    assert flow.cfg == dataclasses.replace(FlowConfig(), steps=2, temperature=0.5)
    with pytest.raises(UserError, match="steps"):
        decoding._sample_with(flow, {"steps": 0})
    with pytest.raises(UserError, match="regresses"):
        decoding._sample_with(outline("mlp").head, said)
    for text in ("steps", "steps=x", "depth=2", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="steps, temperature, guidance"):
            generate.parse_flow(text)


def test_streaming_gives_the_same(model, decoder):
    _, prompts = _prompts(model, [5, 12])
    forced = _force(decoder, [[1], [6]], 16)
    heard = [[], []]

    def stream(new):
        for row, records in zip(heard, new, strict=True):
            row.extend(records.tolist())

    plain = decoder(prompts, 16, forced_ids=forced)
    streamed = decoder(prompts, 16, forced_ids=forced, stream=stream, chunk=3)
    for a, b, row in zip(plain, streamed, heard, strict=True):
        _same(a, b)
        assert row == b.record.tolist()


def test_segments_and_incomplete_images(model, decoder):
    _, prompts = _prompts(model, [5, 5])
    forced = _force(decoder, [[1], [6]], 9)
    whole, cut = decoder(prompts, 9, forced_ids=forced)
    assert [type(s) for s in whole.segments] == [Text, VisualTokens, Text]
    assert whole.segments[1].complete and whole.segments[1].features.shape == (4, 12)
    assert [type(s) for s in cut.segments] == [Text, VisualTokens]
    assert not cut.segments[1].complete and len(cut.segments[1].features) == 2
    assert len(cut.record) == 9 and NOTHING not in cut.record
    np.testing.assert_allclose(np.linalg.norm(whole.vectors, axis=-1), 1, atol=1e-5)


def test_forced_end_and_eos(model, decoder):
    _, prompts = _prompts(model, [5])
    forced = np.array([[-1, decoder.start, -1, -1, -1, -1, -1, 7, -1, -1]], np.int32)
    # eos forced inside the image is not looked at; after it, it ends the row.
    forced[0, 3] = 7
    (result,) = decoder(prompts, 10, dict(eos=(7,), force_end=True), forced_ids=forced)
    assert result.record[6] == decoder.end and result.record[-1] == 7
    assert len(result.record) == 8 and result.ended


def test_parity_takes_one_more_step(model, decoder):
    _, prompts = _prompts(model, [5])
    (default,) = decoder(prompts, 6)
    (parity,) = decoder(prompts, 6, dict(parity=True))
    np.testing.assert_array_equal(parity.record[:6], default.record)
    assert len(parity.record) == 7


def test_one_compilation_per_bucket(model):
    decoder = prepare(model)
    for length, new in ((5, 9), (20, 16), (32, 12)):
        decoder(_prompts(model, [length])[1], new)
    assert decoder.loop._prefill._cache_size() == decoder.loop._advance._cache_size() == 1
    decoder(_prompts(model, [33])[1], 16)
    assert decoder.loop._advance._cache_size() == 2


@pytest.mark.parametrize("lengths", [[20], [20, 7]])
def test_a_step_copies_neither_weights_nor_cache(model, decoder, lengths):
    loop, policy = decoder.loop, decoder.policy()
    state = loop.prefill(_prompts(model, lengths)[1], 8, policy)
    lowered = loop._advance.lower(loop.weights, state, np.int32(8), policy=policy)
    small = min(x.size for x in state.keys)
    for line in lowered.compile().as_text().splitlines():
        found = re.match(r".* = \w+\[([\d,]+)\]\S* (copy|transpose|convert|concatenate)\(", line)
        if found:
            assert np.prod([int(n) for n in found[1].split(",")]) < small, line


def test_weights_are_read_rounded_where_products_are(model, decoder):
    _, prompts = _prompts(model, [20, 7])
    forced = np.array([[5, decoder.start, -1, -1, -1, -1, 7, 7]] * 2)
    exact = decoder(prompts, 8, forced_ids=forced)
    with jax.default_matmul_precision("bfloat16"):
        rounding = prepare(model)
        rounded = rounding(prompts, 8, forced_ids=forced)
        loop, policy = rounding.loop, rounding.policy()
        state = loop.prefill(prompts, 8, policy)
        step = loop._advance.lower(loop.weights, state, np.int32(8), policy=policy)
    for one, other in zip(exact, rounded, strict=True):
        np.testing.assert_array_equal(one.record, other.record)
        np.testing.assert_allclose(one.vectors[0], other.vectors[0], atol=0.1)
        assert not np.array_equal(one.vectors, other.vectors)
    text = step.compile().as_text()
    shapes = [w.shape for layer in loop.weights["llm"]["layers"] for w in _kernels(layer)]
    for out, columns in shapes:
        assert not re.search(rf"= f32\[{out},{columns}\]\S* (convert|fusion)\(", text)


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_packed_weights_are_those_that_the_codes_stand_for(model, method):
    """Layers and output table; the table of embeddings stays."""
    _, prompts = _prompts(model, [20, 7])
    coded, exact = prepare(model, method), prepare(model, "float32")
    options = {"budget": 8, "forced_ids": np.array([[5, coded.start] + [-1] * 6] * 2)}

    cfg = model.llm.cfg
    sizes = {"o": cfg.heads * cfg.head_dim, "down": cfg.mlp_width}

    def decoded(m, inputs=cfg.width):
        if not isinstance(m, dict):
            return m
        if "codes" in m:
            assert method == "nf4" and m["codes"].dtype == jnp.uint8
            codes = {"kernel_codes": m["codes"].T, "kernel_scale": m["blocks"].T}
            rest = {name: part for name, part in m.items() if name not in ("codes", "blocks")}
            return {"w": quantized.unpack(codes, inputs).T, **rest}
        if "scale" not in m:
            return {name: decoded(part, sizes.get(name, cfg.width)) for name, part in m.items()}
        assert m["w"].dtype == jnp.int8
        rest = {name: part for name, part in m.items() if name not in ("w", "scale")}
        return {"w": m["w"] * m["scale"][:, None], **rest}

    llm = coded.loop.weights["llm"]
    read = {"head": decoded(llm["head"]), "layers": [decoded(layer) for layer in llm["layers"]]}
    assert llm["table"].dtype == jnp.float32
    results = coded(prompts, **options)
    rounded = exact(prompts, **options)
    exact.loop.weights["llm"] |= read
    for one, same, other in zip(results, exact(prompts, **options), rounded, strict=True):
        np.testing.assert_array_equal(one.record, same.record)
        np.testing.assert_allclose(one.vectors[0], same.vectors[0], atol=2e-5)
        np.testing.assert_allclose(one.vectors[1], same.vectors[1], atol=6e-5)  # see `_same`
        assert not np.allclose(one.vectors[:2], other.vectors[:2], atol=1e-4)
    with pytest.raises(ValueError, match="int4.* is none of auto, float32, bfloat16, int8, nf4"):
        prepare(model, "int4")


def _kernels(layer: dict) -> list:
    return [layer[name]["w"] for name in ("qkv", "o", "gate_up", "down")]


def test_tied_table_is_kept_once(decoder):
    llm = decoder.loop.weights["llm"]
    assert llm["table"] is llm["head"]["w"]


def test_errors(model, decoder):
    assert bucket(33) == 64
    with pytest.raises(ValueError, match="fits no bucket"):
        bucket(BUCKETS[-1] + 1)
    with pytest.raises(ValueError, match="at least 1"):
        decoder(_prompts(model, [3])[1], 0)
    with pytest.raises(ValueError, match="empty"):
        decoder([np.zeros((0, 64), np.float32)], 3)


def test_bfloat16(model):
    cfg = dataclasses.replace(model.cfg, dtype="bfloat16")
    half = recipe.create(cfg, nnx.Rngs(1))
    _, prompts = _prompts(half, [5])
    (result,) = prepare(half)(prompts, 8, forced_ids=np.array([[-1, 320, -1, -1, -1, -1, 5, -1]]))
    assert len(result.record) == 8 and np.isfinite(result.vectors).all()

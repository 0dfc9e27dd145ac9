"""MetaMorph against the arrays of the public implementation: every case of meta.json.

Sizes, cases and options come from the descriptor. Weights go through the converter, gradients come
back through it, so that names and layouts are tested along the way.
"""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file

from metamorph_jax.convert.names import load_torch_dict
from metamorph_jax.convert.vit import load_vit
from metamorph_jax.data.images import Preprocess
from metamorph_jax.data.interleave import AfterSupervisedStart, build_row, read_place
from metamorph_jax.data.views import Single
from metamorph_jax.models import build
from metamorph_jax.models.connectors.mlp import Connector
from metamorph_jax.models.llm.llama import Llama, init_added_tokens
from metamorph_jax.models.vision import vit
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.models.vision.reduce import ReduceConfig, TokenReducer, normalize_features
from metamorph_jax.nn.rope import RopeScaling
from metamorph_jax.recipes import metamorph as recipe
from metamorph_jax.recipes.metamorph.published import export_metamorph, load_metamorph, sequential
from metamorph_jax.train.state import trained_filter
from metamorph_jax.types import Batch, Images
from tests.recipes.metamorph.tiny import change

pytestmark = pytest.mark.golden

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
HEADS = {"mlp": "mlp", "mlp2x_gelu": "mlp2x_gelu", "linear": "linear"}
OTHERS = {"decode.npz", "visualizer.npz", "noise_schedule.npz"}  # read by tests of their parts


def read_meta(config) -> tuple[pathlib.Path, dict]:
    root = pathlib.Path(config.getoption("--golden-root")) / "metamorph"
    return root, json.loads((root / "meta.json").read_text())


def pytest_generate_tests(metafunc):
    _, meta = read_meta(metafunc.config)
    for name, file in (("packing_case", "packing.npz"), ("loss_case", "loss.npz")):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, meta["arrays"][file]["cases"])


def fast(f):
    return jax.jit(f, compiler_options=FAST)


class Golden:
    def __init__(self, root: pathlib.Path, meta: dict):
        self.root, self.meta = root, meta
        self.empty: dict[str, recipe.MetaMorph] = {}

    def npz(self, name):
        return dict(np.load(self.root / name))

    def config(self, **changes) -> recipe.Config:
        c, v = self.meta["config"], self.meta["config"]["v"]
        scaling = c["rope"]
        llm = dict(
            vocab_size=self.meta["special_ids"]["image_start"],
            added_tokens=c["vocab"] - self.meta["special_ids"]["image_start"],
            width=c["hidden"],
            mlp_width=c["inter"],
            layers=c["layers"],
            heads=c["heads"],
            kv_heads=c["kv"],
            head_dim=c["hidden"] // c["heads"],
            rope_theta=c["theta"],
            rope_scaling=RopeScaling(
                scaling["rope_type"],
                scaling["factor"],
                scaling["low_freq_factor"],
                scaling["high_freq_factor"],
                scaling["original_max_position_embeddings"],
            ),
            tied=False,
        )
        values = dict(
            llm="tiny",
            llm_options=llm,
            vision=VisionConfig("siglip-tiny", tower_options(v), tokens=c["ntok"]),
            head=HEADS.get(c["head"], "single"),
            visual_coef=c["coef"],
        )
        return change(recipe.Config(**values), **changes)

    def model(self, tensors=None, **changes) -> recipe.MetaMorph:
        cfg = self.config(**changes)
        if str(cfg) not in self.empty:
            self.empty[str(cfg)] = nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0)))
        model = nnx.clone(self.empty[str(cfg)])
        weights = load_file(self.root / "model.safetensors")
        if tensors is not None:
            weights = {k: v for k, v in weights.items() if not k.startswith("vision_head.")}
            weights |= tensors
        load_metamorph(model, weights)
        return model

    def batch(self, arrays, case, max_length, padding="right", features=None) -> Batch:
        """One sample a row, padded as the case's embeddings are."""
        P = self.meta["config"]["ntok"]
        ids = arrays[f"{case}/input_ids"]
        mask = arrays.get(f"{case}/attention_mask", np.ones_like(ids)).astype(bool)
        labels = arrays.get(f"{case}/labels")
        if features is None:
            features = arrays.get(f"{case}/image_embeds")
        images = arrays.get(f"{case}/images")
        B = len(ids)
        rows, stacks, at = [], [], 0
        for b in range(B):
            row_ids = ids[b][mask[b]]
            row_labels = None if labels is None else labels[b][mask[b]]
            count = int((row_ids == self.meta["special_ids"]["image_placeholder"]).sum())
            rule = AfterSupervisedStart(self.meta["special_ids"]["image_start"])
            places = [read_place(*Single(P).plan())] * count
            rows.append(build_row(row_ids, row_labels, places, P, max_length, rule))
            stacks.append(at + np.arange(count))
            at += max(count, 1)  # a sample without pictures owns one blank picture
        assert at == len(features if images is None else images)
        L, I = max(map(len, rows)), max(1, max(len(r.view_starts) for r in rows))
        fill = {"tokens": 0, "positions": 0, "text_targets": -1, "image_slots": -1,
                "visual_targets": -1}  # fmt: skip
        out = {k: np.full((B, L), v, np.int32) for k, v in fill.items()}
        segments, valid = np.zeros((B, L), np.int32), np.zeros((B, I), bool)
        pictures = features if images is None else images.transpose(0, 2, 3, 1)
        views = np.zeros((B, I, *pictures.shape[1:]), np.float32)
        for b, row in enumerate(rows):
            here = slice(0, len(row)) if padding == "right" else slice(L - len(row), L)
            for k in fill:
                out[k][b, here] = getattr(row, k)
            segments[b, here] = 1
            kept = len(row.view_starts)
            valid[b, :kept] = True
            views[b, :kept] = pictures[stacks[b][:kept]]
        visual = {"features" if images is None else "pixels": views}
        found = Images(valid, np.zeros((B, I), np.int32), **visual)
        return Batch(**out, segments=segments, sources=np.zeros((B, L), np.int32), images=found)


def tower_options(v: dict) -> dict:
    return dict(image_size=v["img"], patch=v["patch"], width=v["hidden"], mlp_width=v["inter"],
                layers=v["layers"], heads=v["heads"])  # fmt: skip


@pytest.fixture(scope="module")
def golden(request) -> Golden:
    return Golden(*read_meta(request.config))


def close(ours, theirs, tolerance=1e-4, what=""):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=what)


def test_every_file_is_read(golden):
    ours = {"vision.npz", "packing.npz", "loss.npz", "special_tokens.npz", "train.npz"}
    assert set(golden.meta["arrays"]) == ours | OTHERS


def test_packing(golden, packing_case):
    arrays = golden.npz("packing.npz")
    info = golden.meta["arrays"]["packing.npz"]["cases"][packing_case]
    get = {k.split("/", 1)[1]: v for k, v in arrays.items() if k.startswith(packing_case + "/")}
    model = golden.model()
    batch = golden.batch(arrays, packing_case, info["max_length"], info["padding_side"])
    graph, weights = nnx.split(model)
    embeds, visual = fast(lambda w, b: nnx.merge(graph, w).embed(b))(weights, batch)
    present = batch.segments > 0
    embeds = np.where(present[..., None], embeds, 0.0)
    close(embeds, get.pop("inputs_embeds"))

    flags = get.pop("image_positions")
    # An answer picture's token at position p is the target of position p - 1.
    wanted = np.zeros_like(flags)
    wanted[:, 1:] = batch.visual_targets[:, :-1] >= 0
    np.testing.assert_array_equal(wanted, flags)
    b, at = np.nonzero(wanted)
    answers = np.asarray(visual)[b, batch.visual_targets[b, at - 1]]
    targets = get.pop("targets")
    close(answers.reshape(targets.shape), targets)
    if "out_labels" in get:
        labels = get.pop("out_labels")
        shifted = np.where(labels[:, 1:] < 0, -1, labels[:, 1:])
        np.testing.assert_array_equal(batch.text_targets[:, :-1], shifted)
        assert (batch.text_targets[:, -1] == -1).all()
    else:
        assert info["out_labels_is_none"] and (batch.text_targets < 0).all()
    if "out_attention_mask" in get:
        np.testing.assert_array_equal(present, get.pop("out_attention_mask") != 0)
    if "out_position_ids" in get:
        np.testing.assert_array_equal(batch.positions, get.pop("out_position_ids"))
    inputs = {"input_ids", "labels", "attention_mask", "image_embeds", "images", "position_ids"}
    assert set(get) <= inputs, f"arrays that no check reads: {set(get) - inputs}"


@jax.jit
def _nothing(x):
    return x


def loss_and_grads(model, batch, stage_filter):
    """({name: float}, gradients by published name) of one batch."""
    graph, trained, rest = nnx.split(model, stage_filter, ...)

    def total(trained, rest, batch):
        model = nnx.merge(graph, trained, rest)
        sums, metrics = model.loss_sums(batch, None)
        counts = model.loss_counts(batch)
        means = {k: s / jnp.maximum(counts[k], 1) for k, s in sums.items()}
        return sum(model.loss_weights[k] * m for k, m in means.items()), means

    step = fast(jax.value_and_grad(total, has_aux=True))
    (loss, means), grads = step(trained, rest, batch)
    blank = jax.tree.map(jnp.zeros_like, rest)
    named = export_metamorph(nnx.merge(graph, grads, blank))
    return {"total": loss, **means}, named


def test_loss(golden, loss_case):
    info = golden.meta["arrays"]["loss.npz"]["cases"][loss_case]
    packing, arrays = golden.npz("packing.npz"), golden.npz("loss.npz")
    get = {k.split("/", 1)[1]: v for k, v in arrays.items() if k.startswith(loss_case + "/")}
    trains_tower = "tower" in loss_case
    source = {"pixels_trainable_tower": "pixels", "no_answer_images": "no_answer_images"}.get(
        loss_case, "mixed"
    )
    packed = re.search(r"packing case (\w+)", info["desc"])
    cases = golden.meta["arrays"]["packing.npz"]["cases"]
    max_length = cases[packed[1] if packed else source]["max_length"]
    heads = load_file(golden.root / "variant_heads.safetensors")
    head = {k.split("/", 1)[1]: v for k, v in heads.items() if k.startswith(loss_case + "/")}
    model = golden.model(
        head or None,
        head=HEADS.get(info["vision_head"], "single"),
        visual_coef=info["vision_coef"],
        use_vision_ar=info["use_vision_ar"],
        vision=dict(normalize=info["normalize_vision"], softmax=info["apply_softmax"]),
        train_tower=trains_tower,
        text_chunk=7,
    )
    batch = golden.batch(packing, source, max_length, features=get.pop("image_embeds", None))
    found, grads = loss_and_grads(model, batch, trained_filter(recipe.STAGES["vpit"](model.cfg)))
    for ours, theirs in (("text", "loss_text"), ("visual", "loss_vision"), ("total", "loss_total")):
        expected = get.pop(theirs)
        if np.isnan(expected):  # the reference's mean over nothing: here the loss is 0
            expected = {"visual": 0.0, "total": info["loss_text"]}[ours]
        # A mean of cosines near 0 has no relative precision: 1e-5 of its scale, which is 1.
        np.testing.assert_allclose(found[ours], expected, rtol=1e-5, atol=1e-5, err_msg=theirs)
    if "hidden_states" in get or "logits" in get:
        graph, weights = nnx.split(model)

        def states(weights, batch):
            model = nnx.merge(graph, weights)
            hidden, _ = model.hidden(batch)
            return hidden, model.llm.logits(hidden)

        hidden, logits = fast(states)(weights, batch)
        here = batch.segments > 0
        close(np.asarray(hidden)[here], get.pop("hidden_states")[here])
        close(np.asarray(logits)[here], get.pop("logits")[here])
    assert not get, f"arrays that no check reads: {set(get)}"

    recorded = load_file(golden.root / "grads.safetensors")
    for key, theirs in recorded.items():
        case, name = key.split("/", 1)
        if case == loss_case:
            close(grads[name], theirs, 1e-4 * np.abs(theirs).max(), name)
    for name in info.get("params_without_grad", ()):
        assert "vision_proj" in name or not np.any(grads[name]), name
    if "grad_global_norm" in info:
        norm = np.sqrt(sum(np.square(g).sum() for g in grads.values()))
        np.testing.assert_allclose(norm, info["grad_global_norm"], rtol=1e-4)


def test_gradients_of_all_recorded_cases_are_read(golden):
    cases = {k.split("/")[0] for k in load_file(golden.root / "grads.safetensors")}
    assert cases <= set(golden.meta["arrays"]["loss.npz"]["cases"])


def test_trainable_parameters(golden):
    listed = json.loads((golden.root / "trainable.json").read_text())
    stages = {
        "stage1_trainable": ("connector", {"connector_tokens": "all"}),
        "stage2_trainable_when_tower_frozen": ("vpit", {}),
    }
    assert set(listed) - {"note"} == set(stages)
    for key, (stage, options) in stages.items():
        model = golden.model(**options)
        chosen = trained_filter(recipe.STAGES[stage](model.cfg))
        graph, trained, rest = nnx.split(model, chosen, ...)
        marked = nnx.merge(
            graph, jax.tree.map(jnp.ones_like, trained), jax.tree.map(jnp.zeros_like, rest)
        )
        named = export_metamorph(marked)
        assert {k for k, v in named.items() if v.all()} == set(listed[key])
        assert {k for k, v in named.items() if v.any()} == set(listed[key])


def test_special_tokens(golden):
    arrays = golden.npz("special_tokens.npz")
    before, head = arrays["embed_before"], arrays["lm_head_before"]
    added = len(arrays["embed_after"]) - len(before)
    cfg = dataclasses.replace(
        recipe.llm_config(golden.config()),
        vocab_size=len(before), width=before.shape[1], added_tokens=added, layers=1,
    )  # fmt: skip
    llm = Llama(cfg, rngs=nnx.Rngs(0))
    llm.embed_tokens.embedding[...] = jnp.asarray(before)
    llm.lm_head.kernel[...] = jnp.asarray(head.T)
    init_added_tokens(llm)
    close(np.concatenate([before, llm.embed_tokens.added[...]]), arrays["embed_after"], 1e-6)
    close(np.concatenate([head, llm.lm_head.added[...]]), arrays["lm_head_after"], 1e-6)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_training_steps(golden, stage):
    arrays = golden.npz("train.npz")
    assert {k.split("/")[0] for k in arrays} == {"stage1", "stage2"}
    get = {k.split("/", 1)[1]: v for k, v in arrays.items() if k.startswith(stage + "/")}
    desc = golden.meta["arrays"]["train.npz"]["desc"]
    clip = float(re.search(r"clipping to global norm ([\d.]*\d)", desc)[1])
    adam = re.search(r"AdamW \((\S+), (\S+), eps (\S+), no decay\)", desc)
    b1, b2, eps = map(float, adam.groups())
    first = stage == "stage1"
    model = golden.model(connector_tokens="all", use_vision_ar=not first)
    filter_ = trained_filter(recipe.STAGES["connector" if first else "vpit"](model.cfg))
    graph, params, rest = nnx.split(model, filter_, ...)
    rates = jnp.asarray(get.pop("lr"))
    optimizer = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(lambda step: rates[step], b1=b1, b2=b2, eps=eps, weight_decay=0.0),
    )
    state = optimizer.init(params)
    max_length = golden.meta["arrays"]["packing.npz"]["cases"]["mixed"]["max_length"]
    batch = golden.batch(golden.npz("packing.npz"), "mixed", max_length)

    @fast
    def step(params, state):
        def total(params):
            model = nnx.merge(graph, params, rest)
            sums, _ = model.loss_sums(batch, None)
            counts = model.loss_counts(batch)
            means = {k: s / jnp.maximum(counts[k], 1) for k, s in sums.items()}
            return sum(model.loss_weights[k] * m for k, m in means.items()), means

        (loss, means), grads = jax.value_and_grad(total, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        out = (loss, means["text"], means["visual"], optax.global_norm(grads))
        return optax.apply_updates(params, updates), state, out

    found = []
    for _ in range(len(rates)):
        params, state, out = step(params, state)
        found.append([float(x) for x in out])
    for ours, name in zip(
        np.array(found).T, ("loss", "loss_text", "loss_vision", "grad_norm"), strict=True
    ):
        np.testing.assert_allclose(ours, get.pop(name), rtol=1e-4, atol=1e-4, err_msg=name)
    named = export_metamorph(nnx.merge(graph, params, rest))
    for key in list(get):
        assert key.startswith("final/"), f"no check reads {key}"
        close(named[key.removeprefix("final/")], get.pop(key), 1e-4, key)


def test_vision(golden):
    arrays, info = golden.npz("vision.npz"), golden.meta["arrays"]["vision.npz"]
    c = golden.meta["config"]
    tensors = load_file(golden.root / "vision.safetensors")
    base = dataclasses.replace(vit.SIZES["siglip-tiny"], **tower_options(c["vg"]))

    def tower(**changes):
        made = vit.ViT(dataclasses.replace(base, **changes), rngs=nnx.Rngs(0))
        load_vit(made, tensors, "model.vision_tower.vision_tower.")
        return made

    images = [arrays[k] for k in sorted(arrays) if re.fullmatch(r"image\d+_uint8", k)]
    preprocess = Preprocess(base.size)
    pixels = np.stack([preprocess(Image.fromarray(i)) for i in images])
    hidden = fast(tower())(pixels)
    before_last = fast(tower(select_layer=-2))(pixels)

    def reduce(x, tokens, kind="interpolation"):
        cfg = ReduceConfig(tokens, kind, base.tokens, base.width)
        return TokenReducer(cfg, rngs=nnx.Rngs(0))(x)

    tokens = reduce(hidden, c["vg_ntok"])
    kind = re.search(r"projector (\w+)", info["weights"])[1]
    connector = Connector(kind, base.width, c["hidden"], rngs=nnx.Rngs(0))
    rename = sequential(connector.linears)
    load_torch_dict(connector, tensors, "model.mm_projector.", rename=rename)
    concat = reduce(hidden, c["vg_concat"], "concat_interpolation")
    found = {
        "pixel_values": preprocess.normalise(pixels).transpose(0, 3, 1, 2),
        "embeddings_out": fast(tower().embed)(pixels),
        "last_layer_hidden": hidden,
        "post_layernorm_NOT_USED": fast(tower(final_norm=True))(pixels),
        "tokens_interpolated": tokens,
        "tokens_normalized": normalize_features(tokens),
        "tokens_softmax": normalize_features(tokens, softmax=True),
        "tokens_concat_interpolation": normalize_features(concat),
        "tokens_no_reduction_normalized": normalize_features(reduce(hidden, base.tokens)),
        "tokens_interpolated_select_minus2": reduce(before_last, c["vg_ntok"]),
        "projected": connector(normalize_features(tokens)),
    }
    assert np.abs(found["post_layernorm_NOT_USED"] - hidden).max() > 0.1
    listed = set(info) - {"weights", "image_k_uint8"}
    assert listed == set(found), f"not read: {listed - set(found)}"
    for name, ours in found.items():
        close(ours, arrays[name], 1e-4, name)


def test_checkpoint_comes_back(golden):
    weights = load_file(golden.root / "model.safetensors")
    named = export_metamorph(golden.model())
    used = {k: v for k, v in weights.items() if ".post_layernorm." not in k}
    assert set(named) == set(used)
    for name, array in used.items():
        np.testing.assert_array_equal(named[name], array, err_msg=name)


def test_all_mismatches_are_named_at_once(golden):
    weights = load_file(golden.root / "model.safetensors")
    head = max(key for key in weights if re.fullmatch(r"vision_head\.(\d+\.)?bias", key))
    del weights["model.norm.weight"], weights[head]
    weights["model.mm_projector.0.bias"] = np.zeros(3, np.float32)
    weights["model.surprise"] = np.zeros(3, np.float32)
    model = golden.model()
    with pytest.raises(ValueError) as error:
        load_metamorph(model, weights)
    for name in ("norm.weight", head.removeprefix("vision_head."), "0.bias: (3,)", "surprise"):
        assert name in str(error.value)

"""LLaVA's forward pass, loss, gradients and greedy decoding against the reference implementation.

Sizes, cases and shapes come from golden/llava/model/desc.json; one sample a row, as the reference
has it. Two things differ on purpose: rows are padded on the right whatever the case says, and an
image that would be cut is left out (the reference keeps half of it).
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from metamorph_jax.convert import names
from metamorph_jax.convert.vit import config_from_hf, load_vit
from metamorph_jax.data.images import Preprocess
from metamorph_jax.data.interleave import build_row, read_place
from metamorph_jax.data.views import AnyRes, Single
from metamorph_jax.models import build
from metamorph_jax.models.connectors.mlp import Connector
from metamorph_jax.models.vision.encoder import VisionConfig
from metamorph_jax.models.vision.vit import ViT
from metamorph_jax.recipes import llava as recipe
from metamorph_jax.recipes.llava.decoding import make_loop
from metamorph_jax.recipes.llava.keys import load_llava
from metamorph_jax.sampling.policy import TextPolicy
from metamorph_jax.train.state import trained_filter
from metamorph_jax.types import Batch, Images

pytestmark = pytest.mark.golden
CLOSE = dict(atol=1e-4, rtol=1e-3)  # the README's tolerance
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TOWER = "model.vision_tower.vision_tower."
FILL = {"tokens": 0, "positions": 0, "text_targets": -1, "image_slots": -1, "visual_targets": -1}


def read(config) -> tuple[pathlib.Path, dict]:
    root = pathlib.Path(config.getoption("--golden-root")) / "llava"
    return root, json.loads((root / "model/desc.json").read_text())


def pytest_generate_tests(metafunc):
    root, desc = read(metafunc.config)
    if "case" in metafunc.fixturenames:
        cases = desc["cases"]
        metafunc.parametrize("case", cases, ids=[c["name"] for c in cases])
    if "layer" in metafunc.fixturenames:
        metafunc.parametrize("layer", range(desc["vision"]["layers"] + 1))
    keys = [k for k in desc["keys"] if k.startswith("features_select_")]
    if "selected" in metafunc.fixturenames:
        metafunc.parametrize("selected", keys)
    if "projector" in metafunc.fixturenames:
        found = [k.removeprefix("projected_") for k in desc["keys"] if k.startswith("projected_")]
        metafunc.parametrize("projector", found)


class Golden:
    """The reference's tiny model as one of ours, and its arrays."""

    def __init__(self, root: pathlib.Path, desc: dict):
        self.root, self.desc = root, desc
        self.arrays = dict(np.load(root / desc["io"]))
        self.tensors = load_file(root / desc["weights"].split()[0])
        fields = json.loads((root / desc["vision"]["config"]).read_text())
        self.tower = config_from_hf(fields, select_layer=desc["select_layer"], final_norm=False)
        self.pixels = self.arrays["pixel_values"].transpose(0, 2, 3, 1)
        self.views = np.load(root / "preprocess/pixels.npz")
        self.model = self._model()
        self.compute = self._compiled()

    @property
    def config(self) -> recipe.Config:
        d = self.desc["llm"]
        llm = dict(
            vocab_size=d["vocab"], width=d["hidden"], mlp_width=d["intermediate"],
            layers=d["layers"], heads=d["heads"], kv_heads=d["kv_heads"],
            head_dim=d["hidden"] // d["heads"], norm_eps=d["rms_eps"],
            rope_theta=d["rope_theta"], tied=d["tie"],
        )  # fmt: skip
        tower = vars(self.tower)
        vision = VisionConfig("clip-tiny", tower, tokens=self.tower.tokens, normalize=False)
        # The newline vector is there whatever a case merges by; slots decide where it stands.
        return recipe.Config(
            "tiny", llm, vision=vision, connector=self.desc["projector"], merge="spatial_unpad"
        )

    def _model(self) -> recipe.Llava:
        model = nnx.eval_shape(lambda: recipe.create(self.config, build.rngs(0)))
        load_llava(model, self.tensors)
        return model

    def _compiled(self):
        graph, weights = nnx.split(self.model)

        @jax.jit
        def compute(weights, batch):
            model = nnx.merge(graph, weights)
            logits = model.llm.logits(model.hidden(batch))
            return model.embed(batch), logits, model.loss_sums(batch)[0], model.loss_counts(batch)

        return lambda batch: compute(weights, batch)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, positions, views of a row) that hold any case, so that all share one program."""
        cases = self.desc["cases"]
        rows = max(len(self.arrays[f"{c['name']}.input_ids"]) for c in cases)
        most = max(len(v) for v in self.views.values() if v.ndim == 4)
        # A case that is cut is computed in full, too.
        longest = max(c["merged_len"] for c in cases) + self.tower.tokens
        return rows, longest, most

    def images(self, case) -> list[np.ndarray]:
        """Views float[n, h, w, 3] of the case's images, one image after another."""
        if case["aspect"] == "anyres" and not self.single_view(case):
            side = self.tower.size
            return [
                self.views[f"img{k}_anyres_{side}"].transpose(0, 2, 3, 1)
                for k in range(len(case["image_sizes"]))
            ]
        return [x[None] for x in self.pixels]

    def single_view(self, case) -> bool:
        """Whether the case's anyres image has a single view."""
        return case["name"] == "anyres_single_tile"

    def plan(self, case, number: int):
        side, P = self.tower.size, self.tower.tokens
        if case["aspect"] == "anyres" and not self.single_view(case):
            file = self.root / "preprocess/desc.json"
            grids = json.loads(file.read_text())["anyres_pinpoints"]
            views = AnyRes(P, Preprocess(side), tuple(map(tuple, grids)), case["merge"])
            return views.plan(tuple(case["image_sizes"][number]))
        return Single(P, newline=case["merge"] == "spatial_unpad").plan()

    def batch(self, case, length: int) -> Batch:
        """The rows of a case, each with one sample of at most `length` positions."""
        take = lambda name, none: self.arrays.get(f"{case['name']}.{name}", none)  # noqa: E731
        ids = take("input_ids", None)
        mask = take("attention_mask_in", np.ones(ids.shape, bool))
        labels = take("labels_in", np.full(ids.shape, -100))
        B, L, I = self.shape
        out = {k: np.full((B, L), v, np.int32) for k, v in FILL.items()}
        segments, valid = np.zeros((B, L), np.int32), np.zeros((B, I), bool)
        pixels = np.zeros((B, I, self.tower.size, self.tower.size, 3), np.float32)
        images, at = self.images(case), 0
        for b in range(len(ids)):
            count = int((ids[b][mask[b]] == -200).sum())
            mine = range(at, at + count)
            at += max(count, 1)  # a row without images passes over one of the list
            places = [read_place(*self.plan(case, k)) for k in mine]
            row = build_row(ids[b][mask[b]], labels[b][mask[b]], places, self.tower.tokens, length)
            for k in FILL:
                out[k][b, : len(row)] = getattr(row, k)
            segments[b, : len(row)] = 1
            kept = len(row.view_starts)
            if kept:
                pixels[b, :kept] = np.concatenate([images[k] for k in mine])[:kept]
                valid[b, :kept] = True
        found = Images(valid, np.zeros((B, I), np.int32), pixels)
        return Batch(**out, segments=segments, sources=np.zeros((B, L), np.int32), images=found)


def fill_connector(connector, tensors, prefix: str) -> None:
    """Our linears are items 0, 2, 4 … of a torch Sequential; a single one has no number."""
    one = len(connector.linears) == 1
    rename = lambda key: (  # noqa: E731
        key.removeprefix("linears.0.") if one
        else ".".join(str(2 * int(p)) if p.isdigit() else p for p in key.split(".")[1:])
    )  # fmt: skip
    own = {k: v for k, v in tensors.items() if k.startswith(prefix)}
    names.load_torch_dict(connector, own, prefix, rename=rename)


@pytest.fixture(scope="module")
def golden(request) -> Golden:
    return Golden(*read(request.config))


def test_every_array_and_case_is_read(golden):
    """Of the descriptor, of its files, and of the folder."""
    cases = [c["name"] for c in golden.desc["cases"]]
    parts = ("input_ids", "labels_in", "attention_mask_in", "inputs_embeds", "labels",
             "attention_mask", "position_ids", "last_logits", "logits_mean_abs")  # fmt: skip
    ours = {f"{case}.{part}" for case in cases for part in parts} | {"pixel_values"}
    ours |= {f"vision_hidden_{k}" for k in range(golden.desc["vision"]["layers"] + 1)}
    prefixes = ("features_select_", "projected_", "stage1_grad.")
    left = {k for k in golden.arrays if k not in ours and not k.startswith(prefixes)}
    assert not left and set(golden.desc["keys"]) == set(golden.arrays)
    read_here = {"vision", "llm", "select_layer", "select_feature", "projector", "weights",
                 "extra_projectors", "io", "cases", "greedy", "stage1_grad", "keys"}  # fmt: skip
    assert golden.desc.keys() == read_here
    assert golden.desc["select_feature"] == "patch"  # else `config` must leave the class token in


def _tower(golden, layer: int, whole_output: bool):
    """float[n, tokens, C] of the tower with this hidden state selected."""
    changes = {"select_layer": layer, "class_out": whole_output}
    cfg = type(golden.tower)(**(vars(golden.tower) | changes))
    tower = nnx.eval_shape(lambda: ViT(cfg, rngs=build.rngs(0)))
    inside = {k: v for k, v in golden.tensors.items() if k.startswith(TOWER)}
    load_vit(tower, inside, f"{TOWER}vision_model.")
    graph, weights = nnx.split(tower)
    run = jax.jit(lambda w, x: nnx.merge(graph, w)(x), compiler_options=FAST)
    return np.asarray(run(weights, golden.pixels)), cfg


def test_hidden_states(golden, layer):
    """Class token and patches of every layer."""
    got, cfg = _tower(golden, layer, True)
    assert got.shape[1] == cfg.tokens
    np.testing.assert_allclose(got, golden.arrays[f"vision_hidden_{layer}"], **CLOSE)


def test_selected_features(golden, selected):
    layer, feature = selected.removeprefix("features_select_").split("_", 1)
    layer = int(layer.replace("m", "-"))
    got, _ = _tower(golden, layer, feature == "cls_patch")
    np.testing.assert_allclose(got, golden.arrays[selected], **CLOSE)


def test_projected_features(golden, projector):
    x = golden.arrays["features_select_m2_patch"]
    D = golden.desc["llm"]["hidden"]
    connector = golden.model.connector
    if projector != golden.desc["projector"]:
        extra = load_file(golden.root / golden.desc["extra_projectors"])
        connector = Connector(projector, x.shape[-1], D, rngs=nnx.Rngs(0))
        fill_connector(connector, extra, f"{projector}.")
    np.testing.assert_allclose(connector(x), golden.arrays[f"projected_{projector}"], **CLOSE)


def test_case(golden, case):
    """Embeddings, labels and logits at every position that is not padding, and the loss."""
    take = lambda name: golden.arrays.get(f"{case['name']}.{name}")  # noqa: E731
    want = take("inputs_embeds")
    B, L, _ = want.shape
    assert L == case["merged_len"]
    limit = case["tokenizer_model_max_length"] or golden.shape[1]
    embeds, logits, sums, counts = golden.compute(golden.batch(case, golden.shape[1]))
    valid = take("attention_mask")
    valid = np.ones((B, L), bool) if valid is None else valid
    lengths = valid.sum(1)
    mean = 0.0
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(embeds[b, :n], want[b][valid[b]], **CLOSE)
        np.testing.assert_allclose(logits[b, n - 1], take("last_logits")[b], **CLOSE)
        mean += float(np.abs(logits[b, :n]).sum())
    mean /= B * L * logits.shape[-1]
    np.testing.assert_allclose(mean, take("logits_mean_abs"), rtol=1e-3)
    batch = golden.batch(case, limit)
    if take("position_ids") is not None:
        for b, n in enumerate(lengths):
            assert batch.positions[b, :n].tolist() == take("position_ids")[b][valid[b]].tolist()
    if case["loss"] is None:
        assert take("labels") is None
        return
    assert labels_of(batch, lengths) == [take("labels")[b][valid[b]].tolist() for b in range(B)]
    if limit < golden.shape[1]:
        _, _, sums, counts = golden.compute(batch)
        cut = batch.segments.sum(1)[:B] < lengths  # rows whose image did not fit
        assert cut.any() and (batch.images.valid[:B][cut] == 0).all()
    np.testing.assert_allclose(sums["text"] / counts["text"], case["loss"], **CLOSE)


def labels_of(batch: Batch, lengths) -> list[list[int]]:
    """The label of every position, -100 for none: what the state before it is to predict."""
    found = []
    for b, n in enumerate(lengths):
        shifted = [-100, *batch.text_targets[b, : n - 1].tolist()]
        found.append([x if x >= 0 else -100 for x in shifted])
    return found


def test_gradients_of_stage_1(golden):
    """Those of the connector; nothing else of the reference's checkpoint is trained."""
    about = golden.desc["stage1_grad"]
    (case,) = [c for c in golden.desc["cases"] if c["name"] == about["from_case"]]
    batch = golden.batch(case, golden.shape[1])
    stage = trained_filter(recipe.STAGES["connector"](golden.config))
    graph, trained, rest = nnx.split(golden.model, stage, ...)

    @jax.jit
    def compute(trained, rest):
        def loss(trained):
            model = nnx.merge(graph, trained, rest)
            return model.loss_sums(batch)[0]["text"] / model.loss_counts(batch)["text"]

        return jax.value_and_grad(loss)(trained)

    loss, grads = compute(trained, rest)
    np.testing.assert_allclose(loss, about["loss"], rtol=1e-5)
    flat = {".".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(grads)}
    assert not flat.pop("newline").any()  # no image of the case has one
    wanted = {k: v for k, v in golden.arrays.items() if k.startswith("stage1_grad.")}
    assert len(flat) == len(wanted)
    for key, want in wanted.items():
        number, leaf = key.split(".")[-2:]
        name = f"connector.linears.{int(number) // 2}."
        got = flat[name + "kernel"].T if leaf == "weight" else flat[name + "bias"]
        np.testing.assert_allclose(got, want, **CLOSE)


def test_greedy(golden):
    """Every step of the reference, by the cached decoding loop, in one batch with another row."""
    about = golden.desc["greedy"]
    number = int(about["pixel_values"].removeprefix("pixel_values[").rstrip("]"))
    ids = np.array(about["start_ids"], np.int32)
    P = golden.tower.tokens
    row = build_row(ids, None, [read_place(*Single(P).plan())], P, 10**6)
    model = nnx.merge(*nnx.split(golden.model))
    visual = model.project(model.visual_features(golden.pixels[number : number + 1]))[0]
    embeds = np.array(model.llm.embed_tokens(jnp.asarray(row.tokens)))
    embeds[row.image_slots >= 0] = visual
    steps = [step["token"] for step in about["steps"]]
    loop = make_loop(model)
    result, _ = loop([embeds, embeds[:3]], [len(steps), 2], TextPolicy())
    assert result.record.tolist() == steps

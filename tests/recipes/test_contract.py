"""Every recipe does what `recipe.py` promises: the installed ones, and one that lies outside.

Train, resume, plan, generate, evaluate, convert and sweep, by the same code for all of them.
Nothing in the package knows the toy (`tests/recipes/toy.py`); if it needs a change there, the seam
is wrong.
"""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import metamorph_jax
from metamorph_jax import cli
from metamorph_jax import recipe as recipes
from metamorph_jax.config import load_config
from metamorph_jax.convert import load
from metamorph_jax.convert.families import Family, RunForm
from metamorph_jax.errors import UserError
from metamorph_jax.models import build
from metamorph_jax.plan import programs
from metamorph_jax.recipe import DataStream, Model, Shard
from metamorph_jax.sharding import make_mesh
from metamorph_jax.sweep import command as sweep
from metamorph_jax.train import loop
from metamorph_jax.train.config import resolve
from metamorph_jax.train.state import trained_filter

ROOT = pathlib.Path(__file__).parents[2]
COLOURS = {"red": (220, 30, 20), "green": (20, 200, 40), "blue": (30, 40, 210)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe at toy size.

    Attributes:
        config: file of its config, with a size.
        changes: to make it small.
        read_back: option that takes what `metamorph convert` wrote; "" if none does.
    """

    config: str
    changes: dict
    read_back: str = ""


CASES = {
    "tests.recipes.toy": Case("tests/recipes/toy_config.py", {}, "weights"),
    "metamorph": Case(
        "configs/metamorph/vpit.py:smoke",
        {"data.row.length": 128, "data.row.images": 4, "data.cache.features": ""},
        "weights",
    ),
    "llava": Case(
        "configs/llava/stage2.py:smoke", {"data.row.length": 128, "data.row.images": 4}, "weights"
    ),
    "mm_interleaved": Case(
        "configs/mm_interleaved/pretrain.py:smoke",
        {"data.row.length": 128, "data.row.images": 4, "initial_batches": 1},
        "weights",
    ),
    "minigpt5": Case(
        "configs/minigpt5/stage1.py:smoke",
        {"data.row.length": 128, "data.row.images": 4, "data.images.max_frames": 0},
        "weights",
    ),
    "decoder": Case(
        "configs/metamorph/decoder.py:smoke",
        {"model.with_tower": True, "data.cache.features": "", "initial_batches": 1},
    ),
}


def test_no_recipe_is_left_out():
    assert CASES.keys() - {"tests.recipes.toy"} == set(recipes.installed())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions about colours, and requests for them."""
    folder, lines = tmp_path_factory.mktemp("colours"), []
    for i, (name, colour) in enumerate([*COLOURS.items()] * 2):
        Image.new("RGB", (20, 16), colour).save(folder / f"{i}.png")
        turns = [("human", "<image>\nWhich colour is it?"), ("gpt", f"It is {name}.")]
        if i % 2:
            turns = [("human", f"Draw {name}."), ("gpt", "<image>")]
        turns = [{"from": who, "value": text} for who, text in turns]
        lines.append(json.dumps({"id": str(i), "image": f"{i}.png", "conversations": turns}))
    (folder / "colours.jsonl").write_text("\n".join(lines))
    return folder / "colours.jsonl"


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


def options(case, data) -> dict:
    """What makes the config small."""
    source = {"data.sources": {"main": {"path": str(data)}}}
    small = {"steps": 2, "batch_size": 2, "checkpoint_every": 1, "log_every": 1}
    off = {"tensorboard": False, "compilation_cache": ""}
    return source | small | off | case.changes


@pytest.fixture(scope="module")
def config(case, data):
    return load_config(f"{ROOT}/{case.config}", options(case, data))


@pytest.fixture(scope="module")
def run(config):
    return resolve(config)


@pytest.fixture(scope="module")
def workdir(config, data, tmp_path_factory):
    """A finished run of two steps, evaluated on held-out data after each, with samples at last."""
    folder = tmp_path_factory.mktemp("run")
    table = config.to_dict()
    table["evals"] = {"heldout": {"every": 1}, "look": {"kind": "samples", "samples": 2}}
    loop.train(table, folder)
    return folder


@pytest.fixture(scope="module")
def stream(run):
    stream = run.recipe.open_data(run.data, run.model, Shard(2))
    yield stream
    stream.close()


def leaves(workdir):
    recipe, cfg, _ = load.open_run(workdir)
    model = load.load_model(recipe, cfg, make_mesh(devices=jax.devices()[:1]), workdir=workdir)
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in flat}


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ---- the contract


def test_model_and_stages(run):
    recipe = run.recipe
    model = nnx.eval_shape(lambda: recipe.create(run.model, build.rngs(0)))
    assert isinstance(model, Model)
    for stage, pattern in recipe.STAGES.items():
        chosen = nnx.to_flat_state(nnx.state(model, trained_filter(pattern(run.model))))
        assert chosen, stage
        assert all(isinstance(model.param_group(path), str) for path, _ in chosen)
    assert all(isinstance(f, Family | RunForm) for f in recipe.FAMILIES)
    assert recipe.Config() and recipe.Data()


def test_data(run, stream):
    assert isinstance(stream, DataStream)
    state = stream.get_state()
    assert json.loads(json.dumps(state)) == state
    batch = next(stream)
    names = stream.sample_names()()
    assert len(names) == 2 and all(isinstance(n, str) for row in names for n in row)
    spec = run.recipe.batch_spec(run.data, run.model, 2)
    shape = lambda x: (x.shape, np.dtype(x.dtype))  # noqa: E731
    assert jax.tree.map(shape, spec) == jax.tree.map(shape, batch)
    stream.set_state(state)
    again = next(stream)
    for x, y in zip(jax.tree.leaves(batch), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(x, y)
    counted = batch.counted()
    assert counted["images"] > 0 and not any(batch.blank().counted().values())
    assert list(stream.sources) == ["main"] and dict(stream.skipped) == {}


def test_losses_and_work(run, stream):
    batch = next(stream)
    model = run.recipe.create(run.model, nnx.Rngs(0))
    graph, weights = nnx.split(model)

    @jax.jit
    def compute(weights, batch):
        model = nnx.merge(graph, weights)
        return model.loss_counts(batch), model.loss_sums(batch, jax.random.key(0))

    counts, (sums, metrics) = compute(weights, batch)
    assert counts.keys() == sums.keys() and sums.keys() <= model.loss_weights.keys()
    assert all(np.isfinite(x) for x in jax.tree.leaves((sums, metrics)))
    blank, (nothing, _) = compute(weights, batch.blank())
    assert not any(blank.values()) and not any(nothing.values())
    work = model.work(jax.eval_shape(lambda x: x, batch))
    assert sum(w.forward for w in work) > 0
    named = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    for one in work:
        assert not one.weights or any(n.startswith(one.weights) for n in named), one


# ---- what the program does with it


def test_train_and_evaluate(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert (workdir / "final").is_dir()
    evaluated = {k: v for line in lines for k, v in line.items() if k.startswith("evals.heldout.")}
    assert evaluated and all(np.isfinite(v) for v in evaluated.values())
    assert any(line["step"] == 2 and np.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_samples_are_shown(case, workdir):
    """Both of the file's first two records, with question, wanted answer and given answer."""
    shown = json.loads((workdir / "samples" / "look-00000002.json").read_text())["samples"]
    assert len(shown) == 2
    for one in shown:
        assert all((workdir / "samples" / file).is_file() for file in one["images"].values())
    if case.config.endswith("decoder.py:smoke"):
        assert [set(one["images"]) for one in shown] == [{"wanted", "drawn"}] * 2
        return
    asks, draws = shown
    assert asks["text"]["question"].endswith("Which colour is it?")
    assert draws["text"]["wanted"] == "<image>"
    assert [*asks["images"], *draws["images"]] == ["given 1", "wanted 1"]
    assert all(isinstance(one["text"]["answer"], str) for one in shown)


def test_a_run_has_a_report(workdir):
    assert cli.main(["report", str(workdir)]) == 0
    page = (workdir / "report.html").read_text()
    for expected in ("evals.heldout.loss", "Evaluation “look”, after step 2", "learning_rate"):
        assert expected in page


def test_resume_is_exact(config, workdir, tmp_path):
    """A run that was killed after its first step ends as one that was not."""
    killed = tmp_path / "run"
    ignore = shutil.ignore_patterns("final", "2", "*00000002*", "metrics.jsonl")
    shutil.copytree(workdir, killed, ignore=ignore)
    loop.train(config, killed)
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2]
    equal(leaves(workdir), leaves(killed))


def test_plan(config, run):
    program = programs.train_step(config, jax.devices()[:1])
    assert program.arithmetic.model > 0 and program.rows == 2
    assert sum(trained for trained, _ in program.parts.values()) > 0


def test_generate(workdir, data):
    image = str(data.parent / "0.png")
    try:
        model = metamorph_jax.load(str(workdir))
    except UserError as error:
        assert "does not generate" in str(error)
        return
    reply = model.generate("Which colour is it?", images=[image], max_new_tokens=4)
    assert isinstance(reply.text, str)
    assert reply.text == model.generate("Which colour is it?", [image], max_new_tokens=4).text


def test_convert(case, workdir, run, tmp_path):
    out = tmp_path / "published"
    assert cli.main(["convert", f"--from=workdir:{workdir}", f"--out={out}"]) == 0
    assert list(out.rglob("*.safetensors"))
    if not case.read_back:
        return
    cfg = dataclasses.replace(run.model, **{case.read_back: str(out)})
    mesh = make_mesh(devices=jax.devices()[:1])
    model = load.load_model(run.recipe, cfg, mesh)
    flat = nnx.to_flat_state(nnx.state(model))
    equal(leaves(workdir), {".".join(map(str, p)): np.asarray(v[...]) for p, v in flat})


def test_sweep(case, data, tmp_path, capsys):
    spec = f"{ROOT}/{case.config}"
    if "def sweep(" not in pathlib.Path(spec.partition(":")[0]).read_text():
        return
    runs = sweep.plan(spec, options(case, data), tmp_path)
    assert len(runs) > 1 and len({r.folder for r in runs}) == len(runs)


def test_nothing_in_the_package_knows_the_toy():
    for file in (ROOT / "metamorph_jax").rglob("*.py"):
        assert not re.search(r"tests\.recipes\.toy\b(?!`)", file.read_text()), file

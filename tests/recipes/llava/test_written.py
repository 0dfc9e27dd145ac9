"""A finished run in every form that `metamorph convert` writes, and what reads these again; files
with a part of a model."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from metamorph_jax import cli
from metamorph_jax.convert import changes, export, families, hf, peft, vision
from metamorph_jax.convert.llama import EMBED, export_llama
from metamorph_jax.errors import ConfigError, WeightError
from metamorph_jax.models import build, lora
from metamorph_jax.recipes import llava as recipe
from metamorph_jax.recipes.llava import fields, projectors, published
from metamorph_jax.recipes.llava.input import encoder_of, input_spec, load_tokenizer, load_tower
from tests.convert.conftest import ORACLE
from tests.recipes.llava.tiny import ANYRES, SIZES, TINY

torch = pytest.importorskip("torch", reason=ORACLE)
LORA = lora.LoraConfig(r"llm\.layers\..*_proj", rank=2, alpha=6.0)
RUN = dataclasses.replace(ANYRES, start_end=True, lora=LORA)


def filled(cfg, seed=0):
    """A model with random values that no one has to compile an initialiser for."""
    model = nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0)))
    rng = np.random.default_rng(seed)
    value = lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype)  # noqa: E731
    nnx.update(model, jax.tree.map(value, nnx.state(model)))
    return model


def plain(model, cfg):
    """A model of another config with the values of this one, where it has them."""
    other = filled(cfg, seed=1)
    mine = dict(nnx.to_flat_state(nnx.state(model)))
    for path, variable in nnx.to_flat_state(nnx.state(other)):
        variable.set_raw_value(mine.get(path, variable).get_raw_value())
        nnx.update(other, nnx.from_flat_state([(path, variable)]))
    return other


def same(a, b, but=()):
    a, b = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (a, b))
    assert a.keys() == b.keys()
    for path in a:
        if not set(path) & set(but):
            np.testing.assert_array_equal(a[path][...], b[path][...], err_msg=str(path))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir of a finished stage with adapters, its model)."""
    from orbax.checkpoint import v1 as ocp

    folder, model = tmp_path_factory.mktemp("run"), filled(RUN)
    named = {".".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(nnx.state(model))}
    ocp.save((folder / "final").absolute(), named)
    stated = json.loads(json.dumps(dataclasses.asdict(RUN)))
    data = {"sources": {}, "row": {"template": "chatml"}}
    values = {"recipe": "llava", "stage": "instruct", "model": stated, "data": data}
    (folder / "config.json").write_text(json.dumps(values))
    return folder, model


def convert(*words):
    return cli.main(["convert", *map(str, words)])


def loaded(cfg, **changes):
    model = nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0)))
    cfg = dataclasses.replace(cfg, **changes)
    recipe.load_pretrained(model, cfg)
    return model


def test_a_run_for_transformers(run, tmp_path):
    """Its processor makes the same views, and as many tokens of them, as our data do."""
    transformers = pytest.importorskip("transformers", reason=ORACLE)
    workdir, model = run
    assert convert("--from", f"workdir:{workdir}", "--out", tmp_path / "out") == 0
    stated = hf.read_config(tmp_path / "out")
    V = 49152
    assert stated["model_type"] == "llava_next" and stated["image_token_index"] == V + 2
    assert stated["text_config"]["vocab_size"] == V + 64
    cfg = dataclasses.replace(RUN, lora=None)
    again = loaded(cfg, weights=str(tmp_path / "out"))
    same(lora.merged(model), again)
    whole = dataclasses.replace(cfg, weights=str(tmp_path / "out"), tokenizer="")
    assert load_tokenizer(whole).convert_tokens_to_ids("<image>") == V + 2
    spec, process = input_spec(whole), input_spec(cfg).views.preprocess
    assert spec.tower != input_spec(cfg).tower  # a feature cache of its own
    assert dataclasses.replace(spec.views.preprocess, mode="square") == process
    compute = vision.feature_function(encoder_of(whole), functools.partial(load_tower, whole))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(compute(pixels), again.visual_features(pixels), atol=1e-5)

    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(processor).__name__ == "LlavaNextProcessor" and processor.image_token_id == V + 2
    views = input_spec(cfg).views
    for size in SIZES[:3]:  # of the last one no row of tiles is left, where transformers fails
        image = Image.radial_gradient("L").resize(size).convert("RGB")
        found = processor(images=image, text="<image>?", return_tensors="pt")
        count, slots = views.plan(size)
        assert int((found["input_ids"] == V + 2).sum()) == len(slots), size
        wanted = views.preprocess.normalise(views.pixels(image)).transpose(0, 3, 1, 2)
        assert found["pixel_values"].shape[1] == count
        # Torch's bicubic differs from Pillow's by a few levels of 255.
        assert np.abs(found["pixel_values"][0].numpy() - wanted).max() < 4 / 255 / 0.26, size


def test_a_run_in_the_original_layout(run, tmp_path):
    workdir, model = run
    out = tmp_path / "out"
    assert convert("--from", f"workdir:{workdir}", "--to", "reference", "--out", out) == 0
    stated, tensors = hf.read_config(out), hf.Tensors(out)
    assert stated["mm_use_im_start_end"] and stated["vocab_size"] == 49154
    assert stated["image_grid_pinpoints"] == [list(grid) for grid in RUN.grids]
    assert tensors["model.image_newline"].shape == (64,)
    same(lora.merged(model), loaded(dataclasses.replace(RUN, lora=None), weights=str(out)))
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert (added["<im_start>"], added["<im_end>"]) == (49152, 49153)


def test_the_connector_of_a_run(run, tmp_path):
    workdir, model = run
    out, words = tmp_path / "out", ("--from", f"workdir:{workdir}", "--to", "connector")
    assert convert(*words, "--out", out, "--dtype", "bf16") == 0
    state = torch.load(out / "mm_projector.bin", weights_only=True)
    assert sorted(state) == ["model.embed_tokens.weight", "model.image_newline"] + [
        f"model.mm_projector.{i}.{leaf}" for i in (0, 2) for leaf in ("bias", "weight")
    ]
    assert state["model.embed_tokens.weight"].shape == (2, 64)
    assert state["model.image_newline"].dtype == torch.bfloat16
    assert convert(*words, "--out", tmp_path / "wide") == 0
    other = filled(dataclasses.replace(RUN, lora=None), seed=2)
    projectors.load_connector(other, str(tmp_path / "wide"))
    same(model.connector, other.connector)
    np.testing.assert_array_equal(other.newline[...], model.newline[...])
    tables = (m.llm.embed_tokens.added[...] for m in (model, other))
    np.testing.assert_array_equal(*tables)
    with pytest.raises(ConfigError, match="start_end=true"):
        projectors.load_connector(filled(ANYRES), str(out))


def test_the_adapters_of_a_run(run, tmp_path):
    """PEFT's files, and beside them what was trained whole; merged with the base, they are the run;
    read as a start, they give the adapters and the connector."""
    workdir, model = run
    out = tmp_path / "lora"
    assert convert("--from", f"workdir:{workdir}", "--to", "peft", "--out", out) == 0
    state = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    names = {name.removeprefix("base_model.model.") for name in state}
    assert names == {EMBED, "model.image_newline"} | {  # the tables are tied
        f"model.mm_projector.{i}.{leaf}" for i in (0, 2) for leaf in ("bias", "weight")
    }
    cfg = dataclasses.replace(RUN, lora=None, start_end=False)
    base = plain(model, cfg)
    merged = changes.with_adapters(export_llama(base.llm), out)
    other = filled(dataclasses.replace(RUN, lora=None), seed=3)
    tower = published.export_llava(lora.merged(model), "original")
    parts = {**merged, **{k: tower[k] for k in tower if "vision_tower" in k}}
    published.load_llava(other, parts)
    wanted, found = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param)))
                     for m in (lora.merged(model), other))  # fmt: skip
    for path in wanted:
        np.testing.assert_allclose(found[path][...], wanted[path][...], atol=1e-6, err_msg=path)

    started = filled(RUN, seed=4)
    given = dataclasses.replace(RUN, lora=dataclasses.replace(LORA, weights=str(out)))
    started.cfg = given
    recipe.load_pretrained(started, given)
    same(model.connector, started.connector)
    one, two = peft.tensors(model.llm), peft.tensors(started.llm)
    assert all(np.allclose(one[key], two[key], atol=1e-7) for key in one)


def test_what_transformers_lacks_is_written_in_the_original_layout(tmp_path, capsys):
    """A quick start's model, whose visual tokens are reduced and normalised, and a linear one."""
    between = dict(tower="dinov2-tiny", tokens=4, normalize=True)
    cfg = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, **between),
                              image_mode="tower")  # fmt: skip
    linear = dataclasses.replace(TINY, connector="linear")
    beside = export.Source(tokenizer=load_tokenizer(TINY))
    for name, given, kind in (("own", cfg, "llava_jax"), ("linear", linear, "llava_llama")):
        model = filled(given)
        published.save(tmp_path / name, model, beside, export.Writer())
        assert "written in the original layout" in capsys.readouterr().out
        stated = hf.read_config(tmp_path / name)
        assert stated["model_type"] == kind
        again = loaded(given, weights=str(tmp_path / name))
        same(model, again, but=["post_layernorm"])
        theirs = fields.config_from_hf(stated)
        assert theirs.image_mode == given.image_mode
        assert theirs.vision.feature_shape == given.vision.feature_shape
    other = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, normalize=False))
    with pytest.raises(ConfigError, match="vision.normalize is False, in the checkpoint True"):
        loaded(other, weights=str(tmp_path / "own"))


# ---- projector files


def save(path, tensors):
    torch.save({k: torch.tensor(v) for k, v in tensors.items()}, path)
    return str(path)


def connector(prefix="model.mm_projector.", places=("0.", "2."), widths=((64, 32), (64, 64))):
    rng, out = np.random.default_rng(7), {}
    for place, shape in zip(places, widths, strict=True):
        out[f"{prefix}{place}weight"] = rng.normal(size=shape).astype(np.float32)
        out[f"{prefix}{place}bias"] = rng.normal(size=shape[:1]).astype(np.float32)
    return out


@pytest.fixture(scope="module")
def model():
    return filled(TINY)


def first(model):
    return np.asarray(model.connector.linears[0].kernel[...]).T


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "transformer.mm_projector.",
                                    "base_model.model.model.mm_projector."])  # fmt: skip
def test_projector_files_with_any_prefix(prefix, model, tmp_path):
    file = save(tmp_path / "mm_projector.bin", tensors := connector(prefix))
    for spec in (file, str(tmp_path)):
        model.connector.linears[0].kernel[...] = 0 * model.connector.linears[0].kernel[...]
        projectors.load_connector(model, spec)
        np.testing.assert_array_equal(first(model), tensors[f"{prefix}0.weight"])


def test_linear_and_deep_projectors(tmp_path):
    for kind, places in (("linear", [""]), ("mlp3x_gelu", ["0.", "2.", "4."])):
        model = filled(dataclasses.replace(TINY, connector=kind))
        shapes = [(64, 32)] + [(64, 64)] * (len(places) - 1)
        tensors = connector(places=places, widths=shapes)
        projectors.load_connector(model, save(tmp_path / "mm_projector.bin", tensors))
        start = f"model.mm_projector.{places[0]}"
        np.testing.assert_array_equal(first(model), tensors[f"{start}weight"])
        folder = tmp_path / kind
        projectors.save_connector(folder, model, export.Source(), export.Writer())
        again = torch.load(folder / "mm_projector.bin", weights_only=True)
        assert again.keys() == tensors.keys()
        assert all(np.array_equal(again[k].numpy(), tensors[k]) for k in tensors)
        assert hf.read_config(folder)["mm_projector_type"] == kind


@pytest.mark.parametrize("rows", [2, 49154])
def test_rows_of_start_and_end(rows, tmp_path):
    """The file has them alone, or at the end of the whole table."""
    table = np.random.default_rng(1).normal(size=(rows, 64)).astype(np.float32)
    file = save(tmp_path / "projector.pt", connector() | {EMBED: table})
    model = filled(dataclasses.replace(TINY, start_end=True))
    projectors.load_connector(model, file)
    np.testing.assert_array_equal(model.llm.embed_tokens.added[...], table[-2:])


def test_projectors_that_do_not_fit_are_named(model, tmp_path):
    load = lambda tensors: projectors.load_connector(model, save(tmp_path / "x.bin", tensors))  # noqa: E731
    with pytest.raises(ConfigError, match="start_end=true"):
        load(connector() | {EMBED: np.zeros((2, 64), np.float32)})
    with pytest.raises(WeightError, match="ZeRO-3"):
        load(connector() | {"model.mm_projector.0.weight": np.zeros((0,), np.float32)})
    with pytest.raises(WeightError, match=r"no connector"):
        load({"model.norm.weight": np.zeros(64, np.float32)})
    with pytest.raises(WeightError, match=r"wrong shape \(1\): linears.0.weight"):
        load(connector(widths=((64, 48), (64, 64))))
    with pytest.raises(WeightError, match="missing .*linears.1.bias"):
        load({k: v for k, v in connector().items() if k != "model.mm_projector.2.bias"})
    save(tmp_path / "mm_projector.bin", connector())
    stated = fields.config_to_original(TINY) | {"mm_vision_select_layer": -2}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ConfigError, match="tower.depth is"):
        projectors.load_connector(model, str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="config.model.lora.weights"):
        published.load_whole(model, TINY, tmp_path)


def test_a_checkpoint_needs_no_config_file(run, tmp_path, capsys):
    """Its config.json says all, in both layouts, and the tokenizer has the run's template; the
    same text comes as from the run."""
    workdir, _ = run
    for out in ("reference", "hf"):
        convert("--from", f"workdir:{workdir}", "--to", out, "--out", tmp_path / out)
        name, cfg, data = families.whole_checkpoint(str(tmp_path / out))
        assert (name, data.row.template, data.row.length) == ("llava", "chatml", 2048)
        assert (cfg.image_mode, cfg.grids, cfg.merge) == ("anyres", RUN.grids, "spatial_unpad")
        assert cfg.dtype == "float32" and data.images.max_frames == 1
    Image.radial_gradient("L").resize((70, 40)).convert("RGB").save(tmp_path / "image.png")
    words = ["generate", "--prompt", "What is it?", "--image", str(tmp_path / "image.png"),
             "--max-new-tokens", "6", "--context", "256"]  # fmt: skip
    capsys.readouterr()
    found = []
    for model in (["--workdir", str(workdir)], ["--checkpoint", str(tmp_path / "hf")]):
        assert cli.main([*words, *model]) == 0
        found.append(capsys.readouterr())
    assert found[0].out.strip() and found[0].out == found[1].out
    assert "recipe llava, as its files say" in found[1].err


def test_a_config_that_says_something_else_is_refused(run, tmp_path, capsys):
    workdir, _ = run
    convert("--from", f"workdir:{workdir}", "--out", tmp_path / "out")
    capsys.readouterr()
    words = ["generate", "--prompt", "x", "--checkpoint", str(tmp_path / "out")]
    assert cli.main([*words, "--config", "configs/llava/anyres.py:smoke"]) == 2
    assert "wrong shape (1): model.embed_tokens.weight: (49216, 64)" in capsys.readouterr().err
    assert cli.main([*words, "--config.model.llm_options.norm_eps=0.5"]) == 2
    assert "llm.norm_eps is 0.5, in the checkpoint 1e-" in capsys.readouterr().err
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    assert cli.main(words) == 2
    assert "(model type 'llama') is no whole model of" in capsys.readouterr().err

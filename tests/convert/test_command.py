"""`metamorph convert`: runs and published weights to folders that transformers loads."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from metamorph_jax import cli, config
from metamorph_jax.convert import command, export, families, hf, names, runs, safetensors, specs
from metamorph_jax.convert.llama import config_to_hf, export_llama
from metamorph_jax.data.chat import Chat
from metamorph_jax.data.config import RowConfig
from metamorph_jax.errors import WeightError
from metamorph_jax.models import build
from metamorph_jax.models.llm import llama
from metamorph_jax.recipes import metamorph as recipe

ORACLE = "needs the oracle extra: pip install 'metamorph_jax[oracle]'"
SMALL = llama.LlamaConfig(96, 16, 24, 2, 2, 1, 8, qk_norm=True, norm_eps=1e-6)


def filled(make):
    """What `make` builds, with random values that no one has to compile an initialiser for."""
    model, rng = nnx.eval_shape(make), np.random.default_rng(0)
    value = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)  # noqa: E731
    nnx.update(model, jax.tree.map(value, nnx.state(model)))
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory, golden_root):
    """(workdir of a finished stage, its model)."""
    from orbax.checkpoint import v1 as ocp

    folder = tmp_path_factory.mktemp("run")
    tokenizer = str(golden_root / "metamorph" / "tokenizer.json")
    start = specs.tokenizer(tokenizer).convert_tokens_to_ids("<image_start>")
    model = {
        "llm": "tiny",
        "llm_options": {"vocab_size": start, "vocab_multiple": 128},
        "vision": {"tower": "siglip-tiny", "tokens": 4},
        "tokenizer": tokenizer,
    }
    built = filled(lambda: recipe.create(config.build(recipe.Config, model), nnx.Rngs(0)))
    named = {".".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(nnx.state(built))}
    ocp.save((folder / "final").absolute(), named)
    data = {"sources": [{"name": "cats", "path": "/data/cats.jsonl"}]}
    values = {"recipe": "metamorph", "stage": "vpit", "model": model, "data": data}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "metrics.jsonl").write_text('{"step": 7, "text_loss": 1.25}\n{"step": 8, "te')
    return folder, built


def convert(*words):
    return cli.main(["convert", *map(str, words)])


def test_a_run_becomes_a_folder_for_transformers(run, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason=ORACLE)
    import transformers

    workdir, model = run
    out = tmp_path / "out"
    words = ["--from", f"workdir:{workdir}", "--out", out, "--max-shard-size", "60KB"]
    assert convert(*words) == 0
    assert f"-> {out}" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    llm, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    state = llm.state_dict()
    for key, value in export_llama(model.llm).items():
        np.testing.assert_array_equal(state[key].numpy(), value, err_msg=key)
    ids = [model.image_start, model.image_end]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids(["<image_start>", "<image_end>"]) == ids
    assert state["model.embed_tokens.weight"].shape[0] == ids[1] + 1  # no row only for sharding
    chat = Chat.of(specs.tokenizer(model.cfg.tokenizer), RowConfig())  # as the run was trained
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=False
    )
    assert list(asked) == chat.prompt([("user", "Hello")]).tolist()
    assert tokenizer.eos_token_id == llm.config.eos_token_id == chat.close
    ends = llm.generation_config.eos_token_id
    assert chat.close in (ends if isinstance(ends, list) else [ends])

    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    tower, report = transformers.SiglipVisionModel.from_pretrained(
        out / "tower", output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert all("head." in k or "post_layernorm" in k for k in report["missing_keys"])
    processor = json.loads((out / "tower" / "preprocessor_config.json").read_text())
    assert processor["size"]["height"] == model.vision.tower.cfg.size
    connector = hf.Tensors(out / "connector")
    kernel = model.connector.linears[0].kernel[...]
    np.testing.assert_array_equal(connector["model.mm_projector.0.weight"].T, kernel)
    assert json.loads((out / "head" / "config.json").read_text())["image_start_id"] == ids[0]
    card = (out / "README.md").read_text()
    for text in ("`metamorph`, stage `vpit`", "- cats: `cats.jsonl`", "| text_loss | 1.25 |"):
        assert text in card

    comes_back(model, out)
    words = ["--from", f"workdir:{workdir}", "--to", "reference", "--out", tmp_path / "reference"]
    assert convert(*words) == 0
    comes_back(model, tmp_path / "reference")
    fields = hf.read_config(tmp_path / "reference")
    assert fields["model_type"] == "metamorph_llama" and fields["vocab_size"] == ids[1] + 1
    assert fields["eos_token_id"] == chat.close
    assert (tmp_path / "reference" / "generation_config.json").is_file()


def comes_back(model, folder):
    """The folder has all weights of the model; it is named as by --checkpoint."""
    cfg = dataclasses.replace(model.cfg, weights=str(folder))
    again = nnx.eval_shape(lambda: recipe.create(cfg, build.rngs(0)))
    recipe.load_pretrained(again, cfg)
    mine, came = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (model, again))
    assert mine.keys() == came.keys()
    for name, value in mine.items():
        if name[-2:] not in (("lm_head", "kernel"), ("embed_tokens", "embedding")):  # padded rows
            np.testing.assert_array_equal(came[name][...], value[...], err_msg=str(name))


@pytest.fixture
def source(tmp_path):
    """A published folder of a tiny Qwen3 in bfloat16."""
    folder = tmp_path / "source"
    folder.mkdir()
    llm = filled(lambda: llama.Llama(SMALL, rngs=nnx.Rngs(0)))
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in export_llama(llm).items()}
    save_file(tensors, folder / "model.safetensors")
    fields = config_to_hf(SMALL, eos_token_id=5, torch_dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# It\n")
    return folder


def test_import_and_export_give_the_same_bytes(source, tmp_path):
    assert convert("--from", source, "--out", tmp_path / "a", "--max-shard-size", "4KB") == 0
    assert convert("--from", tmp_path / "a", "--out", tmp_path / "b") == 0
    original = hf.Tensors(source)
    for folder in ("a", "b"):
        found = hf.Tensors(tmp_path / folder)
        assert set(found) == set(original)
        for key in original:
            assert found[key].dtype == original[key].dtype
            assert found[key].tobytes() == original[key].tobytes(), key
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text())["eos_token_id"] == [
        5, 6]  # fmt: skip
    fields = hf.read_config(tmp_path / "b")
    assert fields["model_type"] == "qwen3" and fields["dtype"] == "bfloat16"
    assert fields["eos_token_id"] == 5
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"
    assert "license: apache-2.0" in (tmp_path / "b" / "README.md").read_text()
    assert convert("--from", source, "--out", tmp_path / "c", "--dtype", "f32") == 0
    wide = hf.Tensors(tmp_path / "c")
    for key in original:
        np.testing.assert_array_equal(wide[key], original[key].astype(np.float32), err_msg=key)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_special_tokens_are_ids_of_the_table(file, source, tmp_path, capsys):
    """An eos of a million was copied in silence, and text generation with it ran to its limit."""
    fields = json.loads((source / file).read_text())
    words = ["--from", source, "--out", tmp_path / "out"]
    (source / "tokenizer.json").unlink()
    for name, value in (
        ("eos_token_id", 10**6), ("eos_token_id", [5, 96]), ("eos_token_id", -1),
        ("bos_token_id", 96), ("pad_token_id", 1.5), ("pad_token_id", True),
    ):  # fmt: skip
        (source / file).write_text(json.dumps(fields | {name: value}))
        assert convert(*words) == 2, (name, value)
        assert name in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_special_tokens_of_adapters_and_bases(source, tmp_path, capsys):
    """What is written beside merged weights is looked at, too."""
    base = tmp_path / "base"
    base.mkdir()
    tensors = {k: np.array(v, np.float32) + 1 for k, v in hf.Tensors(source).items()}
    save_file(tensors, base / "model.safetensors")
    (source / "tokenizer.json").unlink()
    (source / "generation_config.json").unlink()
    fields = json.loads((source / "config.json").read_text()) | {"eos_token_id": 10**6}
    (source / "config.json").write_text(json.dumps(fields))
    assert convert("--from", base, "--delta", source, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{source / 'config.json'}: eos_token_id 1000000 is none of the 96 ids" in error
    assert not (tmp_path / "out").exists()


def test_special_tokens_may_be_of_the_tokenizer_alone(source, tmp_path, capsys):
    """As the first Llama 2 had a token for padding; and -1 is no such token."""
    (source / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {
        "type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": [{
        "id": 2, "content": "<pad>", "special": True, "single_word": False, "lstrip": False,
        "rstrip": False, "normalized": False}]}))  # fmt: skip
    file = source / "generation_config.json"
    for value in (2, -1, None):
        file.write_text(json.dumps({"eos_token_id": 1, "pad_token_id": value}))
        export.check_special_ids(source, {}, 2)
    file.write_text('{"pad_token_id": 50}')
    with pytest.raises(WeightError, match="pad_token_id 50 is none of the 2 ids"):
        export.check_special_ids(source, {}, 2)


def test_nothing_half_written_is_left(source, tmp_path, monkeypatch, capsys):
    write, calls = safetensors.write, []

    def failing(*args):
        calls.append(args)
        if len(calls) > 2:
            raise OSError("no space left on device")
        write(*args)

    monkeypatch.setattr(safetensors, "write", failing)
    with pytest.raises(OSError, match="no space"):
        convert("--from", source, "--out", tmp_path / "out", "--max-shard-size", "4KB")
    assert len(calls) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    assert convert("--from", source, "--out", tmp_path / "out") == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_nan_is_refused_unless_allowed(source, tmp_path, capsys):
    tensors = {k: np.array(v) for k, v in hf.Tensors(source).items()}
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, source / "model.safetensors")
    words = ["--from", source, "--out", tmp_path / "out"]
    assert convert(*words) == 2
    assert "NaN in 1 tensors: model.norm.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert convert(*words, "--allow-nan") == 0
    assert np.isnan(hf.Tensors(tmp_path / "out")["model.norm.weight"][3])


@pytest.mark.parametrize("value, words, message", [
    (np.inf, (), "inf in 1 tensors: model.norm.weight"),
    (1e5, ("--dtype", "f16"), "numbers too large for float16 in 1 tensors: model.norm.weight"),
])  # fmt: skip
def test_inf_is_neither_read_nor_written(value, words, message, source, tmp_path, capsys):
    tensors = {k: np.array(v) for k, v in hf.Tensors(source).items()}
    tensors["model.norm.weight"][3] = value
    save_file(tensors, source / "model.safetensors")
    assert convert("--from", source, "--out", tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_with_large_weights_is_not_written_as_f16(run, tmp_path, monkeypatch, capsys):
    folder, model = run
    array = np.array([1.0, 1e5], np.float32)
    large = names.Lazy({"w": (lambda: array, (2,), np.dtype("f4"))})
    write = lambda folder, model, source, writer: writer.weights(folder, large)  # noqa: E731
    monkeypatch.setattr(runs, "_save_of", lambda *_: write)
    words = ["--from", f"workdir:{folder}", "--out", tmp_path / "out"]
    assert convert(*words, "--dtype", "f16") == 2
    assert "numbers too large for float16 in w" in capsys.readouterr().err
    assert convert(*words, "--dtype", "bf16") == 0


@pytest.mark.parametrize("pixels", [False, True])
def test_a_decoder_lies_beside(pixels, tmp_path):
    """A UNet and an autoencoder as diffusers has them; other parts by our names."""
    from metamorph_jax.recipes import decoder
    from tests.recipes.decoder.tiny import latent_config, pixel_config

    cfg = pixel_config() if pixels else latent_config()
    model = filled(lambda: decoder.create(cfg, nnx.Rngs(0)))
    total = families.run_form(decoder).save(tmp_path, model, export.Source(), export.Writer())
    found = {p.name: hf.Tensors(p) for p in tmp_path.iterdir()}
    assert sum(v.nbytes for tensors in found.values() for v in tensors.values()) == total
    both = {"projector", "statistics"}
    assert set(found) == both | ({"denoiser"} if pixels else {"unet", "vae"})
    np.testing.assert_array_equal(found["statistics"]["pixel_mean"], model.decoder.pixel_mean[...])
    if not pixels:
        fields = hf.read_config(tmp_path / "unet")
        assert fields["_class_name"] == "UNet2DConditionModel"
        assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").is_file()
        kernel = model.decoder.denoiser.conv_in.kernel[...].transpose(3, 2, 0, 1)
        np.testing.assert_array_equal(found["unet"]["conv_in.weight"], kernel)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--from SPEC"),
        (["--from", "x"], "--out DIR"),
        (["--from", "missing", "--out", "out"], "no folder missing"),
        (["--from", "hf:a", "--out", "out"], "expected hf:owner/name"),
        (["--from", "workdir:missing", "--out", "out"], "not the workdir of a training run"),
        (["--from", "x", "--out", "out", "--max-shard-size", "big"], "'big' is not a size"),
        (["--from", "x", "--out", "out", "--decoder", "."], "--from workdir:PATH"),
        (["--from", "x", "--out", "out", "--to", "reference"], "--from workdir:PATH"),
    ],
)
def test_errors(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert convert(*words) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_sizes():
    assert command.parse_size("5GB") == 5 * 10**9
    assert command.parse_size("1.5 GiB") == 3 * 2**29 and command.parse_size("100") == 100


def test_list(monkeypatch):
    qwen3 = families.known()["qwen3"]
    monkeypatch.setattr(families, "known", lambda: {"qwen3": qwen3})
    lines = list(command.listing())
    assert lines[0].split() == ["family", "size", "parameters", "bf16", "fp32", "training"]
    row = next(line for line in lines if "qwen3-8b" in line).split()
    assert row == ["qwen3", "qwen3-8b", "8,190,735,360", "15.26", "30.51", "122.05"]


def test_list_has_what_was_published(monkeypatch):
    """Whole towers, with what recipes leave out; no sizes that only tests know."""
    known = families.known()
    towers = {name: known[name] for name in ("siglip", "clip-vision", "dinov2")}
    monkeypatch.setattr(families, "known", lambda: towers)
    rows = {words[1]: words[2] for words in map(str.split, command.listing()) if len(words) == 6}
    assert rows["siglip-so400m-384"] == "428,225,600"
    assert rows["clip-l-336"] == "303,507,456"
    assert rows["dinov2-s14"] == "22,056,576"
    assert not any("tiny" in size for size in rows)


def test_check_is_handed_on(monkeypatch):
    from metamorph_jax.convert import check

    asked = []
    monkeypatch.setattr(check, "run", lambda spec, tolerance: asked.append((spec, tolerance)))
    assert convert("--check", "--from", "hf:a/b", "--tolerance", "0.01") == 1
    assert asked == [("hf:a/b", 0.01)]

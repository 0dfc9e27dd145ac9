"""Delta weights and adapters that are merged into their base, tensor by tensor."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from metamorph_jax import cli
from metamorph_jax.convert import changes, hf, peft
from metamorph_jax.convert.llama import EMBED, HEAD
from metamorph_jax.errors import WeightError

Q, CONNECTOR = "model.layers.0.self_attn.q_proj.weight", "model.mm_projector.weight"
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


def draw(**shapes):
    rng = np.random.default_rng(len(shapes))
    return {key: rng.normal(size=shape).astype(np.float16) for key, shape in shapes.items()}


@pytest.fixture
def base():
    return draw(**{EMBED: (6, 4), HEAD: (6, 4), Q: (4, 4), "model.norm.weight": (4,),
                   INV_FREQ: (2,)})  # fmt: skip


@pytest.fixture
def model():
    """Two more tokens than the base, and a connector; buffers are not saved any more."""
    return draw(**{EMBED: (8, 4), HEAD: (8, 4), Q: (4, 4), "model.norm.weight": (4,),
                   CONNECTOR: (4, 3)})  # fmt: skip


def applied(base, delta):
    """The published rule, in 16 bits."""
    out = {}
    for key, value in delta.items():
        out[key] = value.copy()
        if key in base:
            out[key][: len(base[key])] += base[key]
    return out


def test_a_delta_is_added_where_the_base_has_the_tensor(base, model):
    delta = {k: v.astype(np.float16) for k, v in changes.difference(model, base).items()}
    np.testing.assert_array_equal(delta[EMBED][6:], model[EMBED][6:])
    np.testing.assert_array_equal(delta[CONNECTOR], model[CONNECTOR])
    np.testing.assert_array_equal(delta[Q], model[Q] - base[Q])
    assert INV_FREQ not in delta and changes.added(base, delta) == [CONNECTOR]
    found = changes.with_delta(base, delta | {INV_FREQ: base[INV_FREQ]})
    wanted = applied(base, delta)
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert found.shape_of(key) == wanted[key].shape
        np.testing.assert_array_equal(found[key].astype(np.float16), wanted[key], err_msg=key)
        np.testing.assert_allclose(found[key], model[key].astype(np.float32), atol=4e-3)


def test_what_does_not_fit_is_listed_at_once(base, model):
    delta = dict(model)
    del delta["model.norm.weight"]
    delta[EMBED] = delta[EMBED][:5]  # fewer rows than the base
    delta[Q] = np.zeros((5, 4), np.float16)  # only tables may grow
    delta["model.layers.1.self_attn.q_proj.weight"] = delta[Q]  # a deeper model
    with pytest.raises(WeightError) as error:
        changes.with_delta(base, delta)
    for words in (f"{EMBED}: (5, 4), in the base (6, 4)", f"{Q}: (5, 4)",
                  "norm.weight: only in the base", "layers.1.self_attn.q_proj.weight: not in",
                  "(4)"):  # fmt: skip
        assert words in str(error.value)
    assert HEAD not in str(error.value) and CONNECTOR not in str(error.value)
    found = changes.with_delta(base, model | {Q: model[Q] + np.float16(np.inf)})
    with pytest.raises(WeightError, match=f"inf in 1 tensors: {Q}"):
        found[Q]


FIELDS = {"model_type": "llama", "hidden_size": 4, "mm_projector_type": "linear"}


def put(folder, tensors, fields, **files):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def convert(*words):
    return cli.main(["convert", *map(str, words)])


def test_the_command_makes_and_applies_deltas(base, model, tmp_path, capsys):
    put(tmp_path / "base", base, {"model_type": "llama"}, tokenizer='{"of": "base"}',
        generation_config="{}")  # fmt: skip
    put(tmp_path / "model", model, FIELDS, tokenizer='{"of": "model"}')
    words = ["--from", tmp_path / "model", "--make-delta", tmp_path / "base"]
    assert convert(*words, "--out", tmp_path / "delta", "--max-shard-size", "100") == 0
    assert f"taken as they are: {CONNECTOR}" in capsys.readouterr().out
    words = ["--from", tmp_path / "base", "--delta", tmp_path / "delta"]
    assert convert(*words, "--out", tmp_path / "again") == 0
    delta, again = hf.Tensors(tmp_path / "delta"), hf.Tensors(tmp_path / "again")
    wanted = applied(base, {key: delta[key].copy() for key in delta})
    assert again.keys() == wanted.keys()
    for key in wanted:
        np.testing.assert_array_equal(again[key], wanted[key], err_msg=key)
    fields = hf.read_config(tmp_path / "again")
    assert fields == FIELDS | {"torch_dtype": "float16", "dtype": "float16"}
    assert (tmp_path / "again" / "tokenizer.json").read_text() == '{"of": "model"}'
    assert "`delta` were added" in (tmp_path / "again" / "README.md").read_text()


def test_a_change_of_itself_is_refused(base, model, tmp_path, capsys):
    """The same folder, under another name too, or another with the same tensors."""
    for name in ("base", "copy"):
        put(tmp_path / name, base, {"model_type": "llama"}, tokenizer="{}")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    for option in ("--delta", "--make-delta", "--lora"):
        for other in ("base", "link") + ("copy",) * (option != "--lora"):
            words = ("--from", tmp_path / "base", option, tmp_path / other)
            assert convert(*words, "--out", tmp_path / "out") == 2, (option, other)
            error = capsys.readouterr().err
            assert ("hold the same weights" if other == "copy" else f"{option} are both") in error
            assert not (tmp_path / "out").exists()


def adapters(folder, q_alpha=8):
    """Of rank 2, as a published folder of this kind has them: torch files, no tokenizer."""
    import torch

    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 4)).astype(np.float32), rng.normal(size=(4, 2)).astype(np.float32)
    q = "base_model.model." + Q.removesuffix("weight")
    halves = {f"{q}lora_A.default.weight": a, f"{q}lora_B.weight": b}
    put = lambda x: {k: torch.tensor(v) for k, v in x.items()}  # noqa: E731
    torch.save(put(halves), folder / "adapter_model.bin")
    whole = {"base_model.model." + CONNECTOR: rng.normal(size=(4, 3)).astype(np.float32)}
    torch.save(put(whole), folder / "non_lora_trainables.bin")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": q_alpha, "bias": "none",
              "base_model_name_or_path": "./checkpoints/elsewhere"}  # fmt: skip
    (folder / peft.CONFIG).write_text(json.dumps(fields))
    (folder / "config.json").write_text(json.dumps(FIELDS))
    return a, b, whole["base_model.model." + CONNECTOR]


def test_the_command_merges_adapters(base, tmp_path, capsys):
    pytest.importorskip("torch", reason="needs torch")
    put(tmp_path / "base", base, {"model_type": "llama"}, tokenizer='{"of": "base"}')
    a, b, connector = adapters(tmp_path / "lora")
    words = ["--from", tmp_path / "base", "--lora", tmp_path / "lora"]
    assert convert(*words, "--out", tmp_path / "out", "--dtype", "f32") == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == base.keys() - {INV_FREQ} | {CONNECTOR}
    np.testing.assert_allclose(found[Q], base[Q].astype(np.float32) + 4 * b @ a, atol=1e-5)
    np.testing.assert_array_equal(found[CONNECTOR], connector)
    np.testing.assert_array_equal(found[EMBED], base[EMBED].astype(np.float32))
    assert hf.read_config(tmp_path / "out")["mm_projector_type"] == "linear"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"of": "base"}'
    capsys.readouterr()
    assert convert(*words, "--out", tmp_path / "x", "--to", "peft") == 2
    assert "are one choice" in capsys.readouterr().err
    words = ["--from", "workdir:x", "--lora", tmp_path / "lora", "--out", tmp_path / "x"]
    assert convert(*words) == 2 and "--lora goes with" in capsys.readouterr().err


def test_adapters_that_do_not_fit_the_base_are_named(base, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch")
    adapters(tmp_path)
    with pytest.raises(WeightError, match="the weight is"):
        changes.with_adapters(base | {Q: np.zeros((4, 5), np.float16)}, tmp_path)
    with pytest.raises(WeightError, match="no linear of this model"):
        changes.with_adapters({EMBED: base[EMBED]}, tmp_path)
    torch.save({"model.model.x": torch.zeros(2), "model.x": torch.zeros(2)},
               tmp_path / "non_lora_trainables.bin")  # fmt: skip
    assert set(changes.read_whole(tmp_path)) == {"model.x", "x"}
    torch.save({"base_model.x": torch.zeros(0, 2)}, tmp_path / "non_lora_trainables.bin")
    with pytest.raises(WeightError, match="ZeRO-3"):
        changes.with_adapters(base, tmp_path)
    (tmp_path / "non_lora_trainables.bin").unlink()
    assert changes.read_whole(tmp_path) == {}

"""`metamorph generate` end to end with a tiny random model in a workdir of its own."""

import argparse
import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from metamorph_jax import cli
from metamorph_jax.recipes import metamorph as recipe
from metamorph_jax.sampling import generate

P, CONTEXT = 4, 160


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, golden_root):
    """A finished stage, as the train loop leaves it."""
    from orbax.checkpoint import v1 as ocp

    folder = tmp_path_factory.mktemp("run")
    tokenizer = str(golden_root / "metamorph" / "tokenizer.json")
    from metamorph_jax.convert import specs

    size = len(specs.tokenizer(tokenizer))
    model = {
        "llm": "tiny",
        "llm_options": {"vocab_size": size},
        "tower": "siglip-tiny",
        "image_tokens": P,
        "tokenizer": tokenizer,
    }
    cfg = recipe.Config(**model)
    built = recipe.create(cfg, nnx.Rngs(0))
    named = {".".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(nnx.state(built))}
    ocp.save((folder / "final").absolute(), named)
    data = {"sources": [{"path": "none.jsonl"}], "length": CONTEXT}
    values = {"recipe": "metamorph", "model": model, "data": data}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def speaker(workdir):
    return generate.load_speaker(str(workdir), None)


@pytest.fixture
def loaded(monkeypatch, speaker):
    """Loads the model once for all runs."""
    monkeypatch.setattr(generate, "load_speaker", lambda *args: speaker)
    return speaker


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(folder / name)
    (folder / "c.png").write_bytes(b"hello, I am no picture")
    return folder


def _parse(*words):
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    args = parser.parse_args([str(w) for w in words])
    args.overrides = {}
    return args


def _run(workdir, *words):
    return generate.run(_parse("--workdir", workdir, *words))


def test_one_prompt(workdir, loaded, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--prompt", "What is it?", "--image", pictures / "a.png", "--max-new-tokens", 8]
    assert _run(workdir, *words, "--out", out) == 0
    said = capsys.readouterr().out
    (record,) = json.loads((out / "segments.json").read_text())
    assert said.strip("\n") == record["text"].strip("\n")
    assert record["ended"] in ("eos", "budget")
    ids = sum((s["ids"] for s in record["segments"] if s["type"] == "text"), [])
    assert 1 <= len(ids) <= 8


def test_marker_and_prefix_change_the_prompt(loaded, pictures):
    def length(**kw):
        return loaded.prompt(generate.Request("0", **kw), 8)

    picture = (str(pictures / "a.png"),)
    front = length(prompt="x <image>", images=picture)
    default = length(prompt="x", images=picture)
    assert len(length(prompt="x")) + P + 2 <= len(default) <= len(front)
    assert len(length(prompt="x", think=True)) > len(length(prompt="x"))
    assert generate.place_pictures("look", 2) == "<image><image>\nlook"
    assert generate.place_pictures("a <image> b", 1) == "a <image> b"


def test_prompt_equals_the_training_row(loaded, pictures):
    """Reading a prompt gives what `recipe.embed` makes of the same batch."""
    from metamorph_jax.data.interleave import build_row
    from metamorph_jax.types import Batch

    model = loaded.model
    path = pictures / "b.jpg"
    got = loaded.prompt(generate.Request("0", "What?", (str(path),)), 8)
    ids = loaded.chat.question("What?", 1)
    row = build_row(ids, None, P, CONTEXT, model.image_start)
    pixels = loaded.data.preprocess(Image.open(path).convert("RGB"))
    one = lambda x: np.asarray(x)[None]  # noqa: E731
    batch = Batch(
        one(row.tokens), one(row.positions), one(np.ones_like(row.tokens)), one(row.text_targets),
        one(row.image_slots), one(row.visual_targets), one(row.tokens), np.ones((1, 1), bool),
        pixels=pixels[None, None],
    )  # fmt: skip
    np.testing.assert_allclose(got, np.asarray(model.embed(batch)[0][0]), atol=1e-5)


def test_jsonl(workdir, loaded, pictures, tmp_path, capsys):
    lines = [
        json.dumps({"id": "one", "prompt": "Hello"}),
        "{broken",
        json.dumps({"prompt": "<image> and <image>?", "images": ["a.png", "b.jpg"]}),
        json.dumps({"id": "few", "prompt": "<image> <image>", "image": "a.png"}),
        json.dumps({"id": "gone", "prompt": "?", "image": "gone.png"}),
        json.dumps({"id": "odd", "prompt": "?", "image": "c.png"}),
        json.dumps({"id": "last", "prompt": "Bye"}),
    ]
    file = pictures / "prompts.jsonl"
    file.write_text("\n".join(lines))
    out = tmp_path / "out"
    words = ["--prompts", file, "--out", out, "--max-new-tokens", 6, "--batch-size", 2]
    assert _run(workdir, *words) == 1  # something was skipped
    heard = capsys.readouterr()
    assert "line 2" in heard.err and "2 <image> markers" in heard.err
    assert "gone.png" in heard.err and "c.png" in heard.err
    records = json.loads((out / "segments.json").read_text())
    assert [r["id"] for r in records] == ["one", "3", "last"]

    # The same prompt alone says the same, and what is done is not done again.
    alone = tmp_path / "alone"
    _run(workdir, "--prompt", "Bye", "--max-new-tokens", 6, "--out", alone)
    (single,) = json.loads((alone / "segments.json").read_text())
    assert single["text"] == records[-1]["text"]
    results = out / "results.jsonl"
    kept = results.read_text().splitlines()
    results.write_text("\n".join(kept[:2]) + '\n{"id": "las')
    capsys.readouterr()
    _run(workdir, *words)
    heard = capsys.readouterr()
    assert "2 of 6 were done before" in heard.err
    assert json.loads((out / "segments.json").read_text()) == records
    with pytest.raises(cli.UserError, match="other settings"):
        _run(workdir, *words, "--seed", 3)


def test_drawing(loaded, tmp_path):
    """Pictures are drawn per guidance scale; the same seed draws the same."""
    from metamorph_jax.recipes import decoder as dec
    from metamorph_jax.sampling.interleaved import Picture, Result, Text

    C = loaded.decoder.C
    cfg = dec.DecoderConfig.pixels(C, P, side=16, width=64)
    artist = generate.Artist(dec.DecoderRecipe(cfg, nnx.Rngs(0)), steps=2)
    features = np.random.default_rng(0).normal(size=(P, C)).astype(np.float32)
    none = np.zeros(0, np.int32)
    segments = (
        Text(np.array([65, 66], np.int32)), Picture(features, True), Picture(features[:2], False)
    )  # fmt: skip
    result = Result(segments, none, features, none, True)
    args = _parse("--guidance", 1.5, 3, "--out", tmp_path)
    request = generate.Request("a/b", "draw")
    record, files = generate.describe(loaded, artist, request, result, args)
    drawn = ["a_b_picture0_scale1.5.png", "a_b_picture0_scale3.png"]
    assert [f for f in files if f.endswith("png")] == drawn
    assert files[drawn[0]].shape == (16, 16, 3) and files[drawn[0]].dtype == np.uint8
    assert [s.get("complete") for s in record["segments"]] == [None, True, False]
    again = generate.describe(loaded, artist, request, result, args)[1]
    np.testing.assert_array_equal(files[drawn[0]], again[drawn[0]])
    out = generate.Output(tmp_path / "out", {})
    out.write(request, record, files)
    assert Image.open(tmp_path / "out" / drawn[1]).size == (16, 16)


def test_voice_keeps_split_characters_back(loaded):
    import io

    heard = io.StringIO()
    voice = generate.Voice(loaded, heard)
    ids = loaded.chat.encode("naïve ☂ text")
    for token in ids:
        voice([token])
        assert "\ufffd" not in heard.getvalue()
    voice([loaded.decoder.start, -1, -1, loaded.decoder.end])
    voice.end()
    assert heard.getvalue() == "naïve ☂ text[picture 0]\n"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--prompt", "x", "--image", "missing.png"], "missing.png"),
        (["--prompt", "<image>"], "1 <image> markers, but 0 pictures"),
        (["--prompt", "x", "--prompts", "y"], "either --prompt or --prompts"),
        (["--prompts", "missing.jsonl"], "no file missing.jsonl"),
        (["--prompt", "x", "--decoder", "d"], "--out"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x " * 300], "shorten the prompt"),
    ],
)
def test_errors(workdir, loaded, words, message):
    with pytest.raises(cli.UserError, match=message):
        _run(workdir, "--max-new-tokens", 8, *words)


def test_too_many_pictures(workdir, loaded, pictures):
    many = ["--image", pictures / "a.png"] * 30
    with pytest.raises(cli.UserError, match=r"30 pictures .* \d+ pictures fit"):
        _run(workdir, "--prompt", "x", "--max-new-tokens", 8, *many)


def test_unknown_format(workdir, loaded, pictures):
    with pytest.raises(cli.UserError, match=r"c\.png"):
        _run(workdir, "--prompt", "x", "--image", pictures / "c.png", "--max-new-tokens", 8)


def test_no_workdir(tmp_path):
    with pytest.raises(cli.UserError, match="no workdir"):
        _run(tmp_path, "--prompt", "x")

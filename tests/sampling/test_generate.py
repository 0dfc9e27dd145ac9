"""`metamorph generate` end to end with a tiny random model in a workdir of its own."""

import argparse
import json

import pytest

from metamorph_jax import cli
from metamorph_jax.sampling import generate, trained


@pytest.fixture
def loaded(monkeypatch, generator):
    """Loads the model once for all runs."""
    monkeypatch.setattr(trained, "load_generator", lambda *_, **__: generator)
    return generator


def _parse(*words):
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    args = parser.parse_args([str(w) for w in words])
    args.overrides = {}
    return args


def _run(workdir, *words):
    return generate.run(_parse("--workdir", workdir, *words))


def test_one_prompt(workdir, loaded, image_files, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--prompt", "What is it?", "--image", image_files / "a.png", "--max-new-tokens", 8]
    assert _run(workdir, *words, "--out", out) == 0
    said = capsys.readouterr().out
    (record,) = json.loads((out / "segments.json").read_text())
    assert said.strip("\n") == record["text"].strip("\n")
    assert record["ended"] in ("eos", "budget")
    ids = sum((s["ids"] for s in record["segments"] if s["type"] == "text"), [])
    assert 1 <= len(ids) <= 8


def test_new_tokens_fit_into_a_short_context(workdir, loaded, image_files, capsys):
    before = loaded.prompts
    try:
        assert _run(workdir, "--prompt", "What is it?", "--context", 48) == 0
    finally:
        loaded.prompts = before
    assert capsys.readouterr().out


def test_jsonl(workdir, loaded, image_files, tmp_path, capsys):
    lines = [
        json.dumps({"id": "one", "prompt": "Hello"}),
        "{broken",
        json.dumps({"prompt": "<image> and <image>?", "images": ["a.png", "b.jpg"]}),
        json.dumps({"id": "few", "prompt": "<image> <image>", "image": "a.png"}),
        json.dumps({"id": "gone", "prompt": "?", "image": "gone.png"}),
        json.dumps({"id": "odd", "prompt": "?", "image": "c.png"}),
        json.dumps({"id": "last", "prompt": "Bye"}),
    ]
    file = image_files / "prompts.jsonl"
    file.write_text("\n".join(lines))
    out = tmp_path / "out"
    words = ["--prompts", file, "--out", out, "--max-new-tokens", 6, "--batch-size", 2]
    with pytest.raises(cli.UserError, match="4 prompts were skipped"):
        _run(workdir, *words)
    heard = capsys.readouterr()
    assert "line 2" in heard.err and "2 markers, 1 images" in heard.err
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
    with pytest.raises(cli.UserError, match="4 prompts were skipped"):
        _run(workdir, *words)
    heard = capsys.readouterr()
    assert "2 of 6 were done before" in heard.err
    assert json.loads((out / "segments.json").read_text()) == records
    with pytest.raises(cli.UserError, match="other settings"):
        _run(workdir, *words, "--seed", 3)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--prompt", "x", "--image", "missing.png"], "missing.png"),
        (["--prompt", "<image>"], "1 markers, 0 images"),
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


def test_too_many_images(workdir, loaded, image_files):
    many = ["--image", image_files / "a.png"] * 30
    with pytest.raises(cli.UserError, match=r"30 images .* \d+ images fit"):
        _run(workdir, "--prompt", "x", "--max-new-tokens", 8, *many)


def test_unknown_format(workdir, loaded, image_files):
    with pytest.raises(cli.UserError, match=r"c\.png"):
        _run(workdir, "--prompt", "x", "--image", image_files / "c.png", "--max-new-tokens", 8)


def test_no_workdir(tmp_path):
    with pytest.raises(cli.UserError, match="not the workdir"):
        _run(tmp_path, "--prompt", "x")

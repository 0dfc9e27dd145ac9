"""`metamorph generate` end to end with a tiny random model in a workdir of its own."""

import argparse
import json
import pathlib

import numpy as np
import pytest

from metamorph_jax import api, cli, options
from metamorph_jax.recipes import decoder
from metamorph_jax.recipes.decoder.config import pixels
from metamorph_jax.sampling import generate, trained
from metamorph_jax.sampling.results import ImagePart, Reply


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


def test_what_is_asked_for(tmp_path):
    """By options for all prompts; a prompt's own mode counts more."""
    file, lines = tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": "y", "mode": "text"}]
    file.write_text("\n".join(map(json.dumps, [*lines, {"prompt": "z", "literal": True}])))

    def read(*words):
        return generate.read(_parse("--workdir", "w", *words), generate.Outcome())

    found = read("--prompts", file, "--mode", "both", "--rounds", 3)
    assert [(r.mode, r.rounds, r.literal) for r in found] == [
        ("both", 3, False), ("text", 0, False), ("both", 3, True)
    ]  # fmt: skip
    (alone,) = read("--prompt", "###Human: x", "--literal", "--mode", "image")
    assert alone.literal and alone.mode == "image"
    for words in (["--rounds", 2], ["--mode", "both", "--rounds", -1]):
        with pytest.raises(cli.UserError, match="--rounds must be 1 to"):
            generate.run(_parse("--workdir", "w", "--prompt", "x", *words))


def test_a_model_that_decides_on_its_own_is_not_told(workdir, loaded):
    with pytest.raises(cli.UserError, match="mode 'image' can't be asked for"):
        _run(workdir, "--prompt", "x", "--mode", "image")


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


def test_samples(workdir, loaded, tmp_path, capsys):
    """N replies to each prompt; a larger N keeps the ones that are there."""
    words = ["--prompt", "Hello", "--max-new-tokens", 6, "--temperature", 3, "--min-new-tokens", 6]
    out = tmp_path / "out"
    _run(workdir, *words, "--samples", 2, "--out", out)
    two = json.loads((out / "segments.json").read_text())
    capsys.readouterr()
    _run(workdir, *words, "--samples", 4, "--out", out)
    assert "2 of 4 were done before" in capsys.readouterr().err
    four = json.loads((out / "segments.json").read_text())
    assert four[:2] == two and [r["request"]["sample"] for r in four] == [0, 1, 2, 3]
    assert len({r["text"] for r in four}) == 4
    with pytest.raises(cli.UserError, match="gives equal replies"):
        _run(workdir, "--prompt", "x", "--samples", 2)


def test_colliding_ids(workdir, loaded, tmp_path, monkeypatch):
    """Both are answered, with files of their own."""
    P, C = loaded.feature_shape
    image = ImagePart(np.zeros((P, C), np.float32), True, {})
    monkeypatch.setattr(loaded, "reply", lambda *_: Reply((image,), True))
    file = pathlib.Path(__file__).parents[1] / "cases" / "prompts" / "colliding_ids.jsonl"
    assert _run(workdir, "--prompts", file, "--max-new-tokens", 6, "--out", tmp_path / "o") == 0
    assert len(list((tmp_path / "o").glob("*.npy"))) == 2


def test_encodings_of_prompts(workdir, loaded, monkeypatch, capsys):
    folder = pathlib.Path(__file__).parents[1] / "cases" / "prompts"
    words = ["--max-new-tokens", 6]
    assert _run(workdir, "--prompts", folder / "prompts_utf-8-sig.jsonl", *words) == 0
    assert [line[:2] for line in capsys.readouterr().out.splitlines() if line[1:2] == ":"] == [
        "a:", "b:", "c:"
    ]  # fmt: skip
    with pytest.raises(cli.UserError, match=r"prompts_cp1252.jsonl, line 1: not UTF-8"):
        _run(workdir, "--prompts", folder / "prompts_cp1252.jsonl", *words)


def test_files_are_checked_before_the_model_loads(workdir, image_files, monkeypatch, capsys):
    monkeypatch.setattr(trained, "load_generator", lambda *_, **__: pytest.fail("it was loaded"))
    for name in ("gone.png", "c.png"):
        with pytest.raises(cli.UserError, match=name):
            _run(workdir, "--prompt", "x", "--image", image_files / name)
    file = image_files / "none_good.jsonl"
    file.write_text('{"prompt": "x", "image": "gone.png"}\n')
    with pytest.raises(cli.UserError, match="1 prompts were skipped"):
        _run(workdir, "--prompts", file)
    with pytest.raises(cli.UserError, match="draws no images"):
        _run(workdir, "--prompt", "x", "--decoder", workdir, "--out", image_files / "out")


def test_steps_are_checked_before_a_model_loads(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "load_generator", lambda *_, **__: pytest.fail("it was loaded"))
    model = options.complete(decoder.Config, pixels(8, 4, side=16, width=64))
    values = {"recipe": "decoder", "model": model, "data": {}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for steps in (1001, 5000):
        with pytest.raises(cli.UserError, match=f"{steps} steps"):
            _run(workdir, "--prompt", "x", "--decoder", tmp_path, "--out", tmp_path / "out",
                 "--steps", steps)  # fmt: skip


def test_steps_are_those_of_whatever_draws(workdir, loaded, tmp_path, monkeypatch):
    """A model that draws on its own takes them; one that can't draw says so."""
    with pytest.raises(cli.UserError, match="need a model that draws"):
        _run(workdir, "--prompt", "x", "--steps", 7)

    class Draws:
        def set_steps(self, steps):
            taken.append(steps)

    taken = []
    monkeypatch.setattr(loaded, "image_decoder", Draws())
    assert _run(workdir, "--prompt", "x", "--steps", 7, "--max-new-tokens", 2) == 0
    monkeypatch.setattr(api, "load_generator", lambda *_, **__: loaded)
    assert api.load(workdir, steps=9).generator is loaded and taken == [7, 9]


def test_it_says_when_nothing_was_drawn(workdir, loaded, tmp_path, monkeypatch, capsys):
    def run(*more):
        assert _run(workdir, "--prompt", "x", "--max-new-tokens", 6, *more) == 0
        return capsys.readouterr().err

    assert not run()
    P, C = loaded.feature_shape
    parts = [ImagePart(np.zeros((n, C), np.float32), n == P, {}) for n in (P, 1)]
    with monkeypatch.context() as patch:
        patch.setattr(loaded, "reply", lambda *_: Reply(tuple(parts), True))
        told = run()
    assert "1 images are cut off" in told and "nothing was drawn, since no --decoder" in told
    monkeypatch.setattr(loaded, "image_decoder", object())
    assert "the model answered with text alone" in run()


def test_no_workdir(tmp_path):
    with pytest.raises(cli.UserError, match="not the workdir"):
        _run(tmp_path, "--prompt", "x")

"""The systems side by side: their configs, what is asked of a generator, verdicts and the page."""

import argparse
import json
import re

import numpy as np
import pytest

from metamorph_jax.errors import UserError
from metamorph_jax.quickstart import data as qdata
from metamorph_jax.quickstart import run as quickstart
from metamorph_jax.quickstart import systems, systems_page
from metamorph_jax.sampling.results import ImagePart, Reply, TextPart
from metamorph_jax.train.config import resolve


class Painter:
    """A generator that draws one colour for every request but the first, which it answers in
    words."""

    def __init__(self):
        self.requests = []

    def generate(self, requests, options):
        self.requests.append((options.seed, [one.prompt for one in requests]))
        image = np.full((16, 16, 3), 200 + options.seed, np.uint8)
        drawn = Reply((ImagePart(np.zeros((0, 0), np.float32), True, {3.0: image}),), True)
        return [Reply((TextPart("no", (1,)),), True), *[drawn] * (len(requests) - 1)]


class Sees:
    """A classifier that sees what was asked for in every drawing of the second seed, and a black
    circle in all others."""

    def predict(self, pixels):
        rows = qdata.draw_requests()
        colors = [qdata.COLORS.index(r["color"]) for r in rows]
        shapes = [qdata.SHAPES.index(r["shape"]) for r in rows]
        second = pixels[:, 0, 0, 0].reshape(-1, 2)[:, 1] == 201
        assert second[1:].all()
        return [np.stack([np.zeros(24, int), x], 1).ravel() for x in (colors, shapes)]


@pytest.fixture
def run(tmp_path):
    found = systems.SystemsRun(tmp_path / "run", "smoke", 0)
    found.names, found.seeds = ("metamorph", "llava", "minigpt5"), range(2)
    (found.workdir / "data").mkdir()
    qdata.write_lines(found.workdir / "data" / "draw_test.jsonl", qdata.draw_requests())
    return found


@pytest.mark.parametrize("file", [f for s in systems.SYSTEMS.values() for f in s.stages])
@pytest.mark.parametrize("size", ["smoke", "quickstart"])
def test_all_read_the_data_of_this_workdir(tmp_path, file, size):
    table = systems.located_config(file, size, 7, tmp_path / "data", tmp_path / "features")
    one = resolve(table)
    assert one.cfg.seed == 7
    folders = {source.path.rsplit("/", 1)[0] for source in one.data.sources}
    assert folders == {str(tmp_path / "data")}
    assert one.data.cache.features in ("", str(tmp_path / "features"))


def test_what_the_systems_train(tmp_path):
    """At the quick start's size: each has a stage that trains what it reads images with."""
    parts = {
        "llava/stage2": {"connector.fc1.kernel": True, "llm.layers.mlp.up_proj.kernel": True},
        "minigpt5/stage2": {
            "connector.proj.kernel": True, "decoder.denoiser.conv_in.kernel": True,
            "llm.layers.mlp.up_proj.lora_a": True, "llm.layers.mlp.up_proj.kernel": False,
            "mapper.queries": True, "vision.tower.patch_embed.kernel": False,
        },
        "mm_interleaved/sft": {
            "vision.resampler.queries": True, "llm.layers.mlp.up_proj.kernel": True,
            "decoder.denoiser.unet.conv_in.kernel": True, "context.null": True,
            "vision.adapter.tower.patch_embed.kernel": False,
        },
    }  # fmt: skip
    for file, names in parts.items():
        table = systems.located_config(file, "quickstart", 0, tmp_path, tmp_path)
        pattern = re.compile(resolve(table).pattern)
        assert {name: bool(pattern.fullmatch(name)) for name in names} == names, file


def test_requests_without_an_image_are_wrong(run):
    generator = Painter()
    files = run.quickstart(0).files
    images, whole, seconds = systems.drawings(generator, files)
    assert images.shape == (24, 2, systems.SIDE, systems.SIDE, 3) and seconds >= 0
    assert whole.sum() == 46 and not whole[0].any() and (images[0] == 225).all()
    prompts = [r["prompt"] for r in qdata.read_jsonl(files.draw_test)]
    assert generator.requests == [(0, prompts), (1, prompts)]
    run.__dict__["classifier"] = Sees()
    found = run.verdicts(files, images, whole)
    # Of 20 pairs that were drawn in training, 19 have an image; all with the second seed are right.
    assert found["scores"] == {
        "seen pairs": 19 / 40,
        "held-out pairs": 0.5,
        "drawn at all": 46 / 48,
    }
    assert found["right"][0] == [False, False] and found["right"][1] == [False, True]


def _finish(run):
    """The records of all steps but the report."""
    rng = np.random.default_rng(0)
    for seed in run.seeds:
        for name in run.names:
            stages = {
                "one": {"trained": 2_000_000, "steps": 30, "seconds_per_step": 0.5},
                "two": {"trained": 1_000_000, "steps": 60, "seconds_per_step": 1.5},
            }
            run.once(f"{name}-{seed}", lambda stages=stages: {"stages": stages})
            judged = {"accuracy": 0.5 + seed / 10}
            if systems.SYSTEMS[name].draws:
                images = rng.integers(0, 255, (24, 2, 64, 64, 3), dtype=np.uint8)
                np.savez(run.workdir / f"drawn-{name}-{seed}.npz", drawings=images)
                scores = {"seen pairs": 0.9, "held-out pairs": 0.25, "drawn at all": 1.0}
                judged |= {"scores": scores, "right": [[True, False]] * 24,
                           "seconds_per_drawing": 0.125}  # fmt: skip
            run.once(f"judged-{name}-{seed}", lambda judged=judged: judged)


def test_the_page(run):
    _finish(run)
    text = systems_page.write(run).read_text()
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.S)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]
    table = {row[0].strip(): [c.strip() for c in row[1:]] for row in cells if row}
    assert table[""] == ["MetaMorph", "LLaVA", "MiniGPT-5"]
    assert table["questions answered right, %"] == ["55.0 (50.0, 60.0)"] * 3
    assert table["drawings right, held-out pairs, %"] == ["25.0 (25.0, 25.0)", "–"] + [
        "25.0 (25.0, 25.0)"
    ]
    assert table["trained parameters, millions"][0] == "2.0 (2.0, 2.0)"
    assert table["seconds per step"][0] == "1.50 (1.50, 1.50)"
    assert text.count("never drawn in training") == len(qdata.HELD_OUT)
    assert "Smoke size" in text


def test_results_of_another_machine_count_as_done(run, tmp_path, monkeypatch):
    """Kept results make the same page in an empty workdir, which says where they come from."""
    monkeypatch.setattr(systems.SystemsRun, "machine", "first machine")
    run.results, run.seeds = tmp_path / "results", range(1)
    _finish(run)
    kept = sorted(file.name for file in run.results.iterdir())
    drawing = [name for name in run.names if systems.SYSTEMS[name].draws]
    assert kept == sorted(
        [f"{name}-{seed}.json" for name in run.names for seed in run.seeds]
        + [f"{name}-{seed}.png" for name in drawing for seed in run.seeds]
    )
    assert all(file.stat().st_size < 250_000 for file in run.results.iterdir())
    first = systems_page.write(run).read_text()

    monkeypatch.setattr(systems.SystemsRun, "machine", "second machine")
    other = systems.SystemsRun(tmp_path / "other", "smoke", 0)
    other.results, other.names, other.seeds = run.results, run.names, run.seeds
    monkeypatch.setattr(other, "train", lambda *args: pytest.fail("trained again"))
    other.run()
    page = (other.workdir / "report.html").read_text()
    assert "first machine" in page and "second machine" not in page
    assert page.count("<tr>") == first.count("<tr>")
    near = other.drawn("minigpt5", 0).astype(int) - run.drawn("minigpt5", 0)
    assert near.shape == (24, 2, 64, 64, 3) and np.abs(near).mean() < 40  # noise in 256 colours

    for changed in ({"size": "quickstart"}, {"precision": "bfloat16"}):
        another = systems.SystemsRun(
            tmp_path / "-".join(changed), **{"size": "smoke", "seed": 0} | changed
        )
        another.results, another.seeds = run.results, range(1)
        assert another.done("llava-0") is None, changed
    monkeypatch.setattr(systems, "located_config", _other_config(systems.located_config))
    another = systems.SystemsRun(tmp_path / "longer", "smoke", 0)
    another.results = run.results
    assert another.done("llava-0") is None and another.done("metamorph-0")


def _other_config(located_config):
    def changed(*args):
        table = located_config(*args)
        table.steps += 1
        return table

    return changed


def test_steps_that_are_done_are_not_run_again(run, capsys):
    _finish(run)
    run.once("metamorph-0", lambda: pytest.fail("run twice"))
    run.say_plan()
    said = capsys.readouterr().out
    assert "judged-minigpt5-1" in said and "report" in said
    assert json.loads((run.workdir / "systems.json").read_text()) == {"size": "smoke", "seed": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--systems", "--only=llava,vicuna"], "--only vicuna: the systems are metamorph, llava"),
        (["--systems", "--seeds=0"], "--seeds must be at least 1"),
        (["--systems", "--stories"], "two commands"),
        (["--only=llava"], "--only goes with --systems"),
        (["--results=."], "--results goes with --systems"),
        (["--seeds=2"], "--seeds goes with --stories or --systems"),
        (["--systems", "--stamps=."], "--stamps goes with --stories"),
        (["--systems", "--full"], "--full and --head belong to the quick start alone"),
        (["--stories", "--head=flow"], "--full and --head belong to the quick start alone"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, message):
    parser = argparse.ArgumentParser()
    quickstart.add_arguments(parser)
    args = parser.parse_args(["--smoke", "--workdir", str(tmp_path), *options])
    with pytest.raises(UserError, match=message):
        quickstart.run(args)

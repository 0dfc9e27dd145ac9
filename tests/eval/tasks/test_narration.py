"""Narration of VIST: prompts, and what told sentences score."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from metamorph_jax.data.sets import stories as sets
from metamorph_jax.errors import ConfigError
from metamorph_jax.eval import tasks
from metamorph_jax.eval.scorers import captions
from metamorph_jax.eval.tasks import narration

from ...data.sets import made
from . import painter, scripted


@pytest.fixture
def vist(tmp_path):
    return made.vist(tmp_path / "vist_narration")


@pytest.mark.golden
def test_prompts_of_minigpt5(golden_root):
    """Those of its samples with a text to learn, where they have the first of its wordings."""
    case = json.loads((golden_root / "minigpt5" / "datasets.json").read_text())["vist"]
    compared = 0
    for kind, seen in (("multimodal", False), ("understanding", True)):
        task = tasks.make(f"vist_narration:protocol=minigpt-5,seen={str(seen).lower()}")
        wanted = {item["task_name"]: item for item in case["train_items"]}
        for id, rows in case["stories"].items():
            story = sets.Story(id, tuple(sets.Frame(row["caption"], "x.jpg") for row in rows))
            for k in range(1, len(rows)):
                ours, item = task._question(story, k), wanted[f"{id}_{k}-{kind}"]
                assert ours.literal and len(ours.images) == len(item["input_images"])
                if ours.prompt.split("\n")[1][:24] in item["source"]:
                    compared += 1
                    assert ours.prompt.replace("<image>", "<ImageHere>") == item["source"]
    assert compared


@pytest.mark.parametrize(
    "options, begin, images",
    [
        ("", "[male] saw 100 .<image>\n", 1),
        ("context=text", "[male] saw 100 .\n", 0),
        ("context=images", "<image>\n", 1),
        ("seen=true", "[male] saw 100 .<image>\n", 2),
        ("seen=true,context=text", "[male] saw 100 .\n", 1),
    ],
)
def test_questions(vist, options, begin, images):
    task = tasks.make(f"vist_narration:tokenizer=python,frames=2,{options}", root=str(vist))
    question = next(iter(task.questions()))
    assert question.prompt.startswith(f"Here is the beginning of a story:\n{begin}\nWrite the")
    assert question.prompt.count("<image>") == len(question.images) == images
    assert question.id == "1/2" and question.gold == "[male] saw 101 ." and question.unit == "1"


def test_which_sentences(vist):
    task = tasks.make("vist_narration:tokenizer=python", root=str(vist))
    assert [q.more["frame"] for q in task.questions() if q.unit == "1"] == [2, 3, 4, 5]
    for wrong in ("all", "1+2"):
        with pytest.raises(ConfigError, match="frames="):
            tasks.make(f"vist_narration:frames={wrong}", root=str(vist))


def test_scores(vist, monkeypatch, tmp_path):
    class Encoder:
        @staticmethod
        def similarities(ours, theirs):
            return np.full(len(ours), 0.5)

    monkeypatch.setattr(narration, "open_sentences", lambda spec: Encoder())
    said = {"1/2": "[male] saw 101 . ###", "1/3": "he saw nothing .", "2/2": "...",
            "2/3": "[male] saw 202 ."}  # fmt: skip
    spec = "vist_narration:frames=2+3,tokenizer=python,sentences=x"
    result, _ = scripted.run(spec, vist.parent, said, tmp_path, resamples=None)
    rouge = [record["measured"]["rouge"] for record in result.records]
    assert rouge[0] == rouge[3] == 1 and 0 < rouge[1] < 1 and rouge[2] == 0
    assert result.records[0]["said"] == "[male] saw 101 ." and result.unparsed == 1
    assert result.scores["ROUGE-L"] == pytest.approx(100 * np.mean(rouge))
    assert result.scores["100 x sentence similarity"] == pytest.approx(37.5)  # one of four is empty
    assert next(iter(result.scores)) == "ROUGE-L" and "METEOR" not in result.scores
    assert result.intervals["100 x sentence similarity"][0] <= 37.5
    rows = json.loads(pathlib.Path(result.files[0]).read_text())
    assert rows[1] == {"story": "1", "frame": 3, "text": "he saw nothing .",
                       "true_text": "[male] saw 102 ."}  # fmt: skip


def test_images_are_kept_and_not_scored(vist, tmp_path):
    model = painter.Painter(text="the sea", fails={"2/5"}, modes=("text", "image", "both"))
    spec = "vist_narration:frames=last,tokenizer=python,draw=true"
    result = painter.run(spec, vist, tmp_path, model)
    assert model.asked[0].mode == "both"
    assert result.scores["images, % of replies"] == 50
    assert result.records[0]["document"] == "the sea<image> the sea 0"


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR is a Java program")
def test_meteor(vist, tmp_path):
    said = {"1/5": "[male] saw 104 .", "2/5": "the boats are red"}
    result, _ = scripted.run(
        "vist_narration:frames=last", vist.parent, said, tmp_path, resamples=None
    )
    assert next(iter(result.scores)) == "METEOR"
    each = [captions.corpus_scores([r["measured"]])["METEOR"] for r in result.records]
    assert each[0] == pytest.approx(100) and each[1] == 0

"""MMDialog: what is asked, and what replies with and without images score."""

import json

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.errors import ConfigError, FileError
from metamorph_jax.eval import tasks
from metamorph_jax.eval.images import features, statistics
from metamorph_jax.eval.images.features import ImageSet
from metamorph_jax.eval.scorers import replies
from metamorph_jax.eval.tasks import mmdialog
from metamorph_jax.sampling.results import ImagePart, Reply, TextPart

from . import scripted
from .painter import INCEPTION, Clip, run


def turn(text, media=""):
    return {"turn": [{"__TEXT__": text}, *([{"__MEDIA__": media}] if media else [])]}


def put(root, dialogues, images=("-1", "22")):
    (root / "test").mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(images):
        pixels = np.random.default_rng(k).integers(60 * k, 200, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "test" / f"{name}.jpg")
    lines = [{"conversation_id": k, "conversation": turns} for k, turns in enumerate(dialogues)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "test" / "conversations.json").write_text(text)
    return root


@pytest.fixture
def root(tmp_path):
    return put(tmp_path / "mmdialog", [
        [turn("look", "-1"), turn("nice kite"), turn("here is the sea", "22"), turn("a boat")],
        [turn("hello"), turn("..."), turn("where", "-1"), turn("not there", "33"), turn("bye")],
        [turn("one only")],
        [turn("x"), turn("22.jpg"), turn("y")],
    ])  # fmt: skip


class Talker:
    """Replies by id: a text, and whether an image is drawn."""

    modes = ()

    def __init__(self, said):
        self.said, self.asked = said, {}

    def replies(self, requests, options, failed, stream=None, draw=True):
        for request in requests:
            self.asked[request.id] = request
            text, drawn = self.said[request.id]
            parts = [TextPart(text, (1,))] if text else []
            if drawn:
                pixels = np.random.default_rng(len(text)).integers(0, 256, (16, 16, 3), np.uint8)
                parts.append(ImagePart(np.zeros((1, 1), np.float32), True, {3.0: pixels}))
            yield request, Reply(tuple(parts), True)


@pytest.mark.golden
def test_prompts_of_minigpt5(golden_root, tmp_path, capsys):
    """Those of its test set, in its order, with the same images."""
    case = json.loads((golden_root / "minigpt5" / "datasets.json").read_text())["mmdialog"]
    names = [name.removesuffix(".jpg") for name in case["existing_images"]]
    turns = [[turn["turn"] for turn in dialogue] for dialogue in case["conversations"]]
    put(tmp_path, [[{"turn": parts} for parts in dialogue] for dialogue in turns], names)
    task = tasks.make("mmdialog:protocol=minigpt-5", root=str(tmp_path))
    questions = list(task.questions())
    assert len(questions) == len(case["test_items"])
    for question, item in zip(questions, case["test_items"], strict=True):
        assert f"{question.id}-mm" == item["task_name"] and question.literal
        assert question.prompt.replace("<image>", "<ImageHere>") == item["source"]
        ours = [f"MMDialog/{path.removeprefix(f'{tmp_path}/')}" for path in question.images]
        assert ours == item["input_images"]
        real = question.more["real"]
        assert (real is None) == (item["output_image"] is None)
        assert replies.said(item["target"]) == question.gold
    assert "1: fewer than two turns" in capsys.readouterr().err


def test_questions(root, capsys):
    task = tasks.make("mmdialog", root=str(root))
    questions = {q.id: q for q in task.questions()}
    assert list(questions) == ["0_1", "0_2", "0_3", "1_1", "1_2"]
    last = questions["0_3"]
    begin = mmdialog.STYLES["plain"].begin
    assert last.prompt == f"{begin}A: look <image>\nB: nice kite\nA: here is the sea <image>\nB:"
    assert [path.rsplit("/", 1)[1] for path in last.images] == ["-1.jpg", "22.jpg"]
    assert last.unit == "0" and not last.literal and last.more["real"] is None
    told = capsys.readouterr().err
    for reason in ("1: an image is missing", "1: fewer than two turns", "1: the name of an image"):
        assert reason in told
    with pytest.raises(ConfigError, match="history=some"):
        tasks.make("mmdialog:history=some", root=str(root))
    (root / "test" / "conversations.json").write_text('{"conversation": [{"turn": 3}]}\n')
    with pytest.raises(FileError, match="line 1: turn 0 has no list `turn`"):
        list(task.questions())


def test_scores(root, monkeypatch, tmp_path):
    class Encoder:
        @staticmethod
        def similarities(ours, theirs):
            return np.array([0.5 if a == b else 0.25 for a, b in zip(ours, theirs, strict=True)])

    monkeypatch.setattr(features, "open_clip", lambda spec: Clip())
    monkeypatch.setattr(features, "open_inception", lambda path: INCEPTION)
    monkeypatch.setattr(mmdialog, "open_sentences", lambda spec: Encoder())
    said = {
        "0_1": ("nice kite", False), "0_2": ("a sea", True), "0_3": ("boats ###", True),
        "1_1": ("well", False), "1_2": ("", False),
    }  # fmt: skip
    model = Talker(said)
    result = run("mmdialog:clip=x,sentences=y", root, tmp_path / "out", model)
    assert model.asked["0_1"].mode == ""  # a model that decides on its own is not told
    records = {record["id"]: record for record in result.records}
    text, image = records["0_2"]["elements"]
    pair = ImageSet((records["0_2"]["drawn"][0], records["0_2"]["more"]["real"]))
    mine = Clip().features(pair).values
    assert image == pytest.approx(statistics.cosines(mine[:1], mine[1:])[0])
    assert records["0_3"]["elements"][1] == "extra" and records["0_3"]["said"] == "boats"
    assert records["1_1"]["elements"] == ["extra", None] or records["1_1"]["elements"] == (
        "extra", None)  # fmt: skip
    assert records["1_2"]["elements"][1] == "missing" and records["1_2"]["parsed"] is False

    dialogues = [[records[f"0_{k}"] for k in (1, 2, 3)], [records["1_1"], records["1_2"]]]
    assert dialogues[1][0]["texts"] == {}  # its true text says nothing
    assert set(dialogues[1][1]["texts"].values()) == {0.0}
    words = [replies.text_scores(r["said"], r["gold"])["BLEU-1"] for r in dialogues[0]]
    assert result.scores["100 x BLEU-1"] == pytest.approx(100 * np.mean([np.mean(words), 0]))
    alike = 100 * np.mean([(0.5 + 0.25 + 0.25) / 3, 0])
    assert result.scores["100 x sentence similarity"] == pytest.approx(alike)
    found = [replies.relevance(e for r in own for e in r["elements"]) for own in dialogues]
    assert found[1] == 0  # nothing is paired
    assert result.scores["100 x MM-Relevance"] == pytest.approx(100 * np.mean(found))
    assert next(iter(result.scores)) == "100 x MM-Relevance"
    low, high = result.intervals["100 x MM-Relevance"]
    assert low == pytest.approx(0) and high == pytest.approx(100 * found[0])
    cosine = result.scores["100 x CLIP, image-image"]
    assert cosine == pytest.approx(100 * image, abs=1e-3)
    assert result.scores["100 x CLIP, image-image, failures as 0"] == pytest.approx(cosine / 2)
    assert result.scores["images, % of replies"] == 40 == result.scores["images, % of true turns"]
    (lines, _) = result.files
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert rows[1]["text"] == "a sea" and rows[1]["true_image"].endswith("22.jpg")


def test_an_image_that_can_t_be_read_is_no_element(root, capsys):
    """It counts neither as missing nor as extra; which one it is, is printed."""
    good, bad = root / "test" / "-1.jpg", root / "test" / "22.jpg"
    bad.write_bytes(good.read_bytes()[:40])
    drawn, real = [str(good), str(good), ""], [str(good), str(bad), str(good)]
    compare = lambda *both: mmdialog._of_images(Clip(), *both)  # noqa: E731
    found = replies.elements(compare, drawn, real)
    assert found == [pytest.approx(1), None, "missing"]
    assert replies.relevance(found) == pytest.approx(2 / 3)
    assert "22.jpg can't be compared" in capsys.readouterr().err


def test_of_models_that_draw_nothing(root, tmp_path):
    model = scripted.Scripted(dict.fromkeys(("0_1", "0_2", "0_3", "1_1", "1_2"), "nice"))
    result = run("mmdialog:draw=false", root, tmp_path / "out", model)
    assert result.scores["images, % of replies"] == 0 and "100 x BLEU-1" in result.scores


def test_without_networks(root, tmp_path):
    """Text scores alone; a model that can be told to draw is not, here."""
    model = Talker({id: ("nice", False) for id in ("0_1", "0_2", "0_3", "1_1", "1_2")})
    model.modes = ("text", "image", "both")
    result = run("mmdialog", root, tmp_path / "out", model)
    assert model.asked["0_1"].mode == ""
    assert next(iter(result.scores)) == "100 x BLEU-1"
    assert "100 x MM-Relevance" not in result.scores

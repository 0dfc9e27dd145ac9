"""POPE and MME on small official files."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[3]))

from metamorph_jax.errors import FileError  # noqa: E402
from tests.eval.tasks.asked import run  # noqa: E402

SHORT = "\nAnswer the question using a single word or phrase."


@pytest.fixture
def pope(tmp_path):
    for number, setting in enumerate(("random", "popular", "adversarial")):
        rows = [
            {"question_id": k, "image": f"COCO_{k // 2}.jpg", "text": f"Is there a {thing}?",
             "label": label}
            for k, (thing, label) in enumerate([("cat", "yes"), ("dog", "no"), ("bus", "yes"),
                                                ("cup", "no")][: 4 - 2 * (number == 2)], 1)
        ]  # fmt: skip
        path = tmp_path / f"coco_pope_{setting}.json"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_pope(pope, tmp_path):
    def say(question):
        setting = question.groups["setting"]
        if setting == "adversarial":
            return "Yes, there is one"
        return question.gold if setting == "random" else "No." if "cat" in question.prompt else "?"

    questions, records, scores, files = run("pope", pope, say, tmp_path)
    assert len(questions) == 10 and questions[0].prompt == "Is there a cat?" + SHORT
    assert questions[0].images == (f"{pope}/val2014/COCO_0.jpg",)
    # popular: cat no (fn), dog yes (fp), bus yes (tp), cup yes (fp)
    assert scores["random/f1"] == 100 and scores["popular/f1"] == pytest.approx(40)
    assert scores["adversarial/f1"] == pytest.approx(200 / 3)
    assert scores["f1"] == pytest.approx((100 + 40 + 200 / 3) / 3)
    assert scores["popular/accuracy"] == 25 and scores["popular/yes_ratio"] == 75
    assert sum(not r["parsed"] for r in records) == 3
    assert [f.name for f in files] == [f"coco_pope_{s}_answers.json" for s in
                                       ("random", "popular", "adversarial")]  # fmt: skip
    first = json.loads(files[1].read_text().splitlines()[0])
    assert first == {"question": "Is there a cat?", "answer": "No."}


def test_pope_one_setting_and_other_images(pope):
    questions, _, scores, _ = run("pope:setting=popular,images=/coco", pope, lambda q: q.gold)
    assert len(questions) == 4 and scores["f1"] == 100
    assert questions[0].images == ("/coco/COCO_0.jpg",)


def test_pope_names_the_line(pope):
    path = pope / "coco_pope_popular.json"
    path.write_text(path.read_text() + '{"question_id": 9}\n')
    with pytest.raises(FileError, match="popular.json, line 5: no image, text, label"):
        run("pope", pope, lambda q: "yes")


@pytest.fixture
def mme(tmp_path):
    inside = tmp_path / "OCR"
    apart = tmp_path / "posters"
    for folder in (inside, apart / "images", apart / "questions_answers_YN"):
        folder.mkdir(parents=True)
    for name in ("0001", "0002"):
        (inside / f"{name}.jpg").touch()
        (inside / f"{name}.txt").write_text(
            f"Is it {name}? Please answer yes or no.\tYes\nIs it x? Please answer yes or no.\tNo\n"
        )
    (apart / "images" / "tt1.png").touch()
    (apart / "questions_answers_YN" / "tt1.txt").write_text(
        "Is it A? Please answer yes or no.\tNo\nIs it B? Please answer yes or no.\tYes"
    )
    return tmp_path


def test_mme(mme, tmp_path):
    say = {
        "OCR/0001.jpg/0": "Yes", "OCR/0001.jpg/1": "no.", "OCR/0002.jpg/0": "yes it\tis\n",
        "OCR/0002.jpg/1": "maybe", "posters/tt1.png/0": "yes", "posters/tt1.png/1": "yes",
    }  # fmt: skip
    questions, records, scores, files = run("mme", mme, say, tmp_path)
    assert questions[0].prompt == "Is it A?" + SHORT  # posters come before OCR in the tool's order
    assert scores == {"perception": 175.0, "posters": 50.0, "OCR": 125.0}
    assert [r["parsed"] for r in records] == [True] * 5 + [False]
    text = (tmp_path / "OCR.txt").read_text().splitlines()
    assert text[2] == "0002.jpg\tIs it 0002? Please answer yes or no.\tYes\tyes it is"
    assert {f.name for f in files} == {"OCR.txt", "posters.txt"}
    assert questions[0].images == (str(mme / "posters" / "images" / "tt1.png"),)


@pytest.mark.parametrize(
    ("style", "ends"),
    [("official", " Please answer yes or no."), ("cambrian", " Please answer yes or no." + SHORT)],
)
def test_mme_prompts(mme, style, ends):
    questions, *_ = run(f"mme:style={style},category=OCR", mme, lambda q: q.gold)
    assert questions[0].prompt == "Is it 0001?" + ends and len(questions) == 4


def test_mme_leaves_out_half_an_image(mme):
    from metamorph_jax.eval import tasks

    _, records, _, _ = run("mme", mme, lambda q: q.gold)
    task = tasks.make("mme", root=str(mme))
    assert task.scores(records[:-1]) == {"perception": 400.0, "posters": 200.0, "OCR": 200.0}
    (mme / "OCR" / "0001.txt").write_text("Is it? Please answer yes or no.\tYes\n")
    with pytest.raises(FileError, match="0001.txt: expected two lines"):
        list(task.questions())

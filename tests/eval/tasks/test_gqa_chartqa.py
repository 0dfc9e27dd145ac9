"""GQA and ChartQA: official files of a few questions with known scores."""

import pytest

from metamorph_jax.errors import FileError
from metamorph_jax.eval import tasks
from metamorph_jax.eval.tasks.base import SHORT
from tests.eval.tasks.scripted import official, put, run


def row(question, answer, structural="query", group="color"):
    return {"question": question, "imageId": "n12", "answer": answer,
            "types": {"structural": structural, "semantic": "attr", "detailed": "x"},
            "groups": {"global": group, "local": "l"}}  # fmt: skip


def test_gqa(tmp_path):
    questions = {
        "201": row("Which colour?", "red"),
        "202": row("Which colour is the bus?", "blue"),
        "203": row("Is it blue?", "yes", "verify", None),
    }
    put(tmp_path / "gqa", {"testdev_balanced_questions.json": questions, "images/n12.jpg": b"x"})
    replies = {"201": "Red.", "202": "light, blue", "203": "Yes"}
    result, model = run("gqa", tmp_path, replies, tmp_path / "out", resamples=20)
    assert model.asked["201"].prompt == f"Which colour?\n{SHORT}"
    assert result.scores["accuracy"] == pytest.approx(200 / 3)
    assert result.scores["binary"] == 100 and result.scores["open"] == 50
    assert result.scores["distribution"] == pytest.approx(0.01)
    low, high = result.intervals["accuracy"]
    assert 0 <= low < high <= 100
    assert official(result)[0] == [
        {"questionId": "201", "prediction": "red"},
        {"questionId": "202", "prediction": "light, blue"},
        {"questionId": "203", "prediction": "yes"},
    ]
    replies |= {"202": "blue!"}
    result, _ = run("gqa:parser=lmms_eval", tmp_path, replies, tmp_path / "out")
    assert result.scores["accuracy"] == 100


def test_gqa_names_a_question_that_lacks_a_field(tmp_path):
    put(tmp_path / "gqa", {"testdev_balanced_questions.json": {"7": {"question": "?"}}})
    with pytest.raises(FileError, match="question 7: no imageId, types, groups, answer"):
        list(tasks.make("gqa", tmp_path).questions())


def test_chartqa(tmp_path):
    def rows(*pairs):
        return [{"imgname": "c.png", "query": q, "label": label} for q, label in pairs]

    put(tmp_path / "chartqa", {
        "test/test_human.json": rows(("How many?", "4"), ("Which year?", "2000")),
        "test/test_augmented.json": rows(("Which country?", "Chile")),
        "test/png/c.png": b"x",
    })  # fmt: skip
    replies = {"human/0": "5", "human/1": "1950", "augmented/0": "chile"}
    result, model = run("chartqa", tmp_path, replies, tmp_path / "out")
    assert model.asked["human/0"].prompt == (
        "How many?\nAnswer the question using a single number or phrase."
    )
    assert result.scores == {"accuracy": pytest.approx(200 / 3), "human": 50, "augmented": 100,
                             "mean of parts": 75}  # fmt: skip
    assert official(result)[0][2]["prediction"] == "chile"

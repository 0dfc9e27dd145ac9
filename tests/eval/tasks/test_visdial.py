"""VisDial: ranking measures, the prompt with its history, and official files in small."""

import json

import pytest

from metamorph_jax.errors import FileError
from metamorph_jax.eval import tasks
from metamorph_jax.eval.scorers import dialog
from metamorph_jax.eval.tasks.base import Answer
from tests.eval.tasks.asked import run
from tests.eval.tasks.scripted import put


def test_ranks_and_ndcg():
    assert dialog.ranks([-3.0, -1.0, -1.0, -2.0]) == [4, 1, 2, 3]
    assert dialog.ndcg([1, 2, 3], [1.0, 0.5, 0.0]) == 1
    # The two relevant ones are third and first: of the first two places one has something.
    assert dialog.ndcg([3, 2, 1], [1.0, 0.0, 0.5]) == pytest.approx(0.5 / (1 + 0.5 / 1.5849625))
    assert dialog.ndcg([1, 2], [0, 0]) == 0


def test_retrieval():
    assert dialog.retrieval([1, 4]) == {"R@1": 50, "R@5": 100, "R@10": 100, "MRR": 62.5,
                                        "mean rank": 2.5}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    def turn(question, answer):
        return {"question": question, "answer": answer, "answer_options": [0, 1, 2], "gt_index": 1}

    data = {"questions": ["is it sunny", "any people", "how many"], "answers": ["yes", "no", "2"],
            "dialogs": [{"image_id": 42, "caption": "a dog runs",
                         "dialog": [turn(0, 0), turn(1, 1), turn(2, 2)]}]}  # fmt: skip
    dense = [{"image_id": 42, "round_id": 3, "gt_relevance": [0.0, 1.0, 0.5]}]
    return put(tmp_path / "visdial", {
        "visdial_1.0_val.json": {"version": "1.0", "split": "val", "data": data},
        "visdial_1.0_val_dense_annotations.json": dense,
        "visdial_1.0_test.json": {"data": data},
        "VisualDialog_val2018/VisualDialog_val2018_000000000042.jpg": b"x",
    })  # fmt: skip


ANSWER = Answer("no", 1, (-2.0, -1.0, -3.0))


def test_visdial(root, tmp_path):
    questions, records, scores, (written,) = run("visdial", root, lambda q: ANSWER, tmp_path)
    (question,) = questions
    assert question.prompt == (
        "<image> caption: a dog runs. question: is it sunny? answer: yes. question: any people? "
        "answer: no. question: how many? answer:"
    )
    assert question.choices == ("yes", "no", "2")
    assert question.images[0].endswith("VisualDialog_val2018_000000000042.jpg")
    assert scores["NDCG"] == pytest.approx(100 / (1 + 0.5 / 1.5849625))
    assert scores["R@1"] == 100 and scores["mean rank"] == 1
    assert json.loads(written.read_text()) == [{"image_id": 42, "round_id": 3, "ranks": [2, 1, 3]}]


def test_all_rounds_and_the_legacy_history(root, tmp_path):
    spec = "visdial:rounds=all,legacy_history=true"
    questions, _, scores, _ = run(spec, root, lambda q: ANSWER)
    assert [q.prompt.count("question:") for q in questions] == [1, 1, 2]
    assert "any people?" not in questions[2].prompt
    assert scores["MRR"] == 100


def test_the_test_set_asks_the_last_round(root):
    questions, _, _, _ = run("visdial:split=test", root, lambda q: ANSWER)
    assert [q.id for q in questions] == ["42/3"]


def test_a_dialog_without_dense_annotations(root):
    put(root, {"visdial_1.0_val_dense_annotations.json": []})
    with pytest.raises(FileError, match="dense_annotations.json has no round of image 42"):
        list(tasks.make("visdial", root=str(root)).questions())

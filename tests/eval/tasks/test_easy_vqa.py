"""easy_vqa, from the quick start's files and from those of the package."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[3]))

from tests.eval.tasks.asked import run  # noqa: E402

ASKED = [("what color is the circle?", "red", 3), ("is it not a circle?", "no", 3),
         ("what shape is it?", "circle", 4)]  # fmt: skip


@pytest.mark.parametrize("layout", ["quickstart", "package"])
def test_easy_vqa(layout, tmp_path):
    if layout == "quickstart":
        rows = [{"id": f"test/{k}", "image": f"test/{i}.png", "question": q, "answer": a,
                 "type": ""} for k, (q, a, i) in enumerate(ASKED)]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "questions_test.jsonl").write_text(text)
        first = tmp_path / "images" / "test" / "3.png"
    else:
        (tmp_path / "test").mkdir()
        (tmp_path / "test" / "questions.json").write_text(json.dumps(ASKED))
        first = tmp_path / "test" / "images" / "3.png"
    replies = iter(["Red.", "yes", "circle"])
    questions, _, scores, files = run("easy_vqa", tmp_path, lambda q: next(replies), tmp_path)
    assert questions[0].prompt == "<image>\nwhat color is the circle?"
    assert pathlib.Path(questions[0].images[0]) == first
    assert scores == {
        "accuracy": pytest.approx(200 / 3), "color": 100.0, "is it not this shape?": 0.0,
        "shape": 100.0,
    }  # fmt: skip
    assert list(json.loads(files[0].read_text()).values()) == ["Red.", "yes", "circle"]

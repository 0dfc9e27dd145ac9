"""GenEval's files, questions and means; an exact judge on images whose contents we made."""

import json
import pathlib

import numpy as np
import pytest
from scipy import ndimage

from metamorph_jax import cli
from metamorph_jax.errors import DataError, FileError
from metamorph_jax.eval.images import contents, geneval, judging
from metamorph_jax.eval.images.contents import COLORS, SHAPES, ExactJudge, Thing
from metamorph_jax.eval.images.geneval import Check, checks_of

ROWS = [
    {"tag": "single_object", "include": [{"class": "circle", "count": 1}],
     "prompt": "a photo of a circle"},
    {"tag": "two_object", "include": [{"class": "circle", "count": 1},
                                      {"class": "square", "count": 1}],
     "prompt": "a photo of a circle and a square"},
    {"tag": "counting", "include": [{"class": "square", "count": 3}],
     "exclude": [{"class": "square", "count": 4}], "prompt": "a photo of three squares"},
    {"tag": "colors", "include": [{"class": "cross", "count": 1, "color": "red"}],
     "prompt": "a photo of a red cross"},
    {"tag": "position", "include": [{"class": "square", "count": 1},
                                    {"class": "circle", "count": 1, "position": ["left of", 0]}],
     "prompt": "a photo of a circle left of a square"},
    {"tag": "color_attr", "include": [{"class": "circle", "count": 1, "color": "red"},
                                      {"class": "square", "count": 1, "color": "blue"}],
     "prompt": "a photo of a red circle and a blue square"},
]  # fmt: skip

CIRCLE, SQUARE = Thing("circle", "red", 50, 60, 40), Thing("square", "blue", 150, 70, 50)
SQUARES = [Thing("square", "green", 30 + 55 * i, 100, 40) for i in range(4)]
# Row -> images with the sentence about what is wrong in them, "" for what is right.
IMAGES = {
    0: [([CIRCLE], ""), ([SQUARE], "no: Does the image show a circle?"), ([CIRCLE] * 2, "")],
    1: [([CIRCLE, SQUARE], ""), ([SQUARE], "no: Does the image show a circle?")],
    2: [(SQUARES[:3], ""), (SQUARES[:2], "no: Does the image show exactly three squares?"),
        (SQUARES, "no: Does the image show exactly three squares?")],
    3: [([Thing("cross", "red", 90, 90, 60)], ""),
        ([Thing("cross", "blue", 90, 90, 60), CIRCLE], "no: Is the cross red?")],
    4: [([CIRCLE, SQUARE], ""),
        ([Thing("circle", "red", 200, 60, 40), SQUARE], "no: Is the circle left of the square?"),
        ([Thing("circle", "red", 150, 180, 40), SQUARE], "no: Is the circle left of the square?")],
    5: [([CIRCLE, SQUARE], ""), ([CIRCLE, Thing("square", "red", 150, 70, 50)],
                                 "no: Is the square blue?")],
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(folder in GenEval's layout, metadata file, contents of each image)."""
    folder, known = tmp_path_factory.mktemp("geneval"), {}
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for index, images in IMAGES.items():
        geneval.write_metadata(folder, index, ROWS[index])
        for k, (things, _) in enumerate(images):
            path = folder / geneval.place(index, k)
            contents.draw(things).save(path)
            known[str(path)] = things
    return folder, folder / "metadata.jsonl", known


@pytest.fixture
def exact(drawn):
    return ExactJudge(drawn[2], [check for row in ROWS for check in checks_of(row)])


# ---- images whose contents are known


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_drawn_is_what_is_known(name):
    """Each thing is one blob of its colour, around its centre, of its size."""
    rng = np.random.default_rng(0)
    kinds = [(name, color) for color in list(COLORS)]
    things = contents.scatter(kinds, rng)
    pixels = np.asarray(contents.draw(things))
    blobs, count = ndimage.label((pixels != contents.BACKGROUND).any(-1))
    assert count == len(things) == 9
    for thing in things:
        own = (pixels == COLORS[thing.color]).all(-1)
        assert len(np.unique(blobs[own])) == 1
        rows, columns = np.nonzero(own)
        for places, centre in ((rows, thing.y), (columns, thing.x)):
            assert (places.max() + places.min()) / 2 == pytest.approx(centre, abs=1.5)
            assert np.ptp(places) == pytest.approx(thing.size, abs=3)


@pytest.mark.parametrize("x, y, expected", [
    (100, 0, {"left of"}), (-100, 0, {"right of"}), (0, 100, {"above"}), (0, -100, {"below"}),
    (100, 100, {"left of", "above"}), (100, 30, {"left of"}), (5, 5, set()), (0, 0, set()),
])  # fmt: skip
def test_places_follow_the_rule_of_geneval(x, y, expected):
    """The other one stands at (x, y) of this one; both are 40 px, so 8 px of an offset count as
    none."""
    one, other = Thing("circle", "red", 0, 0, 40), Thing("square", "red", x, y, 40)
    assert contents.relations(one, other) == expected


# ---- questions


def test_questions_about_each_kind_of_prompt():
    asked = [[check.question for check in checks_of(row)] for row in ROWS]
    assert asked == [
        ["Does the image show a circle?"],
        ["Does the image show a circle?", "Does the image show a square?"],
        ["Does the image show exactly three squares?"],
        ["Does the image show a cross?", "Is the cross red?"],
        ["Does the image show a square?", "Does the image show a circle?",
         "Is the circle left of the square?"],
        ["Does the image show a circle?", "Is the circle red?", "Does the image show a square?",
         "Is the square blue?"],
    ]  # fmt: skip
    assert Check("count", "wine glass", 2).question.endswith("at least two wine glasses?")
    assert Check("count", "person", 1, 2).question.endswith("1 to two people?")
    assert Check("object", "apple").question.endswith("show an apple?")
    assert Check("object", "scissors").question.endswith("show any scissors?")


def test_rows_that_are_no_prompts(tmp_path):
    good = json.dumps(ROWS[0])
    for bad, message in (
        ({"tag": "x", "include": [{}], "prompt": "p"}, "row 2: not a prompt of GenEval .*class"),
        ({"tag": "x", "include": [{"class": "a", "position": ["left of", 3]}], "prompt": "p"},
         "row 2: not a prompt"),
        ({"tag": "x", "include": [{"class": "a", "position": ["near", 0]}], "prompt": "p"},
         "an unknown relation"),
        ({"tag": "x", "prompt": "p"}, "line 2: no include"),
    ):  # fmt: skip
        (tmp_path / "m.jsonl").write_text(good + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(FileError, match=message):
            geneval.read_prompts(str(tmp_path / "m.jsonl"))


# ---- verdicts and means


def test_an_exact_judge_finds_what_is_wrong(drawn, exact):
    folder, metadata, _ = drawn
    rows = geneval.read_prompts(str(metadata))
    found = geneval.find_images(folder, rows)
    assert len(found) == sum(map(len, IMAGES.values()))
    paths, own = [path for _, path in found], [rows[index] for index, _ in found]
    verdicts = geneval.judged(paths, own, exact)
    reasons = [reason for images in IMAGES.values() for _, reason in images]
    results = [geneval.result(p, row, right, checks)
               for p, row, (right, checks) in zip(paths, own, verdicts, strict=True)]  # fmt: skip
    assert [one["reason"] for one in results] == reasons
    assert [one["correct"] for one in results] == [not reason for reason in reasons]
    # Means of tasks: 2/3, 1/2, 1/3, 1/2, 1/3, 1/2; 7 of 15 images; each prompt has a right one.
    scores = geneval.summary(results)
    assert scores["overall"] == pytest.approx(17 / 36)
    assert scores["counting"] == pytest.approx(1 / 3) and scores["images"] == pytest.approx(7 / 15)
    assert scores["prompts"] == 1


def test_the_official_result_file_is_read():
    """`metadata` is text there; two samples of one prompt, one of another."""
    rows = [{"tag": "colors", "metadata": "m1", "correct": True},
            {"tag": "colors", "metadata": "m1", "correct": False},
            {"tag": "counting", "metadata": "m2", "correct": False}]  # fmt: skip
    assert geneval.summary(rows) == {
        "overall": 0.25, "colors": 0.5, "counting": 0.0, "images": 1 / 3, "prompts": 0.5,
    }  # fmt: skip
    assert geneval.summary([]) == {}


def test_a_question_without_an_answer_is_no_verdict():
    half = lambda images, questions: np.array([1.0, np.nan, 0.9])  # noqa: E731
    found = geneval.judged(["a", "b"], [ROWS[1], ROWS[0]], half)
    assert found[0][0] is None and found[1][0] is True


def test_folders_of_other_prompts_are_refused(drawn):
    folder, _, _ = drawn
    with pytest.raises(DataError, match="00000 is of the prompt 'a photo of a circle', row 0 of"):
        geneval.find_images(folder, ROWS[1:])
    with pytest.raises(DataError, match="expected 00000/samples/0000.png"):
        geneval.find_images(folder / "nowhere", ROWS)


def test_images_that_somebody_drew(drawn, exact, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(judging, "open_judge", lambda spec, config: exact)
    folder, metadata, _ = drawn
    words = ["score", folder, "--geneval", metadata, "--judge", "exact", "--json", tmp_path / "s"]
    assert cli.main(list(map(str, words))) == 0
    found = json.loads((tmp_path / "s").read_text())
    assert found["scores"]["overall"] == pytest.approx(17 / 36) and len(found["results"]) == 15
    assert found["settings"]["judge"] == "exact" and found["left_out"] == 0
    assert "overall" in capsys.readouterr().out
    assert pathlib.Path(found["results"][0]["filename"]).is_file()


def test_a_model_of_ours_is_the_judge(workdir, drawn, tmp_path, capsys):
    """A tiny random one: what it says is nonsense, but a likelihood for each image."""
    (tmp_path / "one.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    words = ["score", drawn[0], "--geneval", tmp_path / "one.jsonl", "--json", tmp_path / "s"]
    assert cli.main([*map(str, words), "--judge", str(workdir)]) == 0
    found = json.loads((tmp_path / "s").read_text())["results"]
    values = [json.loads(line["details"])["Does the image show a circle?"] for line in found]
    assert all(0 < value < 1 for value in values) and len(set(values)) == 2  # two are the same
    assert [line["correct"] for line in found] == [value > 0.5 for value in values]
    assert cli.main([*map(str, words), "--judge", str(tmp_path / "gone")]) == 2
    assert "gone" in capsys.readouterr().err

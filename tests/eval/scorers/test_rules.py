"""Rules of the scorers that the golden set doesn't have."""

import pytest

from metamorph_jax.eval.scorers import charts, choices, gqa, judged, vqa, yes_no


@pytest.mark.parametrize("matches, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_soft_accuracy_of_ten_answers(matches, score):
    given = ["red"] * matches + [str(i) for i in range(10 - matches)]
    assert vqa.soft_accuracy("red", given) == pytest.approx(score)


def test_soft_accuracy_of_other_numbers_of_answers():
    assert vqa.soft_accuracy("a", []) == 0
    assert vqa.soft_accuracy("a", ["a"]) == 0  # nobody else agrees
    assert vqa.soft_accuracy("a", ["a"] * 4) == 1


def test_agreeing_annotators_are_compared_as_written():
    assert vqa.vqav2_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa.vqav2_accuracy("yes\n", ["yes"] * 10) == 1
    assert vqa.vqav2_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1


def test_an_unknown_prompt_form_is_an_error():
    with pytest.raises(ValueError, match="no known form of a TextVQA prompt"):
        vqa.textvqa_question("What?")


@pytest.mark.parametrize(
    "answer, reference, right",
    [
        ("21", "20", True),
        ("4.21", "4", False),
        ("1950", "2000", True),
        ("50%", "50", False),
        ("50%", "0.5", True),
        ("1,200", "1200", False),
        ("0.0", "0", False),
        ("0", "0", True),
        ("Blue", "blue", True),
        ("blue", "4", False),
        ("nan", "4", False),
    ],
)
def test_relaxed_match(answer, reference, right):
    assert charts.relaxed_match(answer, reference) is right


def question(answer, structural="query", group="color", semantic="attr"):
    return {"answer": answer, "types": {"structural": structural, "semantic": semantic},
            "groups": {"global": group}}  # fmt: skip


def test_gqa():
    questions = {"1": question("red"), "2": question("red"), "3": question("blue"),
                 "4": question("yes", "verify", None, "obj")}  # fmt: skip
    scores = gqa.gqa_scores(questions, {"1": "red", "2": "blue", "3": "blue", "4": "yes"})
    assert scores["accuracy"] == 75 and scores["binary"] == 100 and scores["semantic/obj"] == 100
    assert scores["open"] == scores["structural/query"] == pytest.approx(200 / 3)
    # Expected 2 red and 1 blue, seen 1 and 2: ½ + 1.
    assert scores["distribution"] == pytest.approx(0.015)
    assert gqa.gqa_scores(questions, {"4": "Yes"})["binary"] == 0


def test_pope_without_a_yes_has_rates_of_zero():
    scores = yes_no.pope_scores(["no", "no"], ["yes", "no"])
    assert (scores.precision, scores.recall, scores.f1, scores.accuracy) == (0, 0, 0, 0.5)


def test_mme_refuses_images_whose_questions_don_t_stand_together():
    rows = [("a", "Yes", "yes"), ("b", "Yes", "yes"), ("a", "No", "no"), ("b", "No", "no")]
    with pytest.raises(ValueError, match="image a needs two questions"):
        yes_no.mme_score(rows)


@pytest.mark.parametrize(
    "reply, letter",
    [
        ("The answer is b.", "B"),
        ("The answer is a dog that sits on the sofa", None),
        ("I would say that the answer is **B** since nothing else in the picture fits it", "B"),
        ("the answer is E", None),
    ],
)
def test_mmbench_phrase(reply, letter):
    assert choices.mmbench_letter(reply, {"A": "dog", "B": "cat"}) == letter


def test_failed_reviews_are_left_out_and_counted():
    reviews = [("conv", (8.0, 6.0)), ("conv", judged.UNPARSED), ("detail", judged.UNPARSED)]
    rows = judged.relative_scores(reviews)
    assert list(rows) == ["all", "conv", "detail"]
    assert (rows["all"].percent, rows["all"].count, rows["all"].failed) == (75, 3, 2)
    assert rows["detail"].percent == 0 and rows["detail"].failed == 1


@pytest.mark.parametrize(
    "verdict, grade",
    [("0.5", 0.5), (" 1.0\n", 1), ("1", 1), ("0", 0), ("Score: 0.3", 0.3), ("10", None),
     ("1.5", None), ("good", None), ("0.7.", 0.7)],
)  # fmt: skip
def test_mmvet_grade(verdict, grade):
    assert judged.mmvet_grade(verdict) == grade


def test_mmvet_scores_by_capability_and_set():
    graded = [(["ocr", "math"], 1.0), (["rec"], 0.5), (["ocr"], 0.0)]
    assert judged.mmvet_scores(graded) == {
        "math": 100, "math+ocr": 100, "ocr": 50, "rec": 50, "total": 50,
    }  # fmt: skip

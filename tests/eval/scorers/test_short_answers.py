"""Accuracy per type and the floors beside it."""

import pytest

from metamorph_jax.eval.scorers import short_answers

ROWS = [
    {"type": "color", "answer": "red", "predicted": "Red."},
    {"type": "color", "answer": "blue", "predicted": "red"},
    {"type": "color", "answer": "red", "predicted": " red\n"},
    {"type": "yes or no", "answer": "yes", "predicted": "yes"},
    {"type": "yes or no", "answer": "no", "predicted": "yes"},
]


@pytest.mark.parametrize(
    "predicted, right",
    [("red", True), ("Red.", True), ("  RED \n", True), ("dark red", False), ("", False)],
)
def test_is_right(predicted, right):
    assert short_answers.is_right(predicted, "red") is right


def test_scores_and_floors():
    color, yesno, everything = short_answers.score_by_type(ROWS)
    assert (color.type, color.count) == ("color", 3)
    assert color.accuracy == pytest.approx(2 / 3) and color.floor == pytest.approx(2 / 3)
    assert color.floor_answer == "red" and color.yes_floor == 0
    assert (yesno.accuracy, yesno.yes_floor, yesno.floor) == (0.5, 0.5, 0.5)
    assert yesno.floor_answer == "no"  # a tie goes by name, so the table doesn't depend on order
    assert (everything.type, everything.count, everything.yes_floor) == ("all", 5, 0.2)
    assert short_answers.blind_accuracy([color, yesno, everything]) == pytest.approx(3 / 5)


def test_order_of_types_and_empty_input():
    names = [s.type for s in short_answers.score_by_type(ROWS, ["yes or no", "absent", "color"])]
    assert names == ["yes or no", "color", "all"]
    assert short_answers.score_by_type([]) == []
    assert short_answers.blind_accuracy([]) == 0


@pytest.mark.parametrize("right, count", [(0, 5), (5, 5), (1, 2), (967, 1000)])
def test_interval_is_wilsons(right, count):
    score = short_answers.TypeScore("all", count, right / count, 0.0, "", 0.0)
    z, p = 1.959964, right / count
    middle = (p + z * z / 2 / count) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (p * (1 - p) / count + z * z / 4 / count**2) ** 0.5
    assert score.interval == pytest.approx((middle - half, middle + half), abs=1e-6)

"""What a judge's verdicts are made into: LLaVA-Bench's two scores and MM-Vet's one."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping

UNPARSED = (-1.0, -1.0)
_MOST = 1000.0  # what is larger is no score


def review_scores(review: str) -> tuple[float, float]:
    """(reference's, candidate's) score from the first line of a review, else `UNPARSED`.

    The line holds exactly two numbers with one space or one comma between them."""
    parts = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = (float(part) for part in parts)
    except ValueError:
        return UNPARSED
    return (first, second) if max(abs(first), abs(second)) <= _MOST else UNPARSED  # nor NaN


@dataclasses.dataclass(frozen=True)
class Relative:
    """One row: per cent of the reference's score, and both means × 10."""

    percent: float
    reference: float
    candidate: float
    count: int
    failed: int  # reviews that could not be parsed


def relative_scores(reviews: Iterable[tuple[str, tuple[float, float]]],
                    count_failed: bool = False) -> dict[str, Relative]:  # fmt: skip
    """Category → its row, sorted, "all" first.

    Args:
        reviews: (category, scores).
        count_failed: let (−1, −1) of a review that can't be parsed enter the means, as the
            original does, instead of leaving it out.
    """
    groups = collections.defaultdict(list)
    for category, scores in reviews:
        groups["all"].append(scores)
        groups[category].append(scores)
    names = ["all"] * ("all" in groups) + sorted(groups.keys() - {"all"})
    return {name: _relative(groups[name], count_failed) for name in names}


def _relative(scores: list[tuple[float, float]], count_failed: bool) -> Relative:
    failed = sum(tuple(pair) == UNPARSED for pair in scores)
    used = [pair for pair in scores if count_failed or tuple(pair) != UNPARSED]
    if not used:
        return Relative(0.0, 0.0, 0.0, len(scores), failed)
    reference, candidate = (round(sum(column) / len(used), 3) for column in zip(*used, strict=True))
    percent = 100 * candidate / reference if reference else 0.0
    return Relative(percent, 10 * reference, 10 * candidate, len(scores), failed)


# ---- MM-Vet

_LONGEST = 4000  # characters of a verdict that are looked at: the pattern takes their square
_GRADE = re.compile(r"(?<![\d.])(?:0(?:\.\d+)?|1(?:\.0+)?)(?![\d.]*\d)")


def mmvet_grade(verdict: str) -> float | None:
    """The grade in [0, 1] that a judge's reply begins with or holds, None if there is none."""
    found = _GRADE.search(verdict[:_LONGEST])
    return float(found.group()) if found else None


def mmvet_answers(replies: Mapping[str, str]) -> dict[str, str]:
    """The grader's file from replies by the bare question id ("0" → key "v1_0")."""
    return {f"v1_{key}": reply for key, reply in replies.items()}


def mmvet_scores(graded: Iterable[tuple[Iterable[str], float]]) -> dict[str, float]:
    """Mean grade × 100: "total", each capability, and each set of them ("ocr+math")."""
    groups = collections.defaultdict(list)
    for capabilities, grade in graded:
        capabilities = list(capabilities)
        names = {"total", *capabilities, "+".join(sorted(capabilities))}
        for name in names:
            groups[name].append(grade)
    return {name: 100 * sum(grades) / len(grades) for name, grades in sorted(groups.items())}

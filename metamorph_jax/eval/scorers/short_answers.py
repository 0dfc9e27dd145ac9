"""Accuracy of short answers per question type, next to what guessing would reach.

A type's own floor is the share of its most frequent answer; the always-"yes" floor is the share of
"yes". An accuracy near either of them means that the model did not look at the image.
"""

import collections
import dataclasses

_PUNCTUATION = " \t\r\n.,;:!?\"'`*()[]"


@dataclasses.dataclass(frozen=True)
class TypeScore:
    """One row of the table."""

    type: str
    count: int
    accuracy: float
    floor: float  # always the most frequent answer of this type
    floor_answer: str
    yes_floor: float  # always "yes"

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy (Wilson's score interval)."""
        from scipy.stats import binomtest

        test = binomtest(round(self.accuracy * self.count), self.count)
        low, high = test.proportion_ci(method="wilson")
        return float(low), float(high)


def normalise(answer: str) -> str:
    """An answer as compared: lower case, one space, no punctuation around it."""
    return " ".join(answer.lower().split()).strip(_PUNCTUATION)


def is_right(predicted: str, answer: str) -> bool:
    """Exact match after `normalise`."""
    return normalise(predicted) == normalise(answer)


def score_by_type(rows: list[dict], types=None) -> list[TypeScore]:
    """One TypeScore per question type, then one named "all".

    rows: dicts with `type`, `answer` and `predicted`; types: their order, if it matters."""
    groups: dict[str, list[dict]] = {name: [] for name in types or ()}
    for row in rows:
        groups.setdefault(row["type"], []).append(row)
    scores = [_score(name, group) for name, group in groups.items() if group]
    return scores + [_score("all", rows)] if rows else []


def blind_accuracy(scores: list[TypeScore]) -> float:
    """Accuracy of always giving each type's most frequent answer, over all types together."""
    typed = [s for s in scores if s.type != "all"]
    return sum(s.floor * s.count for s in typed) / max(sum(s.count for s in typed), 1)


def _score(name: str, rows: list[dict]) -> TypeScore:
    answers = collections.Counter(normalise(row["answer"]) for row in rows)
    common, times = min(answers.items(), key=lambda item: (-item[1], item[0]))
    right = sum(is_right(row["predicted"], row["answer"]) for row in rows)
    n = len(rows)
    return TypeScore(name, n, right / n, times / n, common, answers["yes"] / n)

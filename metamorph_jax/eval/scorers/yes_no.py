"""Yes or no: POPE and MME."""

import dataclasses
from collections.abc import Mapping, Sequence

# The tool's order.
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


# ---- POPE


def pope_answer(reply: str) -> str:
    """Answer "no" if a word before the first full stop is exactly "No", "no" or "not", else "yes".

    So "NO", "Nope" and an empty reply all count as yes."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & {*words} else "yes"


@dataclasses.dataclass(frozen=True)
class PopeScores:
    """Counts and rates in [0, 1]; "yes" is the positive class. A rate of nothing is 0."""

    tp: int
    fp: int
    tn: int
    fn: int

    @property
    def count(self) -> int:
        return self.tp + self.fp + self.tn + self.fn

    @property
    def accuracy(self) -> float:
        return _share(self.tp + self.tn, self.count)

    @property
    def precision(self) -> float:
        return _share(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        return _share(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        return _share(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def yes_ratio(self) -> float:
        return _share(self.tp + self.fp, self.count)


def pope_scores(predicted: Sequence[str], labels: Sequence[str]) -> PopeScores:
    """Scores of one setting. Both hold "yes" and "no", question by question."""
    pairs = list(zip(predicted, labels, strict=True))
    counts = [pairs.count(pair) for pair in
              (("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes"))]  # fmt: skip
    return PopeScores(*counts)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


# ---- MME


def mme_answer(reply: str) -> str:
    """Answer "yes", "no" or "other": the whole reply, or what is in its first four characters."""
    head = reply.lower()[:4]
    return next((word for word in ("yes", "no") if word in head), "other")


def mme_score(rows: Sequence[tuple[str, str, str]]) -> float:
    """Score of one category, at most 200: 100 × (accuracy + share of images with both right).

    Args:
        rows: (image, truth, reply); the two questions of an image stand together.

    Raises:
        ValueError: an image doesn't have exactly two questions that stand together.
    """
    if not rows:
        return 0.0
    right = [mme_answer(reply) == truth.lower() for _, truth, reply in rows]
    pairs = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    for pair in pairs:
        if len(pair) != 2 or pair[0][0] != pair[1][0]:
            raise ValueError(f"image {pair[0][0]} needs two questions, one after the other")
    both = sum(all(right[i : i + 2]) for i in range(0, len(rows), 2))
    return 100 * (sum(right) / len(rows) + both / len(pairs))


def mme_totals(by_category: Mapping[str, float]) -> dict[str, float]:
    """Perception (at most 2000) and cognition (at most 800); a missing category adds nothing."""
    return {
        name: sum(by_category.get(category, 0.0) for category in categories)
        for name, categories in (("Perception", PERCEPTION), ("Cognition", COGNITION))
    }

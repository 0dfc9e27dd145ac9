"""GQA: exact match with its sub-scores and the distribution distance of the official tool."""

import collections
from collections.abc import Iterable, Mapping


def gqa_prediction(reply: str) -> str:
    """A reply as it is compared and written: lower case, without the full stops at its end."""
    return reply.rstrip(".").lower()


def gqa_submission(replies: Iterable[tuple[str, str]]) -> list[dict]:
    """Rows of the official file from (question id, reply)."""
    return [{"questionId": key, "prediction": gqa_prediction(reply)} for key, reply in replies]


def gqa_scores(
    questions: Mapping[str, Mapping], predictions: Mapping[str, str]
) -> dict[str, float]:
    """Per cent right: "accuracy", "binary", "open", "structural/…", "semantic/…", and the
    "distribution" distance (lower is better). A question without a prediction is wrong.

    Args:
        questions: id → official record (`answer`, `types`, `groups`).
        predictions: id → text as `gqa_prediction` gives it.
    """
    groups = collections.defaultdict(list)
    for key, row in questions.items():
        right = predictions.get(key) == row["answer"]
        for name in ("accuracy", *parts(row["types"])):
            groups[name].append(right)
    scores = {name: 100 * sum(group) / len(group) for name, group in groups.items()}
    return scores | {"distribution": gqa_distribution(questions, predictions)}


def parts(types: Mapping[str, str]) -> list[str]:
    """The parts of the accuracy that a question of these types belongs to."""
    kinds = [f"{kind}/{types[kind]}" for kind in ("structural", "semantic")]
    return ["open" if types["structural"] == "query" else "binary", *kinds]


def gqa_distribution(questions: Mapping[str, Mapping], predictions: Mapping[str, str]) -> float:
    """Chi-square distance of answers from gold, per global group, weighted by the groups' sizes.

    Only answers that are gold somewhere in the group take part, as in the official tool; / 100."""
    gold = collections.defaultdict(collections.Counter)
    given = collections.defaultdict(collections.Counter)
    for key, row in questions.items():
        group = row["groups"]["global"]
        if group is not None:
            gold[group][row["answer"]] += 1
            given[group][predictions.get(key)] += 1
    total = sum(counts.total() for counts in gold.values())
    if not total:
        return 0.0
    distance = 0.0
    for group, counts in gold.items():
        chi = sum((given[group][a] - n) ** 2 / n for a, n in counts.items())
        distance += chi * counts.total()
    return distance / total / 100

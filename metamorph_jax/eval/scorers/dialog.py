"""VisDial: how well 100 possible answers are ranked."""

import math
from collections.abc import Sequence


def ranks(values: Sequence[float]) -> list[int]:
    """Rank of each value, 1 for the largest; of equal ones the earlier is better."""
    order = sorted(range(len(values)), key=lambda k: -values[k])
    found = [0] * len(values)
    for rank, k in enumerate(order, 1):
        found[k] = rank
    return found


def ndcg(ranked: Sequence[int], relevance: Sequence[float]) -> float:
    """Normalised discounted cumulative gain in [0, 1], of as many answers as are relevant at all.

    Args:
        ranked: rank of each answer.
        relevance: of each answer, at least 0; 0 everywhere gives 0.
    """
    k = sum(value > 0 for value in relevance)
    by_rank = sorted(zip(ranked, relevance, strict=True))
    got = _gain([value for _, value in by_rank[:k]])
    best = _gain(sorted(relevance, reverse=True)[:k])
    return got / best if best else 0.0


def _gain(values: Sequence[float]) -> float:
    return sum(value / math.log2(place + 1) for place, value in enumerate(values, 1))


def retrieval(right: Sequence[int]) -> dict[str, float]:
    """R@1, R@5, R@10 and MRR × 100, and the mean rank, from the ranks of the right answers."""
    found = {f"R@{k}": 100 * sum(rank <= k for rank in right) / len(right) for k in (1, 5, 10)}
    found["MRR"] = 100 * sum(1 / rank for rank in right) / len(right)
    return found | {"mean rank": sum(right) / len(right)}

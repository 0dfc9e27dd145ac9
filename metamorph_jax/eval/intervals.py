"""Confidence intervals of scores, by the bootstrap (Efron 1979): units are drawn with replacement.

A unit is what is scored together: a question, the two questions about an image, all rotations of
one. So intervals are right for any metric of a task: an F1, a pair accuracy, a mean over groups.
"""

from collections.abc import Sequence

import numpy as np

from metamorph_jax.eval.tasks.base import Record, Task, by_unit

LEVEL = 95  # percent
_WORK = 20_000_000  # records that are scored in all resamples of a task, as far as FEWEST allows
FEWEST = 200


def bootstrap(
    task: Task, records: Sequence[Record], seed: int = 0, resamples: int | None = None
) -> dict[str, tuple[float, float]]:
    """Metric -> (low, high), the 95 % percentile interval; {} where there is nothing to draw.

    Args:
        task: `scores` of it is what varies.
        records: those that are scored.
        seed: the same one gives the same intervals.
        resamples: how many; None: `task.resamples`, or fewer where there are many records.
    """
    units = list(by_unit(records).values())
    if resamples is None:
        resamples = min(task.resamples, max(FEWEST, _WORK // max(len(records), 1)))
    if len(units) < 2 or not resamples:
        return {}
    rng, values = np.random.default_rng(seed), {}
    for number in range(resamples):
        drawn = rng.integers(0, len(units), len(units))
        sample = [
            {**record, "unit": str(k)} for k, unit in enumerate(drawn) for record in units[unit]
        ]
        for metric, value in task.scores(sample).items():
            values.setdefault(metric, np.full(resamples, np.nan))[number] = value
    tail = (100 - LEVEL) / 2
    found = {}
    for metric, drawn in values.items():
        if np.isfinite(drawn).any():
            low, high = np.nanpercentile(drawn, (tail, 100 - tail))
            found[metric] = float(low), float(high)
    return found

"""Confidence intervals of scores, by the bootstrap (Efron 1979): units are drawn with replacement.

A unit is what is scored together: a question, the two questions about an image, all rotations of
one. So intervals are right for any metric of a task: an F1, a pair accuracy, a mean over groups.

    weighted    a metric that is a ratio of sums over records (`Task.terms`): a resample is how
                often each unit was drawn, and its score two products of that with the units' sums
    rescored    any other metric: every resample is scored anew, which takes longer; there are
                fewer of them where there are many records

Both draw the same units, so they give the same interval for the same number of resamples.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import sparse

from metamorph_jax.eval.tasks.base import Record, Task, by_unit

LEVEL = 95  # percent
_WORK = 20_000_000  # records that are scored in all resamples of a task, as far as FEWEST allows
FEWEST = 100
_CHUNK = 2**23  # numbers of units drawn, that are held at a time


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Confidence intervals of the metrics of a task.

    Attributes:
        ranges: metric -> (low, high), the 95 % percentile interval; those that no resample has, are
            left out.
        resamples: metric -> how many there were.
        rescored: metrics whose resamples were scored anew; the others are weighted.
    """

    ranges: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    resamples: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rescored: frozenset[str] = frozenset()

    def methods(self) -> dict[str, list[str]]:
        """Method and number of resamples -> metrics, for files and pages."""
        found: dict[str, list[str]] = {}
        for metric in self.ranges:
            method = "rescored" if metric in self.rescored else "weighted"
            found.setdefault(f"{method}, {self.resamples[metric]:,} resamples", []).append(metric)
        return found


def bootstrap(
    task: Task, records: Sequence[Record], seed: int = 0, resamples: int | None = None
) -> Intervals:
    """Intervals of all metrics; none where there is nothing to draw.

    Args:
        task: `scores` of it is what varies.
        records: those that are scored.
        seed: the same one gives the same intervals.
        resamples: how many; None: `task.resamples`, or fewer where many records are to be rescored.
    """
    units = list(by_unit(records).values())
    count = task.resamples if resamples is None else resamples
    if len(units) < 2 or not count:
        return Intervals()
    stated = task.scores(records)
    values = _weighted(task, units, stated, count, seed)
    rest = stated.keys() - values.keys()
    if rest:
        if resamples is None:
            count = min(count, max(FEWEST, _WORK // len(records)))
        anew = _rescored(task, units, count, seed)
        rest |= anew.keys() - values.keys()
        values |= {metric: anew[metric] for metric in anew if metric in rest}
    tail, ranges = (100 - LEVEL) / 2, {}
    for metric in [*stated, *(values.keys() - stated.keys())]:
        drawn = values.get(metric, np.zeros(0))
        if np.isfinite(drawn).any():
            low, high = np.nanpercentile(drawn, (tail, 100 - tail))
            ranges[metric] = float(low), float(high)
    numbers = {metric: len(values[metric]) for metric in ranges}
    return Intervals(ranges, numbers, frozenset(rest))


def _weighted(
    task: Task, units: Sequence[Sequence[Record]], stated: Mapping[str, float], count: int,
    seed: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Metric -> float64[count] of the resamples, of the metrics that `task.terms` is right about.

    Args:
        stated: scores of all records, which the ratios have to give.
    """
    places, rows, columns, pairs = {}, [], [], []
    for row, unit in enumerate(units):
        for record in unit:
            for metric, pair in task.terms(record).items():
                if metric in stated:
                    rows.append(row)
                    columns.append(places.setdefault(metric, len(places)))
                    pairs.append(pair)
    if not places:
        return {}
    # A record is in few of the metrics, so the units' sums are sparse: float64[metrics, units].
    shape, where = (len(places), len(units)), (columns, rows)
    over, under = (sparse.csr_array((x, where), shape) for x in np.array(pairs, float).T)
    drawn = [_ratio(over @ x, under @ x) for x in _drawn(len(units), count, seed)]
    ratios, whole = np.concatenate(drawn, axis=1), _ratio(over.sum(axis=1), under.sum(axis=1))
    close = functools.partial(math.isclose, rel_tol=1e-9, abs_tol=1e-9)
    return {metric: ratios[k] for metric, k in places.items() if close(whole[k], stated[metric])}


def _ratio(over, under):
    """100 times a ratio of sums; NaN where there was nothing."""
    return 100 * np.divide(over, under, out=np.full(np.shape(under), np.nan), where=under != 0)


def _drawn(units: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """float64[units, n] how often each unit is in each of the next n resamples."""
    rng, most = np.random.default_rng(seed), max(_CHUNK // units, 1)
    for start in range(0, count, most):
        yield np.stack([
            np.bincount(rng.integers(0, units, units), minlength=units)
            for _ in range(min(most, count - start))
        ], axis=1).astype(np.float64)  # fmt: skip


def _rescored(task: Task, units, count: int, seed: int) -> dict[str, np.ndarray]:
    """Metric -> float64[count], NaN where a resample lacks it."""
    rng, values = np.random.default_rng(seed), {}
    for number in range(count):
        drawn = rng.integers(0, len(units), len(units))
        sample = [
            {**record, "unit": str(k)} for k, unit in enumerate(drawn) for record in units[unit]
        ]
        for metric, value in task.scores(sample).items():
            values.setdefault(metric, np.full(count, np.nan))[number] = value
    return values

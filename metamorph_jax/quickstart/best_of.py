"""What it is worth to draw N and keep what the model itself confirms (`sampling/best_of.py`).

Several samples of the visual tokens of each request are decoded, the model is asked about each in
the wording of its training questions, and a linear probe, which the model knows nothing of, tells
which are right. From so many samples follows the share of requests that are right at every smaller
N, as a mean over all choices of N among them.
"""

import dataclasses
import math
import time

import numpy as np
from scipy.stats import binomtest

from metamorph_jax.eval import figures, intervals, page
from metamorph_jax.eval.tasks.base import Task
from metamorph_jax.sampling import best_of
from metamorph_jax.sampling.generator import Generator
from metamorph_jax.sampling.options import DEFAULTS

COUNTS = (1, 2, 4, 8)
SAMPLES = max(COUNTS)


def questions(color: str, shape: str) -> tuple[str, str]:
    """To which "yes" means that an image is right; training asks both, of all images."""
    return f"is there a {color} shape?", f"is there a {shape}?"


def samples_differ(generator: Generator) -> bool:
    """Whether the model's head samples visual tokens."""
    return generator.policy_of(DEFAULTS).varies


def measure(
    generator: Generator, requests: list[dict], features: np.ndarray, whole: np.ndarray,
    right: np.ndarray, say,
) -> dict:  # fmt: skip
    """The gain over N, JSON-able.

    Args:
        generator: of a model whose samples differ.
        requests: of `data.draw_requests`.
        features: float32[n, samples, P, C] visual tokens that were decoded for them.
        whole, right: bool[n, samples] whether they are complete, and show what was asked for.
        say: told how long it takes to read them back.
    """
    clock = time.perf_counter()
    scores = np.full(whole.shape, -np.inf)
    for n, request in enumerate(requests):
        asked = questions(request["color"], request["shape"])
        if whole[n].any():
            found = best_of.scores(generator, features[n][whole[n]], asked, whole.shape[1])
            scores[n, whole[n]] = found
    say(f"{whole.size} samples read back in {time.perf_counter() - clock:.0f} s")
    return gain(right, scores)


def gain(right: np.ndarray, scores: np.ndarray) -> dict:
    """What is right of N samples, N of `COUNTS`, as shares of requests with 95 % intervals.

    Args:
        right: bool[n, samples]; scores: float[n, samples], -inf for a sample that is never kept
            where there is another.

    Returns:
        {"samples", "counts": {N: {"kept", "interval", "any", "gain", "gain_interval"}}}: the share
        whose kept sample is right, and of which any is; the gain over N = 1. All are means over
        every choice of N samples. Intervals are over requests, which are drawn with replacement;
        where they all agree, so that no resample differs, a share has Wilson's score interval.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(right, order, axis=1)
    samples, records = right.shape[1], []
    for n, row in enumerate(ranked):
        values = {f"kept {N}": float(row @ first_of(samples, N)) for N in COUNTS}
        values |= {f"gain {N}": values[f"kept {N}"] - values["kept 1"] for N in COUNTS}
        records.append({"unit": str(n), "values": values})
    found, measured = _Gain(""), {}
    means, ranges = found.scores(records), intervals.bootstrap(found, records).ranges
    share = lambda name: [x / 100 for x in ranges[name]]  # noqa: E731
    for N in COUNTS:
        wrong = samples - right.sum(axis=1)
        none = [math.comb(int(w), N) / math.comb(samples, N) for w in wrong]
        measured[str(N)] = {
            "kept": means[f"kept {N}"] / 100,
            "interval": _unless_equal(share(f"kept {N}"), len(records)),
            "any": 1 - float(np.mean(none)),
            "gain": means[f"gain {N}"] / 100,
            "gain_interval": share(f"gain {N}"),
        }
    return {"samples": samples, "counts": measured}


def first_of(samples: int, N: int) -> np.ndarray:
    """float64[samples]: in which share of the choices of N samples the k-th best is the best."""
    ways = [math.comb(samples - 1 - k, N - 1) for k in range(samples)]
    return np.array(ways) / math.comb(samples, N)


def _unless_equal(interval: list[float], count: int) -> list[float]:
    """An interval of a share of so many requests; Wilson's if it has no width."""
    low, high = interval
    if low < high:
        return interval
    found = binomtest(round(low * count), count).proportion_ci(method="wilson")
    return [float(found.low), float(found.high)]


@dataclasses.dataclass(frozen=True)
class _Gain(Task):
    """So that `intervals.bootstrap` can draw requests: a metric is the mean over its records."""

    def scores(self, records):
        names = records[0]["values"]
        return {name: 100 * float(np.mean([r["values"][name] for r in records])) for name in names}

    def terms(self, record):
        return {name: (value, 1.0) for name, value in record["values"].items()}


def blocks(result: dict) -> list:
    """For the page: a bar for each N, and the gain in words."""
    counts = result["counts"]
    percent = lambda x: f"{100 * x:.1f}"  # noqa: E731
    chart = figures.bar_chart(
        {f"N = {N}": 100 * one["kept"] for N, one in counts.items()},
        [percent(one["kept"]) for one in counts.values()],
        errors=[tuple(100 * x for x in one["interval"]) for one in counts.values()],
        marks=[100 * one["any"] for one in counts.values()],
        limit=100,
        x_label="requests, %",
    )
    caption = (
        "Black: 95 % confidence interval over requests. Orange: what a choice without mistakes "
        "would reach, the share of requests of which any of the N samples is right."
    )
    most, last = list(counts.items())[-1]
    low, high = (f"{100 * x:+.1f}" for x in last["gain_interval"])
    text = (
        f"Of N samples of a request, the one is kept that the model itself confirms when it is "
        f"asked about the color and the shape of its own visual tokens. Of {most} samples instead "
        f"of one: {100 * last['gain']:+.1f} points (95 % interval {low} to {high}). Each value is "
        f"the mean over all choices of N among {result['samples']} samples."
    )
    return [page.Text(text), page.Charts([page.Chart(chart, "Right visual tokens", caption)])]

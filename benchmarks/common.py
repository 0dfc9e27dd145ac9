"""What every benchmark needs: interleaved timing, machine limits, and the output format.

One case prints one JSON line {case, unit, ours, peer, ratio, limit_fraction} as soon as it is
measured (`ratio` above 1: ours is better); `report` prints the table of all of them at the end.
"""

import argparse
import dataclasses
import importlib.util
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from metamorph_jax import platforms

platforms.prepare()


@dataclasses.dataclass
class Case:
    """One line of the result.

    Attributes:
        unit: what `ours` and `peer` count; less is better for seconds, more for rates ("…/s").
        ours, peer: medians; peer is None when its packages are not installed.
        limit_fraction: share of the machine's measured limit that ours reaches, or None.
    """

    case: str
    unit: str
    ours: float
    peer: float | None = None
    limit_fraction: float | None = None

    @property
    def ratio(self) -> float | None:
        if self.peer is None:
            return None
        return self.ours / self.peer if self.unit.endswith("/s") else self.peer / self.ours

    def as_dict(self) -> dict:
        values = dataclasses.asdict(self) | {"ratio": self.ratio}
        order = ("case", "unit", "ours", "peer", "ratio", "limit_fraction")
        shorten = lambda v: float(f"{v:.4g}") if isinstance(v, float) else v  # noqa: E731
        return {k: shorten(values[k]) for k in order}


def parser(description: str, rounds: int = 5) -> argparse.ArgumentParser:
    """Options that all benchmarks share."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--rounds", type=int, default=rounds, help="interleaved runs per case")
    p.add_argument("--smoke", action="store_true", help="toy sizes, one round: does it run at all?")
    p.add_argument("--no-peer", action="store_true", help="leave the peers out")
    return p


def has(*packages: str) -> bool:
    """Whether all packages are installed (nothing is imported)."""
    return all(importlib.util.find_spec(p) is not None for p in packages)


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call, waiting for JAX's result."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def interleaved(runs: dict[str, Callable], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each callable; they take turns, so that a busy moment hits all of them.

    `warmup` rounds aren't counted. They take turns, too: where much memory is used, one side still
    touches pages for the first time after the other's first runs.
    """
    for _ in range(warmup):
        for run in runs.values():
            seconds(run)
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return {name: statistics.median(t) for name, t in times.items()}


def emit(case: Case) -> Case:
    """Prints the JSON line of a finished case."""
    print(json.dumps(case.as_dict()), flush=True)
    return case


def report(cases: list[Case]) -> None:
    """Prints the table of all cases. (rich would wrap it at 80 columns when it goes to a file.)"""
    rows = [[str(v) if v is not None else "-" for v in c.as_dict().values()] for c in cases]
    head = ["case", "unit", "ours", "peer", "ratio", "limit_fraction"]
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    print()
    for row in [head, ["-" * w for w in widths], *rows]:
        print("  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip())


def matmul_peak(size: int = 2048, dtype=jnp.float32, rounds: int = 5) -> float:
    """FLOP/s of a square matrix product as XLA runs it here."""
    a = jnp.ones((size, size), dtype)
    run = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    seconds(lambda: run(a))
    return 2 * size**3 / min(seconds(lambda: run(a)) for _ in range(rounds))


def memory_bandwidth(megabytes: int = 512, rounds: int = 5) -> float:
    """Bytes/s that a matrix-vector product reads: what decoding at batch 1 is bound by."""
    n = 4096
    a = jnp.ones((megabytes * (1 << 20) // (4 * n), n))
    x = jnp.ones((n,))
    run = jax.jit(lambda a, x: a @ x)
    seconds(lambda: run(a, x))
    return a.nbytes / min(seconds(lambda: run(a, x)) for _ in range(rounds))

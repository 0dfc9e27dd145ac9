"""Progress of writing weights, for people to look at."""

import sys

import jax
from flax import nnx


def bytes_of(model: nnx.Module) -> int:
    """Of all its parameters."""
    return sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


class Progress:
    """A bar over bytes on a terminal, a line every tenth elsewhere."""

    def __init__(self, title: str, total: int):
        self._title, self._total, self._done, self._shown = title, max(total, 1), 0, 0
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=title)

    def __call__(self, name: str, size: int) -> None:
        self._done += size
        if self._bar is not None:
            self._bar.update(size)
            return
        tenth = 10 * self._done // self._total
        if tenth > self._shown:
            self._shown = tenth
            print(f"{self._title}: {min(10 * tenth, 100)} %", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

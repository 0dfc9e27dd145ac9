"""MetaMorph's own recipe on made-up rows of text: what the train loop needs to tune adapters."""

import dataclasses

import numpy as np

from metamorph_jax.recipe import Shard
from metamorph_jax.recipes.metamorph import *  # noqa: F403
from metamorph_jax.types import Batch, Images

L, V = 12, 320


class Stream:
    """Batches by number, each from a seed of its own."""

    sources, skipped = ["made up"], {}

    def __init__(self, rows: int):
        self.rows, self.next = rows, 0

    def __next__(self) -> Batch:
        rng = np.random.default_rng(self.next)
        self.next += 1
        tokens = rng.integers(0, V, (self.rows, L)).astype(np.int32)
        full = lambda value: np.full((self.rows, L), value, np.int32)  # noqa: E731
        return Batch(
            tokens=tokens,
            positions=full(0) + np.arange(L, dtype=np.int32),
            segments=full(1),
            text_targets=np.roll(tokens, -1, 1),
            image_slots=full(-1),
            visual_targets=full(-1),
            sources=full(0),
            images=Images(np.zeros((self.rows, 0), bool), np.zeros((self.rows, 0), np.int32)),
        )

    def sample_names(self):
        number = self.next - 1
        return lambda: [[f"batch {number}"] for _ in range(self.rows)]

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]

    def close(self):
        pass


@dataclasses.dataclass(frozen=True)
class Data:
    """Nothing to choose."""


def open_data(data: Data, cfg, shard: Shard) -> Stream:
    return Stream(shard.rows)

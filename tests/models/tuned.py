"""MetaMorph's own recipe on made-up rows of text: what the train loop needs to tune adapters."""

import numpy as np

from metamorph_jax.recipes.metamorph import Config, create, load_pretrained  # noqa: F401
from metamorph_jax.types import Batch

L, V = 12, 320


class Data:
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
            image_valid=np.zeros((self.rows, 0), bool),
        )

    def samples(self):
        number = self.next - 1
        return lambda: [[f"batch {number}"] for _ in range(self.rows)]

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


def make_data(data_cfg, cfg, *, process_index, process_count, workdir):
    return Data(data_cfg["batch_size"])

"""Visual tokens that a language model predicted for requests whose real image is known.

A decoder is trained on a tower's features, but draws from a language model's, which are smoother:
all images that fit a request share one prediction. Trained partly on predictions, it learns to
decide what they leave open.

    predicted.npz    keys: name of each image (`ImageRef.key`); rows: int32, which prediction
                     belongs to it, -1 for none; features: float32[n, P, C]
"""

import os

import numpy as np


class Predicted:
    """The file, opened. `row(key)` is None for an image without prediction."""

    def __init__(self, path: str):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no predicted visual tokens in {path}")
        with np.load(path) as file:
            self.features = file["features"]
            pairs = zip(file["keys"].tolist(), file["rows"].tolist(), strict=True)
        self._rows = {key: row for key, row in pairs if row >= 0}

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, key: str) -> int | None:
        return self._rows.get(key)


def save(path: str, keys: list[str], rows: list[int], features: np.ndarray) -> None:
    """Writes the file, whole or not at all."""
    partial = f"{path}.partial.npz"
    np.savez(partial, keys=np.array(keys), rows=np.array(rows, np.int32), features=features)
    os.replace(partial, path)

"""An order in which a batch has samples of one modality and of similar lengths: LLaVA's sampler.

An option (`order.grouping="modality"`) for runs that are to see samples as the reference does, with
one padded sample in each row (`row.packing="pad"`); packed rows have no use for it.

A sample's length is the number of words in its messages, negative if it has no image. Of each
modality, batches are drawn by chance, and within a batch longer samples come first, dealt out so
that each data shard gets about the same number of words. All batches are shuffled, but for the last
one of each modality: those two are put together, in the order of the file, at the end of the epoch.
"""

import functools
from collections.abc import Sequence

import numpy as np

from metamorph_jax.data.sources import RecordSource
from metamorph_jax.errors import BadSample


def word_counts(sources: Sequence[RecordSource]) -> np.ndarray:
    """int64[n] words of every sample of all sources, negative for those without an image.

    Reads every record. One that is bad counts as a single word, and is skipped when its turn comes.
    """
    found = []
    for source in sources:
        for k in range(len(source)):
            try:
                sample = source.sample(k, np.random.default_rng(0))
            except BadSample:
                found.append(1)
                continue
            words = sum(len(text.split()) for _, text in sample.turns)
            found.append(words if sample.images else -words)
    return np.array(found, np.int64)


def even_chunks(indices: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """The indices as `count` lists of about the same total length.

    Each goes, in order, to the list that is shortest so far and not full. If the indices can't be
    divided evenly, each list takes every `count`-th.
    """
    indices = list(indices)
    if len(indices) % count:
        return [indices[k::count] for k in range(count)]
    chunks: list[list[int]] = [[] for _ in range(count)]
    totals = [0.0] * count
    for i in indices:
        k = totals.index(min(totals))
        chunks[k].append(i)
        full = len(chunks[k]) == len(indices) // count
        totals[k] = float("inf") if full else totals[k] + lengths[i]
    return chunks


def grouped_order(lengths: np.ndarray, rows: int, shards: int, rng: np.random.Generator):
    """int64[n]: the order of one epoch, batches of `shards` * `rows` one after another.

    Args:
        lengths: int[n] of `word_counts`.
        rows: of a batch in each data shard, which stand together.
    """
    parts = [np.flatnonzero(lengths >= 0), np.flatnonzero(lengths < 0)]
    batches = [_batches(part, abs(lengths), rows, shards, rng) for part in parts if len(part)]
    if len(batches) == 1:
        return np.concatenate(batches[0])
    whole = [batch for part in batches for batch in part[:-1]]
    whole = [whole[k] for k in rng.permutation(len(whole))]
    return np.concatenate([*whole, np.sort(np.concatenate([part[-1] for part in batches]))])


def _batches(indices, lengths, rows: int, shards: int, rng) -> list[np.ndarray]:
    """Batches of one modality, long samples first in each shard; the last may be short."""
    drawn, size = rng.permutation(indices), rows * shards
    found = []
    for start in range(0, len(drawn), size):
        batch = drawn[start : start + size]
        batch = batch[np.argsort(-lengths[batch], kind="stable")]
        chunks = even_chunks(batch.tolist(), lengths.tolist(), shards)
        found.append(np.array([i for chunk in chunks for i in chunk], np.int64))
    return found


class Grouped:
    """The order of `grouped_order` in each epoch, as `stream.Mixture` is asked for it.

    Args:
        lengths: of `word_counts`, all sources one after another; sizes: how many of each.
        seed: of the order.
        rows, shards: of a batch in each data shard, and how many there are.
    """

    def __init__(self, lengths: np.ndarray, sizes: list[int], seed: int, rows: int, shards: int):
        self.lengths, self.sizes, self.seed = lengths, sizes, seed
        self.rows, self.shards, self.total = rows, shards, len(lengths)
        self.starts = np.concatenate([[0], np.cumsum(sizes)])

    @functools.lru_cache(maxsize=2)  # noqa: B019  (one order lives as long as the process)
    def _order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, 5, epoch))
        order = grouped_order(self.lengths, self.rows, self.shards, rng)
        # Shard k reads samples k, k + shards, …
        size = self.rows * self.shards
        whole = len(order) // size * size
        dealt = order[:whole].reshape(-1, self.shards, self.rows).swapaxes(1, 2).reshape(-1)
        return np.concatenate([dealt, order[whole:]])

    def locate(self, g: int) -> tuple[int, int, int]:
        """(source, epoch, record) of sample g."""
        epoch, i = divmod(g, self.total)
        i = int(self._order(epoch)[i])
        source = int(np.searchsorted(self.starts, i, side="right")) - 1
        return source, epoch, i - int(self.starts[source])

"""An order in which a batch has samples of one modality and of similar lengths: LLaVA's sampler.

An option (`order.grouping="modality"`) for runs that are to see samples as the reference does, with
one padded sample in each row (`row.packing="pad"`); packed rows have no use for it.

A sample's length is the number of words in its messages, negative if it has no image. Of each
modality, batches are drawn by chance, and within a batch longer samples come first, dealt out so
that each data shard gets about the same number of words. All batches are shuffled, but for the last
one of each modality: those two are put together, in the order of the file, at the end of the epoch.
"""

import functools
import os
import threading
from collections.abc import Sequence

import numpy as np

from metamorph_jax.data.sources import RecordSource, index_files
from metamorph_jax.errors import BadSample
from metamorph_jax.files import shown

_VERSION = 1  # of how words are counted
_known: dict[tuple, np.ndarray] = {}  # counts of this process, which several data shards ask for
_lock = threading.Lock()


def word_counts(sources: Sequence[RecordSource], index_dir: str = "") -> np.ndarray:
    """int64[n] words of every sample of all sources, negative for those without an image.

    One that is bad counts as a single word, and is skipped when its turn comes. Every record is
    read once: counts are kept in the process, and beside the index of byte offsets.

    Args:
        index_dir: see `ReadingConfig`.
    """
    with _lock:
        return np.concatenate([_counts(source, index_dir) for source in sources])


def _counts(source: RecordSource, index_dir: str) -> np.ndarray:
    key = _key(source)
    if key is None:
        return _count(source)
    if key not in _known:
        stamp, places = repr(key), index_files.places(key[0], index_dir, "words")
        found = next((x for p in places if (x := _load(p, stamp, len(source))) is not None), None)
        if found is None:
            found = _count(source)
            index_files.save(places, stamp, {"words": found})
        _known[key] = found
    return _known[key]


def _key(source: RecordSource) -> tuple | None:
    """What the counts depend on: the file as it is now, and how its records are read. None where
    the records are of no local file."""
    path = getattr(getattr(source, "records", None), "path", None)
    try:
        stats = [os.stat(part) for part in path.split(",")] if path else []
    except OSError:
        stats = []
    if not stats:
        return None
    files = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
    reading = (source.kind, source.max_images, tuple(source.ignore), source.in_front)
    return os.path.abspath(path), _VERSION, files, reading, tuple(source.kinds), repr(source.files)


def _load(path: str, stamp: str, size: int) -> np.ndarray | None:
    (words,) = index_files.load(path, stamp, ("words",)) or (np.zeros(0),)
    return words.astype(np.int64) if words.shape == (size,) and words.dtype.kind == "i" else None


def _count(source: RecordSource) -> np.ndarray:
    from tqdm import tqdm

    found = np.ones(len(source), np.int64)
    title = f"counting words of {shown(getattr(source, 'name', ''), 60)}"
    for k in tqdm(range(len(source)), desc=title, unit="rec", delay=5, mininterval=2):
        try:
            sample = source.sample(k, np.random.default_rng(0))
        except BadSample:
            continue
        words = sum(len(text.split()) for _, text in sample.turns)
        found[k] = words if sample.images else -words
    return found


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

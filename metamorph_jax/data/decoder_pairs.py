"""Batches for the decoder stage: an image to draw, and the visual tokens that describe it."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from metamorph_jax.data import images
from metamorph_jax.data.cache import ArrayCache
from metamorph_jax.data.config import ImageConfig
from metamorph_jax.data.predicted import Predicted
from metamorph_jax.data.sources.base import ImageRef
from metamorph_jax.data.stream import key_of, permute
from metamorph_jax.errors import BadSample, DataError
from metamorph_jax.recipe import Shard
from metamorph_jax.types import DecoderBatch


class DecoderPairs(Iterator[DecoderBatch]):
    """Endless shuffled batches of (image, features), the same for the same seed.

    Images are decoded once and kept in memory when all of them fit into `memory_bytes`; otherwise
    `threads` decode each batch, and the next good image of the list stands in for one that turns
    out to be bad. Every epoch shows every image once; a batch may contain the end of one epoch and
    the start of the next, so its shape never changes.

    Args:
        refs: images; those that can't be read, or aren't in the cache, are left out and counted.
        preprocess: makes the image to draw, uint8[h, w, 3].
        shard: images of a batch, and which share of every epoch they come from.
        seed: of the order.
        features: cache of their visual tokens, or None.
        tower: makes `pixels`, the tower's input, where there is no cache; or None.
        memory_bytes: most bytes of images to keep.
        threads: for decoding.
        predicted, predicted_share: a language model's visual tokens, which stand in for the
            tower's in this share of the images that have some; needs `features`.
        reading: limits of images, and their background.

    Attributes:
        counts: images left out or replaced by others, by reason.
        refs: those in use.
    """

    samples = None  # there are no conversations in these batches

    def __init__(
        self,
        refs: Sequence[ImageRef],
        preprocess: images.Preprocess,
        shard: Shard,
        seed: int = 0,
        features: ArrayCache | None = None,
        tower: images.Preprocess | None = None,
        memory_bytes: int = 2**31,
        threads: int = 2,
        predicted: Predicted | None = None,
        predicted_share: float = 0.5,
        reading: ImageConfig | None = None,
    ):
        self.preprocess, self.tower = preprocess, tower
        self.shard, self.seed, self.features = shard, seed, features
        self.predicted, self.predicted_share = predicted, predicted_share
        self.reading = reading or ImageConfig()
        self._pool = ThreadPoolExecutor(max(threads, 1))
        refs = list(dict.fromkeys(refs))
        keep = len(refs) * preprocess.size**2 * 3 <= memory_bytes and tower is None
        self._open(refs, keep)
        if predicted is not None and len(predicted):
            if all(predicted.row(ref.key()) is None for ref in self.refs):
                raise DataError("the predicted visual tokens belong to other images")
        names = "\n".join(ref.key() for ref in self.refs)
        self._layout = f"{len(self.refs)} {hashlib.sha256(names.encode()).hexdigest()[:16]} {seed} "
        self._layout += f"{shard.rows} {(shard.index, shard.count)}"
        self._next = 0

    def _open(self, refs: Sequence[ImageRef], keep: bool) -> None:
        """Sets `refs`, `counts`, the rows of the features and, with `keep`, the pixels."""
        self.counts: dict[str, int] = {}
        self.refs: list[ImageRef] = []
        rows: list[int] = []
        loaded: list[np.ndarray] = []
        for ref, row, pixels in self._pool.map(lambda ref: self._try(ref, keep), refs):
            if isinstance(row, str):
                self._count(row)
                continue
            self.refs.append(ref)
            rows.append(row)
            if pixels is not None:
                loaded.append(pixels)
        if not self.refs:
            reasons = ", ".join(f"{reason} {n}" for reason, n in self.counts.items())
            raise DataError(
                f"none of {len(refs)} images can be used ({reasons or 'there are none'})"
            )
        self._rows = np.array(rows)
        self._images = np.stack(loaded) if loaded else None

    def _count(self, reason: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1

    def _try(self, ref: ImageRef, decode: bool):
        """(ref, row of its features or reason why not, pixels)."""
        try:
            rows = (0,) if self.features is None else self.features.lookup(ref)
            if rows is None:
                return ref, "not_in_feature_cache", None
            return ref, rows[0], self._draw(ref) if decode else None
        except BadSample as e:
            return ref, e.reason, None

    def _draw(self, ref: ImageRef) -> np.ndarray:
        return self.preprocess(self.reading.load([ref])[0])

    def _load(self, k: int) -> tuple[int, Image.Image]:
        """(k, image k), or the next one that can be read."""
        for i in range(min(len(self.refs), 100)):
            try:
                j = (k + i) % len(self.refs)
                return j, self.reading.load([self.refs[j]])[0]
            except BadSample as e:
                self._count(e.reason)
                last = e
        raise DataError(f"100 bad images in a row; the last: {last}") from last

    def __len__(self) -> int:
        """Images in an epoch, over all data shards."""
        return len(self.refs)

    def __iter__(self):
        return self

    def _pick(self, n: int) -> int:
        epoch, i = divmod(n * self.shard.count + self.shard.index, len(self.refs))
        return permute(i, len(self.refs), key_of(self.seed, 5, epoch))

    def __next__(self) -> DecoderBatch:
        first, rows = self._next, self.shard.rows
        picks = [self._pick(first + k) for k in range(rows)]
        self._next += rows
        features = pixels = None
        if self._images is not None:
            image = self._images[picks]
        else:
            found = list(self._pool.map(self._load, picks))
            picks = [k for k, _ in found]
            image = np.stack([self.preprocess(loaded) for _, loaded in found])
            if self.tower is not None and self.features is None:
                pixels = np.stack([self.tower(loaded) for _, loaded in found])
        self._last = picks
        if self.features is not None:
            features = np.array(self.features.rows[self._rows[picks]], np.float32)
            if self.predicted is not None:
                self._put_predicted(features, picks, first)
        return DecoderBatch(image, features, pixels, np.ones(rows, bool))

    def _put_predicted(self, features: np.ndarray, picks: list[int], first: int) -> None:
        """Replaces some features in place; which ones follows from the number of the sample."""
        draws = np.random.default_rng((self.seed, self.shard.index, first)).random(len(picks))
        for k, pick in enumerate(picks):
            row = self.predicted.row(self.refs[pick].key())
            if row is not None and draws[k] < self.predicted_share:
                features[k] = self.predicted.features[row]

    def sample_names(self):
        """A function that names the image of each row of the batch that came last."""
        picks = self._last
        return lambda: [[self.refs[k].key()] for k in picks]

    def get_state(self) -> dict:
        return {"next": self._next, "layout": self._layout}

    def set_state(self, state: dict) -> None:
        if state["layout"] != self._layout:
            raise DataError(
                f"the images or the batch changed since the checkpoint: {state['layout']} is "
                f"now {self._layout}"
            )
        self._next = int(state["next"])

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

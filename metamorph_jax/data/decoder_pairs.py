"""Batches for the decoder stage: a picture to draw, and the visual tokens that describe it."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from metamorph_jax.data import images
from metamorph_jax.data.cache import ArrayCache
from metamorph_jax.data.predicted import Predicted
from metamorph_jax.data.sources.base import ImageRef
from metamorph_jax.data.stream import key_of, permute
from metamorph_jax.errors import BadSample
from metamorph_jax.types import DecoderBatch


class DecoderPairs(Iterator[DecoderBatch]):
    """Endless shuffled batches of (picture, features), the same for the same seed.

    Pictures are decoded once and kept in memory when all of them fit into `memory_bytes`;
    otherwise `threads` decode each batch, and the next good picture of the list stands in for one
    that turns out to be bad. Every epoch shows every picture once; a batch may reach over the
    border of two epochs, so its shape never changes.

    Args:
        refs: pictures; those that can't be read, or aren't in the cache, are left out and counted.
        preprocess: makes the picture to draw, uint8[h, w, 3].
        batch_size: pictures of this process's batch.
        seed: of the order.
        features: cache of their visual tokens, or None.
        tower: makes `pixels`, the tower's input, where there is no cache; or None.
        process_index, process_count: which share of every epoch is this process's.
        memory_bytes: most bytes of pictures to keep.
        threads: for decoding.
        images: uint8[n, h, w, 3] already decoded, in the order of `refs`, or None.
        predicted, predicted_share: a language model's visual tokens, which stand in for the
            tower's in this share of the pictures that have some; needs `features`.

    Attributes:
        counts: pictures left out or stood in for, by reason.
        refs: those in use.
    """

    def __init__(
        self,
        refs: Sequence[ImageRef],
        preprocess: images.Preprocess,
        batch_size: int,
        seed: int = 0,
        features: ArrayCache | None = None,
        tower: images.Preprocess | None = None,
        process_index: int = 0,
        process_count: int = 1,
        memory_bytes: int = 2**31,
        threads: int = 2,
        images: np.ndarray | None = None,
        predicted: Predicted | None = None,
        predicted_share: float = 0.5,
    ):
        self.preprocess, self.tower = preprocess, tower
        self.batch_size, self.seed = batch_size, seed
        self.features, self.process = features, (process_index, process_count)
        self.predicted, self.predicted_share = predicted, predicted_share
        self.counts: dict[str, int] = {}
        self._pool = ThreadPoolExecutor(max(threads, 1))
        seen: dict[ImageRef, int] = {}
        for k, ref in enumerate(refs):
            seen.setdefault(ref, k)
        kept, rows, where = [], [], []
        loaded: list = []
        fits = len(seen) * preprocess.size**2 * 3 <= memory_bytes and tower is None
        for ref, row, pixels in self._pool.map(
            lambda r: self._try(r, fits and images is None), seen
        ):
            if isinstance(row, str):
                self.counts[row] = self.counts.get(row, 0) + 1
                continue
            kept.append(ref)
            rows.append(row)
            where.append(seen[ref])
            if pixels is not None:
                loaded.append(pixels)
        if not kept:
            raise ValueError(f"no usable picture among {len(refs)}: {self.counts}")
        self.refs, self._rows = kept, np.array(rows)
        self._images = np.stack(loaded) if loaded else None
        if images is not None:
            self._images = images[np.array(where)]
        if predicted is not None and len(predicted):
            if all(predicted.row(ref.key()) is None for ref in kept):
                raise ValueError("the predicted visual tokens belong to other pictures")
        names = "\n".join(ref.key() for ref in kept)
        self._layout = f"{len(kept)} {hashlib.sha256(names.encode()).hexdigest()[:16]} {seed} "
        self._layout += f"{batch_size} {self.process}"
        self._next = 0

    def _try(self, ref: ImageRef, decode: bool):
        """(ref, row of its features or reason why not, pixels)."""
        try:
            row = 0 if self.features is None else self.features.lookup(ref)
            if row is None:
                return ref, "not_in_feature_cache", None
            return ref, row, self._draw(ref) if decode else None
        except BadSample as e:
            return ref, e.reason, None

    def _draw(self, ref: ImageRef) -> np.ndarray:
        return self.preprocess(images.load([ref])[0])

    def _load(self, k: int):
        """(k, picture k), or the next one that can be read."""
        for i in range(min(len(self.refs), 100)):
            try:
                j = (k + i) % len(self.refs)
                return j, images.load([self.refs[j]])[0]
            except BadSample as e:
                self.counts[e.reason] = self.counts.get(e.reason, 0) + 1
                last = e
        raise ValueError(f"100 bad pictures in a row: {last}") from last

    def __len__(self) -> int:
        """Pictures in an epoch, over all processes."""
        return len(self.refs)

    def __iter__(self):
        return self

    def _pick(self, n: int) -> int:
        epoch, i = divmod(n * self.process[1] + self.process[0], len(self.refs))
        return permute(i, len(self.refs), key_of(self.seed, 5, epoch))

    def __next__(self) -> DecoderBatch:
        first = self._next
        picks = [self._pick(first + k) for k in range(self.batch_size)]
        self._next += self.batch_size
        features = pixels = None
        if self._images is not None:
            image = self._images[picks]
        else:
            found = list(self._pool.map(self._load, picks))
            picks = [k for k, _ in found]
            image = np.stack([self.preprocess(picture) for _, picture in found])
            if self.tower is not None and self.features is None:
                pixels = np.stack([self.tower(picture) for _, picture in found])
        self._last = picks
        if self.features is not None:
            features = np.array(self.features.rows[self._rows[picks]], np.float32)
            if self.predicted is not None:
                self._put_predicted(features, picks, first)
        return DecoderBatch(
            image=image, features=features, pixels=pixels, valid=np.ones(self.batch_size, bool)
        )

    def _put_predicted(self, features: np.ndarray, picks: list[int], first: int) -> None:
        """Replaces some features in place; which ones follows from the number of the sample."""
        draws = np.random.default_rng((self.seed, self.process[0], first)).random(len(picks))
        for k, pick in enumerate(picks):
            row = self.predicted.row(self.refs[pick].key())
            if row is not None and draws[k] < self.predicted_share:
                features[k] = self.predicted.features[row]

    def sample_names(self):
        """A function that names the picture of each row of the batch that came last."""
        picks = self._last
        return lambda: [[self.refs[k].key()] for k in picks]

    def get_state(self) -> dict:
        return {"next": self._next, "layout": self._layout}

    def set_state(self, state: dict) -> None:
        if state["layout"] != self._layout:
            raise ValueError(
                f"the pictures or the batch changed since the checkpoint: {state['layout']} is "
                f"now {self._layout}"
            )
        self._next = int(state["next"])

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

"""The endless deterministic stream of samples: number n is always the same sample.

Sample n follows from the seed alone: its source, the epoch of that source, the record, and all
random choices in it. So a pipeline that stopped can resume at any number, with any number of worker
processes, and every host knows its own share without talking to the others.
"""

import collections
import functools
from collections.abc import Sequence

import numpy as np

from metamorph_jax.data import images
from metamorph_jax.data.cache import ArrayCache
from metamorph_jax.data.chat import SENTINEL, Chat, Encoded
from metamorph_jax.data.config import DataConfig, InputSpec
from metamorph_jax.data.interleave import Place, Row, build_row, read_place, text_place
from metamorph_jax.data.sources.base import ImageRef, Sample
from metamorph_jax.errors import BadImage, BadSample, SlowTokenizer
from metamorph_jax.files import shown

ENDLESS = 2**62
# Of a `Row`, what an item holds.
ROW_FIELDS = (
    "tokens", "positions", "text_targets", "image_slots", "visual_targets", "view_starts",
)  # fmt: skip
_BLOCK = 4096  # samples within which the weights of a mixture come out exactly (rounded)
_MASK = 2**64 - 1


def permute(i: int, n: int, key: int) -> int:
    """Where a random permutation of 0…n-1 (chosen by `key`) puts i.

    A Feistel network over the next power of four, walked until it falls inside: no table, however
    large n is.
    """
    half = max((n - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for k in range(6):
            h = (right + key + k * 0x9E3779B97F4A7C15) & _MASK
            h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
            h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & _MASK
            left, right = right, left ^ ((h ^ (h >> 31)) & mask)
        i = (left << half) | right
        if i < n:
            return i


@functools.lru_cache(maxsize=4096)
def key_of(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def choices(seed: int, source: int, epoch: int, record: int) -> np.random.Generator:
    """The source of all random choices in a sample: wording, video frames."""
    return np.random.default_rng((seed, 4, source, epoch, record))


class Mixture:
    """Which (source, epoch, record) sample g is.

    Without weights an epoch is every record of every source once, shuffled together. With weights
    the shares of each block of 4096 samples follow them, and each source runs through its own
    epochs at its own pace.
    """

    def __init__(self, sizes: list[int], weights: list[float] | None, seed: int, shuffle: bool):
        if not sizes or min(sizes) < 1:
            raise ValueError(f"every source needs at least one record, sizes are {sizes}")
        self.sizes, self.seed, self.shuffle = sizes, seed, shuffle
        self.total = sum(sizes)
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.shares = None
        if weights is not None:
            w = np.asarray(weights, np.float64)
            if len(w) != len(sizes) or not np.isfinite(w).all() or (w <= 0).any():
                raise ValueError(f"weights must be positive, one for each source: {weights}")
            exact = w / w.sum() * _BLOCK
            shares = np.maximum(np.floor(exact), 1).astype(np.int64)
            order = np.argsort(np.floor(exact) - exact, kind="stable")
            while shares.sum() < _BLOCK:
                shares[order[: _BLOCK - shares.sum()]] += 1
            while shares.sum() > _BLOCK:
                shares[np.argmax(shares)] -= 1
            self.shares = shares

    @functools.lru_cache(maxsize=4)  # noqa: B019  (one mixture lives as long as the process)
    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source of each sample of the block, how many of that source came before in it)."""
        picks = np.repeat(np.arange(len(self.sizes)), self.shares)
        picks = np.random.default_rng((self.seed, 1, block)).permutation(picks)
        before = np.empty(_BLOCK, np.int64)
        for s in range(len(self.sizes)):
            mine = picks == s
            before[mine] = np.arange(mine.sum())
        return picks, before

    def locate(self, g: int) -> tuple[int, int, int]:
        """(source, epoch of it, record) of sample g."""
        if self.shares is None:
            epoch, i = divmod(g, self.total)
            if self.shuffle:
                i = permute(i, self.total, key_of(self.seed, 2, epoch))
            source = int(np.searchsorted(self.starts, i, side="right")) - 1
            return source, epoch, i - int(self.starts[source])
        block, i = divmod(g, _BLOCK)
        picks, before = self._block(block)
        source = int(picks[i])
        turn = block * int(self.shares[source]) + int(before[i])
        epoch, k = divmod(turn, self.sizes[source])
        if self.shuffle:
            k = permute(k, self.sizes[source], key_of(self.seed, 3, source, epoch))
        return source, epoch, k


class SampleStream:
    """Random access to rows: `stream[n]` is a dict of arrays, or tells why the sample is bad.

    A good item holds `index`, `source`, the arrays of a `Row` and, of the V views of its images,
    `cache` int64[V] (row in the cache, -1 if the view is in `pixels`) and `pixels` uint8[v, h, w,
    3]; `cut` is 1 if its end did not fit into a row, and `misnamed`, `transparent` and
    `broken_images` (which were left out) count images; if it has j images to draw, `drawn` int[j],
    which of its images, `drawing_starts` int32[j], `drawings` uint8[j, h, w, 3] or latents
    float32[j, h, w, c], and perhaps `captions` int32[j, L']. A bad item holds `index`, `source`,
    `bad` (the reason) and `detail`.

    Args:
        sources: objects with `name`, `len` and `sample(k, rng) -> Sample`.
        chat: writes conversations as ids.
        config, spec: what the user decides, and what the model does.
        mixture: the order of the samples of all data shards together.
        process: (index, count) of this data shard.
        cache: of views or features, see `pipeline.open_cache`.
        drawing_cache: of moments of images to draw, see `pipeline.open_drawing_cache`.
    """

    def __init__(
        self,
        sources,
        chat: Chat,
        config: DataConfig,
        spec: InputSpec,
        mixture: Mixture,
        process: tuple[int, int] = (0, 1),
        cache: ArrayCache | None = None,
        drawing_cache: ArrayCache | None = None,
    ):
        self.sources, self.chat, self.mixture, self.process = sources, chat, mixture, process
        self.config, self.spec, self.cache = config, spec, cache
        self.drawing_cache = drawing_cache
        self.views = config.images.change(spec.views)
        self._place = None  # of every image, where it doesn't depend on their sizes
        if not self.views.needs_size:
            self._place = read_place(*self.views.plan(None))
        cached = config.cache.features or config.cache.drawings
        self.fixed_choices = config.order.fixed_choices or bool(cached)
        index, count = process
        total = config.order.epochs * mixture.total
        self.length = max(total - index + count - 1, 0) // count if total else ENDLESS

    def __len__(self) -> int:
        return self.length

    def locate(self, n: int) -> tuple[int, int, int]:
        return self.mixture.locate(n * self.process[1] + self.process[0])

    def name(self, n: int) -> str:
        """Source, record and epoch of sample n, for people."""
        source, epoch, k = self.locate(n)
        return f"{self.sources[source].name} record {k} epoch {epoch}"

    def sample(self, n: int, broken: frozenset[ImageRef] = frozenset()) -> Sample:
        """Sample n, without images that are broken, which it must spare.

        Raises:
            BadSample: it can't be used.
        """
        source, epoch, k = self.locate(n)
        if self.fixed_choices:
            epoch = 0
        more = {"broken": broken} if broken else {}
        return self.sources[source].sample(k, choices(self.mixture.seed, source, epoch, k), **more)

    def __getitem__(self, n: int) -> dict:
        return self.read(n)[0]

    def read(self, n: int) -> tuple[dict, Sample | None, list[BadImage]]:
        """(the item, the sample that it was made of or None, images that were left out of it).

        Raises:
            SlowTokenizer: no sample can be read.
        """
        n = int(n)
        source, _, k = self.locate(n)
        where, sample, broken = "", None, []
        try:
            sample = self.sample(n)
            where = sample.where
            item, sample = self._spared(n, sample, broken)
            return {"index": n, "source": source, **item}, sample, broken
        except BadSample as e:
            reason, detail = e.reason, e.detail
        except SlowTokenizer:
            raise
        except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
            # Whatever else is wrong with one record must not stop a run of a million.
            reason, detail = f"error_{type(e).__name__}", str(e) if where else f"record {k}: {e}"
        if where:
            detail = f"{where}: {detail}" if detail else where
        item = {"index": n, "source": source, "bad": reason, "detail": shown(detail, 1000)}
        return item, sample, broken

    def _spared(self, n: int, sample: Sample, broken: list[BadImage]) -> tuple[dict, Sample]:
        """What `_item` makes of sample n, and the sample; images that it spares and that can't be
        used are left out of it, and added to `broken`.

        What is left is what it would be if these were not there, random choices included.
        """
        while True:
            try:
                return self._item(sample, n) | {"broken_images": len(broken)}, sample
            except BadImage as error:
                if not sample.spares or any(error.image == one.image for one in broken):
                    raise
                broken.append(error)
            try:
                sample = self.sample(n, frozenset(one.image for one in broken))
            except BadSample as error:
                raise (broken[-1] if error.reason == "no_images" else error) from error

    def _item(self, sample: Sample, n: int) -> dict:
        """Sizes of the images -> row -> pixels: what does not fit is never decoded."""
        encoded = self.chat.conversation(sample.turns, self.config.row.independent_turns)
        if encoded.ignored:
            raise BadSample("official_masks", f"the reference ignores it: {encoded.ignored}")
        drawn = self._drawn(encoded, len(sample.images))
        places = self._places(sample.images, drawn)
        row = build_row(
            encoded.ids,
            encoded.labels,
            places,
            self.spec.views.tokens,
            self.config.row.longest,
            self.spec.predicted,
            encoded.turns,
            self.chat.markers.before if self.config.row.mask_dangling_start else (),
        )
        places, drawn = places[: len(row.image_starts)], drawn[: len(row.image_starts)]
        self._check(sample, row, drawn)
        item = {name: getattr(row, name) for name in ROW_FIELDS}
        item["cut"] = int(row.cut)
        if self.config.row.independent_turns:
            item["turns"] = np.zeros(len(row), np.int32) if row.turns is None else row.turns
        read = {k: place.views for k, place in enumerate(places) if place.views}
        return item | self._pictured(sample, n, row, read, np.flatnonzero(drawn))

    def _drawn(self, encoded: Encoded, count: int) -> np.ndarray:
        """bool[count]: which images of a sample are to be drawn."""
        if self.spec.drawings is None:
            return np.zeros(count, bool)
        sentinels = np.flatnonzero(encoded.ids == SENTINEL)
        return np.asarray(self.spec.drawings.rule(encoded.labels, sentinels), bool)

    def _places(self, refs: Sequence[ImageRef], drawn: np.ndarray) -> list[Place]:
        if self._place is not None:
            places = [self._place] * len(refs)
        else:
            sizes = images.sizes(refs, self.config.images.max_pixels)
            places = [read_place(*self.views.plan(size)) for size in sizes]
        if self.spec.drawings is not None and self.spec.drawings.ids:
            own = text_place(self.spec.drawings.ids, self.spec.drawings.unlearnt)
            places = [own if draw else place for draw, place in zip(drawn, places, strict=True)]
        return places

    def _check(self, sample: Sample, row: Row, drawn: np.ndarray) -> None:
        """Raises BadSample where no row has room for the sample, or nothing is learnt from it."""
        views, most = len(row.view_starts), self.config.row.most_images
        if views > most:
            raise BadSample("too_many_images", f"{views} views of images, a row holds {most}")
        targets, most = int((row.visual_targets >= 0).sum()), self.spec.visual_targets
        if 0 < most < targets:
            raise BadSample(
                "too_many_visual_targets",
                f"{targets} visual tokens to predict, max_visual_targets of the model is {most}",
            )
        if drawn.any():
            places, first = self.spec.drawings.places, int(row.image_starts[drawn].min())
            if drawn.sum() > places and self.config.row.packing != "concat":
                raise BadSample(
                    "too_many_drawings",
                    f"{drawn.sum()} images to draw, max_drawings of the model is {places}",
                )
            if first == 0:
                raise BadSample("nothing_to_draw_from", "no text before an image to draw")
        elif not (targets or (row.text_targets >= 0).any()):
            if row.cut:
                length = self.config.row.longest
                raise BadSample("too_long", f"no answer begins in the first {length} positions")
            raise BadSample("fully_masked", "no answer to learn")

    def _pictured(
        self, sample: Sample, n: int, row: Row, read: dict[int, int], drawn: np.ndarray
    ) -> dict:
        """What an item holds of the images: those that are read, with how many views each has, and
        those that are drawn. Each image is decoded once."""
        where: list[int] = []
        fresh: list[int] = []  # images that the cache lacks
        for k, views in read.items():
            rows = self._cached(sample.images[k], views)
            fresh += [] if rows else [k]
            where += rows or [-1] * views
        notes: collections.Counter = collections.Counter()
        needed = sorted({*fresh, *(() if self.drawing_cache else drawn.tolist())})
        loaded = self.config.images.load([sample.images[k] for k in needed], notes)
        image = dict(zip(needed, loaded, strict=True))
        item = {"cache": np.array(where, np.int64)}
        if fresh:
            item["pixels"] = np.concatenate([self.views.pixels(image[k]) for k in fresh])
        if len(drawn):
            spec = self.spec.drawings
            item["drawing_starts"], item["drawn"] = row.image_starts[drawn] - 1, drawn
            if self.drawing_cache is None:
                item["drawings"] = np.stack([spec.preprocess(image[k]) for k in drawn.tolist()])
            else:
                item["drawings"] = self._latents([sample.images[k] for k in drawn], n)
            if spec.caption is not None:
                item["captions"] = np.stack([spec.caption(sample, int(k)) for k in drawn])
        return item | {name: notes[name] for name in images.NOTES}

    def _latents(self, refs: Sequence[ImageRef], n: int) -> np.ndarray:
        """float32[j, h, w, c] scaled latents of the images to draw in sample n, drawn anew in every
        epoch from their moments in the cache."""
        rng = np.random.default_rng((self.mixture.seed, 5, *self.locate(n)))
        found = []
        for ref in refs:
            rows = self.drawing_cache.lookup(ref)
            if rows is None:
                raise BadSample("not_in_drawing_cache", ref.key())
            found.append(self.spec.drawings.latents.sample(self.drawing_cache.rows[rows[0]], rng))
        return np.stack(found)

    def _cached(self, ref: ImageRef, views: int) -> list[int]:
        """Rows of an image in the cache; [] where it is not there."""
        rows = None if self.cache is None else self.cache.lookup(ref)
        if rows is None and self.config.cache.features:
            raise BadSample("not_in_feature_cache", ref.key())
        if rows is not None and len(rows) != views:
            raise BadSample("stale_cache", f"{ref.key()}: {len(rows)} views, expected {views}")
        return list(rows or ())

"""First-fit packing of samples into rows [B, L] with at most I views of images each.

A sample is never split, so neither is an image. A few rows stay open; a sample goes into the first
one that has room for its positions, views, visual targets and drawings. When none has, the fullest
row is closed and a new one opened. `packing = "pad"` puts one sample into each row, as the
references do; "concat" is in `concat.py`.

Grain's own first-fit packing bounds every feature by itself too, but closes all rows at once and
would need the visual tokens as a feature to be cut; here an image must come whole, with its slots
renumbered, so the rows are kept by hand.
"""

import collections
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain
import numpy as np

from metamorph_jax.data.concat import Concat, ConcatBySource, part
from metamorph_jax.data.config import DataConfig, DrawingSpec, InputSpec
from metamorph_jax.data.images import NOTES
from metamorph_jax.data.sources.kinds import Documents
from metamorph_jax.errors import ConfigError, DataError, TooManyBadSamples
from metamorph_jax.types import TEXT, Batch, Drawings, Images

# What is counted of samples that are used; all other counts are of samples that are not.
USED = ("cut", "broken_images", *NOTES)


class Size(NamedTuple):
    """What a sample takes of a row, or what a row has."""

    positions: int
    views: int = 0
    visual_targets: int = 0
    drawings: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(*(a + b for a, b in zip(self, other, strict=True)))

    def fits(self, limit: "Size", used: "Size" = (0, 0, 0, 0)) -> bool:
        """Whether a row of `limit`, of which some is used, has room for it."""
        return (
            used[0] + self[0] <= limit[0]
            and used[1] + self[1] <= limit[1]
            and used[2] + self[2] <= limit[2]
            and used[3] + self[3] <= limit[3]
        )


class FirstFit:
    """The open rows. An item is anything that has a `Size`.

    Args:
        limit: most that a row holds.
        open_rows: rows kept open.
    """

    def __init__(self, limit: Size, open_rows: int):
        self.limit, self.open_rows = limit, max(open_rows, 1)
        self.rows: list[list] = []
        self.used: list[Size] = []  # of each open row
        # A row as full as this is closed at once.
        self._full = limit.positions - limit.positions // 256

    def add(self, item, size: Size) -> list[list]:
        """Places the item; returns the rows that were closed on the way."""
        if not size.fits(self.limit):
            raise ValueError(f"a sample of {size} does not fit into a row of {self.limit}")
        closed = []
        fitting = (r for r, used in enumerate(self.used) if size.fits(self.limit, used))
        row = next(fitting, None)
        if row is None:
            if len(self.rows) >= self.open_rows:
                closed.append(self._close(max(range(len(self.used)), key=lambda r: self.used[r])))
            row = len(self.rows)
            self.rows.append([])
            self.used.append(Size(0))
        self.rows[row].append(item)
        self.used[row] += size
        if self.used[row].positions >= self._full:
            closed.append(self._close(row))
        return closed

    def _close(self, row: int) -> list:
        del self.used[row]
        return self.rows.pop(row)

    def flush(self) -> list[list]:
        """Closes all rows."""
        rows, self.rows, self.used = self.rows, [], []
        return rows

    def restore(self, rows: list[list]) -> None:
        """Sets the open rows, whose items are those of a `SampleStream`."""
        self.rows = rows
        self.used = [functools.reduce(Size.__add__, map(_size, row)) for row in rows]


class _OneEach(FirstFit):
    """Parity with the references: a row is one sample."""

    def add(self, *args) -> list[list]:
        return super().add(*args) + self.flush()


def row_limit(config: DataConfig, spec: InputSpec) -> Size:
    """What a row holds."""
    length = config.row.length
    drawings = 0 if spec.drawings is None else spec.drawings.places
    return Size(length, config.row.images, spec.visual_targets or length, drawings)


def _size(item: dict) -> Size:
    """Of an item of a `SampleStream`."""
    targets = int((item["visual_targets"] >= 0).sum())
    return Size(
        len(item["tokens"]), len(item["cache"]), targets, len(item.get("drawing_starts", ()))
    )


class _Assembly:
    """The arrays of one batch, filled row by row and sample by sample."""

    def __init__(self, rows: int, config: DataConfig, spec: InputSpec, cache_rows):
        B, L, I = rows, config.row.length, config.row.images
        self.tokens_per_view, self.cache_rows = spec.views.tokens, cache_rows
        self.crossing = config.row.crossing
        self.ints = {
            name: np.full((B, L), EMPTY[name], np.int32)
            for name in EMPTY
            if name != "turns" or config.row.independent_turns
        }
        pixels = features = self.drawings = None
        if config.cache.features or (spec.feature_width and not spec.tower):
            features = np.zeros((B, I, *spec.feature_shape), np.float32)
        else:
            side = config.images.change(spec.views).preprocess.size
            pixels = np.zeros((B, I, side, side, 3), np.uint8)
        self.images = Images(np.zeros((B, I), bool), np.zeros((B, I), np.int32), pixels, features)
        if spec.drawings is not None:
            self.drawings = _no_drawings(B, spec.drawings, bool(config.cache.drawings))

    def add(self, b: int, row: list[dict]) -> None:
        """Puts the samples of row b one after another."""
        at, view, drawing = 0, 0, 0
        for segment, item in enumerate(row, 1):
            self._text(b, at, segment, view, item)
            self._views(b, at, view, item)
            if "drawings" in item:
                self._draw(b, at, drawing, item)
                drawing += len(item["drawings"])
            at, view = at + len(item["tokens"]), view + len(item["cache"])

    def _text(self, b: int, at: int, segment: int, view: int, item: dict) -> None:
        here = (b, slice(at, at + len(item["tokens"])))
        for name, array in self.ints.items():
            if name in ("image_slots", "visual_targets"):  # those count from the row's first view
                moved = item[name] + view * self.tokens_per_view
                array[here] = np.where(item[name] >= 0, moved, item[name])
            elif name == "segments":
                array[here] = 1 if self.crossing else segment
            elif name == "positions" and self.crossing:
                array[here] = np.arange(here[1].start, here[1].stop)
            else:
                array[here] = item["source" if name == "sources" else name]

    def _views(self, b: int, at: int, view: int, item: dict) -> None:
        images, cached = self.images, item["cache"]
        here = (b, slice(view, view + len(cached)))
        images.valid[here], images.start[here] = True, item["view_starts"] + at
        into = images.pixels if images.features is None else images.features
        fresh = iter(item.get("pixels", ()))
        for k, row in enumerate(cached.tolist(), view):
            into[b, k] = self.cache_rows[row] if row >= 0 else next(fresh)

    def _draw(self, b: int, at: int, drawing: int, item: dict) -> None:
        here = (b, slice(drawing, drawing + len(item["drawings"])))
        self.drawings.valid[here] = True
        self.drawings.start[here] = item["drawing_starts"] + at
        into = self.drawings.pixels if self.drawings.latents is None else self.drawings.latents
        into[here] = item["drawings"]
        if self.drawings.captions is not None:
            self.drawings.captions[here] = item["captions"]


# Value of `Batch` fields where there is no sample.
EMPTY = {
    "tokens": 0, "positions": 0, "segments": 0, "text_targets": -1, "image_slots": TEXT,
    "visual_targets": -1, "sources": 0, "turns": 0,
}  # fmt: skip


def _no_drawings(rows: int, spec: DrawingSpec, cached: bool) -> Drawings:
    """Places for drawings, with the latents of a cache or with pixels."""
    places, side = (rows, spec.places), spec.preprocess.size
    pixels = latents = captions = None
    if cached and spec.latents is not None:
        latents = np.zeros((*places, *spec.latents.shape), np.float32)
    else:
        pixels = np.zeros((*places, side, side, 3), np.uint8)
    if spec.caption is not None:
        captions = np.zeros((*places, spec.caption_length), np.int32)
    return Drawings(
        valid=np.zeros(places, bool),
        start=np.zeros(places, np.int32),
        pixels=pixels,
        latents=latents,
        captions=captions,
    )


def assemble(
    rows: list[list[dict]],
    batch_rows: int,
    config: DataConfig,
    spec: InputSpec,
    cache_rows: np.ndarray | None = None,
    source_names: tuple[str, ...] = (),
) -> Batch:
    """The batch of at most `batch_rows` rows of items (see `SampleStream`); the rest is padding.

    `cache_rows` are the rows of the feature cache, or of the image cache, that items point to.
    """
    batch = _Assembly(batch_rows, config, spec, cache_rows)
    for b, row in enumerate(rows):
        batch.add(b, row)
    return Batch(
        **batch.ints, images=batch.images, drawings=batch.drawings, source_names=source_names
    )


class PackedIterator(grain.DatasetIterator):
    """Batches from a stream, checkpointable: a `recipe.DataStream`.

    The state names the samples in the open rows by their numbers; `set_state` reads those again.
    It is a small JSON-able dict, and does not depend on worker processes or threads.

    Args:
        stream: random access by number, see `SampleStream`.
        start: n -> iterator over `stream[n:]`, reading ahead as it likes.
        config, spec: options, and what the model decides.
        rows: of a batch.
        cache_rows: see `assemble`.
        layout: text that must be the same when a state is restored.

    Attributes:
        counts: bad samples so far, "source/reason" -> number; those of `USED` were used.
        samples: the stream.
        last_rows: numbers of the samples in each row of the batch that came last.
    """

    def __init__(
        self,
        stream,
        start: Callable[[int], Iterator[dict]],
        config: DataConfig,
        spec: InputSpec,
        rows: int,
        cache_rows: np.ndarray | None = None,
        layout: str = "",
    ):
        super().__init__()
        self.samples, self._start = stream, start
        self._config, self._spec, self._rows = config, spec, rows
        self._cache_rows, self._layout = cache_rows, layout
        self._names = [s.name for s in stream.sources]
        self._reset(0)

    def _reset(self, n: int) -> None:
        if getattr(self, "_items", None) is not None:
            getattr(self._items, "close", lambda: None)()
        self._items: Iterator[dict] | None = None
        self._next, self._bad_in_a_row = n, 0
        o = self._config.row
        if o.packing == "concat":
            self._packer = self._concat()
        else:
            kind = FirstFit if o.packing == "first_fit" else _OneEach
            self._packer = kind(row_limit(self._config, self._spec), o.open_rows)
        self._ready: list[list[dict]] = []
        self.counts: collections.Counter[str] = collections.Counter()

    def _concat(self) -> ConcatBySource:
        row, spec, around = self._config.row, self._spec, self.samples.chat.markers
        ids = spec.drawings is not None and spec.drawings.ids
        if spec.views.needs_size or spec.visual_targets or ids:
            raise ConfigError(
                'row.packing="concat" is for models that read every image as one view, and predict '
                "no visual tokens"
            )
        if spec.drawings is not None and spec.drawings.places < row.images:
            raise ConfigError(
                f"row.images is {row.images}, but a row has places for {spec.drawings.places} "
                'images to draw: row.packing="concat" needs one for each image'
            )
        before, after = len(around.before), len(spec.views.plan(None)[1]) + len(around.after)
        if before + after > row.length:
            raise ConfigError(f"row.length is {row.length}, but an image takes {before + after}")
        own = [source.documents for source in self._config.sources]
        return ConcatBySource([
            Concat(row.length, min(one.row_images or row.images, row.images),
                   one.cut_at or row.cut_at, before, after, spec.views.tokens)
            for one in own or [Documents()] * len(self._names)
        ])  # fmt: skip

    @property
    def sources(self) -> list[str]:
        """Names of the sources, in the order that `Batch.sources` counts them."""
        return list(self._names)

    @property
    def skipped(self) -> dict[str, int]:
        """`counts` as a plain dict."""
        return dict(self.counts)

    def sample_names(self) -> Callable[[], list[list[str]]]:
        """A function that names the samples in each row of the batch that came last."""
        rows, stream = self.last_rows, self.samples
        return lambda: [[stream.name(n) for n in row] for row in rows]

    @property
    def samples_seen(self) -> int:
        """How many samples of this host's stream were read, good or bad."""
        return self._next

    def __next__(self) -> Batch:
        self._assert_not_closed()
        if self._items is None:
            self._items = self._start(self._next)
        while len(self._ready) < self._rows:
            try:
                item = next(self._items)
            except StopIteration:
                self._ready += self._kept(self._packer.flush())
                if not self._ready and not self._config.order.padding_batches:
                    raise
                break
            self._next += 1
            self._ready += self._take(item)
        rows, self._ready = self._ready[: self._rows], self._ready[self._rows :]
        self.last_rows = [[int(item["index"]) for item in row] for row in rows]
        names = tuple(self._names)
        return assemble(rows, self._rows, self._config, self._spec, self._cache_rows, names)

    def _take(self, item: dict) -> list[list[dict]]:
        name = self._names[item["source"]]
        if "bad" in item:
            self.counts[f"{name}/{item['bad']}"] += 1
            self._bad_in_a_row += 1
            if self._bad_in_a_row >= self._config.reading.max_bad_in_a_row:
                table = ", ".join(f"{k}: {v}" for k, v in self.counts.most_common())
                raise TooManyBadSamples(
                    f"{self._bad_in_a_row} bad samples in a row; the last is number "
                    f"{item['index']} of source {name}: {item['bad']} ({item['detail']}). So far: "
                    f"{table}. `metamorph data check` lists what is wrong."
                )
            return []
        self._bad_in_a_row = 0
        for note in USED:
            if item.get(note):
                self.counts[f"{name}/{note}"] += int(item[note])
        if self._config.row.packing == "concat":
            return self._kept(self._packer.add(item))
        return self._packer.add(item, _size(item))

    def _kept(self, rows: list[list[dict]]) -> list[list[dict]]:
        """The rows without those of "concat" that have no image, which are counted."""
        if self._config.row.packing != "concat":
            return rows
        kept = [row for row in rows if any(len(item["view_starts"]) for item in row)]
        if len(kept) < len(rows):
            self.counts["rows/without_images"] += len(rows) - len(kept)
        return kept

    def get_state(self) -> dict:
        def number(item):
            return [int(item["index"]), *item["piece"]] if "piece" in item else int(item["index"])

        def numbers(rows):
            return [[number(item) for item in row] for row in rows]

        return {
            "next": self._next,
            "open": numbers(self._packer.rows),
            "ready": numbers(self._ready),
            "bad_in_a_row": self._bad_in_a_row,
            "counts": dict(self.counts),
            "layout": self._layout,
        }

    def set_state(self, state: dict) -> None:
        if state["layout"] != self._layout:
            raise DataError(
                "the data or the batch layout changed since the checkpoint was written:\n"
                f"  checkpoint: {state['layout']}\n  now:        {self._layout}"
            )
        self._reset(int(state["next"]))
        self._ready = [[self._again(n) for n in row] for row in state["ready"]]
        self._packer.restore([[self._again(n) for n in row] for row in state["open"]])
        self._bad_in_a_row = int(state["bad_in_a_row"])
        self.counts = collections.Counter(state["counts"])

    def _again(self, number: int | list[int]) -> dict:
        """The sample of this number, or [number, first and last column of] a part of one."""
        n, *piece = number if isinstance(number, list) else [number]
        item = self.samples[n]
        if "bad" in item:
            raise DataError(f"sample {n} was good before the checkpoint, now: {item['detail']}")
        return part(item, *piece, self._spec.views.tokens) if piece else item

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._items is not None:
            getattr(self._items, "close", lambda: None)()


class PackedDataset(grain.IterDataset):
    """`PackedIterator` as a Grain dataset; arguments as there."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self._args, self._kwargs = args, kwargs

    def __iter__(self) -> PackedIterator:
        return PackedIterator(*self._args, **self._kwargs)

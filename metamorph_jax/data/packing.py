"""First-fit packing of samples into rows [B, L] with at most I pictures each.

A sample is never split, so neither is a picture. A few rows stay open; a sample goes into the first
one that has room for its positions, pictures and visual targets. When none has, the fullest row is
closed and a new one opened. `mode="pad"` puts one sample into each row, as the references do.

Grain's own first-fit packing bounds every feature on its own as well, but closes all rows at once
and would need the visual tokens as a feature to be cut; here a picture must come whole, with its
slots renumbered, so the rows are kept by hand.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator

import grain
import numpy as np

from metamorph_jax.errors import TooManyBadSamples
from metamorph_jax.types import Batch, Images


@dataclasses.dataclass(frozen=True)
class PackOptions:
    """Shapes of the batches.

    Attributes:
        batch_size, length, images_per_row, tokens_per_image: B, L, I, P.
        mode: "first_fit" or "pad".
        open_rows: rows kept open.
        pixel_shape: (h, w, 3), or None for no pixels.
        feature_width: C, or None for no features.
        turns: whether batches carry `turns`.
        side: "right" or "left", where the padding goes.
        padding_batches: after the last sample of a finite stream, go on with empty batches (hosts
            must make the same number of steps).
        max_bad_in_a_row: bad samples one after another before it is an error.
        visual_targets_per_row: most positions of a row that predict visual tokens; 0 for no limit.
    """

    batch_size: int
    length: int
    images_per_row: int
    tokens_per_image: int
    mode: str = "first_fit"
    open_rows: int = 16
    pixel_shape: tuple[int, int, int] | None = None
    feature_width: int | None = None
    turns: bool = False
    side: str = "right"
    padding_batches: bool = False
    max_bad_in_a_row: int = 100
    visual_targets_per_row: int = 0

    def __post_init__(self):
        if self.mode not in ("first_fit", "pad"):
            raise ValueError(f"packing mode {self.mode!r}: expected first_fit or pad")
        if self.side not in ("left", "right"):
            raise ValueError(f"padding side {self.side!r}: expected left or right")


class FirstFit:
    """The open rows. An item is anything with positions, pictures and visual targets to count.

    Args:
        length, images, targets: most of these in a row; 0 targets for no limit.
        open_rows: rows kept open.
    """

    def __init__(self, length: int, images: int, open_rows: int, targets: int = 0):
        self.length, self.images, self.targets = length, images, targets or length
        self.open_rows = max(open_rows, 1)
        self.rows: list[list] = []
        self.used: list[list[int]] = []  # [positions, pictures, visual targets] of each open row
        self._full = length - length // 256  # a row this full isn't worth keeping open

    def add(self, item, positions: int, pictures: int, targets: int = 0) -> list[list]:
        """Places the item; returns the rows that were closed on the way."""
        if positions > self.length or pictures > self.images or targets > self.targets:
            raise ValueError(
                f"a sample of {positions} positions, {pictures} pictures and {targets} visual "
                f"targets does not fit into a row of {self.length}, {self.images} and "
                f"{self.targets}"
            )
        closed = []
        room = (
            r
            for r, (p, i, t) in enumerate(self.used)
            if p + positions <= self.length
            and i + pictures <= self.images
            and t + targets <= self.targets
        )
        row = next(room, None)
        if row is None:
            if len(self.rows) >= self.open_rows:
                closed.append(self._close(max(range(len(self.used)), key=lambda r: self.used[r])))
            row = len(self.rows)
            self.rows.append([])
            self.used.append([0, 0, 0])
        self.rows[row].append(item)
        self.used[row][0] += positions
        self.used[row][1] += pictures
        self.used[row][2] += targets
        if self.used[row][0] >= self._full:
            closed.append(self._close(row))
        return closed

    def _close(self, row: int) -> list:
        del self.used[row]
        return self.rows.pop(row)

    def flush(self) -> list[list]:
        """Closes all rows."""
        rows, self.rows, self.used = self.rows, [], []
        return rows


class _OneEach(FirstFit):
    """Parity with the references: a row is one sample."""

    def add(self, *args) -> list[list]:
        return super().add(*args) + self.flush()


def _sizes(item: dict) -> tuple[int, int, int]:
    """Positions, pictures and visual targets of an item of a `SampleStream`."""
    targets = int((item["visual_targets"] >= 0).sum())
    return len(item["tokens"]), len(item["cache"]), targets


def assemble(
    rows: list[list[dict]],
    o: PackOptions,
    cache_rows: np.ndarray | None = None,
    source_names: tuple[str, ...] = (),
) -> Batch:
    """The batch of at most B rows of items (see `SampleStream`); missing rows are padding.

    `cache_rows` are the rows of the feature cache, or of the picture cache, that items point to.
    """
    B, L, I, P = o.batch_size, o.length, o.images_per_row, o.tokens_per_image
    ints = {n: np.zeros((B, L), np.int32) for n in ("tokens", "positions", "segments", "sources")}
    for name in ("text_targets", "image_slots", "visual_targets"):
        ints[name] = np.full((B, L), -1, np.int32)
    if o.turns:
        ints["turns"] = np.zeros((B, L), np.int32)
    valid, start = np.zeros((B, I), bool), np.zeros((B, I), np.int32)
    pixels = None if o.pixel_shape is None else np.zeros((B, I, *o.pixel_shape), np.uint8)
    features = None
    if o.feature_width is not None:
        features = np.zeros((B, I, P, o.feature_width), np.float32)
    for b, row in enumerate(rows):
        at = L - sum(len(item["tokens"]) for item in row) if o.side == "left" else 0
        picture = 0
        for segment, item in enumerate(row, 1):
            n = len(item["tokens"])
            here = (b, slice(at, at + n))
            ints["tokens"][here] = item["tokens"]
            ints["positions"][here] = item["positions"]
            ints["segments"][here] = segment
            ints["sources"][here] = item["source"]
            ints["text_targets"][here] = item["text_targets"]
            for name in ("image_slots", "visual_targets"):
                ints[name][here] = np.where(item[name] >= 0, item[name] + picture * P, -1)
            if o.turns and "turns" in item:
                ints["turns"][here] = item["turns"]
            fresh = 0
            slots = item["image_slots"]
            for k, cached in enumerate(item["cache"].tolist()):
                valid[b, picture] = True
                start[b, picture] = at + int(np.argmax(slots == k * P))
                if features is not None:
                    features[b, picture] = cache_rows[cached]
                elif pixels is not None and cached >= 0:
                    pixels[b, picture] = cache_rows[cached]
                elif pixels is not None:
                    pixels[b, picture] = item["pixels"][fresh]
                    fresh += 1
                picture += 1
            at += n
    images = Images(valid, start, pixels, features)
    return Batch(**ints, images=images, source_names=source_names)


class PackedIterator(grain.DatasetIterator):
    """Batches from a stream, checkpointable.

    The state names the samples in the open rows by their numbers; `set_state` reads those again.
    It is a small JSON-able dict, and does not depend on worker processes or threads.

    Args:
        stream: random access by number, see `SampleStream`.
        start: n -> iterator over `stream[n:]`, reading ahead as it likes.
        options: shapes.
        cache_rows: see `assemble`.
        layout: text that must be the same when a state is restored.

    Attributes:
        counts: bad samples so far, "source/reason" -> number; "source/misnamed" were used.
        last_rows: numbers of the samples in each row of the batch that came last.
    """

    def __init__(
        self,
        stream,
        start: Callable[[int], Iterator[dict]],
        options: PackOptions,
        cache_rows: np.ndarray | None = None,
        layout: str = "",
    ):
        super().__init__()
        self._stream, self._start, self._o = stream, start, options
        self._cache_rows, self._layout = cache_rows, layout
        self._names = [s.name for s in stream.sources]
        self._reset(0)

    def _reset(self, n: int) -> None:
        o = self._o
        if getattr(self, "_items", None) is not None:
            getattr(self._items, "close", lambda: None)()
        self._items: Iterator[dict] | None = None
        self._next, self._bad_in_a_row = n, 0
        kind = FirstFit if o.mode == "first_fit" else _OneEach
        self._packer = kind(o.length, o.images_per_row, o.open_rows, o.visual_targets_per_row)
        self._ready: list[list[dict]] = []
        self.counts: collections.Counter[str] = collections.Counter()

    @property
    def source_names(self) -> list[str]:
        """Names of the sources, in the order that `Batch.sources` counts them."""
        return list(self._names)

    @property
    def samples_seen(self) -> int:
        """How many samples of this host's stream were read, good or bad."""
        return self._next

    def __next__(self) -> Batch:
        self._assert_not_closed()
        o = self._o
        if self._items is None:
            self._items = self._start(self._next)
        while len(self._ready) < o.batch_size:
            try:
                item = next(self._items)
            except StopIteration:
                self._ready += self._packer.flush()
                if not self._ready and not o.padding_batches:
                    raise
                break
            self._next += 1
            self._ready += self._take(item)
        rows, self._ready = self._ready[: o.batch_size], self._ready[o.batch_size :]
        self.last_rows = [[int(item["index"]) for item in row] for row in rows]
        return assemble(rows, o, self._cache_rows, tuple(self._names))

    def _take(self, item: dict) -> list[list[dict]]:
        name = self._names[item["source"]]
        if "bad" in item:
            self.counts[f"{name}/{item['bad']}"] += 1
            self._bad_in_a_row += 1
            if self._bad_in_a_row >= self._o.max_bad_in_a_row:
                table = ", ".join(f"{k}: {v}" for k, v in self.counts.most_common())
                raise TooManyBadSamples(
                    f"{self._bad_in_a_row} bad samples in a row; the last is number "
                    f"{item['index']} of source {name}: {item['bad']} ({item['detail']}). So far: "
                    f"{table}. `metamorph data check` lists what is wrong."
                )
            return []
        self._bad_in_a_row = 0
        if item.get("misnamed"):
            self.counts[f"{name}/misnamed"] += int(item["misnamed"])
        return self._packer.add(item, *_sizes(item))

    def get_state(self) -> dict:
        def numbers(rows):
            return [[int(item["index"]) for item in row] for row in rows]

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
            raise ValueError(
                "the data or the batch layout changed since the checkpoint was written:\n"
                f"  checkpoint: {state['layout']}\n  now:        {self._layout}"
            )
        self._reset(int(state["next"]))
        self._ready = [[self._again(n) for n in row] for row in state["ready"]]
        for numbers in state["open"]:
            row = [self._again(n) for n in numbers]
            self._packer.rows.append(row)
            self._packer.used.append([sum(s) for s in zip(*map(_sizes, row), strict=True)])
        self._bad_in_a_row = int(state["bad_in_a_row"])
        self.counts = collections.Counter(state["counts"])

    def _again(self, n: int) -> dict:
        item = self._stream[n]
        if "bad" in item:
            raise ValueError(f"sample {n} was good before the checkpoint, now: {item['detail']}")
        return item

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

"""First-fit packing of samples into rows [B, L] with at most I pictures each.

A sample is never split, so neither is a picture. A few rows stay open; a sample goes into the first
one that has room for its positions, pictures and visual targets. When none has, the fullest row is
closed and a new one opened. `packing = "pad"` puts one sample into each row, as the references do.

Grain's own first-fit packing bounds every feature on its own as well, but closes all rows at once
and would need the visual tokens as a feature to be cut; here a picture must come whole, with its
slots renumbered, so the rows are kept by hand.
"""

import collections
from collections.abc import Callable, Iterator

import grain
import numpy as np

from metamorph_jax.data.config import DataConfig, InputSpec
from metamorph_jax.errors import TooManyBadSamples
from metamorph_jax.types import Batch, Images


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
    batch_rows: int,
    config: DataConfig,
    spec: InputSpec,
    cache_rows: np.ndarray | None = None,
    source_names: tuple[str, ...] = (),
) -> Batch:
    """The batch of at most `batch_rows` rows of items (see `SampleStream`); the rest is padding.

    `cache_rows` are the rows of the feature cache, or of the image cache, that items point to.
    """
    B, L, I, P = batch_rows, config.row.length, config.row.images, spec.views.tokens
    turns = config.row.independent_turns
    ints = {n: np.zeros((B, L), np.int32) for n in ("tokens", "positions", "segments", "sources")}
    for name in ("text_targets", "image_slots", "visual_targets"):
        ints[name] = np.full((B, L), -1, np.int32)
    if turns:
        ints["turns"] = np.zeros((B, L), np.int32)
    valid, start = np.zeros((B, I), bool), np.zeros((B, I), np.int32)
    pixels = features = None
    if config.cache.features:
        features = np.zeros((B, I, P, spec.feature_width), np.float32)
    else:
        side = config.images.change(spec.views.preprocess).size
        pixels = np.zeros((B, I, side, side, 3), np.uint8)
    for b, row in enumerate(rows):
        at = image = 0
        for segment, item in enumerate(row, 1):
            n = len(item["tokens"])
            here = (b, slice(at, at + n))
            ints["tokens"][here] = item["tokens"]
            ints["positions"][here] = item["positions"]
            ints["segments"][here] = segment
            ints["sources"][here] = item["source"]
            ints["text_targets"][here] = item["text_targets"]
            for name in ("image_slots", "visual_targets"):
                ints[name][here] = np.where(item[name] >= 0, item[name] + image * P, -1)
            if turns and "turns" in item:
                ints["turns"][here] = item["turns"]
            fresh = 0
            slots = item["image_slots"]
            for k, cached in enumerate(item["cache"].tolist()):
                valid[b, image] = True
                start[b, image] = at + int(np.argmax(slots == k * P))
                if features is not None:
                    features[b, image] = cache_rows[cached]
                elif cached >= 0:
                    pixels[b, image] = cache_rows[cached]
                else:
                    pixels[b, image] = item["pixels"][fresh]
                    fresh += 1
                image += 1
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
        config, spec: options, and what the model decides.
        rows: of a batch.
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
        config: DataConfig,
        spec: InputSpec,
        rows: int,
        cache_rows: np.ndarray | None = None,
        layout: str = "",
    ):
        super().__init__()
        self._stream, self._start = stream, start
        self._config, self._spec, self._rows = config, spec, rows
        self._cache_rows, self._layout = cache_rows, layout
        self._names = [s.name for s in stream.sources]
        self._reset(0)

    def _reset(self, n: int) -> None:
        o = self._config.row
        if getattr(self, "_items", None) is not None:
            getattr(self._items, "close", lambda: None)()
        self._items: Iterator[dict] | None = None
        self._next, self._bad_in_a_row = n, 0
        kind = FirstFit if o.packing == "first_fit" else _OneEach
        self._packer = kind(o.length, o.images, o.open_rows, self._spec.visual_targets)
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
        if self._items is None:
            self._items = self._start(self._next)
        while len(self._ready) < self._rows:
            try:
                item = next(self._items)
            except StopIteration:
                self._ready += self._packer.flush()
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

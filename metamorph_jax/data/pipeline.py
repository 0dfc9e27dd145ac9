"""From a config to an iterator of `Batch`.

    files → SampleStream (random access, all randomness by sample number)
          → Grain: MapDataset.source → slice → to_iter_dataset (threads) → mp_prefetch (processes)
          → PackedIterator → Batch

Every data shard of a run (`train/shards.py`) reads its own share and packs its own rows.
"""

import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence

import grain
import jax
import numpy as np

from metamorph_jax import files as text_files
from metamorph_jax import paths
from metamorph_jax.data import cache as caches
from metamorph_jax.data.chat import Chat
from metamorph_jax.data.config import (
    DataConfig,
    InputConfig,
    InputSpec,
    ReadingConfig,
    SourceConfig,
)
from metamorph_jax.data.grouping import Grouped, word_counts
from metamorph_jax.data.packing import PackedDataset, PackedIterator, assemble
from metamorph_jax.data.sources import RecordSource, open_records, shards
from metamorph_jax.data.sources.base import ImageRef
from metamorph_jax.data.sources.kinds import Files, Kind, known
from metamorph_jax.data.stream import Mixture, SampleStream, choices
from metamorph_jax.data.views import Single
from metamorph_jax.errors import BadSample, ConfigError, DataError, WorkerError
from metamorph_jax.recipe import Shard
from metamorph_jax.types import Batch

__all__ = [
    "DataConfig", "InputConfig", "InputSpec", "SourceConfig", "all_refs", "make_pipeline",
    "fill_drawing_cache", "fill_feature_cache", "make_stream", "open_cache", "open_sources",
    "source_names",
]  # fmt: skip


def source_names(config: InputConfig) -> tuple[str, ...]:
    """Names of the sources: their own or their file's, made unique."""
    names: list[str] = []
    for s in config.sources:
        own = name = s.name or os.path.splitext(os.path.basename(s.path))[0]
        number = len(names)
        while name in names:
            name, number = f"{own}_{number}", number + 1
        names.append(name)
    return tuple(names)


def open_sources(
    config: InputConfig, kinds: Mapping[str, Kind] | None = None
) -> list[RecordSource]:
    """Readers of all sources; `kinds` are the recipe's own, besides those of `sources/kinds.py`.

    Raises:
        ConfigError: there are none, or one names a kind that does not exist.
        FileError, DataError: a file is missing or not what its name says, or holds no records.
    """
    if not config.sources:
        raise ConfigError("config.data.sources is empty")
    table, out = known(kinds or {}), []
    for s, name in zip(config.sources, source_names(config), strict=True):
        if s.kind != "auto" and s.kind not in table:
            raise ConfigError(
                f"config.data.sources: {name} is of kind {s.kind!r}, expected one of auto, "
                f"{', '.join(table)}"
            )
        key = f"config.data.sources.{name}"
        parts = [paths.local(f"{key}.path", part, slash=True) for part in s.path.split(",")]
        root = paths.local(f"{key}.root", s.root, slash=True) if s.root else ""
        root = root or os.path.dirname(os.path.abspath(parts[0]))
        files = Files(root, config.frames, s.documents, blocked=_blocked(key, s.blocked))
        records = _records(",".join(parts), table.get(s.kind), config.reading.index_dir or None)
        ignore = tuple(key.strip() for key in s.ignore.split(","))
        most = config.images.max_images
        front = config.images_in_front
        mirror = config.images.mirror
        out.append(RecordSource(name, records, files, s.kind, most, table, ignore, front, mirror))
    return out


def _records(path: str, kind: Kind | None, index_dir: str | None):
    """The reader of a source's files: that of its kind, or the one that their names ask for."""
    if kind is None or kind.open is None:
        return open_records(path, index_dir)
    open_one = lambda file: kind.open(file, index_dir)  # noqa: E731
    found = shards.open_all(path, open_one) if shards.is_pattern(path) else open_one(path)
    if not len(found):
        raise DataError(f"{text_files.shown(path)} holds no records")
    return found


def _blocked(key: str, path: str) -> frozenset[str]:
    """The paths of images in a source's file of those that no sample may use."""
    if not path:
        return frozenset()
    lines = text_files.read_text(paths.local(f"{key}.blocked", path, slash=True)).splitlines()
    return frozenset(line.strip() for line in lines if line.strip())


def all_refs(
    config: InputConfig,
    sources: Sequence,
    counts: MutableMapping[str, int] | None = None,
    answers: bool = False,
) -> Iterator[ImageRef]:
    """Every image that a run with fixed choices can ask for: what a cache has to hold.

    Bad samples are passed over, as the run will skip them too. `counts` gets their number by
    "source/reason". With `answers`, only images in answers, which may be drawn.
    """
    for number, source in enumerate(sources):
        for k in range(len(source)):
            rng = choices(config.order.seed, number, 0, k)
            try:
                sample = source.sample(k, rng)
                yield from sample.images if not answers else sample.answer_images
            except (BadSample, OSError, ValueError, KeyError, TypeError, IndexError) as e:
                reason = e.reason if isinstance(e, BadSample) else f"error_{type(e).__name__}"
                if counts is not None:
                    name = f"{source.name}/{reason}"
                    counts[name] = counts.get(name, 0) + 1


def make_stream(
    config: DataConfig,
    spec: InputSpec,
    chat: Chat,
    sources: Sequence,
    process: tuple[int, int] = (0, 1),
    rows: int = 1,
) -> SampleStream:
    """The samples of one data shard, `process` = (index, count), with `rows` of every batch; see
    `make_pipeline`."""
    _check_images(config, spec)
    _check_frames(config, spec, chat)
    mixture = _mixture(config, sources, rows, process[1])
    cache, drawings = open_cache(config, spec), open_drawing_cache(config, spec)
    return SampleStream(sources, chat, config, spec, mixture, process, cache, drawings)


def _mixture(config: InputConfig, sources: Sequence, rows: int, shards: int) -> Mixture | Grouped:
    """Which sample comes when."""
    sizes, weights = [len(s) for s in sources], [s.weight for s in config.sources]
    if config.order.grouping == "modality":
        words = word_counts(sources, config.reading.index_dir)
        return Grouped(words, sizes, config.order.seed, rows, shards)
    if config.order.shares == "sqrt_size":
        weights = [math.sqrt(size) for size in sizes]
    given = weights if any(weights) else None
    return Mixture(sizes, given, config.order.seed, config.order.shuffle)


_OF_TOWER = {"size": "image_size"}  # field of `Preprocess` -> of the tower's config


def _check_frames(config: DataConfig, spec: InputSpec, chat: Chat) -> None:
    """Raises ConfigError where the frames of a video would leave no position for its question."""
    if spec.views.needs_size or not config.images.max_frames:
        return
    each = len(spec.views.plan(None)[1]) + len(chat.markers.before) + len(chat.markers.after)
    taken, row = each * config.images.max_frames, config.row
    if taken >= row.longest:
        name = "sample_length" if row.sample_length else "length"
        raise ConfigError(
            f"config.data.images.max_frames is {config.images.max_frames}: these frames take "
            f"{taken} positions, but row.{name} is {getattr(row, name)}, so that longer videos "
            "would be cut before their question"
        )


def _check_images(config: InputConfig, spec: InputSpec) -> None:
    """Raises ConfigError where the config contradicts the tower, which scales pixels by its own."""
    given, own = config.images.change(spec.views).preprocess, spec.views.preprocess
    for name in ("size", "mean", "std") if spec.tower else ():
        ours, theirs = getattr(given, name), getattr(own, name)
        if np.any(np.asarray(ours) != np.asarray(theirs)):
            usual, option = "0" if name == "size" else "None", _OF_TOWER.get(name, name)
            raise ConfigError(
                f"config.data.images.{name} is {ours}, but the model's tower takes {theirs}: leave "
                f"it out (--config.data.images.{name}={usual}), or give the tower the same (its "
                f"tower_options.{option})"
            )


def open_cache(config: InputConfig, spec: InputSpec) -> caches.ArrayCache | None:
    """The cache that the config names, which must exist.

    Where the model has no tower of its own, `cache.features` is the folder of one cache
    ("…/features-0a1b…"); otherwise it holds a folder for each tower.
    """
    views = config.images.change(spec.views)
    if config.cache.features and not spec.tower:
        return caches.ArrayCache(config.cache.features, shape=spec.feature_shape)
    if config.cache.features:
        wanted = caches.feature_spec(views, spec, config.images.background)
        return caches.ArrayCache(wanted.folder(config.cache.features), wanted)
    if config.cache.images:
        wanted = caches.image_spec(views, config.images.background)
        return caches.ArrayCache(wanted.folder(config.cache.images), wanted)
    return None


def open_drawing_cache(config: InputConfig, spec: InputSpec) -> caches.ArrayCache | None:
    """The cache of moments that the config names, which must exist.

    Raises:
        ConfigError: nothing is drawn, or not by an autoencoder.
    """
    if not config.cache.drawings:
        return None
    wanted = _moment_spec(config, spec)
    return caches.ArrayCache(wanted.folder(config.cache.drawings), wanted)


def _moment_spec(config: InputConfig, spec: InputSpec) -> caches.CacheSpec:
    if spec.drawings is None or spec.drawings.latents is None:
        raise ConfigError(
            "config.data.cache.drawings holds moments of an autoencoder, but this model draws "
            'nothing by one: set the folder to ""'
        )
    return caches.moment_spec(spec.drawings, config.images.background)


def fill_drawing_cache(
    config: InputConfig,
    spec: InputSpec,
    sources: Sequence,
    make_compute: Callable[[], Callable[[np.ndarray], np.ndarray]],
    batch_size: int = 8,
) -> None:
    """Runs the autoencoder over all images to draw that `config.cache.drawings` lacks.

    `make_compute()` gives pixels uint8[n, h, w, 3] -> moments float32[n, h', w', 2c] (mean,
    logvar), of pixels scaled to [-1, 1]; it is called only if an image is missing.
    """
    caches.build(
        config.cache.drawings,
        _moment_spec(config, spec),
        all_refs(config, sources, answers=True),
        Single(1, spec.drawings.preprocess),
        _when_asked(make_compute),
        batch_size,
        max_pixels=config.images.max_pixels,
        background=config.images.background,
    )


def _when_asked(make: Callable[[], Callable]) -> Callable[[np.ndarray], np.ndarray]:
    """`make()`, called when it is first needed."""
    made: list = []

    def compute(pixels: np.ndarray) -> np.ndarray:
        if not made:
            made.append(make())
        return made[0](pixels)

    return compute


def fill_feature_cache(
    config: InputConfig,
    spec: InputSpec,
    sources: Sequence,
    make_compute: Callable[[], Callable[[np.ndarray], np.ndarray]],
    batch_size: int = 32,
) -> None:
    """Runs the tower over all images of the sources that `config.cache.features` lacks.

    `make_compute()` is the tower as `cache.build` takes it, called only if an image is missing.
    """
    views = config.images.change(spec.views)
    caches.build(
        config.cache.features,
        caches.feature_spec(views, spec, config.images.background),
        all_refs(config, sources),
        views,
        _when_asked(make_compute),
        batch_size,
        max_pixels=config.images.max_pixels,
        background=config.images.background,
    )


def make_pipeline(
    config: DataConfig,
    spec: InputSpec,
    chat: Chat,
    sources: Sequence,
    shard: Shard,
) -> PackedIterator:
    """An iterator of `Batch` for one data shard of a run.

    It has `get_state()` / `set_state(state)` (a JSON-able dict, bit-exact), `counts` (bad samples
    by "source/reason"), `close()`, and can be given to Orbax as a checkpointable.

    Args:
        config: everything about input that the user decides.
        spec: what the model decides.
        chat: writes conversations as ids.
        sources: as `open_sources` makes them, or other objects with `name`, `len` and
            `sample(k, rng) -> Sample`, in the order of config.sources.
        shard: rows of a batch, and which share of the samples it is packed from.

    Returns:
        The iterator.
    """
    stream = make_stream(config, spec, chat, sources, (shard.index, shard.count), shard.rows)
    reader = _Reader(stream, config.reading)
    rows = None if stream.cache is None else stream.cache.rows
    layout = _layout(stream, shard)
    return iter(PackedDataset(stream, reader, config, spec, shard.rows, rows, layout))


def batch_spec(config: DataConfig, spec: InputSpec, rows: int) -> Batch:
    """Shapes of the batches that `make_pipeline` makes, from the configs alone."""
    one = assemble([], 1, config, spec, source_names=source_names(config))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), one)


class _Reader:
    """n -> iterator over stream[n:], by threads here or in worker processes; always in order."""

    def __init__(self, stream: SampleStream, config: ReadingConfig):
        self.stream, self.config = stream, config

    def __call__(self, n: int):
        return _Restarting(self._read, n) if self.config.workers else self._read(n)

    def _read(self, n: int):
        if n >= len(self.stream):
            return iter(())
        threads, ahead = self.config.threads, self.config.ahead
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        rest = grain.MapDataset.source(_From(self.stream, n)).to_iter_dataset(options)
        if self.config.workers:
            _parse_flags()
            rest = rest.mp_prefetch(
                grain.MultiprocessingOptions(self.config.workers, per_worker_buffer_size=ahead)
            )
        return iter(rest)


class _Restarting:
    """Continues with new worker processes when one has died (for lack of memory, say).

    Args:
        read: n -> iterator from sample n.
        n: where to begin.
        most: this many deaths without a sample in between end the run.
    """

    def __init__(self, read, n: int, most: int = 3):
        self._read, self._next, self._most = read, n, most
        self._deaths, self._items = 0, read(n)

    def __iter__(self):
        return self

    def __next__(self):
        while True:
            try:
                item = next(self._items)
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):
                    raise
                self._deaths += 1
                if self._deaths >= self._most:
                    raise WorkerError(
                        f"an input worker process died {self._deaths} times at sample "
                        f"{self._next} ({error}); memory? Try fewer data.reading.workers"
                    ) from error
                print(f"an input worker process died, restarting at sample {self._next}: {error}",
                      file=sys.stderr, flush=True)  # fmt: skip
                self.close()
                self._items = self._read(self._next)
                continue
            self._next, self._deaths = self._next + 1, 0
            return item

    def close(self) -> None:
        getattr(self._items, "close", lambda: None)()


class _From:
    """stream[n:] as a Grain random-access source."""

    def __init__(self, stream: SampleStream, n: int):
        self.stream, self.n = stream, n

    def __len__(self) -> int:
        return len(self.stream) - self.n

    def __getitem__(self, i) -> dict:
        return self.stream[self.n + int(i)]


def _parse_flags() -> None:
    """Grain's worker processes need parsed absl flags, which a notebook or a test lacks."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _layout(stream: SampleStream, shard: Shard) -> str:
    """What a checkpointed state depends on: options, sizes of the sources, the tokenizer.

    Left out is what changes no row: how files are read, caches, and `InputSpec.visual_targets`,
    which a run can't change anyway.
    """
    config = stream.config
    order = dataclasses.asdict(config.order)
    del order["padding_batches"]
    probe = stream.chat.conversation((("user", "Aa 1 <image>?"), ("assistant", "Zebra, 27.")))
    options = {
        "row": dataclasses.asdict(config.row),
        "order": order | {"fixed_choices": stream.fixed_choices},
        "images": dataclasses.asdict(config.images),
        "views": dataclasses.asdict(stream.spec.views),
        "sources": [
            (s.name, len(s), c.weight, c.kind, dataclasses.asdict(c.documents))
            for s, c in zip(stream.sources, config.sources, strict=True)
        ],
        "rows": shard.rows,
        "process": stream.process,
        "tokens": hashlib.sha256(np.ascontiguousarray(probe.ids).tobytes()).hexdigest()[:12],
    }
    return json.dumps(options, sort_keys=True)

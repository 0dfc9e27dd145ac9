"""From a config to an iterator of `Batch`.

    files → SampleStream (random access, all randomness by sample number)
          → Grain: MapDataset.source → slice → to_iter_dataset (threads) → mp_prefetch (processes)
          → PackedIterator → Batch

Every process of a multi-host run reads its own share and packs its own rows.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence

import grain
import numpy as np

from metamorph_jax.data import cache as caches
from metamorph_jax.data import images
from metamorph_jax.data.chat import Chat
from metamorph_jax.data.packing import PackedDataset, PackedIterator, PackOptions
from metamorph_jax.data.sources import RecordSource, open_records
from metamorph_jax.data.stream import Mixture, RowOptions, SampleStream


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One file of samples.

    Attributes:
        path: .json, .jsonl, .arrayrecord or tfds:NAME/SPLIT.
        name: name in metrics; the file's name if empty.
        root: folder of the pictures, which no path may leave; the file's folder if empty.
        weight: share in the mixture (with all 0: every record once an epoch).
        kind: "auto", or one of `sources.kinds.KINDS` for all records.
    """

    path: str
    name: str = ""
    root: str = ""
    weight: float = 0.0
    kind: str = "auto"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Everything about input.

    Attributes:
        sources: the files.
        template: chat template (`chat.TEMPLATES`); system: "default", "" for none, or a text.
        single_bos: one BOS instead of the reference's two (llama3).
        batch_size: rows of this process; length, images_per_row, tokens_per_image: L, I, P. A
            sample of more than I pictures is skipped. On a mixture like MetaMorph's, rows of 4096
            are 99.7 % full with I = 24 (81 % of the picture places too), but 81 % with I = 16.
        visual_targets_per_row: most positions of a row that predict visual tokens, 0 for no limit;
            a sample of more is skipped. The recipe sets it from the model's max_visual_targets.
        packing: "first_fit" or "pad" (one sample a row, as the references do); open_rows for the
            first.
        independent_turns: question and answer k sees the leading pictures and itself only.
        mask_dangling_start: no label for a start token whose picture was cut.
        seed, shuffle, epochs: order of the samples; 0 epochs is endless.
        workers: processes; read_threads, read_ahead: threads and samples read ahead in each.
        image_size, image_mode, image_resize, image_mean, image_std: see `images.Preprocess`.
        max_images: more in one sample is bad; max_frames: frames taken of a video; max_pixels.
        picture_cache, feature_cache: folders of caches, "" for none; feature_width: C, and tower:
            what made the features (see `cache.feature_spec`), for the latter.
        fixed_choices: draw wording and frames once for each sample, not anew in every epoch. Always
            on with a feature cache, which has to hold every frame that is drawn.
        max_bad_in_a_row: bad samples before it is an error.
        padding_batches: go on with empty batches after the last epoch.
        index_dir: where byte-offset indices of JSONL files go; beside the file if empty.
    """

    sources: tuple[SourceConfig, ...]
    template: str = "llama3"
    system: str = "default"
    single_bos: bool = False
    batch_size: int = 1
    length: int = 4096
    images_per_row: int = 24
    tokens_per_image: int = 64
    visual_targets_per_row: int = 0
    packing: str = "first_fit"
    open_rows: int = 16
    independent_turns: bool = False
    mask_dangling_start: bool = False
    seed: int = 42
    shuffle: bool = True
    epochs: int = 0
    workers: int = 0
    read_threads: int = 2
    read_ahead: int = 32
    image_size: int = 384
    image_mode: str = "square"
    image_resize: int | None = None
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    max_images: int = 70
    max_frames: int = 45
    max_pixels: int = images.MAX_PIXELS
    picture_cache: str = ""
    feature_cache: str = ""
    feature_width: int = 0
    tower: str = ""
    fixed_choices: bool = False
    max_bad_in_a_row: int = 100
    padding_batches: bool = False
    index_dir: str = ""

    def __post_init__(self):
        if not self.sources:
            raise ValueError("data.sources is empty")
        weights = [s.weight for s in self.sources]
        if min(weights) < 0 or (max(weights) > 0 and min(weights) == 0):
            raise ValueError(f"source weights must be all positive or all 0, got {weights}")

    @property
    def preprocess(self) -> images.Preprocess:
        return images.Preprocess(
            self.image_size,
            self.image_mode,
            self.image_resize,
            mean=tuple(self.image_mean),
            std=tuple(self.image_std),
        )

    @property
    def feature_spec(self) -> caches.CacheSpec:
        if not (self.feature_width and self.tower):
            raise ValueError("data.feature_cache needs data.feature_width and data.tower")
        return caches.feature_spec(
            self.preprocess, self.tower, self.tokens_per_image, self.feature_width
        )


def source_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the sources: their own or their file's, made unique."""
    names: list[str] = []
    for s in config.sources:
        name = s.name or os.path.splitext(os.path.basename(s.path))[0]
        names.append(f"{name}_{len(names)}" if name in names else name)
    return tuple(names)


def open_sources(config: DataConfig) -> list[RecordSource]:
    """Readers of all sources."""
    out: list[RecordSource] = []
    for s, name in zip(config.sources, source_names(config), strict=True):
        root = s.root or os.path.dirname(os.path.abspath(s.path.split(",")[0]))
        records = open_records(s.path, config.index_dir or None)
        out.append(RecordSource(name, records, root, s.kind, config.max_images, config.max_frames))
    return out


def make_stream(
    config: DataConfig,
    tokenizer,
    sources: Sequence | None = None,
    process: tuple[int, int] = (0, 1),
    chat: Chat | None = None,
) -> SampleStream:
    """The stream of one process; arguments as in `make_pipeline`."""
    sources = list(sources) if sources is not None else open_sources(config)
    chat = chat or Chat(tokenizer, config.template, config.system, config.single_bos)
    weights = [s.weight for s in config.sources]
    mixture = Mixture(
        [len(s) for s in sources],
        weights if max(weights) > 0 else None,
        config.seed,
        config.shuffle,
    )
    options = RowOptions(
        length=config.length,
        images_per_row=config.images_per_row,
        tokens_per_image=config.tokens_per_image,
        preprocess=config.preprocess,
        independent_turns=config.independent_turns,
        mask_dangling_start=config.mask_dangling_start,
        fixed_choices=config.fixed_choices or bool(config.feature_cache),
        max_pixels=config.max_pixels,
        visual_targets_per_row=config.visual_targets_per_row,
    )
    picture_cache = feature_cache = None
    if config.feature_cache:
        spec = config.feature_spec
        feature_cache = caches.ArrayCache(spec.folder(config.feature_cache), spec)
    elif config.picture_cache:
        spec = caches.picture_spec(config.preprocess)
        picture_cache = caches.ArrayCache(spec.folder(config.picture_cache), spec)
    return SampleStream(
        sources, chat, options, mixture, config.epochs, process, picture_cache, feature_cache
    )


def make_pipeline(
    config: DataConfig,
    tokenizer,
    sources: Sequence | None = None,
    process_index: int = 0,
    process_count: int = 1,
    chat: Chat | None = None,
) -> PackedIterator:
    """An iterator of `Batch` for one process of a run.

    It has `get_state()` / `set_state(state)` (a JSON-able dict, bit-exact), `counts` (bad samples
    by "source/reason"), `close()`, and can be given to Orbax as a checkpointable.

    Args:
        config: everything about input.
        tokenizer: see `Chat`.
        sources: objects with `name`, `len` and `sample(k, rng) -> Sample`, in the order of
            config.sources, in place of the files named there.
        process_index, process_count: which share of the samples is this process's.
        chat: in place of template and tokenizer.

    Returns:
        The iterator.
    """
    stream = make_stream(config, tokenizer, sources, (process_index, process_count), chat)
    cache = stream.feature_cache or stream.picture_cache
    options = PackOptions(
        batch_size=config.batch_size,
        length=config.length,
        images_per_row=config.images_per_row,
        tokens_per_image=config.tokens_per_image,
        mode=config.packing,
        open_rows=config.open_rows,
        pixel_shape=None if config.feature_cache else (config.image_size,) * 2 + (3,),
        feature_width=config.feature_width if config.feature_cache else None,
        turns=config.independent_turns,
        padding_batches=config.padding_batches,
        max_bad_in_a_row=config.max_bad_in_a_row,
        visual_targets_per_row=config.visual_targets_per_row,
    )
    reader = _Reader(stream, config.workers, config.read_threads, config.read_ahead)
    rows = None if cache is None else cache.rows
    layout = _layout(config, stream)
    return iter(PackedDataset(stream, reader, options, rows, layout))


class _Reader:
    """n -> iterator over stream[n:], by threads here or in worker processes; always in order."""

    def __init__(self, stream: SampleStream, workers: int, threads: int, ahead: int):
        self.stream, self.workers, self.threads, self.ahead = stream, workers, threads, ahead

    def __call__(self, n: int):
        return _Restarting(self._read, n) if self.workers else self._read(n)

    def _read(self, n: int):
        if n >= len(self.stream):
            return iter(())
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.ahead)
        rest = grain.MapDataset.source(_From(self.stream, n)).to_iter_dataset(options)
        if self.workers:
            _parse_flags()
            rest = rest.mp_prefetch(
                grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=self.ahead)
            )
        return iter(rest)


class _Restarting:
    """Reads on with new worker processes when one has died (out of memory, say).

    Args:
        read: n -> iterator from sample n.
        n: where to begin.
        most: deaths with no sample in between that are too many.
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
                    raise RuntimeError(
                        f"an input worker process died {self._deaths} times at sample "
                        f"{self._next} ({error}); memory? Try fewer data.workers"
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
    """Worker processes want absl's flags parsed, which nobody does in a notebook or a test."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


# Options that change neither what a sample is nor how samples are packed, and one that follows from
# the model, which a run that goes on can't change.
_FREE = {"workers", "read_threads", "read_ahead", "picture_cache", "feature_cache", "index_dir"} | {
    "max_bad_in_a_row",
    "padding_batches",
    "sources",
    "visual_targets_per_row",
}


def _layout(config: DataConfig, stream: SampleStream) -> str:
    """What a checkpointed state depends on: options, sizes of the sources, the tokenizer."""
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE}
    options["sources"] = [
        (s.name, len(s), c.weight, c.kind)
        for s, c in zip(stream.sources, config.sources, strict=True)
    ]
    options["process"] = stream.process
    options["fixed_choices"] = stream.options.fixed_choices
    probe = stream.chat.conversation((("user", "Aa 1 <image>?"), ("assistant", "Zebra, 27.")))
    options["tokens"] = hashlib.sha256(np.ascontiguousarray(probe.ids).tobytes()).hexdigest()[:12]
    return json.dumps(options, sort_keys=True)

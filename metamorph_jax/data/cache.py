"""Resized images, or the features a frozen tower makes of them, in memory-mapped files.

    DIR/features-0a1b…/          one folder for each way of making the rows (its fingerprint)
        meta.json                fingerprint, row shape and dtype
        rows.bin                 one row for each view, one after another
        index.jsonl              a line for each image: key, size and time of the file, first row,
                                 and how many rows if it has several

A line of the index is written after its rows are in the file, so whatever interrupts the building,
the whole lines tell which rows are good; the next build continues after them. An image whose file
has changed since (size or time) counts as not cached.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from metamorph_jax import files
from metamorph_jax.data import images
from metamorph_jax.data.config import DrawingSpec, InputSpec
from metamorph_jax.data.sources.base import ImageRef
from metamorph_jax.data.views import Views
from metamorph_jax.errors import BadImage, BadSample, DataError, MissingFile
from metamorph_jax.lock import Lock


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What a cache holds.

    Attributes:
        kind: "pictures" (pixels), "features" or "moments".
        fingerprint: text that differs whenever rows would differ (processor, tower, weights).
        shape, dtype: of one row.
    """

    kind: str
    fingerprint: str
    shape: tuple[int, ...]
    dtype: str

    def folder(self, root: str) -> str:
        tag = hashlib.sha256(self.fingerprint.encode()).hexdigest()[:16]
        return os.path.join(os.path.expanduser(root), f"{self.kind}-{tag}")

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def image_spec(views: Views, background: str = "white") -> CacheSpec:
    """A cache of the pixels of views. Its folder keeps the name that it has always had."""
    side = views.preprocess.size
    return CacheSpec("pictures", _pixels(views, background), (side, side, 3), "uint8")


def _pixels(views: Views, background: str) -> str:
    """Text that differs whenever the pixels of an image's views do."""
    return f"{views.fingerprint()} on {background}"


def feature_spec(views: Views, spec: InputSpec, background: str = "white") -> CacheSpec:
    """A cache of features; `spec.tower` must name weights, layer, reduction and normalisation."""
    if not (spec.feature_width and spec.tower):
        raise ValueError("a feature cache needs InputSpec.feature_width and InputSpec.tower")
    p = views.preprocess
    fingerprint = f"{_pixels(views, background)} {p.mean} {p.std} | {spec.tower}"
    return CacheSpec("features", fingerprint, spec.feature_shape, "float32")


def moment_spec(drawings: DrawingSpec, background: str = "white") -> CacheSpec:
    """A cache of the autoencoder's moments (mean, logvar) of images to draw, in [-1, 1]."""
    height, width, channels = drawings.latents.shape
    pixels = f"{drawings.preprocess.fingerprint()} on {background} in -1…1"
    shape = height, width, 2 * channels
    return CacheSpec("moments", f"{pixels} | {drawings.latents.identity}", shape, "float32")


def stamp(path: str) -> tuple[int, int]:
    """(size, time) of a file; BadSample if it isn't there."""
    try:
        stat = os.stat(path)
    except OSError as e:
        raise BadSample("missing", path) from e
    return stat.st_size, stat.st_mtime_ns


class ArrayCache:
    """A cache opened for reading; rows come from a memory map. Pickles as its folder.

    Args:
        folder: `CacheSpec.folder(root)`.
        spec: what it must hold, or None to take what is there.
        shape: that its rows must have, where there is no `spec`.
    """

    def __init__(
        self, folder: str, spec: CacheSpec | None = None, shape: tuple[int, ...] | None = None
    ):
        self.folder = folder = os.path.expanduser(folder)
        meta = _read_meta(folder)
        if meta is None:
            raise MissingFile(f"no cache in {folder}; build it first")
        if spec is not None and meta != spec:
            raise DataError(f"{folder} holds {meta}, not {spec}")
        if shape is not None and meta.shape != shape:
            raise DataError(f"{folder} holds rows of shape {meta.shape}, expected {shape}")
        self.spec = meta
        self._index = {entry["key"]: entry for entry in _good_lines(folder, meta)[0]}
        count = max(map(_end, self._index.values()), default=0)
        if count:
            path = os.path.join(folder, "rows.bin")
            self.rows = np.memmap(path, meta.dtype, "r", shape=(count, *meta.shape))
        else:
            self.rows = np.zeros((0, *meta.shape), meta.dtype)

    def __reduce__(self):
        return (ArrayCache, (self.folder,))

    def __len__(self) -> int:
        return sum("bad" not in entry for entry in self._index.values())

    def lookup(self, ref: ImageRef) -> range | None:
        """Rows of an image's views; None if it isn't cached or its file has changed.

        An image that was bad when the cache was built raises BadImage for the same reason.
        """
        now = stamp(ref.path)
        entry = self._index.get(ref.key())
        if entry is None or (entry["size"], entry["time"]) != now:
            return None
        if "bad" in entry:
            raise BadImage(entry["bad"], ref.key(), ref.file())
        return range(entry["row"], _end(entry))


def build(
    root: str,
    spec: CacheSpec,
    refs: Iterable[ImageRef],
    views: Views,
    compute: Callable[[np.ndarray], np.ndarray] | None = None,
    batch_size: int = 32,
    threads: int = 2,
    max_pixels: int = images.MAX_PIXELS,
    background: str = "white",
    progress: bool = True,
    total: int | None = None,
) -> tuple[ArrayCache, Counter]:
    """Fills the cache with every image that isn't in it yet.

    Args:
        root: folder of all caches.
        spec: see `image_spec`, `feature_spec`.
        refs: images; repeated ones are taken once.
        views: makes the pixels of an image's views.
        compute: pixels uint8[n, h, w, 3] -> rows [n, *spec.shape]; None stores the pixels. It
            always gets `batch_size` views, the last ones repeated, so it compiles once.
        batch_size: views a call.
        threads: decoding threads.
        max_pixels: larger images are bad.
        background: see `images.load`.
        progress: whether to report the progress and the time left on stderr.
        total: number of refs where `refs` has no length.

    Returns:
        (the cache, how many images were bad by reason).
    """
    bad: Counter = Counter()
    show = _Progress(total or (len(refs) if hasattr(refs, "__len__") else 0), spec.kind, progress)
    with (
        _opened(root, spec, compute, batch_size) as (writer, good),
        ThreadPoolExecutor(max(threads, 1)) as pool,
    ):
        reader = _Reader(good, views, max_pixels, background)
        for chunk in _chunks(dict.fromkeys(refs), batch_size):
            for entry, result in itertools.chain.from_iterable(pool.map(reader, _files(chunk))):
                if isinstance(result, BadSample):
                    bad[result.reason] += 1
                    if entry is not None:
                        writer.note_bad(entry, result.reason)
                elif entry is not None:
                    writer.add(entry, result)
            show.add(len(chunk))
        writer.finish()
    show.close()
    return ArrayCache(spec.folder(root), spec), bad


def put(root: str, spec: CacheSpec, found: Iterable[tuple[ImageRef, np.ndarray]]) -> ArrayCache:
    """Adds rows that were made elsewhere, one for each image; those that are there stay."""
    with _opened(root, spec, None, 64) as (writer, good):
        known = {entry["key"]: (entry["size"], entry["time"]) for entry in good}
        for ref, row in found:
            size, time = stamp(ref.path)
            if known.get(ref.key()) != (size, time):
                writer.add({"key": ref.key(), "size": size, "time": time}, row[None])
        writer.finish()
    return ArrayCache(spec.folder(root), spec)


@contextlib.contextmanager
def _opened(root: str, spec: CacheSpec, compute, batch_size: int) -> Iterator[tuple]:
    """(a writer of the cache, the lines of its index), for this process alone.

    A run that needs the same cache waits: what two of them append would not be where their lines
    say. (Where the file system has no locks, fill a cache by one run before others use it.)
    """
    folder = _prepare(root, spec)
    with Lock(folder, "fills the cache", "config.data.cache", wait=True):
        good, length = _good_lines(folder, spec)
        with _Writer(folder, spec, good, length, compute, batch_size) as writer:
            yield writer, good


class _Reader:
    """Images out of one file -> (index entry, pixels or what is wrong) of each.

    The entry is None where nothing is to be written: the image is in the cache, or is not there.
    """

    def __init__(self, good: list[dict], views: Views, max_pixels: int, background: str):
        self.known = {entry["key"]: entry for entry in good}
        self.views, self.max_pixels, self.background = views, max_pixels, background

    def __call__(self, refs: list[ImageRef]) -> list[tuple]:
        done, new = [], []
        for ref in refs:
            try:
                size, mtime = stamp(ref.path)
            except BadSample as e:
                done.append((None, e))
                continue
            entry = {"key": ref.key(), "size": size, "time": mtime}
            cached = self.known.get(entry["key"])
            if cached is None or (cached["size"], cached["time"]) != (size, mtime):
                new.append((ref, entry))
            else:
                done.append((None, BadSample(cached["bad"]) if "bad" in cached else None))
        try:
            loaded = images.load(
                [ref for ref, _ in new], self.max_pixels, background=self.background
            )
        except BadSample as e:
            return done + [(entry, e) for _, entry in new]
        pairs = zip(new, loaded, strict=True)
        return done + [(entry, self.views.pixels(image)) for (_, entry), image in pairs]


class _Writer:
    """Rows and index of a cache, after what is good in them.

    Views wait until there are enough for a batch; an image's line is written once all of its rows
    are in the file.
    """

    def __init__(self, folder: str, spec: CacheSpec, good, length: int, compute, batch_size: int):
        self.spec, self.compute, self.batch_size = spec, compute, batch_size
        self.row = max(map(_end, good), default=0)  # next one to be written
        self.next = self.row  # next one to be given to an image
        self.pixels: list[np.ndarray] = []
        self.entries: collections.deque[dict] = collections.deque()
        self.rows = open(os.path.join(folder, "rows.bin"), "ab")  # noqa: SIM115
        self.index = open(os.path.join(folder, "index.jsonl"), "ab")  # noqa: SIM115
        for file, end in ((self.rows, self.row * spec.row_bytes), (self.index, length)):
            file.truncate(end)
            file.seek(0, os.SEEK_END)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.rows.close()
        self.index.close()

    def note_bad(self, entry: dict, reason: str) -> None:
        self.index.write(_line({**entry, "row": -1, "bad": reason}))

    def add(self, entry: dict, pixels: np.ndarray) -> None:
        """pixels: uint8[views, h, w, 3] of one image, or its rows if there is no `compute`."""
        several = {"views": len(pixels)} if len(pixels) > 1 else {}
        self.entries.append({**entry, "row": self.next, **several})
        self.next += len(pixels)
        self.pixels += list(pixels)
        while len(self.pixels) >= self.batch_size:
            self._write(self.batch_size)

    def finish(self) -> None:
        if self.pixels:
            self._write(len(self.pixels))

    def _write(self, n: int) -> None:
        pixels = np.stack(self.pixels[:n])
        del self.pixels[:n]
        values = pixels
        if self.compute is not None:
            filled = np.concatenate([pixels, pixels[-1:].repeat(self.batch_size - n, 0)])
            values = np.asarray(self.compute(filled), self.spec.dtype)[:n]
        if values.shape[1:] != self.spec.shape:
            raise ValueError(
                f"cache rows have shape {values.shape[1:]}, expected {self.spec.shape}"
            )
        self.rows.write(np.ascontiguousarray(values, self.spec.dtype).tobytes())
        self.rows.flush()
        os.fsync(self.rows.fileno())
        self.row += n
        while self.entries and _end(self.entries[0]) <= self.row:
            self.index.write(_line(self.entries.popleft()))
        self.index.flush()


def _line(entry: dict) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _end(entry: dict) -> int:
    """The row after an image's last one."""
    return 0 if "bad" in entry else entry["row"] + entry.get("views", 1)


def _prepare(root: str, spec: CacheSpec) -> str:
    """The folder of a cache, made if it isn't there."""
    folder = spec.folder(root)
    os.makedirs(folder, exist_ok=True)
    meta = _read_meta(folder)
    if meta is None:
        _write_meta(folder, spec)
    elif meta != spec:
        raise DataError(f"{folder} holds {meta}, not {spec}")
    return folder


def _good_lines(folder: str, spec: CacheSpec) -> tuple[list[dict], int]:
    """(index entries whose rows are whole, bytes of the index they take)."""
    rows_path = os.path.join(folder, "rows.bin")
    whole = os.path.getsize(rows_path) // spec.row_bytes if os.path.exists(rows_path) else 0
    entries, length = [], 0
    try:
        with open(os.path.join(folder, "index.jsonl"), "rb") as f:
            for line in f:
                entry = json.loads(line) if line.endswith(b"\n") else None
                if entry is None or _end(entry) > whole:
                    break
                entries.append(entry)
                length += len(line)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError):  # a half-written line: all before it is good
        pass
    return entries, length


def _read_meta(folder: str) -> CacheSpec | None:
    file = os.path.join(folder, "meta.json")
    try:
        meta = files.read_json(file)
    except MissingFile:
        return None
    try:
        return CacheSpec(meta["kind"], meta["fingerprint"], tuple(meta["shape"]), meta["dtype"])
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{file} does not describe a cache ({type(error).__name__}: {files.shown(error)}); "
            "delete the folder, and it is filled anew"
        ) from error


def _write_meta(folder: str, spec: CacheSpec) -> None:
    temp = os.path.join(folder, f"meta.json.{os.getpid()}")
    with open(temp, "w") as f:
        json.dump(dataclasses.asdict(spec), f)
    os.replace(temp, os.path.join(folder, "meta.json"))


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _files(refs: list[ImageRef]) -> Iterator[list[ImageRef]]:
    """Neighbouring frames of a video together, so that it is decoded once; others alone."""
    group: list[ImageRef] = []
    for ref in refs:
        if group and (ref.frame is None or ref.path != group[-1].path):
            yield group
            group = []
        group.append(ref)
    if group:
        yield group


class _Progress:
    """A line on stderr with the time left: rewritten in a terminal, now and then elsewhere."""

    def __init__(self, total: int, name: str, on: bool):
        self.total, self.name, self.on = total, name, on
        self.done, self.shown = 0, False
        self.start = self.last = time.monotonic()

    def add(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if not self.on or now - self.last < (0.5 if terminal else 20):
            return
        self.last, self.shown = now, True
        text = f"cache {self.name}: {self.done}"
        if self.total:
            left = (now - self.start) / self.done * max(self.total - self.done, 0)
            text += f"/{self.total}, {int(left) // 60}:{int(left) % 60:02d} left"
        print("\r" + text if terminal else text, end="" if terminal else "\n", file=sys.stderr)

    def close(self) -> None:
        if self.shown and sys.stderr.isatty():
            print(file=sys.stderr)

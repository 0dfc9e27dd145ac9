"""Resized pictures, or the features a frozen tower makes of them, in memory-mapped files.

    DIR/pictures-0a1b…/          one folder for each way of making the rows (its fingerprint)
        meta.json                fingerprint, row shape and dtype
        rows.bin                 rows one behind another
        index.jsonl              a line for each row: key, size and time of the file, row number

A line of the index is written after its row is in the file, so whatever interrupts the building,
the whole lines tell which rows are good; the next build goes on behind them. A picture whose file
has changed since (size or time) counts as not cached.
"""

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

from metamorph_jax.data import images
from metamorph_jax.data.config import InputSpec
from metamorph_jax.data.sources.base import ImageRef
from metamorph_jax.errors import BadSample


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What a cache holds.

    Attributes:
        kind: "pictures" or "features".
        fingerprint: text that differs whenever rows would differ (processor, tower, weights).
        shape, dtype: of one row.
    """

    kind: str
    fingerprint: str
    shape: tuple[int, ...]
    dtype: str

    def folder(self, root: str) -> str:
        tag = hashlib.sha256(self.fingerprint.encode()).hexdigest()[:16]
        return os.path.join(root, f"{self.kind}-{tag}")

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def image_spec(preprocess: images.Preprocess) -> CacheSpec:
    """A cache of resized images. Its folder keeps the name that it has always had."""
    side = preprocess.size
    return CacheSpec("pictures", preprocess.fingerprint(), (side, side, 3), "uint8")


def feature_spec(preprocess: images.Preprocess, spec: InputSpec) -> CacheSpec:
    """A cache of features; `spec.tower` must name weights, layer, reduction and normalisation."""
    if not (spec.feature_width and spec.tower):
        raise ValueError("a feature cache needs InputSpec.feature_width and InputSpec.tower")
    fingerprint = f"{preprocess.fingerprint()} {preprocess.mean} {preprocess.std} | {spec.tower}"
    return CacheSpec("features", fingerprint, spec.feature_shape, "float32")


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
        self.folder = folder
        meta = _read_meta(folder)
        if meta is None:
            raise FileNotFoundError(f"no cache in {folder}; build it first")
        if spec is not None and meta != spec:
            raise ValueError(f"{folder} holds {meta}, not {spec}")
        if shape is not None and meta.shape != shape:
            raise ValueError(f"{folder} holds rows of shape {meta.shape}, expected {shape}")
        self.spec = meta
        good, _ = _good_lines(folder, meta)
        self._index = {e["key"]: (e["row"], e.get("bad"), e["size"], e["time"]) for e in good}
        count = 1 + max((found[0] for found in self._index.values()), default=-1)
        if count:
            path = os.path.join(folder, "rows.bin")
            self.rows = np.memmap(path, meta.dtype, "r", shape=(count, *meta.shape))
        else:
            self.rows = np.zeros((0, *meta.shape), meta.dtype)

    def __reduce__(self):
        return (ArrayCache, (self.folder,))

    def __len__(self) -> int:
        return sum(bad is None for _, bad, _, _ in self._index.values())

    def lookup(self, ref: ImageRef) -> int | None:
        """Row of a picture; None if it isn't cached or its file has changed.

        A picture that was bad when the cache was built raises BadSample for the same reason.
        """
        now = stamp(ref.path)
        found = self._index.get(ref.key())
        if found is None or found[2:] != now:
            return None
        if found[1]:
            raise BadSample(found[1], ref.key())
        return found[0]


def build(
    root: str,
    spec: CacheSpec,
    refs: Iterable[ImageRef],
    preprocess: images.Preprocess,
    compute: Callable[[np.ndarray], np.ndarray] | None = None,
    batch_size: int = 32,
    threads: int = 2,
    max_pixels: int = images.MAX_PIXELS,
    progress: bool = True,
    total: int | None = None,
) -> tuple[ArrayCache, Counter]:
    """Fills the cache with every picture that isn't in it yet.

    Args:
        root: folder of all caches.
        spec: see `image_spec`, `feature_spec`.
        refs: pictures; repeated ones are taken once.
        preprocess: makes pixels of a picture.
        compute: pixels uint8[n, h, w, 3] -> rows [n, *spec.shape]; None stores the pixels. It
            always gets `batch_size` pictures, the last ones repeated, so it compiles once.
        batch_size: pictures a call.
        threads: decoding threads.
        max_pixels: larger pictures are bad.
        progress: say on stderr how far it is, and the time left.
        total: number of refs where `refs` has no length.

    Returns:
        (the cache, how many pictures were bad by reason).
    """
    folder = spec.folder(root)
    os.makedirs(folder, exist_ok=True)
    meta = _read_meta(folder)
    if meta is None:
        _write_meta(folder, spec)
    elif meta != spec:
        raise ValueError(f"{folder} holds {meta}, not {spec}")
    good, length = _good_lines(folder, spec)
    known = {e["key"]: (e["size"], e["time"], e.get("bad")) for e in good}
    row = 1 + max((e["row"] for e in good), default=-1)
    bad = Counter()
    rows_path, index_path = os.path.join(folder, "rows.bin"), os.path.join(folder, "index.jsonl")
    show = _Progress(total or (len(refs) if hasattr(refs, "__len__") else 0), spec.kind, progress)
    with open(rows_path, "ab") as rows, open(index_path, "ab") as index:
        rows.truncate(row * spec.row_bytes)
        index.truncate(length)
        rows.seek(0, os.SEEK_END)
        index.seek(0, os.SEEK_END)
        with ThreadPoolExecutor(max(threads, 1)) as pool:

            def one(group: list[ImageRef]) -> list[tuple]:
                """(index entry, pixels or what is wrong) of pictures out of one file."""
                done, new = [], []
                for ref in group:
                    try:
                        size, mtime = stamp(ref.path)
                    except BadSample as e:
                        done.append((None, e))
                        continue
                    entry = {"key": ref.key(), "size": size, "time": mtime}
                    same = known.get(entry["key"], ())
                    if same[:2] == (size, mtime):
                        done.append((None, BadSample(same[2]) if same[2] else None))
                    else:
                        new.append((ref, entry))
                try:
                    loaded = images.load([ref for ref, _ in new], max_pixels)
                except BadSample as e:
                    return done + [(entry, e) for _, entry in new]
                pairs = zip(new, loaded, strict=True)
                return done + [(entry, preprocess(picture)) for (_, entry), picture in pairs]

            waiting: list[tuple[dict, np.ndarray]] = []
            for chunk in _chunks(_unique(refs), batch_size):
                results = pool.map(one, _files(chunk))
                for entry, result in itertools.chain.from_iterable(results):
                    if isinstance(result, BadSample):
                        bad[result.reason] += 1
                        if entry is not None:
                            line = {**entry, "row": -1, "bad": result.reason}
                            index.write(json.dumps(line).encode() + b"\n")
                    elif entry is not None:
                        waiting.append((entry, result))
                while len(waiting) >= batch_size:
                    row = _write(rows, index, spec, row, waiting[:batch_size], compute, batch_size)
                    del waiting[:batch_size]
                show.add(len(chunk))
            if waiting:
                _write(rows, index, spec, row, waiting, compute, batch_size)
    show.close()
    return ArrayCache(folder, spec), bad


def _write(rows, index, spec, row, waiting, compute, batch_size) -> int:
    pixels = np.stack([p for _, p in waiting])
    values = pixels
    if compute is not None:
        filled = np.concatenate([pixels, pixels[-1:].repeat(batch_size - len(pixels), 0)])
        values = np.asarray(compute(filled), spec.dtype)[: len(pixels)]
    if values.shape[1:] != spec.shape:
        raise ValueError(f"cache rows have shape {values.shape[1:]}, expected {spec.shape}")
    rows.write(np.ascontiguousarray(values, spec.dtype).tobytes())
    rows.flush()
    os.fsync(rows.fileno())
    lines = [{**entry, "row": row + k} for k, (entry, _) in enumerate(waiting)]
    index.write("".join(json.dumps(line) + "\n" for line in lines).encode())
    index.flush()
    return row + len(waiting)


def _good_lines(folder: str, spec: CacheSpec) -> tuple[list[dict], int]:
    """(index entries whose row is whole, bytes of the index they take)."""
    rows_path = os.path.join(folder, "rows.bin")
    whole = os.path.getsize(rows_path) // spec.row_bytes if os.path.exists(rows_path) else 0
    entries, length = [], 0
    try:
        with open(os.path.join(folder, "index.jsonl"), "rb") as f:
            for line in f:
                entry = json.loads(line) if line.endswith(b"\n") else None
                if entry is None or entry["row"] >= whole:
                    break
                entries.append(entry)
                length += len(line)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError):  # a half-written line: all before it is good
        pass
    return entries, length


def _read_meta(folder: str) -> CacheSpec | None:
    try:
        with open(os.path.join(folder, "meta.json")) as f:
            meta = json.load(f)
    except FileNotFoundError:
        return None
    return CacheSpec(meta["kind"], meta["fingerprint"], tuple(meta["shape"]), meta["dtype"])


def _write_meta(folder: str, spec: CacheSpec) -> None:
    temp = os.path.join(folder, f"meta.json.{os.getpid()}")
    with open(temp, "w") as f:
        json.dump(dataclasses.asdict(spec), f)
    os.replace(temp, os.path.join(folder, "meta.json"))


def _unique(refs: Iterable[ImageRef]) -> Iterator[ImageRef]:
    seen = set()
    for ref in refs:
        if ref not in seen:
            seen.add(ref)
            yield ref


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

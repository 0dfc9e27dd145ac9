"""Files of records with random access: JSON, JSONL (indexed by byte offset), ArrayRecord, TFDS.

A record is one decoded JSON object with the keys `id`, `image` and `conversations` (and whatever
its kind needs). `RecordSource` turns record k into a `Sample`.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np

from metamorph_jax.data.sources.base import Sample
from metamorph_jax.data.sources.kinds import KINDS, Files, Kind, build
from metamorph_jax.errors import BadSample

INDEX_VERSION = 1


class JsonRecords:
    """A JSON file holding one list of records; all of it is kept in memory."""

    def __init__(self, path: str):
        self.path = path
        with open(path, encoding="utf-8") as f:
            try:
                self.records = json.load(f)
            except json.JSONDecodeError as e:
                raise ValueError(f"{path}: not valid JSON ({e}); is it JSON lines?") from e
        if not isinstance(self.records, list):
            raise ValueError(f"{path}: expected a list of records, got {type(self.records)}")
        self.bad_lines: tuple[tuple[int, str], ...] = ()

    def __reduce__(self):  # worker processes read the file themselves
        return (JsonRecords, (self.path,))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, k: int) -> dict:
        return self.records[k]


class JsonlRecords:
    """JSON lines, read lazily: an index of byte offsets is made once and kept next to the file.

    The index is trusted only while size and modification time of the file stay what they were. It
    lists every non-empty line; a line that isn't a JSON object raises BadSample("bad_json") when it
    is read, so all hosts skip the same ones. `bad_lines` looks for them.
    """

    def __init__(self, path: str, index_dir: str | None = None):
        self.path = path
        stat = os.stat(path)
        stamp = [INDEX_VERSION, stat.st_size, stat.st_mtime_ns]
        for index_path in _index_places(path, index_dir):
            index = _load_index(index_path, stamp)
            if index is not None:
                break
        else:
            index = _scan_lines(path)
            _save_index(_index_places(path, index_dir), stamp, index)
        self.offsets, self.lengths, self.lines = index
        self._fd: int | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, k: int) -> dict:
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDONLY)
        # pread keeps no file position, so threads may share the descriptor.
        data = os.pread(self._fd, int(self.lengths[k]), int(self.offsets[k]))
        try:
            record = json.loads(data)
        except ValueError as e:
            raise BadSample("bad_json", f"{self.path} line {int(self.lines[k])}: {e}") from e
        if not isinstance(record, dict):
            raise BadSample("bad_json", f"{self.path} line {int(self.lines[k])}: not an object")
        return record

    @property
    def bad_lines(self) -> tuple[tuple[int, str], ...]:
        """((line number from 1, message), ...) of all lines that can't be read. Reads the file."""
        bad = []
        for k in range(len(self)):
            try:
                self[k]
            except BadSample as e:
                bad.append((int(self.lines[k]), e.detail))
        return tuple(bad)

    def __getstate__(self):
        return {**self.__dict__, "_fd": None}

    def __del__(self):
        if getattr(self, "_fd", None) is not None:
            os.close(self._fd)


def _scan_lines(path: str):
    offsets, lengths, lines = [], [], []
    position = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                offsets.append(position)
                lengths.append(len(line))
                lines.append(number)
            position += len(line)
    return np.array(offsets, np.int64), np.array(lengths, np.int32), np.array(lines, np.int32)


def _index_places(path: str, index_dir: str | None) -> list[str]:
    """Where the index may be: the given folder, or next to the file, or the user's cache."""
    name = os.path.basename(path) + ".offsets.npz"
    tag = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:12]
    if index_dir:
        return [os.path.join(index_dir, f"{tag}-{name}")]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    own = os.path.join(os.path.dirname(os.path.abspath(path)), "." + name)
    return [own, os.path.join(cache, "metamorph_jax", f"{tag}-{name}")]


def _load_index(path: str, stamp: list[int]):
    try:
        with np.load(path, allow_pickle=False) as z:
            if z["stamp"].tolist() == stamp:
                return z["offsets"], z["lengths"], z["lines"]
    except Exception:  # absent, or broken in any way: it is only a cache, so it is made again
        return None
    return None


def _save_index(places: list[str], stamp: list[int], index) -> None:
    for path in places:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            fd, temp = tempfile.mkstemp(dir=os.path.dirname(path), suffix=".tmp")
            with os.fdopen(fd, "wb") as f:
                offsets, lengths, lines = index
                np.savez(f, stamp=np.array(stamp), offsets=offsets, lengths=lengths, lines=lines)
            os.replace(temp, path)
            return
        except OSError:  # a read-only data folder: try the next place, or do without
            continue


class ArrayRecords:
    """ArrayRecord files (`a.arrayrecord,b.arrayrecord` or one) whose records are JSON objects."""

    bad_lines: tuple[tuple[int, str], ...] = ()

    def __init__(self, path: str):
        try:
            from array_record.python import array_record_data_source
        except ImportError as e:
            raise ImportError("ArrayRecord files need the package `array_record`") from e
        self.path = path
        self.reader = array_record_data_source.ArrayRecordDataSource(path.split(","))

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, k: int) -> dict:
        try:
            record = json.loads(self.reader[k])
        except ValueError as e:
            raise BadSample("bad_json", f"{self.path} record {k}: {e}") from e
        if not isinstance(record, dict):
            raise BadSample("bad_json", f"{self.path} record {k}: not an object")
        return record


class TfdsRecords:
    """`tfds:NAME/SPLIT` through `tfds.data_source`, which reads ArrayRecord without TensorFlow.

    Features, all of them Text: `id`; `image`, a path or a Sequence of them; `conversations`, JSON.
    """

    bad_lines: tuple[tuple[int, str], ...] = ()

    def __init__(self, path: str):
        try:
            import tensorflow_datasets as tfds
        except ImportError as e:
            raise ImportError("TFDS sources need the package `tensorflow_datasets`") from e
        name, split = path.removeprefix("tfds:").rsplit("/", 1)
        self.path = path
        self.reader = tfds.data_source(name, split=split)
        features = self.reader.dataset_info.features
        for key in ("id", "image", "conversations"):
            kind = features[key] if key in features else None
            kind = kind.feature if isinstance(kind, tfds.features.Sequence) else kind
            if kind is not None and not isinstance(kind, tfds.features.Text):
                raise ValueError(
                    f"{path}: feature {key!r} is {type(kind).__name__}, expected Text: "
                    "images are named by their paths, conversations are JSON"
                )

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, k: int) -> dict:
        def plain(value):
            if isinstance(value, (list, np.ndarray)):
                return [plain(v) for v in value]
            return value.decode() if isinstance(value, bytes) else value

        record = {key: plain(value) for key, value in self.reader[k].items()}
        if isinstance(record.get("conversations"), str):
            record["conversations"] = json.loads(record["conversations"])
        return record


def open_records(path: str, index_dir: str | None = None):
    """The reader for a path, chosen by its name: tfds:…, .json, .jsonl, .arrayrecord."""
    if path.startswith("tfds:"):
        return TfdsRecords(path)
    first = path.split(",")[0]
    if not os.path.exists(first):
        raise FileNotFoundError(f"data file {first!r} does not exist")
    if first.endswith((".arrayrecord", ".array_record")):
        return ArrayRecords(path)
    if first.endswith(".json"):
        return JsonRecords(path)
    if first.endswith((".jsonl", ".ndjson")):
        return JsonlRecords(path, index_dir)
    raise ValueError(f"{first!r}: expected .json, .jsonl, .arrayrecord or tfds:NAME/SPLIT")


@dataclasses.dataclass
class RecordSource:
    """Records of one file as samples.

    Attributes:
        name: name of the source in metrics.
        records: random access to decoded records.
        files: where their images are.
        kind: "auto" recognises the kind of each record; else a name in `kinds`.
        max_images: a sample with more images is bad.
        kinds: the kinds there are, see `kinds.known`.
    """

    name: str
    records: Sequence[dict]
    files: Files
    kind: str = "auto"
    max_images: int = 70
    kinds: Mapping[str, Kind] = dataclasses.field(default_factory=lambda: KINDS)

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, k: int, rng: np.random.Generator) -> Sample:
        """Sample k; every random choice (wording, frames) comes from `rng`."""
        record = self.records[k]
        if not isinstance(record, dict):
            raise BadSample("bad_record", f"record {k} is not an object")
        sample = build(record, self.name, self.files, rng, self.kind, self.kinds)
        return sample.checked(self.max_images)

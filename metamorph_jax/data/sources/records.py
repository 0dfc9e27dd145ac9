"""Files of records with random access: JSON, JSONL (indexed by byte offset), ArrayRecord, TFDS.

A record is one decoded JSON object, see `schema.py`. `RecordSource` turns record k into a `Sample`.
"""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np

from metamorph_jax import files
from metamorph_jax.data.sources.base import Sample, images_in_front
from metamorph_jax.data.sources.kinds import KINDS, Files, Kind, build
from metamorph_jax.errors import BadSample, DataError, FileError

INDEX_VERSION = 2
MAX_JSON = 2**31  # bytes; what is larger has to be JSON lines


class JsonRecords:
    """A JSON file holding one list of records; all of it is kept in memory."""

    bad_lines: tuple[tuple[int, str], ...] = ()

    def __init__(self, path: str):
        self.path = path
        self.records = files.read_json(
            path, list, what="a list of records (JSON lines are .jsonl)", max_bytes=MAX_JSON
        )

    def __reduce__(self):  # worker processes read the file themselves
        return (JsonRecords, (self.path,))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, k: int) -> dict:
        return self.records[k]

    def where(self, k: int) -> str:
        """File and place of record k."""
        return f"{files.shown(self.path)} record {k}"


class JsonlRecords:
    """JSON lines, read lazily: an index of byte offsets is made once and kept next to the file.

    The index is trusted only while size and modification time of the file stay what they were. It
    lists every non-empty line; a line that isn't a JSON object raises BadSample("bad_json") when it
    is read, so all hosts skip the same ones. `bad_lines` looks for them.
    """

    def __init__(self, path: str, index_dir: str | None = None):
        self.path = path
        stat = os.stat(files.regular(path))
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
        return _record(data, self.where(k))

    def where(self, k: int) -> str:
        """File and line of record k."""
        return f"{files.shown(self.path)} line {int(self.lines[k])}"

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


def _record(data: bytes, where: str) -> dict:
    try:
        return files.parse(data, where, dict)
    except FileError as e:
        raise BadSample("bad_json", str(e)) from e


def _scan_lines(path: str):
    found = [(at, len(line), n) for n, at, line in files.raw_lines(path) if line.strip()]
    offsets, lengths, lines = zip(*found, strict=True) if found else ((), (), ())
    return np.array(offsets, np.int64), np.array(lengths, np.int32), np.array(lines, np.int32)


def _index_places(path: str, index_dir: str | None) -> list[str]:
    """Where the index may be: the given folder, or next to the file, or the user's cache."""
    name = os.path.basename(path) + ".offsets.npz"
    tag = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:12]
    if index_dir:
        return [os.path.join(os.path.expanduser(index_dir), f"{tag}-{name}")]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    own = os.path.join(os.path.dirname(os.path.abspath(path)), "." + name)
    return [own, os.path.join(cache, "metamorph_jax", f"{tag}-{name}")]


def _load_index(path: str, stamp: list[int]):
    try:
        with files.opened(path) as f, np.load(f, allow_pickle=False) as z:
            if z["stamp"].tolist() == stamp:
                offsets, lengths, lines = z["offsets"], z["lengths"], z["lines"]
                ends = offsets + lengths
                if offsets.shape == lengths.shape == lines.shape == (len(ends),) and (
                    not len(ends) or (offsets.min() >= 0 and ends.max() <= stamp[1])
                ):
                    return offsets, lengths, lines
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
            raise DataError("ArrayRecord files need the package `array_record`") from e
        self.path = path
        parts = [str(files.regular(part)) for part in path.split(",")]
        try:
            self.reader = array_record_data_source.ArrayRecordDataSource(parts)
        except Exception as e:  # its C++ raises RuntimeError, and others for wrong arguments
            raise FileError(f"{files.shown(path)}: not ArrayRecord ({files.shown(e)})") from e

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, k: int) -> dict:
        try:
            data = self.reader[k]
        except Exception as e:
            raise BadSample("bad_json", f"{self.where(k)} can't be read: {files.shown(e)}") from e
        return _record(data, self.where(k))

    def where(self, k: int) -> str:
        """File and place of record k."""
        return f"{files.shown(self.path)} record {k}"


class TfdsRecords:
    """`tfds:NAME/SPLIT` through `tfds.data_source`, which reads ArrayRecord without TensorFlow.

    Features, all of them Text: `id`; `image`, a path or a Sequence of them; `conversations`, JSON.
    """

    bad_lines: tuple[tuple[int, str], ...] = ()

    def __init__(self, path: str):
        try:
            import tensorflow_datasets as tfds
        except ImportError as e:
            raise DataError("TFDS sources need the package `tensorflow_datasets`") from e
        name, slash, split = path.removeprefix("tfds:").rpartition("/")
        if not slash:
            raise DataError(f"{files.shown(path)}: expected tfds:NAME/SPLIT")
        self.path = path
        try:
            self.reader = tfds.data_source(name, split=split)
        except Exception as e:  # many kinds, for names, splits and files alike
            raise DataError(f"{files.shown(path)}: {files.shown(e, 300)}") from e
        features = self.reader.dataset_info.features
        for key in ("id", "image", "conversations"):
            kind = features[key] if key in features else None
            kind = kind.feature if isinstance(kind, tfds.features.Sequence) else kind
            if kind is not None and not isinstance(kind, tfds.features.Text):
                raise DataError(
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
            try:
                record["conversations"] = files.parse(record["conversations"], "conversations")
            except FileError as e:
                raise BadSample("bad_json", str(e)) from e
        return record

    def where(self, k: int) -> str:
        """Name and place of record k."""
        return f"{files.shown(self.path)} record {k}"


def open_records(path: str, index_dir: str | None = None):
    """The reader for a path, chosen by its name: tfds:…, .json, .jsonl, .arrayrecord.

    Raises:
        FileError: a file is missing, or is not what its name says.
        DataError: there are no records, or the package that reads them is missing.
    """
    if path.startswith("tfds:"):
        found = TfdsRecords(path)
    elif path.split(",")[0].endswith((".arrayrecord", ".array_record")):
        found = ArrayRecords(path)
    elif path.endswith(".json"):
        found = JsonRecords(path)
    elif path.endswith((".jsonl", ".ndjson")):
        found = JsonlRecords(path, index_dir)
    else:
        raise FileError(
            f"data file {files.shown(repr(path))}: expected .json, .jsonl, .arrayrecord or "
            "tfds:NAME/SPLIT"
        )
    if not len(found):
        raise DataError(f"{files.shown(path)} holds no records")
    return found


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
        ignore: keys of records that are passed over, see `schema`.
        in_front: whether images go to the front of their messages, see `base.images_in_front`.
    """

    name: str
    records: Sequence[dict]
    files: Files
    kind: str = "auto"
    max_images: int = 70
    kinds: Mapping[str, Kind] = dataclasses.field(default_factory=lambda: KINDS)
    ignore: tuple[str, ...] = ()
    in_front: bool = False

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, k: int, rng: np.random.Generator) -> Sample:
        """Sample k; every random choice (wording, frames) comes from `rng`.

        Raises:
            BadSample: the record can't be used; the detail begins with its file, line and id.
        """
        where = self.records.where(k) if hasattr(self.records, "where") else f"record {k}"
        try:
            record = self.records[k]
            if not isinstance(record, dict):
                raise BadSample("bad_record", "not an object")
            if "id" in record:
                where += f", id {files.shown(repr(record['id']), 80)}"
            sample = build(record, self.name, self.files, rng, self.kind, self.kinds, self.ignore)
            sample = images_in_front(sample) if self.in_front and sample.images else sample
            sample = sample.checked(self.max_images)
        except BadSample as e:
            named = e.detail.startswith(where)
            raise BadSample(e.reason, e.detail if named else f"{where}: {e.detail}") from e
        return dataclasses.replace(sample, where=where)

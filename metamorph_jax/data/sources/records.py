"""Files of records with random access: JSON, JSON lines (indexed by byte offset), zips of them,
tar, Parquet, ArrayRecord, TFDS.

A record is one decoded JSON object, see `schema.py`. `RecordSource` turns record k into a `Sample`.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np

from metamorph_jax import files
from metamorph_jax.data.sources import index_files, shards
from metamorph_jax.data.sources.base import ImageRef, Sample, images_in_front
from metamorph_jax.data.sources.kinds import KINDS, Files, Kind, build
from metamorph_jax.data.sources.lines import json_record, unreadable
from metamorph_jax.data.sources.parquet import ParquetRecords
from metamorph_jax.data.sources.tars import TarRecords
from metamorph_jax.data.sources.zips import ZippedRecords
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
        places = index_files.places(path, index_dir)
        for index_path in places:
            index = _load_index(index_path, stamp)
            if index is not None:
                break
        else:
            index = _scan_lines(path)
            names = ("offsets", "lengths", "lines")
            index_files.save(places, stamp, dict(zip(names, index, strict=True)))
        self.offsets, self.lengths, self.lines = index
        self._fd: int | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, k: int) -> dict:
        return json_record(self.read(k), self.where(k))

    def read(self, k: int) -> bytes:
        """Line k of those that are not empty."""
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDONLY)
        # pread keeps no file position, so threads may share the descriptor.
        return os.pread(self._fd, int(self.lengths[k]), int(self.offsets[k]))

    def where(self, k: int) -> str:
        """File and line of record k."""
        return f"{files.shown(self.path)} line {int(self.lines[k])}"

    @property
    def bad_lines(self) -> tuple[tuple[int, str], ...]:
        """((line number from 1, message), ...) of all lines that can't be read. Reads the file."""
        return unreadable(self)

    def __getstate__(self):
        return {**self.__dict__, "_fd": None}

    def __del__(self):
        if getattr(self, "_fd", None) is not None:
            os.close(self._fd)


def _scan_lines(path: str):
    found = [(at, len(line), n) for n, at, line in files.raw_lines(path) if line.strip()]
    offsets, lengths, lines = zip(*found, strict=True) if found else ((), (), ())
    return np.array(offsets, np.int64), np.array(lengths, np.int32), np.array(lines, np.int32)


def _load_index(path: str, stamp: list[int]):
    arrays = index_files.load(path, stamp, ("offsets", "lengths", "lines"))
    if arrays is None:
        return None
    offsets, lengths, lines = arrays
    try:
        ends = offsets + lengths
        sound = offsets.shape == lengths.shape == lines.shape == (len(ends),) and (
            not len(ends) or (offsets.min() >= 0 and ends.max() <= stamp[1])
        )
    except (TypeError, ValueError):  # arrays of letters, or of other shapes
        return None
    return (offsets, lengths, lines) if sound else None


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
        return json_record(data, self.where(k))

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
    """The reader for a path, chosen by its name: .json, .jsonl, .txt, .zip, .tar, .parquet, …

    A path may stand for several files, see `shards`.

    Raises:
        FileError: a file is missing, or is not what its name says.
        DataError: there are no records, or the package that reads them is missing.
    """
    if path.startswith("tfds:"):
        found = TfdsRecords(path)
    elif path.split(",")[0].endswith((".arrayrecord", ".array_record")):
        found = ArrayRecords(",".join(shards.expand(path)))
    elif shards.is_pattern(path):
        found = shards.open_all(path, lambda file: _open_file(file, index_dir))
    else:
        found = _open_file(path, index_dir)
    if not len(found):
        raise DataError(f"{files.shown(path)} holds no records")
    return found


def _open_file(path: str, index_dir: str | None):
    """The reader for one file."""
    if path.endswith(".json"):
        return JsonRecords(path)
    if path.endswith((".jsonl", ".ndjson", ".txt")):
        return JsonlRecords(path, index_dir)
    if path.endswith(".tar"):
        return TarRecords(path, index_dir)
    if path.endswith(".parquet"):
        return ParquetRecords(path)
    if path.endswith(".zip"):
        return ZippedRecords(path, index_dir)
    if path.endswith((".pkl", ".pickle", ".p")):
        raise FileError(
            f"{files.shown(path)} is a pickle, and reading one can run code. This makes JSON lines "
            "of it and runs nothing: python -m metamorph_jax.data.sets.pickles FILE > ROWS.jsonl"
        )
    unpack = "; unpack it first" if path.endswith((".gz", ".tgz", ".zst")) else ""
    raise FileError(
        f"data file {files.shown(repr(path))}: expected .json, .jsonl, .txt (JSON lines), .zip of "
        f"these, .tar, .parquet, .arrayrecord or tfds:NAME/SPLIT{unpack}"
    )


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
        mirror: probability that an image is mirrored.
    """

    name: str
    records: Sequence[dict]
    files: Files
    kind: str = "auto"
    max_images: int = 70
    kinds: Mapping[str, Kind] = dataclasses.field(default_factory=lambda: KINDS)
    ignore: tuple[str, ...] = ()
    in_front: bool = False
    mirror: float = 0.0

    def __len__(self) -> int:
        return len(self.records)

    def sample(
        self, k: int, rng: np.random.Generator, broken: frozenset[ImageRef] = frozenset()
    ) -> Sample:
        """Sample k; every random choice (wording, frames) comes from `rng`.

        Args:
            broken: images that can't be used, for a sample that `spares` them.

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
            of = dataclasses.replace(self._files(k), broken=broken)
            sample = build(record, self.name, of, rng, self.kind, self.kinds, self.ignore)
            sample = images_in_front(sample) if self.in_front and sample.images else sample
            sample = sample.checked(self.max_images)
            sample = _mirrored(sample, self.mirror, rng) if self.mirror else sample
        except BadSample as e:
            named = e.detail.startswith(where)
            raise BadSample(e.reason, e.detail if named else f"{where}: {e.detail}") from e
        return dataclasses.replace(sample, where=where)

    def _files(self, k: int) -> Files:
        """Where the images of record k are: in the record's own file, too, if that is a tar."""
        records = self.records
        own = records.file(k) if hasattr(records, "file") else getattr(records, "path", "")
        members = records.members(k) if hasattr(records, "members") else {}
        return dataclasses.replace(self.files, members=members, record_file=own)


def _mirrored(sample: Sample, probability: float, rng: np.random.Generator) -> Sample:
    """The sample with some of its images mirrored, each by a choice of its own."""
    chosen = rng.random(len(sample.images)) < probability
    refs = tuple(
        dataclasses.replace(ref, mirror=ref.mirror != bool(flip))
        for ref, flip in zip(sample.images, chosen, strict=True)
    )
    return dataclasses.replace(sample, images=refs)

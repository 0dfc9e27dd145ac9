"""Parquet files, as data sets on the hub have them: a row is a record, with its images in it.

A value {"bytes": …, "path": …} is an image: its bytes, if they are there, else the path of a file.
So is a column of plain bytes that is called `jpg`, `jpeg`, `png` or `webp`, as img2dataset writes
them; all other bytes are passed over. In the record stands a name for it, `image[0]`, by which
`members` has it.

Rows are read by row groups, of which the last few stay in memory. Small groups are read fastest in
random order.
"""

import collections
import itertools
import threading
from collections.abc import Mapping

from metamorph_jax import files
from metamorph_jax.data.sources.base import ImageRef
from metamorph_jax.errors import BadSample, DataError, FileError
from metamorph_jax.files import shown

MAX_GROUP = 2**31  # bytes
KEPT = 4  # row groups
_ENCODED = ("jpg", "jpeg", "png", "webp")


class ParquetRecords:
    """The rows of one file."""

    bad_lines: tuple[tuple[int, str], ...] = ()

    def __init__(self, path: str):
        try:
            from pyarrow import parquet
        except ImportError as e:
            raise DataError("Parquet files need the package `pyarrow`") from e
        self.path = path
        files.regular(path)
        try:
            self._file = parquet.ParquetFile(path)
            groups = [self._file.metadata.row_group(k) for k in range(self._file.num_row_groups)]
            rows = [group.num_rows for group in groups]
        except Exception as e:  # pyarrow raises several kinds
            raise FileError(f"{shown(path)} is not Parquet: {shown(e)}") from e
        large = max((group.total_byte_size for group in groups), default=0)
        if large > MAX_GROUP:
            raise FileError(
                f"{shown(path)} has a row group of {large:,} bytes, more than the {MAX_GROUP:,} "
                "that are read: write it again with smaller row groups"
            )
        self._ends = list(itertools.accumulate(rows))
        self._groups: collections.OrderedDict = collections.OrderedDict()
        self._lock = threading.Lock()  # a reader is for one thread at a time

    def __reduce__(self):  # worker processes open the file themselves
        return ParquetRecords, (self.path,)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def where(self, k: int) -> str:
        """File and row of record k."""
        return f"{shown(self.path)} row {k}"

    def __getitem__(self, k: int) -> dict:
        return self._split(k)[0]

    def members(self, k: int) -> Mapping[str, ImageRef]:
        """The images of row k whose bytes are in the file, by their names in the record."""
        return self._split(k)[1]

    def _split(self, k: int) -> tuple[dict, dict[str, ImageRef]]:
        """(row k with names or paths in the place of images, images by name)."""
        members: dict[str, ImageRef] = {}
        record = {key: self._named(key, value, members) for key, value in self._row(k).items()}
        record = {key: value for key, value in record.items() if not isinstance(value, bytes)}
        encoded = [f"{key}[0]" for key in _ENCODED if f"{key}[0]" in members]
        if encoded:
            record.setdefault("image", encoded[0])
        return record, members

    def _named(self, key: str, value, members: dict[str, ImageRef]):
        """The value, with a name or path in the place of each image."""
        if isinstance(value, list):
            return [self._named(key, each, members) for each in value]
        if isinstance(value, dict) and value and not value.keys() - {"bytes", "path"}:
            data = value.get("bytes")
            if not data:
                return value.get("path") or None
        elif isinstance(value, bytes) and key in _ENCODED:
            data = value
        else:
            return value
        name = f"{key}[{len(members)}]" if f"{key}[0]" in members else f"{key}[0]"
        members[name] = ImageRef(self.path, data=data)
        return name

    def _row(self, k: int) -> dict:
        group = next(g for g, end in enumerate(self._ends) if k < end)
        first = self._ends[group - 1] if group else 0
        try:
            with self._lock:
                if group not in self._groups:
                    self._groups[group] = self._file.read_row_group(group)
                    if len(self._groups) > KEPT:
                        self._groups.popitem(last=False)
                self._groups.move_to_end(group)
                row = self._groups[group].slice(k - first, 1)
            return row.to_pylist()[0]
        except Exception as e:
            raise BadSample("broken_parquet", f"row group {group}: {shown(e)}") from e

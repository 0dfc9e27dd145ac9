"""Files of which each record gives several samples."""

from collections.abc import Callable, Sequence

import numpy as np

from metamorph_jax import files
from metamorph_jax.data.sources import index_files
from metamorph_jax.errors import BadSample

_VERSION = 1  # of what is kept


class SplitRecords:
    """Where sample k is: in which record, and which of its parts it is.

    How many parts a record has is counted once, and kept beside the file. A record that can't be
    read, or has no parts, counts as one, so that it is skipped and counted when its turn comes.

    Args:
        records: of one file, which is `records.path`.
        count: record -> its parts; may raise BadSample.
        name: of what is counted.
        index_dir: see `index_files.places`.
    """

    def __init__(
        self,
        records: Sequence[dict],
        count: Callable[[dict], int],
        name: str,
        index_dir: str | None = None,
    ):
        self.records, self._count, self.name = records, count, name
        self.ends = np.cumsum(np.maximum(self._counts(index_dir), 1))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def at(self, k: int) -> tuple[int, int]:
        """(number of the record, number of its part)."""
        record = int(np.searchsorted(self.ends, k, side="right"))
        return record, k - (int(self.ends[record - 1]) if record else 0)

    def where(self, k: int) -> str:
        """File and place of the record, and which part."""
        record, part = self.at(k)
        return f"{self.records.where(record)} {self.name} {part + 1}"

    def _counts(self, index_dir: str | None) -> np.ndarray:
        """int64[records], 0 where one can't be used."""
        path, n = self.records.path, len(self.records)
        places = index_files.places(path, index_dir, self.name)
        stat = files.regular(path).stat()
        stamp = [_VERSION, stat.st_size, stat.st_mtime_ns]
        for place in places:
            found = index_files.load(place, stamp, ("counts",))
            if found is not None and found[0].shape == (n,) and found[0].dtype.kind == "i":
                return found[0].astype(np.int64)
        counts = np.array([self._of(k) for k in range(n)], np.int64)
        index_files.save(places, stamp, {"counts": counts})
        return counts

    def _of(self, k: int) -> int:
        try:
            return self._count(self.records[k])
        except BadSample:
            return 0

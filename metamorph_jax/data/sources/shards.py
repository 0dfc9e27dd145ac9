"""Data sets in many files: names with ranges and wildcards, and their records one after another."""

import bisect
import glob
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence

from metamorph_jax.data.sources.base import ImageRef
from metamorph_jax.errors import FileError, MissingFile
from metamorph_jax.files import shown

MOST = 1_000_000  # files of one data set
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_pattern(path: str) -> bool:
    """Whether a path stands for several files: it has a comma, a range {000..123} or a wildcard."""
    named = "," in path or _RANGE.search(path) or glob.has_magic(path)
    return bool(named) and not os.path.exists(path)


def expand(path: str) -> list[str]:
    """The files that a path stands for, in the order of ranges, those of a wildcard by name.

    Files that are missing from a range are left out, and a line on stderr says how many.

    Raises:
        FileError: there are none at all, or too many.
    """
    found = [file for part in path.split(",") for file in _of_part(part.strip())]
    if len(found) > MOST:
        raise FileError(f"{shown(path)} stands for more than {MOST:,} files")
    return found


def _of_part(path: str) -> list[str]:
    if not is_pattern(path):
        return [path]
    pieces = _RANGE.split(path)
    ranges = [_numbers(first, last) for first, last in zip(pieces[1::3], pieces[2::3], strict=True)]
    count = 1
    for numbers in ranges:
        count *= max(len(numbers), 1)
        if count > MOST:
            raise FileError(f"{shown(path)} stands for more than {MOST:,} files")
    names = []
    for chosen in itertools.product(*ranges):
        name = "".join(a + b for a, b in zip(pieces[::3], (*chosen, ""), strict=True))
        names += sorted(glob.glob(name)) if glob.has_magic(name) else [name]
    there = [name for name in names if os.path.exists(name)]
    if not there:
        raise MissingFile(f"no file {shown(path)}")
    if len(there) < len(names):
        lost = [os.path.basename(name) for name in names if not os.path.exists(name)]
        print(f"{shown(path)}: {len(lost)} of {len(names)} files are missing and left out "
              f"({shown(', '.join(lost[:5]))}{', …' if len(lost) > 5 else ''})",
              file=sys.stderr, flush=True)  # fmt: skip
    return there


def _numbers(first: str, last: str) -> list[str]:
    """first, …, last with as many digits as `first` has."""
    low, high = int(first[-18:]), int(last[-18:])
    if len(first) > 18 or len(last) > 18 or not 0 <= high - low < MOST:
        raise FileError(f"{{{shown(first, 30)}..{shown(last, 30)}}} is not a range of files")
    return [str(number).zfill(len(first)) for number in range(low, high + 1)]


class ShardedRecords:
    """The records of several files, one file after another.

    Args:
        files: their readers, see `records.open_records`.
    """

    def __init__(self, files: Sequence):
        self.files = list(files)
        self.ends = list(itertools.accumulate(len(file) for file in self.files))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def _at(self, k: int) -> tuple:
        """(reader, number of the record in its file)."""
        file = bisect.bisect_right(self.ends, k)
        return self.files[file], k - (self.ends[file - 1] if file else 0)

    def __getitem__(self, k: int) -> dict:
        reader, k = self._at(k)
        return reader[k]

    def where(self, k: int) -> str:
        """File and place of record k."""
        reader, k = self._at(k)
        return reader.where(k)

    def file(self, k: int) -> str:
        """The file of record k."""
        return self._at(k)[0].path

    def members(self, k: int) -> Mapping[str, ImageRef]:
        """Images that come in the same file as record k, by all names for them."""
        reader, k = self._at(k)
        return reader.members(k) if hasattr(reader, "members") else {}

    @property
    def bad_lines(self) -> tuple[tuple[int, str], ...]:
        """((line number, message), …) of all files."""
        return tuple(bad for file in self.files for bad in file.bad_lines)


def open_all(path: str, open_one: Callable[[str], object]) -> ShardedRecords:
    """The records of every file that a path stands for."""
    return ShardedRecords([open_one(file) for file in expand(path)])

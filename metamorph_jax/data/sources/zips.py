"""Zips of JSON lines, as MMC4 comes: `docs_no_face_shard_7_v3.jsonl.zip`.

Nothing is unpacked to disk. An index of all lines is made once and kept beside the file, as that of
JSON lines is. A line of a compressed member can't be read alone, so the whole member is unpacked in
memory (a shard of MMC4 in a tenth of a second), and the last few stay there: records that are read
in their order are fast, and of shuffled ones each costs that time. Unzip what is read again and
again.
"""

import collections
import io
import os
import threading
import zipfile
import zlib

import numpy as np

from metamorph_jax import files
from metamorph_jax.data.sources import index_files
from metamorph_jax.data.sources.lines import json_record, unreadable
from metamorph_jax.errors import BadSample, FileError
from metamorph_jax.files import shown

VERSION = 1
ENDINGS = (".jsonl", ".ndjson")
MAX_MEMBER = 2**30  # bytes, unpacked
KEPT = 2  # members in memory, of each file
_BOM = b"\xef\xbb\xbf"
_FIELDS = ("member", "offsets", "lengths", "lines")


class ZippedRecords:
    """The lines of all members `*.jsonl` of a zip, one member after the other.

    A line that isn't a JSON object raises BadSample("bad_json") when it is read.

    Raises:
        FileError: it is not a zip, has no such member, or one that is encrypted, damaged, or larger
            than `MAX_MEMBER`.
    """

    def __init__(self, path: str, index_dir: str | None = None):
        self.path = path
        stat = os.stat(files.regular(path))
        stamp = [VERSION, stat.st_size, stat.st_mtime_ns]
        self.entries = _members(path)
        self._start()
        places = index_files.places(path, index_dir)
        found = (index_files.load(place, stamp, _FIELDS) for place in places)
        index = next((one for one in found if one is not None and self._fits(one)), None)
        if index is None:
            index = self._scan()
            index_files.save(places, stamp, dict(zip(_FIELDS, index, strict=True)))
        self.member, self.offsets, self.lengths, self.lines = index

    def _start(self) -> None:
        self._unpacked: collections.OrderedDict[int, bytes] = collections.OrderedDict()
        self._lock = threading.Lock()

    def _fits(self, index) -> bool:
        """Whether an index can be that of these members."""
        try:
            member, offsets, lengths, _ = index
            sizes = np.array([info.file_size for info in self.entries])
            return len({x.shape for x in index}) == 1 and bool(
                (offsets >= 0).all() and (offsets + lengths <= sizes[member]).all()
            )
        except (TypeError, ValueError, IndexError):
            return False

    def _scan(self) -> list[np.ndarray]:
        found = []
        for m in range(len(self.entries)):
            offset = 0
            for number, line in enumerate(io.BytesIO(self._bytes(m)), 1):
                cut = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
                if line[cut:].strip():
                    found.append((m, offset + cut, len(line) - cut, number))
                offset += len(line)
        columns = zip(*found, strict=True) if found else ((),) * 4
        return [np.array(column, np.int64) for column in columns]

    def _bytes(self, m: int) -> bytes:
        """Member m, unpacked."""
        with self._lock:
            if m not in self._unpacked:
                self._unpacked[m] = _unpack(self.path, self.entries[m])
                if len(self._unpacked) > KEPT:
                    self._unpacked.popitem(last=False)
            self._unpacked.move_to_end(m)
            return self._unpacked[m]

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, k: int) -> dict:
        try:
            data = self._bytes(int(self.member[k]))
        except FileError as e:
            raise BadSample("broken_zip", str(e)) from e
        start = int(self.offsets[k])
        return json_record(data[start : start + int(self.lengths[k])], self.where(k))

    def where(self, k: int) -> str:
        """File, member and line of record k."""
        name = self.entries[int(self.member[k])].filename
        return f"{shown(self.path)}: {shown(name)} line {int(self.lines[k])}"

    @property
    def bad_lines(self) -> tuple[tuple[int, str], ...]:
        """((line number from 1, message), ...) of all lines that can't be read. Reads the file."""
        return unreadable(self)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_unpacked", "_lock")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()


def _members(path: str) -> list[zipfile.ZipInfo]:
    try:
        with files.opened(path) as file, zipfile.ZipFile(file) as archive:
            found = [one for one in archive.infolist() if one.filename.endswith(ENDINGS)]
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as e:
        raise FileError(f"{shown(path)} is not a zip that can be read: {shown(e)}") from e
    found = [one for one in found if not one.filename.startswith("__MACOSX/")]
    if not found:
        raise FileError(f"{shown(path)} has no member that ends in {' or '.join(ENDINGS)}")
    for one in found:
        if one.flag_bits & 1:
            raise FileError(f"{shown(path)}: {shown(one.filename)} is encrypted")
        if one.file_size > MAX_MEMBER:
            raise FileError(
                f"{shown(path)}: {shown(one.filename)} has {one.file_size:,} bytes, at most "
                f"{MAX_MEMBER:,} are unpacked in memory: unzip it"
            )
    return found


def _unpack(path: str, member: zipfile.ZipInfo) -> bytes:
    """The bytes of a member, no more than it says to have."""
    try:
        with files.opened(path) as file, zipfile.ZipFile(file) as archive:
            with archive.open(member) as unpacked:
                data = unpacked.read(member.file_size + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError,
            RuntimeError, OSError) as e:  # fmt: skip
        raise FileError(f"{shown(path)}: {shown(member.filename)} is damaged: {shown(e)}") from e
    if len(data) != member.file_size:
        raise FileError(f"{shown(path)}: {shown(member.filename)} is not as long as it says")
    return data

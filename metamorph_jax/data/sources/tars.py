"""WebDataset: tar files in which neighbouring members of one name are a sample.

    00007.jpg  00007.json  00007.txt  00008.jpg  …       samples 00007, 00008, …

The name of a member is cut at the first dot of its last part: `a/b/00012.seg.png` is "seg.png" of
sample `a/b/00012`. Extensions are lower-cased. Folders, links, names without a dot, hidden files
and `__meta__` members are passed over.

Nothing is extracted. An index of all members is made once and kept beside the file, as that of
JSON lines is, so records are read at random. A tar that is damaged or cut off gives the samples
before that place; after them comes one more record, which is bad and says what is wrong, so that it
is counted.
"""

import dataclasses
import functools
import os
import tarfile
from collections.abc import Iterator, Mapping

import numpy as np

from metamorph_jax import files
from metamorph_jax.data.sources import index_files
from metamorph_jax.data.sources.base import ImageRef, Inside
from metamorph_jax.data.sources.schema import IMAGE_EXTENSIONS, MEDIA
from metamorph_jax.errors import BadSample, FileError
from metamorph_jax.files import shown

VERSION = 1
BLOCK = 512
MAX_HEADER = 2**20  # of a long name, or of a member's further attributes
MAX_TEXT = 2**26  # of the JSON and texts of a sample
TEXTS = ("txt", "text", "caption")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


@dataclasses.dataclass(frozen=True)
class Member:
    """A regular file in a tar: `size` bytes from `offset`."""

    name: str
    offset: int
    size: int

    @property
    def parts(self) -> tuple[str, str] | None:
        """(key of its sample, extension), or None where it belongs to none."""
        folder, slash, base = self.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        meta = self.name.split("/")[0]
        if not stem or not dot or (len(meta) > 3 and meta[:2] == meta[-2:] == "__"):
            return None
        return folder + slash + stem, extension.lower()


class _Damaged(Exception):
    """The tar can't be read any further; `member` is the one that it ends in, if that is known."""

    def __init__(self, why: str, member: Member | None = None):
        super().__init__(why)
        self.member = member


def scan(path: str | os.PathLike) -> tuple[list[list[Member]], str]:
    """(members of each sample, what is wrong with the tar or "").

    Raises:
        FileError: it can't be read, or doesn't begin as a tar does.
    """
    samples: list[list[Member]] = []
    key, seen = "", set()
    fault = ""
    members = _members(path)
    while not fault:
        try:
            member = next(members, None)
        except _Damaged as error:
            lost = error.member and error.member.parts
            if samples and not (lost and lost[0] != key):  # the last sample may lack something
                lost = samples.pop()[0].parts
            sample = f"sample {shown(lost[0], 80)!r} and " if lost else ""
            fault = f"{error}; {sample}what follows is not read"
            continue
        if member is None:
            break
        if member.parts is None:
            continue
        its_key, extension = member.parts
        if its_key != key or extension in seen or not samples:
            samples.append([])
            key, seen = its_key, set()
        samples[-1].append(member)
        seen.add(extension)
    return samples, fault


def _members(path) -> Iterator[Member]:
    """The regular files of a tar in order."""
    with files.opened(path) as file:
        end = os.fstat(file.fileno()).st_size
        at, name, size, found = 0, None, None, 0
        while at + BLOCK <= end:
            file.seek(at)
            head = file.read(BLOCK)
            if not head.strip(b"\0"):
                break
            info = _header(head, path, at, found)
            data, length = at + BLOCK, info.size if size is None else size
            length = 0 if info.type in (b"1", b"2", b"3", b"4", b"5", b"6") else length
            at = data + -(-length // BLOCK) * BLOCK
            if length < 0 or data + length > end:
                whole = Member((name or info.name).removeprefix("./"), data, length)
                _damaged(f"it is cut off in member {shown(whole.name, 80)!r}", path, found, whole)
            if info.type in (b"L", b"x"):
                if length > MAX_HEADER:
                    _damaged(f"a header of {length:,} bytes at byte {data}", path, found)
                name, size = _longer(info.type, file.read(length), name, size, path, found)
            elif info.type not in (b"K", b"g"):
                whole = (name or info.name).removeprefix("./")
                if info.type in (b"0", b"\0", b"7") and not whole.endswith("/"):
                    yield Member(whole, data, length)
                    found += 1
                name = size = None
        else:
            if at != end:  # the two blocks of zeros at the end may be missing, but no part of one
                _damaged(f"it is cut off at byte {end}", path, found)


def _damaged(why: str, path, found: int, member: Member | None = None) -> None:
    if not found:
        raise FileError(f"{shown(path)} is not a tar file: {why}")
    raise _Damaged(why, member)


def _header(head: bytes, path, at: int, found: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(head, "utf-8", "replace")
    except (tarfile.HeaderError, ValueError) as error:
        packed = _COMPRESSED.get(head[:2]) if at == 0 else None
        why = f"it is compressed ({packed}); decompress it" if packed else ""
        _damaged(why or f"no header of a member at byte {at} ({shown(error, 60)})", path, found)


def _longer(kind: bytes, data: bytes, name, size, path, found: int) -> tuple:
    """(name, size) of the member that follows, as GNU's and POSIX's long headers give them."""
    if kind == b"L":
        return data.split(b"\0")[0].decode("utf-8", "replace"), size
    at = 0
    try:
        while at < len(data):
            digits = data[at : at + 20].split(b" ")[0]
            end = at + int(digits)
            key, equals, value = data[at + len(digits) + 1 : end - 1].partition(b"=")
            if not equals or not at < end <= len(data):
                raise ValueError("an attribute that is none")
            if key == b"path":
                name = value.decode("utf-8", "replace")
            if key == b"size":
                size = int(value[:20])
            at = end
    except ValueError as error:
        _damaged(f"a broken header of attributes ({shown(error, 60)})", path, found)
    return name, size


@dataclasses.dataclass(frozen=True)
class _Index:
    """The samples of a tar as arrays.

    Attributes:
        names: uint8, all names one after another; name_ends, offsets, sizes: int64[m] of members.
        ends: int64[n] sample k has the members before ends[k].
        fault: uint8, text of what is wrong with the tar.
    """

    names: np.ndarray
    name_ends: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray
    fault: np.ndarray

    @classmethod
    def of(cls, samples: list[list[Member]], fault: str) -> "_Index":
        members = [member for sample in samples for member in sample]
        names = [member.name.encode("utf-8", "replace") for member in members]
        of = lambda values: np.array(values, np.int64)  # noqa: E731
        return cls(
            np.frombuffer(b"".join(names), np.uint8),
            np.cumsum(of([len(name) for name in names])),
            of([member.offset for member in members]),
            of([member.size for member in members]),
            np.cumsum(of([len(sample) for sample in samples])),
            np.frombuffer(fault.encode("utf-8", "replace"), np.uint8),
        )

    def is_sound(self, file_size: int) -> bool:
        """Whether the arrays belong together; a broken index is made again."""
        numbers = self.name_ends, self.offsets, self.sizes, self.ends
        texts = self.names, self.fault
        if any(a.dtype != np.int64 or a.ndim != 1 for a in numbers):
            return False
        if any(a.dtype != np.uint8 or a.ndim != 1 for a in texts):
            return False
        m, ends = len(self.offsets), self.ends
        return bool(
            self.name_ends.shape == self.offsets.shape == self.sizes.shape == (m,)
            and (ends[-1:] == m).all() and (np.diff(ends, prepend=0) > 0).all()
            and (np.diff(self.name_ends, prepend=0) > 0).all()
            and (self.name_ends[-1:] == len(self.names)).all()
            and (not m or (self.offsets.min() > 0 and self.sizes.min() >= 0))
            and (self.offsets + self.sizes <= file_size).all()
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.ends)

    def sample(self, k: int) -> list[Member]:
        first, last = int(self.ends[k - 1]) if k else 0, int(self.ends[k])
        starts = [int(self.name_ends[i - 1]) if i else 0 for i in range(first, last)]
        return [
            Member(
                self.names[start : int(self.name_ends[i])].tobytes().decode("utf-8", "replace"),
                int(self.offsets[i]), int(self.sizes[i]),
            )
            for i, start in zip(range(first, last), starts, strict=True)
        ]  # fmt: skip


@functools.lru_cache(maxsize=256)  # shards of which the index stays in memory
def _index(path: str, index_dir: str | None, size: int, time: int) -> _Index:
    stamp = [VERSION, size, time]
    names = [field.name for field in dataclasses.fields(_Index)]
    for place in index_files.places(path, index_dir):
        arrays = index_files.load(place, stamp, names)
        index = None if arrays is None else _Index(*arrays)
        if index is not None and index.is_sound(size):
            return index
    index = _Index.of(*scan(path))
    arrays = {name: getattr(index, name) for name in names}
    index_files.save(index_files.places(path, index_dir), stamp, arrays)
    return index


class TarRecords:
    """The samples of one tar as records.

    A record is what the sample's `json` holds, if it has one. To that come, where the JSON has no
    such keys, `txt` (the sample's text) and `image` (the name of its image, or a list of several).

    Args:
        path: of the tar.
        index_dir: folder of its index, see `SourceConfig`.
    """

    bad_lines: tuple[tuple[int, str], ...] = ()

    def __init__(self, path: str, index_dir: str | None = None):
        self.path = path
        stat = os.stat(files.regular(path))
        self._args = path, index_dir, stat.st_size, stat.st_mtime_ns
        index = self._index
        self._count, self._broken = len(index), bool(len(index.fault))

    @property
    def _index(self) -> _Index:
        return _index(*self._args)

    def __len__(self) -> int:
        return self._count + self._broken

    def _sample(self, k: int) -> dict[str, Member]:
        """Extension -> member of sample k."""
        if k >= self._count:
            fault = self._index.fault.tobytes().decode("utf-8", "replace")
            raise BadSample("broken_tar", fault)
        return {member.parts[1]: member for member in self._index.sample(k)}

    def where(self, k: int) -> str:
        """File and name of sample k."""
        if k >= self._count:
            return shown(self.path)
        return f"{shown(self.path)} sample {shown(self._index.sample(k)[0].parts[0], 80)}"

    def members(self, k: int) -> Mapping[str, ImageRef]:
        """The images of sample k by name: whole, without folders, and by the extension alone."""
        found = {}
        for extension, member in self._sample(k).items():
            if _is_image(extension):
                ref = ImageRef(self.path, inside=Inside(member.name, member.offset, member.size))
                names = extension, os.path.basename(member.name), member.name
                found |= dict.fromkeys(names, ref)
        return found

    def __getitem__(self, k: int) -> dict:
        sample = self._sample(k)
        record = {}
        if "json" in sample:
            record = _parsed(self._read(sample["json"]), f"member {shown(sample['json'].name)}")
        for extension in TEXTS:
            if extension in sample and "txt" not in record:
                record["txt"] = self._text(sample[extension])
        images = [name for name in sample if _is_image(name)]
        if images and not any(record.get(key) for key in MEDIA):
            plain = [name for name in images if "." not in name]
            names = [sample[name].name for name in (plain if len(plain) == 1 else images)]
            record["image"] = names[0] if len(names) == 1 else names
        return record

    def _read(self, member: Member) -> bytes:
        if member.size > MAX_TEXT:
            raise BadSample("oversized", f"member {shown(member.name)}: {member.size:,} bytes")
        with files.opened(self.path) as file:
            file.seek(member.offset)
            return file.read(member.size)

    def _text(self, member: Member) -> str:
        try:
            return self._read(member).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSample("bad_text", f"member {shown(member.name)} is not UTF-8") from error


def _is_image(extension: str) -> bool:
    return f".{extension}".endswith(IMAGE_EXTENSIONS)


def _parsed(data: bytes, where: str) -> dict:
    try:
        return files.parse(data, where, dict)
    except FileError as error:
        raise BadSample("bad_json", str(error)) from error

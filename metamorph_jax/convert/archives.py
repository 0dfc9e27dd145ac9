"""Files of torch.save, looked at before torch reads them.

The newer format is a zip archive of a pickle and one entry for each storage, which torch writes
without compression: an archive that compresses unpacks to any size. The older format is a row of
pickles with the storages behind them. torch's `weights_only` loader runs no foreign code, but calls
whatever is on its list, and a `bytearray` of 10 GB is; here only what makes tensors is.
"""

import io
import pathlib
import pickletools
import re
import zipfile

from metamorph_jax import files
from metamorph_jax.errors import WeightError

_PICKLE = 2**23  # bytes; a pickle has some 90 for each tensor
_ENTRIES = 2**17
_OLD_PICKLES = 5  # magic number, version, about the system, the tensors, names of the storages
_MAKES_TENSORS = re.compile(
    r"collections (OrderedDict|defaultdict)|__builtin__ (list|dict)|_codecs encode"
    r"|torch\.nn\.parameter Parameter"
    r"|torch (\w+Storage|Size|device|[a-z]+\d+\w*|bool|half|float|double|short|int|long)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch\.(storage (Untyped|Typed)Storage|serialization _get_layout)"
)
_OTHER_GLOBALS = {"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}


def check(path: str | pathlib.Path) -> bool:
    """Whether the file is a zip archive, that is of the newer format.

    Raises:
        MissingFile, FileError: it can't be opened.
        WeightError: it is damaged, unpacks to more than its bytes, or holds more than tensors.
    """
    with files.opened(path) as file:
        zipped = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        try:
            if zipped:
                with zipfile.ZipFile(file) as archive:
                    _check_archive(archive, pathlib.Path(path).stat().st_size)
            else:
                pickles = io.BytesIO(file.read(_PICKLE))
                for _ in range(_OLD_PICKLES):
                    _check_pickle(pickles)
        except Exception as error:  # zipfile and pickletools raise half a dozen kinds
            raise WeightError(
                f"{path} is damaged, or holds more than tensors, which we don't load: "
                f"{files.shown(error)}"
            ) from error
    return zipped


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    entries = archive.infolist()
    if len(entries) > _ENTRIES:
        raise ValueError(f"{len(entries):,} entries")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"the entry {entry.filename} is compressed")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its entries overlap")
    for entry in entries:
        if entry.filename.endswith(".pkl"):
            if entry.file_size > _PICKLE:
                raise ValueError(f"a pickle of {entry.file_size:,} bytes")
            _check_pickle(io.BytesIO(archive.read(entry)))


def _check_pickle(data: io.BytesIO) -> None:
    """ValueError if the pickle that starts here names anything but what makes tensors."""
    for opcode, value, _ in pickletools.genops(data):
        made = opcode.name != "GLOBAL" or _MAKES_TENSORS.fullmatch(value)
        if not made or opcode.name in _OTHER_GLOBALS:
            raise ValueError(f"{opcode.name} {value or ''}")

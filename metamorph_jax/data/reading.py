"""Official files of benchmarks: JSON, JSON lines, CSV and TSV, Parquet; and images inside them."""

import base64
import binascii
import csv
import io
import pathlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from metamorph_jax import files
from metamorph_jax.errors import FileError

MAX_BYTES = 2**32  # of a file that is read whole
MAX_LINE = 2**27  # a TSV row holds an image


def json_file(path: str, kind: type | None = None, what: str = "") -> Any:
    """The value of a JSON file; see `files.read_json`."""
    return files.read_json(path, kind, what=what, max_bytes=MAX_BYTES)


def json_lines(path: str, *keys: str, texts: Sequence[str] = ()) -> Iterator[dict]:
    """The objects of a file of JSON lines, each with these keys; see `required`."""
    for number, line in files.lines(path, MAX_LINE):
        if line.strip():
            where = f"{files.shown(path)}, line {number}"
            yield required(files.parse(line, where, dict), where, *keys, texts=texts)


def required(row: dict, where: str, *keys: str, texts: Sequence[str] = ()) -> dict:
    """The row, if it is an object with these keys, and with these that hold text.

    Raises:
        FileError: it isn't.
    """
    if not isinstance(row, dict):
        raise FileError(f"{where}: {files.shown(repr(row), 60)}, expected an object")
    absent = [key for key in (*keys, *texts) if key not in row]
    if absent:
        raise FileError(f"{where}: no {', '.join(absent)}; it has {files.shown(', '.join(row))}")
    text_list([row[key] for key in texts], f"{where}, {', '.join(texts)}")
    return row


def text_list(value, where: str) -> list[str]:
    """The value, if it is a list of texts; FileError if it isn't."""
    if not isinstance(value, list):
        raise FileError(f"{where}: {files.shown(repr(value), 60)}, expected a list of texts")
    if wrong := [text for text in value if not isinstance(text, str)]:
        raise FileError(f"{where}: {files.shown(repr(wrong[0]), 60)}, expected text")
    return value


def table(path: str, *columns: str, quoted: bool = True) -> Iterator[dict[str, str]]:
    """The rows of a CSV file, or TSV if that is its extension, by its first line's names.

    quoted: cells may stand in quotes; otherwise a quote is a character like any other.
    """
    csv.field_size_limit(MAX_LINE)
    delimiter = "\t" if pathlib.Path(path).suffix.lower() == ".tsv" else ","
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    data = files.read_text(path, MAX_BYTES)
    reader = csv.DictReader(
        io.StringIO(data, newline=""), delimiter=delimiter, restval="", quoting=quoting
    )
    try:
        required(dict.fromkeys(reader.fieldnames or ()), f"{files.shown(path)}, line 1", *columns)
        for row in reader:
            row.pop(None, None)  # cells beyond the last column
            yield row
    except csv.Error as error:
        raise FileError(f"{files.shown(path)}, line {reader.line_num}: {error}") from error


def parquet(path: str, *columns: str) -> Iterator[dict]:
    """The rows of a Parquet file. An image is a dict with its "bytes".

    Raises:
        FileError: it can't be read; or pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise FileError(
            f"{files.shown(path)}: reading Parquet needs pyarrow: pip install 'metamorph_jax[eval]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(files.regular(path)) as file:
            where = files.shown(path)
            required(dict.fromkeys(file.schema_arrow.names), where, *columns)
            for batch in file.iter_batches(64):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise FileError(f"{files.shown(path)} can't be read as Parquet: {error}") from error


def from_base64(text: str, where: str) -> bytes:
    """The bytes of an image in a cell.

    Raises:
        FileError: it is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FileError(f"{where}: not an image in base64 ({error})") from error


def lazy_base64(text: str, where: str):
    """A `Picture` that is decoded when its turn comes."""
    return partial(from_base64, text, where)

"""A line of a file of JSON lines as a record."""

from metamorph_jax import files
from metamorph_jax.errors import BadSample, FileError


def json_record(data: bytes, where: str) -> dict:
    """A line of JSON; BadSample if it is not an object."""
    try:
        return files.parse(data, where, dict)
    except FileError as e:
        python = data.lstrip().startswith(b"{'")
        hint = "; it is written with Python's quotes, JSON has double ones" if python else ""
        raise BadSample("bad_json", f"{e}{hint}") from e


def unreadable(records) -> tuple[tuple[int, str], ...]:
    """((line number from 1, message), ...) of all lines of a file that can't be read.

    Args:
        records: random access to them; `lines` has the number of each.
    """
    bad = []
    for k in range(len(records)):
        try:
            records[k]
        except BadSample as e:
            bad.append((int(records.lines[k]), e.detail))
    return tuple(bad)

"""metrics.jsonl, read back: by a resumed run, for reports and for tables of sweeps."""

import math
import os
from collections.abc import Iterator

from metamorph_jax import files
from metamorph_jax.errors import FileError

Series = dict[str, tuple[list[int], list[float]]]


def lines(path: str | os.PathLike) -> Iterator[tuple[int, str, dict]]:
    """(step, text, values by metric) of each line; the incomplete last line of a run that was
    killed is left out.

    Raises:
        MissingFile: there is no such file.
        FileError: another line is not a JSON object with a whole number as `step`.
    """
    torn: FileError | None = None
    for number, text in files.lines(path):
        if torn:
            raise torn
        where = f"{files.shown(path)}, line {number}"
        try:
            values = files.parse(text, where, dict)
        except FileError as error:
            torn = error  # unless another line follows
            continue
        step = values.pop("step", None)
        if type(step) is not int or not 0 <= step < 2**63:
            raise FileError(f"{where}: step is {files.shown(repr(step), 40)}, not a whole number")
        yield step, text, values


def read_metrics(path: str | os.PathLike, finite: bool = True) -> Series:
    """metric -> (steps, values), in the order of the steps.

    After a resume a step may appear twice: the last one counts.

    Args:
        path: of the file.
        finite: leave out values that are NaN or infinite.

    Raises:
        MissingFile, FileError: as `lines`.
    """
    found: dict[str, dict[int, float]] = {}
    for step, _, values in lines(path):
        for name, value in values.items():
            read = _number(value)
            if read is not None and (math.isfinite(read) or not finite):
                found.setdefault(name, {})[step] = read
    return {k: (sorted(v), [v[step] for step in sorted(v)]) for k, v in found.items()}


def _number(value) -> float | None:
    """A number; those that JSON does not have are strings there ("nan"). None: something else."""
    if isinstance(value, str) and value.lower().lstrip("+-") not in ("nan", "inf", "infinity"):
        return None
    if not isinstance(value, int | float | str) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf

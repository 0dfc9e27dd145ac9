"""metrics.jsonl, read back: for reports and for tables of sweeps."""

import math
import os

from metamorph_jax import files
from metamorph_jax.errors import FileError

Series = dict[str, tuple[list[int], list[float]]]


def read_metrics(path: str | os.PathLike, finite: bool = True) -> Series:
    """metric -> (steps, values), in the order of the steps.

    After a resume a step may appear twice: the last one counts. The incomplete last line of a run
    that was killed is left out.

    Args:
        path: of the file.
        finite: leave out values that are NaN or infinite.

    Raises:
        MissingFile: there is none.
        FileError: another line is not a JSON object with a whole number as `step`.
    """
    found: dict[str, dict[int, float]] = {}
    torn: FileError | None = None
    for number, text in files.lines(path):
        if torn:
            raise torn
        where = f"{files.shown(path)}, line {number}"
        try:
            line = files.parse(text, where, dict)
        except FileError as error:
            torn = error  # unless another line follows
            continue
        step = line.pop("step", None)
        if type(step) is not int or not 0 <= step < 2**63:
            raise FileError(f"{where}: step is {files.shown(repr(step), 40)}, not a whole number")
        for name, value in line.items():
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

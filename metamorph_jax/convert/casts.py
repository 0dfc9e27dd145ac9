"""Casts of weights, in which nothing is lost without a word."""

import numpy as np

# Faults that `--allow-nan` allows.
ALLOWED = ("NaN", "inf")


def cast_into(out: np.ndarray, source: np.ndarray) -> str:
    """Copies weights into an array of another dtype; returns what is wrong with them.

    Returns:
        "" if nothing is, else words before "in some tensor": they are NaN or inf; or too large for
        the dtype of `out`; or integers where `out` has floating-point numbers (those of packed
        formats, say, which mean something else).
    """
    if source.dtype.kind != "c":  # a complex number can't be cast, and is a fault
        with np.errstate(over="ignore", invalid="ignore"):  # it is looked at right below
            out[...] = source
    return fault_of(source, out)


def fault_of(source: np.ndarray, cast: np.ndarray) -> str:
    """What is wrong with weights that were cast; see `cast_into`."""
    if not _floating(cast.dtype):
        return ""
    if not _floating(source.dtype):
        return f"{source.dtype} instead of floating-point numbers"
    if _finite(cast):
        return ""
    if _finite(source):
        return f"numbers too large for {cast.dtype}"
    return "NaN" if np.isnan(source).any() else "inf"


def _floating(dtype: np.dtype) -> bool:
    return dtype.name.startswith(("float", "bfloat"))


def _finite(array: np.ndarray) -> bool:
    if array.dtype.name == "bfloat16":  # on its bits, several times faster than by way of float32
        return not ((array.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(array).all())

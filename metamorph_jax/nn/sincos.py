"""Fixed sin-cos position tables, and the bicubic resize of a table for another grid.

For width C, position p and frequency f_k = 10000 ** (-k / (C / 2)), k < C / 2, a row of the 1-D
table is [sin(p f_0), sin(p f_1), ..., cos(p f_0), ...]. In 2-D the first half of the channels is
the row's 1-D code of width C / 2, the second half the column's (He et al. 2022, arXiv 2111.06377).

All of it is numpy, made while tracing. Tables are computed in float64 and rounded to float32 once.
`jax.image.resize(method="cubic")` has another kernel (a = -0.5) and antialiases: not this one.
"""

from collections.abc import Callable

import numpy as np


def table_1d(length: int, width: int) -> np.ndarray:
    """float32[length, width] for positions 0, 1, ...

    Raises:
        ValueError: the width is odd.
    """
    return _codes(length, width).astype(np.float32)


def table_2d(side: int, width: int, extra: int = 0) -> np.ndarray:
    """float32[extra + side * side, width], row-major, after `extra` rows of zeros (class token).

    Raises:
        ValueError: the width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"a 2-D sin-cos table of width {width}: expected a multiple of 4")
    codes = _codes(side, width // 2)
    rows, columns = np.repeat(codes, side, axis=0), np.tile(codes, (side, 1))
    grid = np.concatenate([rows, columns], axis=1)
    return np.concatenate([np.zeros((extra, width)), grid]).astype(np.float32)


def _codes(length: int, width: int) -> np.ndarray:
    """float64[length, width]"""
    if width % 2:
        raise ValueError(f"a sin-cos code of width {width}: expected an even number")
    angles = np.outer(np.arange(length), 10000.0 ** (-np.arange(width // 2) / (width / 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def bicubic(n: int, m: int) -> np.ndarray:
    """Weights float64[m, n] of torch's bicubic from n samples to m with align_corners False.

    Half-pixel centres, a = -0.75, clamped border, no antialiasing.
    """
    return _bicubic_at((np.arange(m) + 0.5) * n / m - 0.5, n)


def aligned_bicubic(n: int, m: int) -> np.ndarray:
    """Weights float64[m, n] as `bicubic`, with align_corners True: end samples fall together."""
    return _bicubic_at(np.arange(m) * ((n - 1) / max(m - 1, 1)), n)


def _bicubic_at(centre: np.ndarray, n: int) -> np.ndarray:
    """float64[m, n]: the weights of n samples at places centre: float64[m], in samples."""
    a = -0.75
    first = np.floor(centre).astype(int)
    out = np.zeros((len(centre), n))
    for tap in range(-1, 3):
        d = np.abs(centre - (first + tap))
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        place = np.clip(first + tap, 0, n - 1)
        np.add.at(out, (np.arange(len(centre)), place), np.where(d <= 1, near, far))
    return out


def resize_table(
    table: np.ndarray, side: int, extra: int = 0, weights: Callable = bicubic
) -> np.ndarray:
    """A table of a square grid for a grid of side * side: [extra + side * side, D], same dtype.

    Args:
        table: float[extra + n * n, D], row-major; the first `extra` rows (class token) stay.
        weights: (n, m) -> float64[m, n] for one dimension.

    Raises:
        ValueError: the rows are not a square plus `extra`.
    """
    old = round(max(len(table) - extra, 0) ** 0.5)
    if old * old + extra != len(table):
        raise ValueError(f"a position table of {len(table)} rows is not a square plus {extra}")
    if old == side:
        return table
    grid = table[extra:].reshape(old, old, -1).astype(np.float64)
    m = weights(old, side)
    grid = np.einsum("ai,ijd,bj->abd", m, grid, m, optimize=True).reshape(side * side, -1)
    return np.concatenate([table[:extra], grid.astype(table.dtype)])

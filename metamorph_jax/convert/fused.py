"""Projections of queries, keys and values that a published layout has in one tensor.

They lie one after the other along the first axis: a weight [3D, D], a bias [3D]. Here each is a
tensor of its own, named as `parts` says; so are those that are reported as missing.
"""

import functools
from collections.abc import Callable, Mapping

import numpy as np

from metamorph_jax.convert import names

# Published name of a tensor -> the names of its three parts, or None if it is not a fused one.
Parts = Callable[[str], tuple[str, str, str] | None]


def split(tensors: Mapping[str, np.ndarray], parts: Parts) -> names.Mapped:
    """A lazy view in which fused tensors have been replaced by their parts."""
    found = {key: parts(key) for key in tensors}
    changes = {
        name: (key, functools.partial(_part, n=n))
        for key, three in found.items()
        for n, name in enumerate(three or ())
    }
    return names.Mapped(tensors, changes, lambda key: found.get(key) is None)


def _part(tensor, n: int) -> np.ndarray:
    tensor = np.atleast_1d(np.asarray(tensor))
    size = len(tensor) // 3
    return tensor[n * size : (n + 1) * size]


def joined(found: names.Lazy, fused: Callable[[str], str | None]) -> names.Lazy:
    """The inverse of `split`.

    Args:
        found: with all three parts of a tensor, queries first.
        fused: name of a part -> that of its fused tensor; None for other tensors.
    """
    out, together = names.Lazy(), {}
    for key in found:
        whole = fused(key)
        if whole is None:
            out.set(key, found.maker(key), found.shape_of(key), found.dtype_of(key))
        else:
            together.setdefault(whole, []).append(key)
    for whole, keys in together.items():
        rows, *rest = found.shape_of(keys[0])
        make = functools.partial(
            _concatenated, [found.maker(key) for key in sorted(keys, key=_place)]
        )
        out.set(whole, make, (3 * rows, *rest), found.dtype_of(keys[0]))
    return out


def _place(key: str) -> int:
    """Of queries, keys and values: our names have q_proj, k_proj or v_proj before the leaf."""
    return "qkv".index(key.split(".")[-2][0])


def _concatenated(makers) -> np.ndarray:
    return np.concatenate([make() for make in makers])

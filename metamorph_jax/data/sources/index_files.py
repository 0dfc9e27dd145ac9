"""Indices of data files, kept beside them: caches of arrays that are made again when in doubt."""

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np

from metamorph_jax import files


def places(path: str, index_dir: str | None, what: str = "offsets") -> list[str]:
    """Where the index may be: the given folder, or next to the file, or the user's cache."""
    name = f"{os.path.basename(path)}.{what}.npz"
    tag = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:12]
    if index_dir:
        return [os.path.join(os.path.expanduser(index_dir), f"{tag}-{name}")]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    own = os.path.join(os.path.dirname(os.path.abspath(path)), "." + name)
    return [own, os.path.join(cache, "metamorph_jax", f"{tag}-{name}")]


def load(path: str, stamp: list[int] | str, names: Sequence[str]) -> list[np.ndarray] | None:
    """The arrays of an index, if it is there and of this stamp."""
    try:
        with files.opened(path) as f, np.load(f, allow_pickle=False) as z:
            return [z[name] for name in names] if z["stamp"].tolist() == stamp else None
    except Exception:  # absent, or broken in any way: it is only a cache, so it is made again
        return None


def save(places: Sequence[str], stamp: list[int] | str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an index into the first of the places that can be written."""
    for path in places:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            fd, temp = tempfile.mkstemp(dir=os.path.dirname(path), suffix=".tmp")
            with os.fdopen(fd, "wb") as f:
                np.savez(f, stamp=np.array(stamp), **arrays)
            os.replace(temp, path)
            return
        except OSError:  # a read-only data folder: try the next place, or do without
            continue

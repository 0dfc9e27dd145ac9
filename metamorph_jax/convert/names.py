"""Names and layouts of PyTorch checkpoints for any NNX module, in both directions.

    path of ours                            published key               change
    conv_in.kernel        [h, w, i, o]      conv_in.weight              [o, i, h, w]
    a.0.to_q.kernel       [i, o]            a.0.to_q.weight             [o, i]
    norm.scale                              norm.weight
    embed.embedding       [V, D]            embed.weight
    a.bias, a.anything_else                 the same name, the same layout

Stacked layers, with `stacked=("layers",)`: the leaf `layers.q.kernel [n, i, o]` stands for the n
tensors `layers.0.q.weight` ... Every missing, left-over and mis-shaped key is reported at once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# Linear, 1-D and 2-D convolution: ours -> theirs. The way back is the inverse permutation.
_TO_TORCH = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1)}


def torch_name(path: Iterable) -> str:
    """The published key of one of our parameters, stacked axes left aside."""
    *parts, leaf = (str(p) for p in path)
    return ".".join([*parts, _LEAVES.get(leaf, leaf)])


def to_torch_layout(leaf: str, array: np.ndarray) -> np.ndarray:
    """Our array in PyTorch's layout."""
    return np.transpose(array, _TO_TORCH[array.ndim]) if leaf == "kernel" else array


def from_torch_layout(leaf: str, array: np.ndarray) -> np.ndarray:
    """A PyTorch array in our layout."""
    if leaf != "kernel":
        return array
    return np.transpose(array, np.argsort(_TO_TORCH[array.ndim]))


def _torch_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[i] for i in _TO_TORCH[len(shape)]) if leaf == "kernel" else tuple(shape)


def _slices(path: tuple, shape: tuple, stacked: tuple[str, ...]) -> Iterator[tuple]:
    """(path of one tensor, its index on the leading axis or None)."""
    at = next((i for i, part in enumerate(path) if part in stacked), None)
    if at is None:
        yield path, None
        return
    for i in range(shape[0]):
        yield (*path[: at + 1], i, *path[at + 1 :]), i


def load_torch_dict(
    module: nnx.Module,
    tensors: Mapping[str, np.ndarray],
    prefix: str = "",
    *,
    stacked: tuple[str, ...] = (),
    rename: Callable[[str], str] = lambda key: key,
    ignore: Callable[[str], bool] = lambda key: False,
    only=nnx.Param,
) -> None:
    """Fills all parameters of `module` in place.

    Args:
        module: receives the tensors, cast to the dtype its parameters have.
        tensors: published key -> array.
        prefix: only keys that start with it belong to this module; it is cut off.
        stacked: path components below which our leaves have a leading layer axis.
        rename: maps our name of a key (without prefix) to the published one.
        ignore: keys (without prefix) that are dropped on purpose.
        only: nnx filter of the variables to fill.
    """
    given = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    given = {k: v for k, v in given.items() if not ignore(k)}
    missing, misshaped, used, loaded = [], [], set(), []
    for path, variable in nnx.to_flat_state(nnx.state(module, only)):
        leaf, parts = str(path[-1]), []
        for one, index in _slices(path, variable.shape, stacked):
            key = rename(torch_name(one))
            shape = variable.shape if index is None else variable.shape[1:]
            expected = _torch_shape(leaf, shape)
            if key not in given:
                missing.append(key)
                continue
            used.add(key)
            if tuple(given[key].shape) != expected:
                misshaped.append(f"{key}: {tuple(given[key].shape)}, expected {expected}")
                continue
            array = from_torch_layout(leaf, np.asarray(given[key]))
            parts.append(array if index is None else array[None])
        if not missing and not misshaped:
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            loaded.append((path, variable.replace(jnp.asarray(whole, variable.dtype))))
    left = sorted(set(given) - used)
    if missing or misshaped or left:
        lines = [f"weights do not fit {type(module).__name__} (prefix {prefix!r})"]
        for title, keys in (("missing", missing), ("left over", left), ("wrong shape", misshaped)):
            if keys:
                lines.append(f"{title} ({len(keys)}): " + "; ".join(keys))
        raise ValueError("\n".join(lines))
    nnx.update(module, nnx.from_flat_state(loaded))


def to_torch_dict(
    module: nnx.Module,
    prefix: str = "",
    *,
    stacked: tuple[str, ...] = (),
    rename: Callable[[str], str] = lambda key: key,
    only=nnx.Param,
) -> dict[str, np.ndarray]:
    """The inverse of `load_torch_dict`: published key -> numpy array in PyTorch's layout."""
    out = {}
    for path, variable in nnx.to_flat_state(nnx.state(module, only)):
        array = np.asarray(variable[...])
        for one, index in _slices(path, array.shape, stacked):
            part = array if index is None else array[index]
            part = np.ascontiguousarray(to_torch_layout(str(path[-1]), part))
            out[prefix + rename(torch_name(one))] = part
    return out

"""Names and layouts of PyTorch checkpoints for any NNX module, in both directions.

    path of ours                            published key               change
    conv_in.kernel        [h, w, i, o]      conv_in.weight              [o, i, h, w]
    a.0.to_q.kernel       [i, o]            a.0.to_q.weight             [o, i]
    norm.scale                              norm.weight
    embed.embedding       [V, D]            embed.weight
    a.bias, a.anything_else                 the same name, the same layout

Stacked layers, with `stacked=("layers",)`: the leaf `layers.q.kernel [n, i, o]` stands for the n
tensors `layers.0.q.weight` ... Every missing, left-over and mis-shaped key is reported at once.

No array is held twice. A leaf is filled in pieces of a few layers, each cast on the host and put on
the leaf's devices (of a sharded leaf, each shard gets its part), and the old leaf is dropped first.
Both sides are lazy mappings: a tensor is read, or fetched from the device, when its turn comes.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax import distributed
from metamorph_jax.convert import casts
from metamorph_jax.errors import WeightError
from metamorph_jax.files import shown
from metamorph_jax.models import lora

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# Linear, 1-D and 2-D convolution: ours -> theirs. The way back is the inverse permutation.
_TO_TORCH = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1)}
# Bytes that are filled or fetched at once; a smaller leaf needs no device program.
_PIECE = 2**26
_LISTED = 1000  # keys in a message

_nan_allowed = contextvars.ContextVar("nan_allowed", default=False)
_passed_over = contextvars.ContextVar("passed_over", default=frozenset())


@contextlib.contextmanager
def allow_nan():
    """Inside, tensors with NaN or inf are loaded instead of refused."""
    token = _nan_allowed.set(True)
    try:
        yield
    finally:
        _nan_allowed.reset(token)


@contextlib.contextmanager
def passing_over(variables: Iterable[nnx.Variable]):
    """Inside, these parameters are checked against the tensors, but not read: something else will
    fill them."""
    token = _passed_over.set(_passed_over.get() | {id(v) for v in variables})
    try:
        yield
    finally:
        _passed_over.reset(token)


# ---- lazy mappings


def shape_of(tensors: Mapping, key: str) -> tuple[int, ...]:
    """The shape of one tensor, without reading it where the mapping knows."""
    known = getattr(tensors, "shape_of", None)
    return tuple(np.shape(tensors[key]) if known is None else known(key))


class Mapped(Mapping):
    """A lazy view of `tensors` with some of them changed.

    Args:
        tensors: key -> array.
        changes: key -> function of the tensor with this key; or (source key, function) for a
            tensor that is made from another one. An absent key of the first kind stays absent.
        only: which keys of `tensors` are visible.
    """

    def __init__(self, tensors: Mapping, changes: Mapping | None = None, only=lambda key: True):
        self._tensors = tensors
        self._changes = {
            key: change if isinstance(change, tuple) else (key, change)
            for key, change in (changes or {}).items()
        }
        keys = [key for key in tensors if only(key)]
        made = [k for k, (source, _) in self._changes.items() if k != source]
        self._keys = dict.fromkeys([*keys, *made])

    def __getitem__(self, key: str):
        if key not in self._keys:
            raise KeyError(key)
        source, change = self._changes.get(key, (key, None))
        array = self._tensors[source]
        return array if change is None else change(array)

    def shape_of(self, key: str) -> tuple[int, ...]:
        if key in self._changes:
            return tuple(np.shape(self[key]))
        return shape_of(self._tensors, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key) -> bool:
        return key in self._keys


class Joined(Mapping):
    """Lazy mappings as one.

    Args:
        parts: (prefix of all keys, mapping) each.
    """

    def __init__(self, *parts: tuple[str, Mapping]):
        self._places = {
            prefix + key: (tensors, key) for prefix, tensors in parts for key in tensors
        }

    def __getitem__(self, key: str):
        tensors, inside = self._places[key]
        return tensors[inside]

    def shape_of(self, key: str) -> tuple[int, ...]:
        return shape_of(*self._places[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Lazy(MutableMapping):
    """key -> array, where a value may be a function that makes the array on request."""

    def __init__(self, makers: Mapping[str, tuple[Callable, tuple, np.dtype]] | None = None):
        self._makers = dict(makers or {})

    def __getitem__(self, key: str) -> np.ndarray:
        return self._makers[key][0]()

    def __setitem__(self, key: str, value) -> None:
        self.set(key, lambda: value, value.shape, value.dtype)

    def set(self, key: str, make: Callable, shape, dtype) -> None:
        """`make()` gives the array of this shape and dtype."""
        self._makers[key] = (make, tuple(shape), np.dtype(dtype))

    def maker(self, key: str) -> Callable | None:
        """The function that makes the array of this key, or None without the key."""
        return self._makers[key][0] if key in self._makers else None

    def only(self, keys: Iterable[str]) -> "Lazy":
        """Those with these keys, as far as they are there."""
        return Lazy({key: self._makers[key] for key in keys if key in self._makers})

    def shape_of(self, key: str) -> tuple[int, ...]:
        return self._makers[key][1]

    def dtype_of(self, key: str) -> np.dtype:
        return self._makers[key][2]

    def __contains__(self, key) -> bool:
        return key in self._makers

    def __delitem__(self, key: str) -> None:
        del self._makers[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def joined(*parts: Lazy) -> Lazy:
    """The arrays of all parts, still made on request."""
    out = Lazy()
    for part in parts:
        for key in part:
            out.set(key, part.maker(key), part.shape_of(key), part.dtype_of(key))
    return out


# ---- names and layouts


def torch_name(path: Iterable) -> str:
    """The published key of one of our parameters, ignoring stacked axes."""
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


# ---- in


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

    Names and shapes are checked before anything changes.

    Args:
        module: receives the tensors, with the dtypes and shardings of its parameters. These may be
            ShapeDtypeStructs, with a sharding or without (then: the default device).
        tensors: published key -> array.
        prefix: only keys that start with it belong to this module; it is cut off.
        stacked: path components below which our leaves have a leading layer axis.
        rename: maps our name of a key (without prefix) to the published one.
        ignore: keys (without prefix) that are dropped on purpose.
        only: nnx filter of the variables to fill.

    Raises:
        WeightError: listing every missing, left-over and mis-shaped key; or every tensor that holds
            NaN or inf (see `allow_nan`), integers where floating-point numbers belong, or numbers
            too large for the parameter's dtype, after which the module is partly filled. Where the
            module is spread over several processes, all raise it, whichever of them saw it.
    """
    given = {k[len(prefix) :] for k in tensors if k.startswith(prefix)}
    given = {k for k in given if not ignore(k)}
    _refuse_too_many_layers(module, only, stacked, len(given))
    leaves = _plan(module, only, stacked, rename)
    _check(f"{type(module).__name__} (prefix {prefix!r})", leaves, tensors, prefix, given)
    faults: list[tuple[str, str]] = []
    spread = False
    for leaf in leaves:
        if id(_variable(module, leaf.path)) in _passed_over.get():
            continue
        keys = [prefix + key for key, _ in leaf.tensors]
        spread |= not _fill(module, leaf.path, tensors, keys, leaf.many, faults)
    refuse(faults, spread)


def load_parts(*loads: Callable[[], None]) -> None:
    """Calls all of these functions, each of which loads a part of a checkpoint.

    Raises:
        WeightError: with what all of them reported as ValueError, not only the first one.
    """
    problems = []
    for load in loads:
        try:
            load()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise WeightError("\n".join(problems))


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A parameter of ours, and the tensors that it is made of.

    Attributes:
        path: in the module.
        many: whether the tensors are slices along its leading axis.
        tensors: (published key without prefix, expected shape) each.
    """

    path: tuple
    many: bool
    tensors: list[tuple[str, tuple[int, ...]]]


def _refuse_too_many_layers(module: nnx.Module, only, stacked, given: int) -> None:
    """WeightError for more layers than tensors: the names of 10^12 layers take hours to write."""
    for path, variable in nnx.to_flat_state(nnx.state(module, only)):
        n = variable.shape[0] if any(part in stacked for part in path) else 0
        if n > given + 1000:
            what = type(module).__name__
            raise WeightError(f"the config asks for {n:,} layers of {what}, the weights have "
                              f"{given:,} tensors")  # fmt: skip


def _plan(module: nnx.Module, only, stacked, rename) -> list[_Leaf]:
    """The parameters of a module, with the keys and shapes of their tensors."""
    leaves = []
    for path, variable in nnx.to_flat_state(nnx.state(module, only)):
        found, index = [], None
        for one, index in _slices(path, variable.shape, stacked):
            shape = variable.shape if index is None else variable.shape[1:]
            found.append((rename(torch_name(one)), _torch_shape(str(path[-1]), shape)))
        leaves.append(_Leaf(path, index is not None, found))
    return leaves


def _check(what: str, leaves: list[_Leaf], tensors: Mapping, prefix: str, given: set[str]) -> None:
    """Raises WeightError with every missing, left-over and mis-shaped key."""
    wanted = [pair for leaf in leaves for pair in leaf.tensors]
    missing = [key for key, _ in wanted if key not in given]
    misshaped = []
    for key, expected in wanted:
        if key in given and (found := shape_of(tensors, prefix + key)) != expected:
            misshaped.append(f"{key}: {found}, expected {expected}")
    left = sorted(given - {key for key, _ in wanted})
    if not (missing or misshaped or left):
        return
    lines = [f"weights do not fit {what}"]
    for title, keys in (("missing", missing), ("left over", left), ("wrong shape", misshaped)):
        if keys:
            more = "; …" if len(keys) > _LISTED else ""
            listed = "; ".join(shown(key) for key in keys[:_LISTED])
            lines.append(f"{title} ({len(keys)}): {listed}{more}")
    raise WeightError("\n".join(lines))


def refuse(faults: list[tuple[str, str]], spread: bool = False) -> None:
    """Raises WeightError with every (fault, key); those of NaN and inf may be allowed."""
    if spread:  # each process has looked at its own shards only
        faults = [tuple(pair) for pairs in distributed.gather(faults) for pair in pairs]
    found: dict[str, set[str]] = {}
    for fault, key in faults:
        if not (_nan_allowed.get() and fault in casts.ALLOWED):
            found.setdefault(fault, set()).add(key)
    if found:
        raise WeightError("\n".join(
            f"{fault} in {len(keys)} tensors: {'; '.join(sorted(keys))}"
            for fault, keys in sorted(found.items())
        ))  # fmt: skip


def _fill(module, path, tensors, keys, many: bool, faults: list) -> bool:
    """Replaces one parameter by its tensor, or by many of them along its leading axis.

    Returns:
        Whether this process has all of it.
    """
    variable = _variable(module, path)
    old = variable.get_raw_value()
    shape, dtype = old.shape, np.dtype(old.dtype)
    # An array that is not committed to a device stays free to move.
    where = getattr(old, "sharding", None) if getattr(old, "committed", True) else None
    old = jax.ShapeDtypeStruct(shape, dtype, sharding=where)  # the array goes before the new one
    variable.set_raw_value(old)
    leaf = str(path[-1])

    def read(keys):
        views = [from_torch_layout(leaf, np.asarray(tensors[k])) for k in keys]
        if not many:
            (view,) = views
            return _Piece(keys, [view], view.shape, dtype, faults, alone=True)
        return _Piece(keys, views, (len(views), *shape[1:]), dtype, faults)

    step = _layers_at_once(shape, dtype) if many else len(keys)
    if step >= len(keys):
        whole = read(keys).put(where)
    else:
        whole = _zeros(shape, dtype, where)
        for start in range(0, len(keys), step):
            part = read(keys[start : start + step]).put(where)
            whole = _writer(where)(whole, part, np.int32(start))
    complete = whole.is_fully_addressable
    loaded = variable.get_metadata().get("loaded")
    variable.set_raw_value(whole if loaded is None else loaded(whole))  # before the next one
    return complete


def _variable(module, path):
    node = module
    for part in path:
        inside = isinstance(part, int) or not hasattr(node, str(part))
        node = node[part] if inside else getattr(node, str(part))
    return node


def _layers_at_once(shape, dtype) -> int:
    """The largest divisor of the number of layers whose layers together are one piece."""
    n = shape[0]
    each = math.prod(shape[1:]) * dtype.itemsize
    return max(d for d in range(1, n + 1) if n % d == 0 and (d == 1 or d * each <= _PIECE))


class _Piece:
    """Some layers of a leaf (or all of it) on their way to the devices."""

    def __init__(self, keys, views, shape, dtype, faults, alone=False):
        self.keys, self.views, self.shape, self.dtype = keys, views, shape, dtype
        self.faults, self.alone = faults, alone
        self._made = {}  # devices that hold the same part share one host copy

    def __call__(self, index) -> np.ndarray:
        """The part at this index, in memory of its own."""
        key = str(index)
        if key in self._made:
            return self._made[key]
        if self.alone:
            part = self.views[0][index]
            out = np.empty(part.shape, self.dtype)
            self._copy(out, part, self.keys[0])
        else:
            which = range(*index[0].indices(len(self.views)))
            rest = index[1:]
            out = np.empty((len(which), *self.views[0][rest].shape), self.dtype)
            for row, i in zip(out, which, strict=True):
                self._copy(row, self.views[i][rest], self.keys[i])
        self._made[key] = out
        return out

    def _copy(self, out: np.ndarray, part: np.ndarray, key: str) -> None:
        fault = casts.cast_into(out, part)
        if fault and (fault, key) not in self.faults:
            self.faults.append((fault, key))

    def put(self, where) -> jax.Array:
        if where is None:
            return jnp.asarray(self((slice(None),) * len(self.shape)))
        return jax.make_array_from_callback(self.shape, where, self)


@functools.cache
def _maker(shape, dtype, where):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)


def _zeros(shape, dtype, where):
    return _maker(tuple(shape), dtype, where)()


@functools.cache
def _writer(where):
    """(whole, part, first layer) -> whole with the part in it; `whole` is donated."""
    update = lambda whole, part, at: jax.lax.dynamic_update_slice_in_dim(whole, part, at, 0)  # noqa: E731
    return jax.jit(update, donate_argnums=0, out_shardings=where)


# ---- out


@jax.jit
def _layer(whole, i):
    return jax.lax.dynamic_index_in_dim(whole, i, 0, keepdims=False)


def lazy_torch_dict(
    module: nnx.Module,
    prefix: str = "",
    *,
    stacked: tuple[str, ...] = (),
    rename: Callable[[str], str] = lambda key: key,
    only=nnx.Param,
) -> Lazy:
    """The inverse of `load_torch_dict`: published key -> numpy array in PyTorch's layout.

    An array is fetched from its devices on request.

    Raises:
        ValueError: if the module has adapters or packed kernels, which no published layout has.
    """
    if not lora.is_plain(module):
        raise ValueError("adapters and packed kernels can't be written: models.lora.merged(model)")
    out = Lazy()

    def make(value, index, leaf):
        if index is None:
            array = np.asarray(value)
        elif value.nbytes <= _PIECE:
            array = np.asarray(value)[index]
        else:
            array = np.asarray(_layer(value, np.int32(index)))
        return np.ascontiguousarray(to_torch_layout(leaf, array))

    for path, variable in nnx.to_flat_state(nnx.state(module, only)):
        value, leaf = variable.get_raw_value(), str(path[-1])
        for one, index in _slices(path, value.shape, stacked):
            shape = _torch_shape(leaf, value.shape if index is None else value.shape[1:])
            key = prefix + rename(torch_name(one))
            out.set(key, functools.partial(make, value, index, leaf), shape, value.dtype)
    return out


def to_torch_dict(
    module: nnx.Module,
    prefix: str = "",
    *,
    stacked: tuple[str, ...] = (),
    rename: Callable[[str], str] = lambda key: key,
    only=nnx.Param,
) -> dict[str, np.ndarray]:
    """`lazy_torch_dict` with all arrays fetched."""
    return dict(lazy_torch_dict(module, prefix, stacked=stacked, rename=rename, only=only))

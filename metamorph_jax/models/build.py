"""A model on a mesh: shapes first, then weights from files, then random values for the rest.

    outline     the model with a ShapeDtypeStruct for every array: shape, dtype and sharding
    fill        a recipe reads weights into it; each tensor goes straight to its shards
    initialize  what nothing filled gets its random values, on its shards

So a weight that is loaded is never made at random first, no array is held twice, and none is ever
whole on one device unless its sharding says so (but for random values on CPUs, whose devices share
their memory). The random values are those of the whole model's initialisation, whatever was loaded.
"""

import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core
from jax.sharding import Mesh

from metamorph_jax import sharding
from metamorph_jax.models import lora
from metamorph_jax.nn import quantized

Make = Callable[[nnx.Rngs], nnx.Module]


def build(
    make: Make,
    mesh: Mesh,
    seed: int,
    fill: Callable[[nnx.Module], None] | None = None,
    dtype=None,
) -> nnx.Module:
    """A model on a mesh.

    Args:
        make: rngs -> model; runs under `nnx.eval_shape` and `jax.jit`.
        mesh: for the shardings.
        seed: of the random weights.
        fill: reads weights into an outline, in place; it may leave some open.
        dtype: of floating-point weights, or a function from a dotted name to it; None: as the model
            makes them.
    """
    model = outline(make, mesh, dtype)
    if fill is not None:
        fill(model)
    initialize(model, make, mesh, seed)
    return model


class _Stream(nnx.RngStream):
    """The keys of flax's own stream, counted by a Python number.

    flax's counter is traced like everything else, and setting it asks for its sharding, which a
    tracer lacks: to explain that, JAX goes through all operations so far. Models of thousands of
    weights took a minute to outline.
    """

    def __init__(self, key, *, tag: str):
        super().__init__(key, tag=tag)
        self.taken = 0

    def __call__(self) -> jax.Array:
        key = jax.random.fold_in(self.key[...], np.uint32(self.taken))
        self.taken += 1
        return key


def rngs(seed: int | jax.Array) -> nnx.Rngs:
    """`nnx.Rngs(seed)`, with which large models are traced faster; the keys are the same."""
    found = nnx.Rngs(seed)
    found.default = _Stream(found.default.key[...], tag="default")
    return found


def outline(make: Make, mesh: Mesh, dtype=None) -> nnx.Module:
    """The model with shapes, dtypes and shardings in place of arrays; arguments as of `build`."""
    model = nnx.eval_shape(lambda: make(rngs(0)))
    # jnp.bfloat16 and its like are callable, too.
    rule = dtype if isinstance(dtype, types.FunctionType) else lambda name: dtype
    for path, variable in _leaves(model):
        value = variable.get_raw_value()
        asked = rule(".".join(map(str, path)))
        kind = value.dtype if asked is None or not _is_weight(variable) else jnp.dtype(asked)
        where = sharding.variable_sharding(variable, mesh)
        variable.set_raw_value(jax.ShapeDtypeStruct(value.shape, kind, sharding=where))
    return model


def initialize(model: nnx.Module, make: Make, mesh: Mesh, seed: int) -> None:
    """Gives the open leaves of a model their random values, in place; arguments as of `build`."""
    left = {path: v for path, v in _leaves(model) if is_open(v)}
    if not left:
        return
    wanted = {path: v.get_raw_value() for path, v in left.items()}

    def init(key):
        made = dict(_leaves(make(rngs(key))))
        return [made[path].get_raw_value().astype(x.dtype) for path, x in wanted.items()]

    where, key = [x.sharding for x in wanted.values()], jax.random.key(seed)
    if mesh.devices.flat[0].platform == "cpu":
        values = map(sharding.put, _one_by_one(init, key), where)
    else:
        with jax.set_mesh(mesh):
            values = jax.jit(init, out_shardings=where)(key)
    for variable, value in zip(left.values(), values, strict=True):
        variable.set_raw_value(value)


def _one_by_one(make: Callable, key: jax.Array) -> list[jax.Array]:
    """`make(key)`, a program for each operation and shape; what nothing needs is not computed.

    XLA compiles random numbers slowly for CPUs: in one program, those of a model of 480 small
    weights take it half a minute. Most weights share their shape with others, and so programs.
    """
    closed = jax.make_jaxpr(make)(key)
    needed, used = {*map(id, closed.jaxpr.outvars)}, []
    for equation in reversed(closed.eqns):
        if needed.intersection(map(id, equation.outvars)):
            used.append(equation)
            needed.update(map(id, equation.invars))
    trimmed = closed.replace(jaxpr=closed.jaxpr.replace(eqns=used[::-1]))
    return core.jaxpr_as_fun(trimmed)(key)


def is_open(part: nnx.Module | nnx.Variable) -> bool:
    """Whether an array of this module or variable is still a shape without values."""
    variables = [part] if isinstance(part, nnx.Variable) else [v for _, v in _leaves(part)]
    return any(isinstance(v.get_raw_value(), jax.ShapeDtypeStruct) for v in variables)


def _leaves(model: nnx.Module) -> list[tuple[tuple, nnx.Variable]]:
    """(path, variable) of every array; the variables are the model's own, not copies."""
    return [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable)]


def _is_weight(variable: nnx.Variable) -> bool:
    """Whether it is a floating-point weight: not a scale of a packed kernel, not a buffer."""
    if isinstance(variable, quantized.Packed):
        return False
    floating = jnp.issubdtype(variable.get_raw_value().dtype, jnp.floating)
    return floating and isinstance(variable, nnx.Param | lora.Adapter)

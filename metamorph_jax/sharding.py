"""Meshes, and the one table that maps names of dimensions to mesh axes.

Weights carry the names where they are made (`kernel_metadata={"logical": ("embed", "mlp")}`),
activations where they are constrained (`constrain(x, "act_batch", "act_len", "act_embed")`).
Weights without names (convolutions, frozen towers) take a rule by size. A mesh always exists: on a
laptop it has one device, and every constraint is then a no-op.
"""

import math
from collections.abc import Mapping
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("slice", "data", "fsdp", "tensor", "context")
BATCH_AXES = ("slice", "data", "fsdp")

RULES: dict[str, tuple[str, ...] | str | None] = {
    # weights
    "layers": None,  # scanned: every device runs every layer
    "vocab": "tensor",  # embedding rows and head columns, so logits come out sharded
    "embed": "fsdp",  # the width of the residual stream: what FSDP shards
    "heads": "tensor",  # query, key and value heads
    "mlp": "tensor",  # hidden units
    "norm": None,  # vectors: too small to shard
    "added": None,  # a handful of rows for the image tokens
    # activations
    "act_batch": BATCH_AXES,  # rows of the batch over everything that is data parallel
    "act_len": "context",  # sequence parallelism
    "act_embed": None,
    "act_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocab": "tensor",
}

_SMALLEST_TO_CUT = 2**16  # elements: below this a weight is replicated by the size rule


def make_mesh(shape: Mapping[str, int] | None = None, devices=None) -> Mesh:
    """A mesh over all devices with every axis of `AXES`; one axis may be -1, "the rest".

    Args:
        shape: axis -> size; axes that are left out have size 1. Default: all devices on `fsdp`.
        devices: default `jax.devices()`.

    Raises:
        ValueError: on an unknown axis, or when the sizes don't multiply to the device count.
    """
    devices = np.asarray(jax.devices() if devices is None else devices).reshape(-1)
    shape = dict(shape or {"fsdp": -1})
    unknown = set(shape) - set(AXES)
    if unknown:
        raise ValueError(f"mesh axes {sorted(unknown)} are unknown; there are {', '.join(AXES)}")
    sizes = [shape.get(axis, 1) for axis in AXES]
    wrong = [f"{a}={n!r}" for a, n in shape.items() if type(n) is not int or n < 1 and n != -1]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: an axis has a size from 1, or -1 for the rest")
    if sizes.count(-1) > 1:
        raise ValueError(f"only one mesh axis may be -1: {shape}")
    known = math.prod(s for s in sizes if s != -1)
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} needs {math.prod(sizes)} "
            f"devices; there are {len(devices)}"
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    return Mesh(_arrange(devices, sizes), AXES, axis_types=kinds)


def _arrange(devices: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Devices as a mesh of these sizes: neighbours on TPUs lie side by side on the inner axes, and
    where there are several slices, `slice` is the axis that crosses them."""
    if devices[0].platform != "tpu" or len(devices) == 1:
        return devices.reshape(sizes)
    from jax.experimental import mesh_utils

    options = dict(devices=list(devices), allow_split_physical_axes=True)
    slices = {getattr(d, "slice_index", 0) for d in devices}
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(sizes, **options)
    if sizes[0] != len(slices):
        raise ValueError(f"{len(slices)} slices need mesh.slice={len(slices)}, not {sizes[0]}")
    across = (len(slices), *(1 for _ in sizes[1:]))
    return mesh_utils.create_hybrid_device_mesh((1, *sizes[1:]), across, **options)


def platform() -> str:
    """Platform of the current mesh, else of this host: "cpu", "gpu" or "tpu".

    Code that depends on the platform asks this, so that a program can be compiled for chips of a
    kind that the host doesn't have (`metamorph plan`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else getattr(mesh, "abstract_device", None)
    if device is None:
        return jax.default_backend()
    name = getattr(device, "platform", None) or device.device_kind.split()[0].lower()
    return {"cuda": "gpu", "rocm": "gpu", "nvidia": "gpu"}.get(name, name)


def one_device() -> bool:
    """Whether arrays lie on one device: no mesh is set, or one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def spec(*names: str | None) -> P:
    """The PartitionSpec of dimensions with these names (`None`: not sharded)."""
    return P(*(None if n is None else RULES[n] for n in names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains how an activation is sharded over the current mesh; no-op without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fit(spec(*names), x.shape, mesh))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(kernel: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """A kernel whose dimensions have these names, whole over "fsdp"; no-op without a mesh.

    All uses of the result share one gather. The gradient is sharded as the kernel is.
    """
    return constrain(kernel, *(None if RULES[n] == "fsdp" else n for n in names))


gathered.defvjp(
    lambda kernel, names: (gathered(kernel, names), None),
    lambda names, _, gradient: (constrain(gradient, *names),),
)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over every data-parallel axis."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put(x, where: jax.sharding.Sharding) -> jax.Array:
    """An array on the devices of a sharding; a process gives the whole of it, or a global array."""
    if isinstance(x, jax.Array) and x.sharding == where:
        return x
    if where.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, where)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def mesh_of(tree) -> Mesh:
    """The mesh of the arrays of a tree; without one, a mesh of their one device."""
    found = None
    for x in jax.tree.leaves(tree):
        where = getattr(x, "sharding", None)
        if isinstance(where, NamedSharding):
            return where.mesh
        found = found or where
    devices = None if found is None else list(found.device_set)
    return make_mesh(devices=devices or jax.devices()[:1])


def variable_sharding(variable, mesh: Mesh) -> NamedSharding:
    """The sharding of a parameter: by its names if it has them, else by its size.

    `variable` is an nnx.Variable (of an array or a ShapeDtypeStruct) or a bare array.
    """
    shape = variable.shape
    logical = variable.get_metadata().get("logical") if hasattr(variable, "get_metadata") else None
    if logical is None:
        return NamedSharding(mesh, _by_size(shape, mesh))
    names = ("layers",) * (len(shape) - len(logical)) + tuple(logical)
    return NamedSharding(mesh, fit(spec(*names), shape, mesh))


def state_shardings(state, mesh: Mesh):
    """The sharding of every leaf of an `nnx.State` (or any tree of arrays)."""

    def is_variable(x):
        return hasattr(x, "get_metadata")

    def one(x):
        sharding = variable_sharding(x, mesh)
        return x.replace(sharding) if is_variable(x) else sharding

    return jax.tree.map(one, state, is_leaf=is_variable)


def _by_size(shape, mesh) -> P:
    """FSDP for weights without names: shard the largest dimension that divides evenly."""
    n = mesh.shape["fsdp"]
    if n == 1 or math.prod(shape) < _SMALLEST_TO_CUT:
        return P()
    for dim in sorted(range(len(shape)), key=lambda d: -shape[d]):
        if shape[dim] % n == 0:
            return P(*("fsdp" if d == dim else None for d in range(len(shape))))
    return P()


def fit(wanted: P, shape, mesh) -> P:
    """Drops an axis from a dimension that it doesn't divide (9 heads on 2 devices: replicate)."""
    fitted = []
    for dim, axes in zip(shape, wanted, strict=True):
        size = math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
        fitted.append(axes if dim % size == 0 else None)
    return P(*fitted)

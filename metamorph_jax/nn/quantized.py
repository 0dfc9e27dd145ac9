"""Frozen linear layers with weights of 8 or 4 bits, unpacked inside the product.

    int8         w ≈ scale[out] · codes[in, out]                    8 bits a weight
    nf4          w ≈ scale[block, out] · NF4[codes]                 4.5 bits; 64 inputs a block
    nf4_double   the scales of nf4 in 8 bits, scaled per output     4.13 bits

NF4 (Dettmers et al. 2023, arXiv 2305.14314): the 16 quantiles of a normal distribution. Two codes
share a byte: input j and input j + 32 of a block. Weights carry no gradient; the product's backward
pass unpacks them again, so that no unpacked copy is kept in memory between the two passes.

Why not Qwix (0.1.8, with jax 0.10.2 and flax 0.12.8): `quantize_model` finds weights by watching
one call of the model, and what it swaps inside `lax.scan` is lost: on our stacked layers it reports
nothing and leaves every kernel in float32. Its 4-bit codes are `uint4` arrays, a byte each on CPUs.
Its NF4 has the same values as ours (tested).
"""

import contextlib
import re
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from metamorph_jax import sharding
from metamorph_jax.nn.linear import flat_dot_general

METHODS = ("int8", "nf4", "nf4_double")
BLOCK = 64
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], np.float32,
)  # fmt: skip
_BETWEEN = (NF4[1:] + NF4[:-1]) / 2
_LEAVES = ("kernel_codes", "kernel_scale", "kernel_top")
_PARTS = (
    "bias", "in_features", "out_features", "use_bias", "dtype", "param_dtype", "precision",
    "dot_general", "promote_dtype", "preferred_element_type",
)  # fmt: skip


class Packed(nnx.Param):
    """Codes or scales of a frozen kernel."""


# ---- numbers


def pack(kernel: jax.Array, method: str) -> dict[str, jax.Array]:
    """Leaf name -> array, of a kernel [..., in, out]."""
    w = kernel.astype(jnp.float32)
    if method == "int8":
        top = jnp.abs(w).max(-2)
        scale = jnp.where(top > 0, top, 1.0) / 127
        codes = jnp.round(w / scale[..., None, :]).astype(jnp.int8)
        return {"kernel_codes": codes, "kernel_scale": scale}
    *lead, d_in, d_out = w.shape
    blocks = -(-d_in // BLOCK)
    w = jnp.pad(w, [(0, 0)] * len(lead) + [(0, blocks * BLOCK - d_in), (0, 0)])
    w = w.reshape(*lead, blocks, BLOCK, d_out)
    scale = jnp.abs(w).max(-2)
    out = {"kernel_scale": scale}
    if method == "nf4_double":
        top = scale.max(-2)
        steps = jnp.ceil(255 * scale / jnp.where(top > 0, top, 1.0)[..., None, :])
        out = {"kernel_scale": steps.astype(jnp.uint8), "kernel_top": top}
        scale = _scales(out)
    w = w / jnp.where(scale > 0, scale, 1.0)[..., None, :]
    codes = sum((w > edge).astype(jnp.uint8) for edge in _BETWEEN)
    low, high = jnp.split(codes, 2, axis=-2)
    return {"kernel_codes": (low | (high << 4)).reshape(*lead, blocks * BLOCK // 2, d_out), **out}


def unpack(packed: dict[str, jax.Array], d_in: int, dtype=jnp.float32) -> jax.Array:
    """The kernel [..., in, out] that `pack` made."""
    codes, scale = packed["kernel_codes"], _scales(packed)
    if codes.dtype == jnp.int8:
        return codes.astype(dtype) * scale[..., None, :].astype(dtype)
    *lead, _, d_out = codes.shape
    codes = codes.reshape(*lead, -1, BLOCK // 2, d_out)
    codes = jnp.concatenate([codes & 15, codes >> 4], axis=-2)
    w = jnp.asarray(NF4, dtype)[codes] * scale[..., None, :].astype(dtype)
    return w.reshape(*lead, -1, d_out)[..., :d_in, :]


def _scales(packed) -> jax.Array:
    scale = packed["kernel_scale"]
    if "kernel_top" not in packed:
        return scale
    return scale.astype(jnp.float32) * (packed["kernel_top"] / 255)[..., None, :]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(d_in: int, x: jax.Array, packed: dict[str, jax.Array]) -> jax.Array:
    """float[..., out] of x: float[..., in] and a packed kernel; differentiable in x only."""
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    codes = packed["kernel_codes"]
    if codes.dtype == jnp.int8:  # one scale per output: applied after the sum
        y = flat_dot_general(x, codes.astype(x.dtype), dims)
        return (y * packed["kernel_scale"]).astype(x.dtype)
    return flat_dot_general(x, unpack(packed, d_in, x.dtype), dims)


def _forward(d_in, x, packed):
    return product(d_in, x, packed), packed


def _backward(d_in, packed, g):
    kernel = unpack(packed, d_in, g.dtype)
    return flat_dot_general(g, kernel.T, (((g.ndim - 1,), (0,)), ((), ()))), None


product.defvjp(_forward, _backward)


# ---- modules


class Linear(nnx.Module):
    """An `nnx.Linear` with a packed, frozen kernel."""

    def __init__(self, linear: nnx.Linear, method: str):
        if method not in METHODS:
            raise ValueError(f"{method!r} is none of {', '.join(METHODS)}")
        self.method = method
        take_over(self, linear)
        _pack(self)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., out] of x: float[..., in]."""
        bias = None if self.bias is None else self.bias[...]
        x, bias = self.promote_dtype((x, bias), dtype=self.dtype)
        y = product(self.in_features, x, _packed(self))
        return y if bias is None else y + bias


def take_over(new: nnx.Module, old: nnx.Module) -> None:
    """Hands the arrays and the settings of the linear `old` to `new`."""
    for name in (*_PARTS, "kernel", "method", *_LEAVES):
        if name in vars(old):
            setattr(new, name, nnx.data(None) if vars(old)[name] is None else vars(old)[name])


def linears(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """(dotted name, linear) of the linears, packed or not, that have no adapter."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear | Linear):
            yield ".".join(map(str, path)), module


def put(model: nnx.Module, name: str, module: nnx.Module) -> None:
    """Replaces the submodule with this dotted name."""
    *parents, last = name.split(".")
    for part in parents:
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    if last.isdigit():
        model[int(last)] = module
    else:
        setattr(model, last, module)


def describe(linear: nnx.Module) -> tuple[tuple[int, ...], tuple | None]:
    """(leading axes of the kernel of stacked layers, its logical names or None)."""
    kernel = linear.kernel_codes if is_packed(linear) else linear.kernel
    return tuple(kernel.shape[:-2]), kernel.get_metadata().get("logical")


def plain(linear: nnx.Module) -> nnx.Linear:
    """The `nnx.Linear` with the same kernel and bias, without an adapter."""
    new = nnx.eval_shape(lambda: nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0)))
    take_over(new, linear)
    if is_packed(new):
        _unpack(new, linear.param_dtype)
        del new.method
    return new


def is_packed(linear: nnx.Module) -> bool:
    return "kernel_codes" in vars(linear)


def any_packed(model: nnx.Module) -> bool:
    return any(is_packed(m) for _, m in nnx.iter_modules(model))


def quantize(model: nnx.Module, method: str, target: str, leave: str = "") -> list[str]:
    """Packs the kernels of the linears whose dotted name matches, in place.

    Args:
        method: one of `METHODS`.
        target: regular expression that must match the whole name.
        leave: linears stay as they are where this one matches the dotted name of their kernel.

    Returns:
        Names of the packed linears.
    """
    chosen = [
        (name, linear)
        for name, linear in linears(model)
        if isinstance(linear, nnx.Linear)
        and re.fullmatch(target, name)
        and not re.fullmatch(leave, name + ".kernel")
    ]
    for name, linear in chosen:
        put(model, name, Linear(linear, method))
    return [name for name, _ in chosen]


@contextlib.contextmanager
def unpacked(model: nnx.Module, *, empty: bool = False, dtype=jnp.bfloat16):
    """A context in which packed kernels are ordinary parameters; at its end they are packed again.

    Args:
        empty: everything is about to be loaded: until then the kernels are only shapes with
            shardings. A kernel that is not loaded keeps its old codes.
        dtype: of the kernels inside the context.
    """
    modules = [m for _, m in nnx.iter_modules(model) if is_packed(m)]
    before = [_unpack(m, jnp.dtype(dtype), empty) for m in modules]
    yield model
    for module, (leaves, kernel) in zip(modules, before, strict=True):
        if module.kernel.get_raw_value() is kernel:
            del module.kernel
            for name, leaf in leaves.items():
                setattr(module, name, leaf)
        else:
            _pack(module)


def _packed(linear) -> dict[str, jax.Array]:
    return {name: getattr(linear, name)[...] for name in _LEAVES if name in vars(linear)}


def _pack(linear) -> None:
    """Replaces the kernel by codes and scales."""
    logical = linear.kernel.get_metadata().get("logical")
    made = linear.kernel.get_raw_value()
    if not isinstance(made, dict):
        made = _pack_compiled(made, linear.method)
    for name, value in made.items():
        vector = name == "kernel_top" or (name == "kernel_scale" and linear.method == "int8")
        names = {} if logical is None else {"logical": logical[1:] if vector else logical}
        setattr(linear, name, Packed(value, **names))
    del linear.kernel


_pack_compiled = jax.jit(pack, static_argnums=1)


def _unpack(linear, dtype, empty: bool = False) -> tuple[dict, jax.Array]:
    """Replaces codes and scales by a kernel; returns (the replaced leaves, the kernel's array).

    With `empty`, the kernel carries a function `loaded`, with which a reader packs the array that
    it has read, so that one kernel at a time exists unpacked.
    Of codes without values (`models/build.py`), the kernel has none either.
    """
    leaves = {name: getattr(linear, name) for name in _LEAVES if name in vars(linear)}
    codes = leaves["kernel_codes"]
    shape = (*codes.shape[:-2], linear.in_features, linear.out_features)
    logical = codes.get_metadata().get("logical")
    param = nnx.Param(
        jax.ShapeDtypeStruct(shape, dtype), **({} if logical is None else {"logical": logical})
    )
    where = getattr(codes.get_raw_value(), "sharding", None)
    if isinstance(where, jax.sharding.NamedSharding):
        where = sharding.variable_sharding(param, where.mesh)
    if empty:
        value = jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        param.set_metadata("loaded", lambda array: _pack_compiled(array, linear.method))
    elif isinstance(codes.get_raw_value(), jax.ShapeDtypeStruct):
        value = jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    else:
        arrays = {name: leaf[...] for name, leaf in leaves.items()}
        value = jax.jit(unpack, static_argnums=(1, 2))(arrays, linear.in_features, dtype)
    param.set_raw_value(value)
    linear.kernel = param
    for name in leaves:
        delattr(linear, name)
    return leaves, value

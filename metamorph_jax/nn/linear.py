"""The matrix product of all linear layers."""

import jax


def flat_dot_general(lhs, rhs, dimension_numbers, precision=None, **options):
    """`lax.dot_general` of x [..., D] with a kernel [D, F], over rows [-1, D] on one device.

    XLA's CPU backend runs the kernel's gradient of a product with two leading dimensions three
    times slower than with one. On a mesh the leading dimensions keep their own shardings.
    For `nnx.Linear(dot_general=...)`, which passes `precision` and more `options` on.
    """
    mesh = jax.sharding.get_abstract_mesh()
    plain = dimension_numbers == (((lhs.ndim - 1,), (0,)), ((), ()))
    if lhs.ndim <= 2 or not plain or not (mesh.empty or mesh.size == 1):
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision, **options)
    rows = lhs.reshape(-1, lhs.shape[-1])
    out = jax.lax.dot_general(rows, rhs, (((1,), (0,)), ((), ())), precision, **options)
    return out.reshape(*lhs.shape[:-1], rhs.shape[-1])

"""Attention on TPUs by the splash kernel of JAX's Pallas library, which makes no [L, S] array.

The kernel runs on each device alone, so it is called under `shard_map`: rows over the data-parallel
axes, heads over `tensor`, queries over `context` (keys and values are then gathered along it).
On other platforms the kernel can only be interpreted, which is slow: for tests.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from metamorph_jax.sharding import fit, spec

LANES = 128  # rows are padded to a multiple of this
BLOCK = 512  # queries, and keys, that a core processes at a time


def attend(q, k, v, segments, *, interpret=False):
    """Softmax attention; the queries are already scaled.

    Args:
        q: float[B, L, N, H]; k, v: float[B, S, K, H] with K dividing N.
        segments: int32[B, L] (S = L): a query sees the keys of its own segment up to its own
            position. None: it sees all keys.
        interpret: run without a TPU.

    Returns:
        float[B, L, N, H] in q's dtype.
    """
    B, L, N, _ = q.shape
    S = k.shape[1]
    causal = segments is not None
    numbers, key_numbers = segments, segments
    if not causal and (L % LANES or S % LANES):  # padding gets a number that no query has
        numbers = jnp.ones((B, L), jnp.int32)
        key_numbers = jnp.ones((B, S), jnp.int32)
    pad = lambda x, axis: jnp.pad(  # noqa: E731
        x, [(0, -x.shape[axis] % LANES if d == axis else 0) for d in range(x.ndim)]
    )
    q, k, v = (pad(x, 1).swapaxes(1, 2) for x in (q, k, v))
    if numbers is not None:
        numbers, key_numbers = pad(numbers, 1), pad(key_numbers, 1)
    out = _sharded(q, k, v, numbers, key_numbers, causal, interpret)
    return out.swapaxes(1, 2)[:, :L].astype(q.dtype)


def _sharded(q, k, v, numbers, key_numbers, causal, interpret):
    """q: [B, N, L, H]; k, v: [B, K, S, H]; every length a multiple of `LANES`."""
    mesh = jax.sharding.get_abstract_mesh()
    N, L = q.shape[1:3]
    if mesh.empty or mesh.size == 1:
        kernel = _kernel(N, L, k.shape[2], causal, 1, 1, interpret)
        return _rows(kernel, q, k, v, numbers, key_numbers)
    names = ("act_batch", "act_heads", "act_len", None)
    where = fit(spec(*names), q.shape, mesh)
    rows, heads, length, _ = where
    if length is not None and (L // mesh.shape[length]) % LANES:
        raise ValueError(f"rows of {L} over {mesh.shape[length]} devices of the context axis: "
                         f"the attention kernel needs multiples of {LANES} on each")  # fmt: skip
    head_shards = mesh.shape[heads] if heads else 1
    if k.shape[1] % head_shards:  # fewer key heads than devices: each gets a copy of its own
        times = math.lcm(k.shape[1], head_shards) // k.shape[1]
        if N % (k.shape[1] * times):
            heads, head_shards, times = None, 1, 1
            where = P(rows, None, length, None)
        k, v = (jnp.repeat(x, times, axis=1) for x in (k, v))
    q_shards = mesh.shape[length] if length else 1
    kernel = _kernel(N, L, k.shape[2], causal, head_shards, q_shards, interpret)
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, P(heads, length)))
    keys = P(rows, heads, None, None)
    lines = (P(rows, length), P(rows, None)) if numbers is not None else (P(), P())
    run = jax.shard_map(
        _rows, in_specs=(kernel_spec, where, keys, keys, *lines), out_specs=where, check_vma=False
    )
    return run(kernel, q, k, v, numbers, key_numbers)


def _rows(kernel, q, k, v, numbers, key_numbers):
    """The kernel for every row of a device."""
    if numbers is None:
        return jax.vmap(kernel, in_axes=(0, 0, 0))(q, k, v)

    def one(q, k, v, numbers, key_numbers):
        return kernel(q, k, v, kernels.SegmentIds(numbers, key_numbers))

    return jax.vmap(one)(q, k, v, numbers, key_numbers)


def _kernel(N, L, S, causal, head_shards, q_shards, interpret):
    one = masks.CausalMask((L, S)) if causal else masks.FullMask((L, S))
    bq, bkv = _block(L // q_shards), _block(S)
    sizes = kernels.BlockSizes(
        block_q=bq, block_kv=bkv, block_q_dkv=bq, block_kv_dkv=bkv, block_q_dq=bq, block_kv_dq=bkv
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([one] * N),
        block_sizes=sizes,
        head_shards=head_shards,
        q_seq_shards=q_shards,
        residual_checkpoint_name="attention",  # so that remat policies can keep the output
        interpret=interpret,
    )


def _block(length: int) -> int:
    """The largest multiple of `LANES` up to `BLOCK` that divides the length."""
    return max(n for n in range(LANES, BLOCK + 1, LANES) if length % n == 0)

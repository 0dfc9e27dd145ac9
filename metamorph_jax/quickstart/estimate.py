"""How long a quick start takes on this machine, judged from a measurement of two seconds."""

import dataclasses
import statistics
import time

ROWS, WIDTH, HIDDEN = 1024, 576, 1536  # positions of a step; sizes of SmolLM2-135M
SECONDS = 1.5


@dataclasses.dataclass(frozen=True)
class Reference:
    """Two idle cores that a quick start was timed on.

    Attributes:
        flops: FLOP/s, as of `measured_flops`.
        factor: how much longer than `Steps.minutes` a run takes there.
    """

    flops: float
    factor: float


# bfloat16: the machine of `Steps.minutes`, an Intel CPU with matrix units (AMX). Its FLOP/s are
# those of the training step in docs/speed.md. float32: a Xeon of 2.5 GHz without matrix units, with
# little work beside it: 48 minutes for all steps but "predict", of which 31 for VPiT, where the
# other took 23 and 12.
REFERENCES = {
    "bfloat16": Reference(flops=3.8e11, factor=1.0),
    "float32": Reference(flops=1.1e11, factor=2.2),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of this machine.

    Attributes:
        factor: how much longer than `Steps.minutes` steps take here.
        slower: how much slower this machine is than the two cores of the reference.
    """

    factor: float
    slower: float

    def __str__(self) -> str:
        timed = "the two idle cores that the quick start was timed on"
        if self.slower > 1.2:
            return f"this machine is {self.slower:.1f} times slower than {timed}, or busy"
        return f"this machine is as fast as {timed}, or faster"


def estimate(precision: str | None) -> Estimate | None:
    """The estimate for a precision (None is float32), or None on an accelerator.

    Steps are taken to scale with the speed of matrix products in training; decoding and reading
    scale less well, so the estimate is a rough one."""
    import jax

    if jax.default_backend() != "cpu":
        return None
    reference = REFERENCES["bfloat16" if precision == "bfloat16" else "float32"]
    slower = reference.flops / measured_flops(precision)
    return Estimate(reference.factor * slower, slower)


def measured_flops(precision: str | None) -> float:
    """FLOP/s of a linear layer's product and its two gradients, a median over `SECONDS`."""
    import jax
    import jax.numpy as jnp

    from metamorph_jax.nn.linear import flat_dot_general

    def loss(x, w):
        return jnp.square(flat_dot_general(x, w, (((1,), (0,)), ((), ())))).sum()

    x, w = jnp.ones((ROWS, WIDTH)), jnp.ones((WIDTH, HIDDEN))
    with jax.default_matmul_precision(precision):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        jax.block_until_ready(step(x, w))
        times, end = [], time.perf_counter() + SECONDS
        while not times or time.perf_counter() < end:
            begin = time.perf_counter()
            jax.block_until_ready(step(x, w))
            times.append(time.perf_counter() - begin)
    return 3 * 2 * ROWS * WIDTH * HIDDEN / statistics.median(times)

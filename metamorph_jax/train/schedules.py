"""Learning-rate multipliers of the diffusion visualiser, as functions of the step.

Multiply the peak rate with them; they take Python ints, numpy and traced steps alike, so that
`optax.scale_by_schedule` accepts them.
"""

import jax.numpy as jnp


def lr_finetune(step, warmup: int = 4000, total: int = 16000):
    """Logarithmic warm-up, ln(s + 1) / ln(w + 1), then linear decay, 1 - (s - w) / (total - w).

    The schedule's length is the training's length: pass `total`, or the decay is cut short.
    """
    step = jnp.asarray(step, jnp.float32)
    rise = jnp.log(step + 1) / jnp.log(jnp.float32(warmup + 1))
    fall = 1 - (step - warmup) / (total - warmup)
    return jnp.where(step < warmup, rise, jnp.clip(fall, 0.0, 1.0))


def lr_scratch(step, warmup: int = 10000):
    """Linear warm-up to 1, then constant."""
    return jnp.minimum(jnp.asarray(step, jnp.float32) / warmup, 1.0)

"""Learning-rate schedules by name: (peak, warm-up steps, steps) -> (step -> learning rate)."""

from collections.abc import Callable

import jax.numpy as jnp
import optax


def cosine(peak: float, warm: int, steps: int) -> optax.Schedule:
    """Linear warm-up, then a half cosine to 0."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, warm, max(steps, warm + 1))


def constant(peak: float, warm: int, steps: int) -> optax.Schedule:
    """Linear warm-up, then the peak."""
    if not warm:  # optax would stay at 0
        return optax.constant_schedule(peak)
    return optax.warmup_constant_schedule(0.0, peak, warm)


def linear(peak: float, warm: int, steps: int) -> optax.Schedule:
    """Linear warm-up, then linear decay to 0."""
    fall = optax.linear_schedule(peak, 0.0, max(steps - warm, 1))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warm, 1)), fall], [warm])


def wsd(peak: float, warm: int, steps: int) -> optax.Schedule:
    """Warm-up, stable, decay: the last fifth of the steps falls linearly to 0."""

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        rise, fall = step / max(warm, 1), (steps - step) / max(0.2 * steps, 1)
        return peak * jnp.clip(jnp.minimum(rise, fall), 0.0, 1.0)

    return rate


def rsqrt(peak: float, warm: int, steps: int) -> optax.Schedule:
    """Linear warm-up, then the peak times sqrt(warm-up / step)."""
    first = max(warm, 1)

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        return peak * jnp.minimum(step / first, jnp.sqrt(first / jnp.maximum(step, first)))

    return rate


def lr_finetune(step, warmup: int = 4000, total: int = 16000):
    """Factor of the reference's "finetune": logarithmic warm-up, then linear decay.

    ln(s + 1) / ln(w + 1) up to the warm-up w, then 1 - (s - w) / (total - w). `total` is the length
    of the training. `step` may be a Python int, numpy or traced.
    """
    step = jnp.asarray(step, jnp.float32)
    rise = jnp.log(step + 1) / jnp.log(jnp.float32(warmup + 1))
    fall = 1 - (step - warmup) / (total - warmup)
    return jnp.where(step < warmup, rise, jnp.clip(fall, 0.0, 1.0))


def lr_scratch(step, warmup: int = 10000):
    """Factor of the reference's "scratch": linear warm-up to 1, then constant."""
    return jnp.minimum(jnp.asarray(step, jnp.float32) / warmup, 1.0)


def finetune(peak: float, warm: int, steps: int) -> optax.Schedule:
    """The reference's for a pretrained diffusion decoder, see `lr_finetune`."""
    return lambda step: peak * lr_finetune(step, warm, steps)


def scratch(peak: float, warm: int, steps: int) -> optax.Schedule:
    """The reference's for a diffusion decoder from scratch, see `lr_scratch`."""
    return lambda step: peak * lr_scratch(step, max(warm, 1))


SCHEDULES: dict[str, Callable[[float, int, int], optax.Schedule]] = {
    "cosine": cosine,
    "constant": constant,
    "linear": linear,
    "wsd": wsd,
    "rsqrt": rsqrt,
    "finetune": finetune,
    "scratch": scratch,
}

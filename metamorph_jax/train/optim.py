"""AdamW in one pass over memory, with per-part learning rates, and its schedules.

Loshchilov & Hutter 2019 (arXiv 1711.05101); the same numbers as this optax chain (tested):

    chain(clip_by_global_norm, scale_by_adam, add_decayed_weights(mask), scale_by_learning_rate)

A chain walks over the parameters once per link. Here every parameter, its gradient and its two
moments are read once and written once, and clipping is a factor inside that pass: on a CPU, where
memory is the limit, the optimizer of a small model otherwise costs as much as a third of its step.
Only trainable parameters ever get here, so frozen ones have no moments.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from metamorph_jax.errors import ConfigError
from metamorph_jax.train.config import OptimConfig

Params = dict[str, jax.Array]  # dotted name -> array


def peak_rate(cfg: OptimConfig, rows: int) -> float:
    """The peak learning rate at this batch: base * sqrt(batch / base_batch)."""
    if cfg.base_batch is None:
        return cfg.learning_rate
    return cfg.learning_rate * math.sqrt((cfg.batch or rows) / cfg.base_batch)


def warmup_steps(cfg: OptimConfig, steps: int) -> int:
    return math.ceil(cfg.warmup * steps) if cfg.warmup < 1 else int(cfg.warmup)


def _cosine(peak, warm, steps):
    return optax.warmup_cosine_decay_schedule(0.0, peak, warm, max(steps, warm + 1))


def _constant(peak, warm, steps):
    return optax.warmup_constant_schedule(0.0, peak, warm)


def _wsd(peak, warm, steps):
    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        rise, fall = step / max(warm, 1), (steps - step) / max(0.2 * steps, 1)
        return peak * jnp.clip(jnp.minimum(rise, fall), 0.0, 1.0)

    return rate


def _rsqrt(peak, warm, steps):
    first = max(warm, 1)

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        return peak * jnp.minimum(step / first, jnp.sqrt(first / jnp.maximum(step, first)))

    return rate


def _finetune(peak, warm, steps):
    from metamorph_jax.train.schedules import lr_finetune

    return lambda step: peak * lr_finetune(step, warm, steps)


def _scratch(peak, warm, steps):
    from metamorph_jax.train.schedules import lr_scratch

    return lambda step: peak * lr_scratch(step, warm)


SCHEDULES: dict[str, Callable] = {
    "cosine": _cosine,
    "constant": _constant,
    "wsd": _wsd,
    "rsqrt": _rsqrt,
    "finetune": _finetune,
    "scratch": _scratch,
}


def make_schedule(cfg: OptimConfig, rows: int, steps: int) -> Callable[[jax.Array], jax.Array]:
    """step -> learning rate, for batches of `rows` rows and `steps` steps."""
    return SCHEDULES[cfg.schedule](peak_rate(cfg, rows), warmup_steps(cfg, steps), steps)


def is_decayed(name: str, ndim: int) -> bool:
    """Matrices and tables are; biases, norms and other vectors are not."""
    *parents, leaf = name.split(".")
    if leaf in ("bias", "scale") or ndim < 2:
        return False
    return not any("norm" in part for part in parents)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """First and second moments of AdamW, by the names of the parameters."""

    first: Params
    second: Params


def init(params: Params, momentum_dtype: str = "float32") -> Moments:
    """Zeros; the first moment of a parameter is no wider than the parameter or `momentum_dtype`."""
    dtype = jnp.dtype(momentum_dtype)

    def zeros(p, dtype):
        return jnp.zeros_like(p, dtype if dtype.itemsize < p.dtype.itemsize else p.dtype)

    return Moments(
        {k: zeros(p, dtype) for k, p in params.items()},
        {k: jnp.zeros_like(p) for k, p in params.items()},
    )


def check_multipliers(cfg: OptimConfig, parts: set[str]) -> None:
    unknown = set(cfg.multipliers) - parts
    if unknown:
        raise ConfigError(
            f"optim.multipliers names {', '.join(sorted(unknown))}; "
            f"this stage trains {', '.join(sorted(parts))}"
        )


def squared_norms(grads: Params, part_of: Mapping[str, str]) -> dict[str, jax.Array]:
    """part -> sum of squared gradients, from one read of every gradient."""
    sums: dict[str, jax.Array] = {}
    for name, g in grads.items():
        g = g.astype(jnp.float32)
        sums[part_of[name]] = sums.get(part_of[name], 0.0) + jnp.sum(g * g)
    return sums


def clip_factor(norm: jax.Array, clip_norm: float | None) -> jax.Array:
    if clip_norm is None:
        return jnp.ones((), jnp.float32)
    return jnp.where(norm < clip_norm, 1.0, clip_norm / norm)


def update(
    cfg: OptimConfig,
    params: Params,
    moments: Moments,
    grads: Params,
    *,
    step: jax.Array,
    rate: jax.Array,
    factor: jax.Array,
    apply: jax.Array,
    part_of: Mapping[str, str],
    ema: Params | None = None,
) -> tuple[Params, Moments, Params | None]:
    """One AdamW step.

    Args:
        step: int32[] updates done so far.
        rate: learning rate of this step, before the multiplier of a part.
        factor: gradients are taken times this (clipping).
        apply: bool[]; where False everything comes back as it was (non-finite gradients).
        part_of: name -> part, for the multipliers.
        ema: moving average to advance, or None.

    Returns:
        (params, moments, ema) after the step.
    """
    t = (step + 1).astype(jnp.float32)
    fix1, fix2 = 1.0 / (1.0 - cfg.b1**t), 1.0 / (1.0 - cfg.b2**t)
    if ema is not None:  # a short memory at first, or the average drags the start along
        keep = jnp.minimum(cfg.ema_decay, (1.0 + t) / (10.0 + t))

    new_params, first, second, new_ema = {}, {}, {}, {}
    for name, p in params.items():
        lr = rate * cfg.multipliers.get(part_of[name], 1.0)
        g = grads[name].astype(jnp.float32) * factor
        m, v = moments.first[name], moments.second[name]
        # The choice comes first, so that the parameter is made from what is stored. Otherwise XLA
        # on CPU computes both moments a second time inside the parameter's loop, from the old
        # ones, which must then be copied away from the buffers they share with the new ones.
        m_new = jnp.where(apply, cfg.b1 * m + (1.0 - cfg.b1) * g, m).astype(m.dtype)
        first[name] = m_new
        v_new = second[name] = jnp.where(apply, cfg.b2 * v + (1.0 - cfg.b2) * (g * g), v)
        change = (m_new * fix1) / (jnp.sqrt(v_new * fix2) + cfg.eps)
        if cfg.weight_decay and is_decayed(name, p.ndim):
            change = change + cfg.weight_decay * p
        p_new = p - lr * change
        new_params[name] = jnp.where(apply, p_new, p)
        if ema is not None:
            e = ema[name]
            new_ema[name] = jnp.where(apply, keep * e + (1.0 - keep) * p_new, e)
    return new_params, Moments(first, second), new_ema if ema is not None else None

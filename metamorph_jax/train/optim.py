"""The optimizer of a run: an optax transformation chosen by name, its groups and its schedule.

What is trained is a flat dict, dotted name -> array, and only that is given to the transformation,
so frozen parameters have no moments. An update is

    p <- p + rate * factor * (direction - decay * p)

where the direction is what the transformation of that name returns at a learning rate of 1, `rate`
is the schedule at this step, and `factor` and `decay` belong to the group of the parameter. So
groups mean the same for every optimizer, and weight decay is decoupled from the gradient for all of
them (Loshchilov & Hutter 2019, arXiv 1711.05101).
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from metamorph_jax.errors import ConfigError
from metamorph_jax.train import schedules
from metamorph_jax.train.config import OptimConfig

Params = dict[str, jax.Array]  # dotted name -> array


@dataclasses.dataclass(frozen=True)
class Rule:
    """An entry in the table of optimizers.

    Attributes:
        make: function of optax that takes `learning_rate` and more.
        moment_dtype: its argument for the dtype of the first moment, "" if it has none.
        betas: its arguments for `OptimConfig.b1`, `b2` and `eps`, "" where it has none.
        fixed: arguments that we set, so that they are not options.
    """

    make: Callable
    moment_dtype: str = ""
    betas: tuple[str, str, str] = ("b1", "b2", "eps")
    fixed: Mapping = dataclasses.field(default_factory=dict)


def _muon_axes(params: Params):
    """Which axes of a parameter are its inputs and outputs; None: Muon leaves it to AdamW.

    Muon is for hidden matrices: tables, heads and vectors are AdamW's. Layers that are stacked have
    a matrix each; a convolution's inputs are its window and its channels.
    """

    def one(name, p):
        *parents, leaf = name.split(".")
        if leaf != "kernel" or p.ndim < 2 or "lm_head" in parents:
            return None
        inputs = tuple(range(3)) if p.ndim == 4 else (p.ndim - 2,)
        return contrib.MuonDimensionNumbers(inputs, (p.ndim - 1,))

    return {name: one(name, p) for name, p in params.items()}


_NO_DECAY = {"weight_decay": 0.0, "mask": None}
_ADAM = Rule(optax.adam, "mu_dtype")

OPTIMIZERS: dict[str, Rule] = {
    "adam": _ADAM,
    "adamw": _ADAM,  # every optimizer has decoupled weight decay here
    "nadamw": dataclasses.replace(_ADAM, fixed={"nesterov": True}),
    "radam": Rule(optax.radam),
    "adabelief": Rule(optax.adabelief),
    "lion": Rule(optax.lion, "mu_dtype", ("b1", "b2", ""), _NO_DECAY),
    "adafactor": Rule(
        optax.adafactor,
        "dtype_momentum",
        ("momentum", "", ""),
        {"weight_decay_rate": None, "weight_decay_mask": None},
    ),
    "muon": Rule(
        contrib.muon,
        "mu_dtype",
        ("adam_b1", "adam_b2", "eps"),
        {
            "weight_decay": 0.0,
            "weight_decay_mask": None,
            "adam_weight_decay": 0.0,
            "adam_learning_rate": None,
            "muon_weight_dimension_numbers": _muon_axes,
        },
    ),
    "sgd": Rule(optax.sgd, "accumulator_dtype", ("momentum", "", "")),
    "rmsprop": Rule(optax.rmsprop, "", ("momentum", "decay", "eps")),
    "adagrad": Rule(optax.adagrad, "", ("", "", "eps")),
}


# ---- schedules


def peak_rate(cfg: OptimConfig, rows: int) -> float:
    """The peak learning rate at this batch: base * sqrt(batch / base_batch)."""
    if cfg.base_batch is None:
        return cfg.learning_rate
    return cfg.learning_rate * math.sqrt((cfg.batch or rows) / cfg.base_batch)


def warmup_steps(cfg: OptimConfig, steps: int) -> int:
    return math.ceil(cfg.warmup * steps) if cfg.warmup < 1 else int(cfg.warmup)


def make_schedule(cfg: OptimConfig, rows: int, steps: int) -> optax.Schedule:
    """step -> learning rate, for batches of `rows` rows and `steps` steps.

    Raises:
        ConfigError: there is no schedule of this name.
    """
    if cfg.schedule not in schedules.SCHEDULES:
        known = ", ".join(schedules.SCHEDULES)
        raise ConfigError(f"config.optim.schedule {cfg.schedule!r} is none of {known}")
    make = schedules.SCHEDULES[cfg.schedule]
    return make(peak_rate(cfg, rows), warmup_steps(cfg, steps), steps)


# ---- groups


def is_decayed(name: str, ndim: int) -> bool:
    """True for matrices and tables, False for biases, norms and other vectors."""
    *parents, leaf = name.split(".")
    if leaf in ("bias", "scale") or ndim < 2:
        return False
    return not any("norm" in part for part in parents)


def group_of_each(cfg: OptimConfig, names) -> dict:
    """Name of a trained parameter -> its `config.Group`, the first that matches, or None.

    Raises:
        ConfigError: a group has no parameter.
    """
    found = {}
    for name in names:
        matching = (group for group in cfg.groups if re.fullmatch(group.match, name))
        found[name] = next(matching, None)
    for group in cfg.groups:
        if group not in found.values():
            trained = ", ".join(sorted(found))
            raise ConfigError(
                f"config.optim.groups.{group.name}: {group.match!r} matches no trained parameter "
                f"that an earlier group doesn't match. Trained: {trained}"
            )
    return found


def scale_by_group(factors: Mapping[str, float], decays: Mapping[str, float]):
    """The end of a chain: u -> rate * factor * (u - decay * p). `rate` is given to `update`."""

    def update(updates, state, params=None, *, rate, **_):
        def one(name, u):
            if decays[name]:
                u = u - decays[name] * params[name]
            return rate * factors[name] * u if factors[name] != 1.0 else rate * u

        return {name: one(name, u) for name, u in updates.items()}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


# ---- the optimizer


def arguments(cfg: OptimConfig) -> dict:
    """Everything but the learning rate that the function of `cfg.name` is called with.

    Raises:
        ConfigError: an option that this optimizer doesn't have.
    """
    rule = OPTIMIZERS[cfg.name]
    given = dict(cfg.options)
    ours = ("learning_rate", rule.moment_dtype, *rule.betas, *rule.fixed)
    known = [name for name in inspect.signature(rule.make).parameters if name not in ours]
    for name in given:
        if name not in known:
            raise ConfigError(
                f"config.optim.options.{name}: {cfg.name} has no such option; it takes "
                f"{', '.join(known)}"
            )
    for name, theirs in zip(("b1", "b2", "eps"), rule.betas, strict=True):
        value = getattr(cfg, name)
        if value is None:
            continue
        if not theirs:
            raise ConfigError(f"config.optim.{name}: {cfg.name} has none, leave it at None")
        given[theirs] = value
    if cfg.momentum_dtype != "float32":
        if not rule.moment_dtype:
            able = ", ".join(n for n, one in OPTIMIZERS.items() if one.moment_dtype)
            raise ConfigError(
                f"config.optim.momentum_dtype: {cfg.name} can't keep its first moment in "
                f"{cfg.momentum_dtype}; these can: {able}"
            )
        given[rule.moment_dtype] = jnp.dtype(cfg.momentum_dtype)
    return given | dict(rule.fixed)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What turns gradients into new parameters.

    Attributes:
        transformation: of all trained parameters; `update` also takes `rate`.
        schedule: step -> learning rate.
        clip_norm: global norm that gradients are scaled down to, or None.
        ema_decay: of the moving average of the parameters, or None for no average.
        shapes: dotted name -> shape and dtype of a trained parameter.
        state: shapes of the transformation's state.
    """

    transformation: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    clip_norm: float | None
    ema_decay: float | None
    shapes: dict[str, jax.ShapeDtypeStruct]
    state: optax.OptState

    def rate(self, step: jax.Array) -> jax.Array:
        """float32[] learning rate of the step that follows `step` steps."""
        return jnp.asarray(self.schedule(step), jnp.float32)


def build(cfg: OptimConfig, params: Mapping, rows: int, steps: int) -> Optimizer:
    """The optimizer of a run.

    Args:
        cfg: its options.
        params: dotted name -> trained parameter, or its shape.
        rows: of a whole batch, for the peak of the learning rate.
        steps: of the whole run, for the schedule.

    Raises:
        ConfigError: a name, option or group doesn't exist.
    """
    if cfg.name not in OPTIMIZERS:
        raise ConfigError(f"config.optim.name {cfg.name!r} is none of {', '.join(OPTIMIZERS)}")
    shapes = {n: jax.ShapeDtypeStruct(p.shape, p.dtype) for n, p in params.items()}
    groups = group_of_each(cfg, shapes)
    factors = {n: group.rate if group else 1.0 for n, group in groups.items()}
    decays = {n: 0.0 for n in shapes}
    for name, group in groups.items():
        if is_decayed(name, len(shapes[name].shape)):
            own = group is not None and group.decay is not None
            decays[name] = group.decay if own else cfg.weight_decay
    given = arguments(cfg)
    try:
        direction = OPTIMIZERS[cfg.name].make(learning_rate=1.0, **given)
        transformation = optax.chain(direction, scale_by_group(factors, decays))
        state = jax.eval_shape(transformation.init, shapes)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.optim.options: {cfg.name} refuses them: {error}") from error
    schedule = make_schedule(cfg, rows, steps)
    return Optimizer(transformation, schedule, cfg.clip_norm, cfg.ema_decay, shapes, state)


# ---- pieces of a step


def squared_norms(grads: Params, part_of: Mapping[str, str]) -> dict[str, jax.Array]:
    """part -> sum of squared gradients, from one read of every gradient."""
    sums: dict[str, jax.Array] = {}
    for name, g in grads.items():
        g = g.astype(jnp.float32)
        sums[part_of[name]] = sums.get(part_of[name], 0.0) + jnp.sum(g * g)
    return sums


def clip(grads: Params, norm: jax.Array, clip_norm: float | None) -> Params:
    """The gradients, scaled down where their global norm is above `clip_norm`."""
    if clip_norm is None:
        return grads
    factor = jnp.where(norm < clip_norm, 1.0, clip_norm / norm)
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)


def average(ema: Params, params: Params, decay: float, step: jax.Array) -> Params:
    """The moving average with the parameters after `step` (from 0) taken in.

    Its memory is short at first, min(decay, (1 + t) / (10 + t)), or the average would drag the
    start along.
    """
    t = (step + 1).astype(jnp.float32)
    keep = jnp.minimum(decay, (1.0 + t) / (10.0 + t))
    return jax.tree.map(lambda e, p: keep * e + (1.0 - keep) * p, ema, params)

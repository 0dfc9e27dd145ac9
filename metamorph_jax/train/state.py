"""What a training run carries from step to step, as plain trees of arrays.

Parameters are flat dicts, dotted name -> array ("llm.layers.mlp.gate_proj.kernel"). What a stage
does not train is a dict of its own, outside of the state that a step replaces: it has no gradients
and no moments. `Parts` puts the two together to the NNX model again.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from metamorph_jax import sharding
from metamorph_jax.errors import ConfigError
from metamorph_jax.models import lora
from metamorph_jax.models.build import build
from metamorph_jax.nn import quantized
from metamorph_jax.train import optim
from metamorph_jax.train.optim import Moments, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Replaced by every step.

    Attributes:
        params: what this stage trains.
        moments: of AdamW, for `params`.
        ema: moving average of `params`, or None.
        step: int32[] steps done.
        key: key data of the run's random numbers; a step folds its number into it.
        halted: bool[] a step was bad; from then on steps change nothing.
        usual: float32[3] what losses are usual (`config.Guard`), or None if no one asks.
    """

    params: Params
    moments: Moments
    ema: Params | None
    step: jax.Array
    key: jax.Array
    halted: jax.Array
    usual: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Parts:
    """How a model falls into what is trained, what isn't, and structure.

    Attributes:
        names, frozen_names: dotted names of the leaves.
        part_of: name -> part of the model (`param_group` of the recipe).
        fixed: those frozen leaves that are no parameters (statistics of the data, say). No weight
            file has them, so checkpoints do.
        shardings: name -> where the leaf lies.
        loss_weights: of the model.
    """

    graph: Any
    tree: Any
    frozen_tree: Any
    names: tuple[str, ...]
    frozen_names: tuple[str, ...]
    part_of: dict[str, str]
    fixed: tuple[str, ...]
    shardings: dict[str, Any]
    loss_weights: dict[str, float]

    def merge(self, params: Params, frozen: Params) -> nnx.Module:
        trained = jax.tree.unflatten(self.tree, [params[n] for n in self.names])
        rest = jax.tree.unflatten(self.frozen_tree, [frozen[n] for n in self.frozen_names])
        return nnx.merge(self.graph, trained, rest)


def _named(state: nnx.State) -> dict[str, nnx.Variable]:
    """Dotted name -> variable, in the order of the state's leaves."""
    return {".".join(map(str, path)): v for path, v in nnx.to_flat_state(state)}


def trained_filter(pattern: str):
    """The nnx filter of the parameters and adapters whose dotted name matches; none is packed."""
    whole = re.compile(pattern)

    def chosen(path, variable) -> bool:
        packed = isinstance(variable, quantized.Packed)
        return not packed and whole.fullmatch(".".join(map(str, path))) is not None

    return nnx.All(nnx.Any(nnx.Param, lora.Adapter), chosen)


def split(model: nnx.Module, pattern: str, mesh: Mesh) -> tuple[Parts, Params, Params]:
    """(parts, trained, frozen) of a model, whose leaves may be ShapeDtypeStructs.

    Args:
        model: a `recipe.Model`.
        pattern: of what is trained, see `Recipe.STAGES`.
        mesh: where the leaves lie.

    Raises:
        ConfigError: if nothing is trained.
    """
    graph, chosen, rest = nnx.split(model, trained_filter(pattern), ...)
    named, frozen = _named(chosen), _named(rest)
    if not named:
        raise ConfigError(f"this stage trains nothing: no parameter matches {pattern}")
    shardings = {n: sharding.variable_sharding(v, mesh) for n, v in (named | frozen).items()}
    parts = Parts(
        graph,
        jax.tree.structure(chosen),
        jax.tree.structure(rest),
        tuple(named),
        tuple(frozen),
        {n: model.param_group(tuple(n.split("."))) for n in named},
        tuple(n for n, v in frozen.items() if not isinstance(v, nnx.Param)),
        shardings,
        dict(model.loss_weights),
    )
    return (
        parts,
        dict(zip(parts.names, jax.tree.leaves(chosen), strict=True)),
        dict(zip(parts.frozen_names, jax.tree.leaves(rest), strict=True)),
    )


def create(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    pattern: str,
    mesh: Mesh,
    seed: int,
    fill: Callable[[nnx.Module], None] | None = None,
    adapt: Callable[[nnx.Module], None] | None = None,
) -> tuple[Parts, Params, Params]:
    """A model on the mesh, divided; see `models/build.py` for the order in which it is filled.

    Args:
        make_model: rngs -> model; runs under `jax.jit`.
        pattern: of what is trained, see `Recipe.STAGES`.
        mesh: for the shardings.
        seed: of the random weights.
        fill: reads pretrained weights into the model, which is still shapes without values.
        adapt: changes the filled model in place, see `Recipe.initialize`.

    Returns:
        (parts, trained parameters, frozen leaves).
    """
    model = build(make_model, mesh, seed, fill)
    if adapt is not None:
        adapt(model)
    parts, params, rest = split(model, pattern, mesh)
    return parts, place(params, parts), place(rest, parts)


def place(values: Params, parts: Parts) -> Params:
    """Puts every leaf where it belongs; each process gives the whole leaf or what it has of it."""

    def one(name, x):
        where = parts.shardings[name]
        if isinstance(x, jax.Array) and x.sharding == where:
            return x
        if where.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return jax.device_put(x, where)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return {name: one(name, x) for name, x in values.items()}


def shardings(parts: Parts, mesh: Mesh, ema: bool, usual: bool = False) -> TrainState:
    """Where the state lies: moments and average where their parameters do."""
    where = {n: parts.shardings[n] for n in parts.names}
    everywhere = sharding.replicated(mesh)
    moments = Moments(where, where)
    average, losses = where if ema else None, everywhere if usual else None
    return TrainState(where, moments, average, *3 * (everywhere,), losses)


def start(
    params: Params,
    parts: Parts,
    mesh: Mesh,
    seed: int,
    ema: bool,
    usual: bool = False,
    momentum_dtype: str = "float32",
) -> TrainState:
    """The state before the first step."""

    def make(params):
        average = jax.tree.map(jnp.copy, params) if ema else None  # a step gives both away
        key = jax.random.key_data(jax.random.key(seed + 1))
        zero, false = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        losses = jnp.zeros(3) if usual else None
        return TrainState({}, optim.init(params, momentum_dtype), average, zero, key, false, losses)

    where = dataclasses.replace(shardings(parts, mesh, ema, usual), params={})
    made = jax.jit(make, out_shardings=where)(params)
    return dataclasses.replace(made, params=params)

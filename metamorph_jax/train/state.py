"""What a training run carries from step to step, as plain trees of arrays.

Parameters are flat dicts, dotted name -> array ("llm.layers.mlp.gate_proj.kernel"). What a stage
does not train is in a dict of its own, outside of the state that a step replaces: it has no
gradients and no optimizer state. `Parts` puts the two together again as an NNX model.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from metamorph_jax import sharding
from metamorph_jax.errors import ConfigError
from metamorph_jax.models import lora
from metamorph_jax.models.build import build
from metamorph_jax.nn import quantized
from metamorph_jax.train.optim import Optimizer, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Replaced by every step.

    Attributes:
        params: what this stage trains.
        opt_state: of the optax transformation, for `params`.
        ema: moving average of `params`, or None.
        step: int32[] steps done.
        key: key data of the run's random numbers; a step folds its number into it.
        halted: bool[] a step was bad; from then on steps change nothing.
        loss_statistics: float32[3] running mean and deviation of the loss and the number of losses
            in them, for spike detection (`config.Guard`); None without it.
    """

    params: Params
    opt_state: optax.OptState
    ema: Params | None
    step: jax.Array
    key: jax.Array
    halted: jax.Array
    loss_statistics: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Parts:
    """A model divided into trained leaves, frozen leaves and structure.

    Attributes:
        names, frozen_names: dotted names of the leaves.
        part_of: name -> part of the model (`param_group` of the recipe).
        buffers: names of the frozen leaves that are not parameters (statistics of the data, say).
            Weight files lack them, so they are saved in checkpoints.
        shardings: name -> sharding of the leaf.
        loss_weights: of the model.
    """

    graph: Any
    tree: Any
    frozen_tree: Any
    names: tuple[str, ...]
    frozen_names: tuple[str, ...]
    part_of: dict[str, str]
    buffers: tuple[str, ...]
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
    """An nnx filter for the parameters and adapters whose dotted name matches.

    Packed weights (`nn/quantized.py`) never match.
    """
    whole = re.compile(pattern)

    def chosen(path, variable) -> bool:
        packed = isinstance(variable, quantized.Packed)
        return not packed and whole.fullmatch(".".join(map(str, path))) is not None

    return nnx.All(nnx.Any(nnx.Param, lora.Adapter), chosen)


def split(model: nnx.Module, pattern: str, mesh: Mesh) -> tuple[Parts, Params, Params]:
    """(parts, trained, frozen) of a model, whose leaves may be ShapeDtypeStructs.

    Args:
        model: a `recipe.Model`.
        pattern: regular expression for what is trained, see `Recipe.STAGES`.
        mesh: for the shardings.

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
        pattern: regular expression for what is trained, see `Recipe.STAGES`.
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
    """Puts every leaf on its devices; a process gives the whole leaf, or a global array."""
    return {name: sharding.put(x, parts.shardings[name]) for name, x in values.items()}


def shardings(parts: Parts, mesh: Mesh, optimizer: Optimizer, statistics: bool) -> TrainState:
    """The shardings of the state: what belongs to a parameter lies as it does.

    Args:
        parts: of the model.
        mesh: for the shardings.
        optimizer: of the run.
        statistics: whether the state has loss statistics.
    """
    where = {n: parts.shardings[n] for n in parts.names}
    everywhere = sharding.replicated(mesh)
    average = where if optimizer.ema_decay is not None else None
    return TrainState(
        where,
        optimizer_shardings(optimizer, where, mesh),
        average,
        *3 * (everywhere,),
        everywhere if statistics else None,
    )


def optimizer_shardings(optimizer: Optimizer, where: dict[str, NamedSharding], mesh: Mesh):
    """The sharding of every leaf of the optimizer's state.

    A leaf that belongs to a parameter has its name as the last key of its path. It lies as the
    parameter if it has its shape; a factored moment, which lacks one dimension, lies as the others
    do. Everything else (counters, placeholders) is replicated.
    """

    def one(path, leaf):
        name = path[-1].key if path and isinstance(path[-1], jax.tree_util.DictKey) else None
        if name not in where:
            return sharding.replicated(mesh)
        shape = optimizer.shapes[name].shape
        cut = tuple(where[name].spec) + (None,) * (len(shape) - len(where[name].spec))
        if leaf.shape == shape:
            return where[name]
        for d in range(len(shape)):
            if leaf.shape == shape[:d] + shape[d + 1 :]:
                return NamedSharding(mesh, P(*cut[:d], *cut[d + 1 :]))
        return sharding.replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, optimizer.state)


def start(
    params: Params, parts: Parts, mesh: Mesh, seed: int, optimizer: Optimizer, statistics: bool
) -> TrainState:
    """The state before the first step; arguments as of `shardings`, `seed` that of the run."""

    def make(params):
        # A copy, as a step donates both.
        average = jax.tree.map(jnp.copy, params) if optimizer.ema_decay is not None else None
        key = jax.random.key_data(jax.random.key(seed + 1))
        zero, false = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        losses = jnp.zeros(3) if statistics else None
        state = optimizer.transformation.init(params)
        return TrainState({}, state, average, zero, key, false, losses)

    where = dataclasses.replace(shardings(parts, mesh, optimizer, statistics), params={})
    made = jax.jit(make, out_shardings=where)(params)
    return dataclasses.replace(made, params=params)

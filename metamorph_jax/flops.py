"""The arithmetic of a model, in FLOPs per step over all devices: for plans and MFU.

Convention: a multiply-add is 2; matrix products and convolutions only. Per weight of a product and
position: 2 forward, 2 for the gradient of its input where something before it is trained, 2 for
its own gradient where it is trained. Causal attention counts half of all pairs; the segments of
packed rows don't reduce that. Every position counts as one that has a text target. Recomputation to
save memory (rematerialisation) is not counted as model FLOPs; it is `recomputed`, and lowers the
bound on MFU.

A model says what its products are (`Model.work`, a tuple of `Work`); nothing here knows a model.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import jax.extend
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Work:
    """Some matrix products of a training step.

    Attributes:
        part: name in tables.
        forward: FLOPs of the forward pass, for the whole batch.
        weights: prefix of the dotted names of the weights, "" for products without weights.
        input_gradients: how many inputs get a gradient: 1 for a product with weights that the
            gradient flows through, 2 for attention's, 0 where nothing before it is trained.
        recomputed: FLOPs that the backward pass computes again.
    """

    part: str
    forward: float
    weights: str = ""
    input_gradients: int = 1
    recomputed: float = 0.0


@dataclasses.dataclass(frozen=True)
class Flops:
    """`model` is what MFU counts; `recomputed` what the chips compute on top."""

    model: float
    recomputed: float
    by_part: dict[str, float]


def total(work: Iterable[Work], trained: Iterable[str]) -> Flops:
    """FLOPs of a training step.

    Args:
        work: of the model on the batch.
        trained: dotted names of the trained parameters.
    """
    trained, parts, recomputed = tuple(trained), {}, 0.0
    for one in work:
        own = one.weights != "" and any(name.startswith(one.weights) for name in trained)
        times = 1 + one.input_gradients + own
        parts[one.part] = parts.get(one.part, 0.0) + times * one.forward
        recomputed += one.recomputed
    return Flops(sum(parts.values()), recomputed, parts)


def of_function(module, f: Callable, *args) -> float:
    """FLOPs of products and convolutions in f(module, *args), given as shapes."""
    graph, state = nnx.split(module)
    return of_jaxpr(jax.make_jaxpr(lambda s, *a: f(nnx.merge(graph, s), *a))(state, *args).jaxpr)


def of_jaxpr(jaxpr) -> float:
    """FLOPs of a jaxpr; a scan counts as often as it runs, a while loop's body once."""
    found = 0.0
    for eqn in jaxpr.eqns:
        name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
            found += 2.0 * math.prod(out.shape) * inner
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            found += 2.0 * math.prod(out.shape) * math.prod(kernel.shape) / features
        times = eqn.params.get("length", 1) if name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found += times * of_jaxpr(inner)
    return found

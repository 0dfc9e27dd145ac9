"""One training step: gradients of the whole batch, judged and applied, in one program.

The loss is   sum_k weight_k * sum_k(all micro-batches, all devices) / count_k(the same),
so every supervised position weighs the same, however the batch is cut.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from metamorph_jax import sharding
from metamorph_jax.train import optim
from metamorph_jax.train import state as states
from metamorph_jax.train.config import Guard
from metamorph_jax.train.optim import Optimizer, Params
from metamorph_jax.train.state import Parts, TrainState

_FORGET = 0.02  # weight of the newest loss in the running mean


def make_step(
    parts: Parts,
    optimizer: Optimizer,
    accumulate: int = 1,
    *,
    mesh: Mesh,
    guard: Guard | None = None,
) -> Callable:
    """The compiled step: (state, frozen, batch) -> (state, report). The old state is donated.

    Args:
        parts: of the model.
        optimizer: of the trained parameters.
        accumulate: micro-batches that a batch is cut into.
        mesh: that everything lies on. The shardings of the new state are those of the old one: left
            to itself, the compiler may choose others, and then the next step compiles again.
        guard: what happens to bad steps; default: stop at what is not finite.

    The report, small replicated arrays:
        sums, counts: of each loss; metrics: name -> (numerator, denominator);
        loss: the total; grad_norm; norms: part -> gradient norm; rate; finite: bool;
        spike: bool; loss_statistics: float32[3]; empty: bool, nothing in the batch has a target.

    A batch without any target changes nothing, and does not count as a step.
    """
    guard = guard or Guard()

    def step(state: TrainState, frozen: Params, batch):
        counts = count(parts, state.params, frozen, batch)
        grads, (sums, metrics) = gradients(parts, accumulate, state, frozen, batch, counts)
        loss = total(parts.loss_weights, sums, counts)
        squares = optim.squared_norms(grads, parts.part_of)
        norm = jnp.sqrt(sum(squares.values()))
        judgement = judge(guard, state, loss, norm, counts)
        new = update(optimizer, state, grads, norm, loss, judgement)
        report = {
            "loss": loss,
            "sums": sums,
            "counts": counts,
            "metrics": metrics,
            "grad_norm": norm,
            "norms": {part: jnp.sqrt(s) for part, s in squares.items()},
            "rate": optimizer.rate(state.step),
            "finite": judgement.finite,
            "spike": judgement.spike,
            "loss_statistics": statistics_of(state),
            "empty": judgement.empty,
        }
        return new, report

    where = states.shardings(parts, mesh, optimizer, bool(guard.spike))
    return jax.jit(step, donate_argnums=(0,), out_shardings=(where, sharding.replicated(mesh)))


# ---- gradients


def count(parts: Parts, params: Params, frozen: Params, batch) -> dict[str, jax.Array]:
    """float32[] number of terms of each loss in the whole batch."""
    counts = parts.merge(params, frozen).loss_counts(batch)
    return {k: n.astype(jnp.float32) for k, n in counts.items()}


def total(weights, sums, counts) -> jax.Array:
    """float32[] weighted sum of the mean of each loss; a loss without any term counts as 0."""
    return sum(weights[k] * s / jnp.maximum(counts[k], 1.0) for k, s in sums.items())


def gradients(parts: Parts, accumulate: int, state: TrainState, frozen: Params, batch, counts):
    """(gradients, (sums, metrics)) of the whole batch, one micro-batch after the other."""

    def loss(params, batch, key):
        sums, metrics = parts.merge(params, frozen).loss_sums(batch, key)
        return total(parts.loss_weights, sums, counts), (sums, metrics)

    gradient = jax.grad(loss, has_aux=True)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    if accumulate == 1:
        return gradient(state.params, batch, key)

    def body(grads, micro):
        number, batch = micro
        new, aux = gradient(state.params, batch, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, grads, new), aux

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    xs = (jnp.arange(accumulate), cut(batch, accumulate))
    grads, aux = jax.lax.scan(body, zeros, xs)
    return grads, jax.tree.map(lambda x: x.sum(0), aux)


def cut(batch, n: int):
    """Cuts the rows of a batch into n micro-batches on a new leading axis.

    Row r goes to micro-batch r % n, so that every device keeps its own rows.
    """

    def one(x):
        rows = x.shape[0]
        if rows % n:
            raise ValueError(f"{rows} rows don't divide into {n} micro-batches")
        return jnp.moveaxis(x.reshape(rows // n, n, *x.shape[1:]), 1, 0)

    return jax.tree.map(one, batch)


def losses(parts: Parts, accumulate: int, params: Params, frozen: Params, batch, key):
    """(sums, counts, metrics) of the whole batch as in training, without gradients."""
    counts = count(parts, params, frozen, batch)
    model = parts.merge(params, frozen)
    if accumulate == 1:
        sums, metrics = model.loss_sums(batch, key)
        return sums, counts, metrics

    def body(_, micro):
        number, batch = micro
        return None, model.loss_sums(batch, jax.random.fold_in(key, number))

    _, found = jax.lax.scan(body, None, (jnp.arange(accumulate), cut(batch, accumulate)))
    sums, metrics = jax.tree.map(lambda x: x.sum(0), found)
    return sums, counts, metrics


# ---- judgement


class Judgement(NamedTuple):
    """bool[] each.

    Attributes:
        finite: loss and gradients are.
        spike: the loss is far above its running mean.
        empty: nothing in the batch has a target.
        apply: the step may change the parameters.
        halted: no later step may.
        counts: it is one of the run's steps.
    """

    finite: jax.Array
    spike: jax.Array
    empty: jax.Array
    apply: jax.Array
    halted: jax.Array
    counts: jax.Array


def judge(guard: Guard, state: TrainState, loss, norm, counts) -> Judgement:
    """What a step with this loss and gradient norm may do."""
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    spike = jnp.zeros((), bool)
    if guard.spike:
        mean, deviation, n = state.loss_statistics
        limit = guard.spike * jnp.maximum(deviation, 0.01 * jnp.abs(mean))
        spike = finite & (n >= guard.spike_after) & (loss > mean + limit)
    good = finite & ~spike
    empty = sum(counts.values()) == 0
    apply = good & ~empty & ~state.halted
    if guard.on_bad == "stop":
        return Judgement(finite, spike, empty, apply, state.halted | ~good, apply)
    return Judgement(finite, spike, empty, apply, state.halted, ~empty)


def statistics_of(state: TrainState) -> jax.Array:
    """float32[3] the state's loss statistics, zeros if it has none."""
    return jnp.zeros(3) if state.loss_statistics is None else state.loss_statistics


def take_in(statistics: jax.Array, loss: jax.Array) -> jax.Array:
    """float32[3] (running mean, running deviation, losses in them) with one more loss."""
    mean, deviation, n = statistics
    weight = jnp.maximum(1 / (n + 1), _FORGET)
    off = loss - mean
    far = jnp.where(n == 0, 0.0, jnp.abs(off))
    return jnp.stack([mean + weight * off, deviation + weight * (far - deviation), n + 1])


# ---- update


def update(
    optimizer: Optimizer, state: TrainState, grads: Params, norm, loss, judgement: Judgement
) -> TrainState:
    """The next state; only its counters change where the judgement forbids more.

    A branch, and not a choice between old and new arrays, so that the update works in place and
    needs no memory of its own: on two CPU cores AdamW takes a third of the time of the choice
    (benchmarks/optimizer.py, 68 M parameters), and half of that of one written by hand around it.
    """

    def advance(params, opt_state, ema, statistics):
        updates, opt_state = optimizer.transformation.update(
            optim.clip(grads, norm, optimizer.clip_norm),
            opt_state,
            params,
            rate=optimizer.rate(state.step),
        )
        params = optax.apply_updates(params, updates)
        if ema is not None:
            ema = optim.average(ema, params, optimizer.ema_decay, state.step)
        if statistics is not None:
            statistics = take_in(statistics, loss)
        return params, opt_state, ema, statistics

    old = state.params, state.opt_state, state.ema, state.loss_statistics
    params, opt_state, ema, statistics = jax.lax.cond(
        judgement.apply, advance, lambda *same: same, *old
    )
    step = state.step + judgement.counts.astype(jnp.int32)
    return TrainState(params, opt_state, ema, step, state.key, judgement.halted, statistics)

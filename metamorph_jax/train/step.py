"""One training step: gradients of the whole batch, checked, clipped and applied, in one program.

The loss is   sum_k coef_k * sum_k(all micro-batches, all devices) / count_k(the same),
so every supervised position weighs the same, however the batch is cut.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from metamorph_jax import sharding
from metamorph_jax.train import optim
from metamorph_jax.train import state as states
from metamorph_jax.train.config import Guard, OptimConfig
from metamorph_jax.train.optim import Params
from metamorph_jax.train.state import Parts, TrainState

_FORGET = 0.02  # weight of the newest loss in the running mean


def _usual(usual: jax.Array, loss: jax.Array) -> jax.Array:
    """float32[3] (running mean, running deviation, losses in them) with one more loss."""
    mean, deviation, n = usual
    weight = jnp.maximum(1 / (n + 1), _FORGET)
    off = loss - mean
    far = jnp.where(n == 0, 0.0, jnp.abs(off))
    return jnp.stack([mean + weight * off, deviation + weight * (far - deviation), n + 1])


def make_step(
    parts: Parts,
    cfg: OptimConfig,
    schedule: Callable[[jax.Array], jax.Array],
    accumulate: int = 1,
    *,
    mesh: Mesh,
    guard: Guard | None = None,
) -> Callable:
    """The compiled step: (state, frozen, batch) -> (state, report). The old state is given away.

    Args:
        parts: how the model falls apart.
        cfg: optimizer.
        schedule: step -> learning rate.
        accumulate: micro-batches that a batch is cut into.
        mesh: where all of it lies. The new state lies where the old one did: left to itself the
            compiler may move a leaf, and then the next step compiles anew.
        guard: what happens to bad steps; default: stop at what is not finite.

    The report, small arrays that lie on every device:
        sums, counts: of each loss; metrics: name -> (numerator, denominator);
        loss: the total; grad_norm; norms: part -> gradient norm; rate; finite: bool;
        spike: bool; usual: float32[3], see `Guard`; empty: bool, nothing in the batch has a target.

    A batch without any target changes nothing, and does not count as a step.
    """
    guard = guard or Guard()

    def total_loss(params, frozen, batch, key, counts):
        model = parts.merge(params, frozen)
        sums, metrics = model.loss_sums(batch, key)
        total = sum(parts.loss_weights[k] * s / counts[k] for k, s in sums.items())
        return total, (sums, metrics)

    gradient = jax.grad(total_loss, has_aux=True)

    def all_gradients(params, frozen, batch, key, counts):
        if accumulate == 1:
            return gradient(params, frozen, batch, key, counts)

        def body(grads, micro):
            number, batch = micro
            new, aux = gradient(params, frozen, batch, jax.random.fold_in(key, number), counts)
            return jax.tree.map(jnp.add, grads, new), aux

        zeros = jax.tree.map(jnp.zeros_like, params)
        xs = (jnp.arange(accumulate), cut(batch, accumulate))
        grads, aux = jax.lax.scan(body, zeros, xs)
        return grads, jax.tree.map(lambda x: x.sum(0), aux)

    def step(state: TrainState, frozen: Params, batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        counts = parts.merge(state.params, frozen).loss_counts(batch)
        counts = {k: n.astype(jnp.float32) for k, n in counts.items()}
        at_least_one = {k: jnp.maximum(n, 1.0) for k, n in counts.items()}
        grads, (sums, metrics) = all_gradients(state.params, frozen, batch, key, at_least_one)

        squares = optim.squared_norms(grads, parts.part_of)
        norm = jnp.sqrt(sum(squares.values()))
        loss = sum(parts.loss_weights[k] * s / at_least_one[k] for k, s in sums.items())
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        empty = sum(counts.values()) == 0
        spike, usual = jnp.zeros((), bool), state.usual
        if guard.spike:
            mean, deviation, n = usual
            limit = guard.spike * jnp.maximum(deviation, 0.01 * jnp.abs(mean))
            spike = finite & (n >= guard.spike_after) & (loss > mean + limit)
        good = finite & ~spike
        apply = good & ~empty & ~state.halted
        if guard.on_bad == "stop":
            halted, done = state.halted | ~good, apply
        else:
            halted, done = state.halted, ~empty
        rate = jnp.asarray(schedule(state.step), jnp.float32)
        params, moments, ema = optim.update(
            cfg,
            state.params,
            state.moments,
            grads,
            step=state.step,
            rate=rate,
            factor=optim.clip_factor(norm, cfg.clip_norm),
            apply=apply,
            part_of=parts.part_of,
            ema=state.ema,
        )
        new = TrainState(
            params,
            moments,
            ema,
            state.step + done.astype(jnp.int32),
            state.key,
            halted,
            jnp.where(apply, _usual(usual, loss), usual) if guard.spike else usual,
        )
        report = {
            "loss": loss,
            "sums": sums,
            "counts": counts,
            "metrics": metrics,
            "grad_norm": norm,
            "norms": {part: jnp.sqrt(s) for part, s in squares.items()},
            "rate": rate,
            "finite": finite,
            "spike": spike,
            "usual": jnp.zeros(3) if usual is None else usual,
            "empty": empty,
        }
        return new, report

    where = states.shardings(parts, mesh, cfg.ema_decay is not None, bool(guard.spike))
    return jax.jit(step, donate_argnums=(0,), out_shardings=(where, sharding.replicated(mesh)))


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

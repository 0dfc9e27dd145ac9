"""One update of every optimizer, in place, against an update that selects old or new arrays.

    python benchmarks/optimizer.py [--rounds 5] [--smoke] [--no-peer]

68 M parameters (`train_step.py` has their model), float32. A bad step must change nothing. The
update of a run is a branch of `jax.lax.cond` (`train/step.py`); the peer always computes the new
arrays and selects them, or the old ones, with `jnp.where`. Gradients are given; `train_step.py`
has their cost.
"""

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from train_step import FULL, SMOKE, model_config

from metamorph_jax import sharding
from metamorph_jax.recipes import metamorph
from metamorph_jax.train import optim, state
from metamorph_jax.train.config import OptimConfig

NAMES = ("adamw", "lion", "adafactor", "sgd")


def update(optimizer, params, opt_state, grads):
    """The parameters and the state after one step."""
    changes, opt_state = optimizer.transformation.update(
        grads, opt_state, params, rate=jnp.float32(1e-4)
    )
    return optax.apply_updates(params, changes), opt_state


def branch(optimizer):
    def step(old, grads):
        good = jnp.isfinite(norm(grads))
        return jax.lax.cond(good, lambda *x: update(optimizer, *x, grads), lambda *x: x, *old)

    return step


def choice(optimizer):
    def step(old, grads):
        good = jnp.isfinite(norm(grads))
        new = update(optimizer, *old, grads)
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

    return step


def norm(grads):
    return jnp.sqrt(sum(optim.squared_norms(grads, dict.fromkeys(grads, "all")).values()))


def runner(step, params, opt_state, grads):
    """() -> None, one step on its own copy of the arrays, which every step donates."""
    box = [jax.tree.map(jnp.copy, (params, opt_state))]
    compiled = jax.jit(step, donate_argnums=(0,)).lower(box[0], grads).compile()

    def run():
        box[0] = compiled(box[0], grads)
        jax.block_until_ready(box[0])

    return run, compiled.memory_analysis().temp_size_in_bytes


def measure(name: str, params, args) -> common.Case:
    optimizer = optim.build(OptimConfig(name=name, clip_norm=None), params, 1, 1)
    opt_state = optimizer.transformation.init(params)
    rng = np.random.default_rng(0)
    shapes = {n: p.shape for n, p in params.items()}
    grads = {n: jnp.asarray(1e-3 * rng.standard_normal(s, np.float32)) for n, s in shapes.items()}
    runs, room = {}, {}
    for key, make in (("ours", branch), ("peer", choice))[: 1 if args.no_peer else 2]:
        runs[key], room[key] = runner(make(optimizer), params, opt_state, grads)
        runs[key]()
    times = common.interleaved(runs, args.rounds)
    print(f"{name}: temporary memory in MB", {k: round(v / 1e6, 1) for k, v in room.items()})
    return common.emit(common.Case(f"optimizer_{name}", "s", times["ours"], times.get("peer")))


def main():
    args = common.parser(__doc__.splitlines()[0]).parse_args()
    if args.smoke:
        args.rounds = 1
    cfg = model_config((SMOKE if args.smoke else FULL)["llm"], "default")
    make = lambda rngs: metamorph.create(cfg, rngs)  # noqa: E731
    _, params, _ = state.create(make, metamorph.STAGES["vpit"](cfg), sharding.make_mesh(), 0)
    common.report([measure(name, params, args) for name in NAMES])


if __name__ == "__main__":
    main()

"""The programs that a plan compiles: the train step as `train` runs it, and a step of decoding.

Nothing is computed and no weight is made: states and batches are shapes with shardings.
"""

import dataclasses
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from metamorph_jax import flops, sharding
from metamorph_jax.errors import ConfigError
from metamorph_jax.types import Batch


@dataclasses.dataclass
class Program:
    """A function, the shapes it takes, and what a plan has to know about it.

    Attributes:
        call: the jitted function; args: its arguments, ShapeDtypeStructs with shardings.
        mesh: over the devices it is compiled for.
        model: with ShapeDtypeStructs for leaves.
        parts: name of a part of the model -> (trained, frozen) parameters.
        groups: name -> structs, what the memory of arguments goes into.
        positions, rows: of a step, over all devices.
        options: of the model, as its config says; arithmetic: of a step.
        length, weights: of a step of decoding: slots of the cache, and how weights are kept.
    """

    call: Any
    args: tuple
    mesh: Any
    model: Any
    parts: dict[str, tuple[int, int]]
    groups: dict[str, Any]
    positions: int
    rows: int
    training: bool
    cfg: Any
    options: dict
    arithmetic: flops.Flops
    length: int = 0
    weights: str = ""


def train_step(config, devices, rows_per_device: float | None = None) -> Program:
    """The step of `metamorph train` for these devices.

    Args:
        config: ConfigDict or nested dict.
        devices: to compile for.
        rows_per_device: takes the place of config.batch_size.

    Raises:
        ConfigError: as `train` would.
    """
    from flax import nnx

    from metamorph_jax.train import optim
    from metamorph_jax.train import state as states
    from metamorph_jax.train.config import resolve
    from metamorph_jax.train.step import make_step

    run = resolve(config)
    cfg, recipe = run.cfg, run.recipe
    mesh = _mesh(cfg, devices)
    rows = cfg.batch_size if rows_per_device is None else round(rows_per_device * mesh.size)
    groups = 1
    for axis in sharding.BATCH_AXES:
        groups *= mesh.shape[axis]
    if rows % cfg.accumulate or (rows // cfg.accumulate) % groups:
        raise ConfigError(
            f"config.batch_size {rows} in {cfg.accumulate} micro-batches doesn't divide over "
            f"{groups} groups of devices; --rows-per-device sets another batch"
        )
    model = nnx.eval_shape(lambda: recipe.create(run.model, nnx.Rngs(0)))
    parts, trained, frozen = states.split(model, run.pattern, mesh)
    optimizer = optim.build(cfg.optim, trained, rows, cfg.steps)
    statistics = bool(cfg.guard.spike)
    start = lambda p: states.start(  # noqa: E731
        p, parts, mesh, cfg.seed, optimizer, statistics
    )
    where = states.shardings(parts, mesh, optimizer, statistics)
    state = _place(_start_shapes(start, trained), where)
    frozen = _place(frozen, {n: parts.shardings[n] for n in frozen})
    batch = recipe.batch_spec(run.data, run.model, rows)
    with jax.set_mesh(mesh):
        work = model.work(batch)
    batch = _place(batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch))
    call = make_step(parts, optimizer, cfg.accumulate, mesh=mesh, guard=cfg.guard)
    groups = {
        "parameters": state.params,
        "moments": state.opt_state,
        "frozen parameters": frozen,
        "moving average": state.ema or {},
        "batch": batch,
    }
    return Program(
        call, (state, frozen, batch), mesh, model, _sizes(trained, frozen, parts.part_of), groups,
        batch_positions(batch), rows, True, cfg, run.table["model"],
        flops.total(work, trained),
    )  # fmt: skip


def decode_step(
    config, devices, rows_per_device: float | None = None, length=4096, weights="auto"
) -> Program:
    """A step of `metamorph generate`, which runs on one chip: each row reads and emits a token.

    Args:
        config: ConfigDict or nested dict.
        devices: of which the first is compiled for.
        rows_per_device: decoded together, default 1.
        length: slots of the cache.
        weights: how the language model's are kept, see `sampling.layers.layout`.

    Raises:
        ConfigError: the recipe has no language model.
    """
    from flax import nnx

    from metamorph_jax.sampling.interleaved import Decoder, Options
    from metamorph_jax.train.config import resolve

    run = resolve(config)
    cfg, recipe, model_cfg = run.cfg, run.recipe, run.model
    mesh = sharding.make_mesh(devices=devices[:1])
    rows = round(rows_per_device or 1)
    made = []

    def prepared():
        model = recipe.create(model_cfg, nnx.Rngs(0))
        made.append(Decoder(model, weights))
        return made[0].weights

    with jax.set_mesh(mesh):  # whose kind of device decides how weights are kept
        kept = jax.eval_shape(prepared)
    decoder, options = made[0], Options()
    new = length // 2
    begin = partial(decoder._run_prompt, options=options, capacity=length - new)
    number = jax.ShapeDtypeStruct((rows,), jnp.int32)
    state = jax.eval_shape(
        begin, kept, jax.ShapeDtypeStruct((rows, new, decoder.cfg.width), jnp.float32), number,
        number, jax.ShapeDtypeStruct((rows,), jnp.uint32),
        jax.ShapeDtypeStruct((rows, length - new), jnp.int32),
    )  # fmt: skip
    everywhere = sharding.replicated(mesh)
    place = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype,
                                                                 sharding=everywhere))  # fmt: skip
    kept, state = place(kept), place(state)
    call = jax.jit(partial(decoder.step, options=options), donate_argnums=(1,))
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    parts = {"llm": (0, size(kept["llm"])), "connector and head": (0, size(kept["parts"]))}
    model = nnx.eval_shape(lambda: recipe.create(model_cfg, nnx.Rngs(0)))
    traced = jax.make_jaxpr(partial(decoder.step, options=options))(kept, state)
    forward = flops.of_jaxpr(traced.jaxpr)
    arithmetic = flops.Flops(forward, 0.0, {"step": forward})
    groups = {"weights": kept, "cache": (state.keys, state.values)}
    return Program(
        call, (kept, state), mesh, model, parts, groups, rows, rows, False, cfg,
        run.table["model"], arithmetic, length=length, weights=weights,
    )  # fmt: skip


@dataclasses.dataclass
class Compiled:
    """`error` is the compiler's message where it ran out of memory; then `executable` is None."""

    executable: Any
    seconds: float
    error: str = ""


def compile_program(program: Program) -> Compiled:
    clock = time.perf_counter()
    with jax.set_mesh(program.mesh):
        lowered = program.call.lower(*program.args)
        try:
            executable = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Compiled(None, time.perf_counter() - clock, str(error))
    return Compiled(executable, time.perf_counter() - clock)


def batch_positions(batch) -> int:
    """Positions of text and visual tokens in a batch of shapes; 0 where it holds images only."""
    return batch.tokens.size if isinstance(batch, Batch) else 0


def _mesh(cfg, devices):
    try:
        return sharding.make_mesh(cfg.mesh, devices)
    except ValueError as error:
        raise ConfigError(f"config.mesh: {error}") from error


def _start_shapes(start, trained):
    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in trained.items()}
    return jax.eval_shape(start, shapes)


def _place(structs, shardings):
    one = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(one, structs, shardings)


def _sizes(trained, frozen, part_of) -> dict[str, tuple[int, int]]:
    sizes: dict[str, list[int]] = {}
    for values, at in ((trained, 0), (frozen, 1)):
        for name, x in values.items():
            part = part_of.get(name) or ("tokens" if name.endswith("added") else name.split(".")[0])
            sizes.setdefault(part, [0, 0])[at] += x.size
    return {part: tuple(pair) for part, pair in sizes.items()}

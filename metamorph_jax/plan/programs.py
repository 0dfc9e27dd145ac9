"""The programs that a plan compiles: the train step as `train` runs it, and a step of decoding.

Nothing is computed and no weight is made: states and batches are shapes with shardings.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from metamorph_jax import config as configs
from metamorph_jax import sharding
from metamorph_jax.config import ConfigError


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
    model_cfg: Any
    trained_names: frozenset = frozenset()
    batch: Any = None


def train_step(config, devices, rows_per_device: float | None = None) -> Program:
    """The step of `metamorph train` for these devices.

    Args:
        config: ConfigDict or nested dict.
        devices: to compile for.
        rows_per_device: takes the place of config.batch_size.

    Raises:
        ConfigError: as `train` would.
    """
    from metamorph_jax.train import optim
    from metamorph_jax.train import state as states
    from metamorph_jax.train.step import make_step

    cfg, recipe, model_cfg = _configs(config)
    if hasattr(model_cfg, "sources") and not model_cfg.sources:
        model_cfg = dataclasses.replace(model_cfg, sources=tuple(cfg.data.get("sources", ())))
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
    parts, trained, frozen, model = _abstract(recipe, model_cfg, cfg, mesh)
    ema = cfg.optim.ema_decay is not None
    guarded = bool(cfg.guard.spike)
    start = lambda p: states.start(  # noqa: E731
        p, parts, mesh, cfg.seed, ema, guarded, cfg.optim.momentum_dtype
    )
    optim.check_multipliers(cfg.optim, set(parts.part_of.values()))
    where = states.shardings(parts, mesh, ema, guarded)
    state = _place(_start_shapes(start, trained), where)
    frozen = _place(frozen, {n: parts.shardings[n] for n in frozen})
    batch = recipe.input_spec(cfg.data, model_cfg, rows)
    batch = _place(batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch))
    schedule = optim.make_schedule(cfg.optim, rows, cfg.steps)
    call = make_step(parts, cfg.optim, schedule, cfg.accumulate, mesh=mesh, guard=cfg.guard)
    length = getattr(batch, "tokens", None)
    groups = {
        "parameters": state.params,
        "moments": state.moments,
        "frozen parameters": frozen,
        "moving average": state.ema or {},
        "batch": batch,
    }
    return Program(
        call, (state, frozen, batch), mesh, model, _sizes(trained, frozen, parts.part_of), groups,
        0 if length is None else length.size, rows, True, cfg, model_cfg, frozenset(trained), batch,
    )  # fmt: skip


def decode_step(config, devices, rows_per_device: float | None = None, length=4096) -> Program:
    """One token for every row, with a cache of `length` slots and bfloat16 weights.

    Raises:
        ConfigError: the recipe has no language model.
    """
    from metamorph_jax.models.llm.llama import KVCache

    cfg, recipe, model_cfg = _configs(config)
    mesh = _mesh(cfg, devices)
    parts, trained, frozen, model = _abstract(recipe, model_cfg, cfg, mesh)
    if not hasattr(model, "llm"):
        raise ConfigError(f"recipe {cfg.recipe} has no language model to decode with")
    rows = mesh.size if rows_per_device is None else round(rows_per_device * mesh.size)
    wide = lambda x: jnp.issubdtype(x.dtype, jnp.floating) and len(x.shape) > 1  # noqa: E731
    values = trained | frozen
    values = {
        n: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if wide(x) else x.dtype)
        for n, x in values.items()
        if n.startswith("llm.")
    }
    values = _place(values, {n: parts.shardings[n] for n in values})
    others = {n: x for n, x in (trained | frozen).items() if n not in values}
    llm = model.llm.cfg

    def step(weights, tokens, filled, cache):
        every = {**weights, **{n: jnp.zeros(x.shape, x.dtype) for n, x in others.items()}}
        model = parts.merge({n: every[n] for n in trained}, {n: every[n] for n in frozen})
        positions = jnp.broadcast_to(filled, (rows, 1))
        mask = jnp.broadcast_to(jnp.arange(length) <= filled, (rows, 1, length))
        past = KVCache(cache[0], cache[1], filled, jnp.ones((rows, length), bool))
        hidden, past = model.llm(model.embed_text(tokens[:, None]), positions, mask, past)
        token = jnp.argmax(model.llm.logits(hidden[:, 0]), axis=-1)
        return token, past.filled, (past.keys, past.values)

    dtype = jnp.dtype(llm.dtype)
    shape = (llm.layers, rows, length, llm.kv_heads, llm.head_dim)
    at = jax.sharding.NamedSharding(
        mesh, sharding.fit(sharding.spec(None, "act_batch", None, "act_heads", None), shape, mesh)
    )
    cache = tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=at) for _ in range(2))
    everywhere = sharding.replicated(mesh)
    tokens = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=sharding.batch_sharding(mesh))
    filled = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    out = (tokens.sharding, everywhere, (at, at))
    call = jax.jit(step, donate_argnums=(3,), out_shardings=out)
    return Program(
        call, (values, tokens, filled, cache), mesh, model, _sizes({}, values, {}),
        {"parameters": values, "cache": cache}, rows, rows, False, cfg, model_cfg,
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


def _configs(config):
    from metamorph_jax.train.loop import TrainConfig
    from metamorph_jax.train.workdir import find_recipe

    table = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    cfg = configs.build(TrainConfig, table)
    recipe = find_recipe(cfg.recipe)
    return cfg, recipe, configs.build(recipe.Config, cfg.model, "config.model")


def _mesh(cfg, devices):
    try:
        return sharding.make_mesh(cfg.mesh, devices)
    except ValueError as error:
        raise ConfigError(f"config.mesh: {error}") from error


def _abstract(recipe, model_cfg, cfg, mesh):
    """(parts, trained, frozen, model) whose leaves are ShapeDtypeStructs."""
    from flax import nnx

    from metamorph_jax.train import state as states

    model = nnx.eval_shape(lambda: recipe.create(model_cfg, nnx.Rngs(0)))
    return *states.split(model, cfg.stage, mesh), model


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

"""The programs that a plan compiles: the step of `train`, and the step of `generate`.

Nothing is computed and no weight is made: states and batches are shapes with shardings.
"""

import dataclasses
import math
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

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
        groups: name -> structs; the arguments by what they are, to break down their memory.
        positions, rows: of a step, over all devices.
        options: of the model, as its config says; arithmetic: of a step.
        length, weights: of a step of decoding: slots of the cache, and how weights are kept.
        beside: bytes held on each device in addition to the step's arguments.
        loading: peak bytes on each device while weights are loaded; 0 if that is not planned.
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
    beside: int = 0
    loading: int = 0


def train_step(config, devices, rows_per_device: float | None = None) -> Program:
    """The step of `metamorph train` for these devices.

    Args:
        config: ConfigDict or nested dict.
        devices: to compile for.
        rows_per_device: replaces config.batch_size.

    Raises:
        ConfigError: as `train` would.
    """
    from metamorph_jax.models import build
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
    model = nnx.eval_shape(lambda: recipe.create(run.model, build.rngs(0)))
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


def generate_step(
    config, devices, rows_per_device: float | None = None, length=4096, weights="auto"
) -> Program:
    """The step of `metamorph generate`, in which each row reads and emits a text token.

    Devices on config.mesh.tensor share the language model, all others share the rows. The
    other parts in memory (tower, connector, head) are counted, and so is the peak during loading.

    Args:
        config: ConfigDict or nested dict.
        devices: to compile for.
        rows_per_device: decoded together, default 1.
        length: slots of the cache.
        weights: form of the language model's weights, see `llm_weights.take_over`.

    Raises:
        ConfigError: the recipe has no language model.
    """
    from metamorph_jax.models.llm.llama import Llama
    from metamorph_jax.sampling.loop import Loop
    from metamorph_jax.sampling.policy import TextPolicy
    from metamorph_jax.train.config import resolve

    run = resolve(config)
    mesh = _mesh_to_generate(run.cfg, devices)
    rows = round((rows_per_device or 1) * mesh.size)
    with jax.set_mesh(mesh):  # whose kind of device decides how weights are kept
        model = _read_model(run, weights, mesh)
        llama = next(m for _, m in nnx.iter_modules(model) if type(m) is Llama)
        loading = _loading_bytes(model, mesh)
        llm, kept = _taken_over(llama, weights, mesh)
        beside = _bytes(nnx.state(model)) - _bytes(nnx.state(llama))
        loop, policy = Loop(llm, kept, None, mesh), TextPolicy()
        state = _decoding_state(loop, policy, rows, length)
        step = partial(loop.step, policy=policy)
        forward = flops.of_jaxpr(jax.make_jaxpr(step)(loop.weights, state).jaxpr)
    rest = _parameters(nnx.state(model)) - _parameters(nnx.state(llama))
    groups = {"weights": kept, "cache": (state.keys, state.values)}
    if state.images is not None:
        groups["images"] = state.images
    return Program(
        call=jax.jit(step, donate_argnums=(1,)),
        args=(loop.weights, state),
        mesh=mesh,
        model=model,
        parts={"llm": (0, _parameters(kept)), "rest of the model": (0, rest)},
        groups=groups,
        positions=rows,
        rows=rows,
        training=False,
        cfg=run.cfg,
        options=run.table["model"],
        arithmetic=flops.Flops(forward, 0.0, {"step": forward}),
        length=length,
        weights=weights,
        beside=beside,
        loading=loading,
    )


def _read_model(run, weights: str, mesh):
    """A run's model as `generate` reads it: shapes on the mesh, packed as `weights` says.

    Raises:
        ConfigError: the recipe has no language model.
    """
    from metamorph_jax.models.build import outline
    from metamorph_jax.nn import quantized
    from metamorph_jax.sampling.trained import reading

    dtype, pack = reading(run.recipe, run.model, weights, run.cfg.recipe)

    def make(rngs):
        model = run.recipe.create(run.model, rngs)
        if pack is not None:
            quantized.quantize(model, *pack)
        return model

    return outline(make, mesh, dtype)


def _parameters(tree) -> int:
    """How many there are in packed or other weights; a byte has two codes of 4 bits."""
    codes = lambda x: 2 if x.dtype == jnp.uint8 else 1  # noqa: E731
    return sum(x.size * codes(x) for x in jax.tree.leaves(tree))


def _mesh_to_generate(cfg, devices):
    tensor = cfg.mesh.get("tensor", 1)
    if tensor < 1 or len(devices) % tensor:
        raise ConfigError(f"config.mesh.tensor {tensor} does not divide {len(devices)} devices")
    return sharding.make_mesh({"tensor": tensor, "data": -1}, devices)


def _taken_over(llama, weights: str, mesh):
    """(functions, shapes) that `take_over` gives for a language model of shapes."""
    from metamorph_jax.sampling.llm_weights import take_over

    graph, leaves = nnx.split(llama)
    made = []

    def take(leaves):
        llm, kept = take_over(nnx.merge(graph, leaves), weights, mesh)
        made.append(llm)
        return kept

    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), leaves)
    kept = jax.eval_shape(take, plain)
    where = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), made[0].specs(kept),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )  # fmt: skip
    return made[0], _place(kept, where)


def _decoding_state(loop, policy, rows: int, length: int):
    """Shapes of the loop's state after prompts of half the length."""
    new = length // 2
    number = jax.ShapeDtypeStruct((rows,), jnp.int32)
    line = lambda n: jax.ShapeDtypeStruct((rows, n), jnp.int32)  # noqa: E731
    state = jax.eval_shape(
        partial(loop._run_prefill, policy=policy, capacity=length - new, slots=length),
        loop.weights, jax.ShapeDtypeStruct((rows, new, loop.llm.cfg.width), jnp.float32), number,
        number, jax.ShapeDtypeStruct((rows,), jnp.uint32), line(new), line(length - new),
        _looked_at(loop.llm.insert, rows),
    )  # fmt: skip
    everywhere = sharding.replicated(loop.mesh)
    where = jax.tree.map(lambda _: everywhere, state)
    cache = NamedSharding(loop.mesh, loop.llm.cache_spec(rows, loop.mesh))
    cut = {name: [cache] * len(state.keys) for name in ("keys", "values")}
    return _place(state, dataclasses.replace(where, **cut))


_IMAGES = 8  # of a row, that layers look at


def _looked_at(insert, rows: int):
    """Shapes of the images of rows as `Loop.joined` gives them; None without an insert."""
    if insert is None:
        return None
    shape, cfg = jax.ShapeDtypeStruct, insert.cfg
    maps = [shape((rows, _IMAGES, n, n, cfg.value_width), jnp.float32) for n in cfg.sides]
    place = shape((rows, _IMAGES), jnp.int32)
    return tuple(maps), place, place


def _bytes(tree) -> int:
    """Bytes of structs on each device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _loading_bytes(model, mesh) -> int:
    """Bytes on each device at the peak of loading: all weights, and one kernel twice.

    That kernel is being packed, or is being laid out for decoding.
    """
    leaves = jax.tree.leaves(nnx.state(model))
    wider = {jnp.dtype(jnp.int8): 2, jnp.dtype(jnp.uint8): 4}  # bfloat16 until packed
    each = [_bytes(x) * wider.get(x.dtype, 1) for x in leaves]
    return _bytes(leaves) + max(each)


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

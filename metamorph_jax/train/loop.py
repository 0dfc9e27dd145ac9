"""The training loop: one for every recipe and stage.

Reads in the order in which it runs. Rules of resuming: the state is restored bit for bit, the data
iterator goes on behind the last batch that the state has seen, and random numbers follow from the
number of the step. So an interrupted run ends with the same parameters as one that wasn't.
"""

import dataclasses
import pathlib
import signal
import threading
import time
from typing import Any

import jax
import numpy as np

from metamorph_jax import config as configs
from metamorph_jax import sharding
from metamorph_jax.config import ConfigError
from metamorph_jax.train import checkpoint, optim
from metamorph_jax.train import state as states
from metamorph_jax.train import workdir as workdirs
from metamorph_jax.train.metrics import Logger, flops_per_position, measure, peak_flops
from metamorph_jax.train.optim import OptimConfig
from metamorph_jax.train.step import make_step


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run.

    Attributes:
        recipe: module in `metamorph_jax.recipes`, or a dotted module name.
        stage: what the recipe trains.
        steps: optimizer steps of the whole run.
        batch_size: rows per step, over all processes and micro-batches.
        model, data: tables that the recipe turns into its dataclasses.
        optim: optimizer and schedule.
        accumulate: micro-batches per step.
        seed: of new weights and of what is random in the loss.
        prepare_batches: batches that the recipe's `prepare` measures before the first step.
        mesh: axis -> size (`sharding.make_mesh`); -1 is "the rest".
        log_every, checkpoint_every, keep: steps between lines and checkpoints; checkpoints kept.
        tensorboard: write TensorBoard files.
        compilation_cache: folder of compiled programs; "" for none.
    """

    recipe: str
    stage: str
    steps: int
    batch_size: int
    model: dict
    data: dict
    optim: OptimConfig
    accumulate: int = 1
    seed: int = 0
    prepare_batches: int = 0
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {"fsdp": -1})
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2
    tensorboard: bool = True
    compilation_cache: str = "~/.cache/metamorph_jax/compiled"

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} isn't a multiple of accumulate "
                             f"{self.accumulate}")  # fmt: skip


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite; the state is that of the step before."""


class Preempted(RuntimeError):
    """SIGTERM came; a checkpoint was saved and the same command goes on from it."""


@dataclasses.dataclass
class _Pending:
    """A step whose values are not read yet."""

    step: int
    report: Any
    batch: Any
    counted: dict[str, int]
    wait: float


def resolve(config) -> tuple[TrainConfig, Any, Any, dict]:
    """(run, recipe module, its config, all options as one table) of a ConfigDict or nested dict.

    Raises:
        ConfigError: an option does not exist or has a wrong value.
    """
    table = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    cfg = configs.build(TrainConfig, table)
    recipe = workdirs.find_recipe(cfg.recipe)
    model_cfg = configs.build(recipe.Config, cfg.model, "config.model")
    resolved = dataclasses.asdict(cfg) | {"model": dataclasses.asdict(model_cfg)}
    return cfg, recipe, model_cfg, resolved


def train(config, workdir: str | pathlib.Path) -> dict[str, float]:
    """Trains a stage to its end, or goes on where an earlier call in the same workdir stopped.

    Args:
        config: ConfigDict or nested dict, see `TrainConfig`.
        workdir: gets checkpoints, metrics, the resolved config, and `final/`.

    Returns:
        The values of the last line of metrics.

    Raises:
        ConfigError: the config is wrong, or the workdir belongs to another one.
        NonFiniteError: see there.
        Preempted: see there.
    """
    cfg, recipe, model_cfg, resolved = resolve(config)
    workdir = pathlib.Path(workdir).expanduser()

    # ---- devices
    if cfg.compilation_cache:
        folder = pathlib.Path(cfg.compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        mesh = sharding.make_mesh(cfg.mesh)
    except ValueError as error:
        raise ConfigError(f"config.mesh: {error}") from error
    processes, host0 = jax.process_count(), jax.process_index() == 0
    shards = np.prod([mesh.shape[axis] for axis in sharding.BATCH_AXES])
    if (cfg.batch_size // cfg.accumulate) % shards or cfg.batch_size % processes:
        raise ConfigError(
            f"config.batch_size {cfg.batch_size} in {cfg.accumulate} micro-batches doesn't divide "
            f"over {shards} groups of devices on {processes} processes"
        )
    changes = workdirs.prepare(workdir, resolved, write=host0)

    # ---- data
    data = recipe.make_data(
        cfg.data | {"batch_size": cfg.batch_size // processes},
        model_cfg,
        process_index=jax.process_index(),
        process_count=processes,
        workdir=workdir,
    )
    if hasattr(model_cfg, "sources") and not model_cfg.sources:
        model_cfg = dataclasses.replace(model_cfg, sources=tuple(data.sources))

    # ---- model and state
    clock = time.perf_counter()
    checkpoints = checkpoint.Checkpoints(workdir, cfg.keep)
    resuming = checkpoints.latest is not None
    batches = [] if resuming else _peek(data, cfg.prepare_batches)

    def fill(model):
        recipe.load_pretrained(model, model_cfg)
        if batches:
            recipe.prepare(model, batches)

    parts, params, frozen = states.create(
        lambda rngs: recipe.create(model_cfg, rngs), cfg.stage, mesh, cfg.seed, fill
    )
    optim.check_multipliers(cfg.optim, set(parts.part_of.values()))
    state = states.start(params, parts, mesh, cfg.seed, cfg.optim.ema_decay is not None)
    del params
    first = 0
    if resuming:
        fixed = checkpoint.fixed_leaves(parts, frozen)
        state, fixed, data_state = checkpoints.restore(state, fixed)
        frozen |= fixed
        data.set_state(data_state)
        first = int(state.step)

    # ---- what is said
    logger = Logger(
        workdir,
        cfg.steps,
        first,
        cfg.log_every,
        active=host0,
        tensorboard=cfg.tensorboard,
        flops_per_position=flops_per_position(state.params, frozen),
        peak=_peak(mesh),
    )
    for line in _banner(cfg, parts, state, frozen, mesh, changes, first):
        logger.say(line)
    logger.say(f"model and data ready in {time.perf_counter() - clock:.1f} s")

    # ---- steps
    schedule = optim.make_schedule(cfg.optim, cfg.batch_size, cfg.steps)
    step_fn = make_step(parts, cfg.optim, schedule, cfg.accumulate, mesh=mesh)
    pending = None

    def read(pending: _Pending) -> None:
        report = jax.device_get(pending.report)
        if not report["finite"]:
            raise NonFiniteError(_explain(pending, report, data.sources, workdir))
        logger.step(pending.step, report, pending.counted, pending.wait)

    def save(step: int) -> None:
        """`step` steps are done; the iterator stands behind their last batch."""
        checkpoints.save(step, state, checkpoint.fixed_leaves(parts, frozen), data.get_state())

    try:
        with jax.set_mesh(mesh), _Sigterm() as sigterm:
            step, saved = first, first
            while step < cfg.steps:
                clock = time.perf_counter()
                try:
                    batch = next(data)
                except StopIteration:
                    logger.say(f"the data ended after {step} of {cfg.steps} steps")
                    break
                wait = time.perf_counter() - clock
                state, report = step_fn(state, frozen, to_devices(batch, mesh))
                step += 1
                if pending is not None:
                    read(pending)
                counted = {k: n * processes for k, n in measure(batch).items()}
                pending = _Pending(step, report, batch, counted, wait)
                if step == first + 1:
                    jax.block_until_ready(report)
                    logger.say(f"first step, compilation included: "
                               f"{time.perf_counter() - clock:.1f} s")  # fmt: skip
                    logger.restart_clock()
                stop = sigterm.received(step)
                if stop or (step % cfg.checkpoint_every == 0 and step < cfg.steps):
                    read(pending)  # a halted state must not be saved
                    pending = None
                    save(step)
                    saved = step
                if stop:
                    checkpoints.wait()
                    raise Preempted(f"SIGTERM: stopped after step {step}, checkpoint saved")
            if pending is not None:
                read(pending)
            if saved < step:
                save(step)
            checkpoints.wait()
            if saved < step or not (workdir / "final").is_dir():
                folder = checkpoint.export(workdir, state, checkpoint.fixed_leaves(parts, frozen))
                logger.say(f"{step} steps done; weights in {folder}")
    finally:
        checkpoints.close()
        logger.close()
        if hasattr(data, "close"):
            data.close()
    return logger.last


def to_devices(batch, mesh):
    """A batch of this process's rows (numpy) as arrays over all devices."""
    where = sharding.batch_sharding(mesh)
    one = lambda x: jax.make_array_from_process_local_data(where, np.asarray(x))  # noqa: E731
    return jax.tree.map(one, batch)


def _peek(data, n: int) -> list:
    """The first n batches with the rows of all processes, without moving the iterator."""
    if not n:
        return []
    before = data.get_state()
    batches = [next(data) for _ in range(n)]
    data.set_state(before)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        batches = multihost_utils.process_allgather(batches, tiled=True)
    return batches


def _peak(mesh) -> float | None:
    device = mesh.devices.flat[0]
    peak = peak_flops(device.device_kind)
    return None if peak is None else peak * mesh.size


def _banner(cfg, parts, state, frozen, mesh, changes, first):
    yield f"recipe {cfg.recipe}, stage {cfg.stage}, {cfg.batch_size} rows x {cfg.steps} steps"
    device = mesh.devices.flat[0]
    axes = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
    yield f"{mesh.size} x {device.device_kind} on {jax.process_count()} process(es): {axes}"
    sizes: dict[str, int] = {}
    for name, p in state.params.items():
        part = parts.part_of[name]
        sizes[part] = sizes.get(part, 0) + p.size
    trained = ", ".join(f"{part} {n / 1e6:.2f} M" for part, n in sizes.items())
    yield f"trained: {trained}; frozen: {sum(p.size for p in frozen.values()) / 1e6:.2f} M"
    rate = optim.peak_rate(cfg.optim, cfg.batch_size)
    yield f"peak learning rate {rate:.3g}, {cfg.optim.schedule}"
    for change in changes:
        yield f"changed since the run began: {change}"
    if first:
        yield f"going on after step {first}"


def _explain(pending: _Pending, report, sources: list[str], workdir: pathlib.Path) -> str:
    """Says which losses of which data sources were not finite, and keeps the batch."""
    file = workdir / f"nonfinite_step_{pending.step}_process_{jax.process_index()}.npz"
    arrays = {k: v for k, v in vars(pending.batch).items() if v is not None and k != "pixels"}
    np.savez_compressed(file, **arrays)
    wrong = [k for k, v in report["sums"].items() if not np.isfinite(v)]
    named = [k for k, (n, _) in report["metrics"].items() if "/" in k and not np.isfinite(n)]
    blamed = sorted({s for s in sources for k in named if s in k.split("/")[1:]})
    if not blamed and hasattr(pending.batch, "sources"):
        there = np.unique(np.asarray(pending.batch.sources)[np.asarray(pending.batch.segments) > 0])
        blamed = [sources[i] for i in there if i < len(sources)]
    what = f"losses {', '.join(wrong)}" if wrong else "gradients (all losses are finite)"
    return (
        f"step {pending.step}: not finite: {what}; data source: {', '.join(blamed) or 'unknown'}; "
        f"gradient norm {float(report['grad_norm'])}. Nothing was applied since step "
        f"{pending.step - 1}. The batch is in {file}"
    )


class _Sigterm:
    """Notices SIGTERM, and agrees on it with the other processes."""

    def __enter__(self):
        self._came = threading.Event()
        self._alone = jax.process_count() == 1
        self._before = None
        if self._alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._came.set())
        return self

    def received(self, step: int) -> bool:
        if self._alone:
            return self._came.is_set()
        from jax.experimental import multihost_utils  # its service has a handler of its own

        return multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

"""The training loop: one for every recipe and stage.

Reads in the order in which it runs. Rules of resuming: the state is restored bit for bit, the data
iterator goes on behind the last batch that the state has seen, and random numbers follow from the
number of the step. So an interrupted run ends with the same parameters as one that wasn't.
"""

import contextlib
import os
import pathlib
import time

import jax
import numpy as np

from metamorph_jax import sharding
from metamorph_jax.errors import BadStep, CheckpointError, ConfigError, Preempted
from metamorph_jax.train import checkpoint, local_checkpoints, optim, shards
from metamorph_jax.train import state as states
from metamorph_jax.train import workdir as workdirs
from metamorph_jax.train.config import Run, resolve
from metamorph_jax.train.failures import BadSteps, Pending, Sigterm
from metamorph_jax.train.goodput import Goodput
from metamorph_jax.train.metrics import Logger, flops_per_step
from metamorph_jax.train.profile import Trace
from metamorph_jax.train.step import make_step


def train(
    config, workdir: str | pathlib.Path, profile: tuple[int, int] | None = None
) -> dict[str, float]:
    """Trains a stage to its end, or goes on where an earlier call in the same workdir stopped.

    Args:
        config: ConfigDict or nested dict, see `TrainConfig`.
        workdir: gets checkpoints, metrics, the resolved config, and `final/`.
        profile: (first, last) step of which a trace is written to workdir/profile.

    Returns:
        The values of the last line of metrics.

    Raises:
        ConfigError: the config is wrong, or the workdir belongs to another one.
        CheckpointError: a checkpoint can't be read or written.
        BadStep: a loss or gradient was not finite, or a loss a spike.
        Preempted: see there.
    """
    began = time.time()
    run = resolve(config)
    name = run.cfg.matmul_precision
    with jax.default_matmul_precision(name) if name != "default" else contextlib.nullcontext():
        return _train(began, run, pathlib.Path(workdir).expanduser(), profile)


def _train(began, run: Run, workdir, profile):
    cfg, recipe, model_cfg = run.cfg, run.recipe, run.model
    # ---- devices
    if cfg.compilation_cache and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = pathlib.Path(cfg.compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        mesh = sharding.make_mesh(cfg.mesh)
    except ValueError as error:
        raise ConfigError(f"config.mesh: {error}") from error
    host0 = jax.process_index() == 0
    groups = np.prod([mesh.shape[axis] for axis in sharding.BATCH_AXES])
    if (cfg.batch_size // cfg.accumulate) % groups:
        raise ConfigError(
            f"config.batch_size {cfg.batch_size} in {cfg.accumulate} micro-batches doesn't divide "
            f"over {groups} groups of devices"
        )
    changes = workdirs.prepare(workdir, run.table, write=host0)
    checkpoints = checkpoint.Checkpoints(workdir, cfg.keep)
    local = local_checkpoints.open_local(cfg.local_checkpoints, workdir, mesh, checkpoints.latest)
    resuming = checkpoints.latest is not None or local.step is not None

    # ---- data
    mine = shards.my_rows(mesh, cfg.batch_size)
    saved_shards = local.data_shards or checkpoints.data_shards
    data = _open_shards(run, mine, saved_shards)

    # ---- model and state
    clock = time.perf_counter()
    batches = [] if resuming else shards.peek(data, cfg.initial_batches, mesh, cfg.batch_size)

    parts, params, frozen = states.create(
        lambda rngs: recipe.create(model_cfg, rngs),
        run.pattern,
        mesh,
        cfg.seed,
        fill=lambda model: recipe.load_pretrained(model, model_cfg),
        adapt=(lambda model: recipe.initialize(model, batches)) if batches else None,
    )
    optim.check_multipliers(cfg.optim, set(parts.part_of.values()))
    has_ema, has_usual = cfg.optim.ema_decay is not None, bool(cfg.guard.spike)
    state = states.start(
        params, parts, mesh, cfg.seed, has_ema, has_usual, cfg.optim.momentum_dtype
    )
    del params
    first = 0
    if resuming:
        fixed = checkpoint.fixed_leaves(parts, frozen)
        if local.step is not None:
            state, fixed, data_states = local.restore(state, fixed)
        else:
            state, fixed, data_states, said = checkpoints.restore(
                state, fixed, cfg.damaged_checkpoint == "previous"
            )
            changes += said
        frozen |= fixed
        data.set_state(data_states)
        first = int(state.step)

    # ---- what is said
    logger = Logger(
        workdir,
        cfg.steps,
        first,
        cfg.log_every,
        active=host0,
        tensorboard=cfg.tensorboard,
        devices=mesh.size,
        goodput=Goodput(workdir, first, began, host0) if first < cfg.steps else None,
    )
    for line in _banner(cfg, parts, state, frozen, mesh, changes, first):
        logger.say(line)
    for line in local.said:
        logger.say(line)
    if logger.peak is None:
        logger.say(f"no peak FLOP/s is known of {mesh.devices.flat[0].device_kind}: no MFU")
    logger.say(f"model and data ready in {time.perf_counter() - clock:.1f} s")
    trace = Trace(workdir, profile, first, logger.say)

    # ---- steps
    schedule = optim.make_schedule(cfg.optim, cfg.batch_size, cfg.steps)
    step_fn = make_step(parts, cfg.optim, schedule, cfg.accumulate, mesh=mesh, guard=cfg.guard)
    bad = BadSteps(workdir, cfg.guard.on_bad == "skip", cfg.guard.most_in_a_row, data.sources)
    pending = None

    def read(pending: Pending) -> bool:
        """Whether the step was one: not if the data of all processes were at their end."""
        report = jax.device_get(pending.report)
        if report["empty"]:
            if not data.dry:
                raise ConfigError(f"step {pending.step}: nothing in the batch has a target")
            return False
        skipped = bad.judge(pending, report)
        if skipped:
            logger.say(skipped)
            logger.skip(pending.step, pending.counted, pending.wait)
        else:
            logger.step(pending.step, report, pending.counted, pending.wait)
        return True

    def save(step: int, to=checkpoints) -> None:
        """`step` steps are done; the iterator stands behind their last batch."""
        clock = time.perf_counter()
        to.save(step, state, checkpoint.fixed_leaves(parts, frozen), data.get_state())
        logger.saved(step, time.perf_counter() - clock)

    try:
        with jax.set_mesh(mesh), Sigterm() as sigterm:
            step, ended = first, False
            saved = first if local.step is None else -1  # in the workdir
            while step < cfg.steps:
                clock = time.perf_counter()
                batch = next(data, None)
                if batch is None:
                    ended = True
                    break
                wait = time.perf_counter() - clock
                batch_there = shards.to_devices(batch, mesh, cfg.batch_size)
                if step == first:
                    model = parts.merge(*jax.eval_shape(lambda *x: x, state.params, frozen))
                    logger.flops_per_step = flops_per_step(
                        model, batch, cfg.batch_size, parts.names, mesh
                    )
                with trace.step(step + 1):
                    state, report = step_fn(state, frozen, batch_there)
                step += 1
                logger.pause(trace.done(step, report))
                if pending is not None and not read(pending):
                    pending, ended = None, True
                    break
                counted = {k: n * cfg.batch_size // len(mine) for k, n in batch.counted().items()}
                pending = Pending(step, report, batch, data.sample_names(), counted, wait)
                if step == first + 1:
                    jax.block_until_ready(report)
                    logger.say(f"first step, compilation included: "
                               f"{time.perf_counter() - clock:.1f} s")  # fmt: skip
                    logger.restart_clock()
                whole = checkpoints.check()
                if whole is not None:
                    logger.say(f"checkpoint {whole} is whole after {checkpoints.seconds:.1f} s")
                local.check()
                stop = sigterm.received(step)
                due = stop or (step % cfg.checkpoint_every == 0 and step < cfg.steps)
                near = local.due(step) and step < cfg.steps
                if due or near:
                    ended = not read(pending)  # a halted state must not be saved
                    pending = None
                    if ended:
                        break
                if near:
                    save(step, local)
                if due:
                    save(step)
                    saved = step
                if stop:
                    checkpoints.wait()
                    seconds = time.monotonic() - sigterm.since
                    raise Preempted(
                        f"SIGTERM: stopped after step {step}, checkpoint saved {seconds:.1f} s "
                        "after the signal"
                    )
            if pending is not None:
                ended |= not read(pending)
            if ended:
                step = int(state.step)
                logger.say(f"the data ended after {step} of {cfg.steps} steps")
            if saved < step:
                save(step)
            checkpoints.wait()
            if saved < step or not (workdir / "final").is_dir():
                folder = checkpoint.export(workdir, state, checkpoint.fixed_leaves(parts, frozen))
                logger.say(f"{step} steps done; weights in {folder}")
            local.remove()
            if logger.goodput:
                logger.say(logger.goodput.summary())
    except (Exception, KeyboardInterrupt) as error:
        # Other processes may be gone, and then a save that waits for them never ends.
        together = jax.process_count() == 1 or isinstance(error, BadStep | Preempted)
        for tier in (local, checkpoints):
            if together or not tier.waits_for_others:
                with contextlib.suppress(CheckpointError):
                    tier.close()
        raise
    else:
        local.close()
        checkpoints.close()
    finally:
        trace.close()
        logger.close()
        data.close()
    return logger.last


def _open_shards(run: Run, mine: np.ndarray, saved: int | None) -> shards.DataShards:
    """The batches of this process; over `saved` data shards, if the run has checkpoints."""
    cfg = run.cfg
    if saved and cfg.data_shards and saved != cfg.data_shards:
        raise ConfigError(f"config.data_shards is {cfg.data_shards}, this run has {saved}")
    count = saved or cfg.data_shards or cfg.batch_size // len(mine)

    def open_shard(shard):
        return run.recipe.open_data(run.data, run.model, shard)

    def open_all():
        return shards.DataShards(open_shard, count, cfg.batch_size, mine)

    if jax.process_count() == 1:
        return open_all()
    from jax.experimental import multihost_utils

    # The first process fills feature caches; the others wait and find them full.
    data = open_all() if jax.process_index() == 0 else None
    multihost_utils.sync_global_devices("the first process has opened its data")
    return data or open_all()


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

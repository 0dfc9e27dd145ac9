"""The training loop: one for every recipe and stage.

    Start     what a run begins with, or resumes with: devices, data, model and state
    Saving    its checkpoints
    Loop      the steps, and what happens between them

Rules of resuming: the state is restored bit for bit, the data iterator continues after the last
batch that the state has seen, and random numbers follow from the number of the step. So a run that
was interrupted ends with the same parameters as one that wasn't.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from metamorph_jax import paths, sharding
from metamorph_jax.errors import BadStep, CheckpointError, ConfigError, Preempted, UserError
from metamorph_jax.lock import Lock
from metamorph_jax.models.build import outline
from metamorph_jax.recipe import Shard
from metamorph_jax.train import boards, checkpoint, local_checkpoints, optim, shards
from metamorph_jax.train import state as states
from metamorph_jax.train import workdir as workdirs
from metamorph_jax.train.config import Run, TrainConfig, resolve
from metamorph_jax.train.evals import Best, Evaluations
from metamorph_jax.train.failures import BadSteps, Pending, Sigterm
from metamorph_jax.train.goodput import Goodput
from metamorph_jax.train.metrics import Logger, flops_per_step
from metamorph_jax.train.optim import Optimizer, Params
from metamorph_jax.train.profile import Trace
from metamorph_jax.train.skipped import Skipped
from metamorph_jax.train.state import Parts, TrainState
from metamorph_jax.train.step import make_step


def train(
    config, workdir: str | pathlib.Path, profile: tuple[int, int] | None = None
) -> dict[str, float]:
    """Trains a stage to its end, or resumes where an earlier call in the same workdir stopped.

    Args:
        config: ConfigDict or nested dict, see `TrainConfig`.
        workdir: gets checkpoints, metrics, the resolved config, and `final/`.
        profile: (first, last) step of which a trace is written to workdir/profile.

    Returns:
        The values of the last line of metrics and of the last evaluations.

    Raises:
        ConfigError: the config is wrong, or the workdir belongs to another one.
        UserError: the workdir can't be used, or another process trains in it.
        CheckpointError: a checkpoint can't be read or written.
        BadStep: a loss or gradient was not finite, or a loss was a spike.
        Preempted: SIGTERM came, and a checkpoint was saved.
    """
    began = time.time()
    run = resolve(config)
    if run.cfg.wandb:
        boards.require_wandb()  # before anything is made
    name = run.cfg.matmul_precision
    with jax.default_matmul_precision(name) if name != "default" else contextlib.nullcontext():
        folder = paths.output_folder("--workdir", workdir)
        lock = Lock(folder) if jax.process_index() == 0 else None
        try:
            start = set_up(run, folder)
            start.messages += [lock.message] if lock and lock.message else []
            return Loop(start, began, profile).run()
        finally:
            if lock:
                lock.close()


# ---- set-up


@dataclasses.dataclass
class Start:
    """What a run begins with.

    Attributes:
        mine: rows of a batch that this process reads.
        state, first: the state, and the number of steps that it has seen.
        evaluated: evaluations due after `first` are done.
        messages: to be logged.
        seconds: that it took to make data, model and state.
    """

    run: Run
    workdir: pathlib.Path
    mesh: Mesh
    mine: np.ndarray
    data: shards.DataShards
    parts: Parts
    frozen: Params
    optimizer: Optimizer
    evals: Evaluations
    checkpoints: checkpoint.Checkpoints
    local: local_checkpoints.LocalCheckpoints
    state: TrainState
    first: int = 0
    evaluated: bool = True
    messages: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def set_up(run: Run, workdir: pathlib.Path) -> Start:
    """Opens the data and makes the model and its state, new ones or those of a checkpoint."""
    cfg = run.cfg
    mesh = open_mesh(cfg)
    trained = bool(checkpoint.steps_in(workdir))
    changes = workdirs.check(workdir, run.table, trained or bool(cfg.local_checkpoints.folder))
    checkpoints = checkpoint.Checkpoints(workdir, cfg.keep)
    local = local_checkpoints.open_local(cfg.local_checkpoints, workdir, mesh, checkpoints.latest)
    resuming = checkpoints.latest is not None or local.step is not None

    mine = shards.my_rows(mesh, cfg.batch_size)
    data = open_data(run, mine, local.data_shards or checkpoints.data_shards)
    clock = time.perf_counter()
    batches = [] if resuming else shards.peek(data, cfg.initial_batches, mesh, cfg.batch_size)
    parts, params, frozen, optimizer = make_model(run, mesh, batches)
    evals = Evaluations(run, parts, mesh, mine, data.data_shards)
    state = states.start(params, parts, mesh, cfg.seed, optimizer, bool(cfg.guard.spike))
    del params
    start = Start(
        run, workdir, mesh, mine, data, parts, frozen, optimizer, evals, checkpoints, local, state
    )
    start.messages += [f"changed since the run began: {change}" for change in changes]
    if resuming:
        try:
            restore(start)
        except CheckpointError as error:
            if not changes:
                raise
            listed = "; ".join(changes)
            raise CheckpointError(f"{error}. Changed since the run began: {listed}") from error
    begin(start)
    start.seconds = time.perf_counter() - clock
    return start


def begin(start: Start) -> None:
    """Writes the config, now that all that the run needs is there; an older export goes."""
    folder = start.workdir / "final"
    if start.first < start.run.cfg.steps and folder.is_dir():
        start.messages.append(f"{folder} is of an earlier end of the run: removed")
    if jax.process_index() == 0:
        workdirs.record(start.workdir, start.run.table)
        if start.first < start.run.cfg.steps:
            shutil.rmtree(folder, ignore_errors=True)


def open_mesh(cfg: TrainConfig) -> Mesh:
    """The mesh of all devices, once the compilation cache is on.

    Raises:
        ConfigError: there are not such devices, or the batch doesn't divide over them.
    """
    if cfg.compilation_cache and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = pathlib.Path(cfg.compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        mesh = sharding.make_mesh(cfg.mesh)
    except ValueError as error:
        raise ConfigError(f"config.mesh: {error}") from error
    groups = np.prod([mesh.shape[axis] for axis in sharding.BATCH_AXES])
    if (cfg.batch_size // cfg.accumulate) % groups:
        raise ConfigError(
            f"config.batch_size {cfg.batch_size} in {cfg.accumulate} micro-batches doesn't divide "
            f"over {groups} groups of devices"
        )
    return mesh


def open_data(run: Run, mine: np.ndarray, saved: int | None) -> shards.DataShards:
    """The batches of this process; over `saved` data shards, if the run has checkpoints."""
    cfg = run.cfg
    if saved and cfg.data_shards and saved != cfg.data_shards:
        raise ConfigError(f"config.data_shards is {cfg.data_shards}, this run has {saved}")
    count = saved or cfg.data_shards or cfg.batch_size // len(mine)

    def open_shard(shard: Shard):
        return run.recipe.open_data(run.data, run.model, shard)

    return shards.open_shards(open_shard, count, cfg.batch_size, mine)


def make_model(run: Run, mesh: Mesh, batches: list) -> tuple[Parts, Params, Params, Optimizer]:
    """(parts, trained parameters, frozen leaves, optimizer); `batches` are for `initialize`."""
    cfg, recipe = run.cfg, run.recipe

    def make(rngs):
        return recipe.create(run.model, rngs)

    # First of all, as a mistake in `optim` shouldn't come to light after the weights are loaded.
    with _about_the_model():
        outlined = outline(make, mesh)
    _, shapes, _ = states.split(outlined, run.pattern, mesh)
    optimizer = optim.build(cfg.optim, shapes, cfg.batch_size, cfg.steps)
    parts, params, frozen = states.create(
        make,
        run.pattern,
        mesh,
        cfg.seed,
        fill=lambda model: recipe.load_pretrained(model, run.model),
        adapt=(lambda model: recipe.initialize(model, batches)) if batches else None,
    )
    return parts, params, frozen, optimizer


@contextlib.contextmanager
def _about_the_model():
    """What fails when only the shapes of a model are made is a matter of config.model."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = checkpoint.reason(error)
        raise ConfigError(f"config.model: no such model: {type(error).__name__}: {said}") from error


def restore(start: Start) -> None:
    """Replaces the state by that of the newest checkpoint, here or in the workdir."""
    buffers = checkpoint.buffers_of(start.parts, start.frozen)
    if start.local.step is not None:
        start.state, buffers, notes = start.local.restore(start.state, buffers)
    else:
        fall_back = start.run.cfg.damaged_checkpoint == "previous"
        start.state, buffers, notes, messages = start.checkpoints.restore(
            start.state, buffers, fall_back
        )
        start.messages += messages
    start.frozen |= buffers
    start.data.set_state(notes["data"])
    start.first = int(start.state.step)
    start.evaluated = notes.get("evaluated", True)
    start.messages.append(f"resuming after step {start.first}")


# ---- saving


class Saving:
    """Writes the checkpoints of a run, in the workdir and on each host's own disk.

    Attributes:
        step: of the last one in the workdir (-1 if it is older than the local one), or the first
            step of the run.
        best: see there.
    """

    def __init__(self, start: Start, logger: Logger):
        cfg = start.run.cfg
        self._start, self._logger = start, logger
        self.checkpoints, self.local = start.checkpoints, start.local
        self.step = start.first if start.local.step is None else -1
        self._wrote = False
        self.best = Best(start.workdir, cfg.keep_best, cfg.best_is, self.checkpoints)

    def check(self) -> None:
        """Reports what was completed in the background; raises CheckpointError if it failed."""
        self._completed(self.checkpoints.check())
        self.local.check()

    def wait(self) -> None:
        """`check` of the workdir's, once they are complete."""
        self._completed(self.checkpoints.wait())

    def _completed(self, step: int | None) -> None:
        if step is not None:
            self.best.saved(step)
            self._logger.say(
                f"checkpoint {step} is complete after {self.checkpoints.seconds:.1f} s"
            )

    def save(self, step: int, state: TrainState, best: dict | None, evaluated: bool) -> None:
        """Saves to the workdir, after `step` steps; the data stand after their last batch.

        Args:
            step: number of steps done.
            state: after them.
            best: record of the evaluation if it is the best so far.
            evaluated: the evaluations that are due after this step are done.
        """
        self.wait()
        there = self.checkpoints.latest == step  # only evaluated late, after a resume
        self._save(self.checkpoints, step, state, evaluated, {"best": best} if best else {})
        self.step, self._wrote = step, True
        if there:
            self.best.saved(step)

    def save_locally(self, step: int, state: TrainState, evaluated: bool) -> None:
        """The same on the hosts' own disks."""
        self._save(self.local, step, state, evaluated, {})

    def _save(self, to, step: int, state: TrainState, evaluated: bool, notes: dict) -> None:
        clock = time.perf_counter()
        buffers = checkpoint.buffers_of(self._start.parts, self._start.frozen)
        notes = notes | {"evaluated": evaluated}
        to.save(step, state, buffers, self._start.data.get_state(), notes)
        self._logger.saved(step, time.perf_counter() - clock)

    def finish(self, step: int, state: TrainState) -> None:
        """Waits for the last checkpoint, and exports the weights unless they are there."""
        self.wait()
        start = self._start
        if self._wrote or not (start.workdir / "final").is_dir():
            buffers = checkpoint.buffers_of(start.parts, start.frozen)
            about = {"step": step, "stage": start.run.cfg.stage, "recipe": start.run.cfg.recipe}
            about["config"] = workdirs.digest(start.run.table)
            folder = checkpoint.export(start.workdir, state, buffers, about)
            self._logger.say(f"{step} steps done; weights in {folder}")
        if self.best.record:
            said = f"best {self.best.metric}: {self.best.record['value']:.5g}"
            self._logger.say(f"{said}, checkpoint {self.best.record['step']}")
        self.local.remove()

    def close(self) -> None:
        self.local.close()
        self.checkpoints.close()

    def abandon(self, error: BaseException) -> None:
        """Closes after an error, which is what the user should see."""
        # Other processes may be gone, and then a save that waits for them never ends.
        together = jax.process_count() == 1 or isinstance(error, BadStep | Preempted)
        for tier in (self.local, self.checkpoints):
            if together or not tier.waits_for_others:
                with contextlib.suppress(CheckpointError):
                    tier.close()


# ---- the loop


class Loop:
    """The steps of a run.

    Args:
        start: see there.
        began: when the process began, as `time.time()`.
        profile: (first, last) step of a trace, or None.
    """

    def __init__(self, start: Start, began: float, profile: tuple[int, int] | None):
        cfg, first, workdir = start.run.cfg, start.first, start.workdir
        host0 = jax.process_index() == 0
        self.start, self.cfg = start, cfg
        self.state, self.data, self.evals = start.state, start.data, start.evals
        start.state = None  # a step donates it
        self.goodput = Goodput(workdir, first, began, host0) if first < cfg.steps else None
        self.log = Logger(
            workdir,
            cfg.steps,
            first,
            cfg.log_every,
            active=host0,
            tensorboard=cfg.tensorboard,
            wandb=cfg.wandb,
            config=start.run.table,
            devices=start.mesh.size,
            goodput=self.goodput,
        )
        for line in banner(start, self.state, self.log.peak):
            self.log.say(line)
        self.trace = Trace(workdir, profile, first, self.log.say)
        self.take_step = make_step(
            start.parts, start.optimizer, cfg.accumulate, mesh=start.mesh, guard=cfg.guard
        )
        skip = cfg.guard.on_bad == "skip"
        self.bad = BadSteps(workdir, skip, cfg.guard.most_in_a_row, self.data.sources)
        self.skipped = Skipped(self.data, self.log.say)
        self.saving = Saving(start, self.log)
        self.pending: Pending | None = None  # the step whose values are not read yet

    def run(self) -> dict[str, float]:
        """Trains to the end, and returns what `train` does."""
        try:
            with jax.set_mesh(self.start.mesh), Sigterm() as sigterm:
                self.finish(*self.steps(sigterm))
        except (Exception, KeyboardInterrupt) as error:
            self.saving.abandon(error)
            raise
        else:
            self.saving.close()
        finally:
            self.trace.close()
            self.log.close()
            self.evals.close()
            self.data.close()
        return self.log.last | self.evals.last

    def steps(self, sigterm: Sigterm) -> tuple[int, bool]:
        """(steps done, whether the data ended before the last one); the last one is not read."""
        step = self.start.first
        if not self.start.evaluated:
            best = self.evaluate(step, self.evals.due(step))
            if best:
                self.saving.save(step, self.state, best, evaluated=True)
        while step < self.cfg.steps:
            clock = time.perf_counter()
            batch = next(self.data, None)
            if batch is None:
                return step, True
            wait = time.perf_counter() - clock
            report = self.dispatch(step + 1, batch)
            step += 1
            if not self.read():
                return step, True
            counted = self.count(batch)
            self.pending = Pending(step, report, batch, self.data.sample_names(), counted, wait)
            if step == self.start.first + 1:
                jax.block_until_ready(report)
                seconds = time.perf_counter() - clock
                self.log.say(f"first step, compilation included: {seconds:.1f} s")
                self.log.restart_clock()
            self.saving.check()
            if not self.between(step, sigterm):
                return step, True
        return step, False

    def dispatch(self, step: int, batch):
        """Starts a step, and returns its report."""
        start = self.start
        there = shards.to_devices(batch, start.mesh, self.cfg.batch_size)
        if step == start.first + 1:
            shapes = jax.eval_shape(lambda *x: x, self.state.params, start.frozen)
            model = start.parts.merge(*shapes)
            self.log.flops_per_step = flops_per_step(
                model, batch, self.cfg.batch_size, start.parts.names, start.mesh
            )
        with self.trace.step(step):
            self.state, report = self.take_step(self.state, start.frozen, there)
        self.log.pause(self.trace.done(step, report))
        return report

    def count(self, batch) -> dict[str, int]:
        """`counted()` of the whole batch, if all processes have as much as this one."""
        rows, mine = self.cfg.batch_size, len(self.start.mine)
        return {name: n * rows // mine for name, n in batch.counted().items()}

    def read(self) -> bool:
        """Reads the pending step. False: it was none, as the data of all processes had ended."""
        pending, self.pending = self.pending, None
        if pending is None:
            return True
        report = jax.device_get(pending.report)
        if report["empty"]:
            if not self.data.dry:
                raise ConfigError(f"step {pending.step}: nothing in the batch has a target")
            return False
        if self.log.due(pending.step) or pending.step == self.start.first + 1:
            self.log.data = self.skipped.report()
        skipped = self.bad.judge(pending, report)
        if skipped:
            self.log.say(skipped)
            self.log.skip(pending.step, pending.counted, pending.wait)
        else:
            self.log.step(pending.step, report, pending.counted, pending.wait)
        return True

    def between(self, step: int, sigterm: Sigterm) -> bool:
        """Evaluates, saves and stops where that is due; False if the step was none (`read`)."""
        saving, last = self.saving, step == self.cfg.steps
        stop = sigterm.received(step)
        names = [] if last else self.evals.due(step)
        due = stop or (step % self.cfg.checkpoint_every == 0 and not last)
        near = saving.local.due(step) and not last
        if not (due or near or names):
            return True
        if not self.read():  # a halted state must not be saved
            return False
        best = None if stop else self.evaluate(step, names)
        evaluated = not (stop and names)
        if near:
            saving.save_locally(step, self.state, evaluated)
        if due or best:
            saving.save(step, self.state, best, evaluated)
        if stop:
            saving.wait()
            seconds = time.monotonic() - sigterm.since
            raise Preempted(
                f"SIGTERM: stopped after step {step}, checkpoint saved {seconds:.1f} s after the "
                "signal"
            )
        return True

    def evaluate(self, step: int, names: list[str]) -> dict | None:
        """Runs these evaluations, and returns the record of `Best` if there is a new one."""
        if not names:
            return None
        clock = time.perf_counter()
        values = self.evals.run(names, self.state, self.start.frozen)
        for message in self.evals.messages:
            self.log.say(message)
        self.log.evaluated(step, values, time.perf_counter() - clock)
        self.log.show(step, self.evals.shown)
        return self.saving.best.better(step, values)

    def finish(self, step: int, ended: bool) -> None:
        """Reads the last step, evaluates, saves and exports."""
        ended |= not self.read()
        if ended:
            step = int(self.state.step)
            self.log.say(self.skipped.ended(step, self.cfg.steps))
        if self.saving.step < step:
            best = self.evaluate(step, self.evals.due(step, last=True))
            self.saving.save(step, self.state, best, evaluated=True)
        self.saving.finish(step, self.state)
        if self.goodput:
            self.log.say(self.goodput.summary())


def banner(start: Start, state: TrainState, peak: float | None) -> Iterator[str]:
    """The first lines of the log; `peak` FLOP/s of the chips are known or not."""
    cfg, mesh, parts = start.run.cfg, start.mesh, start.parts
    yield f"recipe {cfg.recipe}, stage {cfg.stage}, {cfg.batch_size} rows x {cfg.steps} steps"
    kind = mesh.devices.flat[0].device_kind
    axes = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
    yield f"{mesh.size} x {kind} on {jax.process_count()} process(es): {axes}"
    sizes: dict[str, int] = {}
    for name, p in state.params.items():
        part = parts.part_of[name]
        sizes[part] = sizes.get(part, 0) + p.size
    trained = ", ".join(f"{part} {n / 1e6:.2f} M" for part, n in sizes.items())
    frozen = sum(p.size for p in start.frozen.values())
    yield f"trained: {trained}; frozen: {frozen / 1e6:.2f} M"
    rate = optim.peak_rate(cfg.optim, cfg.batch_size)
    yield f"{cfg.optim.name}, peak learning rate {rate:.3g}, {cfg.optim.schedule}"
    yield from start.messages
    yield from start.local.messages
    if peak is None:
        yield f"no peak FLOP/s is known for {kind}: no MFU"
    yield f"model and data ready in {start.seconds:.1f} s"

"""Evaluations during training: held-out losses, and tasks that talk to the model.

    evals=dict(
        heldout=dict(every=500, data=dict(sources=dict(main=dict(path="heldout.jsonl")))),
        questions=dict(kind="task", every=2000, task="package.module:Class"),
        pope=dict(kind="task", every=2000, task="pope", options=dict(bench_root="…", limit=500)),
    ),
    keep_best="evals.heldout.text_loss",

`kind="samples"` shows what the model makes of a few fixed samples in place of scores.

Results depend on the parameters alone: every evaluation reads the same batches with the same random
numbers, so a run that was interrupted and resumed finds the same ones. They go to metrics.jsonl,
TensorBoard and the log as "evals.NAME.METRIC".
"""

import json
import math
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from metamorph_jax import config as configs
from metamorph_jax import files, sharding
from metamorph_jax.distributed import gather
from metamorph_jax.errors import ConfigError, FileError
from metamorph_jax.recipe import Shard, Shown
from metamorph_jax.train import checkpoint, metric_names, shards
from metamorph_jax.train.config import EvalConfig, Run
from metamorph_jax.train.optim import Params
from metamorph_jax.train.skipped import Skipped, summary
from metamorph_jax.train.state import Parts, TrainState
from metamorph_jax.train.step import losses


class Task(Protocol):
    """A task that a config names; it is made once, with `options` of the config as arguments."""

    def run(self, generator) -> Mapping[str, float]:
        """Scores of the model that this generator (`Recipe.generator`) decodes with.

        Every process calls it; the scores of the first one count.
        """
        ...


@runtime_checkable
class Named(Protocol):
    """A task that says beforehand what it scores, as those of the bench do."""

    def score_names(self) -> Collection[str] | None:
        """Names of all scores that `run` may give; None: any."""
        ...


@runtime_checkable
class Renewable(Protocol):
    """A generator that several evaluations share, so that they compile once.

    Between them it holds no weights.
    """

    def renew(self, other) -> None:
        """Takes the weights of a generator that was made anew."""
        ...

    def release(self) -> None:
        """Gives up the weights."""
        ...


class Evaluations:
    """The evaluations of a run.

    Args:
        run: the run.
        parts: of its model.
        mesh: that the state lies on.
        mine: rows of a batch that this process reads.
        data_shards: number of data shards of the run.

    Attributes:
        last: newest value of every metric.
        shown: name of an evaluation -> what it showed when it ran last.
        messages: for the log, about the last call of `run`.

    Raises:
        ConfigError: a task or an option of the data doesn't exist, or the metric of
            `config.keep_best`.
    """

    def __init__(self, run: Run, parts: Parts, mesh: Mesh, mine: np.ndarray, data_shards: int):
        _check_best(run)
        self._steps, self.last = run.cfg.steps, {}
        self.messages: list[str] = []
        self.shown: dict[str, Sequence[Shown]] = {}
        self._every = {one.name: one.every for one in run.cfg.evals}
        self._evals = {}
        for one in run.cfg.evals:
            if one.kind == "loss":
                self._evals[one.name] = HeldOutLoss(
                    one, run, parts, mesh, mine, data_shards, self.messages.append
                )
            else:
                kind = TaskScores if one.kind == "task" else Samples
                self._evals[one.name] = kind(one, run, parts)

    def due(self, step: int, last: bool = False) -> list[str]:
        """Names of the evaluations after this step, all of them after the last one."""
        last = last or step == self._steps
        return [name for name, every in self._every.items() if last or step % every == 0]

    def run(self, names: list[str], state: TrainState, frozen: Params) -> dict[str, float]:
        """ "evals.NAME.METRIC" -> value, the same on every process."""
        found, self.shown = {}, {}
        self.messages.clear()
        for name in names:
            one = self._evals[name]
            for metric, value in one(state, frozen).items():
                found[f"evals.{name}.{metric}"] = value
            if isinstance(one, Samples):
                self.shown[name] = one.shown
        self.last |= found
        return found

    def close(self) -> None:
        for one in self._evals.values():
            one.close()


class HeldOutLoss:
    """The losses and metrics of training on held-out data.

    Args:
        say: is told what of the data is skipped, once for the same counts.

    The others are those of `Evaluations`.
    """

    def __init__(self, cfg: EvalConfig, run: Run, parts: Parts, mesh, mine, data_shards: int, say):
        self._cfg, self._parts, self._mesh, self._rows = cfg, parts, mesh, run.cfg.batch_size
        self._key = jax.random.key(run.cfg.seed + 2)
        data = data_of(cfg, run)

        def open_shard(shard: Shard):
            return run.recipe.open_data(data, run.model, shard)

        self._data = shards.open_shards(open_shard, data_shards, self._rows, mine)
        self._skipped = Skipped(self._data, say, f"data of config.evals.{cfg.name}")
        self._begin = self._data.get_state()
        measure = partial(losses, parts, run.cfg.accumulate)
        self._measure = jax.jit(measure, out_shardings=sharding.replicated(mesh))

    def __call__(self, state: TrainState, frozen: Params) -> dict[str, float]:
        """ "loss", "NAME_loss" of each loss, and the metrics, those of each source among them;
        "data/SOURCE/REASON" are the numbers of samples that were skipped or cut."""
        params, weights = parameters(self._cfg, state), self._parts.loss_weights
        means, metrics = Sums(), Sums()
        for sums, counts, found in self._batches(params, frozen):
            means.add({name: (sums[name], counts[name]) for name in sums})
            metrics.add(found)
        skipped = self._skipped.report()
        if not means:
            raise ConfigError(
                f"config.evals.{self._cfg.name}.data: no batch has a target "
                f"({summary(self._skipped.counts())})"
            )
        loss = sum(weights[name] * n / max(d, 1.0) for name, (n, d) in means.items())
        pairs = {f"{name}_loss": pair for name, pair in means.items()} | metrics
        found = {k: float(n / d) for k, (n, d) in pairs.items() if d > 0}
        return {"loss": float(loss)} | found | skipped

    def _batches(self, params: Params, frozen: Params):
        """(sums, counts, metrics) of each batch, numpy; the same batches every time."""
        self._data.set_state(self._begin)
        number = 0
        while self._cfg.batches == 0 or number < self._cfg.batches:
            batch = next(self._data, None)
            if batch is None:
                return
            batch = shards.to_devices(batch, self._mesh, self._rows)
            key = jax.random.fold_in(self._key, number)
            sums, counts, metrics = jax.device_get(self._measure(params, frozen, batch, key))
            number += 1
            if sum(counts.values()) > 0:
                yield sums, counts, metrics
            elif not checkpoint.any_process(not self._data.dry):
                return

    def close(self) -> None:
        self._data.close()


class Sums(dict):
    """Name -> float64[2] sums of (numerator, denominator)."""

    def add(self, pairs: Mapping[str, tuple]) -> None:
        for name, pair in pairs.items():
            self[name] = self.get(name, 0.0) + np.array(pair, np.float64)


class TaskScores:
    """The scores of a task; arguments as of `Evaluations`."""

    def __init__(self, cfg: EvalConfig, run: Run, parts: Parts):
        self._cfg, self._run, self._parts = cfg, run, parts
        self._task = make_task(cfg)
        self._kept: Renewable | None = None

    def __call__(self, state: TrainState, frozen: Params) -> dict[str, float]:
        run = self._run
        model = self._parts.merge(parameters(self._cfg, state), frozen)
        generator = run.recipe.generator(model, run.model, run.data)
        if generator is None:
            raise ConfigError(
                f"config.evals.{self._cfg.name}: the recipe {run.cfg.recipe} doesn't generate, so "
                "it can't be given tasks"
            )
        if self._kept is not None:
            self._kept.renew(generator)
            generator = self._kept
        scores = {name: float(score) for name, score in self._task.run(generator).items()}
        if isinstance(generator, Renewable):
            self._kept = generator
            generator.release()
        return gather(scores)[0]

    def close(self) -> None:
        pass


class Samples:
    """What the model makes of a few samples of the data; arguments as of `Evaluations`.

    Attributes:
        shown: the samples of the last call.
    """

    def __init__(self, cfg: EvalConfig, run: Run, parts: Parts):
        self._cfg, self._run, self._parts = cfg, run, parts
        self._data = data_of(cfg, run)
        self.shown: Sequence[Shown] = ()

    def __call__(self, state: TrainState, frozen: Params) -> dict[str, float]:
        model = self._parts.merge(parameters(self._cfg, state), frozen)
        self.shown = self._run.recipe.show(model, self._run.model, self._data, self._cfg.samples)
        return {}

    def close(self) -> None:
        pass


def parameters(cfg: EvalConfig, state: TrainState) -> Params:
    """What an evaluation is of: the moving average, or the parameters."""
    return state.params if state.ema is None or not cfg.average else state.ema


def data_of(cfg: EvalConfig, run: Run):
    """The recipe's `Data` of an evaluation; raises ConfigError if an option doesn't exist."""
    table = overridden(run.cfg.data, cfg.data)
    return configs.build(run.recipe.Data, table, f"config.evals.{cfg.name}.data")


def overridden(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The table with the changes made, key by key; a new `sources` replaces the old one."""
    made = dict(table)
    for key, value in changes.items():
        if key != "sources" and isinstance(value, Mapping) and isinstance(made.get(key), Mapping):
            value = overridden(made[key], value)
        made[key] = value
    return made


# Makes the task that a plain name stands for. Imported when a config names one, as it lies below.
BENCH = "metamorph_jax.eval.bench:during_training"


def find_task(name: str):
    """The class of a task: "package.module:Class", or the name of one of the bench, with options.

    Raises:
        ConfigError: there is none.
    """
    where = "config.evals: task"
    if "." in name.partition(":")[0]:
        return configs.find_class(name, where)
    return configs.find_class(BENCH, where)(name)


def make_task(cfg: EvalConfig) -> Task:
    """The task of an evaluation.

    Raises:
        ConfigError: there is none, or an option doesn't exist.
    """
    try:
        return find_task(cfg.task)(**cfg.options)
    except TypeError as error:
        raise ConfigError(f"config.evals.{cfg.name}.options: {error}") from error


def score_names(cfg: EvalConfig, run: Run) -> Collection[str] | None:
    """Names of the metrics that an evaluation may have; None if its task does not say them.

    Raises:
        UserError: as its data or its task do.
    """
    if cfg.kind == "loss":
        return metric_names.of_data(run, data_of(cfg, run))
    if cfg.kind == "samples":
        return ()
    kind = find_task(cfg.task)
    if isinstance(kind, type) and not issubclass(kind, Named):
        return None  # it need not be made
    task = make_task(cfg)
    return task.score_names() if isinstance(task, Named) else None


def _check_best(run: Run) -> None:
    """Raises ConfigError if no evaluation will have the metric of `config.keep_best`."""
    _, _, rest = run.cfg.keep_best.partition(".")
    name, _, metric = rest.partition(".")
    for one in run.cfg.evals:
        known = score_names(one, run) if one.name == name else None
        if known is not None:
            metric_names.check(metric, known, f"config.keep_best {files.shown(run.cfg.keep_best)}")


class Best:
    """The best value so far of one metric, and the file that names its checkpoint.

    The file is workdir/best.json, {"metric", "value", "step"}. The same record is among the notes
    of the checkpoint, so a run that is killed between the two finds it there.

    Args:
        workdir: of the run.
        metric: "evals.NAME.METRIC", or "" for none.
        best_is: "min" or "max".
        checkpoints: of the run; the best one that it has is kept.
    """

    def __init__(
        self, workdir: pathlib.Path, metric: str, best_is: str, checkpoints: checkpoint.Checkpoints
    ):
        self._file, self.metric = workdir / "best.json", metric
        self._sign = -1.0 if best_is == "max" else 1.0
        self.record = self._find(checkpoints) if metric else None
        if self.record:
            checkpoints.keep_also(self.record["step"])
            self.saved(self.record["step"])

    def _find(self, checkpoints: checkpoint.Checkpoints) -> dict | None:
        """The record of the newest checkpoint that was the best when it was saved."""
        records = [checkpoints.notes(step).get("best") for step in checkpoints.steps]
        if os.path.lexists(self._file):
            saved = files.read_json(self._file)
            if type(saved.get("step")) is not int or type(saved.get("value")) not in (int, float):
                raise FileError(f"{self._file} does not name a checkpoint (metric, value, step)")
            records.append(saved)
        mine = [r for r in records if r and r.get("metric") == self.metric]
        there = [r for r in mine if r["step"] in checkpoints.steps]
        return max(there, key=lambda r: r["step"], default=None)

    def better(self, step: int, values: Mapping[str, float]) -> dict | None:
        """The record of these values if they are the best so far, to be noted in a checkpoint.

        Raises:
            ConfigError: the evaluation of the metric has no such value.
        """
        if not self.metric:
            return None
        mine = [key for key in values if key.split(".")[1] == self.metric.split(".")[1]]
        if not mine:
            return None
        if self.metric not in values:
            raise ConfigError(
                f"config.keep_best: there is no {self.metric}; the evaluation has {', '.join(mine)}"
            )
        value = values[self.metric]
        if not math.isfinite(value) or (
            self.record and self._sign * value >= self._sign * self.record["value"]
        ):
            return None
        self.record = {"metric": self.metric, "value": value, "step": step}
        return self.record

    def saved(self, step: int | None) -> None:
        """The checkpoint after `step` is complete."""
        if jax.process_index() == 0 and self.record and self.record["step"] == step:
            new = self._file.with_suffix(".new")
            new.write_text(json.dumps(self.record) + "\n")
            new.replace(self._file)

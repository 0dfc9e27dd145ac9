"""The metric that a sweep compares its runs by: which one can be, and whether they will have it."""

import json
from collections.abc import Iterator, Sequence

from metamorph_jax import files
from metamorph_jax.errors import ConfigError
from metamorph_jax.sweep.command import Run


def comparable(runs: Sequence[Run]) -> str:
    """The metric to compare runs by if the user names none: "loss", the weighted sum.

    Raises:
        ConfigError: its weights are not the same in all runs.
    """
    if not any(key.split(".")[0] in ("model", "recipe", "stage") for r in runs for key in r.values):
        return "loss"
    found: dict[str, set[float | None]] = {}
    weights = [_loss_weights(run.table) for run in runs]
    for name in sorted({name for one in weights for name in one}):
        found[name] = {one.get(name) for one in weights}
    changed = [name for name, values in found.items() if len(values) > 1]
    if not changed:
        return "loss"
    raise ConfigError(
        f"the sweep changes the weight of the loss{'es' if len(changed) > 1 else ''} "
        f"{', '.join(changed)}, so the weighted sum 'loss' of one run can't be compared with "
        f"another's; say which to compare by: {', '.join(f'--metric={n}_loss' for n in found)}"
    )


def check(metric: str, runs: Sequence[Run]) -> None:
    """Looks at a metric before anything is run. Only the scores of a task that does not say which
    it has (`evals.Named`) are let through unseen.

    Raises:
        ConfigError: it is of an evaluation that no run has, or that has no numbers; or no run will
            have a metric of this name.
        UserError: the evaluation's data or task can't be used.
    """
    from metamorph_jax.train import metric_names
    from metamorph_jax.train.metrics import OF_STEPS, OF_TIME

    if metric in OF_STEPS + OF_TIME:
        return  # as is most often the case: no model has to be outlined
    evaluation, name = "", metric
    if metric.startswith("evals."):
        evaluation, _, name = metric.removeprefix("evals.").partition(".")
        kinds = {one["name"]: one["kind"] for run in runs for one in run.table["evals"]}
        found = [f"evals.{key}.METRIC" for key, kind in kinds.items() if kind != "samples"]
        if f"evals.{evaluation}.METRIC" not in found or not name:
            raise ConfigError(
                f"--metric={files.shown(metric)}: no run has such an evaluation; there are "
                f"{', '.join(map(files.shown, found)) or 'none'}"
            )
    known: set[str] = set()
    for names in _names(runs, evaluation):
        if names is None or metric_names.is_among(name, names):
            return
        known |= {*names}
    metric_names.check(name, known, f"--metric={files.shown(metric)}")


def _names(runs: Sequence[Run], evaluation: str) -> Iterator[set[str] | None]:
    """The metrics of runs, or of one of their evaluations; those of equal models once only. None
    where a task does not say them."""
    import jax

    from metamorph_jax.train import evals, metric_names
    from metamorph_jax.train.config import resolve

    jax.config.update("jax_platforms", "cpu")  # a TPU belongs to the runs
    seen = set()
    for one in runs:
        wanted = [e for e in one.table["evals"] if e["name"] == evaluation]
        model = [one.table[key] for key in ("recipe", "model", "data", "stage")]
        key = json.dumps([*model, *wanted])
        if key in seen or (evaluation and not wanted):
            continue
        seen.add(key)
        run = resolve(one.table)
        if not evaluation:
            yield metric_names.of_training(run)
        for cfg in run.cfg.evals:
            if cfg.name == evaluation:
                yield evals.score_names(cfg, run)


def _loss_weights(table: dict) -> dict[str, float]:
    """Of the model of a run, which is not made."""
    import jax
    from flax import nnx

    from metamorph_jax.models import build
    from metamorph_jax.train.config import resolve

    jax.config.update("jax_platforms", "cpu")  # a TPU belongs to the runs
    run = resolve(table)
    return dict(nnx.eval_shape(lambda: run.recipe.create(run.model, build.rngs(0))).loss_weights)

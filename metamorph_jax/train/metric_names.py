"""Which metrics a run will have, from its config alone: nothing is read, nothing is computed.

"data/SOURCE/REASON" stands for the counts of samples of a source that are skipped or cut, of
whatever reason.
"""

import difflib
from collections.abc import Collection

import jax
from flax import nnx

from metamorph_jax import files, sharding
from metamorph_jax.errors import ConfigError
from metamorph_jax.models import build
from metamorph_jax.train import state
from metamorph_jax.train.config import Run
from metamorph_jax.train.metrics import OF_STEPS, OF_TIME

_ANY, _REASON = "SOURCE", "REASON"


def of_training(run: Run) -> set[str]:
    """Names of the metrics of training. Some are there on some hardware, or at times, only."""
    mesh = _one_device()
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: run.recipe.create(run.model, build.rngs(0)))
        parts, _, _ = state.split(model, run.pattern, mesh)
    norms = {f"grad_norm/{part}" for part in parts.part_of.values()}
    return of_data(run, run.data) | norms | {*OF_STEPS, *OF_TIME}


def of_data(run: Run, data) -> set[str]:
    """Names of the losses and metrics of the model on some data.

    data: the recipe's `Data`.
    """
    batch = run.recipe.batch_spec(data, run.model, 1)

    def measured(batch):
        return run.recipe.create(run.model, build.rngs(0)).loss_sums(batch, jax.random.key(0))

    with jax.set_mesh(_one_device()):
        losses, metrics = jax.eval_shape(measured, batch)
    sources = getattr(batch, "source_names", ()) or (_ANY,)
    counts = {f"data/{source}/{_REASON}" for source in sources}
    return {"loss", *(f"{name}_loss" for name in losses), *metrics} | counts


def _one_device():
    return sharding.make_mesh(devices=jax.local_devices()[:1])


def check(name: str, known: Collection[str], where: str) -> None:
    """Raises ConfigError if a metric is none of the known ones, which it lists.

    where: the option that names it.
    """
    if not is_among(name, known):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"{where}: there will be no such metric{hint}; there are "
                          f"{', '.join(map(files.shown, sorted(known)))}")  # fmt: skip


def is_among(name: str, known: Collection[str]) -> bool:
    """Whether a metric is one of the known ones."""
    kind, _, rest = name.partition("/")
    source, _, reason = rest.rpartition("/")
    if kind == "data":
        named = {f"data/{source}/{_REASON}", f"data/{_ANY}/{_REASON}"}
        return bool(source and reason) and not named.isdisjoint(known)
    return name in known

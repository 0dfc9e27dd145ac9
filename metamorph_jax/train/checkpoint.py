"""Checkpoints of a run, and the export that a later stage loads. The only user of Orbax.

    workdir/checkpoints/<step>/   state (parameters, moments, average, key) and, in its metadata,
                                  where each process's data iterator stands; newest N are kept
    workdir/final/                what the stage trained (its moving average if it keeps one)

Frozen weights are in neither: they come from the weight files that the config names, or from the
seed, again. A checkpoint counts once Orbax has marked it committed, so a run that is killed while
writing goes on from the one before.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from metamorph_jax.config import ConfigError
from metamorph_jax.models import lora
from metamorph_jax.nn import quantized
from metamorph_jax.train.optim import Params
from metamorph_jax.train.state import Parts, TrainState

_training = ocp.training


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or not of this run."""


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
        workdir: folder of the run.
        keep: how many of the newest stay.
    """

    def __init__(self, workdir: str | pathlib.Path, keep: int = 2):
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._manager = _training.Checkpointer(
            self.folder,
            preservation_policy=_training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._saving = None

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        newest = self._manager.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: TrainState, fixed: Params, data: dict) -> None:
        """Saves in the background; errors of the save before this one are raised here.

        Args:
            step: number of the checkpoint.
            state: copied before this returns.
            fixed: frozen leaves that no weight file has.
            data: state of this process's data iterator.
        """
        self.wait()
        if self.latest == step:
            return
        self._saving = self._manager.save_checkpointables_async(
            step,
            {"state": _tree(state, fixed)},
            custom_metadata={"data": _from_all_processes(data)},
            force=True,
        )

    def wait(self) -> None:
        """Until the save in the background is done."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def restore(
        self, state: TrainState, fixed: Params, step: int | None = None
    ) -> tuple[TrainState, Params, dict]:
        """(state, fixed, data state of this process) of a step, default the newest.

        Args:
            state, fixed: arrays (or shapes with shardings) that say what is expected and where.
            step: which one.

        Raises:
            CheckpointError: if it is damaged, or holds something else.
        """
        step = self.latest if step is None else step
        folder = self.folder / str(step)
        tree = _tree(state, fixed)
        try:
            found = self._manager.checkpointables_metadata(step)
            states = found.custom_metadata["data"]
            if found.metadata["state"] is None:
                raise ValueError("its description is unreadable")
            shapes = _flat(found.metadata["state"])
        except Exception as error:
            raise _damaged(folder, error) from error
        _compare(_flat(tree), shapes, folder)
        if len(states) != jax.process_count():
            raise CheckpointError(
                f"{folder} was written by {len(states)} processes, this run has "
                f"{jax.process_count()}: where each stands in its data can't be shared out anew"
            )
        try:
            loaded = self._manager.load_checkpointables(step, {"state": _abstract(tree)})["state"]
        except Exception as error:
            raise _damaged(folder, error) from error
        fixed = loaded.pop("fixed", {})
        moments = type(state.moments)(**loaded.pop("moments"))
        loaded = TrainState(**{"ema": None, **loaded, "moments": moments})
        return loaded, fixed, states[jax.process_index()]

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _damaged(folder, error) -> CheckpointError:
    reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    return CheckpointError(
        f"the checkpoint {folder} can't be read; remove that folder to go on from an earlier one "
        f"({reason})"
    )


def _tree(state: TrainState, fixed: Params) -> dict:
    """What is saved, as nested dicts; Orbax wants no empty ones."""
    moments = {"first": state.moments.first, "second": state.moments.second}
    scalars = {"step": state.step, "key": state.key, "halted": state.halted}
    tree = {"params": state.params, "moments": moments, **scalars}
    if state.ema is not None:
        tree["ema"] = state.ema
    return tree | ({"fixed": fixed} if fixed else {})


def _flat(tree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _compare(wanted: dict, found: dict, folder) -> None:
    wrong = [f"{k} is missing" for k in wanted.keys() - found.keys()]
    wrong += [f"{k} is not part of this run" for k in found.keys() - wanted.keys()]
    for k in wanted.keys() & found.keys():
        if tuple(wanted[k].shape) != tuple(found[k].shape):
            wrong.append(f"{k} is {tuple(found[k].shape)}, expected {tuple(wanted[k].shape)}")
    if wrong:
        raise CheckpointError(f"{folder} doesn't fit this run: " + "; ".join(sorted(wrong)[:20]))


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _from_all_processes(state: dict) -> list[dict]:
    """The data states of all processes, known to each."""
    if jax.process_count() == 1:
        return [state]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([text.size]))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(r[: int(n)])) for r, n in zip(rows, sizes.reshape(-1), strict=True)]


# ---- the export


def export(workdir: str | pathlib.Path, state: TrainState, fixed: Params) -> pathlib.Path:
    """Writes `workdir/final`: the trained parameters, or their moving average."""
    folder = pathlib.Path(workdir).absolute() / "final"
    params = state.params if state.ema is None else state.ema
    ocp.save(folder, {**params, **fixed}, overwrite=True)
    return folder


def read_export(workdir: str | pathlib.Path) -> dict[str, jax.Array]:
    """name -> parameter of a finished stage, on the first device."""
    folder = pathlib.Path(workdir).absolute() / "final"
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    make = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
    return ocp.load(folder, jax.tree.map(make, ocp.metadata(folder).metadata))


def load_params(model: nnx.Module, workdir: str | pathlib.Path) -> set[str]:
    """Gives a model, in place, the weights that an earlier stage ended with.

    First the weights that the earlier stage itself started from, as its saved config names them,
    then what it trained.

    Args:
        model: of the same recipe; it may have parts that the earlier stage lacked.
        workdir: of the earlier stage.

    Returns:
        Names of the parameters that the earlier stages trained.

    Raises:
        CheckpointError: if the stage isn't finished, or its parameters don't fit the model.
    """
    from metamorph_jax import config
    from metamorph_jax.train.workdir import find_recipe

    workdir = pathlib.Path(workdir).absolute()
    folder, saved = workdir / "final", workdir / "config.json"
    if not saved.is_file():
        raise ConfigError(f"workdir:{workdir} is no workdir of a training run (no config.json)")
    if not folder.is_dir():
        raise ConfigError(f"the stage in {workdir} isn't finished: it has no final/")
    before = json.loads(saved.read_text())
    recipe = find_recipe(before["recipe"])
    earlier = config.build(recipe.Config, before["model"], "config.model")
    with quantized.unpacked(model):
        return _load_trained(model, folder, recipe, earlier)


def _load_trained(model: nnx.Module, folder: pathlib.Path, recipe, earlier) -> set[str]:
    done: set[str] = set()
    if getattr(earlier, "weights", "").startswith("workdir:"):
        done |= load_params(model, earlier.weights.removeprefix("workdir:"))
    else:
        recipe.load_pretrained(model, earlier)

    named = {".".join(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(model))}
    try:
        shapes = ocp.metadata(folder).metadata
    except Exception as error:
        raise _damaged(folder, error) from error
    here = {k: v for k, v in named.items() if k in shapes}
    adapters = getattr(earlier, "lora", None)
    merging = adapters is not None and not lora.same(model, adapters, shapes)
    if merging:
        here = {k: v for k, v in here.items() if not lora.is_adapter(k.split("."))}
    _compare(here, shapes if not merging else {k: shapes[k] for k in here}, folder)
    abstract = {
        k: jax.ShapeDtypeStruct(v.shape, v[...].dtype, sharding=v[...].sharding)
        for k, v in here.items()
    }
    if merging:
        everywhere = lora.replicated(model)
        abstract |= {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=everywhere)
            for k, v in shapes.items()
            if lora.is_adapter(k.split("."))
        }
    try:
        values = ocp.load(folder, abstract)
    except Exception as error:
        raise _damaged(folder, error) from error
    for name in here:
        named[name][...] = values[name]
    nnx.update(model, nnx.from_flat_state([(_path(n), named[n]) for n in here]))
    if merging:
        lora.fold(model, {k: v for k, v in values.items() if k not in here}, adapters.scale)
    return done | set(values)


def _path(name: str) -> tuple:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def fixed_leaves(parts: Parts, frozen: Params) -> Params:
    return {name: frozen[name] for name in parts.fixed}

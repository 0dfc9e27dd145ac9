"""Checkpoints of a run, and the weights that a later stage loads, both written by Orbax.

    workdir/checkpoints/<step>/   state (parameters, optimizer state, average, key) and, in its
                                  metadata, the position of each data shard and a checksum of every
                                  leaf; the newest N are kept, and the best with `keep_best`
    workdir/damaged/<step>/       one that couldn't be read, set aside on request
    workdir/final/                what the stage trained (its moving average if it keeps one)

Neither holds frozen weights: they are loaded again from the weight files that the config names, or
made again from the seed. A checkpoint counts once Orbax has marked it committed, so a run that is
killed while writing one resumes from the one before. Nothing in it depends on the number of
processes or the mesh.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from metamorph_jax.distributed import gather
from metamorph_jax.errors import CheckpointError, ConfigError
from metamorph_jax.train.optim import Params
from metamorph_jax.train.state import Parts, TrainState

_training = ocp.training

# Of what a checkpoint holds. 1: AdamW's moments as `moments/first` and `second`, no number in the
# metadata. 2: the state of an optax transformation, `opt_state`.
FORMAT = 2


def steps_in(workdir: pathlib.Path) -> list[int]:
    """Steps of the checkpoints in a workdir, whole or damaged, ascending; nothing is opened."""
    folder = workdir / "checkpoints"
    names = [f.name for f in folder.iterdir() if f.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
        workdir: folder of the run.
        keep: how many of the newest are kept.

    Attributes:
        seconds: how long the last save took until it was complete, or None.
    """

    waits_for_others = True  # a save and `close`

    def __init__(self, workdir: str | pathlib.Path, keep: int = 2):
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._keep = keep
        self._best: list[int] = []  # steps
        self._waiter = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        self.seconds: float | None = None
        self._failed = False
        self._open()

    def _open(self) -> None:
        self._manager = _training.Checkpointer(
            self.folder,
            preservation_policy=_NewestAndBest(self._keep, self._best),
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [c.step for c in self._manager.checkpoints]

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self.steps[-1] if self.steps else None

    @property
    def data_shards(self) -> int | None:
        """Number of data shards of this run, if it has a readable checkpoint."""
        found = (self.notes(step) for step in reversed(self.steps))
        return next((len(notes["data"]) for notes in found if notes), None)

    def notes(self, step: int) -> dict:
        """What was saved beside the state; {} if it can't be read."""
        try:
            return self._describe(step)[1]
        except CheckpointError:
            return {}

    def keep_also(self, step: int) -> None:
        """Keeps this one, the best so far, until there is a better one that is complete."""
        self._best[:] = [step] if step in self.steps else [*self._best[-1:], step]

    def save(
        self, step: int, state: TrainState, buffers: Params, data: dict[int, dict], notes: dict
    ) -> None:
        """Saves in the background; an error of the save before this one is raised here.

        Args:
            step: number of the checkpoint.
            state: copied before this returns.
            buffers: frozen leaves that are not in weight files.
            data: data shard -> its state, of the data shards that this process reads.
            notes: more to be saved beside it, JSON-able; with "best" see `keep_also`.

        Raises:
            CheckpointError: if it can't be written.
        """
        self.wait()
        if "best" in notes:
            self.keep_also(step)
        if self.latest == step:
            return
        tree = as_tree(state, buffers)
        notes = notes | describe(tree, data)
        since = time.perf_counter()
        try:
            saving = self._manager.save_checkpointables_async(
                step, {"state": tree}, custom_metadata=notes, force=True
            )
        except Exception as error:
            raise self._not_written(step, error) from error

        def finish():
            saving.result()
            self.seconds = time.perf_counter() - since

        self._saving = (step, self._waiter.submit(finish))

    def check(self) -> int | None:
        """Step of a save in the background that was completed since the last call.

        Raises:
            CheckpointError: if it failed.
        """
        if self._saving is None or not self._saving[1].done():
            return None
        return self.wait()

    def wait(self) -> int | None:
        """`check`, once the save in the background is done."""
        if self._saving is None:
            return None
        (step, saving), self._saving = self._saving, None
        try:
            saving.result()
        except Exception as error:
            raise self._not_written(step, error) from error
        if step in self._best:
            self._best[:] = [step]
        return step

    def _not_written(self, step: int, error: Exception) -> CheckpointError:
        self._failed = True
        whole = [s for s in self.steps if (self.folder / str(s)).is_dir() and s != step]
        left = f"the newest whole one is {self.folder / str(whole[-1])}" if whole else "none exists"
        return CheckpointError(
            f"the checkpoint {self.folder / str(step)} could not be written: {reason(error)}. "
            f"Is the disk full? {left}; the same command resumes from there"
        )

    def restore(
        self, state: TrainState, buffers: Params, fall_back: bool = False
    ) -> tuple[TrainState, Params, dict, list[str]]:
        """(state, buffers, notes, messages) of the newest.

        Args:
            state, buffers: arrays (or shapes with shardings) like those that are to be restored.
            fall_back: set damaged ones aside and take the newest that is not damaged.

        Raises:
            CheckpointError: if it is damaged, or holds something else.
        """
        damaged: list[tuple[int, CheckpointError]] = []
        for step in reversed(self.steps):
            error = result = None
            try:
                result = self._restore(step, state, buffers)
            except _Damaged as found:
                error = found
            if not any_process(error is not None):
                break
            error = error or _damaged(self.folder / str(step), "another host could not read it")
            if not fall_back:
                raise error
            damaged.append((step, error))
        else:
            reasons = "; ".join(str(error) for _, error in damaged)
            raise CheckpointError(f"{reasons}; no whole checkpoint is left, none was set aside")
        messages = [f"{error}. It is now in {self._set_aside(step)}" for step, error in damaged]
        return *result[:3], messages + result[3]

    def _describe(self, step: int) -> tuple[dict, dict]:
        """(name -> metadata of a leaf, notes) of a checkpoint."""
        folder = self.folder / str(step)
        try:
            found = self._manager.checkpointables_metadata(step)
            notes = found.custom_metadata
            notes["data"]  # noqa: B018  (there, or damaged)
            if found.metadata["state"] is None:
                raise ValueError("its description is unreadable")
            return flat(found.metadata["state"]), notes
        except Exception as error:
            raise _damaged(folder, error) from error

    def _restore(self, step: int, state: TrainState, buffers: Params):
        folder = self.folder / str(step)
        shapes, notes = self._describe(step)
        check_format(notes, folder)
        tree, added = expected(state, buffers, shapes)
        compare(flat(tree), shapes, folder)
        try:
            there = _abstract(tree, shapes)
            loaded = self._manager.load_checkpointables(step, {"state": there})["state"]
        except Exception as error:
            raise _damaged(folder, error) from error
        if "sums" in notes:
            wrong = altered(loaded, notes["sums"])
            if wrong:
                raise _damaged(folder, f"altered: {wrong}")
        loaded, messages = converted(loaded, tree, folder)
        messages += changed_parts(tree, added, state)
        return *from_tree(loaded, added, state), notes, messages

    def _set_aside(self, step: int) -> pathlib.Path:
        """Moves a damaged checkpoint out of the way."""
        self._manager.close()
        aside = self.folder.parent / "damaged" / str(step)
        if jax.process_index() == 0:
            while aside.exists():
                aside = aside.with_name(f"{aside.name}_")
            aside.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(aside)
        any_process(False)  # all wait for it
        self._open()
        return aside

    def close(self) -> None:
        """Waits for the save in the background; if it fails, that is raised."""
        try:
            self.wait()
        finally:
            self._waiter.shutdown(wait=False)
            with contextlib.suppress(*((Exception,) if self._failed else ())):
                self._manager.close()  # raises what was raised before


@dataclasses.dataclass
class _NewestAndBest:
    """Orbax's policy of what to keep: the newest `keep` steps, and those in `best`."""

    keep: int
    best: list[int]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        newest = len(checkpoints) - self.keep
        return [i >= newest or c.step in self.best for i, c in enumerate(checkpoints)]


class _Damaged(CheckpointError):
    """The checkpoint is there but can't be read completely."""


def reason(error) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def _damaged(folder, error) -> CheckpointError:
    return _Damaged(
        f"the checkpoint {folder} can't be read ({reason(error)}); damaged_checkpoint=previous "
        "sets it aside and resumes from the one before"
    )


@functools.cache
def _summing(where):
    """Sums a leaf; compiled once for all leaves of a shape, which takes a tenth of the time that
    one program for all leaves took."""
    return jax.jit(_sum, out_shardings=where)


def _sum(x):
    bits = x.astype(jnp.uint8) if x.dtype == bool else x
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[bits.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(bits, kind).astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        at = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place, stride = place + at * jnp.uint32(stride % 2**32), stride * x.shape[axis]
    mixed = (bits ^ (place * jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
    return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)


def checksums(tree) -> dict[str, int]:
    """Name -> a number that depends on every bit of a leaf and its position.

    It is computed on the devices that hold the leaf. Integers wrap around, so neither the order of
    addition nor the sharding matters.
    """
    leaves = flat(tree)
    where = next(iter(leaves.values())).sharding
    if isinstance(where, jax.sharding.NamedSharding):
        where = jax.sharding.NamedSharding(where.mesh, jax.sharding.PartitionSpec())
    sums = jax.device_get({name: _summing(where)(x) for name, x in leaves.items()})
    return {name: int(x) for name, x in sums.items()}


def altered(tree, sums: dict[str, int]) -> str:
    """Names of the leaves whose checksum differs from the saved one; "" if none does."""
    found = checksums(tree)
    return ", ".join(sorted(k for k in found if found[k] != sums.get(k))[:10])


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; all wait for each other."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def as_tree(state: TrainState, buffers: Params) -> dict:
    """What is saved, as nested dicts without empty ones, which Orbax refuses.

    A leaf of the optimizer's state is named by its path, e.g. "0/0/mu/llm.layers.mlp.up.kernel".
    """
    tree = {"params": state.params, "step": state.step, "key": state.key, "halted": state.halted}
    optional = {
        "opt_state": dict(_opt_leaves(state.opt_state)),
        "buffers": buffers,
        "ema": state.ema,
        "loss_statistics": state.loss_statistics,
    }
    return tree | {k: v for k, v in optional.items() if v is not None and len(v)}


def _opt_leaves(opt_state) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]


def expected(state: TrainState, buffers: Params, names) -> tuple[dict, dict]:
    """What a checkpoint with leaves of these names should hold, whatever the run now keeps.

    Returns:
        (the tree, what of the state it lacks). The tree has the moving average and the statistics
        of the loss if the checkpoint has them, even where the run no longer does.
    """
    tree, added = as_tree(state, buffers), {}
    here = state.step.sharding
    absent = {
        "ema": {k: _like(x, x.shape, x.sharding) for k, x in state.params.items()},
        "loss_statistics": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=here),
    }
    for part, shapes in absent.items():
        saved = any(name.startswith(f"[{part!r}]") for name in names)
        if part in tree and not saved:
            added[part] = tree.pop(part)
        elif part not in tree and saved:
            tree[part] = shapes
    return tree, added


def _like(x, shape, where) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=where)


def from_tree(tree: dict, added: dict, like: TrainState) -> tuple[TrainState, Params]:
    """The inverse of `as_tree`, with the parts that `like` has: (state, buffers)."""
    if "ema" in added:  # it begins with what was trained; a copy, as a step donates both
        added = added | {"ema": jax.tree.map(jnp.copy, tree["params"])}
    rest = {"ema": None, "loss_statistics": None, "opt_state": {}} | added | tree
    rest |= {part: None for part in ("ema", "loss_statistics") if getattr(like, part) is None}
    buffers, found = rest.pop("buffers", {}), rest.pop("opt_state")
    leaves = [found[name] for name, _ in _opt_leaves(like.opt_state)]
    opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), leaves)
    return TrainState(opt_state=opt_state, **rest), buffers


def describe(tree: dict, data: dict[int, dict]) -> dict:
    """What is noted beside a checkpoint: its format, where the data stand, checksums."""
    return {"format": FORMAT, "data": from_all_processes(data), "sums": checksums(tree)}


def check_format(notes: dict, where) -> None:
    """Raises CheckpointError if a checkpoint with these notes has another format than ours."""
    found = notes.get("format", 1)
    if found != FORMAT:
        raise CheckpointError(
            f"{where} was written by another version of metamorph_jax: its checkpoints have format "
            f"{found}, this version reads format {FORMAT} (since 2, they hold the state of an "
            "optax optimizer). Finish the run with the version that began it (versions.json in "
            "the workdir has its git commit), or start again with another --workdir; the weights "
            "of finished stages (final/) can still be loaded"
        )


def flat(tree) -> dict[str, Any]:
    """Name -> leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def compare(wanted: dict, found: dict, folder) -> None:
    """Raises CheckpointError, listing the differences, if names or shapes differ."""
    wrong = [f"{k} is missing" for k in wanted.keys() - found.keys()]
    wrong += [f"{k} is not part of this run" for k in found.keys() - wanted.keys()]
    for k in wanted.keys() & found.keys():
        if tuple(wanted[k].shape) != tuple(found[k].shape):
            wrong.append(f"{k} is {tuple(found[k].shape)}, expected {tuple(wanted[k].shape)}")
    if wrong:
        raise CheckpointError(f"{folder} doesn't fit this run: " + "; ".join(sorted(wrong)[:20]))


def _abstract(tree, saved: dict):
    """The leaves of a tree in the dtypes that they were saved in, to be read where those lie."""

    def one(path, x):
        dtype = saved[jax.tree_util.keystr(path)].dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(one, tree)


def converted(loaded: dict, wanted: dict, folder) -> tuple[dict, list[str]]:
    """(the tree in the dtypes of `wanted`, messages about those that it did not have).

    Raises:
        CheckpointError: it holds integers for floating-point numbers, or the other way round.
    """
    like, found, names = flat(wanted), flat(loaded), {}
    for name, x in found.items():
        before, after = jnp.dtype(x.dtype), jnp.dtype(like[name].dtype)
        if before == after:
            continue
        if not (jnp.issubdtype(before, jnp.floating) and jnp.issubdtype(after, jnp.floating)):
            raise CheckpointError(f"{folder} has {before} for {name}, this run needs {after}")
        names.setdefault((before.name, after.name), []).append(name)
    messages = [
        f"{len(group)} leaves of {folder} are converted from {before} to {after}: {group[0]} …"
        for (before, after), group in names.items()
    ]
    return jax.tree.map(lambda x, y: x.astype(y.dtype), loaded, wanted), messages


def changed_parts(tree: dict, added: dict, state: TrainState) -> list[str]:
    """Messages about what the run keeps now and did not when it was saved, or the reverse."""
    words = {"ema": "a moving average of the parameters", "loss_statistics": "loss statistics"}
    messages = [f"the checkpoint has no {words[part]}: begun anew" for part in added]
    gone = [part for part in words if part in tree and getattr(state, part) is None]
    return messages + [f"the checkpoint has {words[part]}: no longer kept" for part in gone]


def from_all_processes(states: dict[int, dict]) -> list[dict]:
    """The states of all data shards in order, on every process.

    Raises:
        CheckpointError: if processes that read the same data shard are at different positions.
    """
    found: dict[int, tuple[int, dict]] = {}
    for process, data_shards in enumerate(gather(sorted(states.items()))):
        for data_shard, state in data_shards:
            first, same = found.setdefault(data_shard, (process, state))
            if same != state:
                raise CheckpointError(
                    f"hosts {first} and {process} both read data shard {data_shard}, but no longer "
                    f"see the same data: {same} and {state}. Can one of them not read some files?"
                )
    return [found[data_shard][1] for data_shard in range(len(found))]


# ---- the export


def export(
    workdir: str | pathlib.Path, state: TrainState, buffers: Params, about: dict
) -> pathlib.Path:
    """Writes `workdir/final`: the trained parameters, or their moving average.

    Args:
        workdir: of the run.
        state, buffers: its end.
        about: "step", "stage", "recipe" and "config" that they are of, kept with a checksum of
            every leaf.
    """
    folder = pathlib.Path(workdir).absolute() / "final"
    tree = {**(state.params if state.ema is None else state.ema), **buffers}
    notes = about | {"sums": checksums(tree)}
    ocp.save(folder, tree, overwrite=True, custom_metadata=notes)
    return folder


def export_notes(workdir: str | pathlib.Path) -> dict:
    """What `export` noted in `workdir/final`; {} for one of an earlier version.

    Raises:
        ConfigError, CheckpointError: see `export_shapes`.
    """
    return _export_metadata(workdir).custom_metadata or {}


def _export_metadata(workdir: str | pathlib.Path):
    folder = pathlib.Path(workdir).absolute() / "final"
    if not folder.is_dir():
        raise ConfigError(f"the stage in {folder.parent} isn't finished: it has no final/")
    try:
        return ocp.metadata(folder)
    except Exception as error:
        raise _damaged_export(folder, error) from error


def _damaged_export(folder: pathlib.Path, error) -> CheckpointError:
    return CheckpointError(
        f"the weights {folder} are damaged ({reason(error)}); remove that folder and start the "
        "training command again, which writes it from the last checkpoint"
    )


def export_shapes(workdir: str | pathlib.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """name -> shape and dtype of what a finished stage trained.

    Raises:
        ConfigError: the stage isn't finished.
        CheckpointError: its weights are damaged.
    """
    found = _export_metadata(workdir).metadata
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in found.items()}


def read_export(
    workdir: str | pathlib.Path, wanted: dict[str, jax.ShapeDtypeStruct] | None = None
) -> dict[str, jax.Array]:
    """name -> weight of a finished stage.

    Args:
        workdir: of the stage.
        wanted: those to be read, and the dtype and the sharding that each of them gets; a process
            reads its shards only. Default: all as they are, on the first device.

    Raises:
        ConfigError, CheckpointError: see `export_shapes`.
    """
    folder = pathlib.Path(workdir).absolute() / "final"
    shapes, sums = export_shapes(workdir), export_notes(workdir).get("sums", {})
    if wanted is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {k: _like(x, x.shape, here) for k, x in shapes.items()}
    # One by one where they are converted, as checksums are of what is in the file.
    same = [k for k, x in wanted.items() if k in shapes and x.dtype == shapes[k].dtype]
    groups = [same] * bool(same) + [[k] for k in wanted if k not in same]
    found = {}
    for names in groups:
        there = {k: _like(shapes.get(k, wanted[k]), wanted[k].shape, wanted[k].sharding)
                 for k in names}  # fmt: skip
        loaded = _read_part(folder, there)
        wrong = altered(loaded, sums) if sums else ""
        if wrong:
            raise _damaged_export(folder, f"altered: {wrong}")
        found |= {k: x.astype(wanted[k].dtype) for k, x in loaded.items()}
    return {k: found[k] for k in wanted}


def _read_part(folder: pathlib.Path, wanted: dict) -> dict[str, jax.Array]:
    try:
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            return ocp.load(folder, wanted)
    except Exception as error:
        raise _damaged_export(folder, error) from error


def buffers_of(parts: Parts, frozen: Params) -> Params:
    """Those frozen leaves that checkpoints hold."""
    return {name: frozen[name] for name in parts.buffers}

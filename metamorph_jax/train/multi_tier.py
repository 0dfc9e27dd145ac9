"""Multi-tier checkpoints of GKE: local ones in Orbax's form, that a daemon copies and repairs.

    config.local_checkpoints.folder=/local       where the volume of the daemon is mounted
    config.local_checkpoints.multi_tier=30       minutes between its copies to the bucket

The daemon (https://cloud.google.com/kubernetes-engine, "multi-tier checkpointing") numbers the
hosts, so that each finds the shards that it wrote; gives a host that has none those of a replica or
of the bucket; and copies shards to the bucket. The run writes through Orbax's
`ReplicatorCheckpointManager`. As with `local_checkpoints`, a restart resumes from the newest step
that all hosts have, here or in the workdir, and checks every array.
"""

import contextlib
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from metamorph_jax import distributed
from metamorph_jax.errors import CheckpointError, JoinError
from metamorph_jax.train import checkpoint
from metamorph_jax.train.optim import Params
from metamorph_jax.train.state import TrainState


def join(folder: str, minutes: int, mesh: dict[str, int], timeout: float) -> distributed.Place:
    """Connects the processes as the daemon numbers them, and waits until it has repaired them.

    Args:
        folder: of the daemon on this host.
        minutes: between its copies to the bucket.
        mesh: axis -> size, which says which hosts hold the same shards.
        timeout: seconds to wait.

    Raises:
        JoinError: if the daemon isn't there, or fails.
    """
    from etils import epath
    from orbax.checkpoint.experimental.emergency.multi_tier_checkpointing import initialization

    where = pathlib.Path(folder)
    check = (f"Is multi-tier checkpointing on in the cluster, and its volume mounted at {folder} "
             "(XPK: --mtc-enabled --ramdisk-directory)? "
             "config.local_checkpoints.multi_tier=0 turns it off")  # fmt: skip
    if not where.is_dir():
        raise JoinError(f"config.local_checkpoints.folder: no {folder} here. {check}")
    print(f"waiting up to {timeout:.0f} s for GKE's multi-tier daemon in {folder}", flush=True)
    distributed.prepare_collectives()
    slices = mesh.get("slice", 1)
    try:
        initialization.initialize_multi_tier_checkpointing(
            epath.Path(where),
            backup_interval_minutes=minutes,
            num_slices=slices if slices > 0 else None,
            data_parallelism=max(slices, 1) * max(mesh.get("data", 1), 1),
            jax_initialization_timeout_seconds=int(timeout),
        )
    except (OSError, TimeoutError, ValueError, RuntimeError) as error:
        reason = checkpoint.reason(error)
        raise JoinError(f"GKE's multi-tier daemon in {folder}: {reason}. {check}") \
            from error  # fmt: skip
    place = distributed.Place("GKE's daemon", jax.process_count(), jax.process_index())
    if place.process == 0:
        print(f"all {place.processes} hosts are connected", flush=True)
    return place


class MultiTierCheckpoints:
    """As `local_checkpoints.LocalCheckpoints`; all processes make it at the same time.

    Args:
        cfg: `config.LocalConfig`.
        run: name of the run; checkpoints of another one don't count.
        layout: name of the hosts and the mesh; Orbax reads what was written on the same ones only.
        mesh: of the state.
        newest: step of the newest checkpoint in the workdir; older ones here don't count.
    """

    waits_for_others = True  # a save and `close`

    def __init__(self, cfg, run: str, layout: str, mesh: Mesh, newest: int | None):
        import orbax.checkpoint as ocp
        from etils import epath
        from orbax.checkpoint._src.futures import future
        from orbax.checkpoint.experimental.emergency import replicator_checkpoint_manager as mtc

        _prepare_orbax()
        self._cfg, self._about, self._args = cfg, {"run": run, "layout": layout}, ocp.args
        self._folder = pathlib.Path(cfg.folder).expanduser().absolute()
        options = mtc.ReplicatorCheckpointManagerOptions(enable_async_checkpointing=False)
        # It gives the keys by which the threads of a save in the background find each other the
        # number of the process, also for the saves to the workdir, which all do together.
        keys = future.AwaitableSignalsContract
        prefix = keys.awaitable_signals_contract_prefix
        self._manager = mtc.ReplicatorCheckpointManager(
            epath.Path(self._folder), options, global_mesh=mesh
        )
        keys.awaitable_signals_contract_prefix = prefix
        self.step: int | None = None
        self.data_shards: int | None = None
        self.messages: list[str] = []
        self._agree(newest)

    def _agree(self, newest: int | None) -> None:
        notes = {step: self._notes(step) for step in self._steps()}
        ours = [s for s, n in notes.items() if self._about.items() <= n.items() and "data" in n]
        rows = distributed.gather([sorted(notes), ours])
        common = set.intersection(*(set(usable) for _, usable in rows))
        found = max((step for every, _ in rows for step in every), default=None)
        best = max(common, default=-1)
        if best > (-1 if newest is None else newest):
            self.step, self._chosen = best, notes[best]
            self.data_shards = len(self._chosen["data"])
            self.messages.append(f"multi-tier checkpoint {best} is newer than the workdir's "
                             f"({'none' if newest is None else newest})")  # fmt: skip
        elif found is not None and found > (-1 if newest is None else newest):
            self.messages.append(
                f"multi-tier checkpoint {found} isn't on all hosts, or not of this run, its number "
                "of hosts and its mesh: not used"
            )
        # A step that isn't resumed from would be in the way when it is saved again.
        self._delete(s for s in notes if s not in common or s > (self.step or 0))

    def _notes(self, step: int) -> dict[str, Any]:
        try:
            return dict(self._manager.metadata(step).custom_metadata or {})
        except Exception:  # damaged: Orbax has many kinds
            return {}

    def due(self, step: int) -> bool:
        """Whether `step` is to be saved here."""
        return step % self._cfg.every == 0

    def restore(self, state: TrainState, buffers: Params) -> tuple[TrainState, Params, dict]:
        """(state, buffers, notes) at `step`.

        Raises:
            CheckpointError: if it is damaged, or holds something else.
        """
        file = self._folder / str(self.step)
        error = None
        try:
            args = self._args.Composite(state=self._args.PyTreeRestore())
            found = self._manager.restore(self.step, args=args)["state"]
        except Exception as one:
            error = one
        if checkpoint.any_process(error is not None):
            why = "another host could not read it" if error is None else checkpoint.reason(error)
            raise self._unusable(file, f"can't be read ({why})") from error
        checkpoint.check_format(self._chosen, file)
        tree, added = checkpoint.expected(state, buffers, checkpoint.flat(found))
        checkpoint.compare(checkpoint.flat(tree), checkpoint.flat(found), file)
        found = jax.tree.map(lambda like, x: jax.device_put(x, like.sharding), tree, found)
        wrong = checkpoint.altered(found, self._chosen["sums"])
        if wrong:
            raise self._unusable(file, f"was altered on some host: {wrong}")
        found, messages = checkpoint.converted(found, tree, file)
        self.messages += messages + checkpoint.changed_parts(tree, added, state)
        return *checkpoint.from_tree(found, added, state), self._chosen

    def _unusable(self, file, why: str) -> CheckpointError:
        return CheckpointError(
            f"the multi-tier checkpoint {file} {why}. Remove it on all hosts to resume from an "
            "older one or the workdir's"
        )

    def save(
        self, step: int, state: TrainState, buffers: Params, data: dict[int, dict], notes: dict
    ) -> None:
        """Saves; it is done when this returns (in memory, where the daemon's volume is).

        Raises:
            CheckpointError: if this one or the one before can't be written.
        """
        self.wait()
        tree = checkpoint.as_tree(state, buffers)
        notes = notes | checkpoint.describe(tree, data)
        with self._telling():
            self._manager.save(
                step,
                args=self._args.Composite(state=self._args.PyTreeSave(tree)),
                custom_metadata=self._about | notes,
                force=True,
            )
            self._delete(self._steps()[: -self._cfg.keep])

    def check(self) -> None:
        """Raises CheckpointError if a save in the background has failed."""
        with self._telling():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """`check`, once the save in the background is done."""
        with self._telling():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _telling(self):
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"a multi-tier checkpoint in {self._folder} could not be written: "
                f"{checkpoint.reason(error)}. Is the disk full? The same command resumes"
            ) from error

    def close(self) -> None:
        """Waits for the save in the background; if it fails, that is raised."""
        with self._telling():
            self._manager.close()

    def remove(self) -> None:
        """Removes this host's checkpoints, as the run has ended."""
        self.wait()
        self._delete(self._steps())

    def _steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def _delete(self, steps: Iterable[int]) -> None:
        """Removes steps of this host alone: Orbax's `delete` waits for the others, who may not have
        them, and stumbles over one that the daemon gave back, a link to a folder of its own."""
        for step in list(steps):
            folder = self._folder / str(step)
            if folder.is_symlink():
                folder.unlink()
            else:
                shutil.rmtree(folder, ignore_errors=True)
        self._manager.reload()


def _prepare_orbax() -> None:
    """Orbax reads an absl flag when it restores, but this program has none to parse; and it warns
    of things that are as they should be."""
    from absl import flags, logging

    logging.set_verbosity(logging.ERROR)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

"""Checkpoints on each host's own disk (or in its memory), between those in the workdir.

The workdir is often a bucket, where saves are slow and therefore rare. Here, every host often
writes the shards of its own devices to a folder of its own; after a restart, the run resumes from
the newest step of which all hosts have everything, local or in the workdir, bit for bit:

    config.local_checkpoints.folder=/mnt/local   a fast disk or tmpfs that outlives the process
    config.local_checkpoints.every=50            steps

    folder/<run>/<hosts, mesh>/host_<k>/<step>.shards   newest `keep`; removed when the run ends

A file counts if it has its final name (it is renamed once written) and the right checksum. Files
belong to one run, number of hosts and mesh; with another, the checkpoint of the workdir is used. A
host that has lost its disk gets its shards from replicas (mesh axes slice, data) that have the same
ones; if there is none, all hosts resume from the workdir. The log says which and why.

With `multi_tier`, the folder is that of GKE's multi-tier daemon, and Orbax writes there (see
`multi_tier`). Orbax's other emergency manager is not offered: with a replica axis of size 1 it
drops the local folder; on several slices, the hosts of the first save nothing locally; and the
notes beside a checkpoint (positions of the data, checksums) can't be read back.
"""

import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import re
import secrets
import shutil
import struct
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from metamorph_jax import distributed, files
from metamorph_jax.errors import CheckpointError, ConfigError
from metamorph_jax.train import checkpoint
from metamorph_jax.train.config import LocalConfig
from metamorph_jax.train.optim import Params
from metamorph_jax.train.state import TrainState

_REPLICAS = ("slice", "data")  # no leaf of the state is cut along these
_END = struct.Struct("<QI8s")  # bytes of the description, checksum of all before, magic
_MAGIC = b"mmjshard"


def open_local(cfg: LocalConfig, workdir: pathlib.Path, mesh: Mesh, newest: int | None):
    """The local checkpoints of a run: those of this module, or of GKE's daemon."""
    if not cfg.multi_tier:
        return LocalCheckpoints(cfg, workdir, mesh, newest)
    from metamorph_jax.train.multi_tier import MultiTierCheckpoints

    return MultiTierCheckpoints(cfg, _name_of_run(workdir), _layout(mesh), mesh, newest)


class LocalCheckpoints:
    """The local checkpoints of a run; without a folder it does nothing.

    All processes make it at the same time, and then agree on the step to resume from.

    Args:
        cfg: options.
        workdir: of the run; it gets a file that names the run.
        mesh: of the state.
        newest: step of the newest checkpoint in the workdir; older local ones don't count.

    Attributes:
        step: the step to resume from, or None: that of the workdir, if there is one.
        data_shards: number of data shards at that step.
        messages: about the choice, for the log.

    Raises:
        ConfigError: if a host can't write to the folder.
    """

    waits_for_others = False  # a save and `close`

    def __init__(self, cfg: LocalConfig, workdir: pathlib.Path, mesh: Mesh, newest: int | None):
        self.step: int | None = None
        self.data_shards: int | None = None
        self.messages: list[str] = []
        self._cfg, self._saving, self._newest = cfg, None, newest
        if not cfg.folder:
            return
        self._mesh = mesh
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._run = pathlib.Path(cfg.folder).expanduser().absolute() / _name_of_run(workdir)
        self._mine = self._run / _layout(mesh) / f"host_{jax.process_index()}"
        replicas = int(np.prod([mesh.shape[axis] for axis in _REPLICAS]))
        owners = [device.process_index for device in mesh.devices.flat]
        self._owners = np.array(owners).reshape(replicas, -1)  # the mesh has these axes first
        self._agree(distributed.gather(self._look()))

    def due(self, step: int) -> bool:
        """Whether `step` is to be saved here."""
        return bool(self._cfg.folder) and step % self._cfg.every == 0

    # ---- which step

    def _look(self) -> dict:
        """The files of this host, as JSON."""
        found = {"have": [], "bad": [], "others": [], "error": ""}
        self._stale: list[pathlib.Path] = []  # of an earlier start, not resumed from
        try:
            self._mine.mkdir(parents=True, exist_ok=True)
            for new in self._mine.glob("*.new"):
                new.unlink()
        except OSError as error:
            return found | {"error": str(error)}
        for step, file in _numbered(self._run, "*/host_*/*.shards"):
            if step <= (-1 if self._newest is None else self._newest):
                continue
            if file.parent != self._mine:
                if file.parents[1] != self._mine.parent:
                    found["others"].append([step, file.parents[1].name])
                    self._stale.append(file)
                continue
            try:
                about = _describe(file)
                digest = zlib.crc32(json.dumps(about["notes"], sort_keys=True).encode())
                found["have"].append([step, digest, about["alike"]])
            except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
                found["bad"].append([step, str(file), str(error)])
        return found

    def _agree(self, rows: list[dict]) -> None:
        """Chooses the newest complete step, from the files of all hosts; all choose the same."""
        for host, row in enumerate(rows):
            if row["error"]:
                raise ConfigError(f"config.local_checkpoints.folder: host {host}: {row['error']}")
            self.messages += [f"host {host}: the local checkpoint {file} is damaged ({why})"
                          for _, file, why in sorted(row["bad"])]  # fmt: skip
        others = max((tuple(one) for row in rows for one in row["others"]), default=None)
        if others is not None:
            self.messages.append(
                f"local checkpoints up to step {others[0]} are of {_readable(others[1])}, this run "
                f"has {_readable(_layout(self._mesh))}: not used"
            )
        everybody = set(range(len(rows)))
        steps = {tuple(one) for row in rows for one in row["have"]}
        for step, digest, alike in sorted(steps, reverse=True):
            has = {k for k, row in enumerate(rows) if [step, digest, alike] in row["have"]}
            whole = np.isin(self._owners, list(has))
            lack = ", ".join(map(str, sorted(everybody - has)))
            if whole.all() or (alike and whole.any(0).all()):
                self.step, self._has = step, has
                if lack:
                    taken = f"local checkpoint {step} from a replica"
                    self.messages.append(f"host {lack} takes {taken}")
                break
            self.messages.append(f"local checkpoint {step} isn't on all hosts: {lack} lacks it")
        limit = self._newest if self.step is None else self.step
        self._stale += [
            file for step, file in _numbered(self._mine, "*.shards") if step > (limit or 0)
        ]
        if self.step is None:
            if self.messages:
                rest = f"resuming from the workdir's, step {limit}"
                rest = "the run starts from the beginning" if limit is None else rest
                self.messages.append(f"no local checkpoint can be used: {rest}")
            return
        self.messages.append(f"local checkpoint {self.step} is newer than the workdir's "
                         f"({'none' if self._newest is None else self._newest})")  # fmt: skip
        self._about = None
        if jax.process_index() in self._has:
            self._about = _describe(self._file(self.step), check=False)
        first, shared = min(self._has), None
        if jax.process_index() == first:
            shapes = {name: leaf["shape"] for name, leaf in self._about["leaves"].items()}
            shared = self._about["notes"] | {"shapes": shapes}
        self._notes = distributed.gather(shared)[first]
        self.data_shards = len(self._notes["data"])

    def _file(self, step: int) -> pathlib.Path:
        return self._mine / f"{step}.shards"

    # ---- reading

    def restore(self, state: TrainState, buffers: Params) -> tuple[TrainState, Params, dict]:
        """(state, buffers, notes) at `step`.

        Args:
            state, buffers: arrays that say what is expected and where.

        Raises:
            CheckpointError: if it holds something else.
        """
        file, shapes = self._file(self.step), self._notes["shapes"]
        checkpoint.check_format(self._notes, file)
        tree, added = checkpoint.expected(state, buffers, shapes)
        names, checkpoint_tree = checkpoint.flat(tree), tree
        found = {k: types.SimpleNamespace(shape=shape) for k, shape in shapes.items()}
        checkpoint.compare(names, found, file)
        all_have = len(self._has) == jax.process_count()
        load = self._load if all_have else self._load_or_get
        tree = jax.tree.unflatten(
            jax.tree.structure(tree), [load(name, leaf) for name, leaf in names.items()]
        )
        wrong = checkpoint.altered(tree, self._notes["sums"])
        if wrong:
            raise CheckpointError(
                f"the local checkpoint {file} was altered on some host: {wrong}. Remove "
                f"{self._run} on all hosts to resume from the workdir's"
            )
        self.messages += checkpoint.changed_parts(checkpoint_tree, added, state)
        return *checkpoint.from_tree(tree, added, state), self._notes

    def _read(self, name: str, like: jax.Array, index: tuple) -> np.ndarray:
        leaf, file = self._about["leaves"][name], self._file(self.step)
        if leaf["dtype"] != like.dtype.name:
            raise CheckpointError(
                f"{file} has {leaf['dtype']} for {name}, this run needs {like.dtype.name}; undo "
                f"that change, or remove {self._run} on all hosts to resume from the workdir's"
            )
        where = _span(index, like.shape)
        shape = [end - start for start, end in where]
        at = {tuple(map(tuple, span)): offset for span, offset in leaf["at"]}
        if where not in at:
            raise CheckpointError(f"{file} lacks {name} at {where}; remove {self._run} everywhere")
        n = int(np.prod(shape))
        return np.fromfile(file, like.dtype, n, offset=at[where]).reshape(shape)

    def _load(self, name: str, like: jax.Array) -> jax.Array:
        places = like.sharding.addressable_devices_indices_map(like.shape)
        parts = [jax.device_put(self._read(name, like, i), d) for d, i in places.items()]
        return jax.make_array_from_single_device_arrays(like.shape, like.sharding, parts)

    def _load_or_get(self, name: str, like: jax.Array) -> jax.Array:
        """`_load` where some hosts lack their files: from the first replica that has a shard."""
        mesh, spec = like.sharding.mesh, like.sharding.spec
        first = np.isin(self._owners, list(self._has)).argmax(0)
        gives = np.arange(len(self._owners))[:, None] == first
        kind = np.dtype(f"uint{8 * like.dtype.itemsize}")
        parts, flags = [], []
        for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
            (at,) = np.argwhere(mesh.devices.reshape(gives.shape) == device)
            if gives[*at]:
                part = self._read(name, like, index).view(kind)
            else:
                part = np.zeros([b - a for a, b in _span(index, like.shape)], kind)
            parts.append(jax.device_put(part[None], device))
            flags.append(jax.device_put(np.full([1] * mesh.devices.ndim, gives[*at]), device))
        make = jax.make_array_from_single_device_arrays
        every = P(_REPLICAS, *spec)
        stacked = make((len(gives), *like.shape), NamedSharding(mesh, every), parts)
        flags = make(mesh.devices.shape, NamedSharding(mesh, P(*mesh.axis_names)), flags)
        return _taking(mesh, every, P(*spec), like.dtype)(stacked, flags)

    # ---- writing

    def save(
        self, step: int, state: TrainState, buffers: Params, data: dict[int, dict], notes: dict
    ) -> None:
        """Copies this host's shards, and writes them in the background.

        Args:
            step, state, buffers, data, notes: as of `checkpoint.Checkpoints.save`.

        Raises:
            CheckpointError: if this one or the one before can't be written.
        """
        self.wait()
        tree = checkpoint.as_tree(state, buffers)
        notes = notes | checkpoint.describe(tree, data)
        leaves = checkpoint.flat(tree)
        for leaf in leaves.values():
            for shard in leaf.addressable_shards:
                shard.data.copy_to_host_async()
        copied, alike = {}, True
        for name, leaf in leaves.items():
            cut = getattr(leaf.sharding, "spec", ())
            alike &= not any(axis in _REPLICAS for axis in jax.tree.leaves(tuple(cut)))
            spans = {_span(s.index, leaf.shape): s.data for s in leaf.addressable_shards}
            # A copy, as the next step donates the buffers.
            copied[name] = leaf, {span: np.array(part) for span, part in spans.items()}
        leaves = {
            name: {"dtype": leaf.dtype.name, "shape": leaf.shape, "parts": parts}
            for name, (leaf, parts) in copied.items()
        }
        about = {"step": step, "alike": alike, "notes": notes}
        self._saving = step, self._writer.submit(self._write, step, leaves, about)

    def _write(self, step: int, leaves: dict, about: dict) -> None:
        new, crc, offset, described = self._mine / f"{step}.new", 0, 0, {}
        try:
            with open(new, "wb") as file:
                for name, leaf in leaves.items():
                    at = []
                    for span, part in leaf.pop("parts").items():
                        raw = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
                        file.write(raw)
                        crc = zlib.crc32(raw, crc)
                        at.append([span, offset])
                        offset += raw.size
                    described[name] = leaf | {"at": at}
                text = json.dumps(about | {"leaves": described}).encode()
                file.write(text + _END.pack(len(text), zlib.crc32(text, crc), _MAGIC))
            os.replace(new, self._file(step))
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()  # a full disk of memory would slow the host down
            raise
        for stale in self._stale:
            if stale != self._file(step):
                stale.unlink(missing_ok=True)
        self._stale = []
        steps = sorted(step for step, _ in _numbered(self._mine, "*.shards"))
        for old in steps[: -self._cfg.keep]:
            self._file(old).unlink()

    def check(self) -> None:
        """Raises CheckpointError if a save in the background has failed."""
        if self._saving is not None and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """`check`, once the save in the background is done."""
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        try:
            saving.result()
        except Exception as error:
            raise CheckpointError(
                f"the local checkpoint {self._file(step)} could not be written: "
                f"{checkpoint.reason(error)}. Is the disk full? The same command resumes; "
                'config.local_checkpoints.folder="" does without local ones'
            ) from error

    def close(self) -> None:
        """Waits for the save in the background; if it fails, that is raised."""
        if self._cfg.folder:
            try:
                self.wait()
            finally:
                self._writer.shutdown(wait=False)

    def remove(self) -> None:
        """Removes this host's files, as the run has ended."""
        if self._cfg.folder:
            self.wait()
            shutil.rmtree(self._mine, ignore_errors=True)
            for folder in (self._mine.parent, self._run):
                with contextlib.suppress(OSError):
                    folder.rmdir()  # if no other process of this host uses it


def _name_of_run(workdir: pathlib.Path) -> str:
    """A name that a run in the same, emptied workdir wouldn't have."""
    name, file = "", workdir / "run_name"
    if jax.process_index() == 0:
        if not os.path.lexists(file):
            new = file.with_suffix(".new")
            new.write_text(f"{workdir.absolute().name}-{secrets.token_hex(4)}\n")
            new.replace(file)
        name = files.read_text(file).strip()
        if not re.fullmatch(r"[^/\0]{1,255}", name) or name in (".", ".."):
            raise CheckpointError(f"{file} does not hold the name of a run; remove it")
    return distributed.gather(name)[0]


def _numbered(folder: pathlib.Path, pattern: str) -> list[tuple[int, pathlib.Path]]:
    """(step, file) of the files there that a step names."""
    return [(int(f.stem), f) for f in folder.glob(pattern) if f.stem.isdecimal()]


def _layout(mesh: Mesh) -> str:
    """Folder name: the number of hosts, the mesh, and which device stands where in it."""
    axes = "_".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1) or "one-device"
    places = zlib.crc32(str([(d.process_index, d.id) for d in mesh.devices.flat]).encode())
    return f"hosts={jax.process_count()}_{axes}_{places:08x}"


def _readable(layout: str) -> str:
    return layout.rsplit("_", 1)[0].replace("_", ", ")


def _span(index: tuple, shape: tuple) -> tuple[tuple[int, int], ...]:
    """Slices as (start, end) of each dimension."""
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _describe(file: pathlib.Path, check: bool = True) -> dict:
    """The description at the end of a file.

    Raises:
        ValueError: if the file is truncated, or (with `check`) altered.
    """
    with open(file, "rb") as data:
        size = data.seek(0, os.SEEK_END)
        if size < _END.size:
            raise ValueError("truncated")
        data.seek(size - _END.size)
        n, crc, magic = _END.unpack(data.read())
        if magic != _MAGIC or n > size - _END.size:
            raise ValueError("truncated")
        if check:
            data.seek(0)
            left, found = size - _END.size, 0
            while left:
                block = data.read(min(left, 1 << 24))
                left, found = left - len(block), zlib.crc32(block, found)
            if found != crc:
                raise ValueError("altered")
        data.seek(size - _END.size - n)
        return json.loads(data.read(n))


@functools.cache
def _taking(mesh: Mesh, every: P, one: P, dtype):
    """(bits of every replica [R, ...], flag of each device) -> those of the flagged, everywhere."""

    boolean = dtype == np.bool_

    def take(bits, gives):
        chosen = jnp.where(gives.reshape(()), bits[0], 0).astype(jnp.uint32)
        bits = jax.lax.psum(chosen, _REPLICAS).astype(bits.dtype)
        return bits.astype(bool) if boolean else jax.lax.bitcast_convert_type(bits, dtype)

    specs = {"in_specs": (every, P(*mesh.axis_names)), "out_specs": one}
    return jax.jit(jax.shard_map(take, mesh=mesh, check_vma=False, **specs))

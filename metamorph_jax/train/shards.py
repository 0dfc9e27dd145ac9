"""Batches that do not depend on the number of hosts.

The rows of a batch come from data shards. Data shard k of n is a stream of its own: it reads
samples k, k + n, k + 2 n, … and packs them into its share of the rows. A process reads the data
shards that the rows of its devices come from:

    4 data shards, 8 rows   shard 0  shard 1  shard 2  shard 3
    batch                   r0  r1   r2  r3   r4  r5   r6  r7
    2 processes             |---- process 0 ----|---- process 1 ----|   each sample read by one
    8 processes             |p0 |p1 |p2 |p3 |p4 |p5 |p6 |p7 |           p0 and p1 both read shard 0

So any number of processes makes the same batches, and a checkpoint, which holds the position
of each data shard, can be read by any number. Processes that share rows (tensor parallel ones) read
the same data shards; a sample that can't be read is skipped by all that read its data shard.
"""

import itertools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from metamorph_jax import sharding
from metamorph_jax.errors import ConfigError, DataError
from metamorph_jax.recipe import DataStream, Shard


def my_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Which rows of a batch the devices of this process hold, int[n], in order."""
    where = sharding.batch_sharding(mesh).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index] for index in where.values()]))


class DataShards:
    """An iterator of this process's rows (numpy) of every batch.

    Args:
        make: opens the data of a shard.
        data_shards: how many there are.
        rows: of the whole batch.
        mine: which of them this process wants, ascending.

    Attributes:
        dry: all data shards that this process reads have ended; what follows is padding.

    Raises:
        ConfigError: if the rows don't divide over the data shards.
    """

    def __init__(
        self, make: Callable[[Shard], DataStream], data_shards: int, rows: int, mine: np.ndarray
    ):
        if rows % data_shards:
            raise ConfigError(f"config.batch_size {rows} isn't a multiple of {data_shards} shards")
        self.data_shards, self.each = data_shards, rows // data_shards
        self.numbers = sorted({int(row) // self.each for row in mine})
        self._data = [make(Shard(self.each, k, data_shards)) for k in self.numbers]
        starts = {k: i * self.each for i, k in enumerate(self.numbers)}
        self._take = np.array([starts[r // self.each] + r % self.each for r in mine.tolist()])
        self._last = [None] * len(self._data)
        self._ended = [False] * len(self._data)
        self.sources = self._data[0].sources

    @property
    def dry(self) -> bool:
        return all(self._ended)

    @property
    def skipped_by_shard(self) -> dict[str, dict[str, int]]:
        """Number of a data shard that this process reads -> its `DataStream.skipped`."""
        pairs = zip(self.numbers, self._data, strict=True)
        return {str(k): dict(data.skipped) for k, data in pairs}

    @property
    def skipped(self) -> dict[str, int]:
        """Bad samples so far of the data shards that this process reads, by reason."""
        total: dict[str, int] = {}
        for data in self._data:
            for reason, n in data.skipped.items():
                total[reason] = total.get(reason, 0) + n
        return total

    def __iter__(self):
        return self

    def __next__(self):
        """The next rows. After the end of all data shards: StopIteration, or, with several
        processes (others may have samples left), padding."""
        for i, data in enumerate(self._data):
            if self._ended[i]:
                continue
            try:
                self._last[i] = next(data)
            except StopIteration:
                self._ended[i] = True
                if self._last[i] is not None:
                    self._last[i] = self._last[i].blank()
        if self.dry and jax.process_count() == 1:
            raise StopIteration
        if any(last is None for last in self._last):
            found = next((last for last in self._last if last is not None), None)
            if found is None:
                raise DataError("the data are too few for one batch on every host")
            self._last = [found.blank() if last is None else last for last in self._last]
        if len(self._last) == 1 and len(self._take) == self.each:
            return self._last[0]
        return jax.tree.map(lambda *x: np.concatenate(x)[self._take], *self._last)

    def sample_names(self) -> Callable[[], list]:
        """A function that names the samples in each row of the last batch."""
        rows = [data.sample_names() for data in self._data]
        ended, each, take = tuple(self._ended), self.each, self._take

        def name():
            named = [[[]] * each if end else one() for one, end in zip(rows, ended, strict=True)]
            flat = [row for n in named for row in [*n, *[[]] * (each - len(n))]]
            return [flat[i] for i in take]

        return name

    def get_state(self) -> dict[int, dict]:
        """Data shard -> its state, of the data shards that this process reads."""
        return {k: data.get_state() for k, data in zip(self.numbers, self._data, strict=True)}

    def set_state(self, states) -> None:
        """Continues from these states (of all data shards, or of those read here)."""
        for k, data in zip(self.numbers, self._data, strict=True):
            data.set_state(states[k])
        self._ended = [False] * len(self._data)

    def close(self) -> None:
        for data in self._data:
            data.close()


def open_shards(
    make: Callable[[Shard], DataStream], data_shards: int, rows: int, mine: np.ndarray
) -> DataShards:
    """`DataShards`; of several processes, the first opens its data before the others do.

    So the first one fills feature caches, and the others find them complete.
    """
    if jax.process_count() == 1:
        return DataShards(make, data_shards, rows, mine)
    from jax.experimental import multihost_utils

    data = DataShards(make, data_shards, rows, mine) if jax.process_index() == 0 else None
    multihost_utils.sync_global_devices("the first process has opened its data")
    return data or DataShards(make, data_shards, rows, mine)


def to_devices(batch, mesh: Mesh, rows: int):
    """A batch of this process's rows (numpy) as arrays of all `rows` over all devices."""
    where = sharding.batch_sharding(mesh)

    def one(x):
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(where, x, (rows, *x.shape[1:]))

    return jax.tree.map(one, batch)


def peek(data: DataShards, n: int, mesh: Mesh, rows: int) -> list:
    """The first n batches, whole on every process, without moving the iterator."""
    if not n:
        return []
    before = data.get_state()
    batches = list(itertools.islice(data, n))
    data.set_state(before)
    if not batches:
        return []  # the loop will find that there are none, and say why
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        batches = [to_devices(batch, mesh, rows) for batch in batches]
        batches = multihost_utils.process_allgather(batches, tiled=True)
    return batches

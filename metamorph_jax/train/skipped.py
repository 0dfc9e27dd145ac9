"""What a run skips of its data, or cuts: counts by source and reason, over all processes."""

from collections.abc import Callable, Mapping

from metamorph_jax import distributed
from metamorph_jax.data.packing import USED
from metamorph_jax.errors import DataError
from metamorph_jax.files import shown
from metamorph_jax.train.shards import DataShards


class Skipped:
    """Reports the counts of a run's data; all processes have to call it at the same steps.

    Args:
        data: of this process.
        say: prints a line.
        what: the counts are of, in this line.
    """

    def __init__(self, data: DataShards, say: Callable[[str], None], what: str = "data so far"):
        self._data, self._say, self._what = data, say, what
        self._last: dict[str, int] = {}

    def report(self) -> dict[str, float]:
        """The counts so far as metrics, "data/SOURCE/REASON"; prints them if they have changed."""
        counts = self.counts()
        if counts != self._last:
            self._last = counts
            self._say(f"{self._what}: {summary(counts)}")
        return {f"data/{name}": float(n) for name, n in sorted(counts.items())}

    def counts(self) -> dict[str, int]:
        """ "source/reason" -> number of samples (of images, for what is wrong with single ones)."""
        shards: dict[str, Mapping[str, int]] = {}
        for process in distributed.gather(self._data.skipped_by_shard):
            shards |= process  # processes that read the same data shard count the same
        total: dict[str, int] = {}
        for shard in shards.values():
            for name, n in shard.items():
                total[name] = total.get(name, 0) + n
        return total

    def ended(self, step: int, steps: int) -> str:
        """Why the data ended after `step` of `steps` steps.

        Raises:
            DataError: there was not a single step: nothing in the data can be used.
        """
        why = summary(self.counts())
        if step == 0:
            raise DataError(
                f"no sample of config.data.sources can be used ({why}); `metamorph data check` "
                "says what is wrong with each"
            )
        return (
            f"the data ended after {step} of {steps} steps: all of config.data.order.epochs are "
            f"read ({why})"
        )


def summary(counts: Mapping[str, int]) -> str:
    """The counts in words, skipped samples and used ones apart."""
    said = []
    for used, verb in ((False, "skipped"), (True, "used, though")):
        found = {n: k for n, k in counts.items() if (n.rpartition("/")[2] in USED) == used}
        if found:
            named = ", ".join(f"{shown(name)} {n}" for name, n in sorted(found.items()))
            said.append(f"{verb} {named}" if used else f"{verb} {sum(found.values())}: {named}")
    return "; ".join(said) or "nothing skipped"

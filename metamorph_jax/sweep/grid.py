"""The runs of a sweep, as `sweep(add)` in a config file lists them.

    def sweep(add):
        add.product({"optim.learning_rate": [1e-4, 3e-4], "model.visual_coef": [1.0, 8.0]})  # 4
        add.zip({"batch_size": [64, 128], "optim.learning_rate": [1e-4, 2e-4]})              # 2
        add.random(8, {"optim.learning_rate": add.log(1e-5, 1e-3), "seed": [0, 1]}, seed=0)  # 8
        add({"optim.schedule": "constant"}, seed=3)                                          # 1

Keys are those of `--config.KEY`. `add.config` is the config with the size and the overrides of the
command line: `add.config.optim.learning_rate * 2`. A run that has been added already is not added
again.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from metamorph_jax import config as configs
from metamorph_jax.errors import ConfigError

Values = dict[str, Any]  # dotted key -> value


@dataclasses.dataclass(frozen=True)
class Range:
    """What `random` draws from: uniformly between two numbers, or uniformly in their logarithm."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self):
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ConfigError(f"sweep: there is no range from {self.low} to {self.high}")

    def draw(self, rng: random.Random) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        x = rng.uniform(low, high)
        return float(f"{math.exp(x) if self.log else x:.4g}")  # readable, and exact as text


class Add:
    """The argument of `sweep`: collects the runs in `runs`, in order and without duplicates.

    Args:
        config: the config that the runs change.
    """

    uniform = Range

    def __init__(self, config):
        self.config = config
        self.runs: list[Values] = []

    @staticmethod
    def log(low: float, high: float) -> Range:
        return Range(low, high, log=True)

    def __call__(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Adds one run: dotted key -> value."""
        values = dict(values or {}) | more
        if values not in self.runs:
            self.runs.append(values)

    def product(self, table: Mapping[str, Sequence]) -> None:
        """Adds a run for each combination of values; the last key changes fastest."""
        for values in itertools.product(*_lists(table)):
            self(dict(zip(table, values, strict=True)))

    def zip(self, table: Mapping[str, Sequence]) -> None:
        """Adds a run with the first value of each key, one with the second values, and so on."""
        lists = _lists(table)
        if len({len(x) for x in lists}) > 1:
            sizes = ", ".join(f"{k}: {len(x)}" for k, x in zip(table, lists, strict=True))
            raise ConfigError(f"sweep: zip needs equally many values of every key ({sizes})")
        for values in zip(*lists, strict=True):
            self(dict(zip(table, values, strict=True)))

    def random(self, n: int, table: Mapping[str, Sequence | Range], seed: int = 0) -> None:
        """Adds n runs with values drawn from lists and ranges.

        Each key has its own random numbers, so that the first runs are the same for a larger n.
        """
        rngs = {key: random.Random(f"{seed} {key}") for key in table}
        for _ in range(n):
            self({
                key: x.draw(rngs[key]) if isinstance(x, Range) else rngs[key].choice(list(x))
                for key, x in table.items()
            })  # fmt: skip


def _lists(table: Mapping[str, Sequence]) -> list[list]:
    for key, values in table.items():
        if isinstance(values, str | Range) or not hasattr(values, "__iter__"):
            raise ConfigError(f"sweep: {key} needs a list of values, not {values!r}")
    return [list(values) for values in table.values()]


def expand(sweep: Callable, spec: str, overrides: Mapping[str, Any]) -> list[tuple[Values, Any]]:
    """(values, config with these values) of every run.

    Args:
        sweep: function of the config file.
        spec: `--config` of the command.
        overrides: `--config.KEY` of the command, for all runs.

    Raises:
        ConfigError: a run sets an option that does not exist or that `overrides` sets, or gives a
            value of the wrong type.
    """
    add = Add(configs.load_config(spec, overrides))
    sweep(add)
    if not add.runs:
        raise ConfigError(f"{spec}: sweep(add) adds no run")
    made = []
    for number, values in enumerate(add.runs, 1):
        both = values.keys() & overrides.keys()
        if both:
            raise ConfigError(f"--config.{min(both)} is given, but the sweep changes it")
        try:
            made.append((values, configs.load_config(spec, {**overrides, **values})))
        except ConfigError as error:
            raise ConfigError(f"run {number} of the sweep: {error}") from error
    return made


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """The same values as `--config.KEY=VALUE`."""
    return [f"--config.{k}={v if isinstance(v, str) else repr(v)}" for k, v in values.items()]

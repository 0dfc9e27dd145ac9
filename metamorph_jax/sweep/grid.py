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
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from metamorph_jax import config as configs
from metamorph_jax.errors import ConfigError

Values = dict[str, Any]  # dotted key -> value
MOST = 1000  # runs of one sweep


@dataclasses.dataclass(frozen=True)
class Range:
    """What `random` draws from: uniformly between two numbers, or uniformly in their logarithm."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self):
        finite = math.isfinite(self.low) and math.isfinite(self.high)
        if not finite or not self.low < self.high or (self.log and self.low <= 0):
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
        self._runs: dict[str, Values] = {}  # by their identity

    @property
    def runs(self) -> list[Values]:
        return list(self._runs.values())

    @staticmethod
    def log(low: float, high: float) -> Range:
        return Range(low, high, log=True)

    def __call__(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Adds one run: dotted key -> value.

        Raises:
            ConfigError: a value can't be given on a command line, or there are too many runs.
        """
        values = {_key(k): plain(v, k) for k, v in (dict(values or {}) | more).items()}
        self._runs.setdefault(identity(values), values)
        if len(self._runs) > MOST:
            raise ConfigError(f"sweep: more than {MOST:,} runs")

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
        if not 0 <= n <= MOST:
            raise ConfigError(f"sweep: random takes 0 to {MOST:,} runs, not {n}")
        choices = {k: x for k, x in table.items() if not isinstance(x, Range)}
        table = dict(table) | dict(zip(choices, _lists(choices), strict=True))
        rngs = {key: random.Random(f"{seed} {key}") for key in table}
        for _ in range(n):
            self({
                key: x.draw(rngs[key]) if isinstance(x, Range) else rngs[key].choice(x)
                for key, x in table.items()
            })  # fmt: skip


def _lists(table: Mapping[str, Sequence]) -> list[list]:
    """The values of each key; they may come from a generator."""
    lists = []
    for key, values in table.items():
        if isinstance(values, str | Range | Mapping) or not hasattr(values, "__iter__"):
            raise ConfigError(f"sweep: {key} needs a list of values, not {values!r}")
        lists.append(list(itertools.islice(values, MOST + 1)))
        if not 0 < len(lists[-1]) <= MOST:
            raise ConfigError(f"sweep: {key} needs 1 to {MOST:,} values")
    return lists


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise ConfigError(f"sweep: {key!r} is not the name of an option")
    return key


def plain(value: Any, key: str) -> Any:
    """A value as Python's own types: those of numpy and JAX, which print differently, are turned.

    Raises:
        ConfigError: it is of another type, or text that no command line can hold.
    """
    if isinstance(value, configs.ConfigDict):
        value = value.to_dict()
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {_key(k): plain(v, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, key) for v in value]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"sweep: {key} is {value!r}, which is not Unicode") from None
        if "\0" in value:
            raise ConfigError(f"sweep: {key} is {value!r}, which no command line can hold")
    elif value is not None and not isinstance(value, bool | int | float):
        raise ConfigError(
            f"sweep: {key} is of type {type(value).__name__}; numbers, text, true and false, None, "
            "and lists and tables of them can be given to a run"
        )
    return value


def identity(values: Values) -> str:
    """What two runs with the same settings share."""
    return json.dumps(values, sort_keys=True)


def expand(sweep: Callable, spec: str, overrides: Mapping[str, Any]) -> list[tuple[Values, Any]]:
    """(values, config with these values) of every run.

    Args:
        sweep: function of the config file.
        spec: `--config` of the command.
        overrides: `--config.KEY` of the command, for all runs.

    Raises:
        ConfigError: `sweep` fails, or a run sets an option that does not exist or that `overrides`
            sets, or gives a value of the wrong type or one that is another one as text.
    """
    add = Add(configs.load_config(spec, overrides))
    configs.call(spec.partition(":")[0], sweep, add)
    if not add.runs:
        raise ConfigError(f"{spec}: sweep(add) adds no run")
    made = []
    for number, values in enumerate(add.runs, 1):
        both = values.keys() & overrides.keys()
        if both:
            raise ConfigError(f"--config.{min(both)} is given, but the sweep changes it")
        try:
            config = configs.load_config(spec, {**overrides, **values})
            told = configs.load_config(spec, {**overrides, **as_text(values)})
        except ConfigError as error:
            raise ConfigError(f"run {number} of the sweep: {error}") from error
        if repr(told.to_dict()) != repr(config.to_dict()):
            raise ConfigError(
                f"run {number} of the sweep: {values!r} would be other values on a command line"
            )
        made.append((values, config))
    return made


def as_text(values: Mapping[str, Any]) -> dict[str, str]:
    """Key -> value as it is written on a command line."""
    return {k: v if isinstance(v, str) else repr(v) for k, v in values.items()}


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """The same values as `--config.KEY=VALUE`."""
    return [f"--config.{k}={v}" for k, v in as_text(values).items()]

"""What the rest of the program may ask of a recipe, its model, its data and its generator.

A recipe is a module (a folder in `metamorph_jax/recipes/`, or any importable module that a config
names) with the names of `Recipe` at its top. Nothing else is ever asked of one: training, planning,
generation, evaluation and conversion use these protocols only. `docs/recipes.md` walks through
writing one, and `tests/recipes/toy.py` is the smallest that fulfils all of it.
"""

import dataclasses
import importlib
import pathlib
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import jax

from metamorph_jax.errors import ConfigError
from metamorph_jax.files import shown
from metamorph_jax.flops import Work


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of the streams that the rows of a batch are packed from (`train/shards.py`).

    Attributes:
        rows: of every batch that come from this stream.
        index, count: it reads samples index, index + count, index + 2 count, …
    """

    rows: int
    index: int = 0
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a model made of one sample of the data, for people to look at.

    Attributes:
        name: of the sample.
        text: what was asked, what the data answer, what the model answered: label -> text.
        images: label -> uint8[h, w, 3].
    """

    name: str
    text: Mapping[str, str]
    images: Mapping[str, Any]


@runtime_checkable
class DataStream(Protocol):
    """An iterator of batches (numpy), each a pytree that counts itself (`types.Batch`).

    Attributes:
        sources: names of the data sources.
        skipped: samples that could not be used so far, "source/reason" -> number. Those with a
            reason of `data.packing.USED` were used, but not as they are.
        samples: random access to the samples that batches are made of, for `metamorph data check`
            (`data.stream.SampleStream`), or None where batches are not made of conversations.
    """

    sources: Sequence[str]
    skipped: Mapping[str, int]
    samples: Any

    def __next__(self): ...

    def get_state(self) -> dict:
        """JSON-able; `set_state` with it makes the next batch the same again, bit for bit."""
        ...

    def set_state(self, state: dict) -> None:
        """Raises ValueError if the data changed since the state was taken."""
        ...

    def sample_names(self) -> Callable[[], list[list[str]]]:
        """A function that names the samples in each row of the batch that came last."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Model(Protocol):
    """An NNX module that trains.

    Attributes:
        loss_weights: name of a loss -> its weight in the total. The total is the sum over losses of
            weight * loss_sums / loss_counts, both summed over the whole batch.
    """

    loss_weights: Mapping[str, float]

    def loss_counts(self, batch) -> dict[str, jax.Array]:
        """How many terms each loss is a sum of."""
        ...

    def loss_sums(self, batch, key: jax.Array) -> tuple[dict[str, jax.Array], dict]:
        """(loss -> sum over its terms, metric -> (numerator, denominator)).

        A metric "NAME/SOURCE" belongs to one data source.
        """
        ...

    def param_group(self, path: tuple[str, ...]) -> str:
        """Part that a parameter belongs to: for gradient norms, sizes and tables."""
        ...

    def work(self, batch) -> tuple[Work, ...]:
        """The matrix products of a training step on this batch (shapes are enough)."""
        ...


class Recipe(Protocol):
    """The names at the top of a recipe's module.

    Attributes:
        Config: frozen dataclass of `config.model`, with defaults for all fields. That of a recipe
            which generates has the fields `weights` and `tokenizer`, specs of the whole model's
            weights and of its tokenizer, which `metamorph generate --checkpoint` sets.
        Data: frozen dataclass of `config.data`.
        STAGES: stage -> (Config -> regular expression that the whole dotted name of a parameter
            must match to be trained). Packed weights (`nn/quantized.py`) are never trained.
        FAMILIES: published checkpoints that it reads and writes (`Family`), and how its runs are
            written (`RunForm`), see `convert/families.py`.
        KINDS: kinds of records that it brings, besides those of `data/sources/kinds.py`: name ->
            `Kind`.
    """

    Config: type
    Data: type
    STAGES: Mapping[str, Callable[[Any], str]]
    FAMILIES: Sequence[Any]
    KINDS: Mapping[str, Any]

    def create(self, cfg, rngs) -> Model:
        """A model with random weights; works under `nnx.eval_shape`."""
        ...

    def load_pretrained(self, model: Model, cfg) -> None:
        """Fills the model in place as the weight specs of the config say.

        Its leaves may be shapes without values (`models/build.py`). What is left open gets its
        random values afterwards.
        """
        ...

    def initialize(self, model: Model, batches: Sequence) -> None:
        """Adapts fresh weights to these first batches, in place; may do nothing."""
        ...

    def open_data(self, data, cfg, shard: Shard) -> DataStream:
        """The batches of one shard, from `config.data` as a `Data`.

        Feature caches are filled on the way. Where there are several processes, the first one opens
        its data before the others do.
        """
        ...

    def batch_spec(self, data, cfg, rows: int):
        """Shapes of a batch of so many rows, from the configs alone."""
        ...

    def generator(self, model: Model, cfg, data, **options):
        """A `sampling.generator.Generator` over this model, or None if it does not generate."""
        ...

    def show(self, model: Model, cfg, data, count: int) -> Sequence[Shown]:
        """What the model makes of the first `count` samples of `config.data`, always the same."""
        ...


NAMES = (
    *("Config", "Data", "STAGES", "FAMILIES", "KINDS", "create", "load_pretrained", "initialize"),
    *("open_data", "batch_spec", "generator", "show"),
)


def installed() -> list[str]:
    """Names of the recipes in `metamorph_jax.recipes`."""
    folder = pathlib.Path(__file__).with_name("recipes")
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]))


_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def find(name: str) -> Recipe | ModuleType:
    """The recipe of this name in `metamorph_jax.recipes`, or the module `package.module`.

    The name comes from the user's command line or config file: other modules are imported, which
    runs their code. A name that comes out of a file goes to `find_saved`.

    Raises:
        ConfigError: there is none, or the module lacks some of a recipe's names, or a module that
            it needs.
    """
    given, known = shown(repr(name), 80), ", ".join(installed())
    none = ConfigError(f"config.recipe {given} is none of {known}, nor an importable module")
    if not isinstance(name, str) or not _MODULE.fullmatch(name):
        raise none
    module = name if "." in name else f"metamorph_jax.recipes.{name}"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"config.recipe {name!r} needs the module {error.name}, which is not installed"
            ) from error
        raise none from error
    missing = [n for n in NAMES if n not in vars(found)]
    if missing:
        raise ConfigError(f"config.recipe {name!r}: {module} is not a recipe, it lacks "
                          f"{', '.join(missing)}")  # fmt: skip
    return found


def find_saved(name: str, file: str | pathlib.Path) -> Recipe | ModuleType:
    """The recipe that a file names, as the config.json of a run does. No module is imported for it.

    Raises:
        ConfigError: it is none of those in `metamorph_jax.recipes`, nor a module that the user has
            named: on the command line (`--recipe`), or in a config file.
    """
    if name in installed() or (isinstance(name, str) and "." in name and name in sys.modules):
        return find(name)
    asked = f"--recipe {name}" if isinstance(name, str) and _MODULE.fullmatch(name) else ""
    raise ConfigError(
        f"{file} names the recipe {shown(repr(name), 80)}, which is none of "
        f"{', '.join(installed())}"
        + (f"; if you know that module and trust it, add {asked}" if asked and "." in name else "")
    )

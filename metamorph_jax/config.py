"""From config files to ConfigDicts, and from those to frozen dataclasses.

A config file returns a ConfigDict with every option of a run (`table`), the command line changes
some of them (`load_config`), and `build` makes the dataclasses. What an option may be follows from
the type that its dataclass declares, see `options`.
"""

import dataclasses
import importlib
import importlib.util
import math
import numbers
import pathlib
import traceback
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from metamorph_jax import files, options
from metamorph_jax.errors import ConfigError

T = TypeVar("T")


def narrowed(cls: type[T], **types_: type) -> type[T]:
    """The dataclass `cls`, with these dataclasses as the types of some of its fields."""
    made = [
        (name, type_, dataclasses.field(default_factory=dict, kw_only=True))
        for name, type_ in types_.items()
    ]
    return dataclasses.make_dataclass(cls.__name__, made, bases=(cls,), frozen=True)


def build(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Makes the frozen dataclass `cls` from nested tables.

    Args:
        cls: a dataclass; `options` explains the types of its fields.
        values: ConfigDict or dict.
        where: dotted path, for messages.

    Returns:
        An instance of `cls`.

    Raises:
        ConfigError: an option does not exist (the nearest one is suggested), is missing, is of the
            wrong type, or is refused by the dataclass.
    """
    return _make(cls, options.complete(cls, values, where), where)


def replaced(instance: T, changes: Mapping[str, Any], where: str) -> T:
    """The dataclass `instance` with what a table with any keys of a config changes in it.

    Raises:
        ValueError: a key is not a field, or a value is of the wrong type.
    """
    values = {name: getattr(instance, name) for name in options.fields(type(instance))}
    try:
        return build(type(instance), values | dict(changes), where)
    except ConfigError as error:  # the dataclass that has the table knows where it is
        raise ValueError(str(error)) from error


def check_known(name: str, value: str, known: Iterable[str]) -> None:
    """Raises ValueError where an option is none of the known ones."""
    if value not in known:
        raise ValueError(f"{name} {value!r} is none of {', '.join(known)}")


def check_numbers(cfg, counts: str = "", positive: str = "") -> None:
    """Raises for sizes and constants with which nothing can be computed.

    Args:
        cfg: a dataclass.
        counts: its fields that are whole numbers of at least 1, or tuples of them, separated by
            spaces.
        positive: its fields that are finite numbers above 0, likewise.

    Raises:
        ConfigError: naming every such field and its value.
    """
    number = lambda x, kind: isinstance(x, kind) and not isinstance(x, bool)  # noqa: E731
    whole = lambda x: number(x, numbers.Integral) and x >= 1  # noqa: E731
    real = lambda x: number(x, numbers.Real) and 0 < x < math.inf  # noqa: E731
    wrong = []
    for names, good, words in (
        (counts, whole, "a whole number of at least 1"),
        (positive, real, "a number above 0"),
    ):
        for name in names.split():
            value = getattr(cfg, name)
            if not all(map(good, value if isinstance(value, tuple) else (value,))):
                wrong.append(f"{name} {value!r} is not {words}")
    if wrong:
        raise ConfigError(f"{type(cfg).__name__}: {'; '.join(wrong)}")


def _make(hint, value, where: str):
    """The dataclass, or tuple or dict of dataclasses, of complete tables."""
    if value is None:
        return None
    entries = options.entries_of(hint)
    if classes := options.classes_of(hint):
        cls = options.choose(classes, value, where)
        return _make_one(cls, value, where)
    if entries is None or not options.classes_of(entries):
        return value
    if isinstance(value, tuple):
        return tuple(_make(entries, each, f"{where}[{i}]") for i, each in enumerate(value))
    made = {key: _make(entries, each, f"{where}.{key}") for key, each in value.items()}
    return made if typing.get_origin(options.members(hint)[0]) is dict else tuple(made.values())


def _make_one(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    hints = options.fields(cls)
    missing = [name for name in hints if name not in table]  # required ones
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    made = {name: _make(hints[name], each, f"{where}.{name}") for name, each in table.items()}
    try:
        return cls(**made)
    except ConfigError:
        raise
    except ValueError as error:  # from the dataclass, which checks itself
        raise ConfigError(f"{where}: {error}") from error


# ---- config files


def table(cls: type, values: Mapping[str, Any]) -> ConfigDict:
    """A ConfigDict with every option of the dataclass `cls`: `values`, and defaults elsewhere.

    It remembers `cls`, so that `load_config` knows the declared types.

    Raises:
        ConfigError: as `options.complete`.
    """
    return _config_dict(options.complete(cls, values), cls)


def _config_dict(values: Mapping[str, Any], cls: type = dict) -> ConfigDict:
    made = ConfigDict(sort_keys=False)  # the order of sources and of groups has a meaning
    for key, value in values.items():
        made[key] = _config_dict(value) if isinstance(value, Mapping) else value
    object.__setattr__(made, "_declared", cls)
    return made


def declared(config: ConfigDict) -> type:
    """The dataclass of `table`; `dict` for other ConfigDicts, in which any key may be set."""
    return vars(config).get("_declared", dict)


def load_config(spec: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Loads `path/to/config.py[:arg]` as its `get_config(arg)` returns it, with overrides applied.

    Args:
        spec: file; what follows the first colon is given to `get_config`.
        overrides: dotted key -> value, see `options.change`.

    Returns:
        A locked ConfigDict.

    Raises:
        ConfigError: the file is not a config or fails (the message names file and line), an option
            does not exist, or a value is of the wrong type.
    """
    path, _, arg = str(spec).partition(":")
    module = load_module(path)
    if not callable(vars(module).get("get_config")):
        raise ConfigError(f"{path} has no get_config(arg)")
    config = call(path, module.get_config, *[arg] if arg else [])
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config returned {type(config).__name__}, not a ConfigDict")
    cls = declared(config)
    values = call(path, options.complete, cls, config)
    return _config_dict(options.change(cls, values, overrides or {}), cls).lock()


def load_module(path: str | pathlib.Path) -> types.ModuleType:
    """A Python file as a module.

    Raises:
        ConfigError: there is no such file, or running it fails.
    """
    file = pathlib.Path(path)
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if not file.is_file():
        raise ConfigError(f"no config file {path}")
    if spec is None:
        raise ConfigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    call(path, spec.loader.exec_module, module)
    return module


def find_class(address: str, where: str):
    """What "package.module:Class" names; the module is imported.

    Args:
        where: for messages.

    Raises:
        ConfigError: there is none.
    """
    module, _, attribute = address.partition(":")
    try:
        found = vars(importlib.import_module(module)).get(attribute)
    except ModuleNotFoundError as error:
        if error.name and not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, but something that it needs is not
        raise ConfigError(
            f"{where}: no module {files.shown(module)} ({files.shown(address)!r})"
        ) from error
    if found is None:
        raise ConfigError(f"{where}: {files.shown(address)!r} must be package.module:Class")
    return found


def call(path: str | pathlib.Path, function, *args):
    """Calls something of a config file; any error becomes one line that names the file."""
    try:
        return function(*args)
    except ConfigError as error:
        known = str(path) in str(error)
        raise error if known else ConfigError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__)
                 if pathlib.Path(f.filename) == pathlib.Path(path).absolute()]  # fmt: skip
        if isinstance(error, SyntaxError):
            lines = [error.lineno]
        at = f"{path}, line {lines[-1]}" if lines else path
        raise ConfigError(f"{at}: {type(error).__name__}: {files.shown(error)}") from error

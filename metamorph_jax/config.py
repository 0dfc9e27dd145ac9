"""From ml_collections configs to frozen dataclasses: an unknown or misspelt key is an error."""

import dataclasses
import difflib
import importlib.util
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from metamorph_jax.errors import ConfigError

T = TypeVar("T")



def build(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Makes the frozen dataclass `cls` from a (nested) mapping.

    Args:
        cls: a dataclass; fields that are dataclasses themselves take nested mappings, a field
            `tuple[X, ...]` of dataclasses takes a list of mappings or a mapping name -> mapping.
        values: ConfigDict or dict. `None` values stay `None`.
        where: dotted path, for messages.

    Returns:
        An instance of `cls`.

    Raises:
        ConfigError: on unknown keys (with the nearest right one), missing keys or wrong types.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {where}.{near[0]}?" if near else f"; known: {', '.join(fields)}"
            raise ConfigError(f"{where}.{key} is not an option{hint}")
    made = {k: _convert(hints[k], values[k], f"{where}.{k}") for k in values}
    missing = [
        name
        for name, f in fields.items()
        if name not in made
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    try:
        return cls(**made)
    except ConfigError:
        raise
    except ValueError as error:  # a dataclass that checks itself
        raise ConfigError(f"{where}: {error}") from error


def _convert(hint, value, where: str):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        errors = []
        for kind in kinds:
            try:
                return _convert(kind, value, where)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if dataclasses.is_dataclass(hint):
        if dataclasses.is_dataclass(value):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table of options, not {value!r}")
        return build(hint, value, where)
    if origin is tuple:
        if isinstance(value, Mapping):
            value = [{"name": k, **v} for k, v in value.items()]
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ConfigError(f"{where} must be a list, not {value!r}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(
            _convert(k, v, f"{where}[{i}]")
            for i, (k, v) in enumerate(zip(kinds, value))  # noqa: B905
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is dict or hint is dict:
        return dict(value)
    if isinstance(hint, type) and hint is not object:
        if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
            raise ConfigError(f"{where} must be {hint.__name__}, not {value!r}")
    return value


def load_config(spec: str, overrides: Mapping[str, Any] | None = None):
    """Loads `path/to/config.py[:arg]` as its `get_config(arg)` returns it, with overrides applied.

    Args:
        spec: file path, with what stands behind the first colon given to `get_config`.
        overrides: dotted key -> value; strings are parsed to the type of the value they replace.

    Returns:
        A locked ml_collections ConfigDict.
    """
    path, _, arg = str(spec).partition(":")
    module = load_module(path)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no get_config(arg)")
    config = module.get_config(arg) if arg else module.get_config()
    config.lock()
    for key, value in (overrides or {}).items():
        set_dotted(config, key, value)
    return config


def load_module(path: str | pathlib.Path):
    """The config file as a Python module."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise ConfigError(f"no config file {path}")
    module_spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def set_dotted(config, key: str, value) -> None:
    """Sets `config.a.b = value`; text is parsed to the kind of the value that stands there."""
    import ast

    parts = key.split(".")
    node = config
    for i, part in enumerate(parts):
        if part not in node:
            near = difflib.get_close_matches(part, list(node), n=1)
            hint = f"; did you mean {'.'.join([*parts[:i], near[0]])}?" if near else ""
            raise ConfigError(f"--config.{key}: no option {part!r}{hint}")
        if i < len(parts) - 1:
            node = node[part]
    old = node[parts[-1]]
    if isinstance(value, str) and not isinstance(old, str):
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        except (ValueError, SyntaxError):
            if old is not None:
                kind = type(old).__name__
                raise ConfigError(f"--config.{key} must be {kind}, not {value!r}") from None
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    try:
        node[parts[-1]] = value
    except TypeError as error:
        raise ConfigError(f"--config.{key}: {error}") from error

"""Options: dataclasses declare which ones exist, nested dicts ("tables") hold their values.

What a value may be follows from the declared type of its field:

    int, float, bool, str, tuple[float, ...]   one value
    X (a dataclass)                            a table with a key for each field of X
    X | None                                   a table or None; setting one of its options makes
                                               the table, with defaults for the other options
    X | Y (two dataclasses)                    a table of the first of them that has all given keys
    tuple[X, ...] or dict[str, X]              a table of tables: any name -> the fields of X; if X
                                               has a field `name`, that is the key
    dict or dict[str, float]                   a table with any keys

A complete table has every option, of the declared type.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from metamorph_jax.errors import ConfigError

# ---- declared types


@functools.cache
def fields(cls: type) -> dict[str, Any]:
    """Field -> declared type of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def members(hint) -> tuple[Any, ...]:
    """The alternatives of a union, without None; other types are their only member."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(a for a in typing.get_args(hint) if a is not type(None))
    return (hint,)


def nullable(hint) -> bool:
    return hint is Any or type(None) in typing.get_args(hint)


def classes_of(hint) -> tuple[type, ...]:
    """The dataclasses that a table of this type may belong to."""
    return tuple(m for m in members(hint) if dataclasses.is_dataclass(m))


def entries_of(hint):
    """Type of the entries of a table with any keys; None for types that are not such a table."""
    hint = members(hint)[0]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, dict):
        return Any
    if origin is dict:
        return args[1]
    if origin is tuple and args[-1] is Ellipsis and classes_of(args[0]):
        return args[0]
    return None


def type_name(hint) -> str:
    """A declared type as help and messages show it, such as "float or None"."""
    names = []
    for member in members(hint):
        if member is Any:
            names.append("any value")
        elif classes_of(member) or entries_of(member) is not None:
            names.append("table")
        else:
            plain = isinstance(member, type) and typing.get_origin(member) is None
            names.append(member.__name__ if plain else str(member))
    if type(None) in typing.get_args(hint):
        names.append("None")
    return " or ".join(dict.fromkeys(names))


def choose(classes: tuple[type, ...], keys, where: str) -> type:
    """The first of these dataclasses that has all of these fields."""
    for cls in classes:
        if all(key in fields(cls) for key in keys):
            return cls
    if all(any(key in fields(cls) for cls in classes) for key in keys):
        raise ConfigError(f"{where}: no kind of this table has all of {', '.join(keys)}")
    nearest = max(classes, key=lambda cls: sum(key in fields(cls) for key in keys))
    raise _Unknown(where, next(key for key in keys if key not in fields(nearest)), nearest)


# ---- values


def complete(hint, values: Mapping[str, Any], where: str = "config") -> dict[str, Any]:
    """Nested dicts with every option of the dataclass `hint`: `values`, and defaults elsewhere.

    Raises:
        ConfigError: an option does not exist (the nearest one is suggested), or a value is of the
            wrong type.
    """
    try:
        return _complete(hint, values, where)
    except _Unknown as error:
        known = _complete_table(hint, {}, where)
        raise error.explained(hint, known, where) from None


def _complete(hint, value, where: str):
    """`value` with the declared types, tables as dicts with all of their options.

    Raises:
        ConfigError: an option does not exist, or a value is of the wrong type.
    """
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if value is None and nullable(hint):
        return None
    entries = entries_of(hint)
    if entries is not None and value == ():
        return {}
    if classes := classes_of(hint):
        if dataclasses.is_dataclass(value):
            value = {name: getattr(value, name) for name in fields(type(value))}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table of options, not {value!r}")
        return _complete_table(choose(classes, value, where), value, where)
    if entries is not None and isinstance(value, Mapping):
        return {
            key: _complete(entries, _named(entries, key, each), f"{where}.{key}")
            for key, each in value.items()
        }
    for member in members(hint):
        try:
            return _checked(member, value, where)
        except TypeError:
            continue
    raise ConfigError(f"{where} must be {type_name(hint)}, not {value!r}")


def _complete_table(cls: type, values: Mapping, where: str) -> dict[str, Any]:
    """All fields of a dataclass, except required ones that are not in `values`."""
    hints = fields(cls)
    for key in values:
        if key not in hints:
            raise _Unknown(where, key, cls)
    made = {}
    for field in dataclasses.fields(cls):
        name = field.name
        if name in values:
            value = values[name]
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            continue
        made[name] = _complete(hints[name], value, f"{where}.{name}")
    return made


def _named(hint, key: str, value):
    """An entry of a table of tables; its field `name` is the key if it has no other name."""
    if isinstance(value, Mapping) and any("name" in fields(cls) for cls in classes_of(hint)):
        return {**value, "name": value.get("name") or key}
    return value


def _checked(hint, value, where: str):
    """One value of the declared type; TypeError if it is of another one."""
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        each = (args[0],) * len(value) if args[-1] is Ellipsis else args
        if len(each) != len(value):
            raise ConfigError(f"{where} must have {len(each)} values, not {value!r}")
        pairs = enumerate(zip(each, value, strict=True))
        return tuple(_complete(h, v, f"{where}[{i}]") for i, (h, v) in pairs)
    kind = origin or hint
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError
    return value


def _parse(hint, text: str, where: str, old):
    """A value from the command line by its declared type.

    Where any type is allowed, text stays text in place of text (`old`), or if it is not a Python
    literal.
    """
    words = {"true": True, "false": False, "True": True, "False": False}
    if nullable(hint) and text == "None":
        return None
    for member in members(hint):
        if member is str or (member is Any and isinstance(old, str)):
            return text
        if member in (bool, Any) and text in words:
            return words[text]
        if member in (int, float):
            try:
                return member(text)
            except ValueError:
                continue
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    return _complete(hint, value, where)


# ---- changes


def change(hint, values, overrides: Mapping[str, Any], where: str = "config"):
    """Complete tables with some options changed, all at once, so that their order does not matter.

    Args:
        hint: the dataclass of `values`, or `dict` where no types are declared.
        values: complete tables.
        overrides: dotted key -> value. Text is parsed by the declared type. A value for a whole
            table takes its place; None removes an entry of a table with any keys.
        where: dotted path, for messages.

    Raises:
        ConfigError: an option does not exist, or a value is of the wrong type.
    """
    tree: dict = {}
    for key, value in overrides.items():
        node = tree
        for part in key.split("."):
            node = node.setdefault(part, {})
        node[None] = value  # what is given for the node itself
    try:
        return _change(hint, values, tree, where)
    except _Unknown as error:
        raise error.explained(hint, values, where) from None


def _change(hint, value, tree: dict, where: str):
    """What is given for all of `value` comes first, then what is given for its options."""
    if None in tree:
        given = tree[None]
        parse = isinstance(given, str)
        value = _parse(hint, given, where, value) if parse else _complete(hint, given, where)
    parts = {key: branch for key, branch in tree.items() if key is not None}
    if not parts:
        return value
    if classes := classes_of(hint):
        return _change_table(classes, value, parts, where)
    if entries_of(hint) is None or not (value is None or isinstance(value, Mapping)):
        raise ConfigError(f"{where} is not a table, so it has no option {next(iter(parts))!r}")
    return _change_entries(entries_of(hint), value or {}, parts, where)


def _change_table(classes: tuple[type, ...], value, parts: dict, where: str) -> dict[str, Any]:
    """Options of a dataclass changed; a new table if there is none or it lacks these options."""
    cls = None if value is None else choose(classes, value, where)
    if cls is None or not all(key in fields(cls) for key in parts):
        cls, value = choose(classes, parts, where), {}
    table = _complete_table(cls, value, where)
    for key, branch in parts.items():
        table[key] = _change(fields(cls)[key], table.get(key), branch, f"{where}.{key}")
    return _complete_table(cls, table, where)


def _change_entries(hint, value: Mapping, parts: dict, where: str) -> dict[str, Any]:
    """Entries of a table with any keys changed, added or removed."""
    table = dict(value)
    for key, branch in parts.items():
        if not nullable(hint) and branch in ({None: None}, {None: "None"}):
            if key not in table:
                raise ConfigError(f"{where}.{key} cannot be removed: there is none")
            del table[key]
            continue
        new = _change(hint, table.get(key), branch, f"{where}.{key}")
        table[key] = _complete(hint, _named(hint, key, new), f"{where}.{key}")
    return table


# ---- every option


@dataclasses.dataclass(frozen=True)
class Option:
    """One option, or a table of options, which come after it.

    Attributes:
        path: dotted, from "config".
        hint: declared type.
        value: None where it is missing.
        doc: what the docstring of its dataclass says about it.
        used: False for options of a table that is None, of the other dataclass of a union, or of an
            entry that does not exist ("NAME" in the path).
    """

    path: str
    hint: Any
    value: Any
    doc: str = ""
    used: bool = True

    @property
    def is_table(self) -> bool:
        return isinstance(self.value, Mapping)


def listed(hint, value, where: str = "config", doc: str = "", used: bool = True):
    """Every option of complete tables, depth first, as an iterator of `Option`."""
    yield Option(where, hint, value, doc, used)
    classes, entries = classes_of(hint), entries_of(hint)
    if classes:
        yield from _options_of_table(classes, value, where, used)
    elif entries is not None and isinstance(value, Mapping):
        for key, each in value.items():
            yield from listed(entries, each, f"{where}.{key}", "", used)
        if not value and classes_of(entries):
            yield from _options_of_table(classes_of(entries), None, f"{where}.NAME", False)


def _options_of_table(classes, value, where: str, used: bool) -> Iterator[Option]:
    standing = None if value is None else choose(classes, value, where)
    for cls in sorted(classes, key=lambda cls: cls is not standing):
        table = value if cls is standing else _complete_table(cls, {}, where)
        for name, hint in fields(cls).items():
            if cls is standing or standing is None or name not in fields(standing):
                path, mine = f"{where}.{name}", used and cls is standing
                yield from listed(hint, table.get(name), path, docs(cls).get(name, ""), mine)


@functools.cache
def docs(cls: type) -> dict[str, str]:
    """Field -> its text in the "Attributes:" part of the docstrings of a dataclass and its bases.

    One text may be about several fields, "low, high: …", and may go on to another one after a
    semicolon, "…; high: …".
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for entry in _attributes(vars(base).get("__doc__") or ""):
            names: list[str] = []
            for part in re.split(r"(?:^|; )(?=\w+(?:, \w+)*: )", entry):
                head, _, text = part.partition(": ")
                if all(name in fields(cls) for name in head.split(", ")):
                    names = head.split(", ")
                    found |= dict.fromkeys(names, text)
                elif part:  # an ordinary colon
                    found |= {name: f"{found[name]}; {part}" for name in names}
    return found


def _attributes(doc: str) -> list[str]:
    """The entries of the "Attributes:" part of a docstring, each in one line."""
    entries: list[str] = []
    _, _, block = inspect.cleandoc(doc).partition("Attributes:\n")
    lines = [line for line in block.splitlines() if line.strip()]
    indents = [len(line) - len(line.lstrip()) for line in lines]
    for line, indent in zip(lines, indents, strict=True):
        if indent < indents[0]:
            break  # the next part of the docstring
        if indent == indents[0]:
            entries.append(line.strip())
        else:
            entries[-1] += f" {line.strip()}"
    return entries


class _Unknown(ConfigError):
    """A key that is not an option."""

    def __init__(self, where: str, key: str, cls: type):
        super().__init__(f"{where}.{key} is not an option")
        self.where, self.key, self.known = where, key, fields(cls)

    def explained(self, hint, values, root: str) -> ConfigError:
        """The error with the option that was probably meant, anywhere in the tables."""
        paths = [option.path for option in listed(hint, values, root)][1:]
        near = self._nearest(paths)
        if near:
            return ConfigError(f"{self}; did you mean {near}?")
        return ConfigError(f"{self}; known: {', '.join(self.known)}")

    def _nearest(self, paths: list[str]) -> str | None:
        same = [path for path in paths if path.rpartition(".")[2] == self.key]
        if same:  # it belongs to another table, likely to one nearby

            def distance(path):
                pairs = zip(path.split("."), self.where.split("."), strict=False)
                return (-sum(a == b for a, b in pairs), path.count("."))

            return min(same, key=distance)
        near = difflib.get_close_matches(self.key, self.known, n=1, cutoff=0.7)
        if near:
            return f"{self.where}.{near[0]}"
        tails = {}
        for path in paths:
            parts = [part for part in path.split(".") if part != "NAME"]
            tails |= {"_".join(parts[-n:]): path for n in (1, 2)}
        return next((tails[t] for t in difflib.get_close_matches(self.key, tails, n=1)), None)

"""`--data` and `--data-root`: data of one's own in place of the sources that a config names.

--data=mine.jsonl                       one source, `main`
--data=mine.jsonl,more.jsonl            `main` and `more`; every record once an epoch
--data-root=images                      folder of the images; default: that of each file
"""

import argparse
import os
import pathlib
import re
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from metamorph_jax.config import load_config
from metamorph_jax.data.sources import shards
from metamorph_jax.errors import ConfigError

TFDS = "tfds:"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", action="append", metavar="FILE[,FILE]",
        help="your own data in place of the config's sources: .json, .jsonl, .tar, .arrayrecord "
        "or tfds:NAME/SPLIT; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--data-root", default="", metavar="DIR",
        help="folder of the images that --data names; default: the folder of each file",
    )  # fmt: skip


def files(args: argparse.Namespace) -> list[str]:
    """The files of `--data`, in order; [] if it is not given.

    Raises:
        ConfigError: one does not exist, or is given twice; or `--data-root` stands alone.
    """
    if args.data_root and not args.data:
        raise ConfigError("--data-root is the folder of the images of --data, which is missing")
    given = args.data or []
    names = [name for text in given for name in _split(text)]
    if given and not names:
        raise ConfigError("--data names no file")
    for name in names:
        if not (name.startswith(TFDS) or shards.is_pattern(name) or os.path.isfile(name)):
            what = "is a folder, not a file" if os.path.isdir(name) else "does not exist"
            raise ConfigError(f"--data: {name!r} {what}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"--data: {twice[0]!r} is given twice")
    root = _expanded(args.data_root)
    if root and not os.path.isdir(root):
        raise ConfigError(f"--data-root: {root!r} is not a folder")
    return names


def _split(text: str) -> list[str]:
    """Files separated by commas; a file whose own name has a comma is one file."""
    if os.path.isfile(_expanded(text)):
        return [_expanded(text)]
    return [_expanded(part.strip()) for part in text.split(",") if part.strip()]


def _expanded(path: str) -> str:
    return os.path.expanduser(path)


def sources(names: Sequence[str], root: str) -> dict[str, dict[str, str]]:
    """`config.data.sources` of these files: the first is `main`, others have their file's name."""
    made: dict[str, dict[str, str]] = {}
    for name in names:
        key = re.sub(r"\W+", "_", pathlib.PurePath(name).stem) if made else "main"
        taken = sum(other.rpartition("__")[0] == key or other == key for other in made)
        made[f"{key}__{taken}" if taken else key] = {"path": name, "root": _expanded(root)}
    return made


def load(args: argparse.Namespace, features: str | None = None) -> ConfigDict:
    """The config of `--config` with its overrides, reading the files of `--data` if they are given.

    Evaluations that name sources of their own are those of the config's data, so `--data` leaves
    them out, unless an override of the command line is about them; a line on stderr says so.

    Args:
        args: has `config`, `overrides`, `data` and `data_root`.
        features: folder for the feature cache of these files, if the config has such a cache; None
            leaves the config's.

    Raises:
        ConfigError: as `load_config` and `files`.
    """
    names = files(args)
    config = load_config(args.config, args.overrides)
    if not names:
        return config
    if "sources" not in config.get("data", {}):
        raise ConfigError(f"--data: {args.config} reads no files (it has no config.data.sources)")
    both = [key for key in args.overrides if re.match(r"data\.sources(\.\w+\.path)?$", key)]
    if both:
        raise ConfigError(f"--data and --config.{both[0]} both say what is read: give one of them")
    changes = {"data.sources": sources(names, args.data_root)}
    cache = "data.cache.features"
    if features is not None and config.data.cache.features and cache not in args.overrides:
        changes[cache] = features
    for name, one in config.get("evals", {}).items():
        asked = any(f"{key}.".startswith(f"evals.{name}.") for key in args.overrides)
        if "sources" in one.data and not asked:
            changes[f"evals.{name}"] = None
            print(f"--data: evaluation {name!r} of the config reads other data and is left out",
                  file=sys.stderr)  # fmt: skip
    return load_config(args.config, args.overrides | changes)

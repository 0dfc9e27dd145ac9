"""The command line: `metamorph COMMAND …`, also `python -m metamorph_jax COMMAND …`.

Each command lives in a module of its own with `add_arguments(parser)` and `run(args)`, which is
imported only when it is asked for: `metamorph --help` loads no model code and starts no device.
"""

import argparse
import difflib
import importlib
import os
import sys

from metamorph_jax import platforms
from metamorph_jax.errors import UserError

COMMANDS = {
    "train": ("metamorph_jax.train.command", "train a stage, or go on where it stopped"),
    "generate": ("metamorph_jax.sampling.generate", "answer, draw, edit, think visually"),
    "sweep": ("metamorph_jax.sweep.command", "train the runs that a config lists, compare them"),
    "plan": ("metamorph_jax.plan.command", "compile a step for chips that aren't here"),
    "convert": ("metamorph_jax.convert.command", "published weights in and out, and their parity"),
    "data": ("metamorph_jax.data.check", "find what is wrong with a data set"),
    "quickstart": ("metamorph_jax.quickstart.run", "the whole road, at small size"),
}



def _usage() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    more = "metamorph COMMAND --help says more."
    return f"usage: metamorph COMMAND [options]\n\n{listed}\n\n{more}\n"


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    # transformers is used for its tokenizers: that torch is missing is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    platforms.prepare()
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(), end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        import metamorph_jax

        print(metamorph_jax.__version__)
        return 0
    name = argv[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"metamorph: no command {name!r}{hint}\n\n{_usage()}", end="", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        if error.name != COMMANDS[name][0]:
            raise
        print(f"metamorph {name} is not part of this version", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(f"metamorph {name}", description=COMMANDS[name][1])
    module.add_arguments(parser)
    args, rest = parser.parse_known_args(argv[1:])
    overrides = {}
    if hasattr(args, "config"):
        overrides, rest = _take_overrides(rest)
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    args.overrides = overrides
    return _run(module.run, args)


def _run(run, args) -> int:
    try:
        return int(run(args) or 0)
    except UserError as error:
        print(f"metamorph: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130


def _take_overrides(rest: list[str]) -> tuple[dict[str, str], list[str]]:
    """`--config.a.b=value` and `--config.a.b value` out of the arguments that are left."""
    overrides, others = {}, []
    words = iter(rest)
    for word in words:
        if not word.startswith("--config."):
            others.append(word)
            continue
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            value = next(words, "true")
        overrides[key] = value
    return overrides, others

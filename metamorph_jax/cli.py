"""The command line: `metamorph COMMAND …`, also `python -m metamorph_jax COMMAND …`.

Each command is a module with `add_arguments(parser)` and `run(args)`, which is imported only when
the command is called: `metamorph --help` loads no model code and starts no device.
"""

import argparse
import difflib
import importlib
import os
import sys
from functools import partial

from metamorph_jax import files, paths, platforms
from metamorph_jax.errors import UserError
from metamorph_jax.files import shown

COMMANDS = {
    "train": ("metamorph_jax.train.command", "train a stage, or resume its training"),
    "config": ("metamorph_jax.train.show_config", "list every option of a config"),
    "generate": ("metamorph_jax.sampling.generate", "answer, draw, edit, think visually"),
    "chat": ("metamorph_jax.sampling.chat", "talk with a model, which is loaded once"),
    "demo": ("metamorph_jax.sampling.demo.command", "talk with a model, or two, in the browser"),
    "eval": ("metamorph_jax.eval.command", "score a model on benchmarks"),
    "eval pairs": (
        "metamorph_jax.eval.people.pairs_command",
        "write a page on which people compare two models",
    ),
    "eval votes": ("metamorph_jax.eval.people.votes_command", "score what people answered there"),
    "score": ("metamorph_jax.eval.images.command", "FID, CLIP score and the like of drawn images"),
    "report": ("metamorph_jax.eval.run_report", "write the page of a run: curves, data, samples"),
    "sweep": ("metamorph_jax.sweep.command", "train the runs that a config lists and compare them"),
    "plan": ("metamorph_jax.plan.command", "memory and speed of a step on chips you don't have"),
    "convert": ("metamorph_jax.convert.command", "read, write and check published weights"),
    "data": ("metamorph_jax.data.check", "find what is wrong with a data set"),
    "data generate": (
        "metamorph_jax.instruct.command",
        "have a language model write instruction data about images",
    ),
    "features": ("metamorph_jax.sampling.features", "write what a model makes of your images"),
    "quickstart": (
        "metamorph_jax.quickstart.run",
        "run every stage end to end at small scale and write a report",
    ),
}


# What a command ends with, if it succeeds: (module, function of its arguments).
AFTERWARDS = {"train": ("metamorph_jax.eval.run_report", "after_training")}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    more = "metamorph COMMAND --help shows the options of a command."
    return f"usage: metamorph COMMAND [options]\n\n{listed}\n\n{more}\n"


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    # transformers is used for its tokenizers only, so it need not warn that torch is missing.
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
    name, _ = _named(argv)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"metamorph: no command {name!r}{hint}\n\n{_usage()}", end="", file=sys.stderr)
        return 2
    module, args = parse(argv)
    code = _run(partial(_checked, name, module), args)
    if code == 0 and name in AFTERWARDS:
        after, function = AFTERWARDS[name]
        code = _run(vars(importlib.import_module(after))[function], args)
    return code


def parse(argv: list[str]):
    """(module of the command, its arguments with `overrides` of the config) of a command line.

    Exits with 2, after a message, on arguments that the command doesn't have.
    """
    name, rest = _named(argv)
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(f"metamorph {name}", description=COMMANDS[name][1])
    module.add_arguments(parser)
    overrides, rest = _take_overrides(rest)
    args, rest = parser.parse_known_intermixed_args(rest)
    if "config" not in vars(args):
        rest += [f"--config.{key}" for key in overrides]
    if rest:
        parser.error(f"unknown arguments: {shown(' '.join(rest))}")
    args.overrides, args.parser = overrides, parser
    return module, args


def _named(argv: list[str]) -> tuple[str, list[str]]:
    """(name of the command, its arguments) of a command line; some names have two words."""
    length = 2 if " ".join(argv[:2]) in COMMANDS else 1
    return " ".join(argv[:length]), argv[length:]


def _checked(name: str, module, args) -> int:
    paths.check_options(name, args, args.parser.get_default)
    return module.run(args)


def _run(run, args) -> int:
    try:
        return int(run(args) or 0)
    except UserError as error:
        print(f"metamorph: {files.escape(str(error))}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` or `less`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _take_overrides(rest: list[str]) -> tuple[dict[str, str], list[str]]:
    """(key -> text, other arguments) of `--config.a.b=value`, `--config.a.b value` and the switch
    `--config.a.b`, which is short for `--config.a.b=true`."""
    overrides, others = {}, []
    words = list(reversed(rest))
    while words:
        word = words.pop()
        if not word.startswith("--config."):
            others.append(word)
            continue
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            value = words.pop() if words and not words[-1].startswith("--") else "true"
        overrides[key] = value
    return overrides, others

"""The one check of paths that people give, done before a command reads or writes anything.

A path is a local one. A bucket (`gs://…`) has to be mounted first, as `launch/tpu.sh` does: opened
as a path, its address would be a folder named `gs:` in the current one. `~` is the home folder.
"""

import argparse
import os
import pathlib
import re
from collections.abc import Mapping

from metamorph_jax.errors import UserError
from metamorph_jax.files import shown

# Options by command: "in", which must be there; "folder" and "file", which are written; "spec": a
# path, or "hf:OWNER/NAME" and the like; "config": FILE[:SIZE].
_IN, _FOLDER, _FILE, _SPEC, _CONFIG = "in", "folder", "file", "spec", "config"
_MODEL = dict(workdir=_IN, checkpoint=_SPEC, config=_CONFIG, decoder=_SPEC, out=_FOLDER)
OPTIONS = {
    "train": dict(config=_CONFIG, workdir=_FOLDER, data_root=_IN),
    "config": dict(config=_CONFIG),
    "sweep": dict(config=_CONFIG, workdir=_FOLDER),
    "quickstart": dict(workdir=_FOLDER, stamps=_IN, results=_FOLDER),
    "plan": dict(config=_CONFIG, json=_FILE, hlo=_FILE, data_root=_IN),
    "convert": dict(
        source=_SPEC, out=_FOLDER, decoder=_IN, delta=_SPEC, make_delta=_SPEC, lora=_SPEC
    ),  # fmt: skip
    "data": dict(config=_CONFIG, root=_IN, data_root=_IN, tokenizer=_SPEC),
    "data generate": dict(
        captions=_IN,
        instances=_IN,
        contexts=_IN,
        images=_IN,
        shots=_IN,
        workdir=_IN,
        checkpoint=_SPEC,
        config=_CONFIG,
        out=_FOLDER,
    ),
    "features": dict(images=_IN, workdir=_IN, checkpoint=_SPEC, config=_CONFIG, out=_FOLDER),
    "generate": dict(**_MODEL, prompts=_IN, image=_IN, video=_IN),
    "chat": _MODEL,
    "demo": dict(**_MODEL, beside=_IN, beside_decoder=_SPEC),
    "eval": dict(**_MODEL, bench_root=_IN, judge=_SPEC, judge_config=_CONFIG),
    "eval pairs": dict(first=_IN, second=_IN, out=_FOLDER),
    "eval votes": dict(key=_IN, answers=_IN, json=_FILE),
    "score": dict(
        drawn=_IN,
        real=_IN,
        captions=_IN,
        inception=_IN,
        clip=_SPEC,
        tower=_SPEC,
        statistics=_FILE,
        geneval=_IN,
        dpg=_IN,
        judge=_SPEC,
        judge_config=_CONFIG,
        json=_FILE,
    ),
    "report": dict(workdir=_IN),
}
# Options that messages call otherwise than by their name.
_LABELS = {
    ("convert", "source"): "--from",
    ("report", "workdir"): "WORKDIR",
    ("score", "drawn"): "DRAWN",
    ("eval pairs", "first"): "FIRST",
    ("eval pairs", "second"): "SECOND",
    ("eval votes", "key"): "KEY",
    ("eval votes", "answers"): "ANSWERS",
}
# Folders that a config names.
CONFIG = (
    "compilation_cache", "local_checkpoints.folder", "data.reading.index_dir", "data.cache.images",
    "data.cache.features",
)  # fmt: skip
_REMOTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:/")
_SOURCE = re.compile(r"((?:workdir|gguf|onnx):|[a-z]+:(?!/))(.*)", re.S)


def check_options(command: str, args: argparse.Namespace, default) -> None:
    """Checks every path among the arguments of a command, and expands `~` in place.

    Args:
        command: its name.
        args: parsed.
        default: name -> default of an option, which is left as it is.

    Raises:
        UserError: a path can't be used; the message names the option.
    """
    for name, kind in OPTIONS.get(command, {}).items():
        value = getattr(args, name, None)
        if value is None or value == default(name):
            continue
        option = _LABELS.get((command, name), f"--{name.replace('_', '-')}")
        many = isinstance(value, list)
        found = [_checked(option, each, kind) for each in (value if many else [value])]
        setattr(args, name, found if many else found[0])


def check_config(table: Mapping) -> None:
    """Checks the folders that a run's nested table of options names.

    Raises:
        UserError: see `local`; the message names the key.
    """
    for key in CONFIG:
        value = table
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, str) and value:
            local(f"config.{key}", value)


def _checked(option: str, text: str, kind: str) -> str:
    if kind == _FILE and text == "-":
        return text  # the console
    if kind in (_SPEC, _CONFIG):
        source = _SOURCE.fullmatch(text) if kind == _SPEC else None
        head, rest = source.groups() if source else ("", text)
        return head + str(local(option, rest, slash=True))
    path = local(option, text)
    if kind == _IN and not path.exists():
        raise UserError(f"{option}: there is no {shown(path)}")
    if kind == _FOLDER:
        output_folder(option, path)
    if kind == _FILE:
        if path.is_dir():
            raise UserError(f"{option}: {shown(path)} is a folder, not a file")
        output_folder(option, path.parent)
    return str(path)


def local(option: str, text: str | os.PathLike, slash: bool = False) -> pathlib.Path | str:
    """A path of this machine, with `~` expanded.

    Args:
        option: for messages.
        slash: give back text, of which nothing else is changed.

    Raises:
        UserError: it is empty, the address of a bucket, or holds characters that no path has.
    """
    text = os.fspath(text)
    if not text.strip():
        raise UserError(f"{option} is empty (is a variable unset?); give a path")
    if _REMOTE.match(text):
        raise UserError(
            f"{option}: {shown(text)} is not a path of this machine; mount the bucket (gcsfuse; "
            "launch/tpu.sh --bucket does it) and give the folder where it is mounted"
        )
    if any(c < " " or c == "\x7f" for c in text):
        raise UserError(f"{option}: {shown(text)} is not a path: it has control characters")
    try:
        expanded = os.path.expanduser(text)
        os.stat(expanded)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{option}: {shown(text)}: {reason}") from error
    if expanded.startswith("~"):
        raise UserError(f"{option}: {shown(text)}: there is no such user; write ./~… for a folder")
    return expanded if slash else pathlib.Path(expanded)


def output_folder(option: str, path: str | os.PathLike) -> pathlib.Path:
    """A folder that can be written, or made where it isn't there yet; it is not made here.

    Raises:
        UserError: as `local`, or it is something else, or its parent can't be written.
    """
    path = local(option, path)
    there = path.absolute()
    while not there.exists() and there != there.parent:
        if there.is_symlink():
            raise UserError(f"{option}: {shown(there)} is a link to nothing")
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{option}: {shown(there)} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{option}: {shown(there)} can't be written: permission denied")
    return path

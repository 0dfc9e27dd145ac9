"""Config values of wrong kinds, damaged run files, and paths that can't be used."""

import argparse
import json
import os
import pathlib
import re

import pytest

from metamorph_jax import options, paths, sharding
from metamorph_jax.config import load_config
from metamorph_jax.convert import load
from metamorph_jax.errors import UserError
from metamorph_jax.lock import Lock
from metamorph_jax.train import workdir
from metamorph_jax.train.config import resolve, typed
from metamorph_jax.train.goodput import Goodput
from tests.hostile import harness

CONFIG = "configs/metamorph/vpit.py:smoke"
ROOT = pathlib.Path(__file__).parents[2]
VALUES = (
    "None", "0", "-1", "bf16", "", "[]", "{}", "nan", "1e400", "True", "[[1]]", "'", "\x1b[2J",
    "{'a': 1}", "(" * 300,
)  # fmt: skip


@pytest.fixture(scope="module")
def tables():
    config = load_config(str(ROOT / CONFIG))
    cls = typed(config.recipe)
    return cls, options.complete(cls, config)


@pytest.mark.parametrize("number", range(len(VALUES)))
def test_every_option_with_a_wrong_value(number, tables, tmp_path):
    """One value for every seventh option of the config, as the command line would give it."""
    cls, values = tables
    found = [option.path.removeprefix("config.") for option in options.listed(cls, values)][1:]
    for path in found[number % 7 :: 7]:
        change = {path: VALUES[number]}
        harness.attempt(lambda: resolve(options.change(cls, values, change)), tmp_path)  # noqa: B023


@pytest.mark.parametrize("shape", [{"tensor": 0}, {"fsdp": -2}, {"data": 0, "fsdp": -1}, {"x": 1}])
def test_meshes(shape):
    with pytest.raises(ValueError, match="axis|axes"):
        sharding.make_mesh(shape)


KEYS = ("model.lora.rank=16", "model.lora.rank.x=1", ".=1", "=", "model..x=1", "a.b.c=d", "x" * 999)


@pytest.mark.parametrize("key", KEYS)
def test_keys(key, tmp_path):
    harness.check(["config", "--config", ROOT / CONFIG, f"--config.{key}"], tmp_path)


def test_a_table_that_was_none_is_made(tmp_path):
    argv = ["config", "--config", ROOT / CONFIG, "--config.model.lora.rank=16", "lora.rank"]
    assert "--config.model.lora.rank=16" in harness.check(argv, tmp_path, code=0).out


FILES = {
    "empty": b"",
    "text": b"def get_config(: pass",
    "binary": bytes(range(256)),
    "null": b"\0",
    "returns a dict": b"get_config = lambda: {}",
    "raises": b"def get_config(): raise RuntimeError('\x1b[2J')",
    "exits": b"import sys\nsys.exit(0)",
    "JSON": b"{}",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("ending", ["py", "json"])
def test_config_files_that_are_none(name, ending, tmp_path):
    file = tmp_path / f"c.{ending}"
    file.write_bytes(FILES[name])
    harness.check(["config", "--config", file], tmp_path, code=2, naming=file)


# ---- files of runs

WRONG = [
    b"", b"{", b"null", b"[]", b"3", b'"x"', b"\xff\xfe{}", b"{}", b"[" * 5000, b'{"a": "\\ud800"}',
    b'{"recipe": 3, "model": {}, "data": {}}', b'{"recipe": "metamorph", "model": []}',
    b'{"recipe": "metamorph", "model": {"x": 1}}', b'{"recipe": "os", "model": {}}',
    b'{"starts": [[1]], "sums": {}}', b'{"starts": [], "sums": {"x": [1, 2, 3]}}',
    b'{"starts": 3, "sums": {"1": [NaN, 1, 1]}}',
    b'{"optim": 3, "steps": {}, "checkpoint_every": ""}',
]  # fmt: skip


def make(file: pathlib.Path, what) -> None:
    if what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    elif what == "loop":
        file.symlink_to(file)
    else:
        file.write_bytes(what)


@pytest.mark.parametrize("what", [*WRONG, "folder", "pipe", "loop"])
def test_files_of_runs(what, tmp_path, tables):
    """Read by training's checks, by loading, and by the account of its time."""
    for name in ("config.json", "versions.json", "metrics.jsonl"):
        run = tmp_path / name.partition(".")[0]
        run.mkdir()
        if name != "config.json":
            (run / "config.json").write_text('{"checkpoint_every": 1}')
        make(run / name, what)
        for trained in (True, False):
            harness.attempt(lambda: workdir.check(run, tables[1], trained), tmp_path)  # noqa: B023
    harness.attempt(lambda: load.open_run(tmp_path / "config"), tmp_path, code=2)
    make(tmp_path / "goodput.json", what)
    harness.attempt(lambda: Goodput(tmp_path, 1, 0.0), tmp_path, code=2)


@pytest.mark.parametrize("what", ["folder", "pipe", "loop", b"x", b'{"host": "\\u001b"}'])
def test_locks(what, tmp_path):
    make(tmp_path / "lock", what)
    harness.attempt(lambda: Lock(tmp_path).close(), tmp_path)


# ---- paths

PATHS = (
    "",
    " ",
    "gs://b/x",
    "s3://b",
    "gs:/b",
    "file:///x",
    "~no-such-user/x",
    "a\nb",
    "x" * 300,
    "\0",
)
COMMANDS = (
    ["train", "--config", ROOT / CONFIG, "--workdir"],
    ["sweep", "--config", ROOT / CONFIG, "--workdir"],
    ["quickstart", "--smoke", "--workdir"],
    ["generate", "--prompt", "x", "--workdir"],
    ["generate", "--prompt", "x", "--workdir", ".", "--out"],
    ["generate", "--workdir", ".", "--prompts"],
    ["convert", "--from", "workdir:.", "--out"],
    ["config", "--config"],
)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: f"{argv[0]} {argv[-1]}")
def test_paths(argv, path, tmp_path):
    harness.check([*argv[:-1], f"{argv[-1]}={path}"], tmp_path, code=2, naming=argv[-1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", [b"", "pipe", "loop"])
@pytest.mark.parametrize("argv", COMMANDS[:3], ids=lambda argv: argv[0])
def test_workdirs_that_are_none(argv, what, tmp_path):
    make(tmp_path / "w", what)
    harness.check([*argv, "w/x"], tmp_path, code=2, naming="--workdir")
    harness.check([*argv, "w"], tmp_path, code=2, naming="--workdir")


def test_home_is_expanded_and_used(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/config.json").write_text(json.dumps({}))
    argv = ["generate", "--prompt", "x", "--workdir", "~/w"]
    harness.check(argv, tmp_path, code=2, naming=tmp_path / "w")


@pytest.mark.parametrize("key", paths.CONFIG)
def test_folders_in_a_config(key):
    table = found = {}
    for name in key.split(".")[:-1]:
        found = found.setdefault(name, {})
    last = key.split(".")[-1]
    for text in ("gs://bucket/x", "s3://x", "\0", "~nobody-at-all/x", " "):
        found[last] = text
        with pytest.raises(UserError, match=re.escape(f"config.{key}")):
            paths.check_config(table)
    for text in ("", "~/x", "relative", None):
        found[last] = text
        paths.check_config(table)


@pytest.mark.parametrize("spec", ["workdir:{}", "gguf:{}/a.gguf", "onnx:{}", "{}", "workdir:~/w"])
def test_sources_keep_their_prefix(spec, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = argparse.Namespace(source=spec.format(tmp_path), out=None)
    paths.check_options("convert", args, lambda name: None)
    assert args.source == spec.format(tmp_path).replace("~", str(tmp_path))

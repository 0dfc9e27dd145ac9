"""`--data FILE[,FILE] --data-root DIR`: what it makes of a config, and what it refuses."""

import argparse
import json
import pathlib

import pytest
from PIL import Image

from metamorph_jax import cli
from metamorph_jax.data import option
from metamorph_jax.errors import ConfigError
from metamorph_jax.train.config import resolve

ROOT = pathlib.Path(__file__).parents[2]
SIZES = ("smoke", "quickstart", "1b", "8b", "70b")
CONFIGS = [
    f"{ROOT}/configs/metamorph/{stage}.py:{size}"
    for stage in ("connector", "vpit", "decoder")
    for size in SIZES
    if (stage, size) != ("decoder", "70b")
]


@pytest.fixture
def mine(tmp_path):
    """Two files whose images lie beside them."""
    Image.new("RGB", (20, 16), (200, 30, 20)).save(tmp_path / "red.png")
    turns = [("human", "<image>\nWhich colour?"), ("gpt", "Red.")]
    turns = [{"from": who, "value": text} for who, text in turns]
    line = json.dumps({"id": "0", "image": "red.png", "conversations": turns}) + "\n"
    for name in ("mine.jsonl", "more data.v2.jsonl"):
        (tmp_path / name).write_text(line * 2)
    return tmp_path


def arguments(*words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    option.add_arguments(parser)
    args = parser.parse_args([w for w in words if not w.startswith("--config.")])
    args.overrides, _ = cli._take_overrides([w for w in words if w.startswith("--config.")])
    return args


def paths(config):
    return {name: source["path"] for name, source in config.data.sources.items()}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.rpartition("/")[2])
def test_data_takes_the_place_of_all_sources(config, mine):
    file = str(mine / "mine.jsonl")
    made = option.load(arguments("--config", config, "--data", file), features="run/features")
    run = resolve(made)
    assert [(s.name, s.path, s.root, s.weight) for s in run.data.sources] == [("main", file, "", 0)]
    assert run.data.cache.features in ("", "run/features")
    assert all("sources" not in one.data for one in run.cfg.evals)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.rpartition("/")[2])
def test_the_main_source_has_one_name(config, mine):
    """README's `--config.data.sources.main.path`; images are looked for beside the file."""
    file = str(mine / "mine.jsonl")
    args = arguments("--config", config, f"--config.data.sources.main.path={file}")
    run = resolve(option.load(args))
    (main,) = [s for s in run.data.sources if s.name == "main"]
    assert main.path == file and main.root == ""


def test_several_files_have_names_and_one_root(mine):
    files = [str(mine / n) for n in ("mine.jsonl", "more data.v2.jsonl")]
    for words in ([f"--data={','.join(files)}"], [f"--data={f}" for f in files]):
        args = arguments("--config", CONFIGS[0], *words, f"--data-root={mine}")
        made = option.load(args)
        assert paths(made) == {"main": files[0], "more_data_v2": files[1]}
        assert {s.root for s in resolve(made).data.sources} == {str(mine)}
    assert [*option.sources(["a/x.json", "b/main.json", "c/y.json", "d/y.json"], "")] == [
        "main", "main__1", "y", "y__1",
    ]  # fmt: skip


def test_a_comma_in_a_file_name(mine):
    (mine / "a,b.jsonl").write_text("{}\n")
    assert option.files(arguments(f"--data={mine}/a,b.jsonl")) == [f"{mine}/a,b.jsonl"]


def test_home_is_expanded(mine, monkeypatch):
    monkeypatch.setenv("HOME", str(mine))
    assert option.files(arguments("--data=~/mine.jsonl")) == [str(mine / "mine.jsonl")]


def test_an_evaluation_of_other_data_is_left_out_with_a_word(mine, capsys):
    config = f"{ROOT}/configs/metamorph/vpit.py:quickstart"
    words = ["--config", config, f"--data={mine}/mine.jsonl"]
    assert "heldout" not in option.load(arguments(*words)).evals
    assert "'heldout'" in capsys.readouterr().err
    sources = repr({"sources": {"main": {"path": f"{mine}/mine.jsonl"}}})
    changed = f"--config.evals.heldout.data={sources}"
    assert "heldout" in option.load(arguments(*words, changed)).evals
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data=no.jsonl"], "'no.jsonl' does not exist"),
        (["--data={mine}"], "is a folder"),
        (["--data={mine}/mine.jsonl,{mine}/mine.jsonl"], "given twice"),
        (["--data="], "names no file"),
        (["--data-root={mine}"], "--data, which is missing"),
        (["--data={mine}/mine.jsonl", "--data-root=none"], "'none' is not a folder"),
        (["--data={mine}/mine.jsonl", "--config.data.sources.main.path=x"], "both say"),
        (["--data={mine}/mine.jsonl", "--config.data.sources={}"], "both say"),
    ],
)
def test_what_is_refused(words, message, mine):
    words = [word.replace("{mine}", str(mine)) for word in words]
    with pytest.raises(ConfigError, match=message):
        option.load(arguments("--config", CONFIGS[0], *words))


def test_data_check_takes_it(mine, capsys):
    for words in ([], [f"--config={ROOT}/configs/metamorph/vpit.py:smoke"]):
        assert cli.main(["data", "check", f"--data={mine}/mine.jsonl", *words]) == 0
        assert "nothing wrong found" in capsys.readouterr().out
    assert cli.main(["data", "check", "--data=no.jsonl"]) == 2
    assert "--data: 'no.jsonl' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "plan"])
def test_commands_take_it(command, mine):
    words = ["--config=x", f"--data={mine}/mine.jsonl", f"--data-root={mine}"]
    words += {"train": ["--workdir=w"], "plan": ["--topology=v5e-8"]}[command]
    _, args = cli.parse([command, *words])
    assert option.files(args) == [f"{mine}/mine.jsonl"]

"""The commands at the end of a quick start are ones that the program takes."""

import argparse
import importlib
import shlex

import pytest

from metamorph_jax import cli
from metamorph_jax.config import load_config
from metamorph_jax.eval import report
from metamorph_jax.quickstart import commands


@pytest.mark.parametrize("size", ["smoke", "quickstart"])
def test_the_program_takes_them(tmp_path, size):
    workdir = tmp_path / "a run"  # a space in the path
    (workdir / "data/images/test").mkdir(parents=True)
    (workdir / "data/images/test/7.png").touch()
    found = commands.following(workdir, size)
    programs = []
    for line in found.values():
        assert line.startswith(f"{commands.program()} ")
        name, *words = shlex.split(line.removeprefix(commands.program()))
        programs.append(name)
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(cli.COMMANDS[name][0]).add_arguments(parser)
        taken = [word for word in words if not word.startswith("--config.")]
        args = vars(parser.parse_args(taken))
        if name != "data":
            assert str(workdir) in args["workdir"]
        if name == "train":
            assert load_config(args["config"]).stage == "vpit"
            assert f"--config.model.weights=workdir:{workdir / 'vpit'}" in words
    assert programs == ["generate", "generate", "chat", "demo", "data", "train"]
    assert "7.png" in next(iter(found.values()))
    *_, last = report.as_page(report.Report("", facts={"seed": 0}, commands=found)).sections
    assert last.title == "What to do next" and last.blocks[0].code
    assert [row[1] for row in last.blocks[0].rows] == list(found.values())

"""benchmarks/quickstart.py: what it makes of finished runs. Nothing is trained."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from metamorph_jax import platforms
from metamorph_jax.quickstart.run import GOALS, QuickStart

FILE = pathlib.Path(__file__).parents[2] / "benchmarks/quickstart.py"
CPU = "Intel(R) Xeon(R) Processor @ 2.50GHz"
RIGHT = (0.96, 0.9, 0.94)  # drawings of seeds 0, 1, 2


@pytest.fixture
def bench(monkeypatch):
    """The benchmark, with a quick start that leaves finished workdirs; `bench.ran` lists them."""
    spec = importlib.util.spec_from_file_location("benchmarks_quickstart", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    module.ran = []

    real = subprocess.run

    def finish(command, env=None, **options):
        if command[0] == "git":
            return real(command, **options)
        options = dict(o.removeprefix("--").split("=") for o in command if "=" in o)
        assert "--smoke" in command and env["PYTHONPATH"].startswith(str(FILE.parents[1]))
        module.ran.append(options)
        found = [options[name] for name in ("seed", "precision", "head")]
        _finish(pathlib.Path(options["workdir"]), *found)

    monkeypatch.setattr(subprocess, "run", finish)
    monkeypatch.setattr(platforms, "cpu_name", lambda: CPU)
    return module


def _finish(workdir: pathlib.Path, seed: str, precision: str, head: str) -> None:
    seed = int(seed)
    start = QuickStart(workdir, "smoke", seed, precision, head)
    for name in start.steps:
        record = {"seconds": 240 if name == "vpit" else 60, "interrupted": int(seed == 2)}
        (workdir / "steps" / f"{name}.json").write_text(json.dumps(record))
    found = dict.fromkeys(GOALS, 0.9) | {"place_spread": 11.0, "size_spread": 4.0}
    found |= {"drawings_right": RIGHT[seed], "accuracy": 0.9 + seed / 50}
    (workdir / "evaluation").mkdir()
    (workdir / "evaluation/evaluation.json").write_text(json.dumps(found))
    drawn = np.full((24, 2, 64, 64, 3), 50 * seed, np.uint8)
    np.savez(workdir / "evaluation/drawings.npz", drawings=drawn)


def _run(bench, monkeypatch, *options) -> None:
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--smoke", *map(str, options)])
    assert bench.main() == 0


def test_every_seed_runs_once_and_all_are_in_the_table(bench, monkeypatch, tmp_path, capsys):
    options = ("--precision=float32", "--workdir", tmp_path)
    _run(bench, monkeypatch, "--seeds=2", *options)
    _run(bench, monkeypatch, "--seeds=3", *options, "--picture", tmp_path / "picture.png")
    assert [one["seed"] for one in bench.ran] == ["0", "1", "2"]
    assert {one["precision"] for one in bench.ran} == {"float32"}
    text = capsys.readouterr().out.rsplit("\n\n\n", 1)[-1]
    names = sorted(file.name for file in (tmp_path / "results").glob("seed*"))
    assert names == [f"seed{n}-mlp-float32-intel-xeon-2.50ghz.json" for n in range(3)]
    for line in (
        "| drawings of the requested colour and shape | 93.0 % | 88.0 % | 93.3 % | 90.0 % | 6.0 % "
        "| 96.0 %, 90.0 %, 94.0 % | reached |",
        "| held-out questions | 95.0 % | 92.0 % | 92.0 % | 90.0 % | 4.0 % "
        "| 90.0 %, 92.0 %, 94.0 % | missed |",
        "| minutes, downloads excluded | 25.0 |  | 10.0 | 10.0 | 0.0 | 10.0, 10.0, 10.0 |",
        "| spread of their sizes, pixels |  |  | 4.0 | 4.0 | 0.0 | 4.0, 4.0, 4.0 |  |",
        "the median run is that of seed 2",
        "vpit 4.0",
        "Some runs were interrupted and resumed.",
    ):
        assert line in text, line
    with Image.open(tmp_path / "picture.png") as picture:
        drawn = np.asarray(picture.convert("RGB"))
    assert (drawn[200:210, 200:210] == 100).all()  # of seed 2

    (tables,) = json.loads((tmp_path / "results/table.json").read_text())
    assert tables["median_seed"] == 2 and tables["cpu"] == CPU
    row = tables["targets"]["drawings_right"]
    assert row["seeds"] == list(RIGHT) and row["reached"] and row["worst"] == 0.9


def test_each_cpu_precision_and_head_has_its_own_table(bench, monkeypatch, tmp_path):
    options = ("--seeds=1", "--workdir", tmp_path)
    _run(bench, monkeypatch, *options, "--precision=float32", "--head=flow")
    _run(bench, monkeypatch, *options, "--precision=float32")
    _run(bench, monkeypatch, *options, "--precision=bfloat16")
    monkeypatch.setattr(platforms, "cpu_name", lambda: "AMD EPYC 9B14")
    _run(bench, monkeypatch, *options[:1], "--precision=bfloat16", "--workdir", tmp_path / "other",
         "--results", tmp_path / "results")  # fmt: skip
    groups = bench.read(tmp_path / "results")
    assert list(groups) == [
        ("AMD EPYC 9B14", "bfloat16", "mlp"), (CPU, "bfloat16", "mlp"),
        (CPU, "float32", "flow"), (CPU, "float32", "mlp"),
    ]  # fmt: skip
    text = (tmp_path / "results/table.md").read_text()
    assert text.count("minutes, downloads excluded") == 4 and "vision head flow" in text
    assert text.count("downloads excluded | 18.0 |") == 2
    _run(bench, monkeypatch, "--table", "--workdir", tmp_path)
    assert len(bench.ran) == 4


def test_without_results_there_is_no_table(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--table", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="no results yet"):
        bench.main()

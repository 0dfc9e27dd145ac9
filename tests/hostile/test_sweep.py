"""Sweeps: files of a workdir that are damaged, foreign or copies, and sweeps that are no sweeps."""

import json
import os
import pathlib
import shutil

import pytest

from metamorph_jax.errors import ConfigError
from metamorph_jax.sweep import metrics, table
from metamorph_jax.sweep.command import Run
from metamorph_jax.train.config import resolve
from tests.eval.toy import write_questions
from tests.hostile import harness
from tests.sweep import toy
from tests.train.test_loop import config

ROOT = pathlib.Path(__file__).parents[2]

FILE = (
    toy.CONFIG
    + """def sweep(add):
    SWEEP
"""
)
SWEEP = 'add.product({"optim.learning_rate": [0.01, 0.1]})'
FIRST = "001_learning_rate=0.01"
VALUES = '{"optim.learning_rate": 0.01}\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With a config of a sweep and a workdir in which the first run has ended."""
    monkeypatch.syspath_prepend(str(ROOT))
    (tmp_path / "c.py").write_text(FILE.replace("SWEEP", SWEEP))
    from metamorph_jax.config import load_config

    run = tmp_path / "runs" / FIRST
    (run / "final").mkdir(parents=True)
    (run / "sweep.json").write_text(VALUES)
    config = load_config(str(tmp_path / "c.py"), {"optim.learning_rate": 0.01})
    (run / "config.json").write_text(json.dumps(resolve(config).table))
    lines = [{"step": n, "loss": 1 / n, "text_loss": 2 / n} for n in range(1, 5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return tmp_path


def sweep(folder, *more, **judged):
    return harness.check(["sweep", "--config=c.py", "--workdir=runs", *more], folder, **judged)


# ---- damaged files

CONTENTS = {
    "empty": b"",
    "zeros": bytes(200),
    "half": b'{"optim.learning_rate": 0.',
    "list": b"[1, 2]",
    "number": b"17",
    "null": b"null",
    "text": b"hello \x1b[2J nothing wrong found",
    "latin": "{'größe': 1}".encode("latin-1"),
    "utf16": VALUES.encode("utf-16"),
    "bom": b"\xef\xbb\xbf" + VALUES.encode(),
    "deep": b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "wide": b"[" * 100_000,
    "surrogate": b'{"optim.learning_rate": "\\ud800"}',
    "foreign": b'{"learning": {"rate": [1, {"a": null}]}, "\\u001b[2J|": "=1+1"}',
    "huge": b'{"optim.learning_rate": ' + b"9" * 5000 + b"}",
    "infinite": b'{"optim.learning_rate": 1e999, "step": 1e999}',
    "folder": None,
    "fifo": None,
    "dangling": None,
}
NAMES = ("sweep.json", "config.json", "metrics.jsonl", "ended.json")


def spoil(file: pathlib.Path, kind: str) -> None:
    file.unlink(missing_ok=True)
    match kind:
        case "folder":
            file.mkdir()
        case "fifo":
            os.mkfifo(file)
        case "dangling":
            file.symlink_to("nowhere")
        case _:
            file.write_bytes(CONTENTS[kind])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", CONTENTS)
def test_damaged_files(folder, name, kind):
    spoil(folder / "runs" / FIRST / name, kind)
    found = sweep(folder, "--table")
    if found.code:
        assert name in found.err
    else:
        assert FIRST in found.out or f"{FIRST} is not taken as a run" in found.err
        assert found.out.replace("\n", "").isprintable()
    for file in (folder / "runs").glob("sweep.[cm]*"):
        assert file.read_text().replace("\n", "").isprintable()


LINES = {
    "no step": '{"loss": 1}', "text": '{"step": "9", "loss": 1}', "half": '{"step": 2.5}',
    "negative": '{"step": -1}', "huge": '{"step": ' + "9" * 400 + "}", "true": '{"step": true}',
    "garbage": "garbage", "list": "[]",
}  # fmt: skip


@pytest.mark.parametrize("kind", LINES)
def test_lines_of_metrics(folder, kind):
    """Only the last line may be incomplete."""
    file = folder / "runs" / FIRST / "metrics.jsonl"
    good = file.read_text()
    file.write_text(LINES[kind] + "\n" + good)
    sweep(folder, "--table", code=2, naming="metrics.jsonl, line 1")
    file.write_text(good + '{"step": 5, "lo')
    assert "| 4 | finished |" in sweep(folder, "--table", code=0).out


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"nan"', '"x"', "null", "[1]", "1e999",
                                   "9" * 400, '{"a": 1}', "true"])  # fmt: skip
def test_values_of_metrics(folder, value):
    """Some are numbers, others are not, and the table is written."""
    file = folder / "runs" / FIRST / "metrics.jsonl"
    file.write_text(f'{{"step": 4, "loss": {value}, "other": 1}}\n' * 3)
    found = sweep(folder, "--table")
    assert found.code == 0 or "no run has the metric 'loss'; there are other" in found.err


# ---- copies and other folders


@pytest.mark.parametrize(
    "copy", ["backup", "001_learning_rate=0.01 (copy)", "001_learning_rate=0.01.bak", "zzz",
             "009_learning_rate=0.1", "999_old", ".001_learning_rate=0.01"],
)  # fmt: skip
def test_a_copied_folder_is_not_the_run(folder, copy):
    shutil.copytree(folder / "runs" / FIRST, folder / "runs" / copy)
    (folder / "runs" / FIRST / "metrics.jsonl").write_text('{"step": 3, "loss": 7.0}\n')
    found = sweep(folder, "--table", code=0)
    assert f"{FIRST}  " in found.out and f"{copy} is not taken as a run" in found.err
    assert "| 7 | 3 of 4 | unfinished |" in found.out


def test_two_folders_of_one_run(folder):
    shutil.copytree(folder / "runs" / FIRST, folder / "runs/007_learning_rate=0.01")
    sweep(folder, "--list", code=2, naming="hold the same run; move the copy")


@pytest.mark.parametrize("name", ["5_x", "001_", "1234567890123_a", "003_learning_rate=0.1", "x_1"])
def test_foreign_folders_and_files(folder, name):
    (folder / "runs" / name).mkdir()
    (folder / "runs" / f"{name}.txt").touch()
    assert "new" in sweep(folder, "--list", code=0).out


@pytest.mark.parametrize(
    "workdir", ["", " ", "c.py", "c.py/runs", "/dev/null", "/dev/null/x", "a\0b", "x" * 300]
)
def test_workdirs_that_are_none(folder, workdir):
    for option in ("--list", "--table"):
        harness.check(["sweep", "--config=c.py", f"--workdir={workdir}", option], folder)


@pytest.mark.parametrize("name", ["sweep.csv", "sweep.md", "sweep.png"])
def test_tables_that_can_not_be_written(folder, name):
    (folder / "runs" / name).mkdir()
    (folder / "runs" / FIRST / "sweep.json").write_text(VALUES)
    found = sweep(folder, "--table")
    assert found.code == 2 or name == "sweep.png"  # one run: there is nothing to plot


# ---- the state of a run


@pytest.mark.parametrize(
    ("last", "ended", "state"),
    [
        (4, None, "finished"),
        (3, None, "unfinished"),  # prolonged and stopped: final/ is of the earlier end
        (3, {"step": 3, "steps": 4}, "finished"),  # the data have ended
        (3, {"step": 3, "steps": 3}, "unfinished"),  # that was the end of a shorter run
        (3, {"step": 2, "steps": 4}, "unfinished"),
        (0, None, "unfinished"),
    ],
)
def test_state(folder, last, ended, state):
    run = folder / "runs" / FIRST
    lines = (run / "metrics.jsonl").read_text().splitlines(True)
    (run / "metrics.jsonl").write_text("".join(lines[:last]))
    if ended:
        (run / "ended.json").write_text(json.dumps(ended))
    said = sweep(folder, "--table", code=0).out
    assert f"| {last if last == 4 else f'{last} of 4'} | {state} |" in said
    assert (FIRST in sweep(folder, "--print", code=0).out) == (state == "unfinished")


# ---- metrics


@pytest.mark.parametrize("metric", ["los", "Loss", "", "=1", "a|b", "\x1b[2J", "text_loss/none"])
def test_a_wrong_metric(folder, metric):
    found = sweep(folder, "--table", f"--metric={metric}", code=2, naming="loss, text_loss")
    assert not (folder / "runs/sweep.md").exists() and "| run |" not in found.out


@pytest.mark.parametrize("metric", ["evals.none.loss", "evals.held", "evals..", "evals.seen.loss"])
def test_an_evaluation_that_no_run_has(metric, folder):
    """Named before anything is run."""
    evals = "evals=dict(held={}, seen=dict(kind='samples'), task=dict(kind='task', task='a.b:C'))"
    text = (folder / "c.py").read_text().replace("steps=", f"{evals}, steps=", 1)
    (folder / "c.py").write_text(text)
    more = ["--workdir=new", f"--metric={metric}"]
    found = sweep(folder, *more, code=2, naming="no run has such an evaluation")
    assert "there are evals.held.METRIC, evals.task.METRIC" in found.err
    assert not (folder / "new").exists()


def test_a_metric_that_no_run_will_have(tmp_path):
    """Of the log, of held-out data or of a task: refused before anything is run."""
    colours = write_questions(tmp_path, [{"id": "a", "colour": "red"}])
    (tmp_path / "test").mkdir()
    (tmp_path / "test/questions.json").write_text('[["what color is it?", "red", 3]]')
    evals = {
        "held": {},
        "own": {"kind": "task", "task": "tests.train.toy:Scripted"},
        "unsaid": {
            "kind": "task",
            "task": "metamorph_jax.eval.bench:TaskDuringTraining",
            "options": {"name": "tests.eval.toy:Colours", "root": str(colours)},
        },
        "asked": {"kind": "task", "task": "easy_vqa", "options": {"root": str(tmp_path)}},
    }
    runs = [Run(pathlib.Path("r"), {}, resolve(config(evals=evals)).table)]
    wrong = {
        "did you mean visual_loss": ("visul_loss", "evals.held.visul_loss"),
        "there are .*grad_norm/head, .*learning_rate.* text_loss/good": (
            "vision_loss", "accuracy", "los", "", "/", "\x1b[2J", "text_loss/none", "text_loss/",
            "visual_loss/good", "grad_norm/nose", "grad_norm/table", "data/good", "data/none/x",
        ),
        "there are .*data/bad/REASON.* text_loss/good, visual_loss": (
            "evals.held.vision_loss", "evals.held.grad_norm", "evals.held./x",
            "evals.held.text_loss/x", "evals.held.data//x",
        ),
        "there are accuracy, color, failed": ("evals.asked.loss", "evals.asked.accuracy/x"),
    }  # fmt: skip
    for said, metrics_ in wrong.items():
        for metric in metrics_:
            with pytest.raises(ConfigError, match=f"(?s)there will be no such metric.*{said}"):
                metrics.check(metric, runs)
    for metric in ("text_loss/good", "loss", "grad_norm", "grad_norm/head", "mfu",
                   "data/good/too_long", "evals.held.loss", "evals.held.text_loss/bad",
                   "evals.held.data/bad/x", "evals.own.x", "evals.unsaid.x", "evals.asked.accuracy",
                   "evals.asked.color", "evals.asked.failed"):  # fmt: skip
        metrics.check(metric, runs)


def test_a_swept_weight_of_a_loss(folder):
    """Their weighted sum can't be compared, so the user has to choose."""
    (folder / "weighted").mkdir()
    (folder / "weighted/toy.py").write_text(
        "import dataclasses\nfrom tests.train.toy import *\nfrom tests.train import toy\n"
        "@dataclasses.dataclass(frozen=True)\nclass Config(toy.Config):\n    coef: float = 0.5\n"
        "class Weighted(toy.Toy):\n    @property\n    def loss_weights(self):\n"
        "        return {'text': 1.0, 'visual': self.cfg.coef}\n"
        "def create(cfg, rngs):\n    return Weighted(cfg, rngs)\n"
    )
    text = FILE.replace("tests.train.toy", "weighted.toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for values, code in (("[1.0, 2.0]", 2), ("[1.0]", 0)):
            swept = f'add.product({{"model.coef": {values}, "model.noise": [0.0, 0.1]}})'
            (folder / "c.py").write_text(text.replace("SWEEP", swept))
            more = ["--table", "--workdir=new"]
            found = sweep(folder, *more, code=code, naming="--metric=visual_loss" if code else "")
            assert ("weight of the loss visual" in found.err) == bool(code)
            assert (folder / "new").exists() != bool(code)
            sweep(folder, *more, "--metric=visual_loss", code=0)
            shutil.rmtree(folder / "new")


# ---- config files

SWEEPS = [
    "add",
    "return 3",
    "raise ValueError('\\x1b[2J')",
    "1 / 0",
    "add(None, None)",
    "add(3)",
    "add([1])",
    "add({3: 1})",
    "add({None: 1})",
    "add({'': 1})",
    "add({'.': 1})",
    "add({'steps.': 1})",
    "add({'steps.x': 1})",
    "add({'=': 1})",
    "add({'steps=3': 1})",
    "add({'steps': {}})",
    "add({'steps': []})",
    "add({'model': 3})",
    "add({'model': {'nose': 3}})",
    "add({'model': None})",
    "add({'recipe': 'os'})",
    "add({'recipe': 'no.such'})",
    "add({'recipe': 3})",
    "add({'steps': 0})",
    "add({'steps': 10**400})",
    "add({'steps': float('nan')})",
    "add({'optim.learning_rate': 'x'})",
    "add({'optim.learning_rate': 1j})",
    "add({'optim.learning_rate': b'1'})",
    "add({'optim.learning_rate': add})",
    "add({'optim.learning_rate': add.log(1, 2)})",
    "add({'optim.learning_rate': object()})",
    "add({'stage': 'a\\0b'})",
    "add({'stage': '\\ud800'})",
    "add({'stage': 'x' * 10**6})",
    "add({'stage': '../..'})",
    "add(steps=True)",
    "add(**{'a b': 1})",
    "add.product(None)",
    "add.product({})",
    "add.product({'steps': 3})",
    "add.product({'steps': 'ab'})",
    "add.product({'steps': []})",
    "add.product({'steps': {1: 2}})",
    "add.product([('steps', [1])])",
    "add.product({'steps': iter(int, 1)})",
    "add.product({'steps': range(10**12)})",
    "add.product({k: range(1, 99) for k in ('steps', 'seed', 'keep', 'log_every')})",
    "add.zip({'steps': [1], 'seed': []})",
    "add.zip({'steps': [1], 'seed': [1, 2]})",
    "add.zip({})",
    "add.zip(3)",
    "add.random(-1, {'steps': [1]})",
    "add.random(10**9, {'steps': [1]})",
    "add.random(1.5, {'steps': [1]})",
    "add.random('a', {'steps': [1]})",
    "add.random(3, {})",
    "add.random(3, {'steps': []})",
    "add.random(3, {'steps': 1})",
    "add.random(3, {'steps': add.log(1, 2)})",
    "add.log(0, 1)",
    "add.log(2, 1)",
    "add.log('a', 'b')",
    "add.log(float('nan'), 1)",
    "add.uniform(1, 1)",
    "add.uniform(0, float('inf'))",
    "add.uniform(None, 1)",
    "add.config.nose",
    "add.config.steps = 5",
    "add.config = None",
    "add.runs.append(3)",
    "add.runs = None",
    "def f(): f()\n    f()",
    "import no_such_module",
    "from metamorph_jax import nothing",
    "x = 0\n    while True:\n        x += 1\n        add(seed=x)",
    "add({'a': {}}); add['a']",
    "add({'guard.spike': '__import__(\"os\").system(\"touch x\")'})",
]


@pytest.mark.parametrize("number", range(len(SWEEPS)))
def test_sweeps_that_are_none(folder, number):
    (folder / "c.py").write_text(FILE.replace("SWEEP", SWEEPS[number]))
    found = sweep(folder, "--list")
    assert found.code == 2 or "new" in found.out or FIRST in found.out
    assert not (folder / "x").exists()


@pytest.mark.parametrize(
    "text", ["", "\0", "sweep = 3", "sweep = None", "def sweep(", "\x1b[2J",
             "def sweep(): pass\ndef get_config(arg=''): return 1"],
)  # fmt: skip
def test_files_that_are_no_configs(folder, text):
    (folder / "c.py").write_text(text)
    sweep(folder, "--list", code=2, naming="c.py")


# ---- tables


def test_generated_tables(tmp_path):
    """Any text and any number as key, value, metric, name and state."""
    odd = ["|", "\n", "\x1b[2J", "=1", "<b>", "\u202e", "a" * 5000, "", "\ud800", "$x$", "_", "\\"]
    infinite = [float("nan"), float("inf"), 10**400]
    numbers = [0, -1, 1e308, -1e308, *infinite, True, None, [1, "|"], 1e-320]

    def write(i):
        pick = lambda values, k: values[(i * 7 + k * 3) % len(values)]  # noqa: E731
        rows = [
            {"name": f"{n:03d}_{pick(odd, n)}", "state": pick(odd, n + 1), "step": n, "steps": 5,
             "values": {"rate": pick(numbers, n + 2), pick(odd, 3): pick(odd, n + 4)},
             "metrics": {pick(odd, 5): float(pick([0.5, 1e300, -2.0, 1e-300], n))}}
            for n in range(3)
        ]  # fmt: skip
        files = table.write(tmp_path, rows, pick(odd, 5))
        for file in files[:2]:
            assert file.read_text().replace("\n", "").isprintable()
            assert file.read_text().count("\n") == 4 + (file.suffix == ".md")

    with table.figures.style():  # makes matplotlib's list of fonts
        table.plot([{"values": {"a": n}, "metrics": {"b": 1.0}} for n in range(2)], "b").savefig(
            tmp_path / "fonts.png"
        )
    for i in range(24):
        harness.attempt(lambda i=i: write(i), tmp_path, code=0)

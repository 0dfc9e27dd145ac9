"""`report.html` of a run: what it says of curves, options, skipped data and samples."""

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from metamorph_jax import cli
from metamorph_jax.eval import run_report
from metamorph_jax.train import command

EVIL = "<script>alert('x')</script>"
CONFIG = {
    "recipe": "metamorph", "stage": "vpit", "steps": 400, "batch_size": 2,
    "data": {"sources": [{"name": "main", "path": f"{EVIL}.jsonl"}]},
    "optim": {"learning_rate": 0.1, "groups": [{"name": "head", "match": EVIL}]},
}  # fmt: skip


def row(step, **more):
    values = {"loss": 5.0 / step, "text_loss": 2.0, "text_loss/main": 2.0, "grad_norm": 1.0}
    values |= {"seconds_per_step": 0.5, "data_wait": 0.1, "learning_rate": 0.1}
    return {"step": step, **values, **more}


@pytest.fixture
def workdir(tmp_path):
    """A run of 400 steps that skipped three samples."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "versions.json").write_text(json.dumps({"jax": "0.10.2", "command": [EVIL]}))
    last = {"data/main/missing": 3.0, "data/main/too_long": 0.0, "evals.heldout.loss": 0.25}
    lines = [row(200), row(400, **last)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    folder = tmp_path / "samples"
    folder.mkdir()
    Image.fromarray(np.full((6, 8, 3), 99, np.uint8)).save(folder / "look-00000400-0-drawn.png")
    for step, answer in ((200, "old answer"), (400, EVIL)):
        images = {"drawn": f"look-{step:08d}-0-drawn.png", "out": "../../outside.png"}
        sample = {"name": EVIL, "text": {"question": "What?", "answer": answer}, "images": images}
        table = {"evaluation": "look", "step": step, "samples": [sample]}
        (folder / f"look-{step:08d}.json").write_text(json.dumps(table))
    return tmp_path


def page(workdir):
    assert cli.main(["report", str(workdir)]) == 0
    return (workdir / "report.html").read_text()


def words(text):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"(?s)<style>.*?</style>", "", text)))


def test_everything_is_there_and_escaped(workdir):
    text = page(workdir)
    assert "<script" not in text and text.count("data:image/png") == 1
    said = words(text)
    for expected in (
        "400 steps with 2 rows each", "loss 0.0125 step 400; first: 0.025", "main missing 3",
        "after step 400", "optim.groups.head.match", "jax 0.10.2", "evals.heldout.loss",
    ):  # fmt: skip
        assert expected in said, expected
    assert "too_long" not in said and "old answer" not in said
    assert "leaves it as it was" not in said


def test_a_source_that_is_the_only_one_has_no_line_of_its_own():
    line = ([1, 2], [3.0, 4.0])
    found = run_report.losses(
        {"text_loss": line, "text_loss/main": line, "text_loss/b": ([1], [2.0])}
    )
    assert [(curve.title, [*curve.lines]) for curve in found] == [
        ("text_loss", ["text_loss", "text_loss/b"])
    ]


def test_a_short_run_claims_no_training(workdir):
    (workdir / "metrics.jsonl").write_text(json.dumps(row(6)) + "\n")
    said = words(page(workdir))
    assert "Steps of this run: 6." in said and "not what the model can learn" in said
    assert "No sample was skipped or cut" in said


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "Steps of this run: 0." in words(page(tmp_path))


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 10000, ""])
def test_a_damaged_or_missing_config_is_one_line(content, tmp_path, capsys):
    if content:
        (tmp_path / "config.json").write_text(content)
    assert cli.main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error and error.count("\n") == 1


def test_train_ends_with_it(workdir, monkeypatch):
    monkeypatch.setattr(command, "run", lambda args: 0)
    words = ["train", "--config=x", f"--workdir={workdir}"]
    assert cli.main(words) == 0 and (workdir / "report.html").is_file()
    (workdir / "report.html").unlink()
    monkeypatch.setattr(command, "run", lambda args: 2)
    assert cli.main(words) == 2 and not (workdir / "report.html").exists()
    assert "matplotlib" in sys.modules

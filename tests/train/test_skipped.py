"""Training says what it skips and cuts of its data, and why data ended early."""

import json

import numpy as np
import pytest

from metamorph_jax import cli
from metamorph_jax.errors import DataError
from metamorph_jax.train import loop
from metamorph_jax.train.shards import DataShards
from metamorph_jax.train.skipped import Skipped, summary
from tests.data.conftest import conversation, write_jsonl
from tests.train import toy
from tests.train.test_loop import config, lines


def test_counts_of_all_data_shards_are_added(monkeypatch):
    monkeypatch.setattr(toy.Stream, "skipped", {"good/missing": 2, "bad/cut": 1})
    data = DataShards(lambda shard: toy.Stream(toy.Data(), shard), 4, 8, np.arange(8))
    said = []
    skipped = Skipped(data, said.append)
    assert skipped.report() == {"data/bad/cut": 4.0, "data/good/missing": 8.0}
    skipped.report()  # nothing new
    assert said == ["data so far: skipped 8: good/missing 8; used, though bad/cut 4"]
    assert summary({}) == "nothing skipped"
    assert summary({"a\nb/x": 1}) == "skipped 1: a\\nb/x 1"


def test_counts_are_logged_and_in_the_metrics(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy.Stream, "skipped", {"good/missing": 10, "good/cut": 3})
    heldout = {"every": 2, "data": {"seed": 7}, "batches": 1}
    loop.train(config(data={"end": 3}, evals={"heldout": heldout}), tmp_path / "w")
    out = capsys.readouterr().out
    said = " ".join(out.split())  # lines are wrapped
    assert out.count("data so far: skipped 10: good/missing 10; used, though good/cut 3") == 1
    assert "the data ended after 3 of 6 steps" in said
    assert "(skipped 10: good/missing 10;" in said
    held_out = [line for line in lines(tmp_path / "w") if "evals.heldout.loss" in line]
    steps = [line for line in lines(tmp_path / "w") if line not in held_out]
    assert len(steps) == 3 and all(line["data/good/missing"] == 10 for line in steps)
    assert len(held_out) == 2 and all(x["evals.heldout.data/good/cut"] == 3 for x in held_out)
    assert said.count("data of config.evals.heldout: skipped 10: good/missing 10; used") == 1
    step = next(line for line in out.splitlines() if line.startswith("step 2/6"))
    assert "missing" not in step


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no sample of config.data.sources can be used"):
        loop.train(config(data={"end": 0}), tmp_path / "w")
    assert not (tmp_path / "w/final").exists()


def test_the_command(tmp_path, capsys):
    """All of 18 samples are bad: exit code 2, and the reasons in one line."""
    path = tmp_path / "d.jsonl"
    bad = {"image": "none.png", "conversations": conversation("<image>\nQ", "A")}
    odd = {"img": "none.png", "conversations": conversation("Q", "A")}
    write_jsonl(path, [bad] * 15 + [odd] * 3)
    code = cli.main([
        "train", "--config=tests/recipes/toy_config.py", f"--workdir={tmp_path / 'w'}",
        f"--config.data.sources.main.path={path}", "--config.data.order.epochs=1",
        "--config.tensorboard=false",
    ])  # fmt: skip
    error = capsys.readouterr().err
    assert code == 2
    assert "(skipped 18: main/missing 15, main/unknown_key 3)" in error
    assert "metamorph data check" in error and "Traceback" not in error
    assert json.loads((tmp_path / "w/config.json").read_text())

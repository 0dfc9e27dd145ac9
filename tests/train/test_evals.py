"""Evaluations in the loop: their values, what a resume keeps of them, and the best checkpoint."""

import json
import pathlib
import signal
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from metamorph_jax import sharding  # noqa: E402
from metamorph_jax.errors import ConfigError, Preempted  # noqa: E402
from metamorph_jax.train import evals, loop, state  # noqa: E402
from metamorph_jax.train.checkpoint import Checkpoints, read_export  # noqa: E402
from metamorph_jax.train.config import EvalConfig  # noqa: E402
from tests.train import forked, toy  # noqa: E402
from tests.train.test_loop import config, final, lines, same  # noqa: E402

HELDOUT = {"every": 2, "data": {"seed": 7}, "batches": 3}
TASK = {"kind": "task", "every": 3, "task": "tests.train.toy:RightTokens", "options": {"seed": 5}}


def evaluated(workdir):
    """step -> values of the evaluations after it."""
    found = {}
    for row in lines(workdir):
        values = {k: v for k, v in row.items() if k.startswith("evals.")}
        if values:
            assert row["step"] not in found, "evaluated twice"
            found[row["step"]] = values
    return found


def with_evals(**changes):
    table = {"heldout": HELDOUT, "task": TASK}
    return config(**{"evals": table, "steps": 6, "checkpoint_every": 4} | changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    returned = loop.train(with_evals(tensorboard=True), workdir)
    return workdir, returned


def test_when_and_what_is_logged(whole):
    workdir, returned = whole
    found = evaluated(workdir)
    names = {step: {key.split(".")[1] for key in values} for step, values in found.items()}
    assert names == {2: {"heldout"}, 3: {"task"}, 4: {"heldout"}, 6: {"heldout", "task"}}
    assert {
        "evals.heldout.loss", "evals.heldout.text_loss", "evals.heldout.visual_loss",
        "evals.heldout.text_loss/good", "evals.heldout.text_loss/bad",
    } <= found[2].keys()  # fmt: skip
    assert found[6]["evals.heldout.loss"] < found[2]["evals.heldout.loss"]
    assert found[6].items() <= returned.items() and "loss" in returned
    board = b"".join(file.read_bytes() for file in (workdir / "tensorboard").iterdir())
    assert b"evals/heldout/text_loss/good" in board and b"evals/task/right" in board


def test_training_is_the_same_without(whole, tmp_path):
    loop.train(config(), tmp_path / "w")
    same(final(tmp_path / "w"), final(whole[0]))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("ema", [None, 0.5])
def test_values_are_those_of_a_direct_computation(accumulate, ema, tmp_path):
    """On the exported weights; without noise, which depends on how a batch is cut."""
    heldout = HELDOUT | {"average": ema is not None}
    cfg = with_evals(
        evals={"heldout": heldout, "task": TASK}, accumulate=accumulate, model={},
        optim={"learning_rate": 0.02, "ema_decay": ema},
    )  # fmt: skip
    loop.train(cfg, tmp_path / "w")
    found = evaluated(tmp_path / "w")[6]

    mesh, model_cfg = sharding.make_mesh(), toy.Config()
    parts, _, frozen = state.create(
        lambda r: toy.create(model_cfg, r), toy.STAGES["all"](model_cfg), mesh, 0
    )
    weights = read_export(tmp_path / "w")
    frozen |= {name: weights.pop(name) for name in parts.buffers}
    model = parts.merge(weights, frozen)
    sums, counts, metrics = {}, {}, {}
    for number in range(3):
        batch = toy.batch([7, number])
        for name, value in model.loss_sums(batch, None)[0].items():
            sums[name] = sums.get(name, 0.0) + float(value)
        for name, value in model.loss_counts(batch).items():
            counts[name] = counts.get(name, 0) + int(value)
        for name, pair in model.loss_sums(batch, None)[1].items():
            metrics[name] = metrics.get(name, 0.0) + np.array(pair, np.float64)
    means = {name: sums[name] / counts[name] for name in sums}
    close = lambda x: pytest.approx(x, rel=1e-5)  # noqa: E731
    assert found["evals.heldout.loss"] == close(means["text"] + 0.5 * means["visual"])
    assert found["evals.heldout.visual_loss"] == close(means["visual"])
    for source in ("good", "bad"):
        n, d = metrics[f"text_loss/{source}"]
        assert found[f"evals.heldout.text_loss/{source}"] == close(n / d)
    right = toy.RightTokens(seed=5).run(toy.generator(model, model_cfg, toy.Data()))
    assert found["evals.task.right"] == right["right"]


def test_held_out_data_to_their_end(tmp_path):
    """`batches=0` reads all; a source that ends early is no endless loop."""
    for name, options in (("all", {"end": 5}), ("five", {})):
        heldout = HELDOUT | {"data": {"seed": 7} | options, "batches": 0 if options else 5}
        loop.train(config(evals={"heldout": heldout}, steps=2), tmp_path / name)
    assert evaluated(tmp_path / "all") == evaluated(tmp_path / "five")


def test_a_resumed_run_finds_the_same(whole, tmp_path, monkeypatch):
    """Stopped at step 3, whose task is due: it is done after the resume."""
    stop = lambda self, step: step == 3 and not self._note()  # noqa: E731
    monkeypatch.setattr(loop.Sigterm, "received", stop)
    with pytest.raises(Preempted):
        loop.train(with_evals(), tmp_path / "w")
    monkeypatch.setattr(loop.Sigterm, "received", lambda self, step: False)
    assert set(evaluated(tmp_path / "w")) == {2}
    loop.train(with_evals(), tmp_path / "w")
    assert evaluated(tmp_path / "w") == evaluated(whole[0])
    loop.train(with_evals(), tmp_path / "w")  # a finished run evaluates nothing more
    assert evaluated(tmp_path / "w") == evaluated(whole[0])


# ---- the best


def best_of(workdir):
    return json.loads((workdir / "best.json").read_text())


def steps_of(workdir):
    checkpoints = Checkpoints(workdir)
    checkpoints.close()
    return checkpoints.steps


def scripted(workdir, **changes):
    """A run of 12 steps whose task has the values 3, 1, 2, 5, 4, 4 after every second one."""
    values = {"2": 3, "4": 1, "6": 2, "8": 5, "10": 4, "12": 4}
    task = {"kind": "task", "every": 2, "task": "tests.train.toy:Scripted",
            "options": {"workdir": str(workdir), "values": values}}  # fmt: skip
    return config(**{
        "evals": {"script": task}, "keep_best": "evals.script.value", "steps": 12, "keep": 1,
        "checkpoint_every": 3,
    } | changes)  # fmt: skip


@pytest.mark.parametrize(("best_is", "step"), [("min", 4), ("max", 8)])
def test_the_best_is_kept(best_is, step, tmp_path):
    cfg = scripted(tmp_path / "w", best_is=best_is)
    loop.train(cfg, tmp_path / "w")
    value = {4: 1.0, 8: 5.0}[step]
    assert best_of(tmp_path / "w") == {"metric": "evals.script.value", "value": value, "step": step}
    assert steps_of(tmp_path / "w") == [step, 12]


def test_the_best_survives_a_kill(tmp_path):
    """Killed after the best was followed by other checkpoints; the next life knows it."""
    cfg = scripted(tmp_path / "w", data={"pause": 0.2})
    run = forked.Run(cfg, tmp_path / "w")
    run.until(lambda: (tmp_path / "w/checkpoints/9").is_dir())
    run.signal(signal.SIGKILL)
    run.wait()
    assert best_of(tmp_path / "w")["step"] == 4 and 4 in steps_of(tmp_path / "w")
    (tmp_path / "w/best.json").unlink()  # as if the kill had come before it was written
    run = forked.Run(cfg, tmp_path / "w", name="_again")
    assert run.wait() == 0, run.said
    assert "best evals.script.value: 1, checkpoint 4" in run.said
    assert best_of(tmp_path / "w")["step"] == 4 and steps_of(tmp_path / "w") == [4, 12]


def test_a_best_that_is_found_only_after_a_resume(tmp_path, monkeypatch):
    """The checkpoint of the signal was saved before its evaluation."""
    cfg = scripted(tmp_path / "w")
    stop = lambda self, step: step == 4 and not self._note()  # noqa: E731
    monkeypatch.setattr(loop.Sigterm, "received", stop)
    with pytest.raises(Preempted):
        loop.train(cfg, tmp_path / "w")
    monkeypatch.setattr(loop.Sigterm, "received", lambda self, step: False)
    assert best_of(tmp_path / "w")["step"] == 2
    loop.train(cfg, tmp_path / "w")
    assert best_of(tmp_path / "w")["step"] == 4 and steps_of(tmp_path / "w") == [4, 12]


# ---- several processes, and mistakes


@pytest.mark.e2e
def test_two_processes_find_the_same(whole, tmp_path):
    cfg = with_evals(keep_best="evals.heldout.loss")
    forked.finish(forked.together(2, cfg, tmp_path / "w"))
    mine, theirs = evaluated(tmp_path / "w"), evaluated(whole[0])
    assert mine.keys() == theirs.keys()
    for step, values in theirs.items():
        assert mine[step] == pytest.approx(values, rel=1e-5), step
    assert best_of(tmp_path / "w")["step"] == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evals": {"a": {"data": {"seeed": 1}}}}, "config.evals.a.data.seed"),
        ({"evals": {"a": {"kind": "tusk"}}}, "kind must be loss, task or samples, not 'tusk'"),
        ({"evals": {"a": {"kind": "task"}}}, "kind='task' needs `task`"),
        ({"evals": {"a": TASK | {"task": "tests.train.toy:No"}}}, "must be package.module:Class"),
        ({"evals": {"a": TASK | {"task": "tests.none:No"}}}, "no module tests.none"),
        ({"evals": {"a": TASK | {"options": {"sead": 1}}}}, "config.evals.a.options: .*'sead'"),
        ({"evals": {"a": HELDOUT}, "keep_best": "evals.b.loss"}, "evaluations: evals.a"),
        ({"evals": {"a": HELDOUT}, "keep_best": "evals.a.los"}, "no such metric .did you mean"),
        ({"evals": {"a": HELDOUT}, "best_is": "low"}, "best_is must be one of min, max"),
        ({"evals": {"a": {"data": {"masked": 0}, "batches": 1}}}, "no batch has a target"),
    ],
)  # fmt: skip
def test_mistakes_are_named(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        loop.train(config(steps=2, **change), tmp_path / "w")


def test_a_recipe_that_does_not_generate(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "generator", lambda *args, **options: None)
    with pytest.raises(ConfigError, match="evals.task: the recipe tests.train.toy doesn't"):
        loop.train(with_evals(), tmp_path / "w")


def test_overriding_data():
    table = {"sources": {"a": 1}, "row": {"length": 4, "more": 2}, "seed": 1}
    made = evals.overridden(table, {"sources": {"b": 2}, "row": {"length": 8}, "new": {}})
    assert made == {"sources": {"b": 2}, "row": {"length": 8, "more": 2}, "seed": 1, "new": {}}
    assert table["row"]["length"] == 4


def test_names_have_no_dots():
    with pytest.raises(ValueError, match="has a dot"):
        EvalConfig("a.b")

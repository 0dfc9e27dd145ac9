import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from metamorph_jax.errors import ConfigError, Preempted
from metamorph_jax.train import loop, shards
from metamorph_jax.train.checkpoint import read_export
from tests.devices import virtual

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.train import forked  # noqa: E402


def config(**changes):
    optim = {"learning_rate": 0.02, "warmup": 2, "weight_decay": 0.01} | changes.pop("optim", {})
    base = dict(
        recipe="tests.train.toy", stage="all", steps=6, batch_size=8, model={"noise": 0.1},
        data={}, optim=optim, initial_batches=2, log_every=1, checkpoint_every=2,
        tensorboard=False, compilation_cache="",
    )  # fmt: skip
    return base | changes


def final(workdir):
    return {k: np.asarray(v) for k, v in read_export(workdir).items()}


def lines(workdir):
    file = pathlib.Path(workdir) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_allclose(a[k], b[k], rtol=tolerance, atol=tolerance, err_msg=k)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    loop.train(config(), workdir)
    return workdir


def test_learns_and_reports(whole):
    rows = lines(whole)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    wanted = {
        "loss", "text_loss", "visual_loss", "text_loss/good", "text_loss/bad", "grad_norm",
        "grad_norm/llm", "grad_norm/head", "learning_rate", "data_wait", "positions_per_second",
        "images_per_second", "seconds_per_step", "seconds_left",
    }  # fmt: skip
    assert wanted <= rows[0].keys()
    assert rows[0]["grad_norm"] == pytest.approx(
        np.hypot(rows[0]["grad_norm/llm"], rows[0]["grad_norm/head"])
    )
    saved = json.loads((whole / "config.json").read_text())
    assert saved["model"]["width"] == 16 and saved["optim"]["name"] == "adamw"
    assert json.loads((whole / "versions.json").read_text())["jax"] == jax.__version__


def test_resume_is_bit_for_bit(whole, tmp_path, monkeypatch):
    """Stopped after step 3, state and next batches of the rest equal the uninterrupted run."""
    seen = []
    real = shards.to_devices
    monkeypatch.setattr(shards, "to_devices", lambda b, *a: (seen.append(b.tokens), real(b, *a))[1])
    stop = lambda self, step: step == 3 and not self._note()  # noqa: E731
    monkeypatch.setattr(loop.Sigterm, "received", stop)
    with pytest.raises(Preempted):
        loop.train(config(), tmp_path / "w")
    monkeypatch.setattr(loop.Sigterm, "received", lambda self, step: False)
    first = lines(tmp_path / "w")
    loop.train(config(), tmp_path / "w")
    same(final(whole), final(tmp_path / "w"))

    def numbers(row):
        timing = ("seconds", "per_second", "wait", "goodput", "mfu", "hbm")
        return {k: v for k, v in row.items() if not any(t in k for t in timing)}

    assert len(first) == 3
    assert list(map(numbers, lines(tmp_path / "w"))) == list(map(numbers, lines(whole)))
    assert len(seen) == 6 and not any((a == b).all() for a, b in zip(seen, seen[1:], strict=False))
    # A finished run changes nothing more.
    loop.train(config(), tmp_path / "w")
    same(final(whole), final(tmp_path / "w"))


def test_data_that_ends(tmp_path):
    loop.train(config(data={"end": 3}), tmp_path / "w")
    assert lines(tmp_path / "w")[-1]["step"] == 3 and (tmp_path / "w/final").is_dir()


def test_next_stage_starts_from_the_last(whole, tmp_path):
    """The head comes from the run before; the frozen llm, too, though only that run trained it."""
    cfg = config(
        stage="head", steps=1, model={"weights": f"workdir:{whole}"}, initial_batches=0,
        optim={"learning_rate": 0.0},
    )  # fmt: skip
    loop.train(cfg, tmp_path / "w")
    before, after = final(whole), final(tmp_path / "w")
    assert set(after) == {"head.kernel", "head.bias", "mean"}
    same({k: before[k] for k in after}, after)
    from tests.train import toy

    cfg = toy.Config(weights=f"workdir:{tmp_path / 'w'}")
    model = toy.create(cfg, nnx.Rngs(9))
    toy.load_pretrained(model, cfg)
    np.testing.assert_array_equal(model.llm.kernel[...], before["llm.kernel"])


def test_refuses_another_config(whole):
    with pytest.raises(ConfigError) as error:
        loop.train(config(model={"noise": 0.2}, data={"seed": 1}, log_every=3), whole)
    said = str(error.value)
    assert "model.noise: 0.1 -> 0.2" in said and "data.seed" in said and "log_every" not in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stpes": 3}, "did you mean config.steps"),
        ({"recipe": "no_such"}, "config.recipe 'no_such'"),
        ({"model": {"widht": 3}}, "did you mean config.model.width"),
        ({"optim": {"learning_rate": 1.0, "schedule": "cosin"}}, "schedule 'cosin'"),
        (
            {"optim": {"groups": {"lm": {"match": "lm"}}}},
            r"groups.lm: 'lm' matches no trained parameter .*Trained: head.bias, head.kernel, llm",
        ),
        ({"optim": {"groups": {"lm": {"match": "("}}}}, "'[(]' is not a regular expression"),
        ({"optim": {"name": "adamm"}}, "optim.name 'adamm' is none of adam, adamw"),
        ({"optim": {"options": {"nesterof": 1}}}, "options.nesterof: adamw has no such .*nesterov"),
        ({"optim": {"name": "sgd", "options": {"b1": 1}}}, "options.b1: sgd .* takes nesterov"),
        ({"optim": {"name": "sgd", "b2": 0.9}}, "optim.b2: sgd has none"),
        ({"keep_best": "evals.a.loss"}, "evaluations: none"),
        ({"optim": {"learning_rate": float("nan")}}, "learning_rate must be finite and at least 0"),
        ({"optim": {"b2": 1.0}}, r"b2 must be in \[0, 1\), not 1.0"),
        ({"optim": {"groups": {"a": {"match": "x", "rate": -1.0}}}}, "rate must be finite"),
        ({"mesh": {"fsdp": 3}}, "config.mesh"),
        ({"batch_size": 9, "accumulate": 2}, "multiple of accumulate"),
    ],
)
def test_wrong_configs(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        loop.train(config(**change), tmp_path / "w")


def test_eight_devices_equal_one(whole, tmp_path):
    cfg = config(mesh={"fsdp": 4, "tensor": 2}, model={"noise": 0.1, "width": 16})
    flags = virtual(8)
    run = forked.Run(cfg, tmp_path / "w", env=flags)
    assert run.wait() == 0 and "8 x cpu" in run.said, run.said
    same(final(whole), final(tmp_path / "w"), 1e-5)

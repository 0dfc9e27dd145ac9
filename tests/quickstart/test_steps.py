"""What all quick starts share: their precision, and the plan with its estimate."""

import json

import pytest

from metamorph_jax.errors import UserError
from metamorph_jax.quickstart import estimate, steps
from metamorph_jax.quickstart.run import MINUTES, QuickStart
from metamorph_jax.train.config import resolve


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("precision", ["", "float32", "bfloat16"])
def test_the_precision_that_is_given_overrides_the_machine_s(
    tmp_path, monkeypatch, units, precision
):
    monkeypatch.setattr(steps, "has_matrix_units", lambda: units)
    start = QuickStart(tmp_path, "quickstart", 0, precision)
    wanted = precision or ("bfloat16" if units else "default")
    table = start.config("vpit")
    assert resolve(table).cfg.matmul_precision == wanted
    # Recomputing is cheap with matrix units only; it changes no number.
    assert (table.model.remat == "full") == (units and wanted == "bfloat16")
    assert start.matmul_precision == (None if wanted == "default" else wanted)


def test_a_workdir_keeps_its_precision(tmp_path):
    QuickStart(tmp_path, "smoke", 0, "bfloat16")
    QuickStart(tmp_path, "smoke", 0, "bfloat16")
    found = json.loads((tmp_path / "quickstart.json").read_text())
    assert found == {"size": "smoke", "seed": 0, "precision": "bfloat16"}
    with pytest.raises(UserError, match="choose another --workdir"):
        QuickStart(tmp_path, "smoke", 0, "float32")


def test_a_head_that_samples_predicts_nothing_for_the_decoder(tmp_path):
    """Its tokens are like those of real images, so that the decoder is trained on these alone."""
    regresses = QuickStart(tmp_path / "mlp", "quickstart", 0)
    samples = QuickStart(tmp_path / "flow", "quickstart", 0, head="flow")
    assert "predict" in regresses.steps and "predict" not in samples.steps
    assert (
        regresses.config("decoder").data.predicted and not samples.config("decoder").data.predicted
    )
    assert [resolve(one.config("vpit")).model.head for one in (regresses, samples)] == [
        "mlp",
        "flow",
    ]
    with pytest.raises(UserError, match="choose another --workdir"):
        QuickStart(tmp_path / "flow", "quickstart", 0)


def test_all_questions_can_be_asked_after_a_finished_run(tmp_path):
    some = QuickStart(tmp_path, "smoke", 0)
    for name in some.steps:
        some.once(name, lambda: {"full": False})
    whole = QuickStart(tmp_path, "smoke", 0, full=True)
    assert [name for name in whole.steps if not whole.done(name)] == ["evaluate", "report"]
    whole.once("evaluate", lambda: {"full": True})
    assert some.done("evaluate") and whole.done("evaluate")


@pytest.mark.parametrize(("precision", "factor"), [("float32", 2.2), ("bfloat16", 1.0)])
def test_the_plan_estimates_what_is_left_on_this_machine(
    tmp_path, monkeypatch, capsys, precision, factor
):
    reference = estimate.REFERENCES[precision].flops
    monkeypatch.setattr(estimate, "measured_flops", lambda precision: reference / 2)
    start = QuickStart(tmp_path, "quickstart", 0, precision)
    start.once("connector", dict)
    start.say_plan()
    said = capsys.readouterr().out
    assert f"vpit       about {2 * factor * MINUTES['vpit']:.0f} min\n" in said
    left = sum(MINUTES.values()) - MINUTES["connector"]
    assert f"about {2 * factor * left:.0f} min in all: this machine is 2.0 times slower" in said
    assert "connector  done, 0 s" in said
    monkeypatch.setattr(estimate, "measured_flops", lambda precision: 2 * reference)
    assert "or faster" in str(estimate.estimate(precision))


def test_a_measurement_counts_the_products(monkeypatch):
    monkeypatch.setattr(estimate, "SECONDS", 0.0)
    assert 1e8 < estimate.measured_flops(None) < 1e14

"""From a stored plan to steps, chip-hours and dollars, and what to expect beside a bound."""

import json
import pathlib

import pytest

from metamorph_jax import cli
from metamorph_jax.config import load_config
from metamorph_jax.errors import UserError
from metamorph_jax.plan import chips, command, cost, report
from metamorph_jax.train.config import resolve

ROOT = pathlib.Path(__file__).parents[2]


def stored(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/plans/{name}.json").read_text())


@pytest.fixture(scope="module")
def vpit():
    return resolve(load_config(f"{ROOT}/configs/metamorph/vpit.py:8b")).cfg


def test_expected_is_a_share_of_every_bound():
    plan = stored("vpit-8b-v6e-64")
    found = cost.expected(plan)
    share = cost.PUBLISHED["v6e"].fraction
    assert found["source"] and found["fraction"] == share == 0.5
    assert found["mfu"] == pytest.approx(share * plan["mfu_bound"])
    assert found["step_seconds"] == pytest.approx(plan["roofline_seconds"]["step"] / share)
    assert found["rows_per_second"] * found["step_seconds"] == pytest.approx(plan["rows"])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("decode-8b-v6e-1-int8", id="decoding"),
        pytest.param("decoder-sd15-v5e-16", id="images alone"),
        pytest.param("vpit-smoke-v5e-8", id="bound by memory"),
        pytest.param("vpit-8b-v5e-64-remat-none", id="does not fit"),
    ],
)
def test_nothing_is_expected_without_a_published_run(name):
    assert cost.expected(stored(name)) is None


def test_published_runs_are_of_known_chips():
    assert set(cost.PUBLISHED) <= set(chips.CHIPS)
    assert all(0 < one.fraction < 1 and one.source for one in cost.PUBLISHED.values())


def test_a_run_of_the_config(vpit):
    """Its rows are trained on whatever the planned batch is: 64 rows here, 256 in the config."""
    plan = stored("vpit-8b-v5e-64")
    rows = cost.rows_to_train(vpit)
    assert rows == 10460 * 256
    run = cost.run(plan, rows, price=1.5)
    assert (run["steps"], run["chips"]) == (4 * 10460, 64)
    hours = 4 * 10460 * plan["roofline_seconds"]["step"] / 3600
    spent = {"hours": hours, "chip_hours": 64 * hours, "cost": 96 * hours}
    assert run["bound"] == pytest.approx(spent)
    slower = {k: v / cost.PUBLISHED["v5e"].fraction for k, v in spent.items()}
    assert run["expected"] == pytest.approx(slower)


def test_samples_are_packed_into_rows(vpit):
    assert cost.samples_per_row(vpit) == 6  # 1536 samples in 256 rows
    assert cost.run(stored("vpit-8b-v5e-64"), cost.rows_to_train(vpit, 64 * 6 + 1))["steps"] == 2
    llava = resolve(load_config(f"{ROOT}/configs/llava/stage2.py:7b")).cfg
    assert cost.rows_to_train(llava, 1000) == 1000


def test_a_chip_of_two_devices_and_slices():
    plan = stored("vpit-8b-v5e-64") | {"topology": "2x tpu7x:2x2x4", "devices": 64}
    assert cost.run(plan, 64)["chips"] == 32
    assert cost.published(plan) is cost.PUBLISHED["tpu7x"]


@pytest.mark.parametrize("price", [None, 2.0])
def test_table(price):
    plan = stored("vpit-8b-v6e-64")
    plan |= {"expected": cost.expected(plan), "run": cost.run(plan, 2677760, price)}
    text = report.table(plan)
    assert "at most 76.5%, expected 38.2%" in text
    assert "20,920 steps of 128 rows on 64 chips" in text
    assert "3.5 h, 227 chip-hours" in text and "7.1 h, 454 chip-hours" in text
    assert ("$908" in text) == (price is not None)


def test_table_without_a_published_run():
    plan = stored("vpit-smoke-v5e-8")
    plan |= {"expected": cost.expected(plan), "run": cost.run(plan, 160, 2.0)}
    text = report.table(plan)
    assert "unknown: no published run" in text
    assert "10 steps of 16 rows on 8 chips" in text and "at least" in text


@pytest.mark.parametrize("words", [["--samples=0"], ["--price=-1"],
                                   ["--what=generate", "--samples=5"]])  # fmt: skip
def test_wrong_options(words):
    config = "--config=configs/metamorph/vpit.py:smoke"
    _, args = cli.parse(["plan", config, "--topology=v5e-8", *words])
    with pytest.raises(UserError, match=words[-1].partition("=")[0]):
        command.run(args)

import csv
import io
import json
import math

import numpy as np
import pytest

from metamorph_jax.sweep import table


def row(name, loss, state="finished", **values):
    metrics = {} if loss is None else {"loss": loss, "accuracy": 1 / (1 + loss)}
    return {"name": name, "state": state, "step": 4, "values": values, "metrics": metrics}


ROWS = [
    row("001_a", 0.5, rate=1e-4, kind="x"),
    row("002_b", None, "new", rate=1e-3, kind="x"),
    row("003_c", 0.25, rate=1e-2, kind="y"),
    row("004_d", math.nan, "failed (3)", rate=1e-1, kind="y"),
]


def test_metrics_are_means_of_the_last_tenth(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert table.read_metrics(file) == (0, {})
    lines = [{"step": i, "loss": float(i), "rare": 8.0} for i in range(1, 21)]
    del lines[-1]["rare"]
    file.write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 21, "lo')
    assert table.read_metrics(file) == (20, {"loss": 19.5, "rare": 8.0})
    file.write_text('{"step": 1, "loss": "nan"}\n')
    assert math.isnan(table.read_metrics(file)[1]["loss"])


def test_short_names():
    names = table.short_names(["optim.rate", "model.rate", "model.width", "seed", "data.seed"])
    assert names == {
        "optim.rate": "optim.rate", "model.rate": "model.rate", "model.width": "width",
        "seed": "seed", "data.seed": "data.seed",
    }  # fmt: skip


def test_markdown_best_first():
    lines = table.markdown(ROWS, "loss").splitlines()
    assert lines[0] == "| run | rate | kind | loss | step | state |"
    assert lines[2] == "| 003 | 0.01 | y | 0.25 | 4 | finished |"
    assert [x.split()[1] for x in lines[2:]] == ["003", "001", "002", "004"]
    assert table.markdown(ROWS[::-1], "accuracy").splitlines()[2].startswith("| 003")
    assert table.best_first([row("1", 0.2), row("2", 0.4)], "accuracy")[0]["name"] == "1"


def test_csv_has_all():
    rows = list(csv.DictReader(io.StringIO(table.as_csv(ROWS))))
    assert [r["run"] for r in rows] == ["001_a", "002_b", "003_c", "004_d"]
    assert rows[0]["rate"] == "0.0001" and rows[0]["loss"] == "0.5" and rows[1]["loss"] == ""


def test_plot_has_a_panel_per_key_and_a_dot_per_run():
    picture = np.asarray(table.plot(ROWS, "loss"))
    assert picture.shape == (300, 840, 3)  # rate and kind
    blue = (picture == (31, 104, 180)).all(-1)
    ys, xs = np.nonzero(blue[:, :420])
    # Lower loss is lower in the picture, and belongs to the larger rate.
    left, right = ys[xs < xs.min() + 5].mean(), ys[xs > xs.max() - 5].mean()
    assert xs.max() - xs.min() > 250 and right > left + 100
    assert table.plot(ROWS[:1], "loss") is None and table.plot(ROWS, "no such") is None


@pytest.mark.parametrize("values", [[1, 2, 4], [1e-5, 1e-3, 1e-1], ["a", "b", "a"], [True, False]])
def test_axis(values):
    place, marks = table._axis(values)
    at = [place(v) for v in values]
    assert all(0 < x < 1 for x in at) and set(marks) <= set(values) | {"True", "False"}
    if values[0] == 1e-5:
        assert at[1] - at[0] == pytest.approx(at[2] - at[1])  # logarithmic

import csv
import io
import json
import math

import numpy as np
import pytest

from metamorph_jax.errors import UserError
from metamorph_jax.eval import figures
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
    assert table.last_values(file) == (0, {})
    lines = [{"step": i, "loss": float(i), "rare": 8.0} for i in range(1, 21)]
    del lines[-1]["rare"]
    file.write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 21, "lo')
    assert table.last_values(file) == (20, {"loss": 19.5, "rare": 8.0})
    file.write_text('{"step": 1, "loss": "nan"}\n')
    assert math.isnan(table.last_values(file)[1]["loss"])


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
    with figures.style():
        rate, kind = table.plot(ROWS, "loss").axes
    assert (rate.get_xlabel(), kind.get_xlabel()) == ("rate", "kind")
    assert rate.get_ylabel() == kind.get_ylabel() == "loss (lower is better)"
    dots = rate.collections[0].get_offsets()
    np.testing.assert_allclose(dots, [[1e-4, 0.5], [1e-2, 0.25]])  # runs with a finite loss
    assert [t.get_text() for t in kind.get_xticklabels()] == ["x", "y"]
    assert table.plot(ROWS[:1], "loss") is None and table.plot(ROWS, "no such") is None


def test_a_line_for_each_setting_and_a_log_axis_for_rates():
    rows = [
        row(f"{i:03d}", loss, **{"optim.learning_rate": rate, "model.coef": coef})
        for i, (rate, coef, loss) in enumerate(
            [(1e-4, 4, 0.5), (2e-4, 4, 0.4), (4e-4, 4, 0.6), (1e-4, 8, 0.9), (2e-4, 8, 0.7)]
        )
    ]
    with figures.style():
        rate, coef = table.plot(rows, "accuracy").axes
    assert rate.get_xscale() == "log" and coef.get_xscale() == "linear"
    assert rate.get_ylabel() == "accuracy (higher is better)"
    assert [line.get_label() for line in rate.lines] == ["coef = 4", "coef = 8"]
    assert [list(line.get_xdata()) for line in rate.lines] == [[1e-4, 2e-4, 4e-4], [1e-4, 2e-4]]
    assert [t.get_text() for t in rate.get_legend().get_texts()] == ["coef = 4", "coef = 8"]
    assert [line.get_label() for line in coef.lines] == [
        f"learning_rate = {x}" for x in ("0.0001", "0.0002", "0.0004")
    ]
    # A random search: every run is a setting of its own, and lines would join what differs twice.
    rows = [row(str(i), 1.0, rate=0.1 * (i + 1), p=i % 7, k=i % 5) for i in range(20)]
    with figures.style():
        assert not any(axes.lines for axes in table.plot(rows, "loss").axes)


BAD = ["a|b", "x\ny", "\x1b[2J", "=cmd|'/c calc'!A1", "+1", "-1+2", "@x", "<img src=x>", "`a`",
       "[a](javascript:b)", "\u202eabc", "a\\|b", "\t=1", "**b**", "a\r\nb", ""]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_tables_show_text_as_text(text):
    rows = [
        {"name": f"001_{text}", "state": text or "new", "step": 15, "steps": 400,
         "values": {"name": text, f"k{text}": 1}, "metrics": {f"m{text}": 2.0}}
    ]  # fmt: skip
    lines = table.markdown(rows, f"m{text}").split("\n")
    assert len(lines) == 4 and all(line.isprintable() for line in lines)
    bars = [len(line.replace("\\\\", "").replace("\\|", "").split("|")) for line in lines[:3]]
    assert bars == [8, 8, 8] and "<" not in lines[2] and "| 15 of 400 |" in lines[2]
    written = table.as_csv(rows)
    assert written.replace("\n", "").isprintable() and written.count("\n") == 2
    for cells in csv.reader(io.StringIO(written)):
        assert len(cells) == 7 and not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)
    with figures.style():
        table.plot([rows[0], rows[0] | {"values": {"name": "other"}}], f"m{text}")


@pytest.mark.parametrize(
    "values, places, marks, scale",
    [
        ([1, 2, 4], [1, 2, 4], ["1", "2", "4"], "linear"),
        ([1e-5, 1e-3, 1e-1], [1e-5, 1e-3, 1e-1], ["1e-05", "0.001", "0.1"], "log"),
        ([0, 1, 100], [0, 1, 100], ["0", "1", "100"], "linear"),  # zero has no logarithm
        (["a", "b", "a"], [0, 1, 0], ["a", "b"], "linear"),
        ([True, False, True], [0, 1, 0], ["True", "False"], "linear"),
        ([1, None, 1], [0, 1, 0], ["1", ""], "linear"),
        (list(range(1, 8)), list(range(1, 8)), ["1", "3", "5", "7"], "linear"),
    ],
)
def test_panel(values, places, marks, scale):
    heights = [3.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0][: len(values)]
    _, (axes,) = figures.subplots()
    table._panel(axes, values, heights)
    np.testing.assert_allclose(axes.collections[0].get_offsets().T, [places, heights])
    assert [t.get_text() for t in axes.get_xticklabels()] == marks and axes.get_xscale() == scale
    x, y = axes.lines[0].get_data()
    assert list(x) == sorted(set(places))
    if len(set(places)) < len(places):
        assert list(y) == [2.5, 1.0]  # the mean of equal values


def test_without_matplotlib_the_tables_are_written(tmp_path, monkeypatch, capsys):
    def missing():
        raise UserError("pip install matplotlib")

    monkeypatch.setattr(figures, "import_matplotlib", missing)
    files = table.write(tmp_path, ROWS, "loss")
    assert [f.name for f in files] == ["sweep.csv", "sweep.md"]
    assert "sweep.png is not written: pip install matplotlib" in capsys.readouterr().err
    monkeypatch.undo()
    assert table.write(tmp_path, ROWS, "loss")[-1].read_bytes().startswith(b"\x89PNG")

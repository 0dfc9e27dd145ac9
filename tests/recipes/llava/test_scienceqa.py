"""ScienceQA's files as LLaVA's rows."""

import json
import pathlib

import pytest

from metamorph_jax.errors import UserError
from metamorph_jax.recipes.llava import scienceqa

FOLDER = "llava/eval/scienceqa"


def pytest_generate_tests(metafunc):
    if "format" in metafunc.fixturenames:
        root = pathlib.Path(metafunc.config.getoption("--golden-root"))
        file = root / FOLDER / "llava_format_expected.json"
        metafunc.parametrize("format", json.loads(file.read_text()))


@pytest.mark.golden
def test_rows_of_a_format(format, golden_root, tmp_path, capsys):
    """By the command, on the split that the reference wrote."""
    folder, out = golden_root / FOLDER, tmp_path / "rows.json"
    wanted = json.loads((folder / "llava_format_expected.json").read_text())[format]
    splits = json.loads((folder / "pid_splits.json").read_text())
    ids = [row["id"] for row in wanted]
    (split,) = [name for name, pids in splits.items() if pids == ids]
    words = [f"--folder={folder}", f"--split={split}", f"--format={format}", f"--out={out}"]
    assert scienceqa.main(words) == 0
    assert json.loads(out.read_text()) == wanted
    assert f"{len(ids)} rows" in capsys.readouterr().out


PROBLEM = {
    "question": "Why?", "choices": ["so", "or  so"], "answer": 1, "hint": " ", "image": None,
    "lecture": "", "solution": "",
}  # fmt: skip


def test_without_image_and_hint():
    (row,) = scienceqa.rows({"7": PROBLEM}, ["7"], "CQM-LEA")
    assert row == {
        "id": "7",
        "conversations": [
            {"from": "human", "value": "Context: N/A\nQuestion: Why?\nOptions: (A) so (B) or so"},
            {"from": "gpt", "value": "The answer is B."},
        ],
    }


def test_what_is_wrong_is_named(tmp_path, capsys):
    with pytest.raises(UserError, match="'QCM-AL' is none of QCM-A, QCM-LEA"):
        scienceqa.rows({}, [], "QCM-AL")
    for change in ({"answer": 9}, {"hint": None}):
        with pytest.raises(UserError, match="problem '7' can't be read"):
            scienceqa.rows({"7": PROBLEM | change}, ["7"], "QCM-A")
    (tmp_path / "pid_splits.json").write_text('{"train": []}')
    words = [f"--folder={tmp_path}", "--split=tset", f"--out={tmp_path}/x.json"]
    assert scienceqa.main(words) == 2
    assert "--split 'tset' is none of train" in capsys.readouterr().err

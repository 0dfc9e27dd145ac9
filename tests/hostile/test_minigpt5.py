"""Captions, stories and dialogues of every bad kind: used, or named by file and record."""

import collections
import json

import pytest

from metamorph_jax.data.config import DataConfig, OrderConfig, RowConfig, SourceConfig
from metamorph_jax.data.pipeline import open_sources
from metamorph_jax.data.sources.base import IMAGE
from metamorph_jax.data.stream import choices
from metamorph_jax.errors import BadSample
from metamorph_jax.recipes.minigpt5 import sources
from tests.hostile import harness
from tests.hostile.test_data import FORGED, ODD
from tests.hostile.test_documents import PICTURE, variants

TEXTS = [value for value in ODD if isinstance(value, str) and value != "\ud800"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE.getvalue())
    (tmp_path / "7.jpg").write_bytes(PICTURE.getvalue())
    return tmp_path


def outcomes(path, kind) -> collections.Counter:
    """Reasons of all samples of a file, "" where they are used; each names the file."""
    config = DataConfig(
        (SourceConfig(str(path), kind=kind),), OrderConfig(epochs=1), row=RowConfig("vokens")
    )
    counts = collections.Counter()
    (found,) = open_sources(config, sources.kinds(str.split))
    for k in range(len(found)):
        try:
            sample = found.sample(k, choices(0, 0, 0, k))
            config.images.load(sample.images)
            counts[""] += 1
        except BadSample as bad:
            assert bad.detail.isprintable(), bad.detail
            assert str(path.parent) in bad.detail, bad.detail
            counts[bad.reason] += 1
    return counts


def check(path, kind, folder, least: int) -> collections.Counter:
    """All samples have an outcome, of several kinds, and nothing else is raised."""
    counts = collections.Counter()
    harness.attempt(lambda: counts.update(outcomes(path, kind)), folder, code=0)
    assert counts.total() >= least and counts[""] > 3 and len(counts) > 2, counts
    assert not [reason for reason in counts if reason.startswith("error_")], counts
    return counts


def plain(values):
    """Those that JSON can hold and that say nothing with half of a pair."""
    return [value for value in values if "\\ud800" not in json.dumps(value)]


@pytest.mark.parametrize("kind", ["vist", "vist_test"])
def test_odd_stories(kind, folder):
    story = [{"caption": f"{k}", "image_id": "i", "sequence_index": k} for k in range(2)]
    table = {f"s{k}": value for k, value in enumerate(plain(variants(story)))}
    paths = {"i": "a.png"}
    for k, odd in enumerate(plain(ODD)):
        paths[f"odd{k}"] = odd
        table[f"o{k}"] = [{"caption": "a", "image_id": f"odd{k}", "sequence_index": 0}]
    table[FORGED] = "no steps"
    (folder / "x_cleaned.json").write_text(json.dumps(table))
    (folder / "x_image_mapping.json").write_text(json.dumps(paths))
    check(folder / "x_cleaned.json", kind, folder, len(table))


def test_odd_dialogues(folder):
    turns = [{"turn": [{"__TEXT__": "a"}, {"__MEDIA__": "7"}]}, {"turn": [{"__TEXT__": "b"}]}]
    lines = list(variants({"conversation_id": 1, "conversation": turns}))
    path = folder / "conversations.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    check(path, "mmdialog", folder, len(lines))
    (folder / ".conversations.json.turns.npz").write_bytes(b"no index")
    check(path, "mmdialog", folder, len(lines))


def test_odd_captions(folder):
    rows = [f"{a}\t{b}" for a in ("red", *TEXTS) for b in ("a.png", *TEXTS)]
    path = folder / "x.tsv"
    path.write_text("caption\timage_path\n" + "".join(f"{row}\n" for row in rows))
    check(path, "cc3m", folder, len(rows))
    whole = ("caption\timage_path\n" + "a red kite\ta.png\n" * 20).encode()
    for number, (_, data) in enumerate(harness.damaged(whole, 37, 10, 0, (1, 3))):
        (folder / f"{number}.tsv").write_bytes(data)
        harness.attempt(lambda n=number: outcomes(folder / f"{n}.tsv", "cc3m"), folder)


def test_odd_captions_of_own_conversations(folder):
    turns = [{"from": "human", "value": f"{IMAGE} a"}, {"from": "gpt", "value": IMAGE}]
    record = {"image": ["a.png", "a.png"], "conversations": turns}
    records = [record | {"captions": value} for value in variants(["", "red"])]
    records += [record | {"caption": value} for value in ODD]
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    check(path, "auto", folder, len(records))


def test_odd_conversations_answer_by_answer(folder):
    turns = [{"from": "human", "value": f"{IMAGE} a"}, {"from": "gpt", "value": IMAGE}]
    record = {"image": ["a.png", "a.png"], "conversations": turns}
    records = [value for value in variants(record) if isinstance(value, dict)]
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    check(path, "answers", folder, len(records))

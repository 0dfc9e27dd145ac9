"""Batches of one modality and of similar lengths, as LLaVA's sampler makes them."""

import json
import pathlib

import numpy as np
import pytest

from metamorph_jax.config import build
from metamorph_jax.data import check as data_check
from metamorph_jax.data import grouping
from metamorph_jax.data.chat import Markers
from metamorph_jax.data.config import DataConfig, InputSpec
from metamorph_jax.data.grouping import Grouped, even_chunks, grouped_order, word_counts
from metamorph_jax.data.pipeline import make_stream, open_sources
from metamorph_jax.data.sources import RecordSource
from metamorph_jax.data.sources.base import ImageRef, Sample
from metamorph_jax.data.views import Single
from metamorph_jax.errors import BadSample, ConfigError


def pytest_generate_tests(metafunc):
    root = pathlib.Path(metafunc.config.getoption("--golden-root"))
    file = root / "llava/eval/sampler.json"
    for name in ("split_to_even_chunks", "modality_grouped"):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, json.loads(file.read_text())[name])


@pytest.mark.golden
def test_even_chunks(split_to_even_chunks):
    case = split_to_even_chunks
    found = even_chunks(case["indices"], case["lengths"], case["num_chunks"])
    assert found == case["chunks"]


def check(order, lengths, size):
    """Every sample once; but for the leftovers at the end, batches of one modality."""
    assert sorted(order) == list(range(len(lengths)))
    lengths = np.array(lengths)
    images, text = (lengths >= 0).sum(), (lengths < 0).sum()
    whole = sum(-(-int(n) // size) - 1 for n in (images, text) if n)
    if not images or not text:
        whole += 1
    for k in range(whole):
        signs = lengths[list(order[k * size : (k + 1) * size])] >= 0
        assert signs.all() or not signs.any()
    rest = list(order[whole * size :])
    assert rest == sorted(rest)


@pytest.mark.golden
def test_orders_have_the_properties_of_the_reference(modality_grouped):
    case = modality_grouped
    size = case["batch_size"] * case["world_size"]
    lengths = np.array(case["lengths"])
    check(case["order"], lengths, size)
    rng = np.random.default_rng(0)
    check(grouped_order(lengths, case["batch_size"], case["world_size"], rng), lengths, size)


@pytest.mark.golden
def test_every_part_of_the_file_is_read(golden_root):
    found = json.loads((golden_root / "llava/eval/sampler.json").read_text())
    assert found.keys() == {"split_to_even_chunks", "modality_grouped"}


@pytest.mark.parametrize("text", [0, 40])
def test_a_shard_reads_its_chunk(text):
    """Every epoch once through all records; the words of a batch are shared out evenly."""
    lengths = np.random.default_rng(0).integers(1, 50, 64)
    lengths[:text] *= -1
    grouped = Grouped(lengths, [24, 40], 7, rows=4, shards=2)
    found = [grouped.locate(g) for g in range(128)]
    starts = (0, 24)
    epochs = [[starts[s] + k for s, e, k in found if e == epoch] for epoch in (0, 1)]
    assert [sorted(e) for e in epochs] == [list(range(64))] * 2 and epochs[0] != epochs[1]
    first = abs(lengths[epochs[0][:8]])
    halves = [first[0::2], first[1::2]]  # of shard 0 and shard 1
    assert all(list(half) == sorted(half, reverse=True) for half in halves)
    assert abs(halves[0].sum() - halves[1].sum()) <= first.max()


def test_words_are_counted():
    class Source:
        samples = (
            Sample("a", "s", (("user", "<image>\nWhat is it?"), ("assistant", "A cat.")),
                   (ImageRef("a.png"),)),
            Sample("b", "s", (("user", "Hello there"), ("assistant", "Hi"))),
        )  # fmt: skip

        def __len__(self):
            return 3

        def sample(self, k, rng):
            if k == 2:
                raise BadSample("bad_record", "")
            return self.samples[k]

    assert word_counts([Source()]).tolist() == [6, -3, 1]


def test_records_are_read_once(tmp_path, monkeypatch):
    """By all data shards of a process together, and not again by the next process, until the file
    or how it is read changes."""
    file, reads = tmp_path / "a.jsonl", []
    turns = [{"from": "human", "value": "How are you?"}, {"from": "gpt", "value": "Fine."}]
    file.write_text("\n".join(json.dumps({"id": str(k), "conversations": turns}) for k in range(5)))
    sample = RecordSource.sample
    monkeypatch.setattr(RecordSource, "sample", lambda s, k, r: reads.append(k) or sample(s, k, r))

    def counted(new_process=False, **source):
        if new_process:
            monkeypatch.setattr(grouping, "_known", {})
        reads.clear()
        given = {"path": str(file), "name": "a"} | source
        config = build(DataConfig, {"sources": [given]}, "config.data")
        assert word_counts(open_sources(config)).tolist() == [-4] * (5 + added)
        return len(reads)

    added = 0
    assert counted(new_process=True) == 5 and (tmp_path / ".a.jsonl.words.npz").is_file()
    assert counted() == 0 and counted(new_process=True) == 0
    assert counted(new_process=True, kind="text") == 5  # read in another way
    added = 1
    file.write_text(file.read_text() + "\n" + file.read_text().splitlines()[0])
    assert counted() == 6
    for damaged in (b"", b"PK", b"\0" * 1000):
        (tmp_path / ".a.jsonl.words.npz").write_bytes(damaged)
        assert counted(new_process=True) == 6


def test_options_that_exclude_each_other():
    source = {"path": "a.json", "weight": 1.0, "name": "a"}
    with pytest.raises(ConfigError, match="leave their weights out"):
        build(DataConfig, {"sources": [source], "order": {"grouping": "modality"}}, "config.data")
    for order in ({"grouping": "length"}, {"grouping": "modality", "shuffle": False}):
        with pytest.raises(ConfigError, match="grouping"):
            build(DataConfig, {"order": order}, "config.data")


def test_a_run_reads_in_this_order(tmp_path):
    """From a config: rows of a batch have one modality; `metamorph data check` reads it, too."""
    lines = []
    for k in range(12):
        turns = [{"from": "human", "value": f"Question {k}?"}, {"from": "gpt", "value": "a " * k}]
        image = {"image": "a.png"} if k % 2 else {}
        turns[0]["value"] = "<image>\n" * (k % 2) + turns[0]["value"]
        lines.append(json.dumps({"id": str(k), "conversations": turns, **image}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = {"path": str(tmp_path / "a.jsonl"), "name": "a"}
    order = {"grouping": "modality", "epochs": 1}
    config = build(DataConfig, {"sources": [source], "order": order}, "config.data")
    sources = open_sources(config)
    stream = make_stream(config, InputSpec(Single(4)), ToyChat(), sources, (0, 1), rows=3)
    order = [stream.locate(n)[2] for n in range(12)]
    check(order, word_counts(sources), 3)
    assert sorted(order) == [*range(12)] and order != [*range(12)]
    assert data_check._once(config).order.grouping == "none"


class ToyChat:
    """What a stream asks for before it reads a sample."""

    markers = Markers()

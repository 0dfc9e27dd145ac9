import collections
import dataclasses
import json
import multiprocessing
import os
import re
import signal

import jax
import numpy as np
import pytest

from metamorph_jax.data import cache as caches
from metamorph_jax.data import check, decoder_pairs, images
from metamorph_jax.data.chat import IGNORE, Chat, Markers
from metamorph_jax.data.config import (
    CacheConfig,
    DataConfig,
    DrawingSpec,
    ImageConfig,
    InputSpec,
    OrderConfig,
    ReadingConfig,
    RowConfig,
    SourceConfig,
)
from metamorph_jax.data.images import Preprocess
from metamorph_jax.data.interleave import AfterSupervisedStart
from metamorph_jax.data.pipeline import (
    _Restarting,
    all_refs,
    make_pipeline,
    make_stream,
    open_sources,
    source_names,
)
from metamorph_jax.data.stream import Mixture, permute
from metamorph_jax.data.views import AnyRes, Single
from metamorph_jax.errors import ConfigError
from metamorph_jax.recipe import Shard
from metamorph_jax.types import TEXT
from tests.data.conftest import Letters, conversation, make_image, write_jsonl

BAD = {"missing": 1, "zero_byte": 1, "truncated": 1, "marker_mismatch": 1, "fully_masked": 1}


VIEWS = Single(4, Preprocess(8))
SPEC = InputSpec(VIEWS)
NO_MARKERS = Markers()
FEATURES = InputSpec(VIEWS, feature_width=3, tower="toy")


def config(path, *sources, **parts):
    """A config whose parts differ in the given fields from those of most tests."""
    usual = DataConfig(
        sources or (SourceConfig(str(path), name="d"),),
        order=OrderConfig(seed=1),
        reading=ReadingConfig(ahead=8),
        row=RowConfig("chatml", length=160, images=6, open_rows=3),
    )
    changed = {n: dataclasses.replace(getattr(usual, n), **kw) for n, kw in parts.items()}
    return dataclasses.replace(usual, **changed)


def stream_of(config, tokenizer, spec=SPEC, process=(0, 1), markers=NO_MARKERS):
    chat = Chat.of(tokenizer, config.row, markers)
    return make_stream(config, spec, chat, open_sources(config), process)


def pipeline_of(config, tokenizer, spec=SPEC, markers=NO_MARKERS):
    chat = Chat.of(tokenizer, config.row, markers)
    return make_pipeline(config, spec, chat, open_sources(config), Shard(2))


def refs_of(config):
    return list(all_refs(config, open_sources(config)))


def equal(a, b):
    a, b = (jax.tree_util.tree_leaves_with_path(x) for x in (a, b))
    assert [path for path, _ in a] == [path for path, _ in b]
    for (path, x), (_, y) in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("n", [1, 2, 5, 16, 17, 1000])
def test_permute(n):
    places = [permute(i, n, 12345) for i in range(n)]
    assert sorted(places) == list(range(n))
    if n == 1000:
        assert places != [permute(i, n, 54321) for i in range(n)]
        assert abs(np.corrcoef(places, range(n))[0, 1]) < 0.1


def test_mixture_by_size_and_by_weight():
    by_size = Mixture([3, 5], None, 0, True)
    for epoch in range(3):
        got = [by_size.locate(epoch * 8 + i) for i in range(8)]
        assert sorted(got) == [(0, epoch, k) for k in range(3)] + [(1, epoch, k) for k in range(5)]
    weighted = Mixture([3, 500], [3.0, 1.0], 0, True)
    got = [weighted.locate(i) for i in range(3 * 4096)]
    assert collections.Counter(s for s, _, _ in got) == {0: 3 * 3072, 1: 3 * 1024}
    for source, size in ((0, 3), (1, 500)):  # every epoch of a source is complete
        mine = [(e, k) for s, e, k in got if s == source]
        whole = len(mine) // size * size
        assert sorted(mine[:whole]) == [divmod(i, size) for i in range(whole)]
    assert [Mixture([4], None, 0, False).locate(i)[2] for i in range(6)] == [0, 1, 2, 3, 0, 1]


def test_shares_by_the_root_of_the_size(tmp_path, letters):
    sources = []
    for name, count in (("few", 4), ("many", 36)):
        rows = [{"id": f"{name}{k}", "conversations": conversation("a", "b")} for k in range(count)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
        sources.append(SourceConfig(str(tmp_path / f"{name}.jsonl")))
    row = RowConfig("chatml", length=160)
    by_root = DataConfig(tuple(sources), order=OrderConfig(shares="sqrt_size"), row=row)
    mixture = stream_of(by_root, letters).mixture
    got = collections.Counter(mixture.locate(i)[0] for i in range(4096))
    assert got == {0: 1024, 1: 3072}  # 2 to 6
    with pytest.raises(ValueError, match="leave the sources' weights out"):
        DataConfig((SourceConfig("a", weight=1.0),), order=OrderConfig(shares="sqrt_size"))
    with pytest.raises(ValueError, match="order.shares is 'log'"):
        OrderConfig(shares="log")


def test_one_epoch(dataset, letters):
    path, _ = dataset
    it = pipeline_of(config(path, order={"epochs": 1}), letters)
    segments = sum(int(b.segments[r].max()) for b in it for r in range(2))
    assert segments == 35
    assert it.counts == {**{f"d/{k}": v for k, v in BAD.items()}, "d/misnamed": 1}
    assert it.samples_seen == 40


def test_samples_of_too_many_visual_targets_are_skipped(tmp_path, letters):
    for i in range(3):
        make_image(i).save(tmp_path / f"{i}.png")
    names = ["0.png", "1.png", "2.png"]
    write_jsonl(tmp_path / "d.jsonl", [
        {"id": str(n), "image": names[:n], "conversations": conversation("Draw", "<image>" * n)}
        for n in (1, 2, 3)
    ])  # fmt: skip
    cfg = config(tmp_path / "d.jsonl", order={"epochs": 1})
    rule = AfterSupervisedStart(1000)
    limited = dataclasses.replace(SPEC, predicted=rule, visual_targets=10)
    around = Markers((1000,), (1001,))
    it = pipeline_of(cfg, letters, limited, around)
    targets = [(b.visual_targets >= 0).sum(1).tolist() for b in it]
    assert sum(map(sum, targets)) == (1 + 2) * 4 and max(map(max, targets)) <= 10
    assert it.counts == {"d/too_many_visual_targets": 1}
    stream = stream_of(cfg, letters, limited, markers=around)
    (detail,) = (stream[n]["detail"] for n in range(3) if "bad" in stream[n])
    assert detail.endswith(
        "d.jsonl line 3, id '3': 12 visual tokens to predict, max_visual_targets of the model is 10"
    )


def test_batches_hold_the_samples(dataset, letters):
    """Pixels of a row are those of its samples, in order; labels point at the next position."""
    path, _ = dataset
    stream = stream_of(config(path), letters)
    batch = next(pipeline_of(config(path), letters))
    assert batch.images.pixels.dtype == np.uint8 and batch.tokens.dtype == np.int32
    texts = {}
    for n in range(60):
        item = stream[n]
        if "bad" not in item:
            texts[item["tokens"].tobytes() + item["image_slots"].tobytes()] = item
    for b in range(2):
        at = 0
        for s in range(1, batch.segments[b].max() + 1):
            here = batch.segments[b] == s
            slots = batch.image_slots[b, here]
            k = len(np.unique(slots[slots >= 0] // 4))
            own = np.where(slots >= 0, slots - at * 4, -1).astype(np.int32)
            item = texts[batch.tokens[b, here].tobytes() + own.tobytes()]
            if k:
                np.testing.assert_array_equal(batch.images.pixels[b, at : at + k], item["pixels"])
            at += k


def test_resume_and_determinism(dataset, letters):
    path, _ = dataset
    straight = pipeline_of(config(path), letters)
    batches = [next(straight) for _ in range(12)]
    it = pipeline_of(config(path), letters)
    for _ in range(5):
        next(it)
    state = json.loads(json.dumps(it.get_state()))
    other = pipeline_of(config(path, reading={"threads": 0, "ahead": 1}), letters)
    other.set_state(state)
    for want in batches[5:]:
        equal(next(other), want)
    assert other.get_state() == straight.get_state()
    it.set_state(state)  # also backwards, on an iterator in use
    equal(next(it), batches[5])
    with pytest.raises(ValueError, match="changed"):
        pipeline_of(config(path, row={"length": 161}), letters).set_state(state)


def test_worker_processes_change_nothing(dataset):
    path, _ = dataset
    one = pipeline_of(config(path), Letters())
    two = pipeline_of(config(path, reading={"workers": 2, "ahead": 2}), Letters())
    for _ in range(4):
        equal(next(one), next(two))
    state = two.get_state()
    two.close()
    two = pipeline_of(config(path, reading={"workers": 1}), Letters())
    two.set_state(state)
    equal(next(one), next(two))
    two.close()


def test_processes_share_the_samples(dataset, letters):
    path, _ = dataset
    once = config(path, order={"epochs": 1})
    whole = stream_of(once, letters)
    parts = [stream_of(once, letters, process=(i, 3)) for i in range(3)]
    assert [len(p) for p in parts] == [14, 13, 13]
    got = [p.locate(n) for p in parts for n in range(len(p))]
    assert sorted(got) == sorted(whole.locate(n) for n in range(40))


def test_wrong_root_is_a_clear_error(dataset, letters, tmp_path):
    path, _ = dataset
    (tmp_path / "empty").mkdir()
    source = SourceConfig(str(path), root=str(tmp_path / "empty"))
    cfg = config(path, source, reading={"max_bad_in_a_row": 5}, row={"length": 4000})
    it = pipeline_of(cfg, letters)
    with pytest.raises(RuntimeError, match="missing"):
        for _ in range(200):
            next(it)


def features_of(pixels):
    """A stand-in for a tower: float32[n, 4, 3]."""
    x = pixels.astype(np.float32) / 255
    return x.reshape(len(x), 4, -1, 3).mean(2)


def test_caches_give_the_same_numbers(dataset, letters, tmp_path):
    path, _ = dataset
    root = str(tmp_path / "cache")
    refs = refs_of(config(path))
    spec = caches.image_spec(VIEWS)
    cache, bad = caches.build(root, spec, refs, VIEWS, progress=False)
    assert bad == {"missing": 1, "zero_byte": 1, "truncated": 1} and len(cache) == len(refs) - 3
    direct = pipeline_of(config(path), letters)
    cached = pipeline_of(config(path, cache={"images": root}), letters)
    spec = caches.feature_spec(VIEWS, FEATURES)
    caches.build(root, spec, refs, VIEWS, features_of, batch_size=4, progress=False)
    given = pipeline_of(config(path, cache={"features": root}), letters, FEATURES)
    for _ in range(12):
        a, b, f = next(direct), next(cached), next(given)
        equal(a, b)
        np.testing.assert_array_equal(a.tokens, f.tokens)
        assert f.images.pixels is None and f.images.features.dtype == np.float32
        want = features_of(a.images.pixels.reshape(-1, 8, 8, 3)).reshape(f.images.features.shape)
        valid = a.images.valid
        np.testing.assert_array_equal(f.images.features[valid], want[valid])
    # Bad pictures are counted alike, but for wrong names, which a cache does not remember.
    want = {k: v for k, v in direct.counts.items() if k != "d/misnamed"}
    assert cached.counts == given.counts == want


def test_cache_goes_on_after_an_interruption(dataset, letters, tmp_path):
    path, folder = dataset
    spec = caches.feature_spec(VIEWS, FEATURES)
    refs = refs_of(config(path))
    calls = []

    def failing(pixels):
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return features_of(pixels)

    root = str(tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        caches.build(root, spec, refs, VIEWS, failing, batch_size=4, progress=False)
    where = spec.folder(root)
    with open(where + "/rows.bin", "ab") as f, open(where + "/index.jsonl", "ab") as g:
        f.write(b"half a row")
        g.write(b'{"key": "half')
    assert len(caches.ArrayCache(where)) == 8
    cache, _ = caches.build(root, spec, refs, VIEWS, features_of, batch_size=4, progress=False)
    whole, _ = caches.build(str(tmp_path / "other"), spec, refs, VIEWS, features_of,
                            batch_size=4, progress=False)  # fmt: skip
    assert len(cache) == len(whole)
    np.testing.assert_array_equal(cache.rows, whole.rows)
    # A second build has nothing to do; a changed file is not served from the cache.
    caches.build(root, spec, refs, VIEWS, lambda x: pytest.fail("again"), progress=False)
    ref = next(r for r in refs if r.path.endswith("p2_1.png"))
    make_image(99, 30, 30).save(ref.path)
    assert cache.lookup(ref) is None
    cache, _ = caches.build(root, spec, refs, VIEWS, features_of, batch_size=4, progress=False)
    assert list(cache.lookup(ref)) == [len(whole)]


TILES = AnyRes(4, Preprocess(8, "crop"), ((8, 16), (16, 8), (16, 16)))


def many_sizes(tmp_path):
    """A file of samples with one to three images of several sizes; the last one is missing."""
    records = []
    for k in range(12):
        names = [f"{k}_{i}.png" for i in range(1 + k % 3)]
        for i, name in enumerate(names):
            make_image(10 * k + i, 6 + 9 * (k % 4), 34 - 2 * k + i).save(tmp_path / name)
        texts = conversation("<image>" * len(names) + "Q", "A" * (k + 1))
        records.append({"id": str(k), "image": names, "conversations": texts})
    (tmp_path / "11_0.png").unlink()
    write_jsonl(tmp_path / "d.jsonl", records)
    return config(tmp_path / "d.jsonl", row={"length": 200, "images": 16}, order={"epochs": 1})


def test_images_of_several_views(tmp_path, letters):
    """Tiles of an image are in the batch as `views.pixels` makes them, and slots point to them."""
    cfg, spec = many_sizes(tmp_path), InputSpec(TILES)
    stream, seen = stream_of(cfg, letters, spec), 0
    it = pipeline_of(cfg, letters, spec)
    for batch in it:
        for b, row in enumerate(it.last_rows):
            view = 0
            for segment, n in enumerate(row, 1):
                (here,) = np.nonzero(batch.segments[b] == segment)
                slots, at = batch.image_slots[b, here], 0
                for image in images.load(stream.sample(n).images):
                    count, plan = TILES.plan(image.size)
                    at += int(np.argmax(slots[at:] != TEXT))
                    want = np.where(plan >= 0, plan + view * 4, plan)
                    np.testing.assert_array_equal(slots[at : at + len(plan)], want)
                    assert batch.images.start[b, view] == here[at]
                    pixels = batch.images.pixels[b, view : view + count]
                    np.testing.assert_array_equal(pixels, TILES.pixels(image))
                    view, at, seen = view + count, at + len(plan), seen + 1
            assert batch.images.valid[b].tolist() == [k < view for k in range(16)]
    assert seen == 21 and it.counts == {"d/missing": 1}


def test_caches_hold_all_views(tmp_path, letters):
    """Pixels and features of tiles from caches; a build that was interrupted within an image."""
    cfg, root, calls = many_sizes(tmp_path), str(tmp_path / "cache"), []
    spec = InputSpec(TILES, feature_width=3, tower="toy")
    refs = refs_of(cfg)
    caches.build(root, caches.image_spec(TILES), refs, TILES, progress=False)
    wanted = caches.feature_spec(TILES, spec)

    def failing(pixels):
        calls.append(len(pixels))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return features_of(pixels)

    with pytest.raises(KeyboardInterrupt):
        caches.build(root, wanted, refs, TILES, failing, batch_size=4, progress=False)
    assert 0 < len(caches.ArrayCache(wanted.folder(root))) < 23
    cache, _ = caches.build(root, wanted, refs, TILES, features_of, batch_size=4, progress=False)
    whole, _ = caches.build(str(tmp_path / "other"), wanted, refs, TILES, features_of,
                            batch_size=4, progress=False)  # fmt: skip
    np.testing.assert_array_equal(cache.rows, whole.rows)
    assert set(calls) == {4} and len(cache) == len(refs) - 1 == 23
    direct = pipeline_of(cfg, letters, spec)
    cached = pipeline_of(dataclasses.replace(cfg, cache=CacheConfig(images=root)), letters, spec)
    given = pipeline_of(dataclasses.replace(cfg, cache=CacheConfig(features=root)), letters, spec)
    for a, b, f in zip(direct, cached, given, strict=True):
        equal(a, b)
        np.testing.assert_array_equal(a.image_slots, f.image_slots)
        valid = a.images.valid
        want = features_of(a.images.pixels[valid])
        np.testing.assert_array_equal(f.images.features[valid], want)
    assert direct.counts == cached.counts == given.counts


def every_image(labels, sentinels):
    return np.ones(len(sentinels), bool)


def answers(labels, sentinels):
    return labels[sentinels] != IGNORE


def caption(sample, k):
    return np.array([len(sample.turns), k, 7], np.int32)


@pytest.mark.parametrize("read", [True, False])
def test_images_to_draw(read, tmp_path, letters):
    """Every image after its marker, or only answers, with ids of their own in their stead."""
    for k in range(4):
        make_image(k).save(tmp_path / f"{k}.png")
    texts = {"0 1": ("<image>Q", "B<image>"), "2 3": ("Draw", "<image>x<image>"),
             "0 1 2 3": ("Draw", "<image>" * 4)}  # fmt: skip
    write_jsonl(tmp_path / "d.jsonl", [
        {"image": [f"{n}.png" for n in names.split()], "conversations": conversation(*turns)}
        for names, turns in texts.items()
    ])  # fmt: skip
    extra = {} if read else {"ids": (700, 701), "caption": caption, "caption_length": 3}
    places, rule = (3, every_image) if read else (2, answers)
    drawings = DrawingSpec(places, rule, Preprocess(6), **extra)
    cfg = config(tmp_path / "d.jsonl", order={"epochs": 1, "shuffle": False})
    it = pipeline_of(cfg, letters, InputSpec(VIEWS, drawings=drawings), Markers((999,)))
    batch = next(it)
    assert it.counts == {"d/too_many_drawings": 1} and it.last_rows == [[0], [1]]
    # Four drawings do not fit into one row of three, nor three (context is not drawn) into two.
    for b, names in enumerate(([0, 1] if read else [1], [2, 3])):
        n = len(names)
        assert batch.drawings.valid[b].tolist() == [k < n for k in range(places)]
        for j, name in enumerate(names):
            start = batch.drawings.start[b, j]
            assert batch.tokens[b, start] == 999  # conditioned on the state of the marker
            assert batch.text_targets[b, start] == (-1 if read else 700)
            want = Preprocess(6)(make_image(name))
            np.testing.assert_array_equal(batch.drawings.pixels[b, j], want)
        if read:
            assert batch.drawings.captions is None and batch.images.valid[b].sum() == 2
            continue
        assert batch.images.valid[b].sum() == 1 - b  # the context image is read
        assert (batch.tokens[b] == 701).sum() == n
        assert batch.drawings.captions[b, :n].tolist() == [[[2, 1, 7]], [[2, 0, 7], [2, 1, 7]]][b]
    assert batch.counted()["images"] == (4 + 4 if read else 1 + 3)


def test_text_only_needs_no_pictures(tmp_path, letters):
    path = tmp_path / "t.json"
    path.write_text(json.dumps([{"id": "a", "conversations": conversation("Q", "A")}]))
    batch = next(pipeline_of(config(path), letters))
    assert not batch.images.valid.any() and batch.images.pixels.shape == (2, 6, 8, 8, 3)


def test_independent_turns_in_a_batch(tmp_path, letters):
    make_image(1).save(tmp_path / "a.png")
    write_jsonl(tmp_path / "a.jsonl", [
        {"id": "a", "image": "a.png", "conversations": conversation("<image>\nQ", "A", "R", "B")}
    ])  # fmt: skip
    cfg = config(tmp_path / "a.jsonl", row={"independent_turns": True})
    batch = next(pipeline_of(cfg, letters))
    row, n = batch.turns[0], (batch.segments[0] == 1).sum()
    assert sorted(set(row[:n].tolist())) == [0, 1, 2]
    second = np.flatnonzero(row[:n] == 2)
    assert batch.positions[0, second[0]] == (row[:n] == 0).sum()


def test_config_errors(tmp_path):
    with pytest.raises(ValueError, match="weights"):
        DataConfig((SourceConfig("a", weight=1.0), SourceConfig("b")))
    with pytest.raises(ValueError, match="feature_width"):
        caches.feature_spec(VIEWS, SPEC)
    with pytest.raises(ValueError, match="row.packing is 'best'"):
        RowConfig(packing="best")
    with pytest.raises(ConfigError, match="config.data.sources is empty"):
        open_sources(DataConfig())
    (tmp_path / "a.json").write_text('[{"id": "a"}]')
    with pytest.raises(ConfigError, match="a is of kind 'odd', expected one of auto, text, images"):
        open_sources(DataConfig((SourceConfig(str(tmp_path / "a.json"), kind="odd"),)))
    cfg = config(tmp_path / "a.json", images={"size": 9})
    assert stream_of(cfg, Letters()).views.preprocess.size == 9
    with pytest.raises(
        ConfigError, match="images.size is 9, but the model's tower takes 8: .*images.size=0"
    ):
        stream_of(cfg, Letters(), FEATURES)


def test_every_source_has_a_name_of_its_own():
    paths = ("a_2.json", "x/a.json", "y/a.json", "z/a.json")
    named = source_names(DataConfig(tuple(SourceConfig(path) for path in paths)))
    assert named == ("a_2", "a", "a_3", "a_4")


def test_frames_of_a_video_and_its_question_fit_into_a_sample(dataset):
    """With limits that contradict each other, every longer video was skipped."""
    with pytest.raises(ValueError, match="max_frames is 5, but images.max_images is 4"):
        ImageConfig(max_frames=5, max_images=4)
    markers = Markers((1,), (2,))
    for row, name in (({"length": 24}, "length"), ({"sample_length": 24}, "sample_length")):
        cfg = config(dataset[0], images={"max_frames": 4}, row=row)
        stream_of(cfg, Letters())
        with pytest.raises(ConfigError, match=rf"take 24 positions, but row.{name} is 24"):
            stream_of(cfg, Letters(), markers=markers)


# ---- check ---------------------------------------------------------------------------------------


def test_check_finds_everything(dataset, letters, capsys):
    path, folder = dataset
    with open(path, "a") as f:
        f.write("{broken\n")
    make_image(5, 60, 60).save(folder / "p29_0.png")
    c = config(path, images={"max_pixels": 3000})
    report = check.check(c, open_sources(c), letters, 6)
    want = {**BAD, "bad_json": 1, "oversized": 1, "misnamed": 1}
    assert {r["reason"]: r["count"] for r in report["problems"]} == want
    assert report["sources"] == [{"source": "d", "samples": 41, "good": 41 - 7}]
    text = check.table(report)
    assert "line 41" in text and "p13_0.png" in text
    # The pipeline skips exactly what the check calls bad.
    it = pipeline_of(config(path, images={"max_pixels": 3000}, order={"epochs": 1}), letters)
    collections.deque(it, maxlen=0)
    assert it.counts == {f"d/{k}": v for k, v in want.items()}


def test_check_command(dataset, capsys):
    from metamorph_jax import cli

    path, folder = dataset
    assert cli.main(["data", "check", str(folder / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    code = cli.main(["data", "check", str(path), "--json"])
    report = json.loads(capsys.readouterr().out)
    config = folder / "config.py"
    config.write_text(
        "import ml_collections\n"
        "def get_config():\n"
        f"    sources = {{'one': {{'path': '{path}'}}}}\n"
        "    data = {'sources': sources, 'row': {'template': 'chatml'}}\n"
        "    return ml_collections.ConfigDict({'recipe': 'metamorph', 'data': data})\n"
    )
    assert cli.main(["data", "check", f"--config={config}"]) == 1
    assert "truncated" in capsys.readouterr().out
    assert cli.main(["data", "check", f"--config={config}", "--length=99"]) == 2
    assert "--length goes with files" in capsys.readouterr().err
    assert cli.main(["data", "check", str(path), "--length=99"]) == 2
    assert "it goes with --tokenizer" in capsys.readouterr().err
    assert code == 1 and {r["reason"] for r in report["problems"]} >= set(BAD) - {"fully_masked"}


@pytest.mark.parametrize(("limit", "good"), [(3, 0), (72, 1)])
def test_check_counts_images_by_the_limit_that_is_given(limit, good, tmp_path, capsys):
    """Without a tokenizer, it was the same for every --images-per-row."""
    from metamorph_jax import cli

    make_image(1).save(tmp_path / "a.png")
    turns = conversation("<image>" * (count := 72 if good else 4), "A")
    record = {"id": "x", "image": ["a.png"] * count, "conversations": turns}
    write_jsonl(tmp_path / "d.jsonl", [record])
    words = ["data", "check", str(tmp_path / "d.jsonl"), "--json", f"--images-per-row={limit}"]
    assert cli.main(words) == 1 - good
    assert json.loads(capsys.readouterr().out)["sources"][0]["good"] == good


def test_check_reads_as_the_run_of_a_config(tmp_path, capsys):
    """Its tokenizer, length, limits and options; and samples are shown as the model reads them."""
    from metamorph_jax import cli

    make_image(1).save(tmp_path / "a.png")
    clear = make_image(2)
    clear.putalpha(0)
    clear.save(tmp_path / "b.png")
    path = tmp_path / "d.jsonl"
    write_jsonl(path, [
        {"id": "q", "image": "a.png", "conversations": conversation(
            "<image>\nQ <|im_end|>?", "Aha")},
        {"id": "long", "conversations": conversation("Q", "word " * 500)},
        {"id": "lost", "conversations": conversation("word " * 500, "A")},
        {"id": "two", "images": ["a.png", "b.png"], "conversations": conversation(
            "<image>", "A <image>")},
        {"id": "three", "image": ["a.png"] * 3, "conversations": conversation("<image>" * 3, "A")},
    ])  # fmt: skip
    command = ["data", "check", "--config=configs/metamorph/vpit.py:smoke", "--show=1",
               f"--config.data.sources={{'one': {{'path': '{path}'}}}}",
               "--config.data.row.length=64", "--config.data.row.images=2"]  # fmt: skip
    assert cli.main(command) == 1
    text = capsys.readouterr().out
    assert "images 1, image 1" in text or "image 1, images 1, text 1" in text
    for line in (
        r"d.jsonl line 1, id 'q' \(one, image\): \d+ positions",
        r"reads  '<\|im_start\|>user\\n<image_start>'",
        r"sees   a.png \(4 visual tokens\)",
        r"learns 'Aha<\|im_end\|>'",
        r"draws  b.png \(4 visual tokens\)",
        r"cut \(used\) +1 .*line 2, id 'long'",
        r"too_long +1 .*line 3, id 'lost': no answer begins in the first 64 positions",
        r"too_many_images +1 .*line 5, id 'three'",
        r"transparent \(used\) +1 .*line 4",
    ):
        assert re.search(line, text), (line, text)


# ---- decoder -------------------------------------------------------------------------------------


def test_decoder_pairs(dataset, letters, tmp_path):
    path, _ = dataset
    root, process = str(tmp_path / "c"), SPEC.views.preprocess
    refs = refs_of(config(path))
    spec = caches.feature_spec(VIEWS, FEATURES)
    cache, _ = caches.build(root, spec, refs, VIEWS, features_of, progress=False)
    pairs = decoder_pairs.DecoderPairs(refs, process, shard=Shard(7), seed=3, features=cache)
    assert len(pairs) == len(cache)
    batches = [next(pairs) for _ in range(20)]
    first = np.concatenate([b.image for b in batches])[: len(cache)]
    assert len(np.unique(first.reshape(len(first), -1), axis=0)) == len(cache)  # an epoch
    for b in batches:
        np.testing.assert_array_equal(b.features, features_of(b.image))
        assert b.valid.all()
    for memory in (0, 2**30):
        other = decoder_pairs.DecoderPairs(
            refs, process, shard=Shard(7), seed=3, features=cache, memory_bytes=memory
        )
        other.set_state(json.loads(json.dumps({**pairs.get_state(), "next": 4 * 7})))
        for want in batches[4:]:
            equal(next(other), want)


def test_decoder_pairs_without_features(dataset, letters):
    path, _ = dataset
    refs = refs_of(config(path))
    process = VIEWS.preprocess
    tower = dataclasses.replace(process, size=6)
    a = decoder_pairs.DecoderPairs(refs, process, shard=Shard(30), tower=tower)
    b = decoder_pairs.DecoderPairs(refs, process, shard=Shard(30), tower=tower)
    for _ in range(4):  # bad pictures are replaced, the same way every time
        x = next(a)
        equal(x, next(b))
        assert x.image.shape == (30, 8, 8, 3) and x.pixels.shape == (30, 6, 6, 3)
    assert set(a.counts) == {"missing", "zero_byte", "truncated"}


def test_worker_that_dies_is_replaced(dataset, capfd):
    """A killed worker process (out of memory, say) costs a message, no sample and no hang."""
    path, _ = dataset
    expected = list(pipeline_of(config(path, order={"epochs": 1}), Letters()))
    cfg = config(path, order={"epochs": 1}, reading={"workers": 1, "ahead": 2})
    batches = pipeline_of(cfg, Letters())
    found = [next(batches)]
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    found += list(batches)
    assert "an input worker process died, restarting at sample" in capfd.readouterr().err
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        equal(a, b)


def test_workers_that_keep_dying_end_the_run():
    def read(n):
        yield from range(n, 5)
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9")

    items = _Restarting(read, 3)
    assert [next(items), next(items)] == [3, 4]
    with pytest.raises(RuntimeError, match="died 3 times at sample 5 .*fewer data.reading.workers"):
        next(items)

import json
import os
import sys

import numpy as np
import pytest

from metamorph_jax.data import cache, images
from metamorph_jax.data.sources import ImageRef, RecordSource, kinds, open_records, video
from metamorph_jax.data.sources import records as records_module
from metamorph_jax.data.views import Single
from metamorph_jax.errors import BadSample
from tests.data.conftest import conversation, make_image, write_jsonl


def rng(seed=0):
    return np.random.default_rng(seed)


def build(record, seed=0, root="/data", **kw):
    return kinds.build(record, "s", kinds.Files(root), rng(seed), **kw).checked(70)


# ---- files ---------------------------------------------------------------------------------------


def test_jsonl_index(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"id": "é"}\n\n{broken\n{"id": 2}\n[1]\n{"id": 3}'.encode())
    records = open_records(str(path))
    assert len(records) == 5
    assert [records[k]["id"] for k in (0, 2, 4)] == ["é", 2, 3]
    assert [line for line, _ in records.bad_lines] == [3, 5]
    with pytest.raises(BadSample, match="line 3"):
        records[1]
    # The second time the index is read, not made.
    monkeypatch.setattr(records_module, "_scan_lines", lambda _: pytest.fail("scanned again"))
    assert len(open_records(str(path))) == 5
    monkeypatch.undo()
    # A changed file is indexed anew; so it is when the index is broken.
    with open(path, "a") as f:
        f.write('\n{"id": 4}\n')
    assert len(open_records(str(path))) == 6
    index = tmp_path / ".a.jsonl.offsets.npz"
    index.write_bytes(b"junk")
    assert open_records(str(path))[5]["id"] == 4


def test_jsonl_index_elsewhere(tmp_path):
    path, there = tmp_path / "a.jsonl", tmp_path / "index"
    write_jsonl(path, [{"id": 1}])
    open_records(str(path), str(there))
    assert len(os.listdir(there)) == 1 and not (tmp_path / ".a.jsonl.offsets.npz").exists()


def test_json_and_errors(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": 1}, {"id": 2}]))
    assert open_records(str(path))[1]["id"] == 2
    path.write_text('{"id": 1}\n{"id": 2}')
    with pytest.raises(ValueError, match="JSON lines"):
        open_records(str(path))
    with pytest.raises(FileNotFoundError, match="nope"):
        open_records(str(tmp_path / "nope.json"))


def test_array_record(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    path = str(tmp_path / "a.arrayrecord")
    writer = module.ArrayRecordWriter(path, "group_size:1")
    for k in range(3):
        writer.write(json.dumps({"id": k}).encode())
    writer.close()
    records = open_records(path)
    assert len(records) == 3 and records[2]["id"] == 2


@pytest.mark.parametrize("kind", ["Text", "Sequence", "Image"])
def test_tfds(kind, tmp_path, monkeypatch):
    """A data set that TFDS wrote to its folder, read back by name; and one with images inside."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="pip install 'metamorph-jax[tfds]'")
    image = {"Text": "0.png", "Sequence": ["0.png", "1.png"], "Image": str(tmp_path / "0.png")}[
        kind
    ]
    make_image(0).save(tmp_path / "0.png")
    said = conversation("<image>\nWhat?" if kind == "Text" else "<image><image>\nWhat?", "Grey.")

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        __module__ = "__main__"  # TFDS looks for files beside a module's package

        def _info(self):
            text = tfds.features.Text()
            of = {"Text": text, "Sequence": tfds.features.Sequence(text)}
            of = of.get(kind) or tfds.features.Image()
            features = {"id": text, "image": of, "conversations": text}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for k in range(2):
                yield k, {"id": f"s{k}", "image": image, "conversations": json.dumps(said)}

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))  # $TFDS_DATA_DIR
    Tiny(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    path = "tfds:tiny/train"
    if kind == "Image":
        with pytest.raises(ValueError, match="feature 'image' is Image, expected Text"):
            open_records(path)
        return
    records = open_records(path)
    assert len(records) == 2 and {records[0]["id"], records[1]["id"]} == {"s0", "s1"}
    sample = RecordSource("s", records, kinds.Files(str(tmp_path))).sample(0, rng())
    assert sample.turns[1] == ("assistant", "Grey.")
    assert sample.images[0] == ImageRef(str(tmp_path / "0.png"))
    assert "tensorflow" not in sys.modules


# ---- kinds ---------------------------------------------------------------------------------------


def test_recognise():
    cases = {
        "text": {},
        "image": {"image": "a.jpg"},
        "images": {"image": ["a.jpg", "b.jpg"]},
        "video_qa": {"image": "v/x.mp4", "id": "k700_12"},
    }
    assert set(cases) == set(kinds.KINDS)
    for kind, record in cases.items():
        assert kinds.recognise(record) == kind
        assert [name for name, k in kinds.KINDS.items() if k.matches(record)] == [kind]
    assert kinds.recognise({"image": None}) == kinds.recognise({"image": []}) == "text"


def _shout(record, files, rng):
    return (("user", record["id"].upper()),), (files.image("b.jpg"),)


def test_a_recipe_s_own_kinds_are_asked_first():
    own = {"shout": kinds.Kind(lambda record: "loud" in record, _shout)}
    table = kinds.known(own)
    assert list(table) == ["shout", *kinds.KINDS]
    record = {"id": "x", "loud": 1, "image": "a.jpg", "conversations": conversation("<image>", "A")}
    files = kinds.Files("/data")
    sample = kinds.build(record, "s", files, rng(), kinds=table)
    assert sample.turns == (("user", "X"),) and sample.images[0].path == "/data/b.jpg"
    assert kinds.build(record, "s", files, rng(), "image", table).turns[1] == ("assistant", "A")
    assert kinds.known({"text": own["shout"]})["text"] is own["shout"]  # it may replace one of ours
    with pytest.raises(ValueError, match="unknown kind 'quiet': expected one of auto, shout, text"):
        kinds.build(record, "s", files, rng(), "quiet", table)


def test_image_and_text_kinds():
    sample = build({"id": "q", "image": "a.jpg", "conversations": conversation("<image>\nQ", "A")})
    assert sample.turns == (("user", "<image>\nQ"), ("assistant", "A"))
    assert sample.images == (ImageRef("/data/a.jpg"),)
    sample = build(
        {"image": ["a.jpg", "b/c.jpg"], "conversations": conversation("<image> Q", "<image>")}
    )
    assert [i.path for i in sample.images] == ["/data/a.jpg", "/data/b/c.jpg"]
    sample = build({"conversations": [{"from": "gpt", "value": "x"}, *conversation("Q", "A")]})
    assert sample.turns[0] == ("user", "Q") and sample.images == ()


@pytest.mark.parametrize("reason,record", [
    ("marker_mismatch", {"image": "a.jpg", "conversations": conversation("Q", "A")}),
    ("marker_mismatch", {"conversations": conversation("<image>", "A")}),
    ("too_many_images", {"image": ["a"] * 71, "conversations": conversation("<image>" * 71, "A")}),
    ("bad_roles", {"conversations": [*conversation("Q"), *conversation("Q")]}),
    ("bad_record", {"conversations": [{"from": "human"}]}),
    ("bad_record", {}),
    ("bad_record", {"conversations": conversation("Q", 7)}),
    ("path_outside_root", {"image": "../a.jpg", "conversations": conversation("<image>", "A")}),
])  # fmt: skip
def test_bad_records(reason, record):
    with pytest.raises(BadSample) as e:
        build(record)
    assert e.value.reason == reason


def test_frame_indices():
    info = video.VideoInfo(frames=100, fps=10.0)
    assert video.frame_indices(info, 1.0) == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert len(video.frame_indices(info, 0.1)) == 45
    assert video.frame_indices(video.VideoInfo(1, 1.0), 1.0) == [0]


def test_video_frames(clip, tmp_path):
    info = video.probe(clip)
    assert info == video.VideoInfo(30, 10.0, (32, 32))
    frames = video.decode_frames(clip, [20, 0, 10, 99], 10**6)
    assert sorted(frames) == [0, 10, 20, 99]
    for k in (0, 10, 20):
        assert abs(int(frames[k][24, 24, 1]) - 8 * k) < 12
        assert frames[k][4, 4, 0] > 200 and frames[k][4, 4, 2] < 60  # RGB, not BGR
    with pytest.raises(BadSample, match="oversized"):
        video.decode_frames(clip, [0], 100)
    (tmp_path / "bad.mp4").write_bytes(b"junk" * 100)
    with pytest.raises(BadSample, match="bad_video"):
        video.probe(str(tmp_path / "bad.mp4"))
    with pytest.raises(BadSample, match="missing"):
        video.probe(str(tmp_path / "none.mp4"))


def test_video_kinds(clip):
    root = os.path.dirname(clip)
    frames = "<image>" * 3
    for record, asked in (
        ({"image": "v.mp4", "conversations": conversation("<video>\nWhat?", "It.")},
         f"{frames}\nWhat?"),
        ({"id": 7, "video": "v.mp4", "conversations": conversation("See <image>. What?", "It.")},
         f"See {frames}. What?"),
        ({"videos": ["v.mp4"], "messages": [{"role": "user", "content": "\nWhat?"},
                                            {"role": "assistant", "content": "It."}]},
         f"{frames}\nWhat?"),
    ):  # fmt: skip
        sample = build(record, root=root)
        assert sample.kind == "video_qa" and sample.turns == (("user", asked), ("assistant", "It."))
        assert [i.frame for i in sample.images] == [0, 10, 20]


def test_videos_in_a_list(clip):
    """Each marker stands for one path; images may be among them."""
    root = os.path.dirname(clip)
    for name in ("w.m4v", "x.MPG"):
        os.link(clip, os.path.join(root, name))
    record = {
        "image": ["v.mp4", "a.png", "w.m4v", "x.MPG"],
        "conversations": conversation("<video> then <image>?", "A <video>", "<image> B", "C"),
    }
    sample = build(record, root=root)
    frames = "<image>" * 3
    texts = [text for _, text in sample.turns]
    assert texts == [f"{frames} then <image>?", f"A {frames}", f"{frames} B", "C"]
    assert [i.frame for i in sample.images] == [0, 10, 20, None, *[0, 10, 20] * 2]
    record["conversations"] = conversation("<video> then <image>?", "A")
    with pytest.raises(BadSample, match="2 markers, 4 images and videos"):
        build(record, root=root)


def test_cache_takes_frames_of_a_video(clip, tmp_path):
    views = Single(2, images.Preprocess(8))
    refs = [ImageRef(clip, frame=k) for k in (20, 0, 10)]
    folder, spec = str(tmp_path / "c"), cache.image_spec(views)
    made, bad = cache.build(folder, spec, refs, views, batch_size=2, progress=False)
    assert not bad and len(made) == 3
    for ref, want in zip(refs, images.load(refs), strict=True):
        np.testing.assert_array_equal(made.rows[made.lookup(ref)], views.pixels(want))
    assert images.sizes(refs) == [(32, 32)] * 3

"""Documents and captioned images: from the official layouts to turns."""

import base64
import collections
import dataclasses
import hashlib
import json

import numpy as np
import pytest

from metamorph_jax.data import images
from metamorph_jax.data.chat import Chat, Markers
from metamorph_jax.data.check import check_stream
from metamorph_jax.data.config import (
    DataConfig,
    DrawingSpec,
    InputSpec,
    OrderConfig,
    RowConfig,
    SourceConfig,
)
from metamorph_jax.data.images import Preprocess
from metamorph_jax.data.interleave import AfterSupervisedStart
from metamorph_jax.data.packing import PackedIterator
from metamorph_jax.data.pipeline import make_stream, open_sources
from metamorph_jax.data.show import lines
from metamorph_jax.data.sources import documents, kinds
from metamorph_jax.data.sources.kinds import Documents, Files
from metamorph_jax.data.views import Single
from metamorph_jax.errors import BadSample
from tests.data.conftest import Ends, make_image, png, write_jsonl, write_tar

ALL = Documents(max_images=0, drop_single=0.0)


def hashed(url):
    return hashlib.sha256(url.encode()).hexdigest()


@pytest.fixture
def root(tmp_path):
    """Images a.png … h.png, two by the hash of their address, one in a folder of MMC4's."""
    for k, name in enumerate("abcdefgh"):
        make_image(k).save(tmp_path / f"{name}.png")
    make_image(20).save(tmp_path / hashed("http://x.test/1.jpg"), format="PNG")
    make_image(21).save(tmp_path / (hashed("http://x.test/2") + ".jpg"))
    (tmp_path / "7").mkdir()
    make_image(22).save(tmp_path / "7" / "n.png")
    return tmp_path


def read(record, root, options=ALL, seed=0, **files):
    files = Files(str(root), documents=options, **files)
    sample = kinds.build(
        record, "s", files, np.random.default_rng(seed), kinds=kinds.known(documents.KINDS)
    )
    return sample.checked(70)


def text(sample):
    return "".join(f"{role[0]}: {said}|" for role, said in sample.turns)


def names(sample):
    return [ref.path.rsplit("/", 1)[1][0] for ref in sample.images]


def mmc4(*images, texts=("One.", "Two.", "Three.")):
    infos = [
        {"image_name": name, "raw_url": "http://x.test/k.jpg", "matched_text_index": at,
         "matched_sim": like, "face_detections": None}
        for name, at, like in images
    ]  # fmt: skip
    return {
        "url": "http://x.test/a", "text_list": list(texts), "image_info": infos,
        "similarity_matrix": [[0.2] * len(texts)] * len(infos), "could_have_url_duplicate": 0,
    }  # fmt: skip


def test_mmc4(root):
    """Similar images that are there, each before or after its sentence; no blanks around them."""
    record = mmc4(("b.png", 2, 0.31), ("a.png", 0, 0.24), ("c.png", 1, 0.23), ("gone.png", 1, 0.9))
    found = {text(read(record, root, seed=k)) for k in range(40)}
    assert found == {
        "u: <image>|a: One. Two.<image>Three.|", "u: <image>|a: One. Two. Three.<image>|",
        "a: One.<image>Two.<image>Three.|", "a: One.<image>Two. Three.<image>|",
    }  # fmt: skip
    sample = read(record, root)
    assert sample.kind == "mmc4" and names(sample) == ["a", "b"]
    # Two at one sentence: markers and images stay together, whichever comes first.
    orders = collections.Counter()
    for k in range(60):
        both = read(mmc4(("b.png", 1, 1), ("a.png", 1, 1)), root, seed=k)
        orders["".join(names(both)), text(both)] += 1
    assert {order for order, _ in orders} == {"ab", "ba"}
    assert all(order == "ba" or "<image>Two.<image>" in said for order, said in orders)


def test_at_most_so_many_images_and_seldom_one(root):
    record = mmc4(*[(f"{name}.png", k % 3, 0.5) for k, name in enumerate("abcdefgh")])
    counts = collections.Counter()
    for k in range(60):
        sample = read(record, root, Documents(image_first=1.0), k)
        assert len(sample.images) == 6 and len(set(sample.images)) == 6
        counts.update(names(sample))
        assert text(sample).count("<image>") == 6
    assert len(counts) == 8 and min(counts.values()) > 30
    dropped = 0
    for k in range(100):
        try:
            read(mmc4(("a.png", 0, 0.5)), root, Documents(), k)
        except BadSample as bad:
            assert bad.reason == "single_image"
            dropped += 1
    assert 30 < dropped < 70


def test_images_in_nested_folders_and_in_the_record(root):
    record = mmc4(("n.png", 0, 0.5))
    sample = read(record, root, record_file="/d/docs_no_face_shard_7_v2.jsonl")
    assert sample.images[0].path == str(root / "7" / "n.png")
    with pytest.raises(BadSample, match="no_images: of 1 images, the files of 1 are missing"):
        read(record, root, record_file="/d/docs_no_face_shard_8_v2.jsonl")
    info = record["image_info"][0] | {"image_base64": base64.b64encode(png(3)).decode()}
    inline = read(record | {"image_info": [info]}, root, record_file="/d/0.tar")
    (image,) = images.load(inline.images)
    np.testing.assert_array_equal(image, make_image(3))
    assert inline.images[0].name.startswith("/d/0.tar") and "sha256=" in inline.images[0].key()
    by_url = {k: v for k, v in record["image_info"][0].items() if k != "image_name"}
    by_url["raw_url"] = "http://x.test/2"
    assert names(read(record | {"image_info": [by_url]}, root)) == [hashed("http://x.test/2")[0]]


OBELICS = {
    "images": ["http://x.test/1.jpg", None, "http://x.test/gone.jpg", "http://x.test/2", None],
    "texts": [None, "A kite.\n\nIt flies. ", None, None, "Down."],
    "metadata": json.dumps([{"src": "http://x.test/1.jpg"}, None, {}, {}, None]),
    "general_metadata": '{"url": "http://x.test/a"}',
}


def test_obelics_and_omnicorpus(root):
    sample = read(OBELICS, root)
    assert sample.kind == "obelics" and len(sample.images) == 2
    assert text(sample) == "u: <image>|a: A kite.\n\nIt flies.<image>Down.|"
    sample = read(OBELICS | {"valid_image": [False, True, True]}, root)
    assert sample.kind == "omnicorpus" and len(sample.images) == 1
    assert text(sample) == "a: A kite.\n\nIt flies.<image>Down.|"
    options = Documents(drop_single=0.0, learn_before=False)
    only = text(read(OBELICS | {"valid_image": [False, True, True]}, root, options))
    assert only == "u: A kite.\n\nIt flies.|a: <image>Down.|"


def test_comm(root):
    (root / "images" / "wk").mkdir(parents=True)
    make_image(1).save(root / "images" / "wk" / "1_0.jpg")
    item = lambda said: {"type": "text", "content": said}  # noqa: E731
    picture = lambda path: {"type": "image", "url": None, "image_path": path}  # noqa: E731
    record = {
        "data_id": "wk_1", "dataset_type": "wikihow", "title": "Fold a kite",
        "summary_info": [item("Easy."), picture("a.png")],
        "step_info": [[item("Cut."), picture("wk/1_0.jpg")], [item("Fold."), picture("gone.png")]],
    }  # fmt: skip
    sample = read(record, root)
    assert sample.kind == "comm" and names(sample) == ["a", "1"]
    assert text(sample) == "a: Fold a kite Easy.<image>(1) Cut.<image>(2) Fold.|"
    one = read(record, root, Documents(max_images=1, drop_single=0.0))
    assert text(one).count("<image>") == 1 == len(one.images)


@pytest.mark.parametrize("options, found", [
    ({}, {"a: two words<image>|", "u: <image>|a: two words|"}),
    ({"learn_before": False}, {"u: two words|a: <image>|", "u: <image>|a: two words|"}),
    ({"image_first": 1, "lower": False, "caption": "TEXT"}, {"u: <image>|a: Alt|"}),
])  # fmt: skip
def test_pairs(options, found, root):
    """BLIP-2's and LAION's captions; of the latter, text before the image is not learnt."""
    record = {"image": "a.png", "caption": ["Two", "Words"], "TEXT": "Alt", "url": "http://a/b.jpg"}
    got = {text(read(record, root, Documents(**options), seed=k)) for k in range(20)}
    assert got == found and read(record, root).kind == "pair"


@pytest.mark.parametrize("record, why", [
    (mmc4(("a.png", 3, 0.5)), "bad_record: `matched_text_index` is 3, of 3 sentences"),
    (mmc4(("a.png", True, 0.5)), "bad_record: `matched_text_index` is True"),
    (mmc4(("a.png", 0, 0.1)), "no_images: of 1 images, .* 1 match by less than 0.24"),
    (mmc4(("../a.png", 0, 0.5)), "path_outside_root"),
    (mmc4((7, 0, 0.5)), "bad_path: an image is 7, expected a path"),
    (mmc4(("a.png", 0, 0.5), texts=[""]), "no_text"),
    (mmc4(("a.png", 0, 0.5), texts=["see <image>"]), "marker_mismatch: 2 markers, 1 images"),
    (mmc4(("a.png", 0, None)), "bad_record: not a record of kind mmc4: TypeError"),
    (OBELICS | {"texts": ["A"]}, "bad_record: 5 `images`, but 1 `texts`"),
    (OBELICS | {"texts": [None] * 5}, "bad_record: place 1 must have either"),
    (OBELICS | {"valid_image": [True] * 5}, "bad_record: `valid_image` must have a flag for each"),
    ({"image": "a.png", "caption": " "}, "no_caption: no text in `caption`, `txt`, `text`"),
    ({"image": "a.png", "caption": [3]}, "bad_record: `caption` is not a list of texts"),
    ({"kind": "pair", "caption": "A"}, "no_image"),
    ({"step_info": [[{"type": "video"}]]}, "bad_record: an item of type 'video'"),
])  # fmt: skip
def test_what_is_wrong_is_named(record, why, root):
    with pytest.raises(BadSample, match=why):
        read(record, root)


def test_a_conversation_is_still_one(root):
    """Captions beside a conversation do not make it a pair."""
    said = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    record = {"image": "a.png", "caption": "c", "conversations": said}
    assert read(record, root).kind == "image"


def damaged(tmp_path):
    """A document of each kind with three images, of which the second one is cut off, and a pair."""
    whole = png(31)
    for name, data in (("x.png", whole), ("y.png", whole[:-30]), ("z.png", png(32))):
        (tmp_path / name).write_bytes(data)
    named = ["x.png", "y.png", "z.png"]
    page = {"images": [None, *named], "texts": ["A page.", None, None, None]}
    step = [{"type": "image", "image_path": name} for name in named]
    return {
        "mmc4": mmc4(*[(name, k, 0.5) for k, name in enumerate(named)]),
        "obelics": page,
        "omnicorpus": page | {"valid_image": [True] * 3},
        "comm": {"title": "T", "step_info": [step]},
        "pair": {"image": "y.png", "caption": "A kite"},
    }


def stream_of(records, tmp_path, **options):
    path = tmp_path / "damaged.jsonl"
    write_jsonl(path, records)
    own = Documents(drop_single=0.0, image_first=0.0, **options)
    config = DataConfig(
        (SourceConfig(str(path), "d", documents=own),),
        OrderConfig(epochs=1, shuffle=False), row=RowConfig("document", length=64, images=4),
    )  # fmt: skip
    drawings = DrawingSpec(4, AfterSupervisedStart(1000), Preprocess(6))
    spec = InputSpec(Single(2, Preprocess(8)), drawings=drawings)
    chat = Chat(Ends(), "document", markers=Markers((1000,)))
    return make_stream(config, spec, chat, open_sources(config, documents.KINDS))


@pytest.mark.parametrize("kind", ["mmc4", "obelics", "omnicorpus", "comm"])
def test_a_broken_image_is_left_out_of_its_document(kind, tmp_path):
    """As one that is not there is; the document is lost only where that is asked for."""
    record = damaged(tmp_path)[kind]
    found, sample, broken = stream_of([record], tmp_path).read(0)
    assert sample.kind == kind and names(sample) == ["x", "z"]
    assert [(one.reason, one.image.path) for one in broken] == [
        ("truncated", str(tmp_path / "y.png"))
    ]
    assert found["broken_images"] == 1 and len(found["pixels"]) == 2
    (tmp_path / "y.png").unlink()
    without = stream_of([record], tmp_path)[0]
    assert without.keys() == found.keys() and without["broken_images"] == 0
    for name in found.keys() - {"broken_images"}:
        np.testing.assert_array_equal(found[name], without[name])
    damaged(tmp_path)
    lost = stream_of([record], tmp_path, drop_broken=False)[0]
    assert lost["bad"] == "truncated" and "y.png" in lost["detail"]


def test_broken_images_are_counted_and_named(tmp_path):
    """Of a pair, of a document of nothing else, and of one that can do without it."""
    records = damaged(tmp_path)
    alone = {"images": [None, "y.png"], "texts": ["Alone.", None]}
    stream = stream_of([records["pair"], alone, records["obelics"]], tmp_path)
    (pair, page, used) = (stream[n] for n in range(3))
    assert pair["bad"] == page["bad"] == "truncated"
    assert "y.png" in pair["detail"] and "y.png" in page["detail"]
    packed = PackedIterator(
        stream, lambda n: iter([pair, page, used]), stream.config, stream.spec, 1
    )
    assert next(packed).images.valid.sum() == 2
    assert packed.skipped == {"d/truncated": 2, "d/broken_images": 1}
    problems = {p["reason"]: p for p in check_stream(stream)["problems"]}
    assert problems["truncated"]["count"] == 2 and not problems["truncated"]["used"]
    (left,) = problems["broken_images"]["examples"]
    assert problems["broken_images"]["used"] and "line 3" in left and "y.png" in left


def test_a_document_of_too_many_images_to_draw_is_named(tmp_path):
    """It is skipped as a whole; with `max_images` as many as a row has places are kept."""
    for name in "abcde":
        make_image(ord(name)).save(tmp_path / f"{name}.png")
    page = {"images": [None, *(f"{name}.png" for name in "abcde")], "texts": ["A.", *[None] * 5]}
    item = stream_of([page], tmp_path)[0]
    assert item["bad"] == "too_many_images"  # a row of this test holds four
    stream = stream_of([page], tmp_path)
    few = dataclasses.replace(stream.spec.drawings, places=3)
    stream.spec = dataclasses.replace(stream.spec, drawings=few)
    stream.config = dataclasses.replace(
        stream.config, row=RowConfig("document", length=64, images=6)
    )
    item = stream[0]
    assert item["bad"] == "too_many_drawings"
    assert item["detail"].endswith("5 images to draw, max_drawings of the model is 3")
    kept = stream_of([page], tmp_path, max_images=3)[0]
    assert len(kept["drawings"]) == 3


def test_training_rows_of_documents(root, tmp_path):
    """From a tar and from lines to what is read, drawn and learnt; the same sample every time."""
    pages = [{"images": ["0.png", None, "1.png"], "texts": [None, "A kite", None]}] * 3
    write_tar(tmp_path / "d.tar", [
        (f"{k}.{end}", data) for k, page in enumerate(pages)
        for end, data in (("json", page), ("0.png", png(1)), ("1.png", png(2)))
    ])  # fmt: skip
    write_jsonl(tmp_path / "laion.jsonl", [{"image": "c.png", "caption": "Sky"}] * 4)
    config = DataConfig(
        (
            SourceConfig(str(tmp_path / "d.tar"), documents=Documents(drop_single=0)),
            SourceConfig(
                str(tmp_path / "laion.jsonl"), documents=Documents(learn_before=False)
            ),
        ),
        OrderConfig(epochs=1, shuffle=False),
        row=RowConfig("document", length=32, images=4),
    )  # fmt: skip
    drawings = DrawingSpec(4, AfterSupervisedStart(1000), Preprocess(6, "halve"))
    spec = InputSpec(Single(2, Preprocess(8, "halve")), drawings=drawings)
    chat = Chat(Ends(), "document", markers=Markers((1000,)))
    streams = [
        make_stream(config, spec, chat, open_sources(config, documents.KINDS)) for _ in range(2)
    ]
    item = streams[0][1]  # ^ < o o A kite < o o $
    assert item["tokens"][[0, 1, 4, 10, 13]].tolist() == [900, 1000, ord("A"), 1000, 901]
    assert item["text_targets"][[0, 3, 9, 12]].tolist() == [-1, ord("A"), 1000, 901]
    assert item["drawing_starts"].tolist() == [10] and item["view_starts"].tolist() == [2, 11]
    np.testing.assert_array_equal(item["drawings"][0], Preprocess(6, "halve")(make_image(2)))
    np.testing.assert_array_equal(item["pixels"][0], Preprocess(8, "halve")(make_image(1)))
    shown = [" ".join(line.split()) for line in lines(streams[0], 1)]
    assert shown[1:] == [
        "reads '^<image_start>'", "sees d.tar: 1.0.png (2 visual tokens)",
        "learns 'A kite<image_start>'", "draws d.tar: 1.1.png (2 visual tokens)", "learns '$'",
    ]  # fmt: skip
    kinds_of = set()
    for n in range(3, 7):
        one, other = (stream[n] for stream in streams)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
        kinds_of.add((one["tokens"][1] == 1000, "drawings" in one))
        if "drawings" in one:  # ^ sky < o o $: the caption is only read
            assert one["text_targets"].tolist() == [-1, -1, -1, 1000, -1, -1, 901, -1]
    assert kinds_of == {(True, False), (False, True)}

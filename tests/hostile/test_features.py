"""Folders of images, results of an earlier start and options that want to break `features` and
`score`; the model is the mean colour of an image."""

import errno
import itertools
import json
import os

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.data import images
from metamorph_jax.data.sources.base import ImageRef
from metamorph_jax.eval.images import features as scored
from metamorph_jax.sampling import features
from tests.eval.toy import png
from tests.hostile.harness import check


def load(path):
    (image,) = images.load([ImageRef(path)])
    return np.asarray(image.resize((4, 4)))[None]


READER = features.Reader(load, lambda x: x.reshape(len(x), -1, 3).astype(np.float32), {"by": "us"})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "open_reader", lambda args: READER)
    (tmp_path / "w").mkdir()
    place = tmp_path / "photos"
    place.mkdir()
    (place / "good.png").write_bytes(png("red"))
    return tmp_path


def words(*more, out="o"):
    return ["features", "--images", "photos", "--workdir", "w", "--out", out, "--batch-size", "2",
            *more]  # fmt: skip


def index(folder, out="o"):
    lines = (folder / out / "images.jsonl").read_text().splitlines()
    return {entry["image"]: entry for entry in map(json.loads, lines)}


def odd_images(place):
    """Files that are no images, or odd ones; the names of those that can't be used."""
    whole, wide = png("red"), png("red", (70_000, 1))
    bad = {"empty.png": b"", "text.png": b"no image", "cut.png": whole[:-30],
           "zeros.jpg": b"\0" * 99, "bomb.png": wide, "head.gif": b"GIF89a"}  # fmt: skip
    for name, data in bad.items():
        (place / name).write_bytes(data)
    os.mkfifo(place / "pipe.png")
    (place / "gone.png").symlink_to("nothing.png")
    (place / "loop.png").symlink_to("loop.png")
    (place / "folder.png").mkdir()
    (place / "loop").symlink_to(".")
    Image.fromarray(np.full((5, 5), 60_000, np.uint16)).save(place / "deep.png")
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(place / "moves.gif", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(place / "clear.png")
    (place / "\u202e n\nl\x1b.png").write_bytes(whole)
    return {*bad, "pipe.png", "gone.png", "loop.png"}


def test_odd_images(folder):
    """Bad ones are named and counted, the others are written; again, nothing is made anew."""
    bad = odd_images(folder / "photos")
    for format in features.FORMATS:
        out = f"o-{format}"
        found = _run(folder, words("--format", format, out=out))
        entries = index(folder, out)
        assert {name for name, entry in entries.items() if "bad" in entry} == bad
        assert len(entries) == len(bad) + 5 and f"5 of {len(entries)} images" in found.out
        assert found.out.replace("\n", "").isprintable()
        again = _run(folder, words("--format", format, out=out))
        assert f"{len(entries)} of {len(entries)} images were done before" in again.err


def _run(folder, argv):
    """Exit code 1 is due: some images are bad."""
    from tests.hostile.harness import judge, run

    found = run(argv, folder)
    assert found.code == 1 and "Traceback" not in found.err, found.err
    found.code = 0
    return judge(found)


LINES = (
    b"x", b"{}", b"[]", b"null", b"{", b"\0", b"[" * 10_000, b"\xff", b'{"image": "good.png"}',
    b'{"image": "good.png", "size": 1, "time": 2, "file": "../../x", "record": 0}',
    b'{"image": "good.png", "size": 1, "time": 2, "file": "features-9999999999.safetensors"}',
    b'{"image": 3, "size": 1, "time": 2, "bad": "x"}',
    b'{"image": "good.png", "size": "1", "time": 2, "bad": "x"}',
    b'{"image": "\\ud800", "size": 1, "time": 2, "bad": "x"}',
)  # fmt: skip


def test_results_of_an_earlier_start(folder):
    check(words(), folder, code=0)
    file = folder / "o" / "images.jsonl"
    for line, end in itertools.product(LINES, (b"\n", b"")):
        file.write_bytes(line + end)
        check(words(), folder, code=0)
        assert index(folder)["good.png"]["file"].startswith("features-000"), line
    meta = folder / "o" / "meta.json"
    for raw in (b"", b"{", b"[]", b"{}", b"\xff", b"[" * 10_000):
        meta.write_bytes(raw)
        check(words(), folder, code=2, naming="o")
    for name in ("meta.json", "images.jsonl"):
        (folder / name).mkdir()
        check(words(out="."), folder, code=2)
        (folder / name).rmdir()
        os.mkfifo(folder / name)
        check(words(out="."), folder, code=2)
        (folder / name).unlink()


@pytest.mark.parametrize("format", features.FORMATS)
def test_a_full_disk(format, folder, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for target, name in ((features.Folder, "_write_index"), (features.pathlib.Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full)
            check(words("--format", format), folder, code=2)
    check(words("--format", format), folder, code=0)


NUMBERS = ("", "nan", "inf", "-1", "0", "1e400", "x", "9" * 30, "1.5", "\x1b[2J")


def test_options(folder):
    for option in ("batch-size", "threads", "max-shard-size"):
        for number in NUMBERS:
            check(words(f"--{option}={number}"), folder)
    for size in ("0B", "1.2.3GB", ".", "1e9", "-5GB", "5XB", "0.0000001B"):
        check(words(f"--max-shard-size={size}"), folder, code=2)
    for more in (
        ("--config", "c"),
        ("--checkpoint", "c"),
        ("--config.model.x=1",),
        ("--images", "gone"),
        ("--images", "w"),
        ("--images", "photos/good.png"),
        ("--out", "photos/good.png"),
        ("--out", ""),
        ("--out", "a\0b"),
    ):
        check(words(*more), folder, code=2)


# ---- score


@pytest.fixture
def network(monkeypatch):
    def prepare(image):
        return np.asarray(image.resize((4, 4)))

    def compute(x):
        return x.reshape(len(x), -1, 3).mean(1).astype(np.float32)

    made = scored.Inception("colours", prepare, compute, np.eye(3, 5, dtype=np.float32))
    monkeypatch.setattr(scored, "open_inception", lambda path: made)
    monkeypatch.setattr(scored, "open_tower", lambda spec: made)


def test_scores_of_odd_folders(folder, network):
    odd_images(folder / "photos")
    (folder / "real").mkdir()
    for k, color in enumerate(("red", "green", "blue")):
        (folder / "real" / f"{k}.png").write_bytes(png(color))
    (folder / "i.pth").write_bytes(b"")
    argv = ["score", "photos", "--inception", "i.pth", "--real", "real", "--json", "s.json"]
    found = check(argv, folder, code=0)
    assert "6 images could not be used" in found.err, found.err
    for size in (*NUMBERS, "4097"):
        check([*argv, f"--fid-size={size}"], folder, code=2)
    for drawn in ("w", "gone", "i.pth", "", "a\0b"):
        check(["score", drawn, *argv[2:]], folder, code=2)
    for more in (
        (),
        ("--paired",),
        ("--captions", "i.pth"),
        ("--clip", "x"),
        ("--tower", "x"),
        ("--geneval", "i.pth", "--dpg", "i.pth"),
        ("--geneval", "i.pth"),
        ("--dpg", "i.pth"),
        ("--samples", "9", "--dpg", "i.pth"),
    ):
        check(["score", "photos", *more], folder, code=2)
    for data in (b"", b"x", b"PK\x03\x04", b"\x93NUMPY"):
        (folder / "real.npz").write_bytes(data)
        check([*argv, "--statistics", "real.npz"], folder, code=2, naming="real.npz")
    for arrays in (
        {"mu": [1.0]},
        {"mu": [np.nan] * 3, "sigma": np.eye(3)},
        {"mu": np.zeros(3), "sigma": np.eye(4)},
        {"mu": np.array([{}], object), "sigma": [1]},
    ):
        np.savez(folder / "real.npz", **arrays)
        check([*argv, "--statistics", "real.npz"], folder, code=2)

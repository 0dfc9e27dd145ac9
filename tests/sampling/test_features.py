"""`metamorph features`: files of features, their index, and what happens when it is interrupted."""

import json
import os

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load, load_file

from metamorph_jax import cli
from metamorph_jax.sampling import features, trained

SIZES = {"a.png": (20, 30), "b/c.jpg": (41, 17), "b/d.png": (9, 9), "e.png": (30, 20)}


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name, (w, h) in SIZES.items():
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)).save(file)
    return tmp_path / "photos"


@pytest.fixture
def run(monkeypatch, generator, photos, tmp_path, capsys, workdir):
    """(more words) -> (exit code, stdout, stderr); the model is loaded once for all tests."""
    monkeypatch.setattr(trained, "load_generator", lambda *args, **options: generator)
    options = {"--images": photos, "--out": tmp_path / "out", "--workdir": workdir}

    def start(*words, **changed):
        given = options | {f"--{name}": value for name, value in changed.items()}
        flags = [f"{name}={value}" for name, value in given.items() if value is not None]
        code = cli.main(["features", "--batch-size=2", "--threads=2", *flags, *words])
        return code, *capsys.readouterr()

    return start


def index(tmp_path):
    lines = (tmp_path / "out/images.jsonl").read_text().splitlines()
    return {entry["image"]: entry for entry in map(json.loads, lines)}


def expected(generator, file, layer):
    with Image.open(file) as image:
        pixels = generator.prompts.views.pixels(image.convert("RGB"))
    found = generator.reader.see(pixels)
    return generator.reader.project(found) if layer == "connector" else found


@pytest.mark.parametrize("layer", features.LAYERS)
@pytest.mark.parametrize("format", features.FORMATS)
def test_features_of_a_folder(layer, format, run, generator, photos, tmp_path):
    code, out, err = run(f"--layer={layer}", f"--format={format}")
    assert code == 0 and f"4 of 4 images in 1 files: {tmp_path / 'out'}" in out, err
    entries = index(tmp_path)
    assert list(entries) == ["a.png", "e.png", "b/c.jpg", "b/d.png"]
    file = tmp_path / "out" / f"features-00000.{format}"
    for name, entry in entries.items():
        assert entry["file"] == file.name
        if format == "safetensors":
            with safe_open(file, "numpy") as stored:
                found, about = stored.get_tensor(name), stored.metadata()
        else:
            record = ArrayRecordReader(str(file)).read([entry["record"]])[0]
            found, about = load(record)["features"], {"made_by": "{}"}
            assert name.encode() in record
        want = expected(generator, photos / name, layer)
        assert list(found.shape) == entry["shape"] == list(want.shape) and found.dtype == np.float32
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
        assert json.loads(about["made_by"]).get("layer", layer) == layer
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert (meta["layer"], meta["dtype"], meta["format"]) == (layer, "float32", format)


def test_half_precision(run, generator, photos, tmp_path):
    assert run("--dtype=float16")[0] == 0
    found = load_file(tmp_path / "out/features-00000.safetensors")["a.png"]
    want = expected(generator, photos / "a.png", "tower")
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, want, rtol=1e-2, atol=1e-3)


def test_corrupt_images_are_counted_and_named(run, photos, tmp_path):
    (photos / "b/broken.jpg").write_bytes(b"\xff\xd8\xff and no more")
    (photos / "empty.png").write_bytes(b"")
    (photos / os.fsdecode(b"\xff.png")).write_bytes(b"")
    code, out, err = run()
    assert code == 1 and "4 of 6 images in 1 files" in out
    assert "  b/broken.jpg: broken_image\n" in out and "  empty.png: zero_byte\n" in out
    assert "its name is not UTF-8; skipped" in err
    assert index(tmp_path)["empty.png"]["bad"] == "zero_byte"
    code, out, err = run()  # they are not read again
    assert code == 1 and "6 of 6 images were done before" in err and "empty.png" in out


def test_files_are_of_bounded_size(run, tmp_path, generator):
    P, C = generator.feature_shape
    code, out, _ = run("--max-shard-size", str(2 * P * C * 4 + 1))
    assert code == 0 and "4 of 4 images in 2 files" in out
    stored = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [sorted(load_file(file)) for file in stored] == [["a.png", "e.png"],
                                                             ["b/c.jpg", "b/d.png"]]  # fmt: skip


@pytest.mark.parametrize("when", ["before the file", "after the file", "in the index"])
def test_interrupted_runs_continue(when, run, tmp_path, monkeypatch, generator):
    """Killed around the second file; the next run makes what an undisturbed one makes."""

    class Killed(BaseException):
        pass

    def fails(*_):
        raise Killed

    most = ("--max-shard-size", "1")
    write, note = features._write_safetensors, features.Folder._write_index
    calls = []

    def second(self_or_path, *rest):
        calls.append(1)
        if when == "after the file":
            write(self_or_path, *rest)
        if len(calls) == 2:
            raise Killed
        if when != "after the file":
            write(self_or_path, *rest)

    def half(self, entries):
        note(self, entries)
        calls.append(1)
        if len(calls) == 2:
            file = self.path / "images.jsonl"
            file.write_bytes(file.read_bytes()[:-9])
            raise Killed

    if when == "in the index":
        monkeypatch.setattr(features.Folder, "_write_index", half)
    else:
        monkeypatch.setattr(features, "_write_safetensors", second)
    with pytest.raises(Killed):
        run(*most)
    monkeypatch.setattr(features.Folder, "_write_index", note)
    monkeypatch.setattr(features, "_write_safetensors", write)
    code, out, err = run(*most)
    assert code == 0 and "1 of 4 images were done before" in err and "in 4 files" in out
    entries = index(tmp_path)
    assert {entry["file"] for entry in entries.values()} == {
        file.name for file in (tmp_path / "out").glob("*.safetensors")
    }
    for name, entry in entries.items():
        assert list(load_file(tmp_path / "out" / entry["file"])) == [name]


def test_what_changed_or_went_is_made_again(run, photos, tmp_path, generator):
    run("--max-shard-size=1")
    Image.new("RGB", (8, 8), "red").save(photos / "a.png")
    (tmp_path / "out" / index(tmp_path)["b/d.png"]["file"]).unlink()
    code, _, err = run("--max-shard-size=1")
    assert code == 0 and "2 of 4 images were done before" in err
    entry = index(tmp_path)["a.png"]
    found = load_file(tmp_path / "out" / entry["file"])["a.png"]
    want = expected(generator, photos / "a.png", "tower")
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_other_settings_need_another_folder(run):
    assert run()[0] == 0
    code, _, err = run("--layer=connector")
    assert code == 2 and "made in another way (layer)" in err


def test_the_tower_of_a_config_alone(run, photos, tmp_path, capsys):
    config = tmp_path / "c.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=''):\n"
        "    return ConfigDict(dict(model=dict(vision=dict(tower='siglip-tiny', tokens=4))))\n"
    )
    code, out, err = run(workdir=None, config=config)
    assert code == 0 and "config.model.vision.weights is random" in err
    found = load_file(tmp_path / "out/features-00000.safetensors")
    assert {name: x.shape[:2] for name, x in found.items()} == {name: (1, 4) for name in SIZES}
    np.testing.assert_allclose(np.linalg.norm(found["a.png"], axis=-1), 1, rtol=1e-4)


@pytest.mark.parametrize("changed, message", [
    (dict(workdir=None), "give either --workdir, or --checkpoint"),
    (dict(config="x.py"), "give either --workdir, or --checkpoint"),
    (dict(workdir=None, config="x.py", layer="connector"), "needs a trained one"),
    (dict(images="none"), "there is no none"),
    ({"batch-size": 0}, "must be at least 1"),
    ({"max-shard-size": "many"}, "is not a size"),
])  # fmt: skip
def test_wrong_options(changed, message, run, tmp_path):
    code, _, err = run(**changed)
    assert code == 2 and message in err
    assert not (tmp_path / "out").exists()


def test_images_of_several_views(tmp_path):
    """Views of neighbouring images share the calls of the model, which are all of one size."""
    calls = []

    def compute(pixels):
        calls.append(len(pixels))
        return pixels.reshape(len(pixels), 1, -1).astype(np.float32)

    def read(path):
        number = int(os.path.basename(path))
        return np.stack([np.full((1, 1, 3), 10 * number + k, np.uint8) for k in range(number)])

    for number in (1, 2, 3, 5):
        (tmp_path / str(number)).write_bytes(b"")
    folder = features.Folder(str(tmp_path / "out"), "safetensors", "float32", 10**6)
    folder.open({})
    reader = features.Reader(read, compute, {})
    features.write(folder, reader, str(tmp_path), ["3", "5", "1", "2"], batch=4, threads=1)
    found = load_file(tmp_path / "out/features-00000.safetensors")
    assert {name: x[:, 0, 0].tolist() for name, x in found.items()} == {
        "1": [10], "2": [20, 21], "3": [30, 31, 32], "5": [50, 51, 52, 53, 54]
    }  # fmt: skip
    assert calls == [4, 4, 4]

"""Features of images: Inception against pytorch-fid, CLIP against transformers, sets of files."""

import pathlib
import re

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from metamorph_jax.convert import names
from metamorph_jax.errors import BadSample, ConfigError, DataError, MissingFile, WeightError
from metamorph_jax.eval.images import features
from metamorph_jax.eval.images.features import Extractor, ImageSet
from metamorph_jax.eval.images.statistics import cosines
from metamorph_jax.models import build
from metamorph_jax.models.vision.inception import InceptionV3, resize

ORACLE = "needs the oracle extra: pip install 'metamorph_jax[oracle]'"


def colours(image):
    """A network that a test can follow: the mean colour, and the height."""
    return np.array([*np.asarray(image).mean((0, 1)), image.size[1]], np.float32)


MEAN = Extractor("mean colour", colours, lambda x: x)


# ---- Inception


def random_weights():
    """Published name -> random array; the same for the library that made `inception.npz`."""
    table = names.lazy_torch_dict(nnx.eval_shape(lambda: InceptionV3(rngs=build.rngs(0))))
    rng, out = np.random.default_rng(0), {}
    for key in sorted(table):
        shape = table.shape_of(key)
        if key.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        elif key.endswith("bn.weight"):
            value = rng.uniform(0.8, 1.2, shape)
        elif len(shape) == 1:
            value = rng.normal(size=shape) * 0.1
        else:
            value = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        out[key] = value.astype(np.float32)
    return out


def test_inception_is_that_of_pytorch_fid(tmp_path, monkeypatch):
    """`inception.npz` holds the 2048 features that pytorch-fid 0.3.0 gives for these weights and
    images, its own resizing from 40 x 56 included."""
    weights = random_weights()
    count = {"Mixed_7c.branch1x1.bn.num_batches_tracked": np.zeros(1, np.int64)}
    save_file(weights | count, tmp_path / "inception.safetensors")
    monkeypatch.setattr(features, "BATCH", 2)
    network = features.open_inception(tmp_path / "inception.safetensors")
    pixels = np.random.default_rng(7).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)
    pixels[1] = np.linspace(0, 255, 40 * 56 * 3).reshape(40, 56, 3).astype(np.uint8)
    found = network.compute(np.stack([network.prepare(Image.fromarray(p)) for p in pixels]))
    expected = np.load(pathlib.Path(__file__).with_name("inception.npz"))["features"]
    np.testing.assert_allclose(found, expected, atol=5e-6 * np.abs(expected).max())
    logits = found @ weights["fc.weight"].T
    np.testing.assert_allclose(network.logits(found), logits, rtol=1e-5, atol=1e-4)


def test_other_inception_weights_are_refused(tmp_path):
    save_file({"fc.weight": np.zeros((1000, 2048), np.float32)}, tmp_path / "imagenet.safetensors")
    with pytest.raises(WeightError, match=re.escape("fc.weight: (1000, 2048), expected (1008")):
        features.open_inception(tmp_path / "imagenet.safetensors")
    with pytest.raises(MissingFile, match="pt_inception-2015-12-05"):
        features.open_inception(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("shape", [(5, 7), (299, 299), (400, 31), (1, 2)])
def test_resizing_is_that_of_torch(shape):
    torch = pytest.importorskip("torch", reason=ORACLE)
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    x = torch.tensor(pixels.transpose(2, 0, 1)[None]).float() / 255
    theirs = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    ours = resize(pixels).transpose(2, 0, 1)
    np.testing.assert_allclose(ours, 2 * theirs[0].numpy() - 1, atol=1e-4)


# ---- CLIP and towers


@pytest.fixture(scope="module")
def network(clip_folder):
    return features.open_clip(str(clip_folder))


def test_clip_reads_files_and_captions_as_transformers_does(clip_folder, image_folders, network):
    torch = pytest.importorskip("torch", reason=ORACLE)
    import transformers as tr

    captions = ["a red cup", "the sky", "x" * 40]
    paths = sorted(image_folders[0].iterdir())[:3]
    images = [Image.open(path).convert("RGB") for path in paths]
    tokens = tr.CLIPTokenizer.from_pretrained(clip_folder)(
        captions, padding=True, truncation=True, max_length=16, return_tensors="pt")  # fmt: skip
    pixels = tr.CLIPImageProcessor.from_pretrained(clip_folder)(images, return_tensors="pt")
    with torch.no_grad():
        out = tr.CLIPModel.from_pretrained(clip_folder).eval()(**tokens, **pixels)
    texts, cut = network.texts(captions)
    found = network.features(ImageSet(tuple(map(str, paths))))
    assert cut == 1 and found.kept == (0, 1, 2) and not found.bad
    expected = (out.image_embeds * out.text_embeds).sum(1).numpy()
    np.testing.assert_allclose(cosines(found.values, texts), expected, atol=1e-5)


def test_a_tower_of_a_two_tower_model_gives_its_pooled_vector(clip_folder, image_folders):
    torch = pytest.importorskip("torch", reason=ORACLE)
    import transformers as tr

    path = str(image_folders[0] / "00.png")
    tower = features.open_tower(str(clip_folder))
    model = tr.CLIPVisionModel.from_pretrained(clip_folder).eval()
    process = tr.CLIPImageProcessor.from_pretrained(clip_folder)
    with torch.no_grad():
        out = model(**process([Image.open(path)], return_tensors="pt")).pooler_output.numpy()
    np.testing.assert_allclose(tower.features(ImageSet((path,))).values, out, atol=1e-4)


def test_a_preprocessor_of_another_size_is_an_error(clip_folder, tmp_path):
    for file in clip_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "preprocessor_config.json").unlink()
    text = (clip_folder / "preprocessor_config.json").read_text().replace("32", "48")
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ConfigError, match="48 pixels, its tower takes 32"):
        features.open_clip(str(tmp_path))


# ---- sets


def test_a_set_has_the_images_of_a_folder(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/1.png", "a.JPG", "c.png"):
        Image.new("RGB", (8, 6)).save(tmp_path / name, "PNG")
    (tmp_path / "notes.txt").write_text("no image")
    found = ImageSet.of_folder(tmp_path)
    assert [p.removeprefix(f"{tmp_path}/") for p in found.paths] == ["a.JPG", "b/1.png", "c.png"]
    with pytest.raises(DataError, match="no images in"):
        ImageSet.of_folder(tmp_path / "nowhere")


def test_size_cuts_out_the_centre(tmp_path):
    """A third of the width is green on either side, and none of it is left."""
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, :9, 1], pixels[:, 21:, 1] = 255, 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    path = (str(tmp_path / "wide.png"),)
    assert np.asarray(ImageSet(path).open(path[0])).shape == (10, 30, 3)
    for size in (8, 64):
        image = np.asarray(ImageSet(path, size).open(path[0]))
        assert image.shape == (size, size, 3) and image[..., 1].max() == 0


def test_size_without_a_cut(tmp_path):
    """The short side is 8, the long one in proportion; as torchvision's `Resize` of an image."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 35, 3), np.uint8))
    image.save(tmp_path / "wide.png")
    path = (str(tmp_path / "wide.png"),)
    found = ImageSet(path, 8, whole=True).open(path[0])
    exact = image.resize((28, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(exact))
    Image.new("RGB", (1, 60_000)).save(tmp_path / "line.png")
    with pytest.raises(BadSample, match="too_long: 1 x 60000"):
        ImageSet(path, 4096, whole=True).open(str(tmp_path / "line.png"))


def test_broken_images_are_left_out_and_named(image_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 2)
    (tmp_path / "cut.png").write_bytes((image_folders[0] / "00.png").read_bytes()[:60])
    good = [str(image_folders[0] / f"{i:02}.png") for i in range(5)]
    paths = (good[0], str(tmp_path / "cut.png"), *good[1:], str(tmp_path / "gone.png"), good[0])
    found = MEAN.features(ImageSet(paths))
    assert found.kept == (0, 2, 3, 4, 5, 7)  # one that stands there twice counts twice
    np.testing.assert_array_equal(found.values[:, 3], [20, 21, 22, 23, 24, 20])
    assert {pathlib.Path(p).name for p in found.bad} == {"cut.png", "gone.png"}
    gaussian, bad = MEAN.gaussian(ImageSet(paths))
    assert gaussian.count == 6 and bad == found.bad
    np.testing.assert_allclose(gaussian.mean, found.values.mean(0), rtol=1e-6)
    with pytest.raises(DataError, match="no image can be used: .*gone.png: missing"):
        MEAN.features(ImageSet(paths[6:7]))

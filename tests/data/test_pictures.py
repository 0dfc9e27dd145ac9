import collections
import io

import numpy as np
import pytest
from PIL import Image

from metamorph_jax.data import pictures
from metamorph_jax.data.sources import BadSample, ImageRef
from metamorph_jax.data.sources.base import confined
from tests.data.conftest import picture


def save(path, image, **kw):
    image.save(path, **kw)
    return ImageRef(str(path))


@pytest.mark.golden
def test_siglip_pixels_golden(golden_root):
    with np.load(golden_root / "metamorph/vision.npz") as z:
        want = z["pixel_values"]
        names = sorted(k for k in z.files if k.startswith("image") and k.endswith("_uint8"))
        assert len(names) == len(want)
        process = pictures.Preprocess(want.shape[-1])
        got = np.stack([process.normalise(process(Image.fromarray(z[k]))) for k in names])
    np.testing.assert_allclose(got.transpose(0, 3, 1, 2), want, atol=1e-6)


@pytest.mark.parametrize("size", [(61, 40), (40, 61), (54, 54), (200, 33), (97, 53)])
@pytest.mark.parametrize("which", ["siglip", "clip", "dinov2"])
def test_equals_transformers(which, size):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    image = picture(3, *size)
    if which == "siglip":
        ours = pictures.Preprocess(48)
        peer = transformers.SiglipImageProcessorPil(
            size={"height": 48, "width": 48}, resample=3,
            image_mean=list(ours.mean), image_std=list(ours.std),
        )  # fmt: skip
    elif which == "clip":
        ours = pictures.CLIP_336.__class__(32, "crop", mean=pictures.CLIP_336.mean,
                                           std=pictures.CLIP_336.std)  # fmt: skip
        peer = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32},
            image_mean=list(ours.mean), image_std=list(ours.std),
        )  # fmt: skip
    else:
        ours = pictures.Preprocess(28, "crop", resize=32, mean=pictures.DINOV2_224.mean,
                                   std=pictures.DINOV2_224.std)  # fmt: skip
        peer = transformers.BitImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, resample=3,
            do_convert_rgb=True, image_mean=list(ours.mean), image_std=list(ours.std),
        )  # fmt: skip
    want = np.asarray(peer(image, return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)
    got = ours.normalise(ours(image))
    assert np.abs(got - want).max() <= 1 / 255 / min(ours.std)


def test_pad_to_square():
    out = pictures.Preprocess(4, "pad")(Image.new("RGB", (2, 4), (255, 0, 0)))
    assert (out[:, 0] == 127).all() and (out[:, 3] == 127).all() and (out[:, 1, 0] == 255).all()


def test_modes_become_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "1", "CMYK", "I;16"):
        image = Image.new(mode, (5, 4))
        name = "a.tiff" if mode in ("CMYK", "I;16") else "a.png"
        out = pictures.load([save(tmp_path / name, image)])[0]
        assert (out.mode, out.size) == ("RGB", (5, 4))


def test_bad_files(tmp_path):
    good = io.BytesIO()
    picture(1, 200, 200).save(good, "PNG")
    cases = {
        "missing": None,
        "zero_byte": b"",
        "unknown_format": b"<svg>not a picture</svg>",
        "truncated": good.getvalue()[:3000],
    }
    for reason, data in cases.items():
        path = tmp_path / f"{reason}.png"
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(BadSample) as e:
            pictures.load([ImageRef(str(path))])
        assert e.value.reason == reason
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff" + bytes(50))
    with pytest.raises(BadSample, match="broken_picture"):
        pictures.load([ImageRef(str(tmp_path / "broken.jpg"))])
    with pytest.raises(BadSample, match="oversized"):
        pictures.load([save(tmp_path / "big.png", picture(1, 50, 50))], max_pixels=2000)


def test_misnamed_is_counted_and_used(tmp_path):
    counts = collections.Counter()
    ref = ImageRef(str(tmp_path / "a.jpg"))
    picture(1).save(ref.path, format="GIF")
    assert pictures.load([ref], counts=counts)[0].size == (24, 16)
    assert counts == {"misnamed": 1}


def test_box_and_marks(tmp_path):
    ref = save(tmp_path / "a.png", Image.new("RGB", (100, 80)))
    cropped, marked = pictures.load([
        ImageRef(ref.path, box=(10, 20, 400, 60)),
        ImageRef(ref.path, marks=(("cup", (20, 40, 30, 20)),)),
    ])  # fmt: skip
    assert cropped.size == (90, 40)
    marked = np.asarray(marked)
    assert marked[42, 30].tolist() == [255, 0, 0] and marked[44, 22].tolist() == [255, 0, 0]
    assert marked[46, 30].tolist() == [0, 0, 0]  # the outline is 5 px wide
    assert marked[20:32, 20:50, 0].any() and not marked[:18].any()  # the name starts 20 px above
    with pytest.raises(BadSample, match="bad_crop"):
        pictures.load([ImageRef(ref.path, box=(200, 20, 300, 60))])


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/x", "", "a\0b", "..", None])
def test_paths_stay_in_the_root(path, tmp_path):
    with pytest.raises(BadSample):
        confined(str(tmp_path), path)


def test_paths_inside_the_root(tmp_path):
    want = str(tmp_path / "a/b..c.png")
    assert confined(str(tmp_path), "a/b..c.png") == want == confined(str(tmp_path), want)
    with pytest.raises(BadSample):
        confined(str(tmp_path), str(tmp_path) + "x/a.png")

import collections
import dataclasses
import io
import json
import os
import pathlib
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from metamorph_jax.data import images
from metamorph_jax.data.sources import ImageRef
from metamorph_jax.data.sources.base import confined
from metamorph_jax.errors import BadSample
from tests.data.conftest import make_image
from tests.recipes.minigpt5 import golden

CASES = pathlib.Path(__file__).parents[1] / "cases" / "data"


def save(path, image, **kw):
    image.save(path, **kw)
    return ImageRef(str(path))


@pytest.mark.golden
def test_siglip_pixels_golden(golden_root):
    with np.load(golden_root / "metamorph/vision.npz") as z:
        want = z["pixel_values"]
        names = sorted(k for k in z.files if k.startswith("image") and k.endswith("_uint8"))
        assert len(names) == len(want)
        process = images.Preprocess(want.shape[-1])
        got = np.stack([process.normalise(process(Image.fromarray(z[k]))) for k in names])
    np.testing.assert_allclose(got.transpose(0, 3, 1, 2), want, atol=1e-6)


@pytest.mark.golden
def test_minigpt5_pixels_golden(golden_root):
    """Images that are read are cut to a square, or padded with white; those to be drawn are padded.
    Of the normalised ones there are samples at regular distances."""
    case = golden.Case(golden_root, "preprocess")
    image = Image.fromarray(case["in.image_hwc_uint8"])
    square = images.pad_to_square(image, (255, 255, 255))
    whole, cut = case["out.output_512_hwc_uint8"], case["out.input_224_hwc_uint8_no_pad"]
    read = images.Preprocess(
        len(cut), "crop", None, "bilinear", images.CLIP_336.mean, images.CLIP_336.std
    )
    drawn = images.Preprocess(len(whole), "square", None, "bilinear")
    found = {
        "padded_square_hwc_uint8": np.asarray(square),
        "input_224_hwc_uint8_no_pad": read(image),
        "input_224_hwc_uint8_padded": read(square),
        "output_512_hwc_uint8": drawn(square),
    }
    for key, pixels in found.items():
        np.testing.assert_array_equal(pixels, case[f"out.{key}"], err_msg=key)
    for name, process, pixels in (("input_224", read, cut), ("output_512", drawn, whole)):
        want = case[f"out.{name}_normalized_slice"].transpose(1, 2, 0)
        step = len(pixels) // len(want)
        np.testing.assert_allclose(process.normalise(pixels)[::step, ::step], want, atol=1e-6)
    case.check_all_read()


def test_pad_to_square():
    out = images.Preprocess(4, "pad")(Image.new("RGB", (2, 4), (255, 0, 0)))
    assert (out[:, 0] == 127).all() and (out[:, 3] == 127).all() and (out[:, 1, 0] == 255).all()


def test_modes_become_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "1", "CMYK", "I;16"):
        image = Image.new(mode, (5, 4))
        name = "a.tiff" if mode in ("CMYK", "I;16") else "a.png"
        out = images.load([save(tmp_path / name, image)])[0]
        assert (out.mode, out.size) == ("RGB", (5, 4))


def test_bad_files(tmp_path):
    good = io.BytesIO()
    make_image(1, 200, 200).save(good, "PNG")
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
            images.load([ImageRef(str(path))])
        assert e.value.reason == reason
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff" + bytes(50))
    with pytest.raises(BadSample, match="broken_image"):
        images.load([ImageRef(str(tmp_path / "broken.jpg"))])
    with pytest.raises(BadSample, match="oversized"):
        images.load([save(tmp_path / "big.png", make_image(1, 50, 50))], max_pixels=2000)


def test_misnamed_is_counted_and_used(tmp_path):
    counts = collections.Counter()
    ref = ImageRef(str(tmp_path / "a.jpg"))
    make_image(1).save(ref.path, format="GIF")
    assert images.load([ref], counts=counts)[0].size == (24, 16)
    assert counts == {"misnamed": 1}


def test_mirrored_and_square(tmp_path):
    ref = save(tmp_path / "a.png", make_image(1, 24, 16))
    mirrored = dataclasses.replace(ref, box=(4, 0, 24, 16), mirror=True)
    square = dataclasses.replace(mirrored, square=True)
    whole, one, other = images.load([ref, mirrored, square])
    assert (np.asarray(one) == np.asarray(whole)[:, :3:-1]).all()
    assert [one.size, other.size] == images.sizes([mirrored, square]) == [(20, 16), (20, 20)]
    assert images.load([square], max_pixels=24 * 16)[0].size == (19, 19)  # no more pixels
    assert len({each.key() for each in (ref, mirrored, square)}) == 3
    assert square.file() == ref


def test_box_and_marks(tmp_path):
    ref = save(tmp_path / "a.png", Image.new("RGB", (100, 80)))
    cropped, marked = images.load([
        ImageRef(ref.path, box=(10, 20, 400, 60)),
        ImageRef(ref.path, marks=(("cup", (20, 40, 30, 20)),)),
    ])  # fmt: skip
    assert cropped.size == (90, 40)
    marked = np.asarray(marked)
    assert marked[42, 30].tolist() == [255, 0, 0] and marked[44, 22].tolist() == [255, 0, 0]
    assert marked[46, 30].tolist() == [0, 0, 0]  # the outline is 5 px wide
    assert marked[20:32, 20:50, 0].any() and not marked[:18].any()  # the name starts 20 px above
    with pytest.raises(BadSample, match="bad_crop"):
        images.load([ImageRef(ref.path, box=(200, 20, 300, 60))])


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/x", "", "a\0b", "..", None])
def test_paths_stay_in_the_root(path, tmp_path):
    with pytest.raises(BadSample):
        confined(str(tmp_path), path)


def test_paths_inside_the_root(tmp_path):
    want = str(tmp_path / "a/b..c.png")
    assert confined(str(tmp_path), "a/b..c.png") == want == confined(str(tmp_path), want)
    with pytest.raises(BadSample):
        confined(str(tmp_path), str(tmp_path) + "x/a.png")


# ---- against the published processors

MEAN, STD = images.CLIP_336.mean, images.CLIP_336.std
KINDS = {
    "siglip": images.Preprocess(40),
    "clip": images.Preprocess(32, "crop", mean=MEAN, std=STD),
    "dinov2": images.Preprocess(
        28, "crop", 32, mean=images.DINOV2_224.mean, std=images.DINOV2_224.std
    ),
    "crop larger than the short side": images.Preprocess(32, "crop", 24, mean=MEAN, std=STD),
    "bilinear": images.Preprocess(24, "crop", 30, "bilinear"),
    "llava": images.Preprocess(36, "pad", mean=MEAN, std=STD),
}


def peer(process):
    """The published processor that our exported preprocessor_config.json makes."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch", reason="pip install 'metamorph_jax[oracle]'")
    fields = images.preprocess_to_hf(process)
    return getattr(transformers, fields.pop("image_processor_type") + "Pil")(**fields)


def compare(process, theirs, image):
    want = np.asarray(theirs(image, return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)
    got = process.normalise(process(image.convert("RGB")))
    assert got.shape == want.shape
    step = 1 / 255 / np.array(process.std)
    assert (np.abs(got - want) <= 1.001 * step).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_published_processor(kind):
    theirs = peer(KINDS[kind])

    @settings(
        max_examples=25, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),  # machines may be slow
    )  # fmt: skip
    @given(
        size=st.one_of(
            st.tuples(st.integers(1, 90), st.integers(1, 90)),
            st.sampled_from([(1, 1), (1, 60), (60, 1), (31, 33), (32, 32), (40, 40)]),
        ),
        mode=st.sampled_from(["RGB", "L", "P", "RGBA", "CMYK", "LA", "1"]),
        seed=st.integers(0, 9),
    )
    def check(size, mode, seed):
        image = make_image(seed, *size)
        if mode in ("RGBA", "LA"):
            image.putalpha(make_image(seed + 1, *size).convert("L"))
        if mode == "P":
            image = image.quantize(7)
        image = image.convert(mode)
        # transformers 5 lays transparent pictures on white; the loaders of the references convert
        # first, which drops alpha, and so do we.
        compare(KINDS[kind], theirs, image.convert("RGB") if "A" in mode else image)

    check()


@pytest.mark.parametrize("background", images.BACKGROUNDS)
def test_transparent_pixels(tmp_path, background):
    """On white by default; the colours that they hide, as the published loaders, on request."""
    image = make_image(1, 9, 8)
    clear = image.copy()
    clear.putalpha(Image.fromarray(np.where(np.arange(72).reshape(8, 9) < 36, 0, 255).astype("u1")))
    want = np.asarray(image).copy()
    if background != "drop":
        want[:4] = 255 if background == "white" else 0
    counts = collections.Counter()
    for name, image_ in {"a.png": clear, "b.webp": clear, "c.tif": clear}.items():
        options = {"lossless": True, "exact": True} if name == "b.webp" else {}
        image_.save(tmp_path / name, **options)
        (loaded,) = images.load([ImageRef(str(tmp_path / name))], 10**6, counts, background)
        assert np.array_equal(np.asarray(loaded), want), name
    assert counts["transparent"] == 3
    (white,) = images.load([ImageRef(str(tmp_path / "a.png"))])
    assert np.asarray(white)[0, 0].tolist() == [255, 255, 255]
    image.convert("RGBA").save(tmp_path / "opaque.png")
    opaque = images.load([ImageRef(str(tmp_path / "opaque.png"))], 10**6, counts)[0]
    assert np.array_equal(np.asarray(opaque), np.asarray(image)) and counts["transparent"] == 3


@pytest.mark.parametrize("mode", ["P", "LA", "L", "1"])
def test_other_kinds_of_transparency(tmp_path, mode):
    gray = Image.fromarray(np.full((4, 4), 100, np.uint8))
    if mode == "LA":
        gray.putalpha(0)
        gray.save(tmp_path / "a.png")
    else:
        gray.convert(mode).save(tmp_path / "a.png", transparency=255 if mode == "1" else 100)
    counts = collections.Counter()
    (loaded,) = images.load([ImageRef(str(tmp_path / "a.png"))], counts=counts)
    assert np.asarray(loaded).max() == 255
    assert counts["transparent"] == 1


def _ramp(path, image, **options):
    image.save(path, **options)
    return np.asarray(images.load([ImageRef(str(path))])[0])


def test_more_than_eight_bits(tmp_path):
    """The upper 8 bits of 16, in every format that has them; other depths are refused by name."""
    cases = {name: np.asarray(images.load([ImageRef(f"{CASES}/{name}")])[0])
             for name in ("gray8.png", "gray16.png", "gray16be.tif")}  # fmt: skip
    for name, found in cases.items():
        assert np.array_equal(found, cases["gray8.png"]), name
    assert cases["gray8.png"].min() == 0 and cases["gray8.png"].max() == 255
    values = np.linspace(0, 65535, 24).astype(np.uint16).reshape(4, 6)
    for name in ("a.png", "a.tif"):
        found = _ramp(tmp_path / name, Image.fromarray(values))
        assert np.array_equal(found, np.repeat((values >> 8)[..., None], 3, 2)), name
    for wrong in (values.astype(np.int32), values.astype(np.float32)):
        with pytest.raises(BadSample, match="unsupported_depth.*a.tif"):
            _ramp(tmp_path / "a.tif", Image.fromarray(wrong))


def test_white_is_zero_and_twelve_bits(tmp_path):
    values = np.linspace(0, 65535, 24).astype(np.uint16).reshape(4, 6)
    found = _ramp(tmp_path / "a.tif", Image.fromarray(values), tiffinfo={262: 0})
    assert found[0, 0, 0] == 255 and found[-1, -1, 0] == 0


def _long_png(path, w, h):
    """A gray PNG of any size in few bytes."""
    chunk = lambda kind, data: (  # noqa: E731
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    rows = zlib.compress(bytes((w + 1) * h), 9) if w * h < 10**8 else b""
    header = struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_sizes_are_bounded_by_the_config_alone(tmp_path):
    _long_png(tmp_path / "line.png", 1, 60_000_000)
    with pytest.raises(BadSample, match="oversized.*65535 a side"):
        images.load([ImageRef(str(tmp_path / "line.png"))])
    _long_png(tmp_path / "large.png", 20_000, 20_000)  # above both of Pillow's own limits
    for load in (images.load, images.sizes):
        with pytest.raises(BadSample, match="at most 64000000 pixels"):
            load([ImageRef(str(tmp_path / "large.png"))])
    assert images.sizes([ImageRef(str(tmp_path / "large.png"))], 500_000_000) == [(20_000,) * 2]


def test_boxes_of_any_size_are_drawn_at_once(tmp_path):
    ref = save(tmp_path / "a.png", make_image(1, 50, 40))
    far = [(1e18, 1e18, 1e18, 1e18), (-1e18, -1e18, 2e18, 2e18), (5, 5, 1e300, 1e300)]
    marks = tuple((f"box {k}", box) for k, box in enumerate(far))
    start = time.monotonic()
    (drawn,) = images.load([ImageRef(ref.path, marks=marks)])
    assert time.monotonic() - start < 2 and drawn.size == (50, 40)
    assert np.asarray(drawn)[5, 20].tolist() == [255, 0, 0]  # the edge that lies inside


def test_what_is_not_a_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in ("pipe.png", "pipe.mp4"):
        ref = ImageRef(str(tmp_path / name), frame=0 if name.endswith("mp4") else None)
        for load in (images.load, images.sizes):
            with pytest.raises(BadSample, match="unreadable.*a pipe"):
                load([ref])
    with pytest.raises(BadSample, match="unreadable.*a device"):
        images.load([ImageRef("/dev/zero")])
    with open(tmp_path / "sparse.png", "wb") as f:
        f.truncate(10**12)
    with pytest.raises(BadSample, match="oversized"):
        images.load([ImageRef(str(tmp_path / "sparse.png"))])


def test_exif_rotation_is_not_applied(tmp_path):
    """As in LLaVA's and MetaMorph's loaders, which open and convert and no more."""
    image = make_image(1, 30, 20)
    exif = Image.Exif()
    exif[274] = 6  # "turn right by 90 degrees to look at it"
    ref = save(tmp_path / "a.png", image, exif=exif)
    (loaded,) = images.load([ref])
    assert Image.open(ref.path).getexif()[274] == 6
    assert loaded.size == (30, 20) and np.array_equal(np.asarray(loaded), np.asarray(image))
    compare(KINDS["clip"], peer(KINDS["clip"]), Image.open(ref.path))


def test_halved_before_it_is_resized():
    """By hand: a box of 2 x 2, then bicubic to the short side, then the centre."""
    image = make_image(3, 70, 33)
    got = images.Preprocess(8, "halve")(image)
    quarter = image.resize((35, 16), Image.Resampling.BOX).resize((17, 8), Image.Resampling.BOX)
    np.testing.assert_array_equal(got, np.asarray(quarter)[:, 4:12])
    even = make_image(4, 32, 16)  # halved once, and then of the right size
    means = np.asarray(even, np.float64).reshape(8, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(images.Preprocess(8, "halve")(even) - means[:, 4:12]).max() <= 1  # rounded twice
    small = images.Preprocess(24, "halve")(image)  # 33 is less than twice 24
    np.testing.assert_array_equal(small, np.asarray(image.resize((51, 24), 3))[:, 13:37])
    with pytest.raises(ValueError, match="halve"):
        images.preprocess_to_hf(images.Preprocess(8, "halve"))


@pytest.mark.parametrize("size", [(1, 30000), (30000, 1)])
@pytest.mark.parametrize("mode", ["crop", "halve", "pad"])
def test_very_long_lines_stay_small(size, mode):
    """The published steps would make a picture of 1.5 to 2.7 gigabytes of it."""
    tracemalloc.start()
    out = images.Preprocess(224, mode)(Image.new("RGB", size, (255, 0, 0)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert out.shape == (224, 224, 3) and peak < 50e6
    assert out[111, 111].tolist() == [255, 0, 0]
    assert (out == (255, 0, 0)).all() == (mode != "pad")


@pytest.mark.parametrize("kind", KINDS)
def test_config_comes_back(kind):
    process = KINDS[kind]
    again = images.preprocess_from_hf(json.loads(json.dumps(images.preprocess_to_hf(process))))
    assert again == process


# As published: siglip-so400m-patch14-384, clip-vit-large-patch14-336, dinov2-small.
PUBLISHED = {
    "siglip": (
        dict(do_normalize=True, do_rescale=True, do_resize=True, image_mean=[0.5, 0.5, 0.5],
             image_processor_type="SiglipImageProcessor", image_std=[0.5, 0.5, 0.5], resample=3,
             processor_class="SiglipProcessor", rescale_factor=0.00392156862745098,
             size={"height": 384, "width": 384}),
        images.SIGLIP_384,
    ),
    "clip, old style": (
        dict(crop_size=336, do_center_crop=True, do_normalize=True, do_resize=True,
             feature_extractor_type="CLIPFeatureExtractor", image_mean=list(MEAN),
             image_std=list(STD), resample=3, size=336),
        images.CLIP_336,
    ),
    "dinov2": (
        dict(crop_size={"height": 224, "width": 224}, do_center_crop=True, do_convert_rgb=True,
             do_normalize=True, do_rescale=True, do_resize=True, image_mean=[0.485, 0.456, 0.406],
             image_processor_type="BitImageProcessor", image_std=[0.229, 0.224, 0.225], resample=3,
             rescale_factor=0.00392156862745098, size={"shortest_edge": 256}),
        images.DINOV2_224,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    fields, want = PUBLISHED[name]
    assert images.preprocess_from_hf(fields) == want


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"image_processor_type": "Siglip2ImageProcessor"}, "Siglip2ImageProcessor"),
        ({}, "image processor ''"),
        ({"image_processor_type": "CLIPImageProcessor", "do_resize": False}, "do_resize=False"),
        ({"image_processor_type": "CLIPImageProcessor", "rescale_factor": 1 / 127.5}, "rescale_f"),
        ({"image_processor_type": "CLIPImageProcessor", "resample": 1}, "resample=1"),
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}, "shortest_edge"),
        ({"image_processor_type": "SiglipImageProcessor", "size": {"height": 2, "width": 3}},
         "not a square"),
        ({"image_processor_type": "SiglipImageProcessor", "size": {"longest_edge": 3}}, "size="),
    ],
)  # fmt: skip
def test_configs_that_we_do_not_compute(fields, word):
    with pytest.raises(ValueError, match=word):
        images.preprocess_from_hf(fields)

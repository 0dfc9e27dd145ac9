"""From files to uint8 pixels: bounded decoding, and resizing that equals the published processors.

Pixels stay uint8 `[h, w, 3]` until they are on the device; `(x / 255 - mean) / std` happens there.
The published processors resize with Pillow before they scale, so nothing is lost by that.
"""

import collections
import contextlib
import dataclasses
import io
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from metamorph_jax import files
from metamorph_jax.data.sources.base import ImageRef
from metamorph_jax.data.sources.video import decode_frames, probe
from metamorph_jax.errors import BadImage, BadSample, FileError, MissingFile
from metamorph_jax.files import shown

MAX_PIXELS = 64_000_000
MAX_SIDE = 65_535  # longer lines take far more memory than their pixels do
MAX_BYTES = 256_000_000
BACKGROUNDS = ("white", "black", "drop")
NOTES = ("misnamed", "transparent")  # what is counted of images that are used
# Sizes are checked here, against a limit that the config has, before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None
# What a file starts with -> Pillow's decoders that may read it. Nothing else is ever tried.
_MAGIC = (
    (b"\xff\xd8\xff", "jpeg", ("JPEG", "MPO")),
    (b"\x89PNG\r\n\x1a\n", "png", ("PNG",)),
    (b"GIF87a", "gif", ("GIF",)),
    (b"GIF89a", "gif", ("GIF",)),
    (b"BM", "bmp", ("BMP",)),
    (b"II*\0", "tiff", ("TIFF",)),
    (b"MM\0*", "tiff", ("TIFF",)),
)
_EXTENSIONS = {
    ".jpg": "jpeg", ".jpeg": "jpeg", ".jpe": "jpeg", ".jfif": "jpeg", ".png": "png", ".gif": "gif",
    ".bmp": "bmp", ".tif": "tiff", ".tiff": "tiff", ".webp": "webp",
}  # fmt: skip


def sniff(head: bytes) -> tuple[str, tuple[str, ...]] | None:
    """(format, Pillow decoders) of data that starts with `head`; None if unknown."""
    for magic, name, decoders in _MAGIC:
        if head.startswith(magic):
            return name, decoders
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp", ("WEBP",)
    return None


def misnamed(path: str, head: bytes) -> bool:
    """Whether the extension belongs to another format than that of the bytes."""
    expected = _EXTENSIONS.get(os.path.splitext(path)[1].lower())
    found = sniff(head)
    return expected is not None and found is not None and expected != found[0]


def names_in(folder: str | os.PathLike) -> list[str]:
    """Paths of the images below a folder, relative to it, by the extensions of their names.

    They come in the order of their names, those of a folder before those of its own folders.

    Raises:
        MissingFile: there are none.
    """
    found = []
    for place, folders, names in os.walk(folder):
        folders.sort()
        inside = pathlib.PurePath(os.path.relpath(place, folder))
        found += [(inside / name).as_posix() for name in sorted(names)
                  if os.path.splitext(name)[1].lower() in _EXTENSIONS]  # fmt: skip
    if not found:
        raise MissingFile(f"{shown(folder)} holds no images ({', '.join(_EXTENSIONS)})")
    return found


def read_bytes(path: str) -> bytes:
    """The whole file; BadSample if it is missing, empty, or far too large for an image."""
    try:
        data = files.read_bytes(path, MAX_BYTES)
    except MissingFile as e:
        raise BadSample("missing", shown(path)) from e
    except FileError as e:
        reason = "oversized" if "larger than" in str(e) else "unreadable"
        raise BadSample(reason, str(e)) from e
    if not data:
        raise BadSample("zero_byte", shown(path))
    return data


def read_ref(ref: ImageRef) -> bytes:
    """The bytes of an image's file, of a member of a tar, or of a record; as `read_bytes`."""
    size = None if ref.inside is None else ref.inside.size
    size = size if ref.data is None else len(ref.data)
    if size is None:
        return read_bytes(ref.path)
    if size > MAX_BYTES:
        raise BadSample("oversized", f"{shown(ref.name)}: {size:,} bytes, at most {MAX_BYTES:,}")
    if not size:
        raise BadSample("zero_byte", shown(ref.name))
    if ref.data is not None:
        return ref.data
    try:
        with files.opened(ref.path) as file:
            file.seek(ref.inside.offset)
            data = file.read(size)
    except FileError as e:
        raise BadSample("unreadable", str(e)) from e
    if len(data) < size:
        raise BadSample("truncated", f"{shown(ref.name)}: the tar ends in it")
    return data


@contextlib.contextmanager
def _opened(data: bytes, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """The image with its header read and checked; BadSample for whatever is wrong with it."""
    found = sniff(data[:16])
    if found is None:
        raise BadSample("unknown_format", name)
    try:
        with Image.open(io.BytesIO(data), formats=found[1]) as image:
            w, h = image.size
            if w * h > max_pixels or max(w, h) > MAX_SIDE:
                raise BadSample(
                    "oversized",
                    f"{name}: {w}x{h}, at most {max_pixels} pixels and {MAX_SIDE} a side",
                )
            if w == 0 or h == 0:
                raise BadSample("broken_image", f"{name}: {w}x{h}")
            yield image
    except BadSample:
        raise
    except MemoryError:
        raise
    except Exception as e:  # Pillow's decoders raise many kinds of error on broken files
        reason = "truncated" if "truncated" in str(e).lower() else "broken_image"
        message = str(e).split(" <_io.")[0]  # without Pillow's name of the bytes
        raise BadSample(reason, f"{name}: {message}") from e


def decode(
    data: bytes,
    name: str,
    max_pixels: int = MAX_PIXELS,
    background: str = "white",
    notes: collections.Counter | None = None,
) -> Image.Image:
    """The RGB image in `data`. The header is looked at before any pixel is decoded.

    EXIF orientation is not applied, as the published loaders do; of an animation the first frame is
    taken. Of 16 bits the upper 8 are kept.

    Args:
        data: of a file.
        name: of the file, for messages.
        max_pixels: a larger image is bad.
        background: one of `BACKGROUNDS`, see `ImageConfig`.
        notes: "transparent" goes up if there are transparent pixels.

    Raises:
        BadSample: it can't be decoded, is too large, or has values of another depth.
    """
    with _opened(data, name, max_pixels) as image:
        image.load()
        image = _eight_bits(image, name)
        alpha = _alpha(image)
        if alpha is None:
            return image.convert("RGB")
        if notes is not None:
            notes["transparent"] += 1
        colours = image.convert("RGBA").convert("RGB")
        if background == "drop":
            return colours
        behind = Image.new("RGB", image.size, background)
        behind.paste(colours, mask=alpha)
        return behind


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """The image with 8 bits a channel; only those of one channel have more in Pillow."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))
    bits = bits[0] if isinstance(bits, tuple) else bits
    sixteen = image.mode.startswith("I;16") or image.format == "PNG"
    if not sixteen or bits not in (12, 16) or tags.get(339, (1,)) not in ((1,), 1):
        raise BadSample(
            "unsupported_depth", f"{name}: {bits} bits in mode {image.mode}, expected 8 or 16 bits "
            "without a sign",
        )  # fmt: skip
    values = np.asarray(image).astype(np.uint16)
    if tags.get(262) == 0:  # white is zero
        values = (2**bits - 1) - values
    gray = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        gray.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return gray


def _alpha(image: Image.Image) -> Image.Image | None:
    """The alpha channel of an image, or None if all of its pixels are opaque."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema()[0] == 255 else alpha


def draw_marks(image: Image.Image, marks) -> Image.Image:
    """A copy with each (name, (x, y, w, h)) as a red box of 5 px, its name 20 px above."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default()
    # Pillow walks along every line that it draws, so no end of one lies far outside.
    right, bottom = (side + 10 for side in image.size)
    clip = lambda v, most: min(max(v, -10), most)  # noqa: E731
    for name, (x, y, w, h) in marks:
        corners = (clip(x, right), clip(y, bottom),
                   clip(x + max(w, 0), right), clip(y + max(h, 0), bottom))  # fmt: skip
        draw.rectangle(corners, outline=(255, 0, 0), width=5)
        if -MAX_SIDE < x < right and -MAX_SIDE < y < bottom + 20:
            draw.text((x, y - 20), name, fill=(255, 0, 0), font=font)
    return image


def crop_box(size: tuple[int, int], box, name: str) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2) in whole pixels, clipped to an image of this (width, height)."""
    w, h = size
    x1, y1 = max(int(box[0]), 0), max(int(box[1]), 0)
    x2, y2 = min(int(round(box[2])), w), min(int(round(box[3])), h)
    if x2 <= x1 or y2 <= y1:
        raise BadSample("bad_crop", f"{name}: {box} lies outside of {w}x{h}")
    return x1, y1, x2, y2


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image becomes square pixels, and how the device is to scale them.

    Attributes:
        size: side of the result.
        mode: "square" stretches (SigLIP); "pad" first pads to a square with the mean colour;
            "crop" resizes the short side to `resize` and cuts out the centre (CLIP, DINOv2);
            "halve" does so, too, but first halves the image with a box filter while its short side
            is at least twice as long as it is to be (ADM, MM-Interleaved).
        resize: short side before cropping, `size` if None.
        resample: "bicubic" or "bilinear".
        mean, std: of values in 0…1, per channel; applied on the device.
    """

    size: int = 384
    mode: str = "square"
    resize: int | None = None
    resample: str = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        if self.mode not in ("square", "pad", "crop", "halve"):
            raise ValueError(f"mode {self.mode!r}: expected square, pad, crop or halve")
        if self.resample not in ("bicubic", "bilinear"):
            raise ValueError(f"resample {self.resample!r}: expected bicubic or bilinear")

    def __call__(self, image: Image.Image) -> np.ndarray:
        """uint8[size, size, 3] of an RGB image."""
        resample = getattr(Image.Resampling, self.resample.upper())
        square = (self.size, self.size)
        if self.mode == "pad":
            image = pad_to_square(image, tuple(int(255 * m) for m in self.mean), self.size)
        if self.mode in ("crop", "halve"):
            short = self.resize or self.size
            halve, whole = self.mode == "halve", round if self.mode == "halve" else int
            while halve and min(image.size) >= 2 * short:
                image = image.resize([side // 2 for side in image.size], Image.Resampling.BOX)
            w, h = image.size
            # The published processors cut the long side to an integer, "halve" rounds it.
            new = (short, whole(short * h / w)) if w <= h else (whole(short * w / h), short)
            left, top = (new[0] - self.size) // 2, (new[1] - self.size) // 2
            if new[0] * new[1] <= MAX_PIXELS or self.size > short:
                image = image.resize(new, resample)
                image = image.crop((left, top, left + self.size, top + self.size))
            else:  # a very long line: resize only what is cut out (differs slightly at its edges)
                x, y = w / new[0], h / new[1]
                box = (left * x, top * y, (left + self.size) * x, (top + self.size) * y)
                image = image.resize(square, resample, box=box)
        elif image.size != square:
            image = image.resize(square, resample)
        return np.asarray(image)

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """float32 of the same shape: what the device makes of the pixels."""
        x = pixels.astype(np.float32) / np.float32(255)
        return (x - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def fingerprint(self) -> str:
        """Text that differs whenever the uint8 result does; caches are keyed by it."""
        pad = [int(255 * m) for m in self.mean] if self.mode == "pad" else None
        return f"v1 {self.mode} {self.size} {self.resize} {self.resample} {pad}"


SIGLIP_384 = Preprocess(384)
CLIP_336 = Preprocess(
    336,
    mode="crop",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
DINOV2_224 = Preprocess(
    224, mode="crop", resize=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)


def pad_to_square(
    image: Image.Image, colour: tuple[int, int, int], size: int | None = None
) -> Image.Image:
    """The image in the middle of a square of its longer side.

    Where that square would have more than MAX_PIXELS, the image is first shrunk to `size`.
    """
    w, h = image.size
    if w == h:
        return image
    side = max(w, h)
    if side * side > MAX_PIXELS and size is not None:
        w, h = (max(1, round(n * size / side)) for n in (w, h))
        image, side = image.resize((w, h), Image.Resampling.BICUBIC), size
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - w) // 2, (side - h) // 2))
    return square


# ---- Hugging Face's preprocessor_config.json

_RESAMPLE = {2: "bilinear", 3: "bicubic"}
# Types whose steps are: convert, (pad to a square,) resize, (cut out the centre,) scale, normalise;
# with the size that a bare number means: of the square, or of the short side.
_PROCESSORS = {
    "Siglip": "square", "ViT": "square", "CLIP": "short", "Bit": "short", "Llava": "short",
    "LlavaNext": "short",  # of each view; its `do_pad` fills up the number of views of a batch
}  # fmt: skip


def preprocess_from_hf(fields: Mapping) -> Preprocess:
    """The Preprocess that a preprocessor_config.json describes.

    Fields that it lacks have the values of the type's own class.

    Raises:
        ValueError: naming the type or the fields that we have no counterpart of.
    """
    kind = fields.get("image_processor_type") or fields.get("feature_extractor_type") or ""
    name = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", kind)
    if name not in _PROCESSORS:
        raise ValueError(
            f"image processor {kind!r} is none of "
            + ", ".join(f"{k}ImageProcessor" for k in _PROCESSORS)
        )
    stated = _stated(fields, name)
    if wrong := _without_counterpart(fields, name, stated):
        raise ValueError(f"{kind}: no counterpart of " + "; ".join(wrong))
    resample = _RESAMPLE[fields.get("resample", _usual_resample(name))]
    size, mean, std = stated.size, *_pixel_statistics(fields, name)
    mode = "pad" if stated.pad else "crop" if stated.short else "square"
    if mode != "crop":
        return Preprocess(size, mode, None, resample, mean, std)
    side = stated.cut["height"]
    return Preprocess(side, mode, None if size == side else size, resample, mean, std)


@dataclasses.dataclass(frozen=True)
class _Stated:
    """The sizes that a preprocessor_config.json gives.

    Attributes:
        given: the field `size` as a table; short: its shorter side, or None; size: in use.
        crop, pad: whether a square is cut out, or filled up; cut: the field `crop_size`.
    """

    given: Mapping
    short: int | None
    size: int | None
    crop: bool
    pad: bool
    cut: Mapping


def _stated(fields: Mapping, name: str) -> _Stated:
    square = _PROCESSORS[name] == "square"
    given, cut = fields.get("size", 224), fields.get("crop_size", 224)
    if isinstance(given, int):
        given = {"height": given, "width": given} if square else {"shortest_edge": given}
    cut = cut if isinstance(cut, Mapping) else {"height": cut, "width": cut}
    short = given.get("shortest_edge")
    crop = bool(fields.get("do_center_crop", not square))
    pad = bool(fields.get("do_pad", False)) and name != "LlavaNext"
    return _Stated(given, short, short or given.get("height"), crop, pad, cut)


def _usual_resample(name: str) -> int:
    return 2 if name == "ViT" else 3


def _without_counterpart(fields: Mapping, name: str, stated: _Stated) -> list[str]:
    """What of a preprocessor_config.json we can't do, as "name=value"."""
    wrong = [
        f"{key}={fields[key]!r}"
        for key in ("do_resize", "do_rescale", "do_convert_rgb")
        if fields.get(key) is not None and not fields[key]
    ]
    if abs(fields.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-4:
        wrong.append(f"rescale_factor={fields['rescale_factor']!r}")
    resample = fields.get("resample", _usual_resample(name))
    if resample not in _RESAMPLE:
        wrong.append(f"resample={resample!r}")
    given, short, cut = stated.given, stated.short, stated.cut
    if not stated.size or set(given) - {"shortest_edge", "height", "width"}:
        wrong.append(f"size={given!r}")
    elif not short and given["height"] != given.get("width"):
        wrong.append(f"size={given!r} (not a square)")
    if stated.crop and cut.get("height") != cut.get("width"):
        wrong.append(f"crop_size={cut!r} (not a square)")
    if stated.pad and name != "Llava":
        wrong.append("do_pad=True")
    if short and not stated.crop and not stated.pad:
        wrong.append("size.shortest_edge without do_center_crop (results differ in size)")
    if (stated.pad or not short) and stated.crop and cut.get("height") != stated.size:
        wrong.append(f"crop_size={cut!r} of an image that is {stated.size} square")
    return wrong


def _pixel_statistics(fields: Mapping, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the channels."""
    mean, std = (0.5,) * 3, (0.5,) * 3
    if _PROCESSORS[name] != "square":
        mean, std = CLIP_336.mean, CLIP_336.std
    mean, std = fields.get("image_mean", mean), fields.get("image_std", std)
    if not fields.get("do_normalize", True):
        mean, std = 0.0, 1.0
    three = lambda x: x if hasattr(x, "__len__") else (x,) * 3  # noqa: E731
    return tuple(float(v) for v in three(mean)), tuple(float(v) for v in three(std))


def preprocess_to_hf(preprocess: Preprocess) -> dict:
    """A preprocessor_config.json that `AutoImageProcessor` reads and that gives the same pixels.

    Raises:
        ValueError: transformers has no processor that does.
    """
    if preprocess.mode == "halve":
        raise ValueError('no processor of transformers gives the pixels of mode "halve"')
    kind = {"square": "Siglip", "pad": "Llava", "crop": "CLIP"}[preprocess.mode]
    if preprocess.mode == "crop" and preprocess.resize not in (None, preprocess.size):
        kind = "Bit"
    side = {"height": preprocess.size, "width": preprocess.size}
    fields = {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": side,
        "resample": {v: k for k, v in _RESAMPLE.items()}[preprocess.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
    if preprocess.mode == "pad":
        fields |= {"do_pad": True, "do_center_crop": False}
    if preprocess.mode == "crop":
        fields |= {
            "size": {"shortest_edge": preprocess.resize or preprocess.size},
            "do_center_crop": True,
            "crop_size": side,
        }
    return fields


def load(
    refs: Sequence[ImageRef],
    max_pixels: int = MAX_PIXELS,
    counts: collections.Counter | None = None,
    background: str = "white",
) -> list[Image.Image]:
    """The RGB images of one sample; each file is read, and each video decoded, once.

    Args:
        refs: which.
        max_pixels: a larger image is bad.
        counts: "misnamed" goes up for images whose extension is wrong, "transparent" for those with
            transparent pixels; both are used.
        background: see `ImageConfig`.

    Raises:
        BadImage: one of them can't be used.
        BadSample: a video can't.
    """
    counts = collections.Counter() if counts is None else counts
    frames: dict[str, list[int]] = collections.defaultdict(list)
    for ref in refs:
        if ref.frame is not None:
            frames[ref.path].append(ref.frame)
    videos = {path: decode_frames(path, wanted, max_pixels) for path, wanted in frames.items()}
    decoded: dict[ImageRef, Image.Image] = {}
    out = []
    for ref in refs:
        file = ref.file()
        if ref.frame is not None:
            image = Image.fromarray(videos[ref.path][ref.frame])
        else:
            if file not in decoded:
                with _of_image(file):
                    data = read_ref(ref)
                    counts["misnamed"] += misnamed(ref.name, data[:16])
                    decoded[file] = decode(data, ref.name, max_pixels, background, counts)
            image = decoded[file]
        if ref.box is not None:
            image = image.crop(crop_box(image.size, ref.box, ref.name))
        if ref.marks:
            image = draw_marks(image, ref.marks)
        if ref.mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if ref.square:
            image = image.resize(_square(image.size, max_pixels), Image.Resampling.BICUBIC)
        out.append(image)
    return out


@contextlib.contextmanager
def _of_image(file: ImageRef) -> Iterator[None]:
    """What is wrong in here is that image."""
    try:
        yield
    except BadSample as e:
        raise BadImage(e.reason, e.detail, file) from e


def sizes(refs: Sequence[ImageRef], max_pixels: int = MAX_PIXELS) -> list[tuple[int, int]]:
    """(width, height) of the images of one sample, from the headers of their files; errors are
    those of `load`."""
    known: dict[ImageRef, tuple[int, int]] = {}
    out = []
    for ref in refs:
        file = ref.file()
        if file not in known and ref.frame is not None:
            known[file] = probe(ref.path).size
        elif file not in known:
            with _of_image(file), _opened(read_ref(ref), ref.name, max_pixels) as image:
                known[file] = image.size
        size = known[file]
        if ref.box is not None:
            x1, y1, x2, y2 = crop_box(size, ref.box, ref.name)
            size = x2 - x1, y2 - y1
        out.append(_square(size, max_pixels) if ref.square else size)
    return out


def _square(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """The square of the longer side, but of no more pixels than that."""
    side = min(max(size), math.isqrt(max_pixels))
    return side, side

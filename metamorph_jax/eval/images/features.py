"""Features of images for scores: Inception, CLIP and any vision tower, over all local devices.

    files ─ opened and prepared in threads ─ batches ─ compiled network ─ float32[N, C] on the host

An image that can't be used is left out, and its file and reason are kept: scores say how many.
"""

import concurrent.futures
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from PIL import Image

from metamorph_jax import sharding
from metamorph_jax.convert import clip, hf, inception, specs, vit
from metamorph_jax.data import images, tokenizers
from metamorph_jax.data.images import Preprocess, preprocess_from_hf
from metamorph_jax.errors import BadSample, ConfigError, DataError
from metamorph_jax.eval.images.statistics import Gaussian
from metamorph_jax.models.build import build
from metamorph_jax.models.vision.clip import CLIP
from metamorph_jax.models.vision.inception import InceptionV3, resize
from metamorph_jax.models.vision.vit import ViT, ViTConfig

BATCH = 32
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
Pixels = np.ndarray


# ---- sets of images


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images whose features are wanted.

    Attributes:
        paths: files; one that stands there twice counts twice.
        size: the short side is made this long (bicubic) and the centre is cut out, before anything
            else; None: images stay as they are. 64 and 256 are in use for FID, and give numbers
            that can't be compared with each other.
        whole: nothing is cut out, and the resize is bilinear (torchvision's `Resize`).
    """

    paths: tuple[str, ...]
    size: int | None = None
    whole: bool = False

    @classmethod
    def of_folder(cls, folder: str | os.PathLike, size: int | None = None) -> "ImageSet":
        """All images in a folder and the folders inside it, in order of their paths.

        Raises:
            DataError: there are none.
        """
        found = (p for p in pathlib.Path(folder).rglob("*") if p.suffix.lower() in EXTENSIONS)
        paths = tuple(sorted(str(p) for p in found if p.is_file()))
        if not paths:
            raise DataError(f"no images in {folder} ({', '.join(EXTENSIONS)})")
        return cls(paths, size)

    def open(self, path: str) -> Image.Image:
        """One RGB image of the set's size; BadSample if it can't be used."""
        image = images.decode(images.read_bytes(path), path)
        if self.size is None:
            return image
        if self.whole:
            return _resized(image, self.size)
        return Image.fromarray(Preprocess(self.size, "crop")(image))


def _resized(image: Image.Image, short: int) -> Image.Image:
    """The image with this short side; BadSample if it is so long that it would be too large."""
    w, h = image.size
    size = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    if size[0] * size[1] > images.MAX_PIXELS:
        raise BadSample("too_long", f"{w} x {h} pixels with a short side of {short}")
    return image.resize(size, Image.Resampling.BILINEAR)


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of a set.

    Attributes:
        values: float32[N, C].
        kept: index in the set's paths of each row.
        bad: file -> reason, of those that have no row.
    """

    values: np.ndarray
    kept: tuple[int, ...]
    bad: dict[str, str]


# ---- networks


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network that gives one vector of an image.

    Attributes:
        name: of its weights, for results.
        prepare: RGB image -> an array of fixed shape.
        compute: [n, …] of them -> float32[n, C].
    """

    name: str
    prepare: Callable[[Image.Image], Pixels]
    compute: Callable[[Pixels], np.ndarray]

    def batches(self, given: ImageSet, bad: dict[str, str]) -> Iterator[tuple[tuple, np.ndarray]]:
        """(indices in the set, float32[n, C]) batch by batch; `bad` takes what can't be used."""

        def read(item):
            try:
                return item[0], self.prepare(given.open(item[1]))
            except BadSample as error:
                bad[item[1]] = str(error)
                return None

        with concurrent.futures.ThreadPoolExecutor() as pool:
            for part in _batched(enumerate(given.paths), BATCH):
                found = [pair for pair in pool.map(read, part) if pair is not None]
                if found:
                    kept, pixels = zip(*found, strict=True)
                    yield kept, self.compute(np.stack(pixels))

    def features(self, given: ImageSet) -> Features:
        """The features of all images.

        Raises:
            DataError: none of them can be used.
        """
        bad: dict[str, str] = {}
        found = list(self.batches(given, bad))
        _require(found, bad)
        values = np.concatenate([values for _, values in found])
        return Features(values, tuple(i for kept, _ in found for i in kept), bad)

    def gaussian(self, given: ImageSet) -> tuple[Gaussian, dict[str, str]]:
        """(their Gaussian, bad files) without keeping the features; raises as `features`."""
        bad: dict[str, str] = {}
        total = None
        for _, values in self.batches(given, bad):
            one = Gaussian.of(values)
            total = one if total is None else total.merged(one)
        _require(total, bad)
        return total, bad


def _require(found, bad: dict[str, str]) -> None:
    if not found:
        file, reason = next(iter(bad.items()), ("", "the set is empty"))
        raise DataError(f"no image can be used: {file or 'of none'}: {reason}")


def _batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while part := list(itertools.islice(items, size)):
        yield part


def compiled(module: nnx.Module, call: Callable) -> Callable:
    """x -> call(module, x) as numpy, on the module's devices; compiled for batches of powers of two
    up to `BATCH`."""
    graph, weights = nnx.split(module)
    function = jax.jit(lambda weights, x: call(nnx.merge(graph, weights), x))
    mesh = sharding.mesh_of(weights)
    most = -(-BATCH // mesh.size) * mesh.size

    def run(x: np.ndarray) -> np.ndarray:
        out, size = [], mesh.size
        while size < min(len(x), most):
            size = min(2 * size, most)
        for start in range(0, len(x), size):
            part = x[start : start + size]
            filled = np.concatenate([part, np.zeros((size - len(part), *x.shape[1:]), x.dtype)])
            with jax.set_mesh(mesh):
                given = jax.device_put(filled, sharding.batch_sharding(mesh))
                out.append(np.asarray(function(weights, given), np.float32)[: len(part)])
        return np.concatenate(out)

    return run


def built(make: Callable, fill: Callable) -> nnx.Module:
    mesh = sharding.make_mesh({"data": -1}, jax.local_devices())
    return build(make, mesh, 0, fill)


@dataclasses.dataclass(frozen=True)
class Inception(Extractor):
    """The network of FID and of the inception score.

    Attributes:
        head: float32[2048, 1008].
    """

    head: np.ndarray = None

    def logits(self, features: np.ndarray) -> np.ndarray:
        """float32[N, 1008] of float32[N, 2048]."""
        return features @ self.head


def open_inception(path: str | os.PathLike) -> Inception:
    """The Inception network from a file of its weights (`convert/inception.py`)."""
    tensors = inception.open_weights(path)
    fill = lambda model: inception.load_inception(model, tensors)  # noqa: E731
    model = built(lambda rngs: InceptionV3(rngs=rngs), fill)
    prepare = lambda image: resize(np.asarray(image))  # noqa: E731
    head = np.asarray(model.fc.kernel[...])
    return Inception("Inception-v3 of 2015", prepare, compiled(model, lambda m, x: m(x)), head)


def open_tower(spec: str) -> Extractor:
    """A vision tower with published weights ("hf:…", "pkg:…", a folder); see `ViT.image_vector`."""
    cfg = vit.config_from_hf(specs.tower_fields(spec), whole=False)
    cfg, prepare = _with_preprocessing(spec, cfg)
    tensors = specs.tower_tensors(spec)
    tower = built(lambda rngs: ViT(cfg, rngs=rngs), lambda m: vit.load_vit(m, tensors))
    return Extractor(spec, prepare, compiled(tower, lambda m, x: m.image_vector(x)))


def _with_preprocessing(spec: str, cfg: ViTConfig) -> tuple[ViTConfig, Preprocess]:
    """(config, preprocessing) of a tower, as the weights bring it; else images are stretched."""
    fields = specs.processor_fields(spec)
    if fields is None:
        return cfg, Preprocess(cfg.size, mean=tuple(cfg.mean), std=tuple(cfg.std))
    found = preprocess_from_hf(fields)
    if found.size != cfg.size:
        raise ConfigError(f"{spec}: its preprocessor makes {found.size} pixels, its tower takes "
                          f"{cfg.size}")  # fmt: skip
    return dataclasses.replace(cfg, mean=found.mean, std=found.std), found


@dataclasses.dataclass(frozen=True)
class Clip(Extractor):
    """CLIP; its features of images can be compared with those of texts.

    Attributes:
        tokenizer: of the transformers library.
        length: most tokens of a text; longer ones are cut.
        compute_text: int32[n, length] -> float32[n, C].
    """

    tokenizer: object = None
    length: int = 77
    compute_text: Callable[[np.ndarray], np.ndarray] = None

    def texts(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """(float32[N, C] features of texts, how many of them were cut)."""
        found = self.tokenizer(list(texts))["input_ids"]
        end = self.tokenizer.eos_token_id
        ids = np.full((len(found), self.length), end, np.int32)
        for row, one in zip(ids, found, strict=True):
            one = one if len(one) <= self.length else [*one[: self.length - 1], end]
            row[: len(one)] = one
        cut = sum(len(one) > self.length for one in found)
        return self.compute_text(ids), cut


def open_clip(spec: str) -> Clip:
    """CLIP from a folder, or "hf:openai/clip-vit-large-patch14"."""
    folder = hf.find(spec)
    cfg = clip.config_from_hf(hf.read_config(folder))
    tower, prepare = _with_preprocessing(spec, cfg.vision)
    cfg = dataclasses.replace(cfg, vision=tower)
    tensors = hf.Tensors(folder)
    tokenizer = tokenizers.load(folder)
    model = built(lambda rngs: CLIP(cfg, rngs=rngs), lambda m: clip.load_clip(m, tensors))
    return Clip(
        spec,
        prepare,
        compiled(model, lambda m, x: m.image_features(x)),
        tokenizer,
        cfg.text.max_position_embeddings,
        compiled(model, lambda m, x: m.text_features(x)),
    )

"""The options of `config.data`, and what the model decides about its input on its own.

No field is in both: whatever follows from the model (tokens per image, feature width, pixel
statistics of the tower) is an `InputSpec` that the recipe makes from its own config.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from metamorph_jax.data import images
from metamorph_jax.data.interleave import Rule, no_image
from metamorph_jax.data.sources.base import ImageRef, Sample
from metamorph_jax.data.sources.kinds import Documents
from metamorph_jax.data.views import Views

_ROWS = 64  # rows that one sample may run through, where samples are cut
MAX_FRAMES = 45  # of a video, where nothing else limits them


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One file of samples.

    Attributes:
        path: .json, .jsonl, .txt (JSON lines), .tar (WebDataset), .parquet, .arrayrecord or
            tfds:NAME/SPLIT. It may stand for several files: a.tar,b.tar or {0000..0012}.tar or
            data/*.jsonl.
        name: name in metrics; the file's name if empty.
        root: folder of the images, which no path may leave; the file's folder if empty.
        weight: share in the mixture (with all 0: every record once an epoch).
        kind: "auto", or the kind of all its records (`sources/kinds.py`, and the recipe's own).
            Some kinds read official files of a data set in their own way.
        ignore: keys of its records, separated by commas, that are passed over though they look like
            content (`sources/schema.py`).
        documents: how documents and images with captions are laid out.
        blocked: a text file with the paths of images, as the records have them, one a line; a
            sample that needs one of them is bad.
    """

    path: str
    name: str = ""
    root: str = ""
    weight: float = 0.0
    kind: str = "auto"
    ignore: str = ""
    documents: Documents = Documents()
    blocked: str = ""


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """How samples become rows.

    Attributes:
        template: chat template (`chat_templates.TEMPLATES`).
        system: system message; "default" is the template's own, "" is none.
        single_bos: one BOS instead of the reference's two (llama3).
        length: positions of a row.
        sample_length: most positions of one sample, 0 for as many as a row has. What is beyond is
            cut, but never inside an image; with packing, this is the references' maximal length.
        images: views of images that a row holds; a sample of more is skipped. On a mixture like
            MetaMorph's, rows of 4096 are 99.7 % full with 24, but 81 % with 16.
        packing: "first_fit"; "pad" (one sample in each row, as the references do); or "concat"
            (one after another, and cut wherever a row ends, as MM-Interleaved was trained; see
            `concat.py`). With "concat", a sample may be longer than a row, or have more images.
        cut_at: with "concat", whether an "image" that a row has no room for moves to the next row,
            or the whole "document".
        crossing: the samples of a row are one segment, so that they see each other, and positions
            run on through the row. Published weights of MM-Interleaved were trained so.
        open_rows: rows that first-fit packing keeps open.
        independent_turns: question and answer k sees the leading images and itself only.
        mask_dangling_start: do not supervise an image's start marker if the image was cut.
        legacy_image_front: put the image of a message into its first line, wherever its marker
            stands, as LLaVA was trained. Otherwise images stay where they are.
        official_masks: make labels as LLaVA's code does, with its known bugs: rows that it ignores
            are skipped, with the reason "official_masks" (`official_masks.py`).
    """

    template: str = "llama3"
    system: str = "default"
    single_bos: bool = False
    length: int = 4096
    images: int = 24
    packing: str = "first_fit"
    open_rows: int = 16
    independent_turns: bool = False
    mask_dangling_start: bool = False
    sample_length: int = 0
    legacy_image_front: bool = False
    official_masks: bool = False
    cut_at: str = "image"
    crossing: bool = False

    def __post_init__(self):
        if self.packing not in ("first_fit", "pad", "concat"):
            raise ValueError(f"row.packing is {self.packing!r}: expected first_fit, pad or concat")
        if self.cut_at not in ("image", "document"):
            raise ValueError(f"row.cut_at is {self.cut_at!r}: expected image or document")
        if self.independent_turns and (self.crossing or self.packing == "concat"):
            given = "row.crossing" if self.crossing else 'row.packing="concat"'
            raise ValueError(f"{given} has no independent_turns: switch one of them off")
        if not 0 <= self.sample_length <= self.length:
            raise ValueError(
                f"row.sample_length is {self.sample_length}: expected at most row.length, "
                f"{self.length}, or 0 for that"
            )
        if self.official_masks and self.independent_turns:
            raise ValueError("row.official_masks has no independent_turns: switch one of them off")

    @property
    def longest(self) -> int:
        """Most positions of one sample."""
        most = self.length * (_ROWS if self.packing == "concat" else 1)
        return self.sample_length or most

    @property
    def most_images(self) -> int:
        """Most views of one sample."""
        return self.images * (_ROWS if self.packing == "concat" else 1)


@dataclasses.dataclass(frozen=True)
class OrderConfig:
    """Which sample comes when.

    Attributes:
        seed: of the order and of all random choices in a sample.
        shuffle: otherwise the order of the files.
        epochs: 0 is endless.
        fixed_choices: draw wording and video frames once for each sample, not again in every
            epoch. Always on with a feature cache, which has to hold every frame that is drawn.
        padding_batches: continue with empty batches after the last epoch.
        grouping: "none", or "modality": batches of one modality and of similar lengths (see
            `grouping.py`); it needs `shuffle`, and sources without weights.
        shares: of the sources in the mixture: "weights", as they say, or "sqrt_size", in proportion
            to the square root of their number of records (InstructBLIP, MM-Interleaved's
            instruction tuning); it needs sources without weights.
    """

    seed: int = 42
    shuffle: bool = True
    epochs: int = 0
    fixed_choices: bool = False
    padding_batches: bool = False
    grouping: str = "none"
    shares: str = "weights"

    def __post_init__(self):
        if self.grouping not in ("none", "modality"):
            raise ValueError(f"order.grouping is {self.grouping!r}: expected none or modality")
        if self.grouping != "none" and not self.shuffle:
            raise ValueError(f"order.grouping={self.grouping!r} needs order.shuffle")
        if self.shares not in ("weights", "sqrt_size"):
            raise ValueError(f"order.shares is {self.shares!r}: expected weights or sqrt_size")
        if self.shares != "weights" and self.grouping != "none":
            raise ValueError("order.grouping takes every record once: it has no order.shares")


@dataclasses.dataclass(frozen=True)
class ReadingConfig:
    """How files are read; nothing here changes a batch.

    Attributes:
        workers: processes; 0 reads in the main one.
        threads, ahead: threads, and samples read ahead, in each of them.
        max_bad_in_a_row: bad samples one after another before it is an error.
        index_dir: folder for the byte-offset indices of JSONL files; the file's own if empty.
    """

    workers: int = 0
    threads: int = 2
    ahead: int = 32
    max_bad_in_a_row: int = 100
    index_dir: str = ""


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """How images are decoded and resized.

    Attributes:
        size, mode, resize, mean, std: change the model's preprocessing (`images.Preprocess`);
            0, "" and None leave it as the model has it.
        background: what is seen behind transparent pixels, "white" or "black"; "drop" takes the
            colours that they hide, as the published loaders do.
        max_images: a sample of more images is bad.
        max_frames: frames taken of a video; 0 for as many as a row holds.
        max_pixels: a larger image is bad.
        mirror: probability that an image is mirrored, each on its own and whatever the texts say of
            left and right.
    """

    size: int = 0
    mode: str = ""
    resize: int = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    background: str = "white"
    max_images: int = 70
    max_frames: int = 0
    max_pixels: int = images.MAX_PIXELS
    mirror: float = 0.0

    def __post_init__(self):
        if self.background not in images.BACKGROUNDS:
            raise ValueError(
                f"images.background is {self.background!r}: expected one of "
                f"{', '.join(images.BACKGROUNDS)}"
            )
        for name in ("max_images", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"images.{name} is {getattr(self, name)}: expected 1 or more")
        if not 0 <= self.mirror <= 1:
            raise ValueError(f"images.mirror is {self.mirror}: expected 0 to 1")
        if self.max_frames < 0:
            raise ValueError(f"images.max_frames is {self.max_frames}: expected 0 or more")
        if self.max_frames > self.max_images:
            raise ValueError(
                f"images.max_frames is {self.max_frames}, but images.max_images is "
                f"{self.max_images}: longer videos would be skipped"
            )

    def load(self, refs: Sequence[ImageRef], notes: collections.Counter | None = None) -> list:
        """The images of one sample, see `images.load`."""
        return images.load(refs, self.max_pixels, notes, self.background)

    def change(self, views: Views) -> Views:
        """The model's views with the changes to their preprocessing that are asked for here."""
        asked = {n: getattr(self, n) for n in ("size", "mode", "resize", "mean", "std")}
        changes = {name: value for name, value in asked.items() if value}
        preprocess = dataclasses.replace(views.preprocess, **changes)
        return dataclasses.replace(views, preprocess=preprocess)


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Folders of caches, "" for none: resized images, or features of the frozen tower; and moments
    of the frozen autoencoder, of images to draw. With one of the latter two, wording and other
    choices are drawn once for each sample (`OrderConfig.fixed_choices`)."""

    images: str = ""
    features: str = ""
    drawings: str = ""


@dataclasses.dataclass(frozen=True)
class InputConfig:
    """Where samples and images come from; the part that all recipes share."""

    sources: tuple[SourceConfig, ...] = ()
    order: OrderConfig = OrderConfig()
    reading: ReadingConfig = ReadingConfig()
    images: ImageConfig = ImageConfig()
    cache: CacheConfig = CacheConfig()

    def __post_init__(self):
        weights = [s.weight for s in self.sources] or [0.0]
        if min(weights) < 0 or (max(weights) > 0 and min(weights) == 0):
            raise ValueError(f"source weights must be all positive or all 0, got {weights}")
        if self.order.shares != "weights" and max(weights) > 0:
            raise ValueError(f"order.shares is {self.order.shares!r}: leave the sources' weights "
                             "out")  # fmt: skip
        if self.order.grouping != "none" and max(weights) > 0:
            raise ValueError(
                "order.grouping takes every record of every source: leave their weights out"
            )

    @property
    def frames(self) -> int:
        """Most frames that are taken of a video."""
        return self.images.max_frames or MAX_FRAMES

    @property
    def images_in_front(self) -> bool:
        """Whether images are moved to the front of their messages (`RowConfig`)."""
        return False


@dataclasses.dataclass(frozen=True)
class DataConfig(InputConfig):
    """Input of a model that reads rows of text and images."""

    row: RowConfig = RowConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.images.max_frames > self.row.images:
            raise ValueError(
                f"images.max_frames is {self.images.max_frames}, but row.images is "
                f"{self.row.images}: longer videos would be skipped. Set it to 0 for as many "
                "frames as a row holds"
            )

    @property
    def frames(self) -> int:
        """Most frames that are taken of a video; a row has room for them."""
        return self.images.max_frames or min(MAX_FRAMES, self.row.images, self.images.max_images)

    @property
    def images_in_front(self) -> bool:
        """Whether images are moved to the front of their messages."""
        return self.row.legacy_image_front


@dataclasses.dataclass(frozen=True)
class LatentSpec:
    """The frozen autoencoder of images to draw, whose moments a cache may hold.

    Attributes:
        shape: (h, w, c) of a latent.
        scale: of latents, which multiplies what is drawn from the moments.
        identity: text that differs whenever moments would differ: weights and structure.
    """

    shape: tuple[int, int, int]
    scale: float
    identity: str

    def sample(self, moments: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """float32[h, w, c] scaled latent, drawn from moments float32[h, w, 2c]: mean, logvar."""
        mean, logvar = np.split(np.asarray(moments, np.float32), 2, axis=-1)
        noise = rng.standard_normal(mean.shape, np.float32)
        return np.float32(self.scale) * (mean + np.exp(0.5 * np.clip(logvar, -30, 20)) * noise)


@dataclasses.dataclass(frozen=True)
class DrawingSpec:
    """Images that a diffusion decoder draws inside a row while the model trains.

    Attributes:
        places: J, drawings that a row holds; a sample of more is skipped.
        rule: which images are drawn.
        preprocess: makes the image to draw, uint8[side, side, 3].
        ids: written in the image's stead where it is drawn but not read; () reads it as well.
        unlearnt: which of the ids, counted from 0, are never predicted.
        caption: (sample, k) -> int32[caption_length], the caption of its image k in ids of the
            decoder's text encoder, -1 where it has none; None for no captions.
        caption_length: how many.
        latents: the autoencoder, where there is one, for `CacheConfig.drawings`.
    """

    places: int
    rule: Rule
    preprocess: images.Preprocess
    ids: tuple[int, ...] = ()
    unlearnt: tuple[int, ...] = ()
    caption: Callable[[Sample, int], np.ndarray] | None = None
    caption_length: int = 0
    latents: LatentSpec | None = None


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """What the model decides about its input. Its functions are those of modules (or dataclasses),
    so that worker processes have them.

    Attributes:
        views: how an image becomes views of P tokens each, with the tower's preprocessing.
        feature_width: C of the features that a cache holds, or 0 where there are none.
        tower: text that differs whenever features would differ (see `cache.feature_spec`); "" where
            the model has no tower and its features come from a cache that was made elsewhere.
        predicted: which images are to be predicted, visual token by visual token.
        visual_targets: most positions of a row that may predict visual tokens; 0 for no limit. A
            sample of more is skipped.
        drawings: images to be drawn, or None.
    """

    views: Views
    feature_width: int = 0
    tower: str = ""
    predicted: Rule = no_image
    visual_targets: int = 0
    drawings: DrawingSpec | None = None

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(P, C)."""
        return self.views.tokens, self.feature_width

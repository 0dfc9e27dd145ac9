"""Images drawn from captions of COCO, against COCO's images: FID, CLIP score, inception score.

    ROOT/annotations/captions_val2014.json, ROOT/val2014/COCO_val2014_000000000042.jpg
    ROOT/coco_val_captions.jsonl (Localized Narratives), ROOT/val2017/000000000042.jpg

There is no official list of captions. Two protocols are in use and not comparable:

    coco30k         30,000 images drawn by chance, one caption of each; FID at 256 px against all
                    images of val2014. The usual one; tables with FID and CLIP score mean it.
    coco30k_rows    the first 30,000 rows of the file, in lower case; 8 candidates, of which CLIP
                    takes one; FID at 64 px against the image of each row, which counts as often as
                    it has rows (MM-Interleaved's numbers).
    lncoco          30,000 narratives drawn with replacement, so that all images count alike; FID
                    at 64 px against the images of these.

Guidance, steps and sampler move FID by several points; the result's settings name them.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from metamorph_jax.data import reading
from metamorph_jax.errors import ConfigError, FileError
from metamorph_jax.eval.images import features, measures
from metamorph_jax.eval.images.features import ImageSet
from metamorph_jax.eval.tasks.base import File, Protocol, Question, Record, by_unit
from metamorph_jax.eval.tasks.measured_drawing import MeasuredDrawing

PROTOCOLS = {"mm-interleaved": Protocol({"prompt": "{caption}"}, {"guidance": (3.5,)})}
_SOURCE = "cocodataset.org/#download"
_LOCALIZED = "google.github.io/localized-narratives"


@dataclasses.dataclass(frozen=True)
class Caption:
    """A text to draw from.

    Attributes:
        id: its own; image: file of the image that it describes.
    """

    id: str
    text: str
    image: str


@dataclasses.dataclass(frozen=True)
class CaptionDrawing(MeasuredDrawing):
    """Captions are drawn, and the images compared with real ones.

    Attributes:
        count: captions that are drawn from; seed: of their choice.
        prompt: what the model is asked; `{caption}` stands for the caption.
        literal: without a chat template around it, see `base.Question`.
        candidates: images of each caption, of which the one that CLIP finds most like the caption
            counts.
        protocol: "mm-interleaved" (rows and narratives) asks with the caption alone, at its
            guidance of 3.5; it takes 250 steps, which is an option of the image decoder.
    """

    count: int = 30_000
    seed: int = 0
    prompt: str = "Generate an image of the following: {caption}"
    literal: bool = False
    candidates: int = 1
    protocol: str = ""

    def __post_init__(self):
        super().__post_init__()
        if "{caption}" not in self.prompt:
            raise ConfigError(f"task {self.name}: prompt must have {{caption}}: {self.prompt!r}")
        if not (1 <= self.candidates <= 1000 and 1 <= self.count <= 10**6):
            raise ConfigError(f"task {self.name}: expected candidates from 1 to 1,000, and count "
                              "from 1 to 1,000,000")  # fmt: skip
        if self.candidates > 1 and not self.clip:
            raise ConfigError(f"task {self.name}: CLIP chooses among candidates: give clip=SPEC, "
                              "or candidates=1")  # fmt: skip

    # ---- to be written for each protocol

    def captions(self) -> list[Caption]:
        """At most `count` captions."""
        raise NotImplementedError

    # ---- the contract of tasks

    def questions(self) -> Iterable[Question]:
        for caption in self.captions():
            text = self.prompt.replace("{caption}", caption.text)
            for k in range(self.candidates):
                id = f"{caption.id}-{k}" if self.candidates > 1 else caption.id
                more = {"caption": caption.text, "real": caption.image}
                yield Question(id, text, gold=caption.text, unit=caption.id, more=more,
                               literal=self.literal)  # fmt: skip

    def finish(self, records: Sequence[Record]) -> list[Record]:
        """With "score" the cosine of caption and image, where there is a CLIP."""
        drawn = [record for record in records if record.get("drawn")]
        if not (self.clip and drawn):
            return list(records)
        network = features.open_clip(self.clip)
        found = network.features(ImageSet(tuple(record["drawn"][0] for record in drawn)))
        captions = [record["more"]["caption"] for record in drawn]
        cosine, _ = measures.text_cosines(network, found, captions, self.prefix)
        by_id = {drawn[i]["id"]: float(c) for i, c in zip(found.kept, cosine, strict=True)}
        return [record | {"score": by_id.get(record["id"])} for record in records]

    def chosen(self, records: Sequence[Record]) -> list[Record]:
        """Of each caption, the record with the best image; captions without an image are left
        out."""
        best = []
        for group in by_unit([record for record in records if record.get("drawn")]).values():
            best.append(max(group, key=lambda r: -np.inf if r["score"] is None else r["score"]))
        return best

    def failed(self, records: Sequence[Record]) -> tuple[str, ...]:
        """Captions without an image."""
        drawn = {record["unit"] for record in self.chosen(records)}
        return tuple(unit for unit in by_unit(records) if unit not in drawn)


@dataclasses.dataclass(frozen=True)
class Coco30k(CaptionDrawing):
    title: ClassVar[str] = "COCO-30K, one caption of each image"
    files: ClassVar[tuple[File, ...]] = (
        File("annotations/captions_val2014.json", "captions", _SOURCE),
        File("val2014", "images COCO_val2014_*.jpg", _SOURCE),
    )

    def rows(self) -> list[Caption]:
        """All rows of the file, in order."""
        path = self.find("annotations/captions_val2014.json", "captions_val2014.json")
        table = reading.json_file(path, dict, "COCO's captions")
        try:
            names = {image["id"]: image["file_name"] for image in table["images"]}
            return [
                Caption(str(row["id"]), " ".join(row["caption"].split()),
                        self.path("val2014", names[row["image_id"]]))
                for row in table["annotations"]
            ]  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise FileError(f"{path} is not a file of COCO captions: {error!r}") from error

    def captions(self) -> list[Caption]:
        rng = np.random.default_rng(self.seed)
        groups: dict[str, list[Caption]] = {}
        for row in self.rows():
            groups.setdefault(row.image, []).append(row)
        images = list(groups)
        if self.count < len(images):
            images = [images[i] for i in sorted(rng.permutation(len(images))[: self.count])]
        return [groups[image][rng.integers(len(groups[image]))] for image in images]

    def real(self, used: Sequence[str]) -> tuple[str, ...]:
        return ImageSet.of_folder(self.find("val2014")).paths


@dataclasses.dataclass(frozen=True)
class Coco30kRows(Coco30k):
    candidates: int = 8
    fid_size: int | None = 64

    protocols: ClassVar = PROTOCOLS
    title: ClassVar[str] = "COCO-30K, the first rows"

    def captions(self) -> list[Caption]:
        rows = self.rows()[: self.count]
        return [dataclasses.replace(row, text=row.text.lower()) for row in rows]

    def real(self, used: Sequence[str]) -> tuple[str, ...]:
        return tuple(used)


@dataclasses.dataclass(frozen=True)
class LnCoco(CaptionDrawing):
    """Attributes:
    oversample: draw `count` narratives with replacement, an image with several of them as often as
        others; False: each narrative once, in order, at most `count`.
    """

    fid_size: int | None = 64
    oversample: bool = True

    protocols: ClassVar = PROTOCOLS
    title: ClassVar[str] = "LN-COCO (Localized Narratives)"
    files: ClassVar[tuple[File, ...]] = (
        File("coco_val_captions.jsonl", "narratives", _LOCALIZED),
        File("val2017", "images 000000000042.jpg", _SOURCE),
    )

    def captions(self) -> list[Caption]:
        path = self.find("coco_val_captions.jsonl", "coco_val_localized_narratives.jsonl")
        rows = list(reading.json_lines(path, "image_id", texts=("caption",)))
        images = [str(row["image_id"]) for row in rows]
        chosen = np.arange(min(self.count, len(rows)))
        if self.oversample:
            each = dict(zip(*np.unique(images, return_counts=True), strict=True))
            weights = np.array([1 / each[image] for image in images])
            rng = np.random.default_rng(self.seed)
            chosen = rng.choice(len(rows), self.count, p=weights / weights.sum())
        found, times = [], dict.fromkeys(range(len(rows)), 0)
        for i in map(int, chosen):
            place = self.path("val2017", f"{images[i].zfill(12)}.jpg")
            text = " ".join(str(rows[i]["caption"]).split())
            found.append(Caption(f"{i}.{times[i]}", text, place))
            times[i] += 1
        return found

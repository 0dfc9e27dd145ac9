"""Images drawn from maps of their segmentation: ADE20K, scored by mIoU of a segmenter's labels.

The files are those of `data/sets/ade20k.py`. The model sees the map, painted, and a caption:
"<image>CAPTION." A segmenter that runs elsewhere then labels what was drawn:

    metamorph eval … --tasks=ade20k                  draws OUT/ade20k/official/images/ADE_val_….png
    (the segmenter)                                  writes LABELS/ADE_val_….png
    metamorph eval … --tasks=ade20k:labels=LABELS    scores what is there
    metamorph score LABELS --segmentation=annotations/validation       the same, of any images
"""

import dataclasses
import io
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from typing import ClassVar

from PIL import Image

from metamorph_jax.data.sets import ade20k
from metamorph_jax.errors import ConfigError
from metamorph_jax.eval.images import segments
from metamorph_jax.eval.scorers.segmentation import Overlap
from metamorph_jax.eval.tasks.base import File, Protocol, Question, Record, one_of
from metamorph_jax.eval.tasks.measured_drawing import MEASURES, MeasuredDrawing

_SOURCE = "groups.csail.mit.edu/vision/datasets/ADE20K (ADEChallengeData2016.zip)"


@dataclasses.dataclass(frozen=True)
class Ade20k(MeasuredDrawing):
    """ADE20K: images drawn from painted segmentation maps and captions.

    Attributes:
        split: validation or training.
        labels: folder of the label maps that a segmenter found in the drawn images, ID.png; "":
            there are none yet.
        first_label: in these maps, of the first class: 0 or 1.
        prompt: what the model is asked; `{caption}` stands for the caption, `<image>` for the map.
        protocol: "mm-interleaved" draws at its guidance of 3.5.
    """

    split: str = "validation"
    labels: str = ""
    first_label: int = 0
    prompt: str = "<image>{caption}."
    protocol: str = ""

    title: ClassVar[str] = "ADE20K, images from segmentation maps"
    other_scores: ClassVar = ("mIoU",)
    scored_by: ClassVar[tuple[str, ...]] = (*MEASURES, "labels", "first_label")
    protocols: ClassVar = {"mm-interleaved": Protocol({"fid_size": 64}, {"guidance": (3.5,)})}
    files: ClassVar[tuple[File, ...]] = (
        File("validation.json", "captions", "MM-Interleaved's hub page, or of one's own"),
        File("annotations/validation", "label maps", _SOURCE),
        File("images/validation", "the images", _SOURCE),
    )

    def __post_init__(self):
        super().__post_init__()
        one_of(self, split=ade20k.SPLITS, first_label=(0, 1))
        if "{caption}" not in self.prompt or "<image>" not in self.prompt:
            raise ConfigError(f"task {self.name}: prompt must have <image> and {{caption}}: "
                              f"{self.prompt!r}")  # fmt: skip

    @property
    def main(self) -> str:
        return "mIoU" if self.labels else self.asked.fid

    def questions(self) -> Iterable[Question]:
        self.find(f"{self.split}.json")
        for scene in ade20k.scenes(self.root, self.split):
            yield Question(
                scene.id,
                self.prompt.replace("{caption}", scene.caption),
                (partial(_painted, scene.labels),),
                gold=scene.caption,
                more={"caption": scene.caption, "real": scene.image, "labels": scene.labels},
            )

    def finish(self, records: Sequence[Record]) -> list[Record]:
        """With "score" the mean IoU of the classes in either map, where there are label maps.

        Raises:
            FileError: that of a drawn image is missing, or a label is no class.
        """
        if not self.labels:
            return list(records)
        for record in self.chosen(records):
            mine = str(pathlib.Path(self.labels, f"{record['id']}.png"))
            truth = record["more"]["labels"]
            self._overlaps[record["id"]] = segments.overlap(mine, truth, self.first_label)
        return [record | {"score": self._score(record["id"])} for record in records]

    def _score(self, id: str) -> float | None:
        found = self._overlaps.get(id)
        if found is None or not found.union.any():
            return None
        there = found.union > 0
        return float((found.intersection[there] / found.union[there]).mean())

    @cached_property
    def _overlaps(self) -> dict[str, Overlap]:
        return {}

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        known = [self._overlaps[r["id"]] for r in records if r["id"] in self._overlaps]
        found = {"mIoU": 100 * segments.summed(known).miou()} if known else {}
        return found | super().scores(records)

    def write(self, records, folder):
        """Besides, images/ID.png, for the segmenter."""
        place = folder / "images"
        place.mkdir(exist_ok=True)
        for record in self.chosen(records):
            shutil.copyfile(record["drawn"][0], place / f"{record['id']}.png")
        return [*super().write(records, folder), place]


def _painted(labels: str) -> bytes:
    """A label map in colours, as a PNG file."""
    data = io.BytesIO()
    Image.fromarray(ade20k.painted(ade20k.labels_of(labels), labels)).save(data, "PNG")
    return data.getvalue()

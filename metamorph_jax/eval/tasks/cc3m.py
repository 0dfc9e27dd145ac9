"""Images drawn from captions of CC3M's validation set (Conceptual Captions), against its images.

    ROOT/cc3m_val.tsv       caption<TAB>image_path, as MiniGPT-5 lays the set out
    ROOT/val/000007775.jpg

Captions are cleaned as BLIP cleans them (`data/sets/captions.py`). Many of the addresses of CC3M
are dead, and every paper scores what it could fetch: rows whose image is not there are left out,
and how many is printed.

FID is to all images in `val`. `protocol=minigpt-5` does as that paper (Zheng et al. 2023, arXiv
2310.02239): the bare caption is the prompt, the model decides whether it draws, text is sampled,
FID is at a short side of 256 px without a cut, the inception score of images in full size. Its
published code leaves out what was not drawn; here both means are given. It reads images through
another resize (TensorFlow 1's, in torchmetrics; ours is pytorch-fid's), and the deviation of its
inception score is that of a sample.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import ClassVar

from metamorph_jax.data import reading
from metamorph_jax.data.sets.captions import cleaned
from metamorph_jax.errors import FileError
from metamorph_jax.eval.images.features import ImageSet
from metamorph_jax.eval.tasks.base import File, Protocol
from metamorph_jax.eval.tasks.coco_drawing import Caption, CaptionDrawing
from metamorph_jax.eval.tasks.measured_drawing import DECODED, MEASURED
from metamorph_jax.files import shown

_SOURCE = "ai.google.com/research/ConceptualCaptions; images by their addresses"


@dataclasses.dataclass(frozen=True)
class CC3M(CaptionDrawing):
    """Attributes:
    count: captions that are drawn from, the first of the file.
    protocol: "minigpt-5" asks, decodes and measures as its paper does.
    """

    count: int = 1_000_000

    title: ClassVar[str] = "CC3M, captions of the validation set"
    files: ClassVar[tuple[File, ...]] = (
        File("cc3m_val.tsv", "captions and paths of images", _SOURCE),
        File("val", "the images", _SOURCE),
    )
    protocols: ClassVar = {
        "minigpt-5": Protocol(
            {"prompt": "{caption}", "literal": True, "force": False, **MEASURED}, DECODED
        )
    }

    def captions(self) -> list[Caption]:
        path = self.find("cc3m_val.tsv")
        rows = enumerate(reading.table(path, "caption", "image_path", quoted=False))
        found, gone = [], []
        for number, row in rows:
            image = self.path(row["image_path"])
            if not pathlib.Path(image).is_file():
                gone.append(image)
            elif len(found) < self.count:
                found.append(Caption(str(number), cleaned(row["caption"]), image))
        if gone:
            print(f"{self.name}: {len(gone):,} captions are left out: their images are missing, "
                  f"such as {shown(gone[0])}", file=sys.stderr)  # fmt: skip
        if not found:
            raise FileError(f"{shown(path)}: none of its images is there; each row names one below "
                            f"{shown(self.root)}, such as val/000007775.jpg")  # fmt: skip
        return found

    def real(self, used: Sequence[str]) -> tuple[str, ...]:
        return ImageSet.of_folder(self.find("val")).paths

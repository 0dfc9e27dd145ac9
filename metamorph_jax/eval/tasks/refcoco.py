"""Referring expressions: RefCOCO, RefCOCO+ and RefCOCOg.

| file under the task's root | what | from |
|---|---|---|
| refs(unc).p; of RefCOCOg refs(umd).p | expressions | github.com/lichengunc/refer |
| instances.json | boxes and sizes of images | the same |
| train2014/COCO_train2014_000000581857.jpg | images, or elsewhere: `images` | cocodataset.org |

Splits: val, testA (people), testB (other) of RefCOCO and RefCOCO+; val, test of RefCOCOg (umd).
The images are of COCO's *train* set: training data made of it has to leave them out.

The `.p` files are pickles, which are read without running what is in them
(`data/sets/pickles.py`).

The prompts are in `PROMPTS`; how the numbers of the reply are read is the option `boxes`, see
`scorers/boxes.py`.
"""

import dataclasses
import pathlib
from typing import ClassVar

from metamorph_jax.data.sets import refcoco
from metamorph_jax.eval.scorers import boxes
from metamorph_jax.eval.tasks.base import (
    Answer,
    File,
    Protocol,
    Question,
    Record,
    Task,
    mean,
    mean_terms,
    one_of,
    write_json,
)

_ASKED = "Provide the bounding box coordinate of the region this sentence describes. {text}"
PROMPTS = {
    "plain": _ASKED,  # LLaVA 1.5
    "tag": f"<image>{_ASKED} <box>",  # MM-Interleaved: the reply goes on with (x1,y1)(x2,y2)</box>
}
_SOURCE = "github.com/lichengunc/refer"


@dataclasses.dataclass(frozen=True)
class RefCOCO(Task):
    """RefCOCO: the box of what an expression refers to, right from IoU 0.5 on.

    Attributes:
        split: val, testA, testB.
        by: whose expressions and splits: unc, or google.
        boxes: how replies give boxes: square (LLaVA 1.5), unit, thousand (MM-Interleaved), pixels.
        images: folder of the images, if not train2014/ under the root.
        style: of the prompt, one of `PROMPTS`.
        protocol: "mm-interleaved" asks and decodes as its paper does (the lengths are the defaults
            of its code; the paper has none).
    """

    split: str = "val"
    by: str = "unc"
    boxes: str = "square"
    images: str = ""
    style: str = "plain"
    protocol: str = ""

    title: ClassVar = "RefCOCO"
    other_scores: ClassVar = ("IoU",)
    max_new_tokens: ClassVar = 64
    protocols: ClassVar = {
        "mm-interleaved": Protocol(
            {"style": "tag", "boxes": "thousand"},
            {"beams": 5, "max_new_tokens": 30, "min_new_tokens": 7},
        )
    }
    files: ClassVar = (
        File("refs(unc).p", "the expressions", _SOURCE),
        File("instances.json", "boxes and sizes of the images", _SOURCE),
        File("train2014", "the images", "cocodataset.org"),
    )

    def __post_init__(self):
        one_of(self, boxes=boxes.FORMS, style=PROMPTS)

    def questions(self):
        refs, instances = self.find(f"refs({self.by}).p"), self.find("instances.json")
        folder = pathlib.Path(self.images or self.path("train2014"))
        for one in refcoco.expressions(refs, instances, self.split):
            yield Question(
                str(one.id),
                PROMPTS[self.style].format(text=one.text),
                (folder / one.image,),
                gold=list(one.box),
                more={"size": list(one.size), "ref_id": one.ref_id, "sent_id": one.id},
            )

    def record(self, question: Question, answer: Answer) -> Record:
        box = boxes.box_in(answer.text, self.boxes, tuple(question.more["size"]))
        overlap = boxes.iou(box or boxes.NOTHING, question.gold)
        return {"box": list(box or boxes.NOTHING), "iou": overlap, "parsed": box is not None,
                "score": float(overlap >= boxes.RIGHT)}  # fmt: skip

    def scores(self, records):
        """Share of expressions with IoU ≥ 0.5, and the mean IoU (× 100)."""
        return {"accuracy": mean(records), "IoU": mean(records, "iou")}

    def terms(self, record):
        return mean_terms(record) | {"IoU": (record["iou"], 1.0)}

    def write(self, records, folder):
        """[{"sent_id", "ref_id", "box"}], corners in pixels; there is no official format."""
        rows = [
            {key: r["more"][key] for key in ("sent_id", "ref_id")} | {"box": r["box"]}
            for r in records
        ]
        return [write_json(folder / f"{self.by}_{self.split}_boxes.json", rows)]


@dataclasses.dataclass(frozen=True)
class RefCOCOPlus(RefCOCO):
    """RefCOCO+: as RefCOCO, without words for places."""

    title: ClassVar = "RefCOCO+"


@dataclasses.dataclass(frozen=True)
class RefCOCOg(RefCOCO):
    """RefCOCOg: longer expressions.

    Attributes:
        by: umd (splits val and test) or google (val only, images in common with train).
    """

    by: str = "umd"

    title: ClassVar = "RefCOCOg"
    files: ClassVar = (File("refs(umd).p", "the expressions", _SOURCE), *RefCOCO.files[1:])

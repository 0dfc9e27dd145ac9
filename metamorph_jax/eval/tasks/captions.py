"""Captions: COCO (Karpathy's split), NoCaps, Flickr30k, and the paragraphs of Image2Paragraph.

| task | file under the task's root | what | from |
|---|---|---|---|
| coco_caption | dataset_coco.json | captions and splits | caption_datasets.zip of A. Karpathy |
| | val2014/COCO_val2014_….jpg | images, or elsewhere: `images` | cocodataset.org |
| flickr30k | dataset_flickr30k.json | captions and splits | caption_datasets.zip |
| | flickr30k-images/….jpg | images | Flickr30k |
| nocaps | nocaps_val_4500_captions.json | images, domains, captions | nocaps.org |
| | nocaps_test_image_info.json | the test set, without captions | nocaps.org |
| | val/….jpg, test/….jpg | images, of Open Images | the addresses in that file |
| image2paragraph | paragraphs_v1.json, test_split.json | paragraphs, ids of a split | \
cs.stanford.edu/people/ranjaykrishna/im2p |
| | VG_100K/….jpg, VG_100K_2/….jpg | images | Visual Genome |

The files of MM-Interleaved's hub page are read, too: coco_karpathy_test.json,
test1k.token.coco_format, annotations/paragraphs_coco.json with annotations/test_split.json.

Prompts are in `PROMPTS`. Scores are CIDEr, BLEU, ROUGE-L and, with Java, METEOR: see
`scorers/captions.py`, also for the choice of the tokeniser. CIDEr depends on which images are
scored, so that a run with a limit can't be compared with one of all images.

`protocol=mm-interleaved` asks and decodes as that paper does: five beams, 7 to 20 new tokens, the
first sentence counts; for Image2Paragraph 89 or 90 tokens after "The image depicts", with a
repetition penalty of 1.2. The CIDEr of paragraphs depends much on their length.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import ClassVar

from metamorph_jax.data.sets import captions as sets
from metamorph_jax.data.sets.captions import Captioned
from metamorph_jax.eval.scorers import captions
from metamorph_jax.eval.tasks.base import (
    Answer,
    File,
    Protocol,
    Question,
    Record,
    Task,
    by_group,
    one_of,
    write_json,
)

PROMPTS = {
    "brief": "Describe the image briefly.",  # LMMs-eval for COCO
    # LMMs-eval for NoCaps and Flickr30k
    "sentence": "Provide a one-sentence caption for the provided image.",
    "photo": "<image>a photo of",  # MM-Interleaved, with first_sentence
    "detail": "Please describe the image in detail.",
    # MM-Interleaved for Image2Paragraph
    "paragraph": "<image>Please describe the image in detail. The image depicts",
}
# How MM-Interleaved (arXiv 2401.10208) asks. Its least numbers of tokens count one that opens the
# reply, so they are one less here.
PROTOCOLS = {
    "mm-interleaved": Protocol(
        {"style": "photo", "first_sentence": True},
        {"beams": 5, "max_new_tokens": 20, "min_new_tokens": 7},
    )
}
_KARPATHY = "cs.stanford.edu/people/karpathy/deepimagesent (caption_datasets.zip)"
_PARAGRAPHS = "cs.stanford.edu/people/ranjaykrishna/im2p"


@dataclasses.dataclass(frozen=True)
class CocoCaption(Task):
    """COCO captions, Karpathy's split: CIDEr, BLEU, ROUGE-L, METEOR.

    Attributes:
        split: test or val (5,000 images each).
        style: of the prompt, one of `PROMPTS`.
        first_sentence: keep what comes before the first full stop.
        tokenizer: "ptb" (needs Java) or "python", see `scorers/captions.py`.
        images: folder of the images, if not the root.
        protocol: "mm-interleaved" asks and decodes as its paper does, see `PROTOCOLS`.
    """

    split: str = "test"
    style: str = "brief"
    first_sentence: bool = False
    tokenizer: str = "ptb"
    images: str = ""
    protocol: str = ""

    title: ClassVar = "COCO captions (Karpathy)"
    main: ClassVar = "CIDEr"
    other_scores: ClassVar = captions.NAMES
    max_new_tokens: ClassVar = 64
    protocols: ClassVar = PROTOCOLS
    files: ClassVar = (
        File("dataset_coco.json", "captions and splits", _KARPATHY),
        File("val2014", "the images", "cocodataset.org"),
    )

    def __post_init__(self):
        one_of(self, style=PROMPTS, tokenizer=captions.TOKENIZERS)

    @property
    def public(self) -> bool:
        """Whether the captions of this split are public."""
        return True

    def rows(self) -> Iterable[Captioned]:
        """The images of the split."""
        path = self.find("dataset_coco.json", f"coco_karpathy_{self.split}.json")
        if path.endswith("dataset_coco.json"):
            return sets.karpathy(path, (self.split,), "cocoid")
        return sets.listed(path)

    def picture(self, place: str) -> str:
        """The path of an image by its place among the images."""
        return str(pathlib.Path(self.images or self.root, place))

    def questions(self):
        rows = list(self.rows())
        if self.public:
            captions.check_tools(self.tokenizer)  # now, not after the last answer
        for row in rows:
            groups = {"domain": row.domain} if row.domain else {}
            yield Question(
                str(row.id), PROMPTS[self.style], (self.picture(row.image),),
                gold=row.captions or None, groups=groups, more={"image_id": row.id},
            )  # fmt: skip

    def record(self, question: Question, answer: Answer) -> Record:
        text = answer.text.split(".")[0] if self.first_sentence else answer.text
        return {"answer": " ".join(text.split()), "score": None}

    def finish(self, records: Sequence[Record]) -> list[Record]:
        """Adds "measured", the numbers of each caption, and its CIDEr / 10 as "score"."""
        scored = [record for record in records if record["gold"]]
        texts = [record["answer"] for record in scored]
        texts += [caption for record in scored for caption in record["gold"]]
        tokens = iter(captions.tokenized(texts, self.tokenizer) if texts else ())
        candidates = [next(tokens) for _ in scored]
        references = [[next(tokens) for _ in record["gold"]] for record in scored]
        rows = captions.measured(candidates, references, meteor=self.tokenizer == "ptb")
        rows = self.regrouped(scored, candidates, references, rows)
        found = {record["id"]: row for record, row in zip(scored, rows, strict=True)}
        return [_finished(record, found.get(record["id"])) for record in records]

    def regrouped(self, records, candidates, references, rows):
        """The numbers of each caption, with those that depend on a part of the set."""
        return rows

    def scores(self, records):
        """CIDEr, BLEU-1 to 4, METEOR, ROUGE-L, × 100; nothing where captions are not public."""
        return captions.corpus_scores([r["measured"] for r in records if "measured" in r])

    def write(self, records, folder):
        """[{"image_id", "caption"}], the COCO tools' form."""
        rows = [{"image_id": r["more"]["image_id"], "caption": r["answer"]} for r in records]
        name = self.name.partition(":")[0] or "captions"
        return [write_json(folder / f"{name}_{self.split}_results.json", rows)]


@dataclasses.dataclass(frozen=True)
class Flickr30k(CocoCaption):
    """Flickr30k captions, Karpathy's test split of 1,000 images."""

    style: str = "sentence"

    title: ClassVar = "Flickr30k captions"
    files: ClassVar = (
        File("dataset_flickr30k.json", "captions and splits", _KARPATHY),
        File("flickr30k-images", "the images", "shannon.cs.illinois.edu/DenotationGraph"),
    )

    def rows(self):
        path = self.find("dataset_flickr30k.json", f"{self.split}1k.token.coco_format")
        if path.endswith("coco_format"):
            return sets.coco_form(path, "flickr30k-images")
        return sets.karpathy(path, (self.split,), "imgid", "flickr30k-images")


@dataclasses.dataclass(frozen=True)
class NoCaps(CocoCaption):
    """NoCaps: captions of objects that COCO doesn't have; also by domain.

    Attributes:
        split: val (4,500 images, scored here) or test (server).
    """

    split: str = "val"
    style: str = "sentence"

    title: ClassVar = "NoCaps"
    scores_of_groups: ClassVar = ("CIDEr {domain}",)
    files: ClassVar = (
        File("nocaps_val_4500_captions.json", "images, domains, captions", "nocaps.org/download"),
        File("nocaps_test_image_info.json", "images of the test set", "nocaps.org/download"),
        File("val", "the images", "the addresses in the former"),
    )

    @property
    def public(self) -> bool:
        return self.split != "test"

    def rows(self):
        name = "nocaps_val_4500_captions.json" if self.public else "nocaps_test_image_info.json"
        return sets.coco_form(self.find(name), self.split)

    def regrouped(self, records, candidates, references, rows):
        """Adds CIDEr with the document frequencies of the image's domain alone."""
        domains: dict[str, list[int]] = {}
        for k, record in enumerate(records):
            domains.setdefault(record["groups"].get("domain", ""), []).append(k)
        rows = [dict(row) for row in rows]
        for members in domains.values():
            found = captions.ciders([candidates[k] for k in members],
                                    [references[k] for k in members])  # fmt: skip
            for k, cider in zip(members, found, strict=True):
                rows[k]["cider_of_domain"] = cider
        return rows

    def scores(self, records):
        """Those of the entire set, then CIDEr of each domain."""
        scored = [record for record in records if "measured" in record]
        domains = {
            f"CIDEr {name}": 100 * _mean(r["measured"]["cider_of_domain"] for r in group)
            for name, group in by_group(scored, "domain").items()
            if name
        }
        return super().scores(records) | domains


@dataclasses.dataclass(frozen=True)
class Image2Paragraph(CocoCaption):
    """Image2Paragraph: a paragraph about each image, one reference."""

    style: str = "detail"

    title: ClassVar = "Image2Paragraph"
    max_new_tokens: ClassVar = 90
    protocols: ClassVar = {
        "mm-interleaved": Protocol(
            {"style": "paragraph"},
            {"beams": 5, "max_new_tokens": 90, "min_new_tokens": 89, "repetition_penalty": 1.2},
        )
    }
    files: ClassVar = (
        File("paragraphs_v1.json", "the paragraphs", _PARAGRAPHS),
        File("test_split.json", "the images of the split", _PARAGRAPHS),
        File("VG_100K", "the images", "visualgenome.org"),
    )

    def rows(self):
        split = self.find(f"{self.split}_split.json", f"annotations/{self.split}_split.json")
        path = self.find("paragraphs_v1.json", "annotations/paragraphs_coco.json")
        return sets.paragraphs(path, split)


def _finished(record: Record, row: dict | None) -> Record:
    if row is None:
        return record
    return record | {"measured": row, "score": min(row["cider"] / 10, 1.0)}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)

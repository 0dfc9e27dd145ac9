"""Captions, questions, dialogs and conversations as rows."""

import pathlib
from collections.abc import Iterable, Iterator

from metamorph_jax.data.sets import captions, questions
from metamorph_jax.data.sets.captions import Captioned
from metamorph_jax.data.sets.questions import Asked
from metamorph_jax.data.sources import records
from metamorph_jax.data.sources.base import IMAGE
from metamorph_jax.data.sources.kinds import paths_of, turns_of
from metamorph_jax.data.sources.schema import canonical
from metamorph_jax.errors import BadSample, FileError, UserError
from metamorph_jax.files import shown
from metamorph_jax.recipes.mm_interleaved import wordings
from metamorph_jax.recipes.mm_interleaved.prepare.rows import Options, Set, row

# ---- captions


def _captions(
    found: Iterable[Captioned], options: Options, prompt: str = wordings.CAPTION, lower: bool = True
) -> Iterator[dict]:
    """A row for each caption: the image, then its caption; or the other way round ("draw")."""
    for one in found:
        for k, text in enumerate(one.captions):
            text = " ".join(text.split())
            text = text.lower() if lower else text
            drawing = ("user", text), ("assistant", IMAGE)
            reading = ("user", prompt), ("assistant", f" {text}")
            turns = drawing if options.use == "draw" else reading
            yield row(f"{one.id}-{k}", (options.pictures / one.image,), turns)


def coco_caption(options: Options) -> Iterator[dict]:
    """dataset_coco.json, or coco_karpathy_train.json; images train2014/ and val2014/.

    The split train has restval, as everywhere.
    """
    path = options.file("dataset_coco.json", f"coco_karpathy_{options.split}.json")
    splits = ("train", "restval") if options.split == "train" else (options.split,)
    original = path.endswith("dataset_coco.json")
    found = captions.karpathy(path, splits, "cocoid") if original else captions.listed(path)
    return _captions(found, options)


def flickr30k(options: Options) -> Iterator[dict]:
    """dataset_flickr30k.json; images flickr30k-images/."""
    path = options.file("dataset_flickr30k.json")
    found = captions.karpathy(path, (options.split,), "imgid", "flickr30k-images")
    return _captions(found, options)


def nocaps(options: Options) -> Iterator[dict]:
    """nocaps_val_4500_captions.json; images val/. There are no captions of other splits."""
    if options.split != "val":
        raise UserError(f"nocaps has captions of --split=val only, not of {shown(options.split)}")
    return _captions(
        captions.coco_form(options.file("nocaps_val_4500_captions.json"), "val"), options
    )


def image2paragraph(options: Options) -> Iterator[dict]:
    """paragraphs_v1.json, train_split.json; images VG_100K/ and VG_100K_2/."""
    name = f"{options.split}_split.json"
    path = options.file("paragraphs_v1.json", "annotations/paragraphs_coco.json")
    found = captions.paragraphs(path, options.file(name, f"annotations/{name}"))
    return _captions(found, options, wordings.PARAGRAPH, lower=False)


def lncoco(options: Options) -> Iterator[dict]:
    """coco_train_localized_narratives-*.jsonl, or coco_val_captions.jsonl; images train2017/."""
    paths = sorted(options.folder.glob(f"coco_{options.split}_localized_narratives*.jsonl"))
    paths = paths or [options.file(f"coco_{options.split}_localized_narratives.jsonl",
                                   f"coco_{options.split}_captions.jsonl")]  # fmt: skip
    for path in paths:
        found = captions.narratives(str(path), f"{options.split}2017")
        yield from _captions(found, options, wordings.PARAGRAPH, lower=False)


# ---- questions


def _questions(
    found: Iterable[Asked], options: Options, name: str, prompt: str = wordings.VQA
) -> Iterator[dict]:
    for one in found:
        turns = (("user", prompt.format(question=one.question)),
                 ("assistant", f" {one.answer(options.answer)}"))  # fmt: skip
        image = name.format(image=one.image, split=options.split)
        yield row(one.id, (options.pictures / image,), turns)


_COCO = "{split}2014/COCO_{split}2014_{image:012d}.jpg"


def vqav2(options: Options) -> Iterator[dict]:
    """v2_OpenEnded_mscoco_train2014_questions.json, v2_mscoco_train2014_annotations.json; images
    train2014/."""
    return _vqa(options, "v2_")


def okvqa(options: Options) -> Iterator[dict]:
    """OpenEnded_mscoco_train2014_questions.json, mscoco_train2014_annotations.json; images
    train2014/."""
    return _vqa(options, "")


def _vqa(options: Options, version: str) -> Iterator[dict]:
    asked = options.file(f"{version}OpenEnded_mscoco_{options.split}2014_questions.json")
    answered = options.file(f"{version}mscoco_{options.split}2014_annotations.json")
    return _questions(questions.vqa(asked, answered), options, _COCO)


def vizwiz(options: Options) -> Iterator[dict]:
    """train.json; images train/."""
    found = questions.vizwiz(options.file(f"{options.split}.json"))
    return _questions(found, options, "{split}/{image}", wordings.UNANSWERABLE)


def textvqa(options: Options) -> Iterator[dict]:
    """TextVQA_0.5.1_train.json; images train_images/."""
    found = questions.textvqa(options.file(f"TextVQA_0.5.1_{options.split}.json"))
    return _questions(found, options, "train_images/{image}")


def visdial(options: Options) -> Iterator[dict]:
    """visdial_1.0_train.json; images train2014/ and val2014/ of COCO, VisualDialog_val2018/.

    A dialog is a row; all of its answers are learnt.
    """
    for one in questions.visdial(options.file(f"visdial_1.0_{options.split}.json")):
        opening, turns = wordings.DIALOG.format(caption=one.caption), []
        for question, answer in one.rounds:
            turns.append(("user", opening + wordings.ROUND.format(question=question)))
            turns.append(("assistant", f" {answer}."))
            opening = ""
        if turns:
            yield row(one.image, (_dialog_image(options, one.image),), turns)


def _dialog_image(options: Options, image: int) -> pathlib.Path:
    """The image of a dialog; that of a training dialog may be in either folder of COCO."""
    folders = [f"VisualDialog_{options.split}2018"]
    if options.split == "train":
        folders = ["COCO_train2014", "COCO_val2014"]
    places = [options.pictures / name.removeprefix("COCO_") / f"{name}_{image:012d}.jpg"
              for name in folders]  # fmt: skip
    return next((place for place in places if place.is_file()), places[0])


# ---- conversations


def llava(options: Options) -> Iterator[dict]:
    """Conversations in LLaVA's format, --from=FILE.json or .jsonl: each question with its answer is
    a row, the image before it."""
    path = options.folder
    if path.is_dir():
        raise UserError(f"{shown(path)} is a folder: give --from=FILE.json, and --images=FOLDER")
    found = records.open_records(str(path))
    base = options.images or path.parent
    for k in range(len(found)):
        try:
            record = canonical(found[k])
            turns, paths = turns_of(record), paths_of(record)
        except BadSample as error:
            raise FileError(f"{found.where(k)}: {error.detail}") from error
        images = [base / name for name in paths]
        lead = IMAGE * len(images)
        for number in range(0, len(turns) - 1, 2):
            asked = lead + turns[number][1].replace(IMAGE, "").strip()
            answer = ("assistant", f" {turns[number + 1][1]}")
            id = f"{record.get('id', k)}-{number // 2}"
            yield row(id, images, (("user", asked), answer))


def _captioning(read) -> Set:
    return Set(read, ("caption", "draw"))


SETS = {
    "coco_caption": _captioning(coco_caption),
    "flickr30k": _captioning(flickr30k),
    "nocaps": _captioning(nocaps),
    "image2paragraph": _captioning(image2paragraph),
    "lncoco": Set(lncoco, ("draw", "caption")),
    **{read.__name__: Set(read, ("answer",)) for read in (vqav2, okvqa, vizwiz, textvqa, visdial)},
    "llava": Set(llava, ("answer",)),
}

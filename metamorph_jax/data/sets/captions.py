"""Images with captions: COCO and Flickr30k in Karpathy's splits, NoCaps, Image2Paragraph,
Localized Narratives.

    dataset_coco.json, dataset_flickr30k.json    A. Karpathy's caption_datasets.zip
    nocaps_val_4500_captions.json                nocaps.org
    paragraphs_v1.json, train_split.json         cs.stanford.edu/people/ranjaykrishna/im2p
    coco_train_localized_narratives-*.jsonl      google.github.io/localized-narratives

and the same as MM-Interleaved's hub page has them: coco_karpathy_{train,val,test}.json (BLIP's),
test1k.token.coco_format (Flickr30k; JSON), annotations/paragraphs_coco.json.
"""

import dataclasses
import pathlib
import re
from collections.abc import Collection, Iterator

from metamorph_jax import files
from metamorph_jax.data import reading
from metamorph_jax.errors import FileError


@dataclasses.dataclass(frozen=True)
class Captioned:
    """Attributes:
    id: of the image, as the official files have it.
    image: its place among the images, such as "val2014/COCO_val2014_000000000042.jpg".
    domain: NoCaps only.
    """

    id: int | str
    image: str
    captions: list[str]
    domain: str = ""


def cleaned(caption: str) -> str:
    """A caption as BLIP (github.com/salesforce/BLIP) and its heirs clean it: in lower case, with
    blanks for some punctuation (not for commas, apostrophes and hyphens)."""
    return re.sub(r"\s{2,}", " ", re.sub(r"[.!\"()*#:;~]", " ", caption.lower())).strip()


def karpathy(path: str, splits: Collection[str], key: str, folder: str = "") -> Iterator[Captioned]:
    """The images of these splits, in the order of the file.

    Args:
        key: of the image's id, "cocoid" or "imgid".
        folder: of images whose row names none.

    Raises:
        FileError: the file can't be read, or a row lacks something.
    """
    images = reading.required(reading.json_file(path, dict), path, "images")["images"]
    for number, row in enumerate(images):
        where = f"{path}, images[{number}]"
        reading.required(row, where, "filename", "split", "sentences", key)
        if row["split"] in splits:
            place = pathlib.Path(row.get("filepath", folder), row["filename"])
            given = [reading.required(sentence, where, texts=("raw",))["raw"]
                     for sentence in row["sentences"]]  # fmt: skip
            yield Captioned(row[key], str(place), given)


def listed(path: str) -> Iterator[Captioned]:
    """The rows of BLIP's list: {"image", "caption"}, one caption or several; raises as above.

    The id of an image with several captions is the number at the end of its name.
    """
    for number, row in enumerate(reading.json_file(path, list)):
        where = f"{path}[{number}]"
        reading.required(row, where, "caption", texts=("image",))
        given, id = row["caption"], number
        digits = re.search(r"(\d+)\.\w+$", row["image"])
        if isinstance(given, list) and digits:
            id = int(digits[1])
        given = given if isinstance(given, list) else [given]
        yield Captioned(id, row["image"], reading.text_list(given, f"{where}, caption"))


def coco_form(path: str, folder: str) -> Iterator[Captioned]:
    """The images of a file in COCO's form, such as NoCaps's; raises as above.

    Args:
        folder: of the images.
    """
    value = reading.required(reading.json_file(path, dict), path, "images")
    given: dict[int, list[str]] = {}
    for row in value.get("annotations", ()):
        reading.required(row, f"{path}, an annotation", "image_id", texts=("caption",))
        given.setdefault(row["image_id"], []).append(row["caption"])
    for number, row in enumerate(value["images"]):
        reading.required(row, f"{path}, images[{number}]", "id", "file_name")
        place = f"{folder}/{row['file_name']}"
        yield Captioned(row["id"], place, given.get(row["id"], []), row.get("domain", ""))


def paragraphs(path: str, split: str) -> Iterator[Captioned]:
    """Image2Paragraph: the images that the file `split` lists; raises as above."""
    table, text = reading.json_file(path), "paragraph"
    if isinstance(table, dict):
        table, text = reading.required(table, path, "annotations")["annotations"], "caption"
    known = {}
    for number, row in enumerate(table):
        reading.required(row, f"{path}[{number}]", "image_id", texts=("url", text))
        known[row["image_id"]] = row  # of an image that occurs twice, the last
    for key in dict.fromkeys(reading.json_file(split, list)):
        row = known.get(key)
        if row is None:
            raise FileError(f"{files.shown(path)} has no paragraph of image {key}")
        yield Captioned(key, "/".join(row["url"].split("/")[-2:]), [row[text]])


def narratives(path: str, folder: str) -> Iterator[Captioned]:
    """Localized Narratives of COCO, one each; raises as above.

    Args:
        folder: of the images, train2017 or val2017.
    """
    for number, row in enumerate(reading.json_lines(path, "image_id", texts=("caption",)), 1):
        name = f"{str(row['image_id']).zfill(12)}.jpg"
        yield Captioned(f"{row['image_id']}-{number}", f"{folder}/{name}", [row["caption"]])

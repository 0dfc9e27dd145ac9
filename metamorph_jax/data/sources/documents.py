"""Documents of text and images, and images with captions, as they come from the web.

| kind       | record                                                | text and images     |
|------------|-------------------------------------------------------|---------------------|
| mmc4       | `text_list`, `image_info` with `matched_text_index`   | around its sentence |
| obelics    | `texts` and `images`, of which one is null everywhere | as it stands        |
| omnicorpus | the same with `valid_image`, a flag for each image    | as it stands        |
| comm       | `step_info`, lists of texts and images                | in numbered steps   |
| pair       | `image` and `caption`                                 | around its caption  |

All become a text with markers that the assistant says (chat template "document" writes it as it
is). An image at the very start is given, as nothing stands before it from which it could be drawn.
Options are in `kinds.Documents`; the defaults are MM-Interleaved's.

An image is looked for by its name in the tar of the record, else below the root: by its path, and
for an address by the SHA-256 of that, with or without an extension. Images that are not there are
left out of documents, since many of those on the web are gone; so are those that can't be decoded
(`Documents.drop_broken`).
"""

import base64
import hashlib
import os
import re

import numpy as np

from metamorph_jax.data.sources.base import IMAGE, ImageRef, Turn, confined
from metamorph_jax.data.sources.kinds import Documents, Files, Kind
from metamorph_jax.errors import BadSample
from metamorph_jax.files import shown

CAPTIONS = ("caption", "txt", "text")
_EXTENSIONS = ("", ".jpg", ".jpeg", ".png", ".webp", ".gif")
_BLANKS = re.compile(rf" *{IMAGE} *")
Found = tuple[tuple[Turn, ...], tuple[ImageRef, ...]]


# ---- parts that the kinds share


def turns_of(text: str, options: Documents) -> tuple[Turn, ...]:
    """A text with markers as turns: what is learnt is the assistant's."""
    text = _BLANKS.sub(IMAGE, text).strip()
    given = len(IMAGE) if text.startswith(IMAGE) else 0
    if not given and not options.learn_before:
        given = max(text.find(IMAGE), 0)
    if not text.replace(IMAGE, "").strip():
        raise BadSample("no_text", "a document of nothing but images")
    turns = ("user", text[:given]), ("assistant", text[given:])
    return turns if given else turns[1:]


def find(files: Files, name: str) -> ImageRef | None:
    """The image that a document names, or None if it isn't there, or is broken.

    Raises:
        BadSample: it is named by something else than a path or an address.
    """
    return _unbroken(_located(files, name), files)


def _unbroken(ref: ImageRef | None, files: Files) -> ImageRef | None:
    return None if ref in files.broken else ref


def _located(files: Files, name: str) -> ImageRef | None:
    if not isinstance(name, str) or not name:
        raise BadSample("bad_path", f"an image is {shown(repr(name), 60)}, expected a path")
    if name in files.members:
        return files.members[name]
    names = [name]
    if "://" in name:
        hashed = hashlib.sha256(name.encode()).hexdigest()
        names = [hashed + extension for extension in _EXTENSIONS]
        found = [files.members[each] for each in names if each in files.members]
        if found:
            return found[0]
    shard = re.search(r"shard_(\d+)", os.path.basename(files.record_file))
    folders = ("", f"{shard[1]}/") if shard else ("",)  # MMC4's own script makes a folder for each
    for path in (folder + each for each in names for folder in folders):
        full = confined(files.root, path)
        if os.path.isfile(full):
            return ImageRef(full)
    return None


def _some(images: list, options: Documents, rng: np.random.Generator) -> list:
    """At most `max_images` of the images, drawn by chance, in their order.

    Raises:
        BadSample: there is only one, and it is left out by chance.
    """
    if 0 < options.max_images < len(images):
        kept = rng.choice(len(images), options.max_images, replace=False)
        images = [images[k] for k in sorted(kept)]
    if len(images) == 1 and rng.random() < options.drop_single:
        raise BadSample("single_image", f"left out with probability {options.drop_single}")
    return images


def _none_left(given: int, missing: int, why: str = "") -> BadSample:
    return BadSample("no_images", f"of {given} images, the files of {missing} are missing{why}")


def _texts(value, key: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise BadSample("bad_record", f"`{key}` is not a list of texts")
    return value


# ---- kinds


def is_mmc4(record: dict) -> bool:
    return isinstance(record.get("text_list"), list) and "image_info" in record


def mmc4(record: dict, files: Files, rng: np.random.Generator) -> Found:
    """Each image before or after the sentence that it was matched with."""
    options, sentences = files.documents, _texts(record["text_list"], "text_list")
    infos, found, missing = list(record["image_info"]), [], 0
    alike = [info for info in infos if float(info["matched_sim"]) >= options.min_similarity]
    for info in alike:
        at = info["matched_text_index"]
        if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < len(sentences):
            raise BadSample(
                "bad_record",
                f"`matched_text_index` is {shown(at, 40)}, of {len(sentences)} sentences",
            )
        ref = _of_info(info, files)
        missing += ref is None
        found += [] if ref is None else [(at, ref)]
    if not found:
        few = f", {len(infos) - len(alike)} match by less than {options.min_similarity}"
        raise _none_left(len(infos), missing, few)
    pieces, refs = [], []
    found = sorted(_some(found, options, rng), key=lambda pair: pair[0])
    for k, sentence in enumerate(sentences):
        before, after = [], []
        for _, ref in (pair for pair in found if pair[0] == k):
            (before if rng.random() < options.image_first else after).append(ref)
        pieces += [IMAGE] * len(before) + [sentence] + [IMAGE] * len(after)
        refs += before + after
    return turns_of(" ".join(pieces), options), tuple(refs)


def _of_info(info: dict, files: Files) -> ImageRef | None:
    """The image of an entry of `image_info`; tars may hold it as base64."""
    inline = info.get("image_base64")
    if inline and isinstance(inline, str):
        ref = ImageRef(files.record_file, data=base64.b64decode(inline, validate=True))
        return _unbroken(ref, files)
    return find(files, info.get("image_name") or info.get("image_url") or info.get("raw_url"))


def is_obelics(record: dict) -> bool:
    return isinstance(record.get("images"), list) and isinstance(record.get("texts"), list)


def is_omnicorpus(record: dict) -> bool:
    return is_obelics(record) and "valid_image" in record


def obelics(record: dict, files: Files, rng: np.random.Generator) -> Found:
    """Texts and images in the order of the page."""
    images, texts, options = record["images"], record["texts"], files.documents
    if len(images) != len(texts):
        raise BadSample("bad_record", f"{len(images)} `images`, but {len(texts)} `texts`")
    for k, pair in enumerate(zip(images, texts, strict=True)):
        if sum(one is not None for one in pair) != 1 or not isinstance(pair[1] or "", str):
            raise BadSample("bad_record", f"place {k} must have either an image or a text")
    places = [k for k, image in enumerate(images) if image is not None]
    valid = record.get("valid_image")
    if valid is not None and (not isinstance(valid, list) or len(valid) != len(places)):
        raise BadSample("bad_record", f"`valid_image` must have a flag for each of {len(places)}")
    asked = [k for k, fine in zip(places, valid or [True] * len(places), strict=True) if fine]
    refs = [(k, find(files, images[k])) for k in asked]
    there = [(k, ref) for k, ref in refs if ref is not None]
    if not there:
        raise _none_left(len(places), len(refs), f", {len(places) - len(asked)} not valid")
    kept = dict(_some(there, options, rng))
    pieces = [IMAGE if k in kept else text for k, text in enumerate(texts)]
    text = " ".join(piece for piece in pieces if piece is not None)
    return turns_of(text, options), tuple(kept.values())


def is_comm(record: dict) -> bool:
    return isinstance(record.get("step_info"), list)


def comm(record: dict, files: Files, rng: np.random.Generator) -> Found:
    """Title, summary and numbered steps."""
    items = [{"type": "text", "content": record["title"]}] if record.get("title") else []
    items += record.get("summary_info") or []
    for k, step in enumerate(record["step_info"], 1):
        items += [{"type": "text", "content": f"({k})"}, *step]
    pieces, found, missing = [], [], 0
    for item in items:
        if item["type"] == "text":
            pieces += _texts([item["content"]], "content")
            continue
        if item["type"] != "image":
            raise BadSample("bad_record", f"an item of type {shown(repr(item['type']), 40)}")
        path = item["image_path"]
        ref = find(files, f"images/{path}") or find(files, path)
        missing += ref is None
        found += [] if ref is None else [(len(pieces), ref)]
        pieces += [] if ref is None else [IMAGE]
    if not found:
        raise _none_left(missing, missing)
    kept = dict(_some(found, files.documents, rng))
    dropped = {k for k, _ in found} - kept.keys()
    text = " ".join(piece for k, piece in enumerate(pieces) if k not in dropped)
    return turns_of(text, files.documents), tuple(kept.values())


def is_pair(record: dict) -> bool:
    said = any(isinstance(record.get(key), str | list) for key in CAPTIONS)
    return said and bool(record.get("image")) and not record.keys() & {"conversations", "messages"}


def pair(record: dict, files: Files, rng: np.random.Generator) -> Found:
    """An image with its caption."""
    options, names = files.documents, list(files.members)
    image = record.get("image")
    image = image[0] if isinstance(image, list) and len(image) == 1 else image
    if not image:
        inside = f" (the tar has {shown(', '.join(names), 100)})" if names else ""
        raise BadSample("no_image", f"no `image`{inside}")
    keys = (options.caption,) if options.caption else CAPTIONS
    said = next((record[key] for key in keys if record.get(key)), "")
    caption = " ".join(_texts(said if isinstance(said, list) else [said], "caption")).strip()
    if not caption:
        raise BadSample("no_caption", f"no text in `{'`, `'.join(keys)}`")
    caption = caption.lower() if options.lower else caption
    first = rng.random() < options.image_first
    text = IMAGE + caption if first else caption + IMAGE
    return turns_of(text, options), (files.image(image),)


KINDS = {
    "mmc4": Kind(is_mmc4, mmc4, raw=True, spares=True),
    "comm": Kind(is_comm, comm, raw=True, spares=True),
    "omnicorpus": Kind(is_omnicorpus, obelics, raw=True, spares=True),
    "obelics": Kind(is_obelics, obelics, raw=True, spares=True),
    "pair": Kind(is_pair, pair, raw=True),
}

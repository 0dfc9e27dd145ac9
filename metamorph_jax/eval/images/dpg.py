"""DPG-Bench: long prompts, and questions about each that a judge answers with yes or no.

Hu et al. 2024 (arXiv 2403.05135). The official judge is mPLUG-large; scores by another judge are
named after it. A question counts as "no" if one of those that it depends on is answered with no.

    dpg_bench.csv       item_id, text, keywords, proposition_id, dependency, …, tuple, question_…
    prompts/ITEM.txt    the prompt
    OUT/ITEM.png        four images of it as a 2 x 2 grid
    results.txt         path, score of each image, their mean

Two modes, whose numbers differ by up to some points:

    strict      every question counts; categories are means over all images, after dependencies; a
                dependency on a question that is not there is ignored, and that is printed
    official    as the published script: the first row of the csv is lost, and with it every prompt
                that has a question depending on it; categories are those of the last image of each
                prompt, before dependencies
"""

import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from metamorph_jax.data import images, reading
from metamorph_jax.errors import ConfigError, DataError, FileError
from metamorph_jax.files import shown

MODES = ("strict", "official")
THRESHOLD = 0.5  # above it, "yes"
_COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")


@dataclasses.dataclass(frozen=True)
class Question:
    """Attributes:
    text: it.
    parents: ids of the questions that it depends on.
    category: text of its tuple before the bracket: "attribute - color".
    """

    text: str
    parents: tuple[int, ...]
    category: str


Item = dict[int, Question]  # of a prompt, in the order of the file


def read_items(path: str, mode: str = "strict") -> dict[str, Item]:
    """Item id -> its questions.

    Raises:
        FileError: a row is not a question.
    """
    if mode not in MODES:
        raise ConfigError(f"mode {mode!r} of DPG-Bench is none of {', '.join(MODES)}")
    items: dict[str, Item] = {}
    for number, row in enumerate(reading.table(path, *_COLUMNS), 2):
        if number == 2 and mode == "official":
            continue
        where = f"{shown(path)}, row {number}"
        try:
            id = int(row["proposition_id"])
            parents = tuple(int(text) for text in row["dependency"].split(",") if text.strip())
        except ValueError as error:
            raise FileError(f"{where}: {error}; expected numbers of questions") from error
        category = row["tuple"].split("(")[0].strip()
        question = Question(
            row["question_natural_language"], tuple(p for p in parents if p), category
        )
        if items.setdefault(row["item_id"], {}).setdefault(id, question) is not question:
            raise FileError(f"{where}: {shown(row['item_id'])} has question {id} twice")
    if mode == "official":
        return items
    return {name: _mended(name, item) for name, item in items.items()}


def _mended(name: str, item: Item) -> Item:
    """The item without dependencies on questions that are not there."""
    lost = [id for id in item if missing(item, id)]
    if lost:
        print(f"DPG-Bench: questions {lost} of {shown(name)} depend on others that are not there; "
              "these dependencies are ignored", file=sys.stderr)  # fmt: skip
    kept = {id: tuple(p for p in q.parents if p in item) for id, q in item.items()}
    return {id: dataclasses.replace(q, parents=kept[id]) for id, q in item.items()}


def missing(item: Item, id: int) -> bool:
    """Whether a question depends on one that is not there."""
    return any(parent not in item for parent in item[id].parents)


# ---- scores


def zeroed(item: Item, answers: Mapping[int, bool]) -> dict[int, bool] | None:
    """Answers with those counted as no whose parents are no, in the order of the file; None where a
    question depends on one that is not there."""
    out = dict(answers)
    for id, question in item.items():
        if missing(item, id):
            return None
        if not all(out[parent] for parent in question.parents):
            out[id] = False
    return out


@dataclasses.dataclass(frozen=True)
class Judged:
    """The images of one prompt.

    Attributes:
        item: its questions.
        answers: question -> yes, of each image.
    """

    item: Item
    answers: Sequence[Mapping[int, bool]]


def image_scores(one: Judged) -> list[float] | None:
    """The score of each image, from 0 to 1; None for a prompt that the official script loses."""
    found = [zeroed(one.item, answers) for answers in one.answers]
    if not one.item or any(answers is None for answers in found):
        return None
    return [float(np.mean(list(answers.values()))) for answers in found]


def broad(category: str) -> str:
    """The category of the first level: "entity - whole" -> "entity"."""
    return category.split("-")[0].strip()


def summary(prompts: Iterable[Judged], mode: str = "strict") -> dict[str, float]:
    """Scores from 0 to 100: "DPG", the mean over prompts, and those of categories of both levels.

    "lost prompts" is how many the official script leaves out.
    """
    totals, lost = [], 0
    detailed: dict[str, list[bool]] = {}
    for one in prompts:
        scores = image_scores(one)
        if scores is None:
            lost += 1
            continue
        totals.append(np.mean(scores))
        counted = one.answers[-1:]
        if mode == "strict":
            counted = [zeroed(one.item, answers) for answers in one.answers]
        for answers in counted:
            for id, question in one.item.items():
                detailed.setdefault(question.category, []).append(bool(answers[id]))
    if not totals:
        return {}
    wide: dict[str, list[bool]] = {}
    for category, values in detailed.items():
        wide.setdefault(broad(category), []).extend(values)
    percent = lambda values: float(100 * np.mean(values))  # noqa: E731
    out = {"DPG": percent(totals)}
    out |= {name: percent(values) for name, values in sorted(wide.items())}
    out |= {n: percent(values) for n, values in sorted(detailed.items()) if n not in wide}
    return out | ({"lost prompts": float(lost)} if lost else {})


def result_line(path: str, scores: Sequence[float]) -> str:
    """A line of the result file."""
    return ", ".join([path, *(f"{score}" for score in scores), f"{np.mean(scores)}"])


# ---- images


def grid(samples: Sequence[Image.Image], resolution: int) -> Image.Image:
    """One image alone, or up to four as a 2 x 2 grid, row by row, each `resolution` high and
    wide."""
    size = resolution, resolution
    resized = [image.resize(size, Image.Resampling.LANCZOS) for image in samples]
    if len(resized) == 1:
        return resized[0]
    whole = Image.new("RGB", (2 * resolution, 2 * resolution))
    for k, image in enumerate(resized):
        whole.paste(image, (k % 2 * resolution, k // 2 * resolution))
    return whole


def crops(path: str, count: int) -> list[Image.Image]:
    """The first `count` images of a grid of four, row by row; 1: the whole image.

    Raises:
        BadSample: the file can't be used.
    """
    whole = images.decode(images.read_bytes(path), path)
    if count == 1:
        return [whole]
    w, h = whole.width // 2, whole.height // 2
    corners = [(0, 0), (w, 0), (0, h), (w, h)][:count]
    return [whole.crop((x, y, x + w, y + h)) for x, y in corners]


def find_images(folder: str | pathlib.Path, items: Mapping[str, Item]) -> dict[str, str]:
    """Item id -> file of the images in a folder whose names are those of items.

    Raises:
        DataError: there are none.
    """
    places = sorted(pathlib.Path(folder).iterdir())
    found = {path.stem: str(path) for path in places if path.stem in items and path.is_file()}
    if not found:
        raise DataError(f"no image in {shown(folder)} has the name of an item, such as "
                        f"{shown(next(iter(items), 'ITEM'))}.png")  # fmt: skip
    return found

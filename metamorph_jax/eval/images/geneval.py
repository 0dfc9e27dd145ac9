"""GenEval: does an image show the objects, their number, colours and places that were asked for?

Ghosh et al. 2023 (arXiv 2310.11513). The benchmark's own evaluator is a detector (Mask2Former) with
CLIP for colours, and needs a GPU; its numbers are those of papers. Here a judge is asked questions
that are made from the same metadata, so scores are named after the judge and compared only with
those of the same judge. What we write can be given to the official evaluator, and `summary` reads
its result file, too.

    evaluation_metadata.jsonl       a prompt a line: tag, include, exclude, prompt
    OUT/00000/metadata.jsonl        line 0
    OUT/00000/samples/0000.png …    four images of it
    results.jsonl                   filename, tag, prompt, correct, reason, metadata, details
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from metamorph_jax.data import reading
from metamorph_jax.errors import DataError, FileError
from metamorph_jax.eval.images.judging import ImageJudge
from metamorph_jax.files import shown

RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD = 0.5  # above it, "yes"
_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_PLURALS = {
    "person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep", "skis": "skis",
    "scissors": "scissors", "broccoli": "broccoli",
}  # fmt: skip


# ---- prompts


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that must be so in an image.

    Attributes:
        kind: "object", "count", "color" or "position".
        name: class of an object.
        count, most: at least and at most so many of them; most None: no limit.
        color: of the object.
        relation: one of `RELATIONS`, of the object to the one named `other`.
    """

    kind: str
    name: str
    count: int = 1
    most: int | None = None
    color: str = ""
    relation: str = ""
    other: str = ""

    @property
    def question(self) -> str:
        """What a judge is asked; the answer should be yes."""
        if self.kind == "color":
            return f"Is the {self.name} {self.color}?"
        if self.kind == "position":
            return f"Is the {self.name} {self.relation} the {self.other}?"
        if self.kind == "object":
            return f"Does the image show {_article(self.name)}?"
        if self.most is None:
            return f"Does the image show at least {_many(self.count, self.name)}?"
        if self.most == self.count:
            return f"Does the image show exactly {_many(self.count, self.name)}?"
        return f"Does the image show {self.count} to {_many(self.most, self.name)}?"


def _article(name: str) -> str:
    if _PLURALS.get(name) == name:
        return f"any {name}"
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _many(count: int, name: str) -> str:
    number = _NUMBERS[count] if count < len(_NUMBERS) else str(count)
    return f"{number} {name if count == 1 else plural(name)}"


def plural(name: str) -> str:
    """The plural of a class of COCO."""
    head, space, last = name.rpartition(" ")
    if last in _PLURALS:
        return head + space + _PLURALS[last]
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def checks_of(row: Mapping) -> list[Check]:
    """What must be so in an image of a prompt, in the order of its objects."""
    limits = {item["class"]: item["count"] - 1 for item in row.get("exclude", ())}
    out = []
    for item in row["include"]:
        name, count = item["class"], item.get("count", 1)
        most = limits.get(name)
        kind = "object" if count == 1 and most is None else "count"
        out.append(Check(kind, name, count, most))
        if "color" in item:
            out.append(Check("color", name, color=item["color"]))
        if "position" in item:
            relation, target = item["position"]
            other = row["include"][target]["class"]
            out.append(Check("position", name, relation=relation, other=other))
    return out


def read_prompts(path: str) -> list[dict]:
    """The rows of evaluation_metadata.jsonl.

    Raises:
        FileError: one of them is not such a row; the message names its line.
    """
    rows = []
    for row in reading.json_lines(path, "tag", "include", "prompt"):
        rows.append(row)
        try:
            known = all(check.relation in ("", *RELATIONS) for check in checks_of(row))
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            known = repr(error)
        if known is not True:
            raise FileError(f"{shown(path)}, row {len(rows)}: not a prompt of GenEval "
                            f"({known or 'an unknown relation'})")  # fmt: skip
    return rows


# ---- images in folders


def place(index: int, sample: int) -> str:
    """Where an image lies in the layout."""
    return f"{index:05}/samples/{sample:04}.png"


def write_metadata(folder: pathlib.Path, index: int, row: Mapping) -> None:
    """Makes the folder of a prompt."""
    where = folder / f"{index:05}"
    (where / "samples").mkdir(parents=True, exist_ok=True)
    (where / "metadata.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


def find_images(folder: str | pathlib.Path, rows: Sequence[Mapping]) -> list[tuple[int, str]]:
    """(index of the prompt, file) of the images in the layout.

    Raises:
        DataError: there are none, or a folder's prompt is another one than that of its row.
    """
    found = []
    for index, row in enumerate(rows):
        where = pathlib.Path(folder, f"{index:05}")
        if (where / "metadata.jsonl").is_file():
            (own, *_) = reading.json_lines(str(where / "metadata.jsonl"), "prompt")
            if own["prompt"] != row["prompt"]:
                raise DataError(
                    f"{where} is of the prompt {shown(own['prompt'])!r}, row {index} of "
                    f"{shown(row['prompt'])!r}"
                )
        images = (p for p in (where / "samples").glob("*.png") if re.fullmatch(r"\d+\.png", p.name))
        found += [(index, str(path)) for path in sorted(images)]
    if not found:
        raise DataError(f"no images in {shown(folder)}; expected {place(0, 0)} and so on")
    return found


# ---- judging


def judged(
    images: Sequence[str], rows: Sequence[Mapping], judge: ImageJudge
) -> list[tuple[bool | None, dict[str, float]]]:
    """(correct, question -> how likely "yes" is) of each image; correct is None where the judge had
    no answer to a question.

    rows: the prompt of each image.
    """
    questions = [[check.question for check in checks_of(row)] for row in rows]
    flat = [(image, q) for image, own in zip(images, questions, strict=True) for q in own]
    values = iter(judge([image for image, _ in flat], [q for _, q in flat]) if flat else ())
    out = []
    for own in questions:
        found = {q: float(next(values)) for q in own}
        whole = not np.isnan(list(found.values())).any()
        right = all(value > THRESHOLD for value in found.values())
        out.append((right if whole else None, found))
    return out


def result(path: str, row: Mapping, correct: bool, found: Mapping[str, float]) -> dict:
    """A line of the result file."""
    wrong = [question for question, value in found.items() if not value > THRESHOLD]
    return {
        "filename": path, "tag": row["tag"], "prompt": row["prompt"], "correct": correct,
        "reason": "; ".join(f"no: {question}" for question in wrong),
        "metadata": json.dumps(row), "details": json.dumps(dict(found)),
    }  # fmt: skip


def summary(results: Iterable[Mapping]) -> dict[str, float]:
    """Scores from 0 to 1 of a result file, ours or the official one.

    "overall" is the mean of the tasks' means, not of all images; "images" are the correct ones;
    "prompts" those of which any image is correct.

    results: with "tag", "correct" and "metadata" (or "prompt") each.
    """
    tags: dict[str, list[bool]] = {}
    prompts: dict[str, bool] = {}
    for one in results:
        tags.setdefault(one["tag"], []).append(bool(one["correct"]))
        key = one.get("metadata") or one["prompt"]
        prompts[key] = prompts.get(key, False) or bool(one["correct"])
    if not tags:
        return {}
    means = {tag: float(np.mean(values)) for tag, values in tags.items()}
    images = [value for values in tags.values() for value in values]
    return {
        "overall": float(np.mean(list(means.values()))), **means,
        "images": float(np.mean(images)), "prompts": float(np.mean(list(prompts.values()))),
    }  # fmt: skip

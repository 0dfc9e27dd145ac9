"""easy-vqa as LLaVA files: questions about images, requests to draw them, and their labels.

    root/
      images/{train,test}/17.png     64x64, one shape of one colour on a nearly white ground
      vqa_train.jsonl                one sample per image, each question about it a turn
      vqa_test.jsonl                 the same for the held-out split
      questions_test.jsonl           the held-out questions, one per line, with answer and type
      draw_train.jsonl               "Draw a teal circle." -> image, one sample per image of a pair
                                     of colour and shape that is not in HELD_OUT
      draw_test.jsonl                24 requests in wordings that training never saw, one per pair
      labels.json                    {"train": {"17": ["teal", "circle"]}, "test": ...}
      manifest.json                  parameters and counts; if they match, nothing is rewritten

The turns of a `vqa_*` sample are meant to be independent: each sees only the image and itself (an
earlier turn that names the colour would give away the answer to a later one). The files are plain
LLaVA; the data config asks for this with `independent_turns`. The colour and shape of an image are
derived from its questions and answers, not from its pixels. The held-out split is never written to
a training file.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil

import numpy as np

from metamorph_jax.files import write_whole

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
SPLITS = ("train", "test")
ANSWERS = ("yes", "no", *COLORS, *SHAPES)
FORMAT = 4  # raise when the files' contents change for the same parameters

# Pairs that are asked about in training like all others, but never drawn.
HELD_OUT = (
    ("blue", "triangle"),
    ("red", "rectangle"),
    ("teal", "circle"),
    ("yellow", "rectangle"),
)
# Requests seen in training, and those kept for the test. {a} is "a"/"an".
TRAIN_WORDINGS = (
    "Draw {a} {color} {shape}.",
    "Please draw {a} {color} {shape}.",
    "Generate an image of {a} {color} {shape}.",
    "Create a picture of {a} {color} {shape}.",
    "Show me {a} {color} {shape}.",
    "I would like to see {a} {color} {shape}.",
    "Make an image that shows {a} {color} {shape}.",
    "Paint one {shape}. Its color is {color}.",
    # Not every question wants an answer in words.
    "Would you paint {a} {color} {shape} for me?",
    "Could I see {a} {color} {shape}?",
)
TEST_WORDINGS = (
    "Can you draw me {a} {color} {shape}?",
    "Generate a picture with {a} {color} {shape} in it.",
)
# The reply says what it is about to draw, so that the words stand right before the image.
DRAW_REPLY = "Here is {a} {color} {shape}: <image>"

QUESTION_TYPES = (
    "color",
    "shape",
    "is it this color?",
    "is it not this color?",
    "is it this shape?",
    "is it not this shape?",
)

_COLOR = re.compile(r"\b(" + "|".join(COLORS) + r")\b")
_SHAPE = re.compile(r"\b(" + "|".join(SHAPES) + r")\b")
_NEGATED = re.compile(r"\b(not|no)\b")


@dataclasses.dataclass(frozen=True)
class QuickstartData:
    """Paths of the files."""

    root: pathlib.Path

    @property
    def images(self) -> pathlib.Path:
        return self.root / "images"

    @property
    def vqa_train(self) -> pathlib.Path:
        return self.root / "vqa_train.jsonl"

    @property
    def vqa_test(self) -> pathlib.Path:
        return self.root / "vqa_test.jsonl"

    @property
    def questions_test(self) -> pathlib.Path:
        return self.root / "questions_test.jsonl"

    @property
    def draw_train(self) -> pathlib.Path:
        return self.root / "draw_train.jsonl"

    @property
    def draw_test(self) -> pathlib.Path:
        return self.root / "draw_test.jsonl"

    @property
    def labels(self) -> pathlib.Path:
        return self.root / "labels.json"

    @property
    def manifest(self) -> pathlib.Path:
        return self.root / "manifest.json"


def question_type(question: str) -> str:
    """The type of a question, one of QUESTION_TYPES."""
    if question.startswith("what"):
        return "color" if "color" in question else "shape"
    noun = "color" if _COLOR.search(question) else "shape"
    return f"is it {'not ' if _NEGATED.search(question) else ''}this {noun}?"


def image_labels(turns: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """(colour, shape) that questions and answers imply; None where they don't determine it.

    Raises ValueError when they contradict each other."""
    possible = {"color": set(COLORS), "shape": set(SHAPES)}
    for question, answer in turns:
        words = {"color": _COLOR.search(question), "shape": _SHAPE.search(question)}
        kind = question_type(question)
        if kind in possible:
            possible[kind] &= {answer}
            # "what color is the circle?" also says that it is a circle.
            other = "shape" if kind == "color" else "color"
            if words[other]:
                possible[other] &= {words[other][1]}
            continue
        noun = "color" if words["color"] else "shape"
        named = {words[noun][1]}
        true = (answer == "yes") != ("not" in kind)
        possible[noun] = possible[noun] & named if true else possible[noun] - named
    if not all(possible.values()):
        raise ValueError(f"contradicting answers: {turns}")
    return tuple(next(iter(v)) if len(v) == 1 else None for v in possible.values())


def read_source(source, split: str) -> dict[int, list[tuple[str, str]]]:
    """Questions and answers of every image of a split, by image number, in file order."""
    path = pathlib.Path(source) / split / "questions.json"
    out: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in json.loads(path.read_text()):
        out.setdefault(int(image), []).append((question, answer))
    return dict(sorted(out.items()))


def draw_request(color: str, shape: str, wording: str) -> str:
    """A request, or the reply to it, in words."""
    return wording.format(a="an" if color[0] in "aeiou" else "a", color=color, shape=shape)


def draw_requests(wordings=TEST_WORDINGS) -> list[dict]:
    """One request for every colour x shape, wordings taken in turn: {id, prompt, color, shape,
    held_out}."""
    out = []
    for i, (color, shape) in enumerate((c, s) for c in COLORS for s in SHAPES):
        prompt = draw_request(color, shape, wordings[i % len(wordings)])
        name = f"draw-{color}-{shape}"
        held_out = (color, shape) in HELD_OUT
        out.append({"id": name, "prompt": prompt, "color": color, "shape": shape,
                    "held_out": held_out})  # fmt: skip
    return out


def prepare(root, source=None, train_images: int = 0, test_images: int = 0,
            seed: int = 0) -> QuickstartData:  # fmt: skip
    """Writes the files under `root` and returns their paths.

    source: the data folder of easy-vqa; None finds the installed package.
    train_images, test_images: how many images to take (0 = all); a smaller set is taken
      evenly from every colour x shape. The same parameters write the same bytes."""
    if source is None:
        from metamorph_jax.convert import packages

        source = packages.find("pkg:easy-vqa")
    source, data = pathlib.Path(source), QuickstartData(pathlib.Path(root))
    wanted = {"train": int(train_images), "test": int(test_images)}
    parameters = {"format": FORMAT, "images": wanted, "seed": int(seed), "wordings":
                  [*TRAIN_WORDINGS, *TEST_WORDINGS, DRAW_REPLY], "held_out":
                  [list(pair) for pair in HELD_OUT]}  # fmt: skip
    if _done(data, parameters):
        return data
    data.manifest.unlink(missing_ok=True)

    labels, counts = {}, {}
    for split in SPLITS:
        turns = read_source(source, split)
        truth = {image: image_labels(qa) for image, qa in turns.items()}
        chosen = _choose(truth, wanted[split])
        labels[split] = {str(image): list(truth[image]) for image in chosen}
        (data.images / split).mkdir(parents=True, exist_ok=True)
        for image in chosen:
            target = data.images / split / f"{image}.png"
            if not target.exists():
                _copy(source / split / "images" / f"{image}.png", target)
        samples = [_vqa_sample(split, image, turns[image]) for image in chosen]
        write_lines(data.root / f"vqa_{split}.jsonl", samples)
        counts[split] = {
            "images": len(chosen),
            "questions": sum(len(turns[image]) for image in chosen),
            "unknown_labels": sum(None in truth[image] for image in chosen),
        }
        if split == "train":
            drawn = [_draw_sample(image, *truth[image], seed)
                     for image in chosen
                     if None not in truth[image] and truth[image] not in HELD_OUT]  # fmt: skip
            write_lines(data.draw_train, drawn)
        else:
            write_lines(data.questions_test, [
                {"id": f"vqa-test-{image}-{i}", "image": f"test/{image}.png",
                 "question": question, "answer": answer, "type": question_type(question)}
                for image in chosen for i, (question, answer) in enumerate(turns[image])
            ])  # fmt: skip
    write_lines(data.draw_test, draw_requests())
    write_whole(data.labels, json.dumps(labels))
    write_whole(data.manifest, json.dumps({"parameters": parameters, "counts": counts}, indent=1))
    return data


def read_jsonl(path) -> list[dict]:
    """The records of a JSONL file."""
    with pathlib.Path(path).open() as f:
        return [json.loads(line) for line in f]


def labelled_images(data: QuickstartData, split: str):
    """(image numbers int[n], pixels uint8[n,64,64,3], colour int[n], shape int[n]).

    Colours and shapes index COLORS and SHAPES; images whose label is unknown are left out."""
    from PIL import Image

    table = json.loads(data.labels.read_text())[split]
    rows = [(int(k), c, s) for k, (c, s) in table.items() if c is not None and s is not None]
    pixels = [np.asarray(Image.open(data.images / split / f"{n}.png").convert("RGB"))
              for n, _, _ in rows]  # fmt: skip
    return (
        np.array([n for n, _, _ in rows], np.int32),
        np.stack(pixels),
        np.array([COLORS.index(c) for _, c, _ in rows], np.int32),
        np.array([SHAPES.index(s) for _, _, s in rows], np.int32),
    )


def _vqa_sample(split: str, image: int, turns) -> dict:
    conversation = []
    for i, (question, answer) in enumerate(turns):
        conversation.append({"from": "human", "value": ("<image>\n" if i == 0 else "") + question})
        conversation.append({"from": "gpt", "value": answer})
    return {"id": f"vqa-{split}-{image}", "image": f"images/{split}/{image}.png",
            "conversations": conversation}  # fmt: skip


def _draw_sample(image: int, color: str, shape: str, seed: int) -> dict:
    # A hash, so that the wording for an image doesn't depend on which other images are taken.
    digest = hashlib.sha256(f"{seed}-{image}".encode()).digest()
    wording = TRAIN_WORDINGS[digest[0] % len(TRAIN_WORDINGS)]
    return {
        "id": f"draw-train-{image}",
        "image": f"images/train/{image}.png",
        "conversations": [
            {"from": "human", "value": draw_request(color, shape, wording)},
            {"from": "gpt", "value": draw_request(color, shape, DRAW_REPLY)},
        ],
    }


def _choose(truth: dict[int, tuple], count: int) -> list[int]:
    """The first `count` images, taken in turn from the colour x shape classes; 0 = all."""
    if count <= 0 or count >= len(truth):
        return list(truth)
    classes: dict[tuple, list[int]] = {}
    for image, label in truth.items():
        if None not in label:
            classes.setdefault(label, []).append(image)
    queues = [classes[label] for label in sorted(classes)]
    out: list[int] = []
    for depth in range(max(map(len, queues))):
        out += [queue[depth] for queue in queues if depth < len(queue)]
    return sorted(out[:count])


def _done(data: QuickstartData, parameters: dict) -> bool:
    """The manifest is written last, so a matching one means that everything is there."""
    try:
        return json.loads(data.manifest.read_text())["parameters"] == parameters
    except (OSError, ValueError, KeyError):
        return False


def write_lines(path: pathlib.Path, rows: list[dict]) -> None:
    """Writes a JSONL file, whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)

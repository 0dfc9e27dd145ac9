"""Frames of stories, drawn from their captions and the story so far: VIST, PororoSV, FlintstonesSV.

The files are those of `data/sets/stories.py`. The model reads captions and frames up to the one that
it is to draw, as MM-Interleaved's evaluation lays them out (`context`):

    all       caption 1<image>caption 2<image>caption 3      captions and frames
    images    <image><image>caption 3                        frames
    text      caption 1 caption 2 caption 3                  captions
    current   caption 3                                      the caption alone

A frame that the model drew stands in the prompts of later ones (`history=drawn`), so that frames
are drawn one after another; with `history=true`, true frames do.

Scores: FID, whose name has the size of the images, between all drawn and all true frames, and the
mean CLIP cosines of each with its true frame and with its caption. `story_fid=true` adds the mean of
the FIDs of single stories, of at most five images each. `official/stories.html` shows the stories.

`protocol=minigpt-5` asks as that paper (Zheng et al. 2023, arXiv 2310.02239) does: every frame, with
true frames as history. Its variants are

    final step      protocol=minigpt-5,frames=last
    multi-step      protocol=minigpt-5, and context=all, text, images or current

Its code draws one of two wordings by chance, of which the first is taken here, and compares images
with the target of training, a row of image tokens, in place of the caption.
"""  # noqa: E501

import dataclasses
import hashlib
import io
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from typing import ClassVar

import numpy as np

from metamorph_jax import files
from metamorph_jax.data import images
from metamorph_jax.data.sets import stories as sets
from metamorph_jax.data.sets.stories import FRAMES, Stories, Story
from metamorph_jax.data.sources.base import IMAGE, ImageRef
from metamorph_jax.errors import BadSample, ConfigError
from metamorph_jax.eval import page
from metamorph_jax.eval.images import measures
from metamorph_jax.eval.tasks.base import (
    AnswerImage,
    File,
    Picture,
    Protocol,
    Question,
    Record,
    Task,
    by_unit,
    one_of,
    write_json,
)
from metamorph_jax.eval.tasks.measured_drawing import DECODED, MEASURED, MeasuredDrawing

MINIGPT5 = (
    "Give the following images in <Img>ImageContent</Img> format. You will be able to see the "
    "images once I provide it to you. Please understanding images and generate story.###Human:"
    "{history} %s ###Assistant:"
)
TAGGED = f"<Img>{IMAGE}</Img>"
VIST_FILES = (
    File("test.story-in-sequence.json", "stories, or annotations/test_formatted_filtered.json, "
         "or val_cleaned.json with val_image_mapping.json",
         "visionandlanguage.net/VIST, or MM-Interleaved's hub page, or MiniGPT-5's"),
    File("test", "images PHOTO_ID.jpg, or images/test_images/PHOTO_ID.png",
         "visionandlanguage.net/VIST"),
)  # fmt: skip
CONTEXTS = ("all", "images", "text", "current")
SHOWN = 48  # stories on the page
_SIDE = 160  # pixels of a frame on the page, at most
_STORYDALLE = "StoryDALL-E's archive (github.com/adymaharana/storydalle)"


@dataclasses.dataclass(frozen=True)
class StoryDrawing(MeasuredDrawing):
    """Attributes:
    split: train, val or test.
    frames: which are drawn: "last", the fifth; "all"; "next", all that have something before them;
        or numbers from 1, as in "2+4". MM-Interleaved's "all" never has the fifth: 1+2+3+4.
    context: what the model reads, one of `CONTEXTS`.
    history: "drawn" or "true" frames in it.
    prompt: what the model is asked; `{story}` stands for the context, or `{history}` for what comes
        before the caption, with a line break after it if it is not empty, and `{caption}` for that.
    mark: how a frame is written in `{history}`.
    literal: the prompt is without a chat template around it, see `base.Question`.
    seed: of the choice of a frame in a clip.
    story_fid: the mean of the FIDs of single stories, too.
    protocol: "mm-interleaved" measures FID at 64 px and draws at its guidance of 3.5, "minigpt-5"
        is described above.
    """

    split: str = "test"
    frames: str = "last"
    context: str = "all"
    history: str = "drawn"
    prompt: str = "{story}"
    mark: str = IMAGE
    literal: bool = False
    seed: int = 0
    story_fid: bool = False
    protocol: str = ""

    scored_by: ClassVar[tuple[str, ...]] = (*MeasuredDrawing.scored_by, "story_fid")
    protocols: ClassVar = {
        "mm-interleaved": Protocol({"fid_size": 64}, {"guidance": (3.5,)}),
        "minigpt-5": Protocol({
            "split": "val", "frames": "all", "history": "true", "literal": True, "mark": TAGGED,
            "prompt": MINIGPT5 % "Generate an image with the scene description: {caption}",
            "story_fid": True, "force": False, **MEASURED,
        }, DECODED),
    }  # fmt: skip
    clips: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        one_of(self, split=sets.SPLITS, context=CONTEXTS, history=("drawn", "true"))
        if not ("{story}" in self.prompt or "{caption}" in self.prompt):
            raise ConfigError(f"task {self.name}: prompt must have {{story}} or {{caption}}: "
                              f"{self.prompt!r}")  # fmt: skip
        if self.mark.count(IMAGE) != 1:
            raise ConfigError(f"task {self.name}: mark must have one {IMAGE}: {self.mark!r}")
        self.targets  # noqa: B018  checks frames

    @property
    def main(self) -> str:
        return self.asked.fid if self.inception else f"100 x {measures.IMAGE}"

    @property
    def targets(self) -> tuple[int, ...]:
        """Indices, from 0, of the frames that are drawn."""
        return numbered(self.name, self.frames)

    def stories(self) -> Stories:
        """All stories of the split."""
        raise NotImplementedError

    # ---- the contract of tasks

    def questions(self) -> Iterable[Question]:
        for story in self._stories.found:
            for k in self.targets:
                yield self._question(story, k)

    @cached_property
    def _stories(self) -> Stories:
        return told(self, self.stories())

    def _question(self, story: Story, k: int) -> Question:
        frame = story.frames[k]
        seen = range(k) if self.context in ("all", "images") else ()
        more = {
            "caption": frame.text, "real": frame.image, "story": story.id, "frame": k + 1,
            "texts": [f.text for f in story.frames], "truth": [f.image for f in story.frames],
        }  # fmt: skip
        return Question(
            f"{story.id}/{k + 1}",
            self._prompt(story, k, bool(seen)),
            tuple(self._picture(story, i) for i in seen),
            gold=frame.text, unit=story.id, groups={"frame": str(k + 1)}, more=more,
            literal=self.literal,
        )  # fmt: skip

    def _prompt(self, story: Story, k: int, seen: bool) -> str:
        parts = {
            "{story}": laid_out(story, k, self.context),
            "{history}": before(story, k, self.context, self.mark),
            "{caption}": story.frames[k].text,
        }
        pattern = "|".join(map(re.escape, parts))
        prompt = re.sub(pattern, lambda found: parts[found[0]], self.prompt)
        if prompt.count(IMAGE) != k * seen:
            raise ConfigError(f"task {self.name}: the prompt shows {prompt.count(IMAGE)} of "
                              f"{k * seen} frames: {files.shown(prompt, 300)}")  # fmt: skip
        return prompt

    @property
    def group(self) -> str:
        return "stories" if self.story_fid else ""

    def _picture(self, story: Story, k: int) -> Picture:
        """Frame k as later questions have it."""
        if self.history == "drawn" and k in self.targets:
            return AnswerImage(f"{story.id}/{k + 1}")
        path = story.frames[k].image
        return partial(_png, path, self.number_in(path)) if self.clips else path

    def number_in(self, path: str) -> int:
        """Which frame of a clip is taken; the same in every run."""
        name = str(pathlib.PurePath(path).relative_to(self.root))
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % sets.tiles(path)

    def finish(self, records: Sequence[Record]) -> list[Record]:
        """With files of the true frames that were cut out of clips, in OUT/TASK/true."""
        drawn = [record for record in records if record.get("drawn")]
        if not (self.clips and drawn):
            return list(records)
        folder = pathlib.Path(drawn[0]["drawn"][0]).parents[1] / "true"
        folder.mkdir(exist_ok=True)
        written: dict[str, str] = {}
        for record in drawn:
            for path in record["more"]["truth"]:
                if path not in written:
                    place = folder / f"{len(written):06}.png"
                    files.write_whole(place, _png(path, self.number_in(path)))
                    written[path] = str(place)
        found = []
        for record in records:
            more = record["more"]
            truth = [written.get(path, path) for path in more["truth"]]
            more = more | {"truth": truth, "real": truth[more["frame"] - 1]}
            found.append(record | {"more": more})
        return found

    def write(self, records, folder):
        """Besides, stories.json (of each drawn frame its story, number, caption and files) and
        stories.html."""
        rows = [{key: r["more"][key] for key in ("story", "frame", "caption", "real")}
                | {"drawn": r["drawn"][0]} for r in self.chosen(records)]  # fmt: skip
        return [
            *super().write(records, folder),
            write_json(folder / "stories.json", rows),
            page.write(folder / "stories.html", as_page(self, self.chosen(records))),
        ]


def numbered(task: str, frames: str) -> tuple[int, ...]:
    """Indices, from 0, of the frames that a text names: last, all, next, or numbers as in "2+4".

    Raises:
        ConfigError: with the name of the task.
    """
    named = {"last": (FRAMES - 1,), "all": range(FRAMES), "next": range(1, FRAMES)}
    if frames in named:
        return tuple(named[frames])
    numbers = frames.split("+")
    if not all(n in map(str, range(1, FRAMES + 1)) for n in numbers):
        raise ConfigError(f"task {task}: frames={files.shown(frames)}, expected last, all, next, "
                          f"or numbers from 1 to {FRAMES}: 2+4")  # fmt: skip
    return tuple(sorted({int(number) - 1 for number in numbers}))


def vist_stories(task: Task, split: str, text: str) -> Stories:
    """The stories of VIST's files in a task's folder, see `data/sets/stories.py`.

    Raises:
        MissingFile: naming the task.
    """
    formatted = (f"annotations/{split}_formatted{end}.json" for end in ("_filtered", ""))
    task.find(*formatted, f"{split}.story-in-sequence.json", f"{split}_cleaned.json")
    return sets.vist(task.root, split, text)


def told(task: Task, found: Stories) -> Stories:
    """The stories; what was left out is printed."""
    if found.left_out:
        print(f"{task.name}: {found.message()}", file=sys.stderr)
    return found


def laid_out(story: Story, k: int, context: str) -> str:
    """The story up to the caption of frame k, as the context has it."""
    texts = [frame.text for frame in story.frames[: k + 1]]
    if context == "all":
        return IMAGE.join(texts)
    if context == "text":
        return " ".join(texts)
    return IMAGE * (k if context == "images" else 0) + texts[-1]


def before(story: Story, k: int, context: str, mark: str) -> str:
    """What comes before the caption of frame k, as the context has it, with a line break after it;
    "" if there is nothing.

    mark: how a frame is written.
    """
    texts = [frame.text for frame in story.frames[:k]]
    told = {
        "all": "".join(text + mark for text in texts),
        "images": mark * k,
        "text": " ".join(texts),
        "current": "",
    }[context]
    return f"{told}\n" if told else ""


def _png(path: str, number: int) -> bytes:
    """A frame of a clip as a PNG file."""
    data = io.BytesIO()
    sets.frame_of(path, number).save(data, "PNG")
    return data.getvalue()


@dataclasses.dataclass(frozen=True)
class Vist(StoryDrawing):
    """VIST: photographs of people's albums, five to a story.

    Attributes:
        text: of the published files: "text", in lower case with names masked, or "original_text".
    """

    text: str = "text"

    title: ClassVar[str] = "VIST, frames of stories"
    files: ClassVar[tuple[File, ...]] = VIST_FILES

    def __post_init__(self):
        super().__post_init__()
        one_of(self, text=("text", "original_text"))

    def stories(self) -> Stories:
        return vist_stories(self, self.split, self.text)


@dataclasses.dataclass(frozen=True)
class Pororo(StoryDrawing):
    """PororoSV: clips of a cartoon; test has episodes that training has not."""

    title: ClassVar[str] = "PororoSV, frames of stories"
    clips: ClassVar[bool] = True
    files: ClassVar[tuple[File, ...]] = (
        File("descriptions.npy", "captions", _STORYDALLE),
        File("img_cache4.npy", "first clips of stories", _STORYDALLE),
        File("following_cache4.npy", "the four clips after each", _STORYDALLE),
        File("train_seen_unseen_ids.npy", "the splits", _STORYDALLE),
    )

    def stories(self) -> Stories:
        for file in self.files:
            self.find(file.path)
        return sets.pororo(self.root, self.split)


@dataclasses.dataclass(frozen=True)
class Flintstones(StoryDrawing):
    """FlintstonesSV: clips of a cartoon."""

    title: ClassVar[str] = "FlintstonesSV, frames of stories"
    clips: ClassVar[bool] = True
    files: ClassVar[tuple[File, ...]] = (
        File("train-val-test_split.json", "the splits", _STORYDALLE),
        File("flintstones_annotations_v1-0.json", "captions", _STORYDALLE),
        File("video_frames_sampled", "clips CLIP.npy, or video_frames_sampled_png/CLIP.png",
             _STORYDALLE),
    )  # fmt: skip

    def stories(self) -> Stories:
        for file in self.files[:2]:
            self.find(file.path)
        return sets.flintstones(self.root, self.split)


# ---- the page


def as_page(task: StoryDrawing, records: Sequence[Record]) -> page.Page:
    """The first stories: of each, all captions with the true frames and those that were drawn."""
    told = list(by_unit(records).items())
    sections = [
        page.Section(f"Story {files.shown(id, 60)}", [page.ImageGrid(_cells(own), _SIDE)])
        for id, own in told[:SHOWN]
    ]
    lead = (
        f"{min(len(told), SHOWN)} of {len(told)} stories. Of each frame, the true image comes "
        "first, then the one that was drawn. "
        f"Context: {task.context}; frames in it: {task.history}."
    )
    return page.Page(task.title, lead, sections)


def _cells(records: Sequence[Record]) -> list[page.Cell]:
    """A cell for each frame of a story."""
    drawn = {record["more"]["frame"]: record["drawn"][0] for record in records}
    more, cells = records[0]["more"], []
    for number, (text, truth) in enumerate(zip(more["texts"], more["truth"], strict=True), 1):
        pair = [_small(truth, f"true frame {number}", "reference" if number in drawn else "")]
        if number in drawn:
            pair.append(_small(drawn[number], f"drawn frame {number}"))
        line = page.Line(files.shown(text, 400), "strong" if number in drawn else "")
        cells.append(page.Cell([one for one in pair if one is not None], [line]))
    return cells


def _small(path: str, alt: str, tone: str = "") -> page.Image | None:
    """A small copy of an image; None if it can't be read."""
    try:
        (image,) = images.load([ImageRef(path)])
    except BadSample:
        return None
    image.thumbnail((2 * _SIDE, 2 * _SIDE))
    return page.Image(np.asarray(image), alt, tone)

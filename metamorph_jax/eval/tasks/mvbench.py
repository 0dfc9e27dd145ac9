"""MVBench: 20 kinds of questions about videos, by choosing an option.

| file under the task's root | what | from |
|---|---|---|
| json/action_sequence.json, … (20 files) | questions | huggingface.co/datasets/OpenGVLab/MVBench |
| video/star/Charades_v1_480/…, see `FOLDERS` | videos, and a folder of frames each | the same |

Some of the videos (NTU RGB+D, TVQA) need a licence of their own; questions whose video is missing
are left out and counted.

Prompt: `SYSTEM`, "Question: …", "Options:", "(A) …" a line each, "Only give the best option.". The
official notebook also begins the reply with "Best option:("; here the model writes all of it.
"""

import dataclasses
import functools
import io
import os
import re
from collections.abc import Callable, Sequence
from typing import ClassVar

from metamorph_jax import files
from metamorph_jax.data import reading
from metamorph_jax.data.images import MAX_PIXELS
from metamorph_jax.data.sources import video
from metamorph_jax.errors import BadSample, ConfigError, FileError
from metamorph_jax.eval.tasks.base import (
    LETTERS,
    Answer,
    File,
    Question,
    Record,
    Task,
    by_group,
    lettered,
    mean,
    mean_terms,
    write_json,
)

SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail "
    "and movement of objects, and the action and pose of persons. Based on your observations, "
    "select the best option that accurately addresses the question."
)
_STAR, _CLEVRER = "star/Charades_v1_480", "clevrer/video_validation"
_PERCEPTION = "perception/videos"
# Task -> folder of its videos under video/.
FOLDERS = {
    "action_sequence": _STAR, "action_prediction": _STAR, "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos", "unexpected_action": "FunQA_test/test",
    "object_existence": _CLEVRER, "object_interaction": _STAR, "object_shuffle": _PERCEPTION,
    "moving_direction": _CLEVRER, "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video", "action_count": _PERCEPTION, "moving_count": _CLEVRER,
    "moving_attribute": _CLEVRER, "state_change": _PERCEPTION, "fine_grained_pose": "nturgbd",
    "character_order": _PERCEPTION, "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq", "counterfactual_inference": _CLEVRER,
}  # fmt: skip
_FRAMES_A_SECOND = 3.0  # of videos that are folders of frames
_SOURCE = "huggingface.co/datasets/OpenGVLab/MVBench"


@dataclasses.dataclass(frozen=True)
class MVBench(Task):
    """MVBench: multiple choice about videos; the mean over all questions.

    Attributes:
        frames: of each video, from the middles of as many equal parts. The official notebook has
            16; each takes as many tokens as an image.
        only: names of some of the 20 kinds with + between them; "": all.
    """

    frames: int = 16
    only: str = ""

    title: ClassVar = "MVBench"
    other_scores: ClassVar = ("mean of kinds",)
    scores_of_groups: ClassVar = ("{kind}",)
    max_new_tokens: ClassVar = 16
    files: ClassVar = (
        File("json", "the questions, a file for each kind", _SOURCE),
        File("video", "the videos", _SOURCE),
    )

    def __post_init__(self):
        unknown = {*filter(None, self.only.split("+"))} - FOLDERS.keys()
        if unknown:
            raise ConfigError(f"task {self.name or 'mvbench'}: only={'+'.join(sorted(unknown))}, "
                              f"expected some of {', '.join(FOLDERS)}")  # fmt: skip
        if not 1 <= self.frames <= 1000:
            raise ConfigError(f"task {self.name or 'mvbench'}: frames={self.frames}, expected 1 to "
                              "1000")  # fmt: skip

    def questions(self):
        self.find("json")
        for kind in self.only.split("+") if self.only else FOLDERS:
            path = self.find(f"json/{kind}.json")
            for number, row in enumerate(reading.json_file(path, list)):
                where = f"{path}[{number}]"
                reading.required(row, where, "candidates", texts=("video", "question", "answer"))
                yield self._question(kind, number, row, where)

    def _question(self, kind: str, number: int, row: dict, where: str) -> Question:
        choices = reading.text_list(row["candidates"], files.shown(where))
        if row["answer"] not in choices:
            raise FileError(f"{files.shown(where)}: the answer is none of the candidates")
        right = max(k for k, text in enumerate(choices) if text == row["answer"])  # as officially
        bounds = [row.get(key) for key in ("start", "end")]
        if not all(b is None or (isinstance(b, int | float) and 0 <= b < 1e6) for b in bounds):
            raise FileError(f"{files.shown(where)}: start and end are seconds, not {bounds}")
        path = self.path("video", FOLDERS[kind], row["video"])
        clip = Clip(path, *bounds, self.frames)
        options = lettered(choices, "({letter}) {text}")
        return Question(
            f"{kind}/{number}",
            f"{SYSTEM}\nQuestion: {row['question']}\nOptions:\n{options}\nOnly give the best "
            "option.",
            clip.pictures,
            gold=LETTERS[right],
            groups={"kind": kind},
            more={"video": row["video"], "choices": len(choices)},
        )

    def record(self, question: Question, answer: Answer) -> Record:
        letter = chosen_letter(answer.text, question.more["choices"])
        right = letter == question.gold
        return {"answer": letter, "score": float(right), "parsed": letter is not None}

    def scores(self, records):
        """Accuracy over all questions, the mean of the kinds, and each kind."""
        kinds = {name: mean(group) for name, group in by_group(records, "kind").items()}
        average = sum(kinds.values()) / len(kinds)
        return {"accuracy": mean(records), "mean of kinds": average} | kinds

    def terms(self, record):
        return mean_terms(record, "kind")

    def write(self, records, folder):
        """{kind: [{"video", "pred", "gt"}]}, much like the official notebook's file."""
        rows: dict[str, list] = {}
        for r in records:
            row = {"video": r["more"]["video"], "pred": r["reply"], "gt": f"({r['gold']})"}
            rows.setdefault(r["groups"]["kind"], []).append(row)
        return [write_json(folder / "mvbench_results.json", rows)]


def chosen_letter(reply: str, choices: int) -> str | None:
    """The letter of an option in the first word of a reply: "A", "(a)", "A." or "(A)text".

    The official rule takes a first word that is contained in "(a)" or contains it, so that an empty
    reply counts as right; here it needs a letter."""
    word = (reply.lower().split() or [""])[0].replace(".", "")
    for letter in LETTERS[:choices]:
        option = f"({letter.lower()})"
        if option in word or (word in option and re.search("[a-z]", word)):
            return letter
    return None


# ---- frames


@dataclasses.dataclass(frozen=True)
class Clip:
    """A part of a video file, or of a folder of frames "00001.jpg", …

    Attributes:
        path: of the file or folder.
        start, end: in seconds; None: all of it.
        frames: how many are taken.
    """

    path: str
    start: float | None
    end: float | None
    frames: int

    @property
    def pictures(self) -> tuple[Callable[[], bytes], ...]:
        """A function for each frame that gives it as the bytes of an image."""
        return tuple(functools.partial(_frame, self, k) for k in range(self.frames))


def frame_numbers(count: int, fps: float, start: float | None, end: float | None, frames: int,
                  first: int = 0) -> list[int]:  # fmt: skip
    """The middles of equal parts of a clip, as frame numbers.

    Args:
        count: number of the last frame.
        fps: frames per second.
        start, end: in seconds; None: all of it.
        frames: how many are wanted.
        first: number of the first frame.
    """
    begin = first if start is None else max(first, round(start * fps))
    stop = min(round(end * fps), count) if end is not None else count
    part = (stop - begin) / frames
    numbers = (int(begin + part / 2 + round(part * k)) for k in range(frames))
    return [max(first, min(number, count)) for number in numbers]  # some bounds lie outside


def _frame(clip: Clip, number: int) -> bytes:
    return _frames(clip)[number]


@functools.lru_cache(maxsize=2)  # frames of a clip are asked for one after the other
def _frames(clip: Clip) -> Sequence[bytes]:
    if os.path.isdir(clip.path):
        names = sorted(name for name in os.listdir(clip.path) if name.lower().endswith(".jpg"))
        if not names:
            raise BadSample("bad_video", f"{files.shown(clip.path)} has no frames")
        wanted = frame_numbers(len(names), _FRAMES_A_SECOND, clip.start, clip.end, clip.frames, 1)
        return [files.read_bytes(os.path.join(clip.path, names[n - 1])) for n in wanted]
    from PIL import Image

    info = video.probe(clip.path)
    wanted = frame_numbers(info.frames - 1, info.fps, clip.start, clip.end, clip.frames)
    pixels = video.decode_frames(clip.path, wanted, MAX_PIXELS)
    out = {}
    for n in set(wanted):
        buffer = io.BytesIO()
        Image.fromarray(pixels[n]).save(buffer, "JPEG", quality=95)  # as PNG, 20 GB in all
        out[n] = buffer.getvalue()
    return [out[n] for n in wanted]

"""Kinds of records that MiniGPT-5 is trained on, in the official files or in one's own.

| kind                    | file of the source                         | samples                      |
|-------------------------|--------------------------------------------|------------------------------|
| cc3m, cc3m_test         | TSV with `caption` and `image_path`        | row -> image; every 100th is |
|                         |                                            | also asked for in words      |
| vist, vist_test         | a file of VIST, see `data/sets/stories.py` | steps of stories             |
| mmdialog, mmdialog_test | conversations.json of MMDialog             | turns of dialogues           |
| drawn_caption           | any, with an image and its `caption`       | caption -> image             |
| answers                 | conversations as everywhere                | each answer; images of       |
|                         |                                            | earlier ones are read        |
| text, images, image     | conversations as everywhere                | one each                     |

The last row are the kinds of `data/sources/kinds.py`: images of questions are read, those of answers
are drawn, any number of them. `caption`, or `captions` with one for each image, may say what they
show, for the caption loss.

The others write their own prompts, as published weights have seen them (`wordings.py`), whatever
the chat template. Those for tests have one sample for each image or turn to be tested, and are cut by
no length. Images of a question that has none are not made up: the reference passes a black one, which
is never read.
"""  # noqa: E501

import dataclasses
import os
from collections.abc import Callable

import numpy as np

from metamorph_jax.data.sets import stories
from metamorph_jax.data.sets.captions import cleaned
from metamorph_jax.data.sets.dialogues import DialogueTurns, recent
from metamorph_jax.data.sources import documents
from metamorph_jax.data.sources.base import IMAGE, ImageRef
from metamorph_jax.data.sources.kinds import KINDS as COMMON
from metamorph_jax.data.sources.kinds import Files, Kind, recognise, turns_of
from metamorph_jax.data.sources.records import open_records
from metamorph_jax.data.sources.schema import canonical
from metamorph_jax.data.sources.split import SplitRecords
from metamorph_jax.data.sources.tsv import TsvRecords
from metamorph_jax.errors import BadSample, FileError
from metamorph_jax.files import shown
from metamorph_jax.recipes.minigpt5 import wordings

EVERY = 100  # of so many captions, one is also asked for in words
LONGEST_TURN = 50  # tokens of a turn of a dialogue, in training


def by_name_only(record: dict) -> bool:
    """The kind is asked for by the source."""
    return False


def _sample(source: str, target: str, images):
    return (("source", source), ("target", target + wordings.END)), tuple(images)


# ---- captions


class CaptionRows:
    """The rows of a TSV file, and again, marked as `asked`, row 0, 100, 200, …

    Args:
        every: so many rows; 0 for none of the latter.
    """

    def __init__(self, path: str, index_dir: str | None = None, every: int = EVERY):
        self.path, self.every = path, every
        self.rows = TsvRecords(path, ("caption",), index_dir)
        if not {"image_path", "image"} & {*self.rows.names}:
            raise FileError(f"{shown(path)}: the first line names no column image_path or image")
        self._index_dir = index_dir

    def __reduce__(self):  # worker processes read the file themselves
        return CaptionRows, (self.path, self._index_dir, self.every)

    def __len__(self) -> int:
        n = len(self.rows)
        return n + (-(-n // self.every) if self.every else 0)

    def __getitem__(self, k: int) -> dict:
        row, asked = self._at(k)
        return self.rows[row] | {"id": f"cc3m_{row}{'_instruction' * asked}", "asked": asked}

    def where(self, k: int) -> str:
        """File and line of record k."""
        return self.rows.where(self._at(k)[0])

    def _at(self, k: int) -> tuple[int, bool]:
        """(row, whether it is asked for in words); the latter come directly after the former."""
        if not self.every:
            return k, False
        block, k = divmod(k, self.every + 1)
        return block * self.every + max(k - 1, 0), k == 1


def caption_rows(path: str, index_dir: str | None) -> CaptionRows:
    return CaptionRows(path, index_dir)


def plain_caption_rows(path: str, index_dir: str | None) -> CaptionRows:
    return CaptionRows(path, index_dir, 0)


def caption_row(record: dict, files: Files, rng: np.random.Generator):
    """The image of a caption, or of a request that has the caption in it."""
    path = record["image_path"] if "image_path" in record else record["image"]
    return _captioned(record["caption"], files.image(path), record["asked"], rng)


def drawn_caption(record: dict, files: Files, rng: np.random.Generator):
    """The image of a caption, of records and members of tars as kind `pair` has them."""
    turns, (image,) = documents.pair(record, files, rng)
    caption = "".join(text for _, text in turns).replace(IMAGE, "")
    return _captioned(caption, image, False, rng)


def _captioned(caption: str, image: ImageRef, asked: bool, rng: np.random.Generator):
    text = cleaned(caption)
    if not text:
        raise BadSample("no_text", "the caption is empty")
    source = text
    if asked:
        prefix = wordings.choose(wordings.PREFIXES, rng)
        source = wordings.filled(wordings.CAPTION, prefix=prefix, caption=text)
        source = wordings.CAPTION_SYSTEM + source
    return _sample(source, IMAGE, [dataclasses.replace(image, caption=text)])


# ---- stories

DRAW, NEXT, TELL = "gen", "multimodal", "understanding"  # as the reference names samples


class StorySteps:
    """The samples of VIST's stories: of each step one that is drawn from its text; of those after
    the first, also one whose text and image come next, and one whose text tells of the image.

    A record is {"id": "<story>_<step>-<task>", "task": …, "frames": those up to the step}. Images
    are named from the folder of the set, which is the source's `root`: the one that the file is in,
    or, if that is `annotations`, the one above.

    Args:
        training: whether there are the two latter.
    """

    def __init__(self, path: str, training: bool = True):
        self.path, self.training = path, training
        whole = os.path.abspath(path)
        self.stories = list(stories.vist_file(whole))
        self.folder = os.path.dirname(whole)
        if "_formatted" in os.path.basename(whole):
            self.folder = os.path.dirname(self.folder)
        lengths = np.array([len(story.frames) for story in self.stories], np.int64)
        self.ends = np.cumsum(np.maximum(3 * lengths - 2 if training else lengths, 1))

    def __reduce__(self):  # worker processes read the file themselves
        return StorySteps, (self.path, self.training)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, k: int) -> dict:
        story, step, task = self._at(k)
        if story.fault or not story.frames:
            raise BadSample("bad_record", story.fault or "a story without steps")
        frames = [
            dataclasses.replace(frame, image=os.path.relpath(frame.image, self.folder))
            for frame in story.frames[: step + 1]
        ]
        return {"id": f"{story.id}_{step}-{task}", "task": task, "frames": frames}

    def where(self, k: int) -> str:
        """File, story and step of record k."""
        story, step, _ = self._at(k)
        return f"{shown(self.path)} story {shown(story.id, 60)} step {step}"

    def _at(self, k: int) -> tuple[stories.Story, int, str]:
        number = int(np.searchsorted(self.ends, k, side="right"))
        k -= int(self.ends[number - 1]) if number else 0
        if not self.training or k == 0:
            return self.stories[number], k, DRAW
        step, task = divmod(k - 1, 3)
        return self.stories[number], step + 1, (DRAW, NEXT, TELL)[task]


def story_steps(path: str, index_dir: str | None) -> StorySteps:
    return StorySteps(path)


def drawn_story_steps(path: str, index_dir: str | None) -> StorySteps:
    return StorySteps(path, training=False)


def story_step(record: dict, files: Files, rng: np.random.Generator):
    """One step of a story; those before it are given."""
    *before, frame = record["frames"]
    if not all(f.text.strip() for f in record["frames"]):
        raise BadSample("no_text", "a step without text")
    refs = [files.image(f.image) for f in record["frames"]]
    story = wordings.story([f.text for f in before])
    templates = {DRAW: wordings.SCENE, NEXT: wordings.NEXT, TELL: wordings.TELL}[record["task"]]
    source = wordings.STORY_SYSTEM + wordings.filled(
        wordings.choose(templates, rng), story=story, text=frame.text, image=wordings.READ
    )
    target = {DRAW: IMAGE, NEXT: f"{frame.text} {IMAGE}", TELL: frame.text}[record["task"]]
    return _sample(source, target, refs)


# ---- dialogues


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """Builds the samples of `DialogueTurns`: the last turn from those before it.

    A dialogue ends where a turn can't be used: it has no text, or the name of an image in its
    place, or its image is missing, or it is too long. So this and all later samples are bad.

    Attributes:
        ids: text -> ids, by which the length of a turn is counted; None: no turn is too long.
    """

    ids: Callable[[str], list[int]] | None = None

    def __call__(self, record: dict, files: Files, rng: np.random.Generator):
        """The turn, from the last question and answer before it."""
        number, turns = record["turn"], record["turns"]
        refs = [self._image(turn, k, files) for k, turn in enumerate(turns)]
        first = recent(number)
        pieces = [wordings.DIALOGUE_SYSTEM]
        for k in range(first, number):
            read = [wordings.READ] if refs[k] else []
            pieces += [wordings.SPEAKERS[k % 2], turns[k].text, *read]
        source = " ".join([*pieces, wordings.SPEAKERS[number % 2]])
        target = " ".join([turns[number].text, *([IMAGE] if refs[number] else [])])
        return _sample(source, target, [ref for ref in refs[first:] if ref])

    def _image(self, turn, number: int, files: Files) -> ImageRef | None:
        """The image of a turn, if it has one.

        Raises:
            BadSample: the dialogue ends before this turn.
        """
        if not turn.text.strip():
            raise BadSample("no_text", f"turn {number} has no text")
        if turn.text.endswith(".jpg"):
            raise BadSample("text_is_image", f"turn {number} names an image in place of a text")
        ref = files.image(turn.image) if turn.image else None
        if ref is not None and not os.path.exists(ref.path):
            raise BadSample("missing", f"turn {number}: {shown(turn.image)}")
        if self.ids is not None and len(self.ids(turn.text)) > LONGEST_TURN:
            raise BadSample("long_turn", f"turn {number}: more than {LONGEST_TURN} tokens")
        return ref


# ---- one's own


@dataclasses.dataclass(frozen=True)
class WithCaptions:
    """Builds a common kind of record, with the captions of its images.

    Attributes:
        kind: name of the kind.
    """

    kind: str

    def __call__(self, record: dict, files: Files, rng: np.random.Generator):
        """What the kind makes of the record."""
        turns, refs = COMMON[self.kind].build(record, files, rng)
        given = record.get("captions", record.get("caption"))
        if given in (None, "", []):
            return turns, refs
        captions = given if isinstance(given, list) else [given]
        if len(captions) != len(refs) or not all(isinstance(text, str) for text in captions):
            raise BadSample("bad_record", f"captions must be texts, one for each of {len(refs)} "
                            "images")  # fmt: skip
        pairs = zip(refs, captions, strict=True)
        return turns, tuple(dataclasses.replace(ref, caption=text) for ref, text in pairs)


class Answers:
    """A record for each answer of conversations, as it is, with "answer": its number."""

    def __init__(self, path: str, index_dir: str | None = None):
        self.path, self._index_dir = path, index_dir
        self.records = open_records(path, index_dir)
        self.split = SplitRecords(self.records, _answers, "answer", index_dir)

    def __reduce__(self):  # worker processes read the files themselves
        return Answers, (self.path, self._index_dir)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, k: int) -> dict:
        record, number = self.split.at(k)
        return self.records[record] | {"answer": number}

    def where(self, k: int) -> str:
        """File and place of the record, and which answer."""
        return self.split.where(k)


def _answers(record: dict) -> int:
    """How many answers a conversation has."""
    turns = turns_of(canonical(record)) if isinstance(record, dict) else ()
    return sum(role == "assistant" for role, _ in turns)


def answer(record: dict, files: Files, rng: np.random.Generator):
    """One answer, from all that was said before it; images of earlier answers are read."""
    read = canonical({key: value for key, value in record.items() if key != "answer"})
    turns, refs = WithCaptions(recognise(read))(read, files, rng)
    markers = sum(text.count(IMAGE) for _, text in turns)
    if markers != len(refs):
        raise BadSample("marker_mismatch", f"{markers} markers, {len(refs)} images")
    asked = 2 * record["answer"] + 1
    if asked >= len(turns):
        raise BadSample("bad_record", "nothing is answered")
    pieces = [read.get("system") or wordings.DIALOGUE_SYSTEM]
    for k, (_, text) in enumerate(turns[:asked]):
        pieces += [wordings.SPEAKERS[k % 2], text.replace(IMAGE, wordings.READ)]
    count = sum(text.count(IMAGE) for _, text in turns[: asked + 1])
    source = " ".join([*pieces, wordings.SPEAKERS[1]])
    return _sample(source, turns[asked][1], refs[:count])


def kinds(ids: Callable[[str], list[int]] | None = None) -> dict[str, Kind]:
    """All kinds of the module's table.

    Args:
        ids: of a text, see `Dialogue`.
    """
    official = {
        "cc3m": (caption_row, caption_rows),
        "cc3m_test": (caption_row, plain_caption_rows),
        "vist": (story_step, story_steps),
        "vist_test": (story_step, drawn_story_steps),
        "mmdialog": (Dialogue(ids), DialogueTurns),
        "mmdialog_test": (Dialogue(), DialogueTurns),
        "drawn_caption": (drawn_caption, None),
        "answers": (answer, Answers),
    }
    own = {
        name: dataclasses.replace(COMMON[name], build=WithCaptions(name))
        for name in ("text", "images", "image")
    }
    return own | {
        name: Kind(by_name_only, build, True, read) for name, (build, read) in official.items()
    }


KINDS = kinds()

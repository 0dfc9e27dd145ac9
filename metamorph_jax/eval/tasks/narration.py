"""Sentences of VIST's stories, told from the story so far: narration.

The files are those of `vist` (`tasks/stories.py`). The model reads captions and frames before a
step (`context`), and, with `seen=true`, the frame of the step; it writes the step's sentence. With
`draw=true` it may draw, too: its images are kept for people to compare (`metamorph eval pairs`),
and are not scored here.

    style=plain     in plain words
    style=hashes    in the first of MiniGPT-5's wordings (Zheng et al. 2023, arXiv 2310.02239),
                    without a chat template

Scores: METEOR, ROUGE-L, BLEU and CIDEr by the COCO tools (`scorers/captions.py`, also for the
choice of the tokeniser), with the true sentence as the only reference, and with `sentences=SPEC`
the mean similarity of Sentence-BERT. An empty reply counts as 0. The album scores of the VIST
challenge compare whole stories with all of an album's, and are others.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import ClassVar

from metamorph_jax.data.sets import stories as sets
from metamorph_jax.data.sets.stories import Stories, Story
from metamorph_jax.data.sources.base import IMAGE
from metamorph_jax.eval.scorers import captions, replies
from metamorph_jax.eval.sentences import open_sentences
from metamorph_jax.eval.tasks.base import (
    Answer,
    File,
    Protocol,
    Question,
    Record,
    Task,
    mean,
    one_of,
    write_json,
)
from metamorph_jax.eval.tasks.measured_drawing import DECODED
from metamorph_jax.eval.tasks.stories import (
    MINIGPT5,
    TAGGED,
    VIST_FILES,
    before,
    numbered,
    told,
    vist_stories,
)

CONTEXTS = ("all", "images", "text")
SIMILARITY, DRAWN = "100 x sentence similarity", "images, % of replies"


@dataclasses.dataclass(frozen=True)
class Style:
    """Attributes:
    next, seen: the prompt without and with the frame of the step; `{history}` stands for what comes
        before it.
    image: how a frame is written.
    literal: without a chat template around it.
    """

    next: str
    seen: str
    image: str = IMAGE
    literal: bool = False


STYLES = {
    "plain": Style(
        "Here is the beginning of a story:\n{history}\nWrite the next sentence of it.",
        "Here is the beginning of a story:\n{history}\nWrite the next sentence of it, about this "
        f"image: {IMAGE}",
    ),
    "hashes": Style(
        MINIGPT5 % "Tell me the next scene with image.",
        MINIGPT5 % f"Tell me the next scene description by this image: {TAGGED}",
        TAGGED,
        True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Narration(Task):
    """VIST: sentences of stories, from what comes before them.

    Attributes:
        split: train, val or test.
        text: of the published files: "text", in lower case with names masked, or "original_text".
        frames: which sentences are told: "next", all but the first; "last"; or numbers from 2, as
            in "2+4".
        context: what the model reads of the steps before, one of `CONTEXTS`.
        seen: it sees the frame of the step, too.
        draw: it may draw; force: then, a model that can be told to draws in every reply.
        style: one of `STYLES`.
        tokenizer: "ptb" (needs Java, as METEOR does) or "python", see `scorers/captions.py`.
        sentences: weights of a sentence encoder; "": no similarity of sentences.
        protocol: "minigpt-5" asks and decodes as its paper does, on the validation set.
    """

    split: str = "test"
    text: str = "text"
    frames: str = "next"
    context: str = "all"
    seen: bool = False
    draw: bool = False
    force: bool = True
    style: str = "plain"
    tokenizer: str = "ptb"
    sentences: str = ""
    protocol: str = ""

    title: ClassVar[str] = "VIST, narration"
    max_new_tokens: ClassVar[int] = 256
    scored_by: ClassVar[tuple[str, ...]] = ("tokenizer", "sentences")
    files: ClassVar[tuple[File, ...]] = VIST_FILES
    protocols: ClassVar = {
        "minigpt-5": Protocol({"split": "val", "style": "hashes", "force": False}, DECODED)
    }

    def __post_init__(self):
        one_of(self, split=sets.SPLITS, context=CONTEXTS, style=STYLES,
               tokenizer=captions.TOKENIZERS, text=("text", "original_text"))  # fmt: skip
        if 0 in numbered(self.name, self.frames):
            one_of(self, frames=("next", "last", "numbers from 2"))

    @property
    def form(self) -> str:
        return "draw" if self.draw else "generate"

    @property
    def reply(self):
        drawing = "both" if self.force else ""
        return {"mode": drawing if self.draw else "text", "rounds": 0}

    @property
    def main(self) -> str:
        return "METEOR" if self.tokenizer == "ptb" else "ROUGE-L"

    # ---- questions

    @cached_property
    def _stories(self) -> Stories:
        return told(self, vist_stories(self, self.split, self.text))

    def questions(self) -> Iterable[Question]:
        captions.check_tools(self.tokenizer)  # now, not after the last answer
        for story in self._stories.found:
            for k in numbered(self.name, self.frames):
                yield self._question(story, k)

    def _question(self, story: Story, k: int) -> Question:
        style, frame = STYLES[self.style], story.frames[k]
        history = before(story, k, self.context, style.image)
        prompt = (style.seen if self.seen else style.next).replace("{history}", history)
        shown = story.frames[: k * (self.context != "text")]
        return Question(
            f"{story.id}/{k + 1}",
            prompt,
            tuple(f.image for f in (*shown, *[frame] * self.seen)),
            gold=frame.text, unit=story.id, groups={"frame": str(k + 1)},
            more={"story": story.id, "frame": k + 1, "given": self._given(story, k)},
            literal=style.literal,
        )  # fmt: skip

    def _given(self, story: Story, k: int) -> list[tuple[str, str]]:
        """What comes before, as people are shown it, see `people/documents.py`."""
        pairs = [(frame.text, frame.image) for frame in story.frames[:k]]
        return [*pairs, *[("", story.frames[k].image)] * self.seen]

    # ---- scores

    def record(self, question: Question, answer: Answer) -> Record:
        said = " ".join(replies.said(answer.text).split())
        return {"score": None, "parsed": bool(said), "said": said}

    def finish(self, records: Sequence[Record]) -> list[Record]:
        """With "measured", the numbers of each sentence (its ROUGE-L is the "score"), and "alike",
        its similarity."""
        ours, true = [r["said"] for r in records], [r["gold"] for r in records]
        tokens = captions.tokenized([*ours, *true], self.tokenizer)
        pairs = tokens[: len(ours)], [[text] for text in tokens[len(ours) :]]
        rows = captions.measured(*pairs, meteor=self.tokenizer == "ptb")
        found = [r | {"measured": row, "score": row["rouge"]}
                 for r, row in zip(records, rows, strict=True)]  # fmt: skip
        if self.sentences:
            alike = replies.elements(open_sentences(self.sentences).similarities, ours, true)
            found = [r | {"alike": 0.0 if isinstance(one, str) else one}
                     for r, one in zip(found, alike, strict=True)]  # fmt: skip
        return found

    def score_names(self) -> set[str]:
        alike, drawn = [SIMILARITY] * bool(self.sentences), [DRAWN] * self.draw
        return {*captions.NAMES, *alike, *drawn}

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        found = captions.corpus_scores([record["measured"] for record in records])
        if self.sentences:
            found[SIMILARITY] = mean(records, "alike")
        if self.draw:
            found[DRAWN] = mean([{"drawn": bool(r.get("drawn"))} for r in records], "drawn")
        return dict(sorted(found.items(), key=lambda item: item[0] != self.main))

    def terms(self, record: Record) -> dict[str, tuple[float, float]]:
        found = {"ROUGE-L": (record["measured"]["rouge"], 1.0)}
        return found | ({SIMILARITY: (record["alike"], 1.0)} if self.sentences else {})

    def write(self, records: Sequence[Record], folder) -> list:
        """narration.json: of each sentence its story, number, text and true text."""
        rows = [{"story": r["more"]["story"], "frame": r["more"]["frame"], "text": r["reply"],
                 "true_text": r["gold"]} for r in records]  # fmt: skip
        return [write_json(folder / "narration.json", rows)]

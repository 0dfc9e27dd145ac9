"""MMDialog: the next turn of a dialogue, with an image where there is one.

    ROOT/test/conversations.json        JSON lines; or test_conversations.txt, MiniGPT-5's name
    ROOT/test/-5632896413199993329.jpg  images by their media keys

Every turn but the first of a dialogue is a question, whose history is true. A dialogue ends before
the first turn that can't be used: one without text, with the name of an image in its place, or with
an image that is missing; how many end so is printed. Access to the set is by request.

    style=plain         "A: … B: …", after a sentence that says what to do
    style=hashes        MiniGPT-5's words (Zheng et al. 2023, arXiv 2310.02239), without a template
    history=all, last   all turns; or those after the last but one answer, as MiniGPT-5 has it

Scores are means over dialogues of means over turns (`scorers/replies.py`): BLEU-1 and BLEU-2 of
words and, as MiniGPT-5's table has it, of characters; ROUGE-L as it is meant and, likewise, of sets
of words; with `sentences=SPEC` the similarity of Sentence-BERT; with `clip=SPEC` MM-Relevance, and
the mean cosine of drawn with true images; with `inception=FILE` the inception score of what was
drawn. MiniGPT-5 took CLIP ViT-B/32 and all-MiniLM-L6-v2. Of several drawn images the first counts.
"""

import collections
import dataclasses
import os
import sys
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from metamorph_jax.data import reading
from metamorph_jax.data.sets import dialogues as sets
from metamorph_jax.data.sources.base import IMAGE
from metamorph_jax.errors import BadSample, FileError
from metamorph_jax.eval.images import features, measures, statistics
from metamorph_jax.eval.images.features import ImageSet
from metamorph_jax.eval.scorers import captions, replies
from metamorph_jax.eval.sentences import open_sentences
from metamorph_jax.eval.tasks.base import (
    Answer,
    File,
    Protocol,
    Question,
    Record,
    by_unit,
    one_of,
    write_json,
    write_json_lines,
)
from metamorph_jax.eval.tasks.measured_drawing import DECODED, MEASURED, MeasuredDrawing
from metamorph_jax.files import shown

_SOURCE = "github.com/victorsungo/MMDialog, by request"
TRUE, DRAWN = "images, % of true turns", "images, % of replies"


@dataclasses.dataclass(frozen=True)
class Style:
    """How a dialogue is written.

    Attributes:
        begin: before the dialogue.
        speakers: before the turns of the first and of the second.
        turns: between turns.
        image: how an image is written.
        literal: without a chat template around it.
    """

    begin: str
    speakers: tuple[str, str]
    turns: str = "\n"
    image: str = IMAGE
    literal: bool = False

    def written(self, before: Sequence[sets.Turn], first: int) -> str:
        """The prompt for the turn after these.

        first: number of the first of them in the dialogue
        """
        pieces = []
        for k, turn in enumerate(before, first):
            image = [self.image] if turn.image else []
            pieces.append(" ".join([self.speakers[k % 2], turn.text, *image]))
        pieces.append(self.speakers[(first + len(before)) % 2])
        return self.begin + self.turns.join(pieces)


STYLES = {
    "plain": Style(
        "Here is a dialogue of two people who share images. Write what is said next, with an image "
        "where one belongs to it.\n\n",
        ("A:", "B:"),
    ),
    "hashes": Style(
        "Give the following images in <Img>ImageContent</Img> format. You will be able to see the "
        "images once I provide it to you. Please generate conversations with appropriate images. ",
        ("###Human:", "###Assistant:"),
        " ",
        f"<Img>{IMAGE}</Img>",
        True,
    ),
}


@dataclasses.dataclass(frozen=True)
class MMDialog(MeasuredDrawing):
    """Attributes:
    split: test, valid or train.
    draw: it may draw, with `force` in every reply; without, only texts are scored, of models that
        draw nothing.
    style, history: see the module's docstring.
    sentences: weights of a sentence encoder; "": no similarity of sentences.
    protocol: "minigpt-5" asks, decodes and measures as its paper does.
    """

    split: str = "test"
    draw: bool = True
    force: bool = False
    style: str = "plain"
    history: str = "all"
    sentences: str = ""
    protocol: str = ""

    title: ClassVar[str] = "MMDialog, the next turn"
    scored_by: ClassVar[tuple[str, ...]] = (*MeasuredDrawing.scored_by, "sentences")
    without_intervals: ClassVar[str] = "only means over dialogues and CLIP's means have intervals"
    files: ClassVar[tuple[File, ...]] = (
        File("test/conversations.json", "dialogues, or test/test_conversations.txt", _SOURCE),
        File("test", "the images, MEDIA_KEY.jpg", _SOURCE),
    )
    protocols: ClassVar = {
        "minigpt-5": Protocol({"style": "hashes", "history": "last", **MEASURED}, DECODED)
    }

    def __post_init__(self):
        super().__post_init__()
        one_of(self, split=("train", "valid", "test"), style=STYLES, history=("all", "last"))

    @property
    def main(self) -> str:
        return f"100 x {replies.RELEVANCE if self.clip else replies.BLEU[0]}"

    @property
    def form(self) -> str:
        return "draw" if self.draw else "generate"

    @property
    def reply(self):
        drawing = "both" if self.force else ""
        return {"mode": drawing if self.draw else "text", "rounds": 0}

    # ---- questions

    def questions(self) -> Iterable[Question]:
        captions.check_tools("python")  # now, not after the last answer
        path = self.find(f"{self.split}/conversations.json",
                         f"{self.split}/{self.split}_conversations.txt")  # fmt: skip
        ends = collections.Counter()
        for number, record in enumerate(reading.json_lines(path)):
            id = str(record.get("conversation_id", number))
            turns = self._usable(record, f"{shown(path)}, line {number + 1}", ends)
            for k in range(1, len(turns)):
                yield self._question(id, turns, k)
        if ends:
            why = ", ".join(f"{count:,}: {reason}" for reason, count in ends.items())
            print(f"{self.name}: dialogues that end early or are left out: {why}", file=sys.stderr)

    def _usable(self, record: dict, where: str, ends: collections.Counter) -> list[sets.Turn]:
        """The turns up to the first that can't be used, whose reason is counted.

        Raises:
            FileError: it is not a dialogue.
        """
        try:
            turns = sets.turns_of(record)
        except BadSample as error:
            raise FileError(f"{where}: {error.detail}") from error
        for k, turn in enumerate(turns):
            if why := self._unusable(turn):
                ends[why] += 1
                return turns[:k]
        if len(turns) < 2:
            ends["fewer than two turns"] += 1
        return turns

    def _unusable(self, turn: sets.Turn) -> str:
        if not turn.text.strip():
            return "no text"
        if turn.text.endswith(".jpg"):
            return "the name of an image as text"
        missing = turn.image and not os.path.isfile(self.path(self.split, turn.image))
        return "an image is missing" if missing else ""

    def _question(self, id: str, turns: Sequence[sets.Turn], k: int) -> Question:
        style, turn = STYLES[self.style], turns[k]
        first = sets.recent(k) if self.history == "last" else 0
        places = {t.image: self.path(self.split, t.image) for t in turns[: k + 1] if t.image}
        return Question(
            f"{id}_{k}",
            style.written(turns[first:k], first),
            tuple(places[t.image] for t in turns[first:k] if t.image),
            gold=turn.text, unit=id, literal=style.literal,
            more={"turn": k, "caption": None, "real": places.get(turn.image),
                  "given": [(t.text, places.get(t.image, "")) for t in turns[:k]]},
        )  # fmt: skip

    # ---- scores

    def record(self, question: Question, answer: Answer) -> Record:
        said = replies.said(answer.text)
        return {"score": None, "parsed": bool(said or answer.images), "said": said}

    def finish(self, records: Sequence[Record]) -> list[Record]:
        """With "texts", text scores of the turn, and "elements", of its text and its image; as
        "score" its ROUGE-L."""
        ours, true = [r["said"] for r in records], [replies.said(r["gold"]) for r in records]
        texts = [replies.text_scores(*pair) for pair in zip(ours, true, strict=True)]
        if self.sentences:
            alike = replies.elements(open_sentences(self.sentences).similarities, ours, true)
            for scores, element in zip(texts, alike, strict=True):
                if scores:
                    scores[replies.SENTENCES] = 0.0 if element == replies.MISSING else element
        found = [r | {"texts": s, "score": s.get(replies.ROUGE)}
                 for r, s in zip(records, texts, strict=True)]  # fmt: skip
        if not self.clip:
            return found
        network = features.open_clip(self.clip)
        drawn = [record.get("drawn", ("",))[0] for record in records]
        real = [record["more"]["real"] or "" for record in records]
        pairs = zip(
            replies.elements(lambda *both: _of_texts(network, *both), ours, true),
            replies.elements(lambda *both: _of_images(network, *both), drawn, real),
            strict=True,
        )
        return [record | {"elements": pair} for record, pair in zip(found, pairs, strict=True)]

    def failed(self, records: Sequence[Record]) -> tuple[str, ...]:
        """Turns whose true image has no drawn one."""
        return tuple(r["unit"] for r in records if r["more"]["real"] and not r.get("drawn"))

    def real(self, used: Sequence[str]) -> tuple[str, ...]:
        return ()  # the paper has no distance

    def score_names(self) -> set[str]:
        names = [*replies.BLEU, replies.ROUGE, replies.ROUGE_OF_SETS]
        names += [replies.SENTENCES] * bool(self.sentences)
        names += [replies.RELEVANCE] * bool(self.clip)
        return super().score_names() | {TRUE, DRAWN} | {f"100 x {name}" for name in names}

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        found = {f"100 x {name}": 100 * float(np.mean(values))
                 for name, values in self._dialogues(records).items()}  # fmt: skip
        found |= super().scores(records)
        true = sum(bool(record["more"]["real"]) for record in records)
        found[TRUE] = 100 * true / len(records)
        drawn = sum(bool(record.get("drawn")) for record in records)
        found[DRAWN] = 100 * drawn / len(records)
        return dict(sorted(found.items(), key=lambda item: item[0] != self.main))

    def intervals(self, records: Sequence[Record]) -> dict[str, tuple[float, float]]:
        """Of means over dialogues, by resampling dialogues."""
        own = {}
        for name, values in self._dialogues(records).items():
            if len(values) > 1:
                low, high = statistics.interval(np.array(values))
                own[f"100 x {name}"] = 100 * low, 100 * high
        return own | super().intervals(records)

    @staticmethod
    def _dialogues(records: Sequence[Record]) -> dict[str, list[float]]:
        """Score -> its value in each dialogue that has it."""
        found: dict[str, list[float]] = {}
        for turns in by_unit(records).values():
            for name, value in replies.of_dialogue(turns).items():
                found.setdefault(name, []).append(value)
        return found

    def write(self, records: Sequence[Record], folder) -> list:
        """replies.jsonl, a turn a line, and scores.json."""
        rows = ({"id": r["id"], "text": r["reply"], "images": list(r.get("drawn", ())),
                 "true_text": r["gold"], "true_image": r["more"]["real"]}
                for r in records)  # fmt: skip
        written = [write_json_lines(folder / "replies.jsonl", rows)]
        if found := self._found(records):
            written.append(write_json(folder / "scores.json", measures.as_json(found)))
        return written


def _of_texts(network: features.Clip, ours: Sequence[str], true: Sequence[str]) -> np.ndarray:
    vectors, cut = network.texts([*ours, *true])
    if cut:
        print(f"{cut} texts were cut to CLIP's {network.length} tokens", file=sys.stderr)
    return statistics.cosines(vectors[: len(ours)], vectors[len(ours) :])


def _of_images(network: features.Clip, drawn: Sequence[str], true: Sequence[str]) -> np.ndarray:
    """NaN where one of both can't be used, which is printed."""
    paths = tuple(dict.fromkeys([*drawn, *true]))
    found = network.features(ImageSet(paths))
    vectors = {paths[i]: row for i, row in zip(found.kept, found.values, strict=True)}
    for path, reason in found.bad.items():
        print(f"{shown(path)} can't be compared: {shown(reason)}", file=sys.stderr)
    nothing = np.full(found.values.shape[1], np.nan)
    sides = (np.stack([vectors.get(path, nothing) for path in side]) for side in (drawn, true))
    return statistics.cosines(*sides)

"""What tasks share whose drawn images are measured by networks: FID, CLIP, inception score.

Of each record, `more` holds the "caption" that was drawn from and the "real" image that belongs to
it. CLIP's means are given over the images that were drawn, and once more with 0 for each that was
not: one that the model declined to draw, or could not because it had not drawn the one before.

The measures and their settings are those of `metamorph score` (`eval/images/measures.py`).
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

from metamorph_jax.eval.images import measures
from metamorph_jax.eval.tasks.base import Answer, Question, Record, Task, write_json
from metamorph_jax.files import shown

# How MiniGPT-5's published code (arXiv 2310.02239) measures and decodes, for its protocols.
MEASURED = {"fid_whole": True, "full_score": True}
DECODED = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 2.0, "guidance": (7.5,)}
MEASURES = tuple(field.name for field in dataclasses.fields(measures.Measures))


@dataclasses.dataclass(frozen=True)
class MeasuredDrawing(Task):
    """Attributes:
    inception, tower, clip, fid_size, fid_64, prefix, statistics, fid_whole, full_score: see
        `measures.Measures`.
    force: a model that can be told to begins its reply with an image; otherwise it decides whether
        it draws, and a reply without an image is a failure.
    """

    inception: str = ""
    tower: str = ""
    clip: str = ""
    fid_size: int | None = 256
    fid_64: bool = False
    prefix: str = ""
    statistics: str = ""
    fid_whole: bool = False
    full_score: bool = False
    force: bool = True

    form: ClassVar[str] = "draw"
    max_new_tokens: ClassVar[int] = 256
    resamples: ClassVar[int] = 0
    without_intervals: ClassVar[str] = (
        "no interval of a Fréchet distance or an inception score: images that a resample has twice "
        "raise the distance, so a bootstrap's interval would lie above the score"
    )
    scored_by: ClassVar[tuple[str, ...]] = MEASURES

    def __post_init__(self):
        self.asked  # noqa: B018  checks fid_size

    @property
    def asked(self) -> measures.Measures:
        return measures.Measures(**{name: getattr(self, name) for name in MEASURES})

    @property
    def main(self) -> str:
        return self.asked.fid

    @property
    def reply(self):
        return {"mode": "image" if self.force else "", "rounds": 0}

    # ---- for tasks to change

    def real(self, used: Sequence[str]) -> tuple[str, ...]:
        """The real images that distances are to.

        used: that of each image that was drawn, in order.
        """
        return tuple(used)

    def chosen(self, records: Sequence[Record]) -> list[Record]:
        """The records whose images are scored."""
        return [record for record in records if record.get("drawn")]

    def failed(self, records: Sequence[Record]) -> tuple[str, ...]:
        """The unit of each image that was to be drawn and was not."""
        drawn = {record["id"] for record in self.chosen(records)}
        return tuple(record["unit"] for record in records if record["id"] not in drawn)

    @property
    def group(self) -> str:
        """What units are called, if the mean of their own FIDs is wanted; "": it isn't."""
        return ""

    # ---- the contract of tasks

    def record(self, question: Question, answer: Answer) -> Record:
        return {"score": None, "parsed": bool(answer.images)}

    def score_names(self) -> set[str]:
        shown = {_as_shown(name)[0] for name in self.asked.names(self.group)}
        return {self.main, *self.other_scores} | shown

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        found = self._found(records)
        if found is None:
            return {}
        values = {}
        for name, value in found.values.items():
            shown, scale = _as_shown(name)
            values[shown] = scale * value
        return dict(sorted(values.items(), key=lambda item: item[0] != self.main))

    def intervals(self, records: Sequence[Record]) -> dict[str, tuple[float, float]]:
        """Of CLIP's scores, which are means over images."""
        found, intervals = self._found(records), {}
        for name, (low, high) in (found.intervals if found else {}).items():
            shown, scale = _as_shown(name)
            intervals[shown] = scale * low, scale * high
        return intervals

    def write(self, records: Sequence[Record], folder) -> list:
        """captions.json ({name of an image: caption}, what `metamorph score` and CLIPScore's own
        script read) and scores.json."""
        kept = self.chosen(records)
        pairs = {pathlib.Path(r["drawn"][0]).stem: r["more"]["caption"] for r in kept}
        written = [write_json(folder / "captions.json", pairs)]
        if found := self._found(records):
            written.append(write_json(folder / "scores.json", measures.as_json(found)))
        return written

    def _found(self, records: Sequence[Record]) -> measures.Scores | None:
        """The scores of these records; they take minutes, so they are kept."""
        kept = self.chosen(records)
        paths = tuple(record["drawn"][0] for record in kept)
        if not paths:
            return None
        key = paths, self.failed(records)
        if key not in self._known:
            used = [record["more"]["real"] for record in kept]
            captions = tuple(record["more"]["caption"] for record in kept)
            units = tuple(record["unit"] for record in kept)
            drawn = measures.Drawn(
                paths, captions, tuple(used), self.real(used), units, key[1], self.group
            )
            found = self._known[key] = measures.score(drawn, self.asked)
            for note in found.notes:
                print(f"{self.name}: {shown(note, 500)}", file=sys.stderr)
        return self._known[key]

    @cached_property
    def _known(self) -> dict:
        return {}


def _as_shown(name: str) -> tuple[str, int]:
    """(name in the table, factor) of a measure."""
    hundred = name.removesuffix(measures.FAILED) in (
        measures.TEXT,
        measures.IMAGE,
        measures.CLIPSCORE,
    )
    return (f"100 x {name}", 100) if hundred else (name, 1)

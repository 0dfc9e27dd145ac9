"""How far a model can be trusted as a judge of drawn images: questions about images that we made.

One or two kinds of coloured shapes, their number, colours and places, as GenEval asks for them. Of
each kind of question as many are true as false, so that guessing reaches 50 %. The questions, their
wording and the way in which they are answered are those of the judge of `geneval` and `dpg`.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import ClassVar

import numpy as np

from metamorph_jax.eval.images import contents
from metamorph_jax.eval.images.contents import COLORS, SHAPES, Thing
from metamorph_jax.eval.images.geneval import RELATIONS, Check
from metamorph_jax.eval.images.judging import VERDICTS, asked
from metamorph_jax.eval.tasks.base import Answer, Question, Record, Task, by_group, mean

KINDS = ("object", "count", "color", "position")


@dataclasses.dataclass(frozen=True)
class MadeImages(Task):
    """Attributes:
    count: questions of each kind, half of them true.
    seed: of the images.
    side: of the images, in pixels.
    """

    count: int = 100
    seed: int = 0
    side: int = 224

    title: ClassVar[str] = "Judges of images, on images that we made"
    other_scores: ClassVar = ("answers that are yes",)
    scores_of_groups: ClassVar = ("{kind}",)
    form: ClassVar[str] = "choose"

    def questions(self) -> Iterable[Question]:
        for kind in KINDS:
            for number in range(self.count):
                rng = np.random.default_rng([self.seed, KINDS.index(kind), number])
                check, things = make(kind, number % 2 == 0, rng, self.side)
                picture = partial(contents.png, things, self.side)
                gold = VERDICTS[0 if number % 2 == 0 else 1]
                yield Question(f"{kind}-{number}", asked(check.question), (picture,),
                               choices=VERDICTS, gold=gold, groups={"kind": kind})  # fmt: skip

    def record(self, question: Question, answer: Answer) -> Record:
        return {"score": float(answer.text == question.gold)}

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        found = {"accuracy": mean(records)}
        found |= {kind: mean(own) for kind, own in by_group(records, "kind").items()}
        said = [record["reply"] == VERDICTS[0] for record in records]
        return found | {"answers that are yes": 100 * float(np.mean(said))}


def make(kind: str, true: bool, rng: np.random.Generator, side: int) -> tuple[Check, list[Thing]]:
    """A question of a kind that is true or false, and the things of its image."""
    while True:
        name, other = map(str, rng.permutation(SHAPES)[:2])
        color, second = map(str, rng.permutation(list(COLORS))[:2])
        count = int(rng.integers(2, 5))
        kinds = [(name, color), (other, second)]
        if kind == "object":
            check = Check(kind, name if true else str(rng.permutation(
                [shape for shape in SHAPES if shape not in (name, other)])[0]))  # fmt: skip
        elif kind == "count":
            near = count if true else count + int(rng.choice((-1, 1)))
            kinds, check = [(name, color)] * near, Check(kind, name, count, count)
        elif kind == "color":
            check = Check(kind, name, color=color if true else second)
        else:
            relation = str(rng.choice(RELATIONS))
            check = Check(kind, name, relation=relation, other=other)
        things = contents.scatter(kinds, rng, side)
        # Of places, only clear ones: a false one is the opposite of what is asked.
        opposite = dict(zip(RELATIONS, (RELATIONS[i] for i in (1, 0, 3, 2)), strict=True))
        if kind == "position" and not true:
            turned = dataclasses.replace(check, relation=opposite[check.relation])
            clear = contents.holds(turned, things)
        else:
            clear = True
        if clear and contents.holds(check, things) == true:
            return check, things

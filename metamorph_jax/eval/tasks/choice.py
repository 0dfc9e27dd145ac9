"""What multiple-choice tasks share: lettered prompts, ranking by likelihood, parsers of replies."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from metamorph_jax.eval.scorers.choices import mmbench_choice
from metamorph_jax.eval.tasks.base import (
    LETTER,
    LETTERS,
    Answer,
    Question,
    Record,
    Task,
    lettered,
    one_of,
)

Parser = Callable[[str, Mapping[str, str]], str | None]


def exact(reply: str, options: Mapping[str, str]) -> str | None:
    """The reply, if it is a letter of the options and nothing else."""
    return reply if reply in options else None


def first(reply: str, options: Mapping[str, str]) -> str | None:
    """The first character of the reply, if it is a letter of the options."""
    return exact(reply[:1].upper(), options)


def found(reply: str, options: Mapping[str, str]) -> str | None:
    """The letter that the reply names, or whose option it repeats (the rules of MMBench)."""
    return mmbench_choice(reply, options)


PARSERS: dict[str, Parser] = {"exact": exact, "first": first, "found": found}


@dataclasses.dataclass(frozen=True)
class MultipleChoice(Task):
    """A task whose questions have lettered options.

    Attributes:
        form: "generate" a letter, or "choose" the most likely option, of which the prompt then says
            nothing but the question.
        parser: how a letter is found in a reply, one of `PARSERS`.
        normalise: rank by log-likelihood per token, not by the sum.
    """

    form: str = "generate"
    parser: str = "found"
    normalise: bool = False

    suffix: ClassVar[str] = LETTER

    def __post_init__(self):
        one_of(self, parser=PARSERS, form=("generate", "choose"))

    def ask(
        self, id: str, text: str, options: Sequence[str], right: int | str | None, *,
        before: str = "", prompt: str | None = None, more: Mapping = {}, **others,
    ) -> Question:  # fmt: skip
        """A question.

        Args:
            text: of the question; before: a line before it, such as a hint.
            options: texts, of A, B, …
            right: index or letter of the right one, None where it is not public.
            prompt: of the form "generate", where it isn't text, options and suffix, a line each.
            more, others: fields of `Question`.
        """
        if wrong := [each for each in (text, *options) if not isinstance(each, str)]:
            raise TypeError(f"question {id}: {wrong[0]!r} where a text should be")
        letters = LETTERS[: len(options)]
        gold = LETTERS[right] if type(right) is int else right
        if gold is not None and (gold not in letters or len(gold) != 1):
            raise ValueError(f"question {id}: {gold!r} is right, of the options {letters}")
        asked = f"{before}\n{text}" if before else text
        if prompt is None:
            prompt = f"{asked}\n{lettered(options)}\n{self.suffix}"
        choose = self.form == "choose"
        return Question(
            id,
            asked if choose else prompt,
            choices=tuple(options) if choose else (),
            gold=gold,
            more={**more, "options": list(options)},
            **others,
        )

    def letter(self, question: Question, answer: Answer) -> str | None:
        """What was chosen."""
        options = dict(zip(LETTERS, question.more["options"], strict=False))
        if answer.choice is not None:
            return LETTERS[answer.choice]
        return PARSERS[self.parser](answer.text, options)

    def record(self, question: Question, answer: Answer) -> Record:
        letter = self.letter(question, answer)
        score = None if question.gold is None else float(letter == question.gold)
        return {"score": score, "letter": letter, "parsed": letter is not None}


def known(records: Sequence[Record]) -> list[Record]:
    """The records whose right answer is public."""
    return [record for record in records if record["score"] is not None]

"""Multiple choice: ScienceQA with its ensembles, and MMBench's choice from a reply."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

FAILED = "FAILED"
LETTERS = "ABCDE"
_THE_ANSWER_IS = re.compile(r"The answer is ([A-Z]).", re.DOTALL)


# ---- ScienceQA


def scienceqa_letter(reply: str) -> str:
    """The letter that a reply chooses, or FAILED.

    Either the reply is a letter, or starts as "B. ", or says "The answer is B" exactly once with
    one more character after it (the original's pattern ends in any character)."""
    if reply in {*LETTERS}:
        return reply
    if reply[:1] and reply[0] in LETTERS and reply[1:3] == ". ":
        return reply[0]
    return ensemble_letter(reply)


def ensemble_letter(reply: str) -> str:
    """The letter of "The answer is B." if the reply says it exactly once, else FAILED."""
    found = _THE_ANSWER_IS.findall(reply)
    return found[0] if len(found) == 1 else FAILED


def choice_index(letter: str, choices: Sequence[str]) -> int:
    """Index of a letter among the choices of a question, −1 if it has no such choice."""
    return LETTERS[: len(choices)].find(letter)


@dataclasses.dataclass(frozen=True)
class ScienceQAScores:
    """Counts, per cent, and the chosen index per problem (−1: no valid choice)."""

    correct: int
    count: int
    image_correct: int
    image_count: int
    results: dict[str, int]

    @property
    def accuracy(self) -> float:
        return 100 * self.correct / self.count if self.count else 0.0

    @property
    def image_accuracy(self) -> float:
        return 100 * self.image_correct / self.image_count if self.image_count else 0.0


def scienceqa_scores(problems: Mapping[str, Mapping], replies: Mapping[str, str],
                     with_image: Iterable[str]) -> ScienceQAScores:  # fmt: skip
    """Scores of all problems; one without a reply is wrong.

    Args:
        problems: id → official record (`choices`, `answer`).
        replies: id → text.
        with_image: ids that count for the accuracy with image.
    """
    chosen = {
        key: choice_index(scienceqa_letter(replies.get(key, "")), problem["choices"])
        for key, problem in problems.items()
    }
    right = {key for key, choice in chosen.items() if choice == problems[key]["answer"]}
    images = {*with_image} & problems.keys()
    return ScienceQAScores(len(right), len(problems), len(right & images), len(images), chosen)


@dataclasses.dataclass(frozen=True)
class EnsembleScores:
    """Right answers of ScienceQA's ensembles with a text-only model; `count` problems in all."""

    count: int
    ours: int
    other: int  # the text-only model alone; what can't be parsed is wrong
    other_failed: int  # its answers that can't be parsed
    complement: int  # its answer, ours where it can't be parsed
    judged: int  # the second answer after it has seen both outputs, ours where it can't be parsed
    upper: int  # either is right
    results: dict[str, int]  # the judged choice of each problem


def ensemble_scores(
    problems: Mapping[str, Mapping],
    ours: Mapping[str, str],
    other: Mapping[str, str],
    second: Mapping[str, str],
) -> EnsembleScores:
    """The paper's ensembles of our answers with GPT-4's.

    The original draws a random choice where the other model's own line or the upper bound needs an
    answer that can't be parsed; here it counts as wrong, so that results can be reproduced.

    Args:
        problems: id → official record.
        ours, other: id → the outputs of our model and of the text-only model.
        second: id → what the text-only model says once it has seen both; may lack ids.
    """
    counts: collections.Counter = collections.Counter()
    results = {}
    for key, problem in problems.items():
        letters = [ensemble_letter(replies.get(key, "")) for replies in (ours, other, second)]
        mine, theirs, again = (choice_index(letter, problem["choices"]) for letter in letters)
        results[key] = mine if letters[2] == FAILED else again
        truth = problem["answer"]
        counts += collections.Counter(
            ours=mine == truth,
            other=theirs == truth,
            other_failed=letters[1] == FAILED,
            complement=(mine if letters[1] == FAILED else theirs) == truth,
            judged=results[key] == truth,
            upper=truth in (mine, theirs),
        )
    names = [f.name for f in dataclasses.fields(EnsembleScores)][1:-1]
    return EnsembleScores(len(problems), *(counts[name] for name in names), results)


# ---- MMBench


_DELETED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# "the answer is a" is A, "the answer is a dog" isn't.
_ANSWER_IS = re.compile(r"(?i:answer\s+is)\s+\**(?:([A-Z])\b|([a-z])\b(?!\s+\w))")
_LAST_WORDS = 4


def mmbench_choice(reply: str, choices: Mapping[str, str]) -> str | None:
    """The letter that a reply chooses, or None. choices: letter → text of the option."""
    return mmbench_letter(reply, choices) or mmbench_text(reply, choices)


def mmbench_letter(reply: str, choices: Mapping[str, str]) -> str | None:
    """The only option letter among the words, if it first stands within the last four words; else
    that of "answer is B"; else None."""
    words = reply.translate(_DELETED).split()
    found = [letter for letter in choices if letter in words]
    if len(found) == 1 and words.index(found[0]) >= len(words) - _LAST_WORDS:
        return found[0]
    said = _ANSWER_IS.search(reply)
    letter = (said.group(1) or said.group(2)).upper() if said else None
    return letter if letter in choices else None


def mmbench_text(reply: str, choices: Mapping[str, str]) -> str | None:
    """The only option whose text the reply contains, else None.

    Case doesn't matter; a reply of more than twice the length of all options chooses nothing."""
    if len(reply) > 2 * sum(len(text) for text in choices.values()):
        return None
    found = [letter for letter, text in choices.items() if text.lower() in reply.lower()]
    return found[0] if len(found) == 1 else None

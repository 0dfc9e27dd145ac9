"""The score of people's answers to a study (`study.py`): wins, ties and losses of its first system.

Answers about one unit (a story, a dialogue), and those of one person, depend on each other, so the
95 % intervals are percentiles of a bootstrap that draws both with replacement: an answer counts as
often as its unit was drawn times as often as its person was (the "pigeonhole" bootstrap of Owen
2007, which errs towards wide intervals). With one person, or one unit, the other alone is drawn.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metamorph_jax import files
from metamorph_jax.errors import DataError, FileError
from metamorph_jax.eval.people.study import FORMAT, QUESTIONS, SIDES, TIE

WIN, LOSS, PREFERRED = "win", "loss", "preferred"
OUTCOMES = (WIN, TIE, LOSS, PREFERRED)  # the last: wins, and half of the ties


@dataclasses.dataclass(frozen=True)
class Key:
    """Attributes:
    study: its name, which answers have, too.
    systems: names of the first and the second.
    items: item -> its entry in key.json.
    """

    study: str
    systems: tuple[str, str]
    items: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Vote:
    """An answer. outcome: of the first system, `WIN`, `TIE` or `LOSS`."""

    rater: str
    item: str
    unit: str
    question: str
    outcome: str


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one question.

    Attributes:
        votes: how many there are; raters, units: of how many people about how many units.
        rates: of `OUTCOMES`, 0 to 1.
        intervals: of these; {} where nothing can be drawn.
        agreement: share of pairs of people who gave the same answer to the same pair; None without
            such pairs.
    """

    votes: int
    raters: int
    units: int
    rates: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    agreement: float | None


# ---- files


def read_key(path: str) -> Key:
    """A study's key.json.

    Raises:
        FileError: it isn't one.
    """
    table = files.read_json(path, dict, max_bytes=2**28)
    try:
        systems, items = table["systems"], table["items"]
        if table["format"] != FORMAT:
            raise ValueError(f"format {table['format']!r}, expected {FORMAT}")
        for id, item in items.items():
            if item["left"] not in systems or not {*item["asked"]} <= {q.key for q in QUESTIONS}:
                raise ValueError(f"item {id}")
            str(item["unit"])
        return Key(table["study"], (systems["first"], systems["second"]), items)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise FileError(f"{files.shown(path)} is not the key of a study (key.json of `metamorph "
                        f"eval pairs`): {files.shown(error)}") from error  # fmt: skip


def read_votes(path: str, key: Key) -> tuple[str, list[Vote]]:
    """(who answered, the answers) of a file that a page lets people download.

    Raises:
        FileError: it is none, is of another study, or has answers that the study doesn't know.
    """
    where = files.shown(path)
    table = files.read_json(path, dict, what="answers from a page", max_bytes=2**26)
    absent = [name for name in ("format", "study", "rater", "answers") if name not in table]
    if absent:
        raise FileError(f"{where} holds no answers from a page: no {', '.join(absent)}")
    if table["format"] != FORMAT:
        raise FileError(f"{where}: format {files.shown(table['format'])}, expected {FORMAT}")
    if table["study"] != key.study:
        raise FileError(f"{where} is of another study: {files.shown(table['study'])}, and the key "
                        f"is of {files.shown(key.study)}")  # fmt: skip
    rater, answers = table["rater"], table["answers"]
    if not isinstance(rater, str) or not rater.strip():
        raise FileError(f"{where}: rater is not a name: {files.shown(repr(rater), 60)}")
    if not isinstance(answers, dict):
        raise FileError(f"{where}: answers is not an object")
    votes = []
    for id, own in answers.items():
        votes += _votes_of(rater.strip(), id, own, key, f"{where}, item {files.shown(id, 60)}")
    return rater.strip(), votes


def _votes_of(rater: str, id: str, own, key: Key, where: str) -> list[Vote]:
    item = key.items.get(id)
    if item is None:
        raise FileError(f"{where}: the study has no such item")
    if not isinstance(own, dict):
        raise FileError(f"{where}: {files.shown(repr(own), 60)}, expected an object of answers")
    votes = []
    for question, side in own.items():
        if question not in item["asked"]:
            raise FileError(f"{where}: {files.shown(question, 60)} was not asked; asked were "
                            + ", ".join(item["asked"]))  # fmt: skip
        if side not in (*SIDES, TIE):
            raise FileError(f"{where}, {question}: {files.shown(repr(side), 60)}, expected left, "
                            "tie or right")  # fmt: skip
        outcome = TIE
        if side != TIE:
            outcome = WIN if (side == "left") == (item["left"] == "first") else LOSS
        votes.append(Vote(rater, id, str(item["unit"]), question, outcome))
    return votes


def gather(paths: Sequence[str], key: Key) -> tuple[list[Vote], dict[str, int]]:
    """(all answers, person -> how many of their questions have none).

    Raises:
        FileError: see `read_votes`; or two files are of the same person.
        DataError: there is no answer.
    """
    votes, files_of, open_ = [], {}, {}
    asked = sum(len(item["asked"]) for item in key.items.values())
    for path in paths:
        rater, own = read_votes(path, key)
        if rater in files_of:
            raise FileError(f"{files.shown(path)} and {files.shown(files_of[rater])} are both of "
                            f"{files.shown(rater, 60)}: keep one")  # fmt: skip
        files_of[rater] = path
        votes += own
        open_[rater] = asked - len(own)
    if not votes:
        raise DataError("none of the files has an answer")
    return votes, open_


# ---- scores


def score(votes: Sequence[Vote], resamples: int = 1000, seed: int = 0) -> dict[str, Score]:
    """Question -> its score, in the order of the study."""
    found = {}
    for question in QUESTIONS:
        own = [vote for vote in votes if vote.question == question.key]
        if own:
            found[question.key] = _score(own, resamples, seed)
    return found


def _score(votes: Sequence[Vote], resamples: int, seed: int) -> Score:
    values = np.array([_values(vote.outcome) for vote in votes])
    raters = np.unique([vote.rater for vote in votes], return_inverse=True)
    units = np.unique([vote.unit for vote in votes], return_inverse=True)
    sizes = len(raters[0]), len(units[0])
    drawn = _drawn(values, (raters[1], units[1]), sizes, resamples, seed)
    intervals = {}
    if len(drawn):
        low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
        intervals = dict(zip(OUTCOMES, zip(low.tolist(), high.tolist(), strict=True), strict=True))
    rates = dict(zip(OUTCOMES, values.mean(0).tolist(), strict=True))
    return Score(len(votes), *sizes, rates, intervals, agreement(votes))


def _values(outcome: str) -> tuple[float, ...]:
    """1 and 0 for each of `OUTCOMES`."""
    won, tied = outcome == WIN, outcome == TIE
    return float(won), float(tied), float(outcome == LOSS), won + tied / 2


def _drawn(values, groups, sizes, resamples: int, seed: int) -> np.ndarray:
    """float64[n, outcomes] of resamples; n is 0 where nothing can be drawn, and less than
    `resamples` where some have no vote."""
    rng, found = np.random.default_rng(seed), []
    if max(sizes) < 2:
        return np.zeros((0, values.shape[1]))
    for _ in range(resamples):
        weights = np.ones(len(values))
        for members, size in zip(groups, sizes, strict=True):
            if size > 1:
                times = np.bincount(rng.integers(0, size, size), minlength=size)
                weights = weights * times[members]
        if weights.sum():
            found.append(weights @ values / weights.sum())
    return np.array(found).reshape(-1, values.shape[1])


def agreement(votes: Sequence[Vote]) -> float | None:
    """Share of pairs of people who gave the same answer to the same question about an item."""
    places: dict[tuple, list[str]] = {}
    for vote in votes:
        places.setdefault((vote.item, vote.question), []).append(vote.outcome)
    pairs = [a == b for given in places.values() for k, a in enumerate(given) for b in given[:k]]
    return sum(pairs) / len(pairs) if pairs else None

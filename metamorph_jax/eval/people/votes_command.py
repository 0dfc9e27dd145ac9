"""`metamorph eval votes`: scores what people answered to the page of `metamorph eval pairs`.

    metamorph eval votes study/key.json answers/*.json --json study/scores.json

For each question: how often the first system won, tied and lost, and how often it was preferred
(wins and half of the ties), with 95 % intervals over stories and people (`votes.py`).
"""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping

from metamorph_jax import files
from metamorph_jax.errors import UserError
from metamorph_jax.eval.people import study, votes
from metamorph_jax.eval.tasks.base import write_json

MOST_RESAMPLES = 100_000


def add_arguments(parser) -> None:
    parser.description = "Scores people's answers about two models."
    add = parser.add_argument
    add("key", metavar="KEY", help="key.json of the study")
    add("answers", nargs="+", metavar="ANSWERS", help="files that people downloaded, one each")
    add("--resamples", type=int, default=1000, metavar="N", help="of the bootstrap (default: 1000)")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add("--json", default="", metavar="FILE", help="write the scores here, too")


def run(args) -> int:
    if not 0 <= args.resamples <= MOST_RESAMPLES:
        raise UserError(f"--resamples must be from 0 to {MOST_RESAMPLES:,}")
    key = votes.read_key(args.key)
    found, open_ = votes.gather(args.answers, key)
    scores = votes.score(found, args.resamples, args.seed)
    print(table(key, scores))
    for rater, count in open_.items():
        if count:
            print(f"{files.shown(rater, 60)} left {count} questions open", file=sys.stderr)
    people = len(open_)
    if people == 1:
        print("one person answered: the intervals say nothing about what others would answer",
              file=sys.stderr)  # fmt: skip
    if args.json:
        values = {name: dataclasses.asdict(one) for name, one in scores.items()}
        write_json(pathlib.Path(args.json), {
            "study": key.study, "first": key.systems[0], "second": key.systems[1],
            "people": people, "open": open_, "resamples": args.resamples, "scores": values,
        })  # fmt: skip
    return 0


def table(key: votes.Key, scores: Mapping[str, votes.Score]) -> str:
    """The scores as text: a row for each question and outcome."""
    names = {question.key: question.name for question in study.QUESTIONS}
    first, second = (files.shown(name, 60) for name in key.systems)
    said = {votes.WIN: f"{first} better", votes.TIE: "equal", votes.LOSS: f"{second} better",
            votes.PREFERRED: f"{first} preferred, ties halved"}  # fmt: skip
    rows = [("question", "outcome", "%", "95 % interval")]
    notes = []
    for question, one in scores.items():
        for outcome, rate in one.rates.items():
            pair = one.intervals.get(outcome)
            between = f"{100 * pair[0]:.1f} – {100 * pair[1]:.1f}" if pair else ""
            label = names[question] if outcome == votes.WIN else ""
            rows.append((label, said[outcome], f"{100 * rate:.1f}", between))
        agreed = "" if one.agreement is None else f", {100 * one.agreement:.0f} % of pairs agree"
        notes.append(f"{names[question]}: {one.votes} answers of {one.raters} people about "
                     f"{one.units} units{agreed}")  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip()
             for a, b, c, d in rows]  # fmt: skip
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *notes])

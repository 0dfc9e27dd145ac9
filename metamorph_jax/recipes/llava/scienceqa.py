"""ScienceQA's own files (Lu et al. 2022, arXiv 2209.09513) as LLaVA's rows.

    python -m metamorph_jax.recipes.llava.scienceqa --folder=data/scienceqa --split=train \\
        --format=QCM-LEA --out=data/scienceqa/llava_train_QCM-LEA.json

`--folder` holds problems.json and pid_splits.json. A format is what is asked, then what is answered:

    Q question   C context (the hint, or N/A)   M options   L lecture   E solution   A answer

    QCM-LEA   Which? ⏎ Context: … ⏎ Options: (A) … (B) … ⏎ <image>   →   lecture solution The answer is B.
    CQM-A     Context: … ⏎ Question: Which? ⏎ Options: … ⏎ <image>   →   The answer is B.
    QCM-ALE   as the first   →   The answer is B. BECAUSE: lecture solution
    QCM-LEPA  as the first   →   LECTURE: … ⏎ SOLUTION: … ⏎ ### ⏎ ANSWER: B.

Blanks are collapsed as the reference does it, in one pass. In its converter, the codes AL and AE
give the other one of solution and lecture; they are not offered here.
"""  # noqa: E501

import argparse
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping

from metamorph_jax import files
from metamorph_jax.data.sources.base import IMAGE
from metamorph_jax.errors import FileError, UserError
from metamorph_jax.files import shown

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ASKED = ("QCM", "CQM")
ANSWERED = ("A", "LEA", "ALE", "LEPA")
MAX_BYTES = 2**30  # of problems.json, which has some 30 MB
FORMATS = tuple(f"{asked}-{answered}" for asked in ASKED for answered in ANSWERED)


def rows(problems: Mapping[str, Mapping], pids: Iterable[str], format: str) -> list[dict]:
    """LLaVA's rows of these problems.

    Args:
        problems: as in problems.json.
        pids: keys of `problems`.
        format: one of FORMATS.

    Raises:
        UserError: the format is not known, or a problem lacks something.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format!r} is none of {', '.join(FORMATS)}")
    made = []
    for pid in pids:
        try:
            made.append(_row(pid, problems[pid], *format.split("-")))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {shown(error)}"
            raise UserError(
                f"problems.json: problem {shown(repr(pid), 60)} can't be read ({what})"
            ) from error
    return made


def _row(pid: str, problem: Mapping, asked: str, answered: str) -> dict:
    choices, right = problem["choices"], problem["answer"]
    if not isinstance(choices, list) or type(right) is not int or right not in range(len(choices)):
        raise ValueError("choices must be a list, and answer the number of one of them")
    texts = [*(problem[key] for key in ("question", "hint", "lecture", "solution")), *choices]
    if not all(isinstance(text, str) for text in [*texts, pid, problem["image"] or ""]):
        raise TypeError("question, hint, choices, lecture, solution and image must be text")
    question, answer = _asked(problem, asked), _answered(problem, answered)
    if problem["image"]:
        human = f"{question}\n{IMAGE}"
        image = {"image": f"{pid}/{problem['image']}"}
    else:
        human, image = question, {}
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
    return {"id": pid, **image, "conversations": turns}


def _asked(problem: Mapping, order: str) -> str:
    options = " ".join(f"({LETTERS[k]}) {text}" for k, text in enumerate(problem["choices"]))
    lines = {
        "Q": f"Question: {problem['question']}",
        "C": f"Context: {problem['hint'].strip() or 'N/A'}",
        "M": f"Options: {options}",
    }
    return _tidy("\n".join(lines[letter] for letter in order)).removeprefix("Question: ")


def _answered(problem: Mapping, order: str) -> str:
    # A line break counts as text while blanks are collapsed.
    lecture, solution = (problem[key].replace("\n", "\\n") for key in ("lecture", "solution"))
    letter = LETTERS[problem["answer"]]
    answer = f"The answer is {letter}."
    if order == "LEPA":
        parts = [f"LECTURE: {lecture}\n"] if lecture.strip() else []
        parts += [f"SOLUTION: {solution}\n"] if solution.strip() else []
        text = "".join([*parts, f"###\nANSWER: {letter}."])
    else:
        text = {
            "A": answer,
            "LEA": f"{lecture} {solution} {answer}",
            "ALE": f"{answer} BECAUSE: {lecture} {solution}",
        }[order]
    return _tidy(text).replace("\\n", "\n")


def _tidy(text: str) -> str:
    return text.replace("  ", " ").strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--split", default="train", help="a key of pid_splits.json")
    parser.add_argument("--format", default="QCM-LEA", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args(argv)
    try:
        made = rows(*_read(args.folder, args.split), args.format)
        files.write_whole(args.out, json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    except UserError as error:
        print(f"scienceqa: {files.escape(str(error))}", file=sys.stderr)
        return error.code
    images = sum("image" in row for row in made)
    print(f"{len(made)} rows, {images} with an image, in {args.out}")
    return 0


def _read(folder: pathlib.Path, split: str) -> tuple[dict, list]:
    """(problems, ids of a split)."""
    splits = files.read_json(folder / "pid_splits.json", dict)
    if split not in splits:
        raise UserError(f"--split {shown(split)!r} is none of {shown(', '.join(splits))}")
    if not isinstance(splits[split], list):
        raise FileError(f"{shown(folder / 'pid_splits.json')}: {shown(split)} is not a list of ids")
    return files.read_json(folder / "problems.json", dict, max_bytes=MAX_BYTES), splits[split]


if __name__ == "__main__":
    sys.exit(main())

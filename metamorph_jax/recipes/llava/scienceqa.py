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
from metamorph_jax.errors import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ASKED = ("QCM", "CQM")
ANSWERED = ("A", "LEA", "ALE", "LEPA")
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
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"problems.json: problem {pid!r} can't be read ({what})") from error
    return made


def _row(pid: str, problem: Mapping, asked: str, answered: str) -> dict:
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
    letter = LETTERS[: len(problem["choices"])][problem["answer"]]
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
        splits = files.read_json(args.folder / "pid_splits.json", dict)
        if args.split not in splits:
            raise UserError(f"--split {args.split!r} is none of {', '.join(splits)}")
        problems = files.read_json(args.folder / "problems.json", dict)
        made = rows(problems, splits[args.split], args.format)
        args.out.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    images = sum("image" in row for row in made)
    print(f"{len(made)} rows, {images} with an image, in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""MMBench (Liu et al. 2023): a question counts if it is answered right in every order of options.

The files of later releases hold a row for each rotation (index + k * 1000000); for those that
don't, the rotations are made here. Replies from which no option can be read are wrong: the official
tool asks an LLM about these.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import ClassVar

from metamorph_jax import files
from metamorph_jax.data import reading
from metamorph_jax.errors import FileError, MissingFile
from metamorph_jax.eval.tasks.base import LETTER, LETTERS, File, by_group, by_unit, mean, one_of
from metamorph_jax.eval.tasks.choice import MultipleChoice, known

_STEP = 1_000_000  # between the indices of rotations
_EMPTY = ("", "nan", "none")
_SUFFIX = {"en": LETTER, "cn": "请直接回答选项字母。"}
_DROPPED = ("hint", "category", "l2-category", "source", "image", "comment", "split")
_OLD = {("dev", "en"): "mmbench_dev_20230712.tsv", ("dev", "cn"): "mmbench_dev_cn_20231003.tsv"}
_SOURCE = "github.com/open-compass/MMBench"


@dataclasses.dataclass(frozen=True)
class MMBench(MultipleChoice):
    """Options: `language` (en, cn), `split` (dev, test), `circular` (all rotations), `file`.

    Attributes:
        language, split: of the file.
        circular: ask every rotation; otherwise each question once.
        file: name of another file under the root.
    """

    language: str = "en"
    split: str = "dev"
    circular: bool = True
    file: str = ""

    title: ClassVar = "MMBench"
    main: ClassVar = "circular"
    other_scores: ClassVar = ("accuracy",)
    scores_of_groups: ClassVar = ("{l2}", "{ability}")
    files: ClassVar = (
        File("MMBench_DEV_EN.tsv", "questions and images (likewise DEV_CN, TEST_EN, TEST_CN, "
             "…_legacy and …_V11)", _SOURCE),
        File("mmbench_dev_20230712.tsv", "or the file that LLaVA reports on", _SOURCE),
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        one_of(self, language=_SUFFIX, split=("dev", "test"))

    def _path(self) -> str:
        name = f"MMBench_{self.split.upper()}_{self.language.upper()}"
        names = [f"{name}.tsv", f"{name}_legacy.tsv", f"{name}_V11.tsv"]
        if old := _OLD.get((self.split, self.language)):
            names.append(old)
        return self.find(*([self.file] if self.file else names))

    def questions(self):
        _workbook()  # now, not when all answers are there
        path = self._path()
        rows = list(reading.table(path, "index", "question", "A", "B", "image"))
        where = files.shown(path)
        pictures, rotated = {}, False
        for row in rows:
            if not row["index"].isdecimal():
                raise FileError(f"{where}: index {files.shown(row['index'])!r} is not a number")
            pictures[row["index"]] = row["image"]
            rotated |= int(row["index"]) >= _STEP
        for row in rows:
            if self.circular or int(row["index"]) < _STEP:
                cell, index = row["image"], row["index"]
                cell = pictures.get(cell, cell)  # it may be the index of the row that has it
                picture = reading.lazy_base64(cell, f"{where}, index {index}")
                yield from self._of(row, picture, make=self.circular and not rotated)

    def _of(self, row: dict, picture, make: bool) -> Iterator:
        """The question of a row, or all of its rotations."""
        options = _options(row)
        gold = LETTERS.find(row.get("answer") or "-")
        gold = gold if 0 <= gold < len(options) else None
        hint = "" if row.get("hint", "").lower() in _EMPTY else row["hint"]
        base = int(row["index"]) % _STEP
        kept = {k: v for k, v in row.items() if k not in _DROPPED}
        for turn in range(len(options) if make else 1):
            turned = options[turn:] + options[:turn]
            index = int(row["index"]) + turn * _STEP
            right = None if gold is None else (gold - turn) % len(options)
            letters = dict.fromkeys("ABCD", "") | dict(zip(LETTERS, turned, strict=False))
            answer = {} if right is None else {"answer": LETTERS[right]}
            question = self.ask(
                str(index), row["question"], turned, right, before=hint, images=(picture,),
                unit=str(base), more={"row": kept | letters | answer | {"index": index}},
                groups={"ability": row.get("category", ""), "l2": row.get("l2-category", "")},
            )  # fmt: skip
            if self.language == "cn" and self.form == "generate":
                prompt = question.prompt.removesuffix(self.suffix) + _SUFFIX["cn"]
                question = dataclasses.replace(question, prompt=prompt)
            yield question

    def scores(self, records):
        rows = known(records)
        if not rows:
            return {}
        units = []
        for unit in by_unit(rows).values():
            units.append({**unit[0], "score": min(r["score"] for r in unit)})
        found = {"circular": mean(units)} if self.circular else {}
        found["accuracy"] = mean([r for r in rows if int(r["id"]) < _STEP] or rows)
        for group in ("l2", "ability"):
            split = by_group(units, group)
            found |= {name: mean(part) for name, part in split.items() if name}
        return found

    def write(self, records, folder: pathlib.Path):
        """The table that the evaluation server takes."""
        Workbook = _workbook()
        rows = [record["more"]["row"] for record in records]
        first = ["index", "question", "A", "B", "C", "D", "prediction"]
        names = first + [name for name in rows[0] if name not in first]
        book = Workbook()
        book.active.append(names)
        for record, row in zip(records, rows, strict=True):
            cells = row | {"prediction": record["reply"]}
            book.active.append([_cell(cells.get(name, "")) for name in names])
        path = folder / f"mmbench_{self.split}_{self.language}.xlsx"
        book.save(path)
        return [path]


def _workbook():
    """openpyxl's class of a table.

    Raises:
        MissingFile: it is not installed.
    """
    try:
        from openpyxl import Workbook
    except ImportError:
        raise MissingFile(
            "the answer file of MMBench is .xlsx, which needs openpyxl: pip install "
            "'metamorph_jax[eval]'"
        ) from None
    return Workbook


def _options(row: dict) -> list[str]:
    """The texts of A, B, … up to the first empty cell."""
    options = []
    for letter in LETTERS:
        text = row.get(letter, "")
        if text is None or text.lower() in _EMPTY:
            break
        options.append(text)
    return options


def _cell(value):
    """A value that a sheet takes: control characters are left out."""
    if isinstance(value, str):
        return "".join(c for c in value if c >= " " or c in "\t\n\r")
    return value

"""Drawn images that a judge is asked about: GenEval and DPG-Bench, by likelihood of "yes".

The judge is a model of ours or behind an endpoint (`eval/images/judging.py`), not the detector or
the model of the official scripts. Without one, the images are written in the official layout and
not scored. A score is compared only with scores of the same judge; the task `made_images` says how
far it can be trusted.
"""

import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import ClassVar

import numpy as np

from metamorph_jax.data import images
from metamorph_jax.errors import ConfigError, FileError
from metamorph_jax.eval.images import dpg, geneval
from metamorph_jax.eval.images.judging import ImageJudge, Remembered, open_judge
from metamorph_jax.eval.judges import check_judge
from metamorph_jax.eval.tasks.base import (
    Answer,
    File,
    Question,
    Record,
    Task,
    by_unit,
    one_of,
    write_json_lines,
)
from metamorph_jax.files import read_text, shown

_ELLA = "github.com/TencentQQGYLab/ELLA, dpg_bench/"


@dataclasses.dataclass(frozen=True)
class JudgedDrawing(Task):
    """Attributes:
    samples: images of each prompt.
    prompt: what the model is asked; `{prompt}` stands for the benchmark's own.
    judged_by: workdir, published weights or "endpoint:MODEL"; "": images are not scored.
    judge_config: FILE[:SIZE] of published weights.
    """

    samples: int = 4
    prompt: str = "Generate an image of the following: {prompt}"
    judged_by: str = ""
    judge_config: str = ""

    form: ClassVar[str] = "draw"
    max_new_tokens: ClassVar[int] = 256

    def __post_init__(self):
        if "{prompt}" not in self.prompt:
            raise ConfigError(f"task {self.name}: prompt must have {{prompt}}: {self.prompt!r}")
        if not 1 <= self.samples <= 1000:
            raise ConfigError(f"task {self.name}: samples={self.samples}, expected 1 to 1000")

    def asked(self, unit: str, text: str, **fields) -> Iterable[Question]:
        """The questions of one prompt."""
        more = fields.pop("more", {})
        for k in range(self.samples):
            prompt = self.prompt.replace("{prompt}", text)
            yield Question(f"{unit}-{k}", prompt, unit=unit,
                           more=more | {"sample": k}, **fields)  # fmt: skip

    def record(self, question: Question, answer: Answer) -> Record:
        return {"score": None, "parsed": bool(answer.images)}

    def finish(self, records: Sequence[Record]) -> list[Record]:
        drawn = [record for record in records if record.get("drawn")]
        if not (self.judged_by and drawn):
            return list(records)
        judge = open_judge(self.judged_by, self.judge_config)
        folder = pathlib.Path(drawn[0]["drawn"][0]).parents[1]  # OUT/TASK/images/…
        found = self.verdicts(drawn, Remembered(judge, folder, self.judged_by))
        by_id = {record["id"]: more for record, more in zip(drawn, found, strict=True)}
        return [record | by_id.get(record["id"], {}) for record in records]

    def verdicts(self, records: Sequence[Record], judge: ImageJudge) -> list[dict]:
        """What a judge finds about each record's image: fields of the record, "score" among
        them."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class GenEval(JudgedDrawing):
    title: ClassVar[str] = "GenEval, by a judge's likelihood of yes"
    main: ClassVar[str] = "overall"
    other_scores: ClassVar = ("images", "prompts")
    scores_of_groups: ClassVar = ("{tag}",)
    files: ClassVar[tuple[File, ...]] = (
        File("evaluation_metadata.jsonl", "prompts", "github.com/djghosh13/geneval, prompts/"),
    )

    @cached_property
    def _rows(self) -> list[dict]:
        return geneval.read_prompts(self.find("evaluation_metadata.jsonl"))

    def questions(self) -> Iterable[Question]:
        check_judge(self.judged_by)
        for index, row in enumerate(self._rows):
            groups, more = {"tag": row["tag"]}, {"index": index}
            yield from self.asked(f"{index:05}", row["prompt"], groups=groups, more=more)

    def verdicts(self, records: Sequence[Record], judge: ImageJudge) -> list[dict]:
        rows = [self._rows[record["more"]["index"]] for record in records]
        found = geneval.judged([record["drawn"][0] for record in records], rows, judge)
        return [
            {"checks": checks, "parsed": right is not None,
             "score": None if right is None else float(right), "reply": _told(record, checks)}
            for record, (right, checks) in zip(records, found, strict=True)
        ]  # fmt: skip

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        return geneval.summary(
            {"tag": r["groups"]["tag"], "correct": r["score"], "prompt": r["unit"]}
            for r in records if r["score"] is not None
        )  # fmt: skip

    def write(self, records: Sequence[Record], folder: pathlib.Path) -> list[pathlib.Path]:
        """The layout that the official evaluator reads, and the result file where there was a
        judge."""
        results = []
        for record in records:
            if not record.get("drawn"):
                continue
            index, sample = record["more"]["index"], record["more"]["sample"]
            row, name = self._rows[index], geneval.place(index, sample)
            geneval.write_metadata(folder, index, row)
            shutil.copyfile(record["drawn"][0], folder / name)
            if record["score"] is not None:
                right = bool(record["score"])
                results.append(geneval.result(name, row, right, record["checks"]))
        return [write_json_lines(folder / "results.jsonl", results)] if results else []


@dataclasses.dataclass(frozen=True)
class Dpg(JudgedDrawing):
    """Attributes:
    mode: one of `dpg.MODES`.
    resolution: of each image in the written grids.
    """

    mode: str = "strict"
    resolution: int = 512

    title: ClassVar[str] = "DPG-Bench, by a judge's likelihood of yes"
    main: ClassVar[str] = "DPG"
    files: ClassVar[tuple[File, ...]] = (
        File("dpg_bench.csv", "questions", _ELLA),
        File("prompts", "a text file for each prompt", _ELLA),
    )

    def __post_init__(self):
        super().__post_init__()
        one_of(self, mode=dpg.MODES, samples=range(1, 5))  # a grid holds four
        if not 1 <= self.resolution <= 4096:
            raise ConfigError(f"task {self.name}: resolution={self.resolution}, expected 1 to 4096")

    @cached_property
    def _items(self) -> dict[str, dpg.Item]:
        return dpg.read_items(self.find("dpg_bench.csv"), self.mode)

    def questions(self) -> Iterable[Question]:
        check_judge(self.judged_by)
        folder = pathlib.Path(self.find("prompts"))
        names = sorted(path.stem for path in folder.glob("*.txt"))
        if not names:
            raise FileError(f"{folder} has no prompts (*.txt)")
        if lost := [name for name in names if name not in self._items]:
            print(f"{self.name}: {len(lost)} of {len(names)} prompts have no questions in the csv "
                  f"and are not scored: {shown(', '.join(lost[:5]))}", file=sys.stderr)  # fmt: skip
        for name in names:
            text = read_text(folder / f"{name}.txt").strip()
            yield from self.asked(name, text)

    def verdicts(self, records: Sequence[Record], judge: ImageJudge) -> list[dict]:
        items = [self._items.get(record["unit"], {}) for record in records]
        pairs = [
            (record["drawn"][0], question.text)
            for record, item in zip(records, items, strict=True)
            for question in item.values()
        ]
        values = iter(judge(*map(list, zip(*pairs, strict=True))) if pairs else ())
        out = []
        for record, item in zip(records, items, strict=True):
            found = {id: float(next(values)) for id in item}
            parsed = not np.isnan(list(found.values())).any()
            scores = dpg.image_scores(dpg.Judged(item, [_said(found)])) if parsed else None
            answers = {str(id): value for id, value in found.items()}
            told = _told(record, {q.text: found[id] for id, q in item.items()})
            score = scores[0] if scores else None
            out.append({"answers": answers, "parsed": parsed, "score": score, "reply": told})
        return out

    def score_names(self) -> set[str]:
        detailed = {q.category for item in self._items.values() for q in item.values()}
        return {self.main, "lost prompts"} | detailed | {dpg.broad(name) for name in detailed}

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        return dpg.summary((one for _, _, one in self._judged(records)), self.mode)

    def _judged(self, records: Sequence[Record]) -> Iterable[tuple[str, list[Record], dpg.Judged]]:
        """(name, records, answers) of each prompt that the judge has answered about."""
        answered = [r for r in records if "answers" in r and r["parsed"]]
        for group in by_unit(answered).values():
            name = group[0]["id"].rpartition("-")[0]
            answers = [_said({int(k): v for k, v in r["answers"].items()}) for r in group]
            yield name, group, dpg.Judged(self._items.get(name, {}), answers)

    def write(self, records: Sequence[Record], folder: pathlib.Path) -> list[pathlib.Path]:
        """A grid for each prompt, and the result files where there was a judge."""
        for name, group in by_unit([r for r in records if r.get("drawn")]).items():
            paths = [record["drawn"][0] for record in group]
            samples = [images.decode(images.read_bytes(path), path) for path in paths]
            dpg.grid(samples, self.resolution).save(folder / f"{name}.png")
        lines, details = [], []
        for name, group, one in self._judged(records):
            if (scores := dpg.image_scores(one)) is None:
                continue
            lines.append(dpg.result_line(f"{name}.png", scores))
            for record, answers in zip(group, one.answers, strict=True):
                details += [f"{name}.png, {record['more']['sample']}, {q.text}, "
                            f"{'yes' if answers[id] else 'no'}"
                            for id, q in one.item.items()]  # fmt: skip
        if not lines:
            return []
        written = [folder / "results.txt", folder / "results_detail.txt"]
        for path, rows in zip(written, (lines, details), strict=True):
            path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        return written


def _told(record: Record, found: dict[str, float]) -> str:
    """For people who look at the worst images: what the model wrote, and the judge's noes."""
    noes = [f"no: {question}" for question, value in found.items() if value <= dpg.THRESHOLD]
    return "; ".join(filter(None, [record["reply"], *noes]))


def _said(found: dict[int, float]) -> dict[int, bool]:
    return {id: value > dpg.THRESHOLD for id, value in found.items()}

"""Open questions with human answers: VQAv2, OK-VQA, VizWiz and TextVQA.

Files, under the task's root (images of COCO may be elsewhere: option `images`):

| task | file | what |
|---|---|---|
| vqav2 | v2_OpenEnded_mscoco_SPLIT_questions.json | questions: train2014, val2014, test2015, … |
| | v2_mscoco_SPLIT_annotations.json | ten answers each; not for test |
| | val2014/COCO_val2014_000000000042.jpg | images; those of test-dev2015 are in test2015/ |
| okvqa | OpenEnded_mscoco_val2014_questions.json | questions |
| | mscoco_val2014_annotations.json | ten answers each |
| | val2014/… | images, as above |
| vizwiz | val.json, test.json | images' names, questions; answers but for test |
| | val/VizWiz_val_00000000.jpg | images |
| textvqa | TextVQA_0.5.1_val.json | questions and answers |
| | train_images/IMAGE_ID.jpg | images of train and val; test_images/ |
| | llava_textvqa_val_v051_ocr.jsonl | ocr=token: prompts with OCR tokens, of LLaVA's eval.zip |
| | TextVQA_Rosetta_OCR_v0.2_val.json | ocr=token or tokens: OCR tokens, if the former is missing |

VQAv2 and OK-VQA are from visualqa.org and okvqa.allenai.org, VizWiz from vizwiz.org, TextVQA from
textvqa.org. The prompts are in `PROMPTS`; the number depends on them.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import ClassVar

from metamorph_jax.data import reading
from metamorph_jax.errors import FileError
from metamorph_jax.eval.scorers import vqa
from metamorph_jax.eval.tasks.base import (
    SHORT,
    Answer,
    File,
    Protocol,
    Question,
    Record,
    Task,
    by_group,
    mean,
    mean_terms,
    one_of,
    write_json,
)

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'"
PROMPTS = {
    # LLaVA 1.5, LMMs-eval, Cambrian
    "short": "{question}\n" + SHORT,
    # the same three for VizWiz; LMMs-eval for OK-VQA, where it costs points
    "unanswerable": "{question}\n" + UNANSWERABLE + ".\n" + SHORT,
    # MM-Interleaved
    "one_word": "Based on the image, please answer the question. <image>{question} Please provide "
    "an accurate answer within one word. The answer is:",
    "one_word_unanswerable": "Based on the image, please answer the question. <image>{question} "
    + UNANSWERABLE + ". Please provide an accurate answer within one word. The answer is:",
}  # fmt: skip
_DECODING = {"beams": 3, "max_new_tokens": 10, "length_penalty": 0.0}
# How MM-Interleaved (arXiv 2401.10208) asks; its published numbers are with extract=substrings.
PROTOCOLS = {"mm-interleaved": Protocol({"style": "one_word", "extract": "words"}, _DECODING)}
# How replies are compared: the public VQA tools; the EvalAI normaliser for all.
PARSERS = ("official", "lmms_eval")
_SOURCE = "visualqa.org/download.html"


@dataclasses.dataclass(frozen=True)
class _Soft(Task):
    """What the four share: an answer has a soft accuracy, or none where answers are not public."""

    max_new_tokens: ClassVar = 128
    scores_of_groups: ClassVar[tuple[str, ...]] = ("{answer_type}",)
    protocols: ClassVar = PROTOCOLS

    def accuracy(self, answer: str, given: Sequence[str]) -> float:
        """In [0, 1]."""
        return vqa.vqav2_accuracy(answer, given)

    def answered(self, reply: str) -> str:
        """The reply as it is scored and written."""
        return vqa.short_answer(reply, self.extract)

    def record(self, question: Question, answer: Answer) -> Record:
        text = self.answered(answer.text)
        given = question.gold
        return {"answer": text, "score": None if given is None else self.accuracy(text, given)}

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        """Accuracy, and by answer type; nothing where the answers are not public."""
        scored = [record for record in records if record["score"] is not None]
        if not scored:
            return {}
        types = {
            name: mean(group) for name, group in by_group(scored, "answer_type").items() if name
        }
        return {"accuracy": mean(scored)} | types

    def terms(self, record: Record) -> dict[str, tuple[float, float]]:
        return mean_terms(record, "answer_type")


# ---- VQAv2 and OK-VQA


@dataclasses.dataclass(frozen=True)
class VQAv2(_Soft):
    """VQAv2: open questions about COCO images, ten human answers each.

    Attributes:
        split: val2014 and train2014 are scored here, test-dev2015 and test2015 by the server.
        style: of the prompt, one of `PROMPTS`.
        images: folder of the images, if not SPLIT/ under the root.
        parser: "official"; "lmms_eval" normalises also where all annotators agree.
        extract: the answer is looked for in replies that say more, see `vqa.short_answer`: "none",
            "words" or, as MM-Interleaved's numbers were made, "substrings", which may cut too much
            ("pizza crust" becomes "crust").
        question_types: scores of each of the 65 types of questions, too ("type what color").
        protocol: "mm-interleaved" asks and decodes as its paper does, see `PROTOCOLS`.
    """

    split: str = "val2014"
    style: str = "short"
    images: str = ""
    parser: str = "official"
    extract: str = "none"
    question_types: bool = False
    protocol: str = ""

    title: ClassVar = "VQAv2"
    files: ClassVar = (
        File("v2_OpenEnded_mscoco_val2014_questions.json", "the questions", _SOURCE),
        File("v2_mscoco_val2014_annotations.json", "ten answers to each question", _SOURCE),
        File("val2014", "the images", "cocodataset.org"),
    )
    _questions: ClassVar = "v2_OpenEnded_mscoco_{split}_questions.json"
    _annotations: ClassVar = "v2_mscoco_{split}_annotations.json"
    _answer_key: ClassVar = "answer"

    def __post_init__(self):
        one_of(self, style=PROMPTS, parser=PARSERS, extract=vqa.EXTRACTS)

    @property
    def public(self) -> bool:
        """Whether the answers of this split are public."""
        return not self.split.startswith("test")

    def questions(self):
        rows = self._read(self._questions, "questions", "question_id", "image_id",
                          texts=("question",))  # fmt: skip
        truth = {}
        if self.public:
            keys = ("question_id", "answers", "question_type", "answer_type")
            found = self._read(self._annotations, "annotations", *keys)
            truth = {row["question_id"]: row for row in found}
        folder = self.split.replace("test-dev", "test")
        images = pathlib.Path(self.images or self.path(folder))
        for row in rows:
            yield self._question(row, truth.get(row["question_id"]), images, folder)

    def _question(self, row: dict, truth: dict | None, images: pathlib.Path, folder: str):
        if self.public and truth is None:
            raise FileError(
                f"{self._file(self._annotations)} has no question {row['question_id']}; questions "
                "and annotations must be of the same split"
            )
        where = f"{self._annotations.format(split=self.split)}, question {row['question_id']}"
        given = truth and _texts(truth["answers"], where, self._answer_key)
        kinds = truth and {key: truth[key] for key in ("answer_type", "question_type")}
        return Question(
            str(row["question_id"]),
            PROMPTS[self.style].format(question=row["question"]),
            (images / f"COCO_{folder}_{row['image_id']:012d}.jpg",),
            gold=given,
            groups=kinds or {},
            more={"question_id": row["question_id"]},
        )

    def _file(self, name: str) -> str:
        return self.find(name.format(split=self.split))

    def _read(self, name: str, key: str, *columns: str, texts: Sequence[str] = ()) -> list[dict]:
        path = self._file(name)
        rows = reading.required(reading.json_file(path, dict), path, key)[key]
        return [reading.required(row, f"{path}, {key}[{i}]", *columns, texts=texts)
                for i, row in enumerate(rows)]  # fmt: skip

    def accuracy(self, answer: str, given: Sequence[str]) -> float:
        rule = vqa.vqav2_accuracy if self.parser == "official" else vqa.textvqa_accuracy
        return rule(answer, given)

    @property
    def scores_of_groups(self) -> tuple[str, ...]:
        return ("{answer_type}", *["type {question_type}"] * self.question_types)

    def scores(self, records):
        """Accuracy, by answer type, and by question type if that is wanted."""
        found = super().scores(records)
        if self.question_types and found:
            types = by_group(records, "question_type")
            found |= {f"type {name}": mean(group) for name, group in types.items()}
        return found

    def terms(self, record):
        found = super().terms(record)
        if self.question_types and found:
            found[f"type {record['groups'].get('question_type', '')}"] = found["accuracy"]
        return found

    def write(self, records, folder):
        """[{"question_id", "answer"}] of every question; "" where there is no answer.

        The server wants all of test2015 also for test-dev2015: its question file must be there for
        that. For the server answers are normalised, for the public tool they are as they came."""
        replies = {record["more"]["question_id"]: record["answer"] for record in records}
        name = self._questions.format(split=self.split)
        every = self._questions.format(split="test2015")
        if not self.public and pathlib.Path(self.path(every)).exists():
            name = every
        ids = [row["question_id"] for row in reading.json_file(self.find(name), dict)["questions"]]
        if self.public:
            rows = [{"question_id": key, "answer": replies.get(key, "")} for key in ids]
        else:
            rows = vqa.vqav2_submission(ids, replies)
        return [write_json(folder / f"{pathlib.Path(name).stem}_results.json", rows)]


@dataclasses.dataclass(frozen=True)
class OKVQA(VQAv2):
    """OK-VQA: questions about COCO images that need knowledge from outside; scored as VQAv2.

    Attributes:
        answers: "answer" (in version 1.0 a stem) or "raw_answer" of the annotations.
    """

    answers: str = "answer"

    title: ClassVar = "OK-VQA"
    files: ClassVar = (
        File("OpenEnded_mscoco_val2014_questions.json", "the questions", "okvqa.allenai.org"),
        File("mscoco_val2014_annotations.json", "ten answers to each", "okvqa.allenai.org"),
        File("val2014", "the images", "cocodataset.org"),
    )
    _questions: ClassVar = "OpenEnded_mscoco_{split}_questions.json"
    _annotations: ClassVar = "mscoco_{split}_annotations.json"

    def __post_init__(self):
        super().__post_init__()
        one_of(self, answers=("answer", "raw_answer"))

    @property
    def _answer_key(self) -> str:
        return self.answers


def _texts(answers: Sequence[dict], where: str, key: str = "answer") -> list[str]:
    """The texts of a question's human answers."""
    found = [reading.required(a, f"{where}, an answer", texts=(key,))[key] for a in answers]
    if not found:
        raise FileError(f"{where}: no answers")
    return found


# ---- VizWiz


@dataclasses.dataclass(frozen=True)
class VizWiz(_Soft):
    """VizWiz: questions that blind people asked about their photographs; some have no answer.

    Attributes:
        split: val (scored here) or test (server).
        style: of the prompt, one of `PROMPTS`; a model that isn't told of "unanswerable" loses
            those questions.
        extract: see `VQAv2`.
        raw_truth: normalise the reply alone and leave the human answers as they are, as
            MM-Interleaved does; an answer with an article can't be matched then.
        protocol: "mm-interleaved" asks and decodes as its paper does.
    """

    split: str = "val"
    style: str = "unanswerable"
    extract: str = "none"
    raw_truth: bool = False
    protocol: str = ""

    title: ClassVar = "VizWiz-VQA"
    files: ClassVar = (
        File("val.json", "questions and answers", "vizwiz.org (Annotations.zip)"),
        File("val", "the images", "vizwiz.org (val.zip)"),
    )
    protocols: ClassVar = {
        "mm-interleaved": Protocol(
            {"style": "one_word_unanswerable", "extract": "words", "raw_truth": True}, _DECODING
        )
    }

    def __post_init__(self):
        one_of(self, style=PROMPTS, extract=vqa.EXTRACTS)

    def accuracy(self, answer: str, given: Sequence[str]) -> float:
        if self.raw_truth:
            return vqa.soft_accuracy(vqa.classic(answer), given)
        return super().accuracy(answer, given)

    def _rows(self) -> list[dict]:
        path = self.find(f"{self.split}.json")
        rows = reading.json_file(path, list)
        return [reading.required(row, f"{path}[{i}]", texts=("image", "question"))
                for i, row in enumerate(rows)]  # fmt: skip

    def questions(self):
        for row in self._rows():
            where = f"{self.split}.json, {row['image']}"
            given = _texts(row["answers"], where) if "answers" in row else None
            yield Question(
                row["image"],
                PROMPTS[self.style].format(question=row["question"]),
                (self.path(self.split, row["image"]),),
                gold=given,
                groups={"answer_type": row["answer_type"]} if "answer_type" in row else {},
            )

    def answered(self, reply: str) -> str:
        return vqa.evalai(super().answered(reply))

    def write(self, records, folder):
        """[{"image", "answer"}] of every question, normalised."""
        replies = {record["id"]: record["answer"] for record in records}
        rows = vqa.vizwiz_submission([row["image"] for row in self._rows()], replies)
        return [write_json(folder / f"vizwiz_{self.split}_results.json", rows)]


# ---- TextVQA


@dataclasses.dataclass(frozen=True)
class TextVQA(_Soft):
    """TextVQA: questions about text in images.

    Attributes:
        split: val (scored here) or test (server).
        ocr: "": no OCR tokens in the prompt; "token": the line "Reference OCR token: A, B" of
            LLaVA 1.5's question file; "tokens": Cambrian's "Reference OCR tokens: A, B". With
            tokens the score is higher by many points: LLaVA 1.5's 58.2 is with "token".
        style: of the prompt without OCR tokens, one of `PROMPTS`; with them it is "short".
        extract: see `VQAv2`.
        vqa_tools: compare as the VQA tools do, not as TextVQA's own script; MM-Interleaved does.
        protocol: "mm-interleaved" asks and decodes as its paper does.
    """

    split: str = "val"
    ocr: str = ""
    style: str = "short"
    extract: str = "none"
    vqa_tools: bool = False
    protocol: str = ""

    title: ClassVar = "TextVQA"
    files: ClassVar = (
        File("TextVQA_0.5.1_val.json", "questions and answers", "textvqa.org/dataset"),
        File("train_images", "the images of train and val", "textvqa.org/dataset"),
        File("llava_textvqa_val_v051_ocr.jsonl", "prompts with OCR tokens",
             "LLaVA's eval.zip (docs/Evaluation.md there)"),
        File("TextVQA_Rosetta_OCR_v0.2_val.json", "OCR tokens", "textvqa.org/dataset"),
    )  # fmt: skip

    def __post_init__(self):
        one_of(self, ocr=("", "token", "tokens"), style=PROMPTS, extract=vqa.EXTRACTS)
        if self.ocr:
            one_of(self, style=("short",))

    protocols: ClassVar = {
        "mm-interleaved": Protocol(
            {"style": "one_word", "extract": "words", "vqa_tools": True}, _DECODING
        )
    }

    def _rows(self) -> list[dict]:
        path = self.find(f"TextVQA_0.5.1_{self.split}.json")
        rows = reading.required(reading.json_file(path, dict), path, "data")["data"]
        return [reading.required(row, f"{path}, data[{i}]", "question_id", "image_id",
                                 texts=("question",)) for i, row in enumerate(rows)]  # fmt: skip

    def questions(self):
        folder = "test_images" if self.split == "test" else "train_images"
        prompt = self._prompts()
        for row in self._rows():
            if "answers" in row:
                reading.text_list(row["answers"], f"TextVQA, question {row['question_id']}")
            yield Question(
                str(row["question_id"]),
                prompt(row),
                (self.path(folder, f"{row['image_id']}.jpg"),),
                gold=row.get("answers"),
                more={"question_id": row["question_id"]},
            )

    def _prompts(self):
        """A function from a row to its prompt."""
        if not self.ocr:
            return lambda row: PROMPTS[self.style].format(question=row["question"])
        theirs = f"llava_textvqa_{self.split}_v051_ocr.jsonl"
        rosetta = f"TextVQA_Rosetta_OCR_v0.2_{self.split}.json"
        if self.ocr == "token" and pathlib.Path(self.path(theirs)).exists():
            return self._prompts_of(self.path(theirs))
        path = self.find(rosetta) if self.ocr == "tokens" else self.find(theirs, rosetta)
        rows = reading.required(reading.json_file(path, dict), path, "data")["data"]
        rows = [reading.required(row, f"{path}, data[{i}]", "image_id", "ocr_tokens")
                for i, row in enumerate(rows)]  # fmt: skip
        tokens = {row["image_id"]: ", ".join(row["ocr_tokens"]) for row in rows}

        def prompt(row):
            if row["image_id"] not in tokens:
                raise FileError(f"{path}: no image {row['image_id']}")
            line = f"Reference OCR {self.ocr}: {tokens[row['image_id']]}"
            return f"{row['question']}\n{line}\n{SHORT}"

        return prompt

    def _prompts_of(self, path: str):
        """Prompts of LLaVA's question file, whose `question_id` is the id of the image."""
        made = {}
        for row in reading.json_lines(path, "question_id", "text"):
            try:
                made[row["question_id"], vqa.textvqa_question(row["text"])] = row["text"]
            except ValueError as error:
                raise FileError(f"{path}, question {row['question_id']}: {error}") from error

        def prompt(row):
            key = row["image_id"], row["question"].lower()
            if key not in made:
                raise FileError(f"{path}: no question {row['question']!r} of image {key[0]}")
            return made[key]

        return prompt

    def accuracy(self, answer: str, given: Sequence[str]) -> float:
        rule = vqa.vqav2_accuracy if self.vqa_tools else vqa.textvqa_accuracy
        return rule(answer, given)

    def write(self, records, folder):
        """[{"question_id", "answer"}] of every question; "" where there is no answer."""
        replies = {record["more"]["question_id"]: record["answer"] for record in records}
        ids = [row["question_id"] for row in self._rows()]
        rows = vqa.vqav2_submission(ids, replies)
        return [write_json(folder / f"textvqa_{self.split}_results.json", rows)]

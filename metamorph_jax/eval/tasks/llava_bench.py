"""LLaVA-Bench: a judge compares long answers with GPT-4's, which saw a description, no image.

| file under the task's root | what |
|---|---|
| llava_bench_coco: qa90_questions.jsonl | 90 questions about 30 images |
| qa90_gpt4_answer.jsonl | the reference answers |
| caps_boxes_coco2014_val_80.jsonl | captions and boxes of the images |
| rule.json | what the judge is asked, by category |
| val2014/COCO_val2014_000000441147.jpg | the images |
| llava_bench_wild: questions.jsonl | 60 questions about 24 images |
| answers_gpt4.jsonl, context.jsonl | reference answers; descriptions of the images |
| rule.json, images/001.jpg | as above |

The COCO set is from github.com/haotian-liu/LLaVA (playground/data/coco2014_val_qa_eval; rule.json
from llava/eval/table there), the wild one from huggingface.co/datasets/liuhaotian/
llava-bench-in-the-wild. Prompt: the question alone.

The judge reads the context, the question, the reference, then the candidate, and the rule; it
gives two scores from 1 to 10 in its first line. The score is 100 × mean candidate / mean reference.
Published numbers are of gpt-4-0314 at temperature 0.2; say which judge yours are of.
"""

import dataclasses
from typing import ClassVar

from metamorph_jax.data import reading
from metamorph_jax.errors import FileError
from metamorph_jax.eval.scorers import judged
from metamorph_jax.eval.tasks.base import (
    Answer,
    File,
    Question,
    Record,
    Task,
    write_json_lines,
)

_LLAVA = "github.com/haotian-liu/LLaVA"
_WILD = "huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
_RULE = File("rule.json", "what the judge is asked", f"{_LLAVA}, llava/eval/table/rule.json")


@dataclasses.dataclass(frozen=True)
class LLaVABenchCOCO(Task):
    """LLaVA-Bench (COCO): 90 questions, judged against GPT-4's answers.

    Attributes:
        count_failed: let reviews that can't be parsed enter the means as (−1, −1), as the original
            script does, instead of leaving them out.
    """

    count_failed: bool = False

    title: ClassVar = "LLaVA-Bench (COCO)"
    main: ClassVar = "all"
    other_scores: ClassVar = ("reference", "candidate")
    scores_of_groups: ClassVar = ("{category}",)
    max_new_tokens: ClassVar = 1024
    judged: ClassVar = True
    files: ClassVar = (
        File("qa90_questions.jsonl", "the questions", _LLAVA),
        File("qa90_gpt4_answer.jsonl", "the reference answers", _LLAVA),
        File("caps_boxes_coco2014_val_80.jsonl", "captions and boxes", _LLAVA),
        File("val2014", "the images", "cocodataset.org"),
        _RULE,
    )
    _questions: ClassVar = "qa90_questions.jsonl"
    _references: ClassVar = "qa90_gpt4_answer.jsonl"
    _contexts: ClassVar = "caps_boxes_coco2014_val_80.jsonl"
    _prefix: ClassVar = ""

    def image(self, name: str) -> str:
        """The file of an image by its name in the question file."""
        return self.path("val2014", name if name.startswith("COCO_") else f"COCO_val2014_{name}")

    def context(self, row: dict) -> str:
        """What the judge is told of an image."""
        reading.required(row, self._contexts, "captions", "instances")
        reading.text_list(row["captions"], f"{self._contexts}, captions")
        boxes = "\n".join(f"{one['category']}: {one['bbox']}" for one in row["instances"])
        return "\n".join(row["captions"]) + f"\n\n{boxes}"

    def questions(self):
        references = self._by("question_id", self._references, texts=("text",))
        contexts = self._by("image", self._contexts)
        rules = reading.json_file(self.find("rule.json"), dict)
        for category, rule in rules.items():
            reading.required(rule, f"{self.path('rule.json')}, {category}", texts=("prompt",))
        path = self.find(self._questions)
        for row in reading.json_lines(path, "question_id", texts=("image", "text", "category")):
            category = self._prefix + row["category"]
            for what, table, key in (
                (self._references, references, row["question_id"]),
                (self._contexts, contexts, row["image"]),
                ("rule.json", rules, category),
            ):
                if key not in table:
                    raise FileError(f"{self.path(what)} has nothing for {key}, which {path} names")
            reference = references[row["question_id"]]
            context = self.context(contexts[row["image"]])
            yield Question(
                str(row["question_id"]),
                row["text"],
                (self.image(row["image"]),),
                gold=reference["text"],
                groups={"category": category},
                more={"question_id": row["question_id"], "context": context,
                      "rule": rules[category], "reference_id": reference.get("answer_id", "")},
            )  # fmt: skip

    def _by(self, key: str, name: str, texts=()) -> dict:
        path = self.find(name)
        return {row[key]: row for row in reading.json_lines(path, key, texts=texts)}

    def record(self, question: Question, answer: Answer) -> Record:
        return {"score": None}

    def judge(self, records, ask):
        """Both scores ("tuple") and the "review"; "score" is the candidate's / 10."""
        reviews = ask([_asked(record) for record in records])
        return [_reviewed(record, review, self.count_failed)
                for record, review in zip(records, reviews, strict=True)]  # fmt: skip

    def scores(self, records):
        """Relative scores in per cent: all, and by category; and the means × 10 of all."""
        reviews = [
            (record["groups"]["category"], tuple(record["tuple"]))
            for record in records
            if "tuple" in record
        ]
        rows = judged.relative_scores(reviews, self.count_failed)
        found = {name: row.percent for name, row in rows.items()}
        if "all" in rows:
            found |= {"reference": rows["all"].reference, "candidate": rows["all"].candidate}
        return found

    def write(self, records, folder):
        """The answers, and the reviews if there are some, in the original's forms."""
        answers = [
            {"question_id": r["more"]["question_id"], "prompt": r["prompt"], "text": r["reply"],
             "answer_id": r["id"], "model_id": "", "metadata": {}}
            for r in records
        ]  # fmt: skip
        written = [write_json_lines(folder / "answers.jsonl", answers)]
        reviews = [
            {"id": number, "question_id": r["more"]["question_id"],
             "answer1_id": r["more"]["reference_id"], "answer2_id": r["id"],
             "category": r["groups"]["category"], "content": r["review"], "tuple": r["tuple"]}
            for number, r in enumerate(records, 1) if "tuple" in r
        ]  # fmt: skip
        if reviews:
            written.append(write_json_lines(folder / "reviews.jsonl", reviews))
        return written


@dataclasses.dataclass(frozen=True)
class LLaVABenchWild(LLaVABenchCOCO):
    """LLaVA-Bench (in the wild): 60 questions about 24 images, judged against GPT-4's answers."""

    title: ClassVar = "LLaVA-Bench (in the wild)"
    files: ClassVar = (
        File("questions.jsonl", "the questions", _WILD),
        File("answers_gpt4.jsonl", "the reference answers", _WILD),
        File("context.jsonl", "descriptions of the images", _WILD),
        File("images", "the images", _WILD),
        _RULE,
    )
    _questions: ClassVar = "questions.jsonl"
    _references: ClassVar = "answers_gpt4.jsonl"
    _contexts: ClassVar = "context.jsonl"
    _prefix: ClassVar = "llava_bench_"

    def image(self, name: str) -> str:
        return self.path("images", name)

    def context(self, row: dict) -> str:
        caption = reading.required(row, self._contexts, "caption")["caption"]
        return caption if isinstance(caption, str) else "\n".join(caption)


def _asked(record: Record) -> str:
    """What the judge reads, in the original's layout."""
    more, role = record["more"], record["more"]["rule"].get("role", "Assistant")
    answers = "".join(
        f"[{role} {k}]\n{text}\n\n[End of {role} {k}]\n\n"
        for k, text in ((1, record["gold"]), (2, record["reply"]))
    )
    return (
        f"[Context]\n{more['context']}\n\n[Question]\n{record['prompt']}\n\n{answers}"
        f"[System]\n{more['rule']['prompt']}\n\n"
    )


def _reviewed(record: Record, review: str | None, count_failed: bool) -> Record:
    scores = judged.review_scores(review) if review is not None else judged.UNPARSED
    parsed = scores != judged.UNPARSED
    kept = record | {"review": review, "parsed": parsed, "score": None}
    if parsed or (count_failed and review is not None):
        kept |= {"tuple": list(scores), "score": scores[1] / 10}
    return kept

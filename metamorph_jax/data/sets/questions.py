"""Open questions about images with human answers: VQAv2, OK-VQA, VizWiz, TextVQA; and VisDial.

v2_OpenEnded_mscoco_train2014_questions.json, v2_mscoco_train2014_annotations.json
OpenEnded_mscoco_train2014_questions.json, mscoco_train2014_annotations.json      OK-VQA
train.json                                                                        VizWiz
TextVQA_0.5.1_train.json
visdial_1.0_train.json
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

from metamorph_jax import files
from metamorph_jax.data import reading
from metamorph_jax.errors import FileError

CHOICES = ("majority", "first")


@dataclasses.dataclass(frozen=True)
class Asked:
    """Attributes:
    image: id of COCO's image, or its file's name.
    answers: of the annotators, in their order.
    """

    id: str
    image: int | str
    question: str
    answers: list[str]

    def answer(self, choice: str) -> str:
        """The one answer to learn: the most frequent one, of equal ones the earliest; or the first.

        MM-Interleaved takes VQAv2's `multiple_choice_answer`, which is the most frequent one, and
        elsewhere the first: that of VizWiz often is "unanswerable".
        """
        if choice == "first":
            return self.answers[0]
        return collections.Counter(self.answers).most_common(1)[0][0]


def vqa(questions: str, annotations: str, key: str = "answer") -> Iterator[Asked]:
    """Questions of COCO's images in the order of their file.

    Args:
        questions, annotations: paths.
        key: of an answer, "answer" or "raw_answer".

    Raises:
        FileError: a file can't be read, lacks something, or they don't belong together.
    """
    where = files.shown(annotations)
    table = reading.required(reading.json_file(annotations, dict), where, "annotations")
    keys = ("question_id", "image_id", "answers")
    rows = [reading.required(row, f"{where}, annotations[{i}]", *keys)
            for i, row in enumerate(table["annotations"])]  # fmt: skip
    known = {row["question_id"]: row for row in rows}
    where = files.shown(questions)
    table = reading.required(reading.json_file(questions, dict), where, "questions")
    for i, row in enumerate(table["questions"]):
        place = f"{where}, questions[{i}]"
        reading.required(row, place, "question_id", "image_id", texts=("question",))
        found = known.get(row["question_id"])
        if found is None or found["image_id"] != row["image_id"]:
            raise FileError(f"{place}: {files.shown(annotations)} has no answers to question "
                            f"{row['question_id']} about image {row['image_id']}")  # fmt: skip
        answers = _texts(found["answers"], f"{place}, answers", key)
        yield Asked(str(row["question_id"]), row["image_id"], row["question"], answers)


def _texts(answers: Sequence[dict], where: str, key: str) -> list[str]:
    found = [reading.required(answer, where, texts=(key,))[key] for answer in answers]
    if not found:
        raise FileError(f"{where}: none")
    return found


def vizwiz(path: str) -> Iterator[Asked]:
    """Questions of VizWiz; raises as `vqa`."""
    for i, row in enumerate(reading.json_file(path, list)):
        where = f"{files.shown(path)}[{i}]"
        reading.required(row, where, "answers", texts=("image", "question"))
        answers = _texts(row["answers"], f"{where}, answers", "answer")
        yield Asked(row["image"], row["image"], row["question"], answers)


def textvqa(path: str) -> Iterator[Asked]:
    """Questions of TextVQA; raises as `vqa`."""
    where = files.shown(path)
    table = reading.required(reading.json_file(path, dict), where, "data")
    for i, row in enumerate(table["data"]):
        place = f"{where}, data[{i}]"
        reading.required(row, place, "question_id", "answers", texts=("question", "image_id"))
        answers = reading.text_list(row["answers"], f"{place}, answers")
        if not answers:
            raise FileError(f"{place}, answers: none")
        yield Asked(str(row["question_id"]), f"{row['image_id']}.jpg", row["question"], answers)


@dataclasses.dataclass(frozen=True)
class Dialog:
    """Attributes:
    image: id of COCO's image.
    rounds: (question, without its question mark; answer) of each.
    """

    image: int
    caption: str
    rounds: list[tuple[str, str]]


def visdial(path: str) -> Iterator[Dialog]:
    """Dialogs of VisDial 1.0; rounds without an answer are left out. Raises as `vqa`."""
    where = files.shown(path)
    data = reading.required(reading.json_file(path, dict), where, "data")["data"]
    reading.required(data, f"{where}, data", "questions", "answers", "dialogs")
    for key in ("questions", "answers"):
        reading.text_list(data[key], f"{where}, {key}")
    for i, row in enumerate(data["dialogs"]):
        place = f"{where}, dialogs[{i}]"
        reading.required(row, place, "image_id", "dialog", texts=("caption",))
        rounds = [turn for turn in row["dialog"] if "answer" in turn]
        try:
            pairs = [(data["questions"][t["question"]], data["answers"][t["answer"]])
                     for t in rounds]  # fmt: skip
        except (LookupError, TypeError) as error:
            raise FileError(f"{place}: a round names no question or answer: {error!r}") from error
        yield Dialog(row["image_id"], row["caption"], pairs)

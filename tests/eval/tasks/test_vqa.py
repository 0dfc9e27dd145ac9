"""Open questions: official files of two or three questions with known scores."""

import pytest

from metamorph_jax.errors import ConfigError, FileError, MissingFile
from metamorph_jax.eval import tasks
from metamorph_jax.eval.scorers.vqa import EXTRACTS, short_answer
from metamorph_jax.eval.tasks.base import SHORT
from tests.eval.tasks.scripted import official, put, run


def answers(*texts):
    return [{"answer": text, "answer_id": i} for i, text in enumerate(texts, 1)]


QUESTIONS = {
    "questions": [
        {"image_id": 42, "question": "What colour is the cup?", "question_id": 420},
        {"image_id": 42, "question": "Is it full?", "question_id": 421},
    ]
}
ANNOTATIONS = {
    "annotations": [
        {"question_id": 420, "image_id": 42, "question_type": "what color", "answer_type": "other",
         "answers": answers(*["red"] * 7, "dark red", "a red", "pink")},
        {"question_id": 421, "image_id": 42, "question_type": "is it", "answer_type": "yes/no",
         "answers": answers(*["yes"] * 10)},
    ]
}  # fmt: skip


@pytest.fixture
def vqav2(tmp_path):
    put(tmp_path / "vqav2", {
        "v2_OpenEnded_mscoco_val2014_questions.json": QUESTIONS,
        "v2_mscoco_val2014_annotations.json": ANNOTATIONS,
        "val2014/COCO_val2014_000000000042.jpg": b"x",
    })  # fmt: skip
    return tmp_path


def test_vqav2(vqav2, tmp_path):
    result, model = run("vqav2", vqav2, {"420": "Red.", "421": "Yes"}, tmp_path / "out")
    assert model.asked["420"].prompt == f"What colour is the cup?\n{SHORT}"
    # All annotators of the second agree, so it is compared as written.
    assert result.scores == {"accuracy": 50, "other": 100, "yes/no": 0}
    assert official(result) == [
        [{"question_id": 420, "answer": "Red."}, {"question_id": 421, "answer": "Yes"}]
    ]


def test_vqav2_by_other_kits(vqav2, tmp_path):
    replies = {"420": "It is a red one", "421": "Yes"}
    result, _ = run("vqav2:parser=lmms_eval", vqav2, replies, tmp_path / "out")
    assert result.scores == {"accuracy": 50, "other": 0, "yes/no": 100}
    result, model = run("vqav2:extract=substrings,style=one_word", vqav2, replies, tmp_path / "out")
    assert official(result)[0][0]["answer"] == "red one"
    assert "<image>What colour" in model.asked["420"].prompt


@pytest.mark.parametrize(
    "reply, word, substring",
    [("It is red.", "red", "red"), ("pizza crust", "pizza crust", "crust"),
     ('"Dog" or cat', "dog", "dog"), ("A piece of cake", "piece", "piece"),
     ("two\nthree", "two", "two"), ("Sea of love", "sea", "of love"), ("3.5", "3.5", "3"),
     ("tea or coffee", "tea", "or coffee"), ("The answer is a Red Car.", "red car", "red car"),
     ("United States of America", "united states", "united states"), ("no! never", "no", "no")],
)  # fmt: skip
def test_short_answers(reply, word, substring):
    found = [short_answer(reply, extract) for extract in EXTRACTS]
    assert found == [reply, word, substring]


def test_as_mm_interleaved_asks(vqav2, tmp_path):
    replies = {"420": "3.5 or more", "421": "yes"}
    result, model = run("vqav2:protocol=mm-interleaved", vqav2, replies, tmp_path / "out")
    assert model.asked["420"].prompt == (
        "Based on the image, please answer the question. <image>What colour is the cup? Please "
        "provide an accurate answer within one word. The answer is:"
    )
    assert official(result)[0][0]["answer"] == "3.5"
    decoding = result.settings["decoding"]
    assert [decoding[name] for name in ("beams", "max_new_tokens", "min_new_tokens",
                                        "length_penalty")] == [3, 10, 0, 0.0]  # fmt: skip
    spec = "vqav2:protocol=mm-interleaved,extract=substrings,style=short"  # what is given wins
    result, model = run(spec, vqav2, replies, tmp_path / "other")
    assert official(result)[0][0]["answer"] == "3" and SHORT in model.asked["420"].prompt
    with pytest.raises(ConfigError, match="protocol=x, expected one of mm-interleaved"):
        tasks.make("okvqa:protocol=x", vqav2)


def test_a_question_that_failed_is_an_empty_answer(vqav2, tmp_path):
    questions = {"questions": [*QUESTIONS["questions"],
                               {"image_id": 7, "question": "Why?", "question_id": 70}]}  # fmt: skip
    third = ANNOTATIONS["annotations"][0] | {"question_id": 70}
    annotations = {"annotations": [*ANNOTATIONS["annotations"], third]}
    put(vqav2 / "vqav2", {"v2_OpenEnded_mscoco_val2014_questions.json": questions,
                          "v2_mscoco_val2014_annotations.json": annotations})  # fmt: skip
    result, _ = run("vqav2", vqav2, {"420": "red", "421": "yes"}, tmp_path / "out")
    assert [*result.failures] == ["70"]
    assert official(result)[0][2] == {"question_id": 70, "answer": ""}


def test_vqav2_for_the_server_has_every_question_of_the_test_set(tmp_path):
    every = {"questions": [*QUESTIONS["questions"],
                           {"image_id": 7, "question": "Why?", "question_id": 70}]}  # fmt: skip
    put(tmp_path / "vqav2", {
        "v2_OpenEnded_mscoco_test-dev2015_questions.json": QUESTIONS,
        "v2_OpenEnded_mscoco_test2015_questions.json": every,
        "test2015/COCO_test2015_000000000042.jpg": b"x",
    })  # fmt: skip
    replies = {"420": "The red.", "421": "Two"}
    result, _ = run("vqav2:split=test-dev2015", tmp_path, replies, tmp_path / "out")
    assert result.scores == {} and not result.failures
    assert official(result) == [
        [{"question_id": 420, "answer": "red"}, {"question_id": 421, "answer": "2"},
         {"question_id": 70, "answer": ""}]
    ]  # fmt: skip


def test_questions_and_annotations_of_different_splits_are_refused(vqav2):
    put(vqav2 / "vqav2", {"v2_mscoco_val2014_annotations.json": {"annotations": []}})
    with pytest.raises(FileError, match="has no question 420; questions and annotations must be"):
        list(tasks.make("vqav2", vqav2).questions())


def test_a_missing_file_says_where_one_gets_it(tmp_path):
    with pytest.raises(MissingFile, match="no v2_OpenEnded.*questions, from visualqa.org"):
        list(tasks.make("vqav2", tmp_path).questions())


def test_options_are_checked():
    with pytest.raises(ConfigError, match="vqav2:style=long: style=long, expected one of short"):
        tasks.make("vqav2:style=long")


def test_okvqa(tmp_path):
    given = [{"answer": "run", "raw_answer": "running"}] * 4 + [
        {"answer": "walk", "raw_answer": "walking"}
    ] * 6
    annotation = {"question_id": 420, "question_type": "one", "answer_type": "other"}
    put(tmp_path / "okvqa", {
        "OpenEnded_mscoco_val2014_questions.json": {"questions": QUESTIONS["questions"][:1]},
        "mscoco_val2014_annotations.json": {"annotations": [annotation | {"answers": given}]},
        "images/COCO_val2014_000000000042.jpg": b"x",
    })  # fmt: skip
    images = str(tmp_path / "okvqa/images")
    replies = {"420": "Running"}
    result, _ = run("okvqa", tmp_path, replies, tmp_path / "a", images=images)
    assert result.scores["accuracy"] == 0
    spec = "okvqa:answers=raw_answer,style=unanswerable"
    result, model = run(spec, tmp_path, replies, tmp_path / "b", images=images)
    assert result.scores["accuracy"] == 100
    assert "respond with 'Unanswerable'." in model.asked["420"].prompt


def test_answers_that_lack_a_field_are_named(vqav2):
    for path in [*(vqav2 / "vqav2").glob("v2_*.json")]:
        path.rename(path.with_name(path.name.removeprefix("v2_")))
    root = str(vqav2 / "vqav2")
    with pytest.raises(FileError, match="question 420, an answer: no raw_answer; it has answer,"):
        list(tasks.make("okvqa:answers=raw_answer", root=root).questions())


def test_vizwiz(tmp_path):
    rows = [
        {"image": "VizWiz_val_00000007.jpg", "question": "What is this?", "answerable": 1,
         "answer_type": "other", "answers": answers(*["soup can"] * 5, *["soup"] * 3, "a", "b")},
        {"image": "VizWiz_val_00000008.jpg", "question": "And this?", "answerable": 0,
         "answer_type": "unanswerable", "answers": answers(*["unanswerable"] * 10)},
    ]  # fmt: skip
    pictures = {f"val/{row['image']}": b"x" for row in rows}
    put(tmp_path / "vizwiz", {"val.json": rows, **pictures})
    replies = {rows[0]["image"]: "Soup", rows[1]["image"]: "Unanswerable"}
    result, model = run("vizwiz", tmp_path, replies, tmp_path / "out")
    assert model.asked[rows[0]["image"]].prompt == (
        "What is this?\nWhen the provided information is insufficient, respond with "
        f"'Unanswerable'.\n{SHORT}"
    )
    assert result.scores == {"accuracy": pytest.approx(95), "other": pytest.approx(90),
                             "unanswerable": 100}  # fmt: skip
    assert official(result)[0] == [
        {"image": rows[0]["image"], "answer": "soup"},
        {"image": rows[1]["image"], "answer": "unanswerable"},
    ]


TEXTVQA = {
    "data": [
        {"question_id": 34602, "image_id": "a1", "question": "What does the Sign say?",
         "answers": ["stop"] * 8 + ["STOP", "halt"]},
        {"question_id": 34603, "image_id": "a1", "question": "Which colour?",
         "answers": ["red"] * 2 + ["none"] * 8},
    ]
}  # fmt: skip


@pytest.fixture
def textvqa(tmp_path):
    put(tmp_path / "textvqa", {
        "TextVQA_0.5.1_val.json": TEXTVQA,
        "train_images/a1.jpg": b"x",
        "TextVQA_Rosetta_OCR_v0.2_val.json": {
            "data": [{"image_id": "a1", "ocr_tokens": ["STOP", "4"]}]
        },
    })  # fmt: skip
    return tmp_path


REPLIES = {"34602": "Stop.", "34603": "red"}


def test_textvqa(textvqa, tmp_path):
    result, model = run("textvqa", textvqa, REPLIES, tmp_path / "out")
    assert result.scores == {"accuracy": pytest.approx(80)}
    assert model.asked["34602"].prompt == f"What does the Sign say?\n{SHORT}"
    assert official(result)[0] == [
        {"question_id": 34602, "answer": "stop"}, {"question_id": 34603, "answer": "red"}
    ]  # fmt: skip


@pytest.mark.parametrize("word", ["token", "tokens"])
def test_textvqa_with_ocr_tokens(textvqa, tmp_path, word):
    _, model = run(f"textvqa:ocr={word}", textvqa, REPLIES, tmp_path / word)
    line = f"Which colour?\nReference OCR {word}: STOP, 4\n{SHORT}"
    assert model.asked["34603"].prompt == line


def test_textvqa_takes_prompts_of_the_published_question_file(textvqa, tmp_path):
    rows = [
        {"question_id": "a1", "text": f"{row['question']}\nReference OCR token: A\n{SHORT}"}
        for row in TEXTVQA["data"]
    ]
    put(textvqa / "textvqa", {"llava_textvqa_val_v051_ocr.jsonl": rows})
    _, model = run("textvqa:ocr=token", textvqa, REPLIES, tmp_path / "out")
    assert model.asked["34602"].prompt == rows[0]["text"]
    put(textvqa / "textvqa", {"llava_textvqa_val_v051_ocr.jsonl": rows[:1]})
    with pytest.raises(FileError, match="no question 'Which colour\\?' of image a1"):
        list(tasks.make("textvqa:ocr=token", textvqa).questions())

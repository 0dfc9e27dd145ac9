"""MM-Vet and LLaVA-Bench with a judge that says what the test wants."""

import json

import pytest

from metamorph_jax.errors import FileError, MissingFile
from metamorph_jax.eval import tasks
from metamorph_jax.eval.tasks import mmvet
from tests.eval.tasks.scripted import official, put, run

MMVET = {
    "v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5",
             "capability": ["ocr", "math"]},
    "v1_1": {"imagename": "v1_1.png", "question": "What is it?", "answer": "a cat",
             "capability": ["rec"]},
    "v1_2": {"imagename": "v1_1.png", "question": "Why?", "answer": "no", "capability": ["rec"]},
}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    return put(tmp_path, {"mmvet/mm-vet.json": MMVET, "mmvet/images/v1_0.png": b"x",
                          "mmvet/images/v1_1.png": b"x"})  # fmt: skip


def test_mmvet(root, tmp_path):
    asked = []

    def judge(texts):
        asked.extend(texts)
        by_row = {"What is x?": "0.5", "What is it?": "good", "Why?": None}
        lines = [text.removesuffix(mmvet._AGAIN).splitlines()[-1] for text in texts]
        again = [text.endswith(mmvet._AGAIN) for text in texts]
        return [
            "1.0" if second else by_row[line.split(" | ")[0]]
            for line, second in zip(lines, again, strict=True)
        ]

    replies = {"v1_0": "x = -1 |\nor 4", "v1_1": "cat", "v1_2": "because"}
    result, model = run("mmvet", root, replies, tmp_path / "out", judge)
    assert model.asked["v1_0"].prompt == "What is x?"
    assert asked[0].endswith("What is x? | -1 <AND> -5 | x = -1 or 4 | ")
    assert len(asked) == 4  # the one without a grade is asked again, that of a dead judge isn't
    assert result.scores == {"total": 75, "math": 50, "math+ocr": 50, "ocr": 50, "rec": 100}
    assert result.unparsed == 1
    assert official(result)[0] == replies


def test_mmvet_with_the_official_prompt(root, tmp_path):
    put(tmp_path, {"prompt.txt": "Grade this."})
    asked = []

    def judge(texts):
        asked.extend(texts)
        return ["1.0"] * len(texts)

    replies = dict.fromkeys(MMVET, "x")
    path = str(tmp_path / "prompt.txt")
    _, model = run("mmvet:think=true", root, replies, tmp_path / "out", judge, grader=path)
    assert asked[0].startswith("Grade this.\nWhat is x? | ")
    assert model.asked["v1_0"].prompt == mmvet.THINK + "What is x?"
    with pytest.raises(MissingFile, match="prompt2.txt"):
        list(tasks.make("mmvet", root, grader=str(tmp_path / "prompt2.txt")).questions())


def test_without_a_judge_there_are_answers_but_no_scores(root, tmp_path):
    result, _ = run("mmvet", root, dict.fromkeys(MMVET, "x"), tmp_path / "out")
    assert result.scores == {} and len(official(result)[0]) == 3


RULES = {
    name: {"role": "Assistant", "prompt": f"Rate by {name}."}
    for name in ("conv", "detail", "llava_bench_conv", "llava_bench_complex")
}


def reviews(*lines):
    asked = []

    def judge(texts):
        asked.extend(texts)
        return list(lines)

    return judge, asked


def test_llava_bench_coco(tmp_path):
    put(tmp_path / "llava_bench_coco", {
        "qa90_questions.jsonl": [
            {"question_id": 0, "image": "000000000042.jpg", "text": "What?", "category": "conv"},
            {"question_id": 1, "image": "000000000042.jpg", "text": "Tell.", "category": "detail"},
        ],
        "qa90_gpt4_answer.jsonl": [
            {"question_id": 1, "text": "Long.", "answer_id": "b"},
            {"question_id": 0, "text": "A cat.", "answer_id": "a"},
        ],
        "caps_boxes_coco2014_val_80.jsonl": [
            {"id": "42", "image": "000000000042.jpg", "captions": ["c1", "c2"],
             "instances": [{"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}]},
        ],
        "rule.json": RULES, "val2014/COCO_val2014_000000000042.jpg": b"x",
    })  # fmt: skip
    judge, asked = reviews("8 6\nfine", "no idea")
    replies = {"0": "cat", "1": "Short."}
    result, _ = run("llava_bench_coco", tmp_path, replies, tmp_path / "out", judge)
    assert asked[0] == (
        "[Context]\nc1\nc2\n\ncat: [0.1, 0.2, 0.3, 0.4]\n\n[Question]\nWhat?\n\n"
        "[Assistant 1]\nA cat.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\ncat\n\n[End of Assistant 2]\n\n[System]\nRate by conv.\n\n"
    )
    assert result.scores == {"all": 75, "conv": 75, "reference": 80, "candidate": 60}
    assert result.unparsed == 1
    answers, written = [
        [json.loads(line) for line in path.read_text().splitlines()] for path in result.files
    ]
    assert [row["text"] for row in answers] == ["cat", "Short."]
    assert written == [
        {"id": 1, "question_id": 0, "answer1_id": "a", "answer2_id": "0", "category": "conv",
         "content": "8 6\nfine", "tuple": [8.0, 6.0]}
    ]  # fmt: skip
    judge, _ = reviews("8 6\nfine", "no idea")
    result, _ = run("llava_bench_coco:count_failed=true", tmp_path, replies, tmp_path / "b", judge)
    assert result.scores["all"] == pytest.approx(100 * 2.5 / 3.5)


@pytest.fixture
def wild(tmp_path):
    return put(tmp_path, {
        "llava_bench_wild/questions.jsonl": [
            {"question_id": 0, "image": "001.jpg", "text": "Who?", "category": "conv"},
            {"question_id": 1, "image": "001.jpg", "text": "Why?", "category": "complex"},
        ],
        "llava_bench_wild/answers_gpt4.jsonl": [
            {"question_id": 0, "text": "a"}, {"question_id": 1, "text": "b"}
        ],
        "llava_bench_wild/context.jsonl": [{"image": "001.jpg", "caption": "An island."}],
        "llava_bench_wild/rule.json": RULES, "llava_bench_wild/images/001.jpg": b"x",
    })  # fmt: skip


def test_llava_bench_in_the_wild(wild, tmp_path):
    judge, asked = reviews("10 5", "5 10")
    replies = {"0": "x", "1": "y"}
    result, _ = run("llava_bench_wild", wild, replies, tmp_path / "out", judge, resamples=20)
    assert asked[1].startswith("[Context]\nAn island.\n\n[Question]\nWhy?")
    assert asked[1].endswith("[System]\nRate by llava_bench_complex.\n\n")
    assert result.scores == {"all": 100, "llava_bench_complex": 200, "llava_bench_conv": 50,
                             "reference": 75, "candidate": 75}  # fmt: skip
    low, high = result.intervals["all"]
    assert low == pytest.approx(50) and high == pytest.approx(200)


def test_llava_bench_names_what_is_missing(wild):
    put(wild / "llava_bench_wild", {"context.jsonl": [{"image": "002.jpg", "caption": "x"}]})
    with pytest.raises(FileError, match="context.jsonl has nothing for 001.jpg, which .*questions"):
        list(tasks.make("llava_bench_wild", wild).questions())

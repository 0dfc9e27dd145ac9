"""Multiple choice on small official files: from what is asked to what is scored and written."""

import base64
import csv
import io
import json
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parents[3]))

from metamorph_jax.errors import ConfigError, FileError, MissingFile  # noqa: E402
from metamorph_jax.eval import tasks  # noqa: E402
from metamorph_jax.eval.tasks import choice, mmmu, scienceqa  # noqa: E402
from metamorph_jax.eval.tasks.base import LETTER, Answer  # noqa: E402
from tests.eval.tasks.asked import picture, run  # noqa: E402
from tests.eval.toy import png  # noqa: E402


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_parsers():
    options = {"A": "red", "B": "blue"}
    said = {"B": "BBB", "B.": "-BB", "b": "-B-", "(B)": "--B", "It is blue": "--B", "x": "---"}
    for reply, expected in said.items():
        found = [p(reply, options) or "-" for p in (choice.exact, choice.first, choice.found)]
        assert "".join(found) == expected, reply


# ---- SEED


@pytest.fixture
def seed(tmp_path):
    def row(number, kind, dimension, answer):
        return {
            "answer": answer, "choice_a": "One", "choice_b": "Two", "choice_c": "Three",
            "choice_d": "Four", "data_id": f"{number}_x", "data_type": kind,
            "question": f"How many in {number}?", "question_id": number,
            "question_type_id": dimension,
        }  # fmt: skip

    rows = [row(1, "image", 5, "A"), row(2, "image", 1, "B"), row(3, "image", 5, "C"),
            row(4, "video", 10, "D")]  # fmt: skip
    names = {"Scene Understanding": 1, "Instances Counting": 5, "Action Recognition": 10}
    write(tmp_path / "SEED-Bench.json", {"question_type": names, "questions": rows})
    frames = tmp_path / "SEED-Bench-video" / "4_x"
    frames.mkdir(parents=True)
    for k, colour in enumerate(("red", "green", "blue")):
        (frames / f"{k}.png").write_bytes(png(colour))
    return tmp_path


def test_seed(seed, tmp_path):
    say = {"1": "A", "2": "B.", "3": "C", "4": "A"}
    questions, records, scores, files = run("seed:kind=all", seed, say, tmp_path)
    assert questions[0].prompt == f"How many in 1?\nA. One\nB. Two\nC. Three\nD. Four\n{LETTER}"
    assert questions[0].images == (str(seed / "SEED-Bench-image" / "1_x"),)
    assert picture(questions[3]) == png("green")  # the frame in the middle
    assert scores == {
        "all": 50.0, "image": pytest.approx(200 / 3), "video": 0.0, "Instances Counting": 100.0,
        "Scene Understanding": 0.0, "Action Recognition": 0.0,
    }  # fmt: skip
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert lines[1] == {"question_id": "2", "prediction": "B."} and not records[1]["parsed"]
    assert run("seed:parser=first", seed, say)[2]["all"] == 100  # images are the default
    with pytest.raises(ConfigError, match="kind=films, expected one of"):
        tasks.make("seed:kind=films", root="x")


def test_seed_ranks_the_texts(seed):
    def say(question):
        return Answer("Two", 1, (-3.0, -1.0, -2.0, -4.0))

    questions, records, scores, _ = run("seed:form=choose", seed, say)
    assert questions[0].prompt == "How many in 1?"
    assert questions[0].choices == ("One", "Two", "Three", "Four")
    assert scores["all"] == pytest.approx(100 / 3) and records[1]["letter"] == "B"


def test_the_middle_of_a_video(seed):
    from metamorph_jax.data.sources import video
    from metamorph_jax.eval.tasks.seed import middle_frame

    clip = str(pathlib.Path(__file__).parents[2] / "cases" / "data" / "clip.mp4")
    info = video.probe(clip)
    frames = video.decode_frames(clip, list(range(info.frames)), 10**9)

    def read(data):
        return np.asarray(Image.open(io.BytesIO(data)))

    np.testing.assert_array_equal(read(middle_frame(clip)), frames[info.frames // 2])
    part = read(middle_frame(clip, [0.0, 2 / info.fps]))
    np.testing.assert_array_equal(part, frames[1])


# ---- MMVP


@pytest.fixture
def mmvp(tmp_path):
    rows = [("Up or down?", "(a) Up (b) Down", "(a)"), ("Up or down?", "(a) Up (b) Down", "(b)"),
            ("Open?", "(a) Yes (b) No", "(b)"), ("Open?", "(a) Yes (b) No", "(a)")]  # fmt: skip
    with (tmp_path / "Questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Index", "Question", "Options", "Correct Answer"])
        writer.writerows((k, *row) for k, row in enumerate(rows, 1))
    return tmp_path


def test_mmvp(mmvp, tmp_path):
    say = {"1": "A", "2": "(b) Down", "3": "No", "4": "B"}
    questions, records, scores, files = run("mmvp", mmvp, say, tmp_path)
    assert questions[0].prompt == f"Up or down? Options:\nA. Up\nB. Down\n{LETTER}"
    assert [q.gold for q in questions] == ["A", "B", "B", "A"]
    assert questions[3].images == (str(mmvp / "MMVP Images" / "4.jpg"),)
    assert [r["score"] for r in records] == [1, 1, 1, 0]
    assert scores == {"pairs": 50.0, "accuracy": 75.0}
    _, records, scores, _ = run("mmvp", mmvp, say | {"2": "?"})
    assert scores == {"pairs": 0.0, "accuracy": 50.0} and not records[1]["parsed"]
    line = json.loads(files[0].read_text().splitlines()[1])
    assert line["question_id"] == 2 and line["answer"] == "(b)" and line["response"] == "(b) Down"
    questions, *_ = run("mmvp:style=official", mmvp, say)
    assert questions[0].prompt == "Up or down? (a) Up (b) Down"


def test_mmvp_swapped_labels(mmvp):
    text = (mmvp / "Questions.csv").read_text()
    (mmvp / "Questions.csv").write_text(text.replace("\n1,", "\n99,").replace("\n2,", "\n100,"))
    golds = lambda spec: [q.gold for q in run(spec, mmvp, lambda q: "A")[0]]  # noqa: E731
    assert golds("mmvp") == ["A", "B", "B", "A"]
    assert golds("mmvp:corrected=true") == ["B", "A", "B", "A"]


# ---- MMBench

COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category",
           "split", "image"]  # fmt: skip


def mmbench(root, rows, name="MMBench_DEV_EN.tsv"):
    root.mkdir(exist_ok=True)
    with (root / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return root


IMAGE = base64.b64encode(png("red")).decode()
ONE = {"index": 7, "question": "Which is\nheavier?", "hint": "nan", "A": "stone", "B": "feather",
       "C": "nan", "answer": "A", "category": "physics", "l2-category": "reasoning",
       "split": "dev", "image": IMAGE}  # fmt: skip
TWO = ONE | {"index": 9, "question": "What?", "hint": "Look.", "A": "x", "B": "y", "C": "z",
             "answer": "C", "category": "ocr", "l2-category": "perception"}  # fmt: skip


def test_mmbench_makes_rotations(tmp_path):
    root = mmbench(tmp_path / "b", [ONE, TWO])

    def say(question):  # right but for the second rotation of TWO
        return "B" if question.id == "1000009" and question.gold != "B" else question.gold

    questions, records, scores, files = run("mmbench", root, say, tmp_path)
    assert [q.id for q in questions] == ["7", "1000007", "9", "1000009", "2000009"]
    assert questions[0].prompt == f"Which is\nheavier?\nA. stone\nB. feather\n{LETTER}"
    assert questions[1].prompt == f"Which is\nheavier?\nA. feather\nB. stone\n{LETTER}"
    assert questions[2].prompt.startswith("Look.\nWhat?\nA. x\nB. y\nC. z\n")
    assert [q.gold for q in questions] == ["A", "B", "C", "B", "A"]
    assert picture(questions[1]) == png("red")
    assert scores["circular"] == 100
    wrong = {q.id: "A" if q.id == "1000009" else q.gold for q in questions}
    scores = run("mmbench", root, wrong)[2]
    assert scores == {
        "circular": 50.0, "accuracy": 100.0, "reasoning": 100.0, "perception": 0.0,
        "physics": 100.0, "ocr": 0.0,
    }  # fmt: skip
    from openpyxl import load_workbook

    rows = list(load_workbook(files[0]).active.iter_rows(values_only=True))
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer")
    assert rows[2] == (1000007, "Which is\nheavier?", "feather", "stone", None, None, "B", "B")
    assert len(rows) == 6


def test_mmbench_without_openpyxl_says_so_at_once(tmp_path, monkeypatch):
    root = mmbench(tmp_path / "b", [ONE])
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(MissingFile, match="needs openpyxl: pip install"):
        next(tasks.make("mmbench", root=str(root)).questions())


def test_mmbench_takes_the_rotations_of_the_file(tmp_path):
    turned = ONE | {"index": 1_000_007, "A": "feather", "B": "stone", "answer": "B", "image": "7"}
    root = mmbench(tmp_path / "b", [ONE, TWO, turned], "MMBench_DEV_CN_legacy.tsv")
    questions, _, scores, _ = run("mmbench:language=cn", root, lambda q: "A")
    assert [q.id for q in questions] == ["7", "9", "1000007"]
    assert questions[0].prompt.endswith("\nB. feather\n请直接回答选项字母。")
    assert picture(questions[2]) == png("red") and scores["circular"] == 0
    assert scores["accuracy"] == 50
    questions, _, scores, _ = run("mmbench:language=cn,circular=false", root, lambda q: "A")
    assert len(questions) == 2 and "circular" not in scores


def test_mmbench_without_public_answers(tmp_path):
    hidden = {k: v for k, v in ONE.items() if k != "answer"}
    root = mmbench(tmp_path / "b", [hidden], "MMBench_TEST_EN.tsv")
    questions, records, scores, files = run("mmbench:split=test", root, lambda q: "A", tmp_path)
    assert scores == {} and records[0]["score"] is None and files[0].is_file()
    root = mmbench(tmp_path / "b", [ONE | {"image": "%%%"}])
    questions = list(tasks.make("mmbench", root=str(root)).questions())
    with pytest.raises(FileError, match="index 7: not an image in base64"):
        picture(questions[0])
    root = mmbench(tmp_path / "b", [ONE | {"index": "x"}])
    with pytest.raises(FileError, match="index 'x' is not a number"):
        list(tasks.make("mmbench", root=str(root)).questions())


# ---- ScienceQA

PROBLEM = {"question": "Which is a solid?", "choices": ["stone", "milk"], "answer": 0, "hint": "",
           "image": "image.png", "grade": "grade3", "subject": "natural science",
           "split": "test"}  # fmt: skip


@pytest.fixture
def sqa(tmp_path):
    other = PROBLEM | {"image": None, "hint": "Read this.", "answer": 1, "grade": "grade8",
                       "subject": "language science"}  # fmt: skip
    write(tmp_path / "problems.json", {"1": PROBLEM, "2": other, "3": PROBLEM | {"hint": "H"}})
    write(tmp_path / "pid_splits.json", {"test": ["1", "2", "3"], "minitest": ["2"]})
    return tmp_path


def test_scienceqa(sqa, tmp_path):
    say = {"1": "A", "2": "The answer is B.", "3": "milk"}
    questions, records, scores, files = run("scienceqa", sqa, say, tmp_path)
    assert questions[0].prompt == (
        f"Context: N/A\nQuestion: Which is a solid?\nOptions: (A) stone (B) milk\n{LETTER}"
    )
    assert questions[0].images == (str(sqa / "images" / "test" / "1" / "image.png"),)
    assert questions[1].images == ()
    assert scores == {
        "image": 50.0, "accuracy": pytest.approx(200 / 3), "NAT": 50.0, "LAN": 100.0, "TXT": 50.0,
        "G1-6": 50.0, "G7-12": 100.0,
    }  # fmt: skip
    assert [r["parsed"] for r in records] == [True, True, False]
    table = json.loads(files[0].read_text())
    assert table["results"] == {"1": 0, "2": 1, "3": -1} and table["correct"] == 2
    assert len(run("scienceqa:split=minitest", sqa, say)[0]) == 1
    with pytest.raises(FileError, match="no split 'night'"):
        run("scienceqa:split=night", sqa, say)


def test_scienceqa_prompts(sqa):
    row = PROBLEM | {"hint": "Look."}
    options = "A. stone\nB. milk"
    assert scienceqa.prompt_of(row, "lmms_eval") == (
        f"Context: Look.\nWhich is a solid?\n{options}\n{LETTER}"
    )
    assert scienceqa.prompt_of(PROBLEM, "lmms_eval") == f"Which is a solid?\n{options}\n{LETTER}"
    assert scienceqa.prompt_of(row, "cambrian").startswith(f"Look. Which is a solid?\n{options}\n")
    record = {"id": "2", "conversations": [{"from": "human", "value": "Own words\n<image>"}]}
    write(sqa / "llava_test_CQM-A.json", [record])
    questions, *_ = run("scienceqa:file=llava_test_CQM-A.json", sqa, lambda q: "A")
    assert questions[1].prompt == f"Own words\n{LETTER}" and "Which" in questions[0].prompt


@pytest.mark.golden
def test_scienceqa_reasoning_prompt_is_that_of_llava(golden_root):
    folder = golden_root / "llava" / "eval" / "scienceqa"
    problems = json.loads((folder / "problems.json").read_text())
    expected = json.loads((folder / "llava_format_expected.json").read_text())
    codes = [code for code in expected if code.startswith("QCM-")]
    assert codes
    for code in codes:
        for row in expected[code]:
            asked = row["conversations"][0]["value"].removesuffix("\n<image>")
            assert scienceqa.prompt_of(problems[row["id"]], "reasoning") == asked


def test_scienceqa_ensembles(sqa):
    says = {"1": "The answer is B.", "2": "no idea", "3": "The answer is A."}
    write(sqa / "gpt4.json", {"outputs": says})
    spec, say = "scienceqa:gpt4=gpt4.json", {"1": "A", "2": "B", "3": "B"}
    _, records, scores, _ = run(spec, sqa, say)
    assert scores["gpt4"] == pytest.approx(100 / 3)  # 3 alone
    assert scores["complement"] == pytest.approx(200 / 3)  # 2 by ours, 3 by its own
    task, asked = tasks.make(spec, root=str(sqa)), []

    def ask(prompts):
        asked.extend(prompts)
        return ["Because … The answer is A.", None, "The answer is A. "]

    assert task.judged
    judged = task.scores(task.judge(records, ask))
    assert len(asked) == 3 and "First answer: A" in asked[0] and "answer is B." in asked[0]
    assert judged["judge"] == 100 and judged["accuracy"] == scores["accuracy"]


# ---- MMMU


def parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture
def mmmu_root(tmp_path):
    image = lambda colour: {"bytes": png(colour), "path": "x.png"}  # noqa: E731
    row = {
        "id": "validation_Art_Theory_1", "question": "Compare <image 2> with <image 1>.",
        "options": "['X', \"Y's\"]", "answer": "B", "question_type": "multiple-choice",
        "image_1": image("red"), "image_2": image("blue"),
    }  # fmt: skip
    extra = {"id": "validation_Art_Theory_2", "options": "[]", "question": "How much in <image 1>?",
             "question_type": "open", "answer": "['1,200', 'twelve hundred']"}  # fmt: skip
    name = "validation-00000-of-00001.parquet"
    parquet(tmp_path / "Art_Theory" / name, [row, row | extra])
    options = {"id": "validation_Math_1", "question": "Which one?",
               "options": "['<image 1>', '<image 2>']"}  # fmt: skip
    parquet(tmp_path / "Math" / name, [row | options])
    return tmp_path


def test_mmmu(mmmu_root, tmp_path):
    say = {"validation_Art_Theory_1": "It must be (B).", "validation_Math_1": "a thing",
           "validation_Art_Theory_2": "So the answer is 1200."}  # fmt: skip
    questions, records, scores, files = run("mmmu", mmmu_root, say, tmp_path)
    first, second, third = questions
    assert first.prompt == f"Compare <image> with <image>.\n\n(A) X\n(B) Y's\n\n{LETTER}"
    assert picture(first, 0) == png("blue") and picture(first, 1) == png("red")
    assert second.prompt.startswith("How much in <image>?\n\nAnswer the question using")
    assert third.prompt.startswith("Which one?\n\n(A) <image>\n(B) <image>")
    assert picture(third, 1) == png("blue")
    assert scores == {
        "accuracy": pytest.approx(200 / 3), "Art and Design": 100.0, "Science": 0.0,
        "Art_Theory": 100.0, "Math": 0.0,
    }  # fmt: skip
    assert [r.get("parsed") for r in records] == [True, None, False]
    said = json.loads(files[0].read_text())
    assert said["validation_Art_Theory_1"] == "B" and "1200" in said["validation_Art_Theory_2"]
    (first, *_), *_ = run("mmmu:style=cambrian", mmmu_root, say)
    assert first.prompt.startswith("Compare   with  .\nOptions:\nA. X") and len(first.images) == 2
    (first, *_), *_ = run("mmmu:style=lmms_eval", mmmu_root, say)
    assert first.prompt.endswith(f"\nA. X\nB. Y's\n\n{LETTER}")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [("B", "B"), ("B.", "B"), ("'B.'", None), ("(A) or (B)?", "B"), ("A dog is B", "B"),
     ("a dog", None), ("I really do think that it is Dog", "A"), ("Dog", None), ("C", None)],
)  # fmt: skip
def test_mmmu_choice(reply, letter):
    assert mmmu.choice(reply, ["dog", "cat"]) == letter


@pytest.mark.parametrize(
    ("reply", "gold", "right"),
    [
        ("The result is 3.14159", "3.14", True),
        ("x = 1,200", "1200", True),
        ("I count 5 of them", "5", True),
        ("it is 5", "5", True),
        ("Thus 1.5e3", "1500", True),
        ("maybe a cat\nso it is a dog", "dog", True),
        ("b", "a", False),
        ("the answer is b", "b", True),
        ("Nothing", "thing", True),
    ],
)
def test_mmmu_open(reply, gold, right):
    assert mmmu.open_match(mmmu.open_answers(reply), [gold]) is right


# ---- V*Bench and RealWorldQA


def vstar_folder(root):
    for kind in ("direct_attributes", "relative_position"):
        for k in range(2):
            row = {"question": f"What {k}?", "options": ["It is right.", "It is left.", "None."]}
            write(root / kind / f"{kind}{k}.json", row)
            (root / kind / f"{kind}{k}.jpg").touch()
    return root


def test_vstar_folders(tmp_path):
    root = vstar_folder(tmp_path / "v")
    questions, _, scores, files = run("vstar", root, lambda q: q.gold, tmp_path)
    assert scores == {"accuracy": 100.0, "direct_attributes": 100.0, "relative_position": 100.0}
    assert len({q.gold for q in questions}) > 1  # the right one is not always first
    for question in questions:
        assert f"{question.gold}. It is right." in question.prompt
        assert question.images[0].suffix == ".jpg"
    again, *_ = run("vstar", root, lambda q: q.gold)
    assert [q.prompt for q in again] == [q.prompt for q in questions]
    chosen, *_ = run("vstar:form=choose", root, lambda q: Answer("x", 0, (0.0,)))
    assert sorted(chosen[0].choices) == ["It is left.", "It is right.", "None."]
    assert chosen[0].prompt == "What 0?" and tasks.make("vstar", root="x").normalise


def test_vstar_lines(tmp_path):
    root = vstar_folder(tmp_path)
    text = f"What is it?\n(A) red\n(B) blue\n{LETTER}"
    row = {"image": "direct_attributes/x.jpg", "text": text, "category": "direct_attributes",
           "label": "B", "question_id": 0}  # fmt: skip
    write(root / "test_questions.jsonl", json.dumps(row) + "\n")
    questions, _, scores, _ = run("vstar", root, lambda q: "(B) blue")
    assert questions[0].prompt == text and len(questions) == 1
    assert scores["accuracy"] == 100


def test_realworldqa(tmp_path):
    tail = "\n\nPlease answer directly with only the letter of the correct option and nothing else."
    rows = [
        {"image": "0.webp", "question": f"Where?\nA. Left\nB. Right{tail}", "answer": "A"},
        {"image": "1.webp", "question": "How many?", "answer": "two"},
        {"image": "2.webp", "question": "Is it?", "answer": "Yes"},
    ]
    write(tmp_path / "annotations.json", rows)
    say = {"0": "(A)", "1": "2", "2": "yes."}
    questions, records, scores, files = run("realworldqa", tmp_path, say, tmp_path)
    assert questions[0].prompt == rows[0]["question"]
    assert scores == {"accuracy": pytest.approx(200 / 3), "choice": 100.0, "open": 50.0}
    assert json.loads(files[0].read_text()) == say
    say = {"0": "The answer is A.", "1": "two cats", "2": "No"}
    assert run("realworldqa:parser=cambrian", tmp_path, say)[2]["accuracy"] > 66
    (tmp_path / "annotations.json").unlink()
    image = {"bytes": png("red"), "path": "x"}
    parquet(tmp_path / "data" / "test-0.parquet", [row | {"image": image} for row in rows])
    questions, *_ = run("realworldqa", tmp_path, say)
    assert picture(questions[2]) == png("red")
    parquet(tmp_path / "data" / "test-0.parquet", [{"image": image, "question": "?"}])
    with pytest.raises(FileError, match="test-0.parquet: no answer; it has image, question"):
        run("realworldqa", tmp_path, say)
    (tmp_path / "data" / "test-0.parquet").write_bytes(b"nothing")
    with pytest.raises(FileError, match="can't be read as Parquet"):
        run("realworldqa", tmp_path, say)


def test_mmmu_without_files(tmp_path):
    with pytest.raises(MissingFile, match="no SUBJECT/dev-"):
        list(tasks.make("mmmu:split=dev", root=str(tmp_path)).questions())

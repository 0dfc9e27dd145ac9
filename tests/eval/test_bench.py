"""The bench on a toy task and a toy model: scores, resumes, failures, what is written."""

import collections
import dataclasses
import json
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from metamorph_jax.errors import ConfigError, MissingFile, UserError  # noqa: E402
from metamorph_jax.eval import bench, intervals, results_page, tasks  # noqa: E402
from metamorph_jax.eval.answers import chosen  # noqa: E402
from metamorph_jax.eval.bench import Settings  # noqa: E402
from metamorph_jax.eval.tasks.base import (  # noqa: E402
    Question,  # noqa: E402
    mean,
    mean_terms,
)
from metamorph_jax.sampling.options import Options  # noqa: E402
from tests.eval import toy  # noqa: E402

ROWS = [
    {"id": "a/1", "colour": "red", "image": "a.png", "unit": "a", "kind": "file"},
    {"id": "a/2", "colour": "blue", "unit": "a", "kind": "bytes"},
    {"id": "b/1", "colour": "green", "lazy": True, "unit": "b", "kind": "lazy"},
    {"id": "b/2", "colour": "green", "image": "b.png", "unit": "b", "kind": "file"},
    {"id": "c", "colour": "blue", "image": "missing.png", "unit": "c", "kind": "file"},
    {"id": "D", "colour": "red", "lazy": True, "unit": "d", "kind": "lazy"},
]
SETTINGS = Settings(Options(batch_size=2), resamples=50, model={"workdir": "w"})


@pytest.fixture
def task(tmp_path):
    return tasks.make("tests.eval.toy:Colours", root=toy.write_questions(tmp_path / "q", ROWS))


def wrong_green(prompt, pictures):
    said = toy.Model.colour(prompt, pictures)
    return "red" if said == "green" else said


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_records_and_files(task, tmp_path, capsys):
    model = toy.Model(wrong_green)
    result = bench.run_task(task, model, tmp_path / "out", SETTINGS)
    folder = tmp_path / "out" / "tests.eval.toy-Colours"
    assert result.scores == {
        "pairs": pytest.approx(200 / 3), "accuracy": 60.0, "file": 50.0, "bytes": 100.0,
        "lazy": 50.0,
    }  # fmt: skip
    assert result.questions == 6 and len(result.records) == 5
    assert result.failures == {"c": f"missing: {task.root}/missing.png"}
    assert result.reasons == {"missing": 1} and model.options.max_new_tokens == 5
    low, high = result.intervals["accuracy"]
    assert low < 60 < high
    records = lines(folder / "records.jsonl")
    assert [r["id"] for r in records] == ["a/1", "a/2", "b/1", "b/2", "D"]  # of the file
    assert [r["score"] for r in records] == [1, 1, 0, 0, 1]
    assert records[2]["reply"] == "red" and records[2]["gold"] == "green"
    assert all(pathlib.Path(r["images"][0]).is_file() for r in records)
    assert pathlib.Path(records[0]["images"][0]) == pathlib.Path(task.root, "a.png")
    official = json.loads((folder / "official" / "colours.json").read_text())
    assert official == {r["id"]: r["reply"] for r in records}
    said = capsys.readouterr().err
    assert "question c: missing" in said and "left out" in said and "6 questions" in said
    saved = json.loads(bench.save([result], tmp_path / "out").read_text())["tests.eval.toy:Colours"]
    assert saved["scores"] == result.scores and saved["failed"] == {"missing": 1}
    assert saved["prompt"] == "Which colour?" and saved["settings"]["decoding"]["temperature"] == 0
    assert "batch_size" not in saved["settings"]["decoding"]  # it changes nothing


def test_a_killed_run_resumes_at_every_question(task, tmp_path):
    whole = bench.run_task(task, toy.Model(wrong_green), tmp_path / "whole", SETTINGS)
    for last in range(5):
        out, first = tmp_path / str(last), toy.Model(wrong_green, last)
        with pytest.raises(toy.Killed):
            bench.run_task(task, first, out, SETTINGS)
        second = toy.Model(wrong_green)
        resumed = bench.run_task(task, second, out, SETTINGS)
        assert len(first.asked) == last and sorted(first.asked + second.asked) == [
            "D", "a/1", "a/2", "b/1", "b/2",
        ]  # fmt: skip
        assert resumed.scores == whole.scores and resumed.intervals == whole.intervals
        without = lambda rs: [{k: v for k, v in r.items() if k != "images"} for r in rs]  # noqa: E731
        assert without(resumed.records) == without(whole.records)
        assert all(pathlib.Path(p).is_file() for r in resumed.records for p in r["images"])


def test_damaged_lines_are_answered_again(task, tmp_path, capsys):
    bench.run_task(task, toy.Model(), tmp_path, SETTINGS)
    file = tmp_path / "tests.eval.toy-Colours" / "answers.jsonl"
    kept = file.read_text().splitlines(keepends=True)
    ids = [json.loads(line)["id"] for line in kept]
    file.write_text("".join([kept[0], "{broken}\n", '{"id": 3}\n', *kept[2:-1], kept[-1][:9]]))
    model = toy.Model()
    result = bench.run_task(task, model, tmp_path, SETTINGS)
    assert sorted(model.asked) == sorted([ids[1], ids[-1]]) and result.scores["accuracy"] == 100
    assert "2 damaged lines (the first is line 2)" in capsys.readouterr().err
    assert {json.loads(line)["id"] for line in file.read_text().splitlines()} == {*ids}


def test_a_question_that_is_asked_differently_is_asked_again(task, tmp_path):
    bench.run_task(task, toy.Model(), tmp_path, SETTINGS)
    rows = [row | ({"colour": "green"} if row["id"] == "a/2" else {}) for row in ROWS]
    toy.write_questions(pathlib.Path(task.root), rows)
    model = toy.Model()
    result = bench.run_task(task, model, tmp_path, SETTINGS)
    assert model.asked == ["a/2"] and result.scores["accuracy"] == 100


def test_a_benchmark_that_was_moved_is_not_asked_again(task, tmp_path):
    bench.run_task(task, toy.Model(), tmp_path, SETTINGS)
    moved = dataclasses.replace(task, root=str(pathlib.Path(task.root).rename(tmp_path / "new")))
    result = bench.run_task(moved, toy.Model(last=0), tmp_path, SETTINGS)
    assert result.records[0]["images"] == [f"{tmp_path}/new/a.png"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"options": Options(batch_size=2, temperature=0.5)}, "decoding"),
        ({"model": {"workdir": "other"}}, "model"),
    ],
)
def test_other_settings_are_refused(task, tmp_path, change, named):
    bench.run_task(task, toy.Model(), tmp_path, SETTINGS)
    with pytest.raises(UserError, match=f"other settings .{named}") as caught:
        bench.run_task(task, toy.Model(), tmp_path, dataclasses.replace(SETTINGS, **change))
    assert "choose another --out" in str(caught.value)


def test_the_most_likely_answer_is_chosen(tmp_path):
    root = toy.write_questions(tmp_path / "q", ROWS)
    task = tasks.make("tests.eval.toy:Colours:form=choose", root=root)
    result = bench.run_task(task, toy.Model(wrong_green), tmp_path, SETTINGS)
    assert result.scores["accuracy"] == 60 and result.records[2]["reply"] == "red"
    assert result.records[1]["choice"] == 2
    assert result.records[1]["likelihoods"] == [-2.0, -3.0, -1.0]


def test_drawn_images_are_kept(tmp_path):
    root = toy.write_questions(tmp_path / "q", ROWS[:2])
    task = tasks.make("tests.eval.toy:Colours:form=draw", root=root)
    pixels = np.zeros((4, 4, 3), np.uint8)
    result = bench.run_task(task, toy.Model(drawn=[pixels, pixels]), tmp_path, SETTINGS)
    for record in result.records:
        assert len(record["drawn"]) == 2 and all(pathlib.Path(p).is_file() for p in record["drawn"])
    pathlib.Path(result.records[0]["drawn"][1]).unlink()  # then it is drawn again
    again = toy.Model(drawn=[pixels, pixels])
    bench.run_task(task, again, tmp_path, SETTINGS)
    assert again.asked == [result.records[0]["id"]]


def test_only_judged_answers_count(tmp_path):
    root = toy.write_questions(tmp_path / "q", ROWS)
    task = tasks.make("tests.eval.toy:Colours:judge_it=true", root=root)
    result = bench.run_task(task, toy.Model(), tmp_path, SETTINGS)
    assert result.scores == {} and "5 answers have no verdict" in results_page.notes(result)[-1]
    judge = lambda texts: ["yes", "no", None, "yes", "no"]  # noqa: E731
    result = bench.run_task(task, toy.Model(last=0), tmp_path, SETTINGS, lambda folder: judge)
    assert result.scores["accuracy"] == 50 and result.unparsed == 1


def test_a_task_without_any_answer_says_why(tmp_path):
    root = toy.write_questions(tmp_path / "q", ROWS[4:5])
    task = tasks.make("tests.eval.toy:Colours", root=root)
    with pytest.raises(UserError, match="no question could be answered: missing"):
        bench.run_task(task, toy.Model(), tmp_path, SETTINGS)
    root = toy.write_questions(tmp_path / "q", [ROWS[0], ROWS[0]])
    with pytest.raises(UserError, match="two questions have the id 'a/1'"):
        bench.run_task(task, toy.Model(), tmp_path, SETTINGS)


def test_scores_during_training(tmp_path):
    from metamorph_jax.train import evals

    root = toy.write_questions(tmp_path, ROWS)
    with pytest.raises(MissingFile, match="easy_vqa: no questions_test.jsonl"):
        evals.find_task("easy_vqa")(root=root)
    find = evals.find_task("easy_vqa")
    with pytest.raises(ConfigError, match="no option nonsense"):
        find(nonsense=1)
    (tmp_path / "questions_test.jsonl").write_text("".join(
        json.dumps({"id": str(k), "image": "x.png", "question": "what color is it?",
                    "answer": "red"}) + "\n" for k in range(3)
    ))  # fmt: skip
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_bytes(toy.png("red"))
    model = toy.Model()
    scores = find(root=root, limit=2, max_new_tokens=3).run(model)
    assert scores == {"accuracy": 100.0, "color": 100.0, "failed": 0.0}
    assert model.options.max_new_tokens == 3
    own = evals.find_task("metamorph_jax.eval.bench:TaskDuringTraining")
    assert own(name="tests.eval.toy:Colours", root=root).run(model)["accuracy"] == 100


def test_scores_of_several_starts(task, tmp_path):
    """scores.json keeps other tasks of the same model, and of no other one."""
    other = dataclasses.replace(task, name="other")
    for one, model in ((task, "w"), (other, "w"), (other, "v")):
        settings = dataclasses.replace(SETTINGS, model={"workdir": model}, resamples=0)
        result = bench.run_task(one, toy.Model(), tmp_path / model, settings)
        saved = json.loads(bench.save([result], tmp_path).read_text())
        expected = {"w": {task.name, one.name}, "v": {"other"}}[model]
        assert saved.keys() == expected


def test_progress_without_a_terminal(tmp_path, capsys, monkeypatch):
    from metamorph_jax.eval import asking

    monkeypatch.setattr(asking, "_CHUNK", 1)
    task = tasks.make("tests.eval.toy:Colours", root=toy.write_questions(tmp_path / "q", ROWS))
    bench.run_task(task, toy.Model(), tmp_path, SETTINGS)
    assert "2 of 6 asked\n" in capsys.readouterr().err


# ---- names


def test_names_and_options(tmp_path):
    made = tasks.make("seed:form=choose,kind=all", tmp_path, normalise=True)
    assert (made.form, made.kind, made.normalise) == ("choose", "all", True)
    assert made.root == str(tmp_path / "seed") and made.name == "seed:form=choose,kind=all"
    assert tasks.file_name(made.name) == "seed-form=choose,kind=all"
    assert tasks.make("pope:root=/data/pope", tmp_path).root == "/data/pope"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("popo", "did you mean pope"),
        ("nothing", "Tasks: "),
        ("pope:x=1", "no option x; it has"),
        ("pope:setting", "expected OPTION=VALUE"),
        ("pope:setting=none", "expected one of all, random"),
        ("seed:normalise=perhaps", "must be bool"),
        ("tests.eval.toy:png", "not a task"),
        ("tests.eval.none:X", "no module tests.eval.none"),
    ],
)
def test_wrong_names_are_explained(spec, message):
    with pytest.raises(ConfigError, match=message):
        tasks.make(spec, "bench")


DOCS = pathlib.Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_every_task_and_its_files_are_documented(name):
    row = next((r for r in DOCS.read_text().splitlines() if r[:1] == "|" and f"`{name}`" in r), "")
    assert row, f"no row of a table names {name}"
    for file in tasks.find(tasks.TASKS[name]).files:
        assert f"`{file.path}`" in row, file.path


@pytest.mark.parametrize("name", [n for n in sorted(tasks.TASKS) if n != "made_images"])
def test_every_task_says_which_file_is_missing(name, tmp_path):
    cls = tasks.find(tasks.TASKS[name])
    assert cls.title and cls.files and cls.__doc__
    needed = ":candidates=1" if name == "coco30k_rows" else ""
    with pytest.raises(MissingFile) as caught:
        list(tasks.make(name + needed, tmp_path).questions())
    said = str(caught.value)
    assert str(tmp_path / name) in said and f"task {name}" in said
    assert any(file.source in said for file in cls.files), said


# ---- which questions, and how sure


units = st.lists(st.integers(0, 12), min_size=1, max_size=40)


@given(units, st.integers(1, 45), st.integers(0, 3))
def test_a_limit_takes_whole_units_in_order(units, limit, seed):
    questions = [Question(str(k), "?", unit=str(unit)) for k, unit in enumerate(units)]
    taken = chosen(questions, limit, seed)
    assert taken and [int(q.id) for q in taken] == sorted(int(q.id) for q in taken)
    sizes, found = (collections.Counter(q.unit for q in part) for part in (questions, taken))
    assert all(found[unit] == sizes[unit] for unit in found)
    assert len(taken) <= limit or len(found) == 1
    more = chosen(questions, limit + 3, seed)
    assert {q.id for q in taken} <= {q.id for q in more}
    assert chosen(questions, 0) == questions


class Mean(toy.Colours):
    def scores(self, records):
        return {"accuracy": sum(r["score"] for r in records) / len(records)}


def records(scores, size=1):
    return [
        {"score": score, "unit": str(k // size), "groups": {}} for k, score in enumerate(scores)
    ]


def test_intervals_are_those_of_scipy():
    from scipy import stats

    scores = np.random.default_rng(0).random(60) ** 2
    found = intervals.bootstrap(Mean("x"), records(scores), resamples=1500).ranges["accuracy"]
    expected = stats.bootstrap((scores,), np.mean, n_resamples=1500, method="percentile",
                               rng=np.random.default_rng(1)).confidence_interval  # fmt: skip
    np.testing.assert_allclose(found, (expected.low, expected.high), atol=0.015)


def test_units_stay_together():
    """Equal answers within units: as uncertain as one of each, not as twice as many."""
    scores = np.random.default_rng(0).random(40)
    alone = intervals.bootstrap(Mean("x"), records(scores), resamples=300)
    doubled = intervals.bootstrap(Mean("x"), records(np.repeat(scores, 2), 2), resamples=300)
    np.testing.assert_allclose(alone.ranges["accuracy"], doubled.ranges["accuracy"])
    pairs = intervals.bootstrap(toy.Colours("x"), records([1, 0] * 5, 2), resamples=20).ranges
    assert pairs["pairs"] == (0, 0) and pairs["accuracy"] == (50, 50)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=8))
def test_intervals_lie_within_the_values(scores):
    low, high = intervals.bootstrap(Mean("x"), records(scores), resamples=15).ranges["accuracy"]
    assert min(scores) <= low <= high <= max(scores)
    assert not intervals.bootstrap(Mean("x"), records(scores), resamples=0).ranges
    assert not intervals.bootstrap(Mean("x"), records(scores[:1])).ranges


class Weighted(toy.Colours):
    """With terms of two metrics, one of which is not what they say, and a third without terms."""

    def scores(self, records):
        first = [r["score"] for r in records if r["groups"]["kind"] == "a"]
        found = {"accuracy": mean(records), "wrong": 1.0, "pairs": 3 * mean(records)}
        return found | ({"a": 100 * sum(first) / len(first)} if first else {})

    def terms(self, record):
        return mean_terms(record, "kind") | {"wrong": (record["score"], 1.0)}


def test_weighted_and_rescored_metrics():
    """Weighting gives what scoring every resample gives, where terms are right; what scores lack is
    left out, and so is a resample that has none of a group."""
    rng = np.random.default_rng(0)
    made = records(rng.random(30), 2)
    for k, record in enumerate(made):
        record["groups"] = {"kind": "a" if k in (3, 4) else "b"}
    task = Weighted("x")
    found = intervals.bootstrap(task, made, resamples=70)
    assert found.rescored == {"wrong", "pairs"} and found.ranges.keys() == task.scores(made).keys()
    assert found.methods() == {"weighted, 70 resamples": ["accuracy", "a"],
                               "rescored, 70 resamples": ["wrong", "pairs"]}  # fmt: skip
    task.__class__.terms, kept = toy.Colours.terms, Weighted.terms
    try:
        anew = intervals.bootstrap(task, made, resamples=70)
    finally:
        task.__class__.terms = kept
    assert anew.rescored >= {"accuracy", "a"}
    for metric, pair in anew.ranges.items():
        np.testing.assert_allclose(found.ranges[metric], pair, rtol=1e-12, err_msg=metric)


def test_many_questions_are_weighted_in_full_and_rescored_less(monkeypatch):
    monkeypatch.setattr(intervals, "_CHUNK", 2**12)  # several chunks
    made = records(np.random.default_rng(0).random(3000))
    for record in made:
        record["groups"] = {"kind": "a"}
    monkeypatch.setattr(intervals, "_WORK", 3000)
    monkeypatch.setattr(intervals, "FEWEST", 3)
    found = intervals.bootstrap(Weighted("x"), made)
    assert found.resamples == {"accuracy": 1000, "a": 1000, "wrong": 3, "pairs": 3}


# ---- what people see


def test_table_and_page(task, tmp_path):
    model = toy.Model(lambda p, i: "cut" if i[0].getpixel((0, 0))[1] else wrong_green(p, i))
    result = bench.run_task(task, model, tmp_path, SETTINGS)
    shown = results_page.table([result])
    row = next(line for line in shown.splitlines() if line.startswith("tests.eval.toy:Colours  "))
    assert row.split()[1:3] == ["pairs", "66.7"] and row.endswith("5 of 6")
    assert "1 questions could not be asked (1 missing)" in shown
    assert "2 replies could not be read" in shown and "2 replies were cut off" in shown
    text = results_page.write(tmp_path / "report.html", [result], "<b>w</b>").read_text()
    assert "Evaluation of &lt;b&gt;w" in text and text.count("data:image/png") == 2
    assert "right: green" in text and "Which colour?" in text


def test_the_worst_come_first():
    rows = [{"score": score, "id": k} for k, score in enumerate([1, 0.5, 0, None, 0.2, 1])]
    assert [r["id"] for r in results_page.worst_of(rows)] == [2, 4, 1]
    assert len(results_page.worst_of(rows, 2)) == 2

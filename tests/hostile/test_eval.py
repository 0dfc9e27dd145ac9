"""Official files, answers of an earlier start, options and disks that want to break `eval`.

The model is a function; benchmarks are as small as they can be (`benchmarks.py`). Each value of
each file is replaced by others: a question is then asked, or the file is named in one line.
"""

import errno
import json
import os
import random
import tempfile
import types

import pytest

from metamorph_jax.eval import answers, bench, tasks
from metamorph_jax.models.diffusion.samplers import SamplingConfig
from metamorph_jax.recipes.llava import scienceqa
from metamorph_jax.sampling import generate
from tests.eval.toy import Model
from tests.hostile.benchmarks import BENCHMARKS, changed, folder_of, places, put
from tests.hostile.harness import attempt, check, damaged

VALUES = (
    None, True, 0, -1, 10**30, 1e308, float("nan"), "", " ", "\0", "\x1b[2J", "../../../etc/passwd",
    "/etc/passwd", "a" * 5000, [], [[]], {}, {"a": []}, "<image>", [3, "x"], ...,
    "https://localhost/a.png", "\ud800",
)  # fmt: skip
# Keys whose values are asked, or compared with what is answered.
TEXTS = {"question", "query", "text", "caption", "sent", "raw", "label", "imgname", "paragraph"}
MODEL = Model(lambda prompt, pictures: "A")
MODEL.image_decoder = types.SimpleNamespace(sampling=SamplingConfig())


@pytest.fixture
def bench_root(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load", lambda args: MODEL)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # openpyxl's
    (tmp_path / "w").mkdir()
    return tmp_path / "bench"


def write(root, spec):
    for name, value in BENCHMARKS[spec].items():
        put(root / folder_of(spec), name, value)


def words(spec, *more):
    drawing = ("--decoder", "w") if tasks.make(spec).form == "draw" else ()
    return ["eval", "--workdir", "w", "--bench-root", "bench", "--tasks", spec, "--out", "o",
            "--resamples", "2", *drawing, *more]  # fmt: skip


def outcomes(root, spec, name, values):
    """(way, value, outcome) of the task with a file that holds each value in turn."""
    made = BENCHMARKS[spec][name]
    for number, (way, value) in enumerate(values):
        put(root / folder_of(spec), name, changed(made, way, value))

        def run(out=root.parent / "out" / str(number)):
            task = tasks.make(spec, str(root))
            bench.run_task(task, MODEL, out, bench.Settings(resamples=0))

        yield way, value, attempt(run, root.parent)
    put(root / folder_of(spec), name, made)


@pytest.mark.parametrize("spec", BENCHMARKS)
def test_values_of_every_key(spec, bench_root):
    write(bench_root, spec)
    check(words(spec), bench_root.parent, code=0)
    dice, tried = random.Random(spec), 0
    for name, made in BENCHMARKS[spec].items():
        if not isinstance(made, dict | list):
            continue
        ways = [way for way in places(made) if not any(k in (2, "2", "v1_2") for k in way)]
        values = [(way, dice.choice(VALUES[: None if way else -3])) for way in ways]
        if name.endswith(".p"):
            values = [pair for pair in values if pair[1] != "\ud800"]
        for _ in outcomes(bench_root, spec, name, values):
            tried += 1
        texts = [(way, value) for way in ways for value in (None, 3)
                 if way and way[-1] in TEXTS and _at(made, way) is str]  # fmt: skip
        for way, value, found in outcomes(bench_root, spec, name, texts):
            assert found.code == 2, (name, way, value)
    assert tried > 2 or spec in ("mme", "mmbench", "mmvp", "dpg:samples=1")


def _at(made, way):
    for key in way:
        made = made[key]
    return type(made)


@pytest.mark.parametrize(
    "spec", [s for s in BENCHMARKS if folder_of(s) in ("mme", "mmbench", "mmvp", "dpg")]
)
def test_damaged_tables(spec, bench_root):
    write(bench_root, spec)
    name, made = next(iter(BENCHMARKS[spec].items()))
    for _, data in damaged(made.encode(), max(1, len(made) // 12), 12, 0, (1, 3)):
        (bench_root / folder_of(spec) / name).write_bytes(data)
        check(words(spec), bench_root.parent)
        for file in (bench_root.parent / "o").glob("*/answers.jsonl"):
            file.unlink()


def test_the_command_names_what_is_wrong(bench_root):
    """From the command line: one line, with the task, and the other tasks don't suffer."""
    spec, folder = "pope:setting=random", bench_root.parent
    write(bench_root, spec)
    file = bench_root / "pope" / "coco_pope_random.json"
    row = BENCHMARKS[spec]["coco_pope_random.jsonl"][0]
    for raw in (
        b"",
        b"\n",
        b"{",
        b"[]",
        b"\xff\xfe{\0",
        b"[" * 100_000,
        b"\0" * 1000,
        b"3",
        b'{"question_id": 1}',
        json.dumps(row | {"text": "\ud800"}).encode(),
    ):
        file.write_bytes(raw)
        check(words(spec), folder, code=2, naming="pope")
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r\n")
    assert "pope" in check(words(spec), folder, code=0).out
    file.unlink()
    os.mkfifo(file)
    check(words(spec), folder, code=2, naming="coco_pope_random.json")


# ---- images


def test_images_elsewhere_are_not_opened(bench_root, tmp_path):
    """An official file can't have a file of the user's sent to an endpoint or put into a page."""
    outside = tmp_path / "secret.png"
    put(tmp_path, "secret.png", 0)
    for spec, key in (
        ("pope:setting=random", "image"),
        ("realworldqa", "image"),
        ("chartqa", "imgname"),
        ("seed:kind=all", "data_id"),
        ("vizwiz", "image"),
        ("coco_caption:tokenizer=python", "filename"),
    ):
        write(bench_root, spec)
        name, made = next(iter(BENCHMARKS[spec].items()))
        way = next(way for way in places(made) if way and way[-1] == key)
        for path in (str(outside), "../" * 9 + str(outside), f"x/../../../../{outside.name}"):
            for *_, found in outcomes(bench_root, spec, name, [(way, path)]):
                assert "outside" in found.err or "missing" in found.err, (spec, path)
    (bench_root / "pope" / "val2014" / "1.png").unlink()
    (bench_root / "pope" / "val2014" / "1.png").symlink_to(outside)  # the owner put it there
    check(words("pope:setting=random"), tmp_path, code=0)


def test_images_that_are_none(bench_root, tmp_path):
    """They are left out and counted; the others are scored."""
    write(bench_root, "pope:setting=random")
    place = bench_root / "pope" / "val2014" / "1.png"
    whole = place.read_bytes()
    for data in (b"", b"no image", whole[:40], whole[:-30], b"GIF89a", b"\0" * 100):
        place.write_bytes(data)
        found = check(words("pope:setting=random"), tmp_path, code=2)
        assert "1 of 2" in found.out, found.out
    for make in (os.mkfifo, os.mkdir):
        place.unlink()
        make(place)
        assert "1 of 2" in check(words("pope:setting=random"), tmp_path, code=2).out


# ---- an earlier start, and the disk

LINES = (
    b"x", b"{}", b"[]", b"null", b"{", b"\0", b"[" * 10_000, b'{"id": "random/1"}', b'{"id": [1]}',
    b'{"id": "random/1", "key": "KEY"}', b'{"id": "random/1", "key": "KEY", "text": 3}',
    b'{"id": "random/1", "key": "KEY", "text": "B", "images": 3}',
    b'{"id": "random/1", "key": "KEY", "text": "B", "choice": -1}',
    b'{"id": "random/1", "key": "KEY", "text": "B", "likelihoods": ["x"]}',
    b'{"id": "random/1", "key": "KEY", "text": "\\ud800"}', b'{"id": "random/1", "key": "KE',
)  # fmt: skip


def test_answers_of_an_earlier_start(bench_root, tmp_path):
    """What is damaged is asked again; what is whole is kept."""
    spec = "pope:setting=random"
    write(bench_root, spec)
    check(words(spec), tmp_path, code=0)
    (file,) = (tmp_path / "o").glob("*/answers.jsonl")
    whole = file.read_bytes()
    key = json.loads(whole.splitlines()[0])["key"].encode()
    for line in LINES:
        for end in (b"\n", b""):
            file.write_bytes(line.replace(b"KEY", key) + end)
            check(words(spec), tmp_path, code=0)
            kept = [json.loads(line) for line in file.read_text().splitlines()]
            assert sorted(line["id"] for line in kept) == ["random/1", "random/2"], line
            assert all(line["text"] == "A" for line in kept), line
    for raw in (b"", b"{", b"[]", b"{}", b"\xff", b"[" * 10_000):
        (file.parent / "settings.json").write_bytes(raw)
        check(words(spec), tmp_path, code=2)
    assert len(file.read_bytes().splitlines()) == 2


@pytest.mark.parametrize(
    "name",
    [
        "scores.json",
        "report.html",
        "pope-setting=random",
        "pope-setting=random/answers.jsonl",
        "pope-setting=random/records.jsonl",
        "pope-setting=random/official",
    ],
)
def test_results_that_can_t_be_written(name, bench_root, tmp_path):
    write(bench_root, "pope:setting=random")
    place = tmp_path / "o" / name
    place.parent.mkdir(parents=True)
    place.write_text("") if "." not in name else place.mkdir()
    check(words("pope:setting=random"), tmp_path, code=2)


def test_a_full_disk(bench_root, tmp_path, monkeypatch):
    write(bench_root, "pope:setting=random")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(answers.Store, "add", full)
        found = check(words("pope:setting=random"), tmp_path, code=2)
        assert "No space left" in found.err
    check(words("pope:setting=random"), tmp_path, code=0)


# ---- options

NUMBERS = ("", "nan", "inf", "-inf", "-1", "1e400", "x", "0x1", "9" * 30, "1.5", "\x1b[2J")


def test_options(bench_root, tmp_path):
    spec = "pope:setting=random"
    write(bench_root, spec)
    for option in (
        "limit",
        "resamples",
        "batch-size",
        "judge-temperature",
        "temperature",
        "max-new-tokens",
        "concurrency",
        "timeout",
        "requests-per-minute",
    ):
        for number in NUMBERS:
            check(words(spec, f"--{option}={number}"), tmp_path)
    for more in (
        ("--endpoint", "m"),
        ("--judge", "gone"),
        ("--judge-config", "c"),
        ("--checkpoint", "c"),
        ("--price", "nan", "1", "--judge", "m"),
        ("--price", "-1", "1", "--judge", "m"),
        ("--judge-workdir", "gone"),
    ):
        check(words(spec, *more), tmp_path, code=2)
    for task in (
        "", " ", ",", ":", "pope:", "pope:x", "pope:x=1", "pope:setting", "pope:setting=\x1b", "\0",
        "os:path", "os.path:join", "metamorph_jax.eval.tasks.pope:Gone", "gone.module:Class",
        "mvbench:frames=0", "mvbench:frames=" + "9" * 20, "geneval:samples=" + "9" * 20,
        "coco30k:count=" + "9" * 20, "dpg:resolution=1000000", "coco30k:fid_size=1000000000",
        "pope:root=gone", "pope:root=", "pope:root=/dev/zero", "pope,pope", "pope:setting=random,"
        "setting=popular", "mmvet:grader=/dev/zero", "scienceqa:gpt4=../x",
    ):  # fmt: skip
        check(["eval", "--workdir", "w", "--tasks", task, "--out", "o"], tmp_path, code=2)


# ---- ScienceQA's converter

PROBLEM = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": None,
           "lecture": "l", "solution": "s"}  # fmt: skip


def test_converted_problems(tmp_path):
    def run(problems, splits, *more):
        (tmp_path / "problems.json").write_text(json.dumps(problems))
        (tmp_path / "pid_splits.json").write_text(json.dumps(splits))
        return scienceqa.main(["--folder", str(tmp_path), "--out", str(tmp_path / "out.json"),
                               *more])  # fmt: skip

    assert run({"1": PROBLEM}, {"train": ["1"]}) == 0
    before = (tmp_path / "out.json").read_bytes()
    for key in PROBLEM:
        for value in (3.5, [], {}, -1, 99, ...):
            if key == "image" and value in ([], {}):
                continue
            assert run({"1": changed(PROBLEM, (key,), value)}, {"train": ["1"]}) == 2, (key, value)
    for problems, splits in (
        ({}, {"train": ["1"]}),
        ([], {}),
        ({"1": []}, {"train": ["1"]}),
        ({"1": PROBLEM}, {"train": "1"}),
        ({"1": PROBLEM}, {"train": [[]]}),
        ({"1": PROBLEM}, []),
        ({"1": PROBLEM}, {"train": ["../1"]}),
    ):
        assert run(problems, splits) == 2
    assert run({"1": PROBLEM}, {"train": ["1"]}, "--split", "gone\x1b") == 2
    assert run({"1": PROBLEM}, {"train": ["1"]}, "--format", "X") == 2
    assert run({"1": PROBLEM}, {"train": ["1"]}, "--out", str(tmp_path / "gone" / "x")) == 2
    assert (tmp_path / "out.json").read_bytes() == before

"""`metamorph eval` from the command line to its files, with the tiny random model."""

import json
import pathlib
import subprocess
import sys

import pytest

from metamorph_jax import cli
from metamorph_jax.eval import command
from tests.eval.toy import png


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Small POPE, easy_vqa and SEED."""
    root = tmp_path_factory.mktemp("bench")
    pope, easy, seed = (root / name for name in ("pope", "easy_vqa", "seed"))
    for folder in (pope / "val2014", easy / "images", seed / "SEED-Bench-image"):
        folder.mkdir(parents=True)
        for k, colour in enumerate(("red", "blue")):
            (folder / f"{k}.png").write_bytes(png(colour))
    for setting in ("random", "popular", "adversarial"):
        lines(pope / f"coco_pope_{setting}.json", [
            {"question_id": k, "image": f"{k}.png", "text": "Is it?", "label": "yes"}
            for k in (0, 1)
        ])  # fmt: skip
    lines(easy / "questions_test.jsonl", [
        {"id": str(k), "image": f"{k}.png", "question": "what color?", "answer": "red"}
        for k in (0, 1, 2)
    ])  # fmt: skip
    rows = [{"question_id": k, "question_type_id": 1, "data_type": "image", "question": "What?",
             "data_id": f"{k}.png", "answer": "A"} for k in (0, 1)]  # fmt: skip
    rows = [row | {f"choice_{c}": c for c in "abcd"} for row in rows]
    table = {"question_type": {"Scene": 1}, "questions": rows}
    (seed / "SEED-Bench.json").write_text(json.dumps(table))
    return root


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*args):
    return cli.main(["eval", *map(str, args)])


def test_end_to_end(workdir, bench, tmp_path, capsys, monkeypatch):
    """Tables, files, exit codes; the second start answers nothing again."""
    args = ("--workdir", workdir, "--bench-root", bench, "--max-new-tokens", 3, "--out",
            tmp_path / "o", "--tasks", "pope,seed:form=choose", "--resamples", 20)  # fmt: skip
    assert run(*args) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert ["task", "metric", "score", "95", "%", "interval", "questions"] in rows
    assert any(row[:2] == ["pope", "f1"] and row[-1] == "6" for row in rows)
    assert any(row[:2] == ["seed:form=choose", "all"] for row in rows)
    assert "report: " in out and (tmp_path / "o" / "report.html").is_file()
    saved = json.loads((tmp_path / "o" / "scores.json").read_text())
    assert saved.keys() == {"pope", "seed:form=choose"}
    assert saved["pope"]["settings"]["model"]["workdir"] == str(workdir)
    assert len(saved["pope"]["settings"]["model"]["workdir_files"]) == 16
    answers = (tmp_path / "o" / "pope" / "answers.jsonl").read_text()

    monkeypatch.setattr("metamorph_jax.sampling.generator.Generator.replies", None)
    monkeypatch.setattr(
        "metamorph_jax.sampling.generator.Generator.likelihoods", lambda *a, **k: ()
    )
    assert run(*args) == 0
    assert (tmp_path / "o" / "pope" / "answers.jsonl").read_text() == answers
    assert "6 answered before" in capsys.readouterr().err

    assert run(*args, "--temperature", 1) == 2
    assert "other settings (decoding; decoding: " in capsys.readouterr().err


def test_a_missing_image_ends_with_2_after_all_else_is_done(workdir, bench, tmp_path, capsys):
    args = ("--workdir", workdir, "--bench-root", bench, "--max-new-tokens", 3)
    assert run(*args, "--tasks", "easy_vqa", "--out", tmp_path, "--resamples", 0) == 2
    out, err = capsys.readouterr()
    assert "easy_vqa" in out and "2 of 3" in out
    assert "1 questions could not be asked" in err and "question 2: missing" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--workdir", "W"], "give --tasks"),
        (["--workdir", "W", "--tasks", "pope,pope"], "a task twice"),
        (["--workdir", "W", "--tasks", "popo"], "did you mean pope"),
        (["--workdir", "W", "--tasks", "mme"], "task mme: no existence or count"),
        (["--workdir", "W", "--tasks", "pope", "--limit", "-1"], "must not be negative"),
        (["--checkpoint", "hf:a/b", "--tasks", "pope"], "give --out DIR"),
        (["--tasks", "pope"], "give either --workdir or --checkpoint"),
        (
            ["--workdir", "W", "--bench-root", "/nowhere/x", "--tasks", "pope"],
            "there is no /nowhere",
        ),
    ],
)
def test_mistakes_are_said_before_the_model_is_loaded(
    args, message, workdir, bench, capsys, monkeypatch
):
    monkeypatch.setattr("metamorph_jax.sampling.generate.load", None)
    args = [str(workdir) if arg == "W" else arg for arg in args]
    if "--bench-root" not in args:
        args += ["--bench-root", str(bench)]
    assert cli.main(["eval", *args]) == 2
    assert message in capsys.readouterr().err


def test_list(capsys):
    assert run("--list") == 0
    out = capsys.readouterr().out
    assert "pope: POPE (setting=all, images=)\n" in out and "  pope/val2014: the images" in out


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pope,mme", ["pope", "mme"]),
        ("seed:form=choose,kind=all,pope", ["seed:form=choose,kind=all", "pope"]),
        ("pope  mme:style=official", ["pope", "mme:style=official"]),
        ("a.b:C:x=1,y=2,d", ["a.b:C:x=1,y=2", "d"]),
        (
            "geneval:prompt=Draw it: {prompt},samples=1 mme pope:x=1 a.b:C",
            ["geneval:prompt=Draw it: {prompt},samples=1", "mme", "pope:x=1", "a.b:C"],
        ),
        ("", []),
    ],
)
def test_names(text, found):
    assert command.names(text) == found


def test_the_fingerprint_is_of_the_weights(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "x").write_text("1")
    before = command.fingerprint(tmp_path)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "scores.json").write_text("{}")
    assert command.fingerprint(tmp_path) == before
    (tmp_path / "final" / "x").write_text("12")
    assert command.fingerprint(pathlib.Path(tmp_path)) != before


def test_one_process_writes_a_folder(bench, tmp_path, monkeypatch, capsys):
    """A second one is told who works there, before it loads a model."""
    monkeypatch.setattr("metamorph_jax.sampling.generate.load", None)
    hold = "import sys; from metamorph_jax.eval import command; import pathlib; "
    hold += "lock = command.locked(pathlib.Path(sys.argv[1])); print(1, flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"1\n"
        args = ("--workdir", tmp_path, "--bench-root", bench, "--tasks", "pope")
        assert run(*args, "--out", tmp_path) == 2
        error = capsys.readouterr().err
        assert f"another process evaluates in {tmp_path}" in error and f"pid {other.pid}" in error
        assert "choose another --out" in error
    finally:
        other.communicate(b"\n", timeout=20)


def test_an_old_spelling_names_the_new_one(bench, tmp_path, capsys):
    args = ("--workdir", tmp_path, "--bench-root", bench, "--tasks", "pope")
    assert run(*args, "--judge-workdir", "runs/x") == 2
    assert "give --judge runs/x" in capsys.readouterr().err
    assert run(*args, "--judge", "gpt-4o") == 2
    assert "a model of an endpoint is endpoint:MODEL" in capsys.readouterr().err

"""Judges and models behind an endpoint, against a local server; what a judge said is kept."""

import dataclasses
import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from metamorph_jax import cli  # noqa: E402
from metamorph_jax.endpoint import Endpoint, Limits  # noqa: E402
from metamorph_jax.errors import EndpointError, UserError  # noqa: E402
from metamorph_jax.eval import bench, judges, tasks  # noqa: E402
from metamorph_jax.eval.bench import Settings  # noqa: E402
from metamorph_jax.eval.judges import EndpointModel, Judge  # noqa: E402
from metamorph_jax.sampling.options import Options  # noqa: E402
from metamorph_jax.sampling.requests import Request  # noqa: E402
from tests import chat_server  # noqa: E402
from tests.eval import toy  # noqa: E402

ROWS = [{"id": str(k), "colour": c, "image": f"{k}.png"} for k, c in enumerate(("red", "blue"))]


def text_of(body) -> str:
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "@") for part in content)


@pytest.fixture
def asked(monkeypatch):
    """An endpoint whose server answers by `answer`, and the server."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    opened = []

    def open_one(answer=None, script=(), tries=1):
        server = chat_server.ChatServer(script, answer)
        server.__enter__()
        opened.append(server)
        return Endpoint(server.url, limits=Limits(2, tries=tries)), server

    yield open_one
    for server in opened:
        server.__exit__(None, None, None)


def test_messages_hold_images_where_their_markers_are(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(toy.png("red"))
    one = judges.messages(Request("0", "First <image> then <image>?", (str(path),) * 2))
    kinds = [part["type"] for part in one[0]["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    front = judges.messages(Request("0", "What?", (str(path),)))[0]["content"]
    assert [part.get("text") for part in front] == [None, "What?"]
    assert judges.messages(Request("0", "Hello")) == [{"role": "user", "content": "Hello"}]
    with pytest.raises(ValueError, match="1 markers, 0 images"):
        judges.messages(Request("0", "<image>"))
    with pytest.raises(ValueError, match="videos"):
        judges.messages(Request("0", "x", video="a.mp4"))


def test_an_endpoint_answers_a_task(asked, tmp_path):
    """One image is missing, one question is refused: both are left out and named."""
    rows = [*ROWS, {"id": "2", "colour": "red", "image": "missing.png"}]
    task = tasks.make("tests.eval.toy:Colours", root=toy.write_questions(tmp_path / "q", rows))
    client, server = asked(lambda body: " red\n")
    settings = Settings(Options(temperature=0.5, seed=3), resamples=0)
    result = bench.run_task(task, EndpointModel(client, "m"), tmp_path / "o", settings)
    assert result.scores["accuracy"] == 50 and list(result.failures) == ["2"]
    body = server.requests[0]
    assert body["model"] == "m" and body["temperature"] == 0.5 and body["max_tokens"] == 5
    assert body["seed"] != server.requests[1]["seed"]
    assert "secret" not in "".join(
        p.read_text() for p in (tmp_path / "o").rglob("*.json*") if p.is_file()
    )
    client, _ = asked(script=[chat_server.status(400, "too long")], answer=lambda body: "blue")
    result = bench.run_task(task, EndpointModel(client, "m", 1), tmp_path / "p", settings)
    assert len(result.records) == 1 and "too long" in result.failures["0"]
    chooses = dataclasses.replace(task, form="choose")
    with pytest.raises(UserError, match="how likely"):
        bench.run_task(chooses, EndpointModel(client, "m"), tmp_path / "c", settings)


def test_an_endpoint_that_fails_ends_the_task_and_keeps_what_came(asked, tmp_path):
    task = tasks.make("tests.eval.toy:Colours", root=toy.write_questions(tmp_path / "q", ROWS))
    client, _ = asked(script=[chat_server.reply("red"), chat_server.status(401)])
    settings = Settings(resamples=0)
    with pytest.raises(EndpointError, match="status 401"):
        bench.run_task(task, EndpointModel(client, "m", 1), tmp_path / "o", settings)
    client, server = asked(lambda body: "blue")
    result = bench.run_task(task, EndpointModel(client, "m", 1), tmp_path / "o", settings)
    assert result.scores["accuracy"] == 100 and len(server.requests) == 1


def test_verdicts_are_kept(asked, tmp_path, capsys):
    client, server = asked(lambda body: f"said of {text_of(body)}")
    judge = Judge(EndpointModel(client, "m"), "m at x")
    assert judge.of(tmp_path)(["a", "b", "a"]) == ["said of a", "said of b", "said of a"]
    assert len(server.requests) == 2
    assert judge.of(tmp_path)(["b", "c"]) == ["said of b", "said of c"]
    assert len(server.requests) == 3
    with pytest.raises(UserError, match="other settings .judge"):
        dataclasses.replace(judge, name="n").of(tmp_path)
    client, _ = asked(script=[chat_server.status(400, "no no")], answer=lambda body: "fine")
    judge = Judge(EndpointModel(client, "m", 1), "m")
    assert judge.of(tmp_path / "other")(["a", "b"]) == [None, "fine"]
    assert "no no; no verdict" in capsys.readouterr().err


def test_a_model_of_ours_judges(tmp_path):
    model = toy.Model(lambda prompt, images: "yes" if "red the colour red" in prompt else "no")
    rows = [*ROWS, {"id": "3", "colour": "red"}]
    root = toy.write_questions(tmp_path / "q", rows)
    task = tasks.make("tests.eval.toy:Colours:judge_it=true", root=root)
    judge = Judge(model, "toy").of
    result = bench.run_task(task, toy.Model(), tmp_path, Settings(resamples=0), judge)
    assert result.scores["accuracy"] == pytest.approx(200 / 3)
    assert len(model.asked) == 2  # the third text was the first one again


def test_from_the_command_line(asked, tmp_path, monkeypatch, capsys):
    """An endpoint answers and another model of it judges; then everything is there already."""

    def answer(body):
        return "red" if body["model"] == "painter" else "yes" if "red?" in text_of(body) else "no"

    _, server = asked(answer)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    root = toy.write_questions(tmp_path / "q", ROWS)
    args = ["eval", "--endpoint", "painter", "--judge", "endpoint:critic",
            "--bench-root", str(tmp_path), "--tasks",
            f"tests.eval.toy:Colours:judge_it=true,root={root}",
            "--out", str(tmp_path / "o"), "--resamples", "0", "--price", "1", "2"]  # fmt: skip
    assert cli.main(args) == 0
    out, err = capsys.readouterr()
    assert len(server.requests) == 4 and "4 calls, 28 tokens read, 12 written" in err
    assert "cost 0.00" in err and "secret" not in out + err
    assert json.loads((tmp_path / "o" / "scores.json").read_text())
    assert cli.main(args) == 0 and len(server.requests) == 4
    assert cli.main([*args, "--workdir", str(tmp_path)]) == 2
    assert "in place of --workdir" in capsys.readouterr().err

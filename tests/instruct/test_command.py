"""`metamorph data generate`: from images to samples, by way of an endpoint or a model of ours."""

import json
import re
import threading

import numpy as np
import pytest
from PIL import Image

from metamorph_jax import cli, endpoint
from metamorph_jax.data.sources.base import IMAGE
from metamorph_jax.errors import BadSample, UserError
from metamorph_jax.instruct import journal, writers
from metamorph_jax.instruct.wordings import DETAIL_QUESTIONS
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.requests import Request
from tests.chat_server import ChatServer, completion, half, raw, status

pytest.importorskip("openai", reason="pip install 'metamorph_jax[eval]'")
KEY = "sk-very-secret-0123456789"


class Killed(BaseException):
    """As SIGKILL: nothing in the program catches it to go on."""


def answers(body) -> str:
    """What a good model would say; it names what it was told, so that replies differ."""
    content = body["messages"][-1]["content"]
    if isinstance(content, list):
        return "A red square.\nA square on white ground."
    about = content.splitlines()[0]
    if "Question:" in body["messages"][0]["content"]:
        return f"Question:\nWhat is it?\n===\nAnswer:\n{about}\n===\n"
    return f"The image shows this: {about}"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for k in range(5):
        file = folder / ("more" if k % 2 else ".") / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 12 + k, 3), 40 * k, np.uint8)).save(file)
    return folder


@pytest.fixture
def contexts(tmp_path, photos):
    """A file of five contexts, whose images are there."""
    names = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.png"))
    records = [{"id": k, "image": name, "captions": [f"Thing {k}.", "It is one."],
                "instances": [{"category": "thing", "bbox": [0, 0, 0.5, 1]}]}
               for k, name in enumerate(names)]  # fmt: skip
    file = tmp_path / "contexts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture
def generate(monkeypatch, capsys, tmp_path):
    """(server, words of the command) -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(writers.Clock, "sleep", lambda self, seconds: None)
    monkeypatch.setattr(endpoint._Pace, "hold", lambda self, seconds: None)

    def run(server, *words):
        if server is not None:
            monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        given = ["--model", "m"] if server is not None else []
        code = cli.main(["data", "generate", *given, "--out", str(tmp_path / "out"),
                         *map(str, words)])  # fmt: skip
        return code, *capsys.readouterr()

    return run


def samples(tmp_path, kind):
    return json.loads((tmp_path / "out" / f"{kind}.json").read_text())


@pytest.mark.parametrize("kind", ["conversation", "detail", "reasoning"])
def test_samples_of_every_kind_pass_the_check(kind, generate, contexts, photos, tmp_path, capsys):
    with ChatServer(answer=answers) as server:
        code, out, err = generate(server, "--kind", kind, "--contexts", contexts, "--price", 1, 2,
                                  "--seed", 1)  # fmt: skip
    assert code == 0, err
    assert "5 samples of 5 images" in out and "35 tokens read, 15 written, cost 0.0001" in out
    made = samples(tmp_path, kind)
    assert [one["id"] for one in made] == list("01234")
    firsts = [one["conversations"][0]["value"] for one in made]
    assert all(re.fullmatch(rf"{IMAGE}\n.+|.+\n{IMAGE}", first) for first in firsts)
    assert {first.startswith(IMAGE) for first in firsts} == {True, False}
    asked = {first.replace(IMAGE, "").strip() for first in firsts}
    assert asked <= {"What is it?"} if kind != "detail" else asked <= {*DETAIL_QUESTIONS}
    assert made[3]["conversations"][1]["value"].endswith("Thing 3.")
    shown = server.requests[0]["messages"]
    assert [m["role"] for m in shown[:3]] == ["system", "user", "assistant"]
    assert ("thing: [0.0, 0.0, 0.5, 1.0]" in shown[-1]["content"]) == (kind != "conversation")
    file = tmp_path / "out" / f"{kind}.json"
    assert cli.main(["data", "check", str(file), "--root", str(photos)]) == 0
    assert "nothing wrong found" in capsys.readouterr().out


def test_the_same_seed_draws_the_same(generate, contexts, tmp_path):
    made = []
    with ChatServer(answer=answers) as server:
        for seed in (0, 0, 1):
            generate(server, "--kind", "detail", "--contexts", contexts, "--seed", seed)
            made.append(samples(tmp_path, "detail"))
    assert made[0] == made[1] != made[2]
    assert len(server.requests) == 5  # the seed is not sent, so replies don't depend on it


def test_images_without_captions_are_captioned_first(generate, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    with ChatServer(answer=answers) as server:
        code, out, err = generate(server, "--kind", "detail", "--images", photos)
        assert code == 0, err
        assert "5 samples of 5 images" in out and "left out: 1\n  broken_image 1" in out
        assert len(server.requests) == 10
        made = samples(tmp_path, "detail")
        assert made[0]["image"] == "0.png"
        assert "A red square." in made[0]["conversations"][1]["value"]
        code, out, _ = generate(server, "--kind", "captions", "--images", photos)
        assert code == 0 and len(server.requests) == 10
    lines = (tmp_path / "out/captions.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["captions"] == ["A red square.", "A square on white ground."]
    Image.new("RGB", (20, 20)).save(photos / "0.png")  # a changed file is looked at again
    with ChatServer(answer=answers) as server:
        generate(server, "--kind", "captions", "--images", photos)
    assert len(server.requests) == 1


def test_large_images_are_shrunk(tmp_path):
    file = tmp_path / "a.png"
    Image.new("RGB", (3000, 1500), "red").save(file)
    (tmp_path / "b.jpg").write_bytes(writers.encoded(str(file)))
    with Image.open(tmp_path / "b.jpg") as small:
        assert small.size == (1024, 512) and small.format == "JPEG"


# ---- interrupted, and started again


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(5))
def test_killed_at_any_sample_nothing_is_lost(number, written, generate, contexts, tmp_path,
                                              monkeypatch):  # fmt: skip
    """The reply that was under way is asked for again, the others are not."""
    add, seen, lock = journal.Journal.add, [], threading.Lock()

    def dies(self, reply):
        with lock:
            seen.append(reply)
            if len(seen) > number:
                if written and len(seen) == number + 1:
                    add(self, reply)
                raise Killed
            add(self, reply)

    words = ("--kind", "conversation", "--contexts", contexts, "--concurrency", 1)
    with ChatServer(answer=answers) as server:
        monkeypatch.setattr(journal.Journal, "add", dies)
        with pytest.raises(Killed):
            generate(server, *words)
        monkeypatch.setattr(journal.Journal, "add", add)
        assert not (tmp_path / "out/conversation.json").exists()
        code, out, err = generate(server, *words)
    assert code == 0 and f"{number + written} replies of 5 are there" in err
    assert len(server.requests) == 5 + (not written)
    assert [s["conversations"][1]["value"] for s in samples(tmp_path, "conversation")] == [
        f"Thing {k}." for k in range(5)
    ]


def test_a_line_that_was_cut_anywhere_is_asked_for_again(tmp_path):
    file = tmp_path / "replies.jsonl"
    replies = [journal.Reply(str(k), f"hash {k}", "text\nwith ü") for k in range(3)]
    with journal.Journal(file) as kept:
        for reply in replies:
            kept.add(reply)
    whole = file.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for end in range(last, len(whole)):
        file.write_bytes(whole[:end])
        with journal.Journal(file) as kept:
            assert list(kept.replies.values()) == replies[:2] and not kept.damaged
            kept.add(replies[2])
        assert file.read_bytes() == whole


def test_damaged_lines_are_named_and_asked_for_again(generate, contexts, tmp_path):
    words = ("--kind", "detail", "--contexts", contexts)
    file = tmp_path / "out/detail_replies.jsonl"
    with ChatServer(answer=answers) as server:
        generate(server, *words)
        lines = file.read_text().splitlines(keepends=True)
        wrong = lines[2].replace('"cut": false', '"cut": 3')
        file.write_text("".join([lines[0], lines[1][:30] + "\n", wrong, *lines[3:]]))
        code, out, err = generate(server, *words)
    assert code == 0 and "3 replies of 5 are there; 2 lines are damaged (line 2)" in err
    assert len(server.requests) == 7 and "5 samples of 5" in out


def test_one_process_at_a_time(tmp_path):
    with journal.Journal(tmp_path / "a.jsonl"):  # the lock is the open file's, not the process's
        with pytest.raises(UserError, match="another process writes .*a.jsonl"):
            journal.Journal(tmp_path / "a.jsonl")
    journal.Journal(tmp_path / "a.jsonl").close()


def test_changed_prompts_are_asked_again(generate, contexts, tmp_path):
    words = ("--kind", "detail", "--contexts", contexts)
    with ChatServer(answer=answers) as server:
        generate(server, *words)
        text = contexts.read_text().replace("Thing 2.", "Thing two.")
        contexts.write_text(text)
        _, _, err = generate(server, *words)
        assert "4 replies of 5 are there; 1 others are to other prompts or settings" in err
        assert len(server.requests) == 6
        assert samples(tmp_path, "detail")[2]["conversations"][1]["value"].endswith("Thing two.")
        generate(server, *words, "--temperature", "0.1")
        assert len(server.requests) == 11 and server.requests[-1]["temperature"] == 0.1


# ---- what goes wrong


def test_malformed_replies_are_set_aside_counted_and_asked_again_on_request(
    generate, contexts, tmp_path
):
    bad = iter(["The caption says so.", "I'm sorry, but I can't help with that."])

    def some(body):
        return next(bad, None) or answers(body)

    words = ("--kind", "detail", "--contexts", contexts, "--concurrency", 1)
    with ChatServer(answer=some) as server:
        code, out, err = generate(server, *words)
        assert code == 0 and "3 samples of 5 images" in out
        assert "set aside (--redo asks again): 2\n  leak 1\n    0: it says 'caption'\n" in out
        assert "refusal 1" in out
        statuses = [json.loads(line)["status"] for line in
                    (tmp_path / "out/detail_replies.jsonl").read_text().splitlines()]  # fmt: skip
        assert statuses == ["leak", "refusal", "ok", "ok", "ok"]
        generate(server, *words)
        assert len(server.requests) == 5
        code, out, err = generate(server, *words, "--redo")
        assert len(server.requests) == 7 and "5 samples of 5 images" in out


def test_an_endpoint_that_misbehaves_now_and_then(generate, contexts, tmp_path):
    script = [status(429, retry_after="2"), status(500), half(), half(announced=True), raw([])]
    with ChatServer(script, answers) as server:
        code, out, err = generate(server, "--kind", "detail", "--contexts", contexts)
    assert code == 0 and "5 samples of 5 images" in out
    assert "5 answers so far, 5 tries repeated" in err


def test_an_endpoint_that_stops_to_answer_ends_the_run_and_keeps_what_is_there(
    generate, contexts, tmp_path
):
    good = [raw(completion("A thing.")), raw(completion("A thing."))]
    words = ("--kind", "detail", "--contexts", contexts, "--concurrency", 1, "--tries", 2)
    with ChatServer([*good, *[status(503, "closed")] * 2], answers) as server:
        code, out, err = generate(server, *words)
        assert code == 2 and "status 503: closed (try 2 of 2)" in err
        assert "2 of 5 were asked" in err and "the same command asks for the others" in err
        assert generate(server, *words)[0] == 0
    assert len(server.requests) == 2 + 2 + 3 and len(samples(tmp_path, "detail")) == 5


def test_a_request_that_is_refused_is_left_out(generate, contexts, tmp_path):
    refusal = status(400, "content filter")
    words = ("--kind", "detail", "--contexts", contexts, "--concurrency", 1)
    with ChatServer([raw(completion("A thing.")), refusal], answers) as server:
        code, out, err = generate(server, *words)
    assert code == 0 and "4 samples of 5" in out
    assert "left out: 1\n  refused 1\n    1: " in out and "content filter" in out


def test_an_endpoint_that_refuses_all_ends_the_run(generate, contexts, monkeypatch):
    monkeypatch.setattr(writers, "REFUSALS", 3)
    with ChatServer([status(400, "no temperature here")] * 9) as server:
        code, _, err = generate(server, "--kind", "detail", "--contexts", contexts,
                                "--concurrency", 1)  # fmt: skip
    assert code == 2 and "every request is refused" in err and "no temperature here" in err
    assert len(server.requests) == 3


def test_no_usable_reply_is_an_error(generate, contexts):
    with ChatServer(answer=lambda body: "What?") as server:
        code, out, err = generate(server, "--kind", "reasoning", "--contexts", contexts)
    assert code == 2 and "there is no usable reply" in err and "no_blocks 5" in out


def test_the_key_is_nowhere(generate, contexts, tmp_path):
    with ChatServer([status(401, f"wrong key {KEY}")]) as server:
        code, out, err = generate(server, "--kind", "detail", "--contexts", contexts,
                                  "--concurrency", 1)  # fmt: skip
        assert code == 2 and "wrong key" in err and KEY not in out + err
        generate(server, "--kind", "detail", "--contexts", contexts)
    assert server.keys[-1] == f"Bearer {KEY}"
    for file in (tmp_path / "out").rglob("*"):
        assert KEY not in file.read_text()


@pytest.mark.parametrize("words, message", [
    ([], "give one of --captions, --contexts and --images"),
    (["--contexts", "CONTEXTS", "--instances", "CONTEXTS"], "go with --captions"),
    (["--contexts", "CONTEXTS", "--workdir", "."], "give one of --model"),
    (["--contexts", "CONTEXTS", "--tries", "0"], "tries of at least 1"),
    (["--contexts", "CONTEXTS", "--max-tokens", "0"], "--max-tokens at least 1"),
    (["--contexts", "no.jsonl"], "there is no no.jsonl"),
    (["--contexts", "CONTEXTS", "--images", "/dev"], "there is no image to write about"),
])  # fmt: skip
def test_wrong_options(words, message, generate, contexts):
    words = [str(contexts) if word == "CONTEXTS" else word for word in words]
    with ChatServer() as server:
        code, _, err = generate(server, "--kind", "detail", *words)
    assert code == 2 and message in err and not server.requests


# ---- without asking


def test_a_dry_run_asks_nothing(generate, contexts, photos, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with ChatServer() as server:
        code, out, err = generate(server, "--kind", "detail", "--contexts", contexts, "--dry-run",
                                  "--price", 1000, 0)  # fmt: skip
        assert code == 0 and not server.requests and not (tmp_path / "out").exists()
        assert "Thing 0." in out and "Thing 1." in out and "Thing 2." not in out
        found = re.search(r"5 requests, about ([\d,]+) tokens to read .* cost about (.*)", out)
        tokens = int(found[1].replace(",", ""))
        assert 4000 < tokens < 8000 and float(found[2]) == pytest.approx(tokens / 1000, rel=0.01)
        code, out, _ = generate(server, "--kind", "detail", "--images", photos, "--dry-run")
        assert "captions: 5 requests" in out and "detail: 5 requests" in out


# ---- a model of ours


def test_a_model_of_ours_writes(generate, contexts, workdir, tmp_path):
    """It is random, and never comes to an end; so its replies are kept, but can't be used."""
    shots = tmp_path / "shots"
    shots.mkdir()
    (shots / "system_message.txt").write_text("Describe.")
    words = ("--kind", "detail", "--contexts", contexts, "--workdir", workdir, "--shots", shots,
             "--max-tokens", 8, "--temperature", 1, "--batch-size", 5)  # fmt: skip
    code, out, err = generate(None, *words)
    assert code == 2 and "there is no usable reply" in err and "cut_off 5" in out
    assert "5 replies, 0 tokens read, 40 written" in out
    lines = (tmp_path / "out/detail_replies.jsonl").read_text().splitlines()
    assert len({json.loads(line)["text"] for line in lines}) == 5
    assert "5 replies of 5 are there" in generate(None, *words)[2]


def test_a_model_sees_the_opening_before_the_question(generator):
    before = (("system", "Be brief."), ("user", "A?"), ("assistant", "B."))
    job = writers.Job("7", before, "C?")
    taken = []
    options = Options(4, min_new_tokens=4)
    writers.ask_model(generator, [job], options, lambda *pair: taken.append(pair), None)
    ((_, reply),) = taken
    ids = generator.prompts.chat.prompt([*before, ("user", "C?")])
    policy = generator.policy(options.text(generator.prompts.eos))
    (result,) = generator.loop([generator.loop.embed(ids)], 4, policy)
    assert reply.text == generator.prompts.tokenizer.decode(result.ids.tolist())
    assert reply.cut and reply.completion_tokens == 4


def test_a_model_looks_at_an_image(generator, photos):
    """The captions of its images by a model of ours: what it reads is the image and the text."""
    job, taken = writers.Job("7", (), "C?", str(photos / "0.png")), []
    options = Options(4, min_new_tokens=4)
    writers.ask_model(generator, [job], options, lambda *pair: taken.append(pair), None)
    request = Request("7", "C?", (str(photos / "0.png"),))
    assert taken[0][1].text == generator.generate([request], options)[0].text


def test_a_model_says_why_a_prompt_does_not_fit(generator):
    failed = []
    job = writers.Job("7", (("system", "word " * 400),), "C?")
    writers.ask_model(generator, [job], Options(4), None, lambda *pair: failed.append(pair))
    ((_, error),) = failed
    assert isinstance(error, BadSample) and "the context of 160 has room for" in error.detail

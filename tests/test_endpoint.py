"""Endpoints: what goes over the wire, and what happens when the other side misbehaves."""

import argparse
import base64
import random
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

from metamorph_jax import endpoint
from metamorph_jax.endpoint import Completion, Endpoint, Limits, Price
from metamorph_jax.errors import ConfigError, EndpointError, FileError, RequestRefused
from tests.chat_server import ChatServer, Step, completion, half, hang, raw, reply, status, trickle

pytest.importorskip("openai", reason="pip install 'metamorph_jax[eval]'")
KEY = "sk-very-secret-0123456789"
ASK = [{"role": "user", "content": "Say yes."}]


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self):
        self.now, self.slept, self._lock = 0.0, [], threading.Lock()

    def monotonic(self):
        return self.now

    def time(self):
        return 1e9 + self.now

    def sleep(self, seconds):
        with self._lock:
            self.slept.append(seconds)
            self.now += seconds


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def opened(server, clock=None, **limits):
    return Endpoint(server.url, limits=Limits(**limits), clock=clock or Clock(),
                    chance=random.Random(0), price=Price(2.0, 10.0))  # fmt: skip


def test_a_reply_with_its_tokens_and_cost(monkeypatch):
    with ChatServer([reply("Yes.", prompt=1000, wrote=200)]) as server:
        monkeypatch.setenv("MY_URL", server.url)
        made = Endpoint(url_variable="MY_URL", price=Price(2.0, 10.0))
        done = made.complete(ASK, model="m", temperature=0.5, max_tokens=9, seed=3)
    assert done == Completion("Yes.", 1000, 200, cut=False)
    assert made.cost == pytest.approx((1000 * 2 + 200 * 10) / 1e6)
    (body,) = server.requests
    asked = dict(model="m", temperature=0.5, max_tokens=9, seed=3)
    assert body == {"messages": ASK} | asked
    assert server.keys == [f"Bearer {KEY}"]


def test_what_is_not_asked_for_is_not_sent():
    with ChatServer() as server:
        opened(server).complete(ASK, model="m")
    assert server.requests[0].keys() == {"messages", "model"}


def test_images_go_as_data_urls(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"bytes of an image")
    content = [endpoint.text_part("What?"), endpoint.image_part(file)]
    with ChatServer() as server:
        opened(server).complete([{"role": "user", "content": content}], model="m")
    url = server.requests[0]["messages"][0]["content"][1]["image_url"]["url"]
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == b"bytes of an image"
    with pytest.raises(FileError, match="no file .*b.png"):
        endpoint.image_part(tmp_path / "b.png")


@pytest.mark.parametrize("step", [
    status(500), status(503, retry_after="soon"), half(), half(announced=True), raw([1]),
    raw({"error": {"message": "overloaded"}}), raw({"choices": []}), raw("text"),
    raw({"choices": 3}), Step(body=b"<html>busy</html>"), Step(body=b'{"choices": "\xff"}'),
    reply(["no", "text"]),
], ids="500 503 half cut_off list error no_choices text odd page bytes parts".split())  # fmt: skip
def test_what_may_pass_is_tried_again_after_a_back_off(step):
    clock = Clock()
    with ChatServer([step, step, step, reply("yes")]) as server:
        made = opened(server, clock)
        assert made.complete(ASK, model="m").text == "yes"
    assert (made.usage.calls, made.usage.retries) == (1, 3)
    first, second, third = clock.slept
    assert 0.5 <= first <= 1 and 1 <= second <= 2 and 2 <= third <= 4


def test_retry_after_is_honoured_by_every_call():
    clock = Clock()
    date = "Sun, 09 Sep 2001 01:47:10 GMT"  # 1e9 + 30
    with ChatServer([status(429, retry_after="7"), status(429, retry_after=date)]) as server:
        made = opened(server, clock)
        made.complete(ASK, model="m")
        assert sum(clock.slept) > 30
        assert 7 <= clock.slept[0] <= 8
        before = clock.now
        server.script = [status(429, retry_after="50"), *[reply("x")] * 9]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: made.complete(ASK, model="m"), range(2)))
    assert clock.now - before >= 50


def test_an_endpoint_that_asks_for_an_hour_is_given_up():
    with ChatServer([status(429, "daily limit", retry_after="3600")]) as server:
        with pytest.raises(EndpointError, match="daily limit.*wait 3600 s.*start again later"):
            opened(server).complete(ASK, model="m")
    assert len(server.requests) == 1


def test_the_last_try_says_what_was_wrong():
    with ChatServer([status(500, "on fire")] * 3) as server:
        with pytest.raises(EndpointError, match=r"status 500: on fire \(try 3 of 3\)"):
            opened(server, tries=3).complete(ASK, model="m")
    assert len(server.requests) == 3


def test_a_hanging_endpoint_times_out():
    with ChatServer([hang(), reply("at last")]) as server:
        made = opened(server, timeout=0.2)
        assert made.complete(ASK, model="m").text == "at last"
        server.script = [hang()]
        with pytest.raises(EndpointError, match="no answer within 0.2 s"):
            opened(server, timeout=0.2, tries=1).complete(ASK, model="m")


def test_an_endpoint_that_sends_blanks_times_out_all_the_same():
    with ChatServer([trickle(0.05)]) as server:
        made = Endpoint(server.url, limits=Limits(timeout=0.3, tries=1))
        with pytest.raises(EndpointError, match="no answer within 0.3 s"):
            made.complete(ASK, model="m")
        server.script = [trickle(0.0)]
        assert made.complete(ASK, model="m").text == "at last"


def test_an_answer_without_end_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(endpoint.files, "MAX_BYTES", 1000)
    with ChatServer([reply("x" * 2000)]) as server:
        with pytest.raises(EndpointError, match="more than 1,000 bytes"):
            opened(server, tries=1).complete(ASK, model="m")


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        made = Endpoint(f"http://127.0.0.1:{taken.getsockname()[1]}/v1", clock=Clock())
        with pytest.raises(EndpointError, match="connection failed .*refused.*try 6 of 6"):
            made.complete(ASK, model="m")


@pytest.mark.parametrize("code, error, kind", [
    (400, {}, RequestRefused), (413, {}, RequestRefused), (422, {}, RequestRefused),
    (401, {}, EndpointError), (403, {}, EndpointError), (404, {}, EndpointError),
    (429, {"code": "insufficient_quota"}, EndpointError),
])  # fmt: skip
def test_what_does_not_pass_is_not_tried_again(code, error, kind):
    with ChatServer([status(code, "no such luck", **error)]) as server:
        with pytest.raises(EndpointError, match="no such luck") as caught:
            opened(server).complete(ASK, model="m")
    assert type(caught.value) is kind
    assert len(server.requests) == 1


def test_newer_models_get_the_name_that_they_know():
    refusal = status(400, "use max_completion_tokens", param="max_tokens",
                     code="unsupported_parameter")  # fmt: skip
    with ChatServer([refusal]) as server:
        made = opened(server)
        for _ in range(2):
            made.complete(ASK, model="m", max_tokens=9)
    assert [r.get("max_tokens") for r in server.requests] == [9, None, None]
    assert [r.get("max_completion_tokens") for r in server.requests] == [None, 9, 9]


def test_replies_that_are_empty_cut_or_uncounted():
    uncounted = completion("b") | {"usage": {"prompt_tokens": "many"}}
    script = [reply(None), reply("a", finish="length"), raw(uncounted)]
    with ChatServer(script) as server:
        made = opened(server)
        first, second, third = (made.complete(ASK, model="m") for _ in range(3))
    assert (first.text, second.cut, third.prompt_tokens) == ("", True, 0)
    assert (made.usage.calls, made.usage.uncounted, made.usage.prompt_tokens) == (3, 1, 14)


def test_the_rate_is_kept_and_no_more_calls_run_at_once_than_allowed():
    clock = Clock()
    with ChatServer(answer=lambda body: time.sleep(0.02) or "x") as server:
        made = opened(server, clock, concurrency=3, per_minute=30)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: made.complete(ASK, model="m"), range(9)))
    assert clock.now >= 8 * 2
    assert server.most <= 3
    assert made.usage.calls == 9


def test_the_key_is_in_no_message(caplog, capfd):
    caplog.set_level("DEBUG")
    echo = status(401, f"Incorrect API key provided: {KEY}")
    with ChatServer([echo, status(500, f"your key {KEY} broke me")]) as server:
        for tries in (6, 1):
            made = opened(server, tries=tries)
            with pytest.raises(EndpointError) as caught:
                made.complete(ASK, model="m")
            printed = "".join(traceback.format_exception(caught.value)) + repr(made)
            assert KEY not in printed and "…" in printed
    assert KEY not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize("key", ["sk-with a space", "sk-ä", "sk-\x07"])
def test_what_can_t_be_a_key(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not a key") as caught:
        Endpoint("http://127.0.0.1:1/v1")
    assert key not in str(caught.value)


def test_a_key_is_needed_by_openai_alone(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="set OPENAI_API_KEY"):
        Endpoint()
    with ChatServer() as server:
        opened(server).complete(ASK, model="m")
    assert server.keys == ["Bearer none"]


@pytest.mark.parametrize("url", ["ftp://there/v1", "there/v1", "http:///v1"])
def test_what_is_no_address(url):
    with pytest.raises(ConfigError, match="is not an http"):
        Endpoint(url)


def test_passwords_in_an_address_are_not_shown():
    assert Endpoint("http://me:word@127.0.0.1:1/v1?token=x").url == "http://127.0.0.1:1/v1"


@pytest.mark.parametrize("limits", [dict(concurrency=0), dict(tries=0), dict(timeout=0.0),
                                    dict(per_minute=-1.0)])  # fmt: skip
def test_limits_that_make_no_sense(limits):
    with pytest.raises(ConfigError, match="an endpoint needs"):
        Limits(**limits)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'metamorph-jax\[eval\]'"):
        Endpoint("http://127.0.0.1:1/v1")


def test_options_of_the_command_line(monkeypatch):
    parser = argparse.ArgumentParser()
    endpoint.add_arguments(parser)
    monkeypatch.setenv("MY_URL", "http://127.0.0.1:1/v1")
    made = endpoint.open_endpoint(parser.parse_args(
        "--endpoint-url-variable MY_URL --concurrency 2 --requests-per-minute 9 --timeout 3 "
        "--tries 4 --price 1 2".split()
    ))  # fmt: skip
    assert made.limits == Limits(2, 9.0, 3.0, 4)
    assert (made.price, made.url) == (Price(1.0, 2.0), "http://127.0.0.1:1/v1")

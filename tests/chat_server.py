"""An OpenAI-compatible chat server on this machine, which misbehaves on request.

    with ChatServer([status(429, retry_after="3"), half(), reply("yes")]) as server:
        Endpoint(server.url).complete(…)
    server.requests   # the bodies that came in

Each request takes the next step of the script; after its end, `answer(body)` gives the text.
"""

import contextlib
import dataclasses
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterable


@dataclasses.dataclass(frozen=True)
class Step:
    """One answer: `body` with this status and these headers; `claimed` is its announced length."""

    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    claimed: int | None = None
    hang: bool = False
    trickle: float = 0.0


def completion(text: str | None, prompt: int = 7, wrote: int = 3, finish: str = "stop") -> dict:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": prompt, "completion_tokens": wrote, "total_tokens": prompt + wrote}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [choice], "usage": usage}  # fmt: skip


def reply(text: str | None, **more) -> Step:
    return raw(completion(text, **more))


def raw(value) -> Step:
    """Any JSON with status 200."""
    return Step(body=json.dumps(value).encode())


def status(number: int, message: str = "no", retry_after: str | None = None, **error) -> Step:
    headers = (("retry-after", retry_after),) if retry_after is not None else ()
    return Step(number, json.dumps({"error": {"message": message, **error}}).encode(), headers)


def half(announced: bool = False) -> Step:
    """The first half of a completion; with `announced`, the length of all of it is announced."""
    whole = reply("a long answer").body
    return Step(body=whole[: len(whole) // 2], claimed=len(whole) if announced else None)


def hang() -> Step:
    """No answer until the server ends."""
    return Step(hang=True)


def trickle(seconds: float) -> Step:
    """A completion after blanks that come every so many seconds, a hundred of them."""
    return Step(body=b" " * 100 + reply("at last").body, trickle=seconds)


class ChatServer:
    """Attributes: url; requests, their bodies; keys, the authorizations that came with them; most,
    how many requests were there at the same time."""

    def __init__(self, script: Iterable[Step] = (), answer: Callable[[dict], str] | None = None):
        self.script, self.answer = list(script), answer or (lambda body: "fine")
        self.requests: list[dict] = []
        self.keys: list[str] = []
        self.most = self._now = 0
        self._lock, self._over = threading.Lock(), threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def _step(self, body: dict, key: str) -> Step:
        with self._lock:
            self.requests.append(body)
            self.keys.append(key)
            self._now += 1
            self.most = max(self.most, self._now)
            if self.script:
                return self.script.pop(0)
        return reply(self.answer(body))

    def _handler(self):
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                step = outer._step(body, self.headers.get("authorization", ""))
                if step.hang:
                    outer._over.wait(30)
                with outer._lock:
                    outer._now -= 1
                self.close_connection = True
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self._send(step)

            def _send(self, step):
                if not step.hang:
                    self.send_response(step.status)
                    length = len(step.body) if step.claimed is None else step.claimed
                    common = (("content-type", "application/json"), ("content-length", length))
                    for name, value in (*common, *step.headers):
                        self.send_header(name, str(value))
                    self.end_headers()
                    body = step.body
                    while step.trickle and body.startswith(b" ") and not outer._over.is_set():
                        self.wfile.write(body[:1])
                        body = body[1:]
                        time.sleep(step.trickle)
                    self.wfile.write(body)

        return Handler

"""A chat model behind any OpenAI-compatible endpoint: paced, retried, counted.

    endpoint = Endpoint(limits=Limits(concurrency=8, per_minute=60), price=Price(2.5, 10.0))
    done = endpoint.complete(
        [{"role": "user", "content": [text_part("What is this?"), image_part("cat.jpg")]}],
        model="gpt-4o", max_tokens=200,
    )
    done.text, endpoint.usage, endpoint.cost

`complete` may be called from many threads at once. The address and the key come from the
environment; the key is in no message, no log and no file. The `openai` package (extra `eval`)
speaks the protocol, and is imported when an endpoint is made.
"""

import base64
import dataclasses
import email.utils
import json
import math
import mimetypes
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from metamorph_jax import files
from metamorph_jax.errors import ConfigError, EndpointError, FileError, RequestRefused
from metamorph_jax.files import shown

URL_VARIABLE, KEY_VARIABLE = "OPENAI_BASE_URL", "OPENAI_API_KEY"
LONGEST_WAIT = 600.0  # seconds; an endpoint that asks for more is given up
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Completion:
    """A reply.

    Attributes:
        text: of it.
        prompt_tokens, completion_tokens: as the endpoint counts them; 0 where it doesn't.
        cut: whether `max_tokens` cut it off.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut: bool = False


class ChatClient(Protocol):
    """Whoever answers a list of messages: an endpoint, or a model in this process."""

    def complete(
        self,
        messages: Sequence[Message],
        *,
        model: str,
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> Completion: ...


@dataclasses.dataclass(frozen=True)
class Limits:
    """How an endpoint is called.

    Attributes:
        concurrency: most calls at the same time.
        per_minute: most calls begun in a minute, evenly spaced; 0 is no limit.
        timeout: seconds that a call may take.
        tries: of each call, the first one included.
    """

    concurrency: int = 8
    per_minute: float = 0.0
    timeout: float = 120.0
    tries: int = 6

    def __post_init__(self):
        counts = 1 <= self.concurrency <= 1024 and 1 <= self.tries
        if not (counts and 0 < self.timeout < math.inf and 0 <= self.per_minute < math.inf):
            raise ConfigError(
                "an endpoint needs concurrency (at most 1024) and tries of at least 1, a timeout "
                f"above 0 and a rate of at least 0 a minute, not {self}"
            )


@dataclasses.dataclass(frozen=True)
class Price:
    """Of a million tokens that are read (`prompt`) and written (`completion`), in any currency."""

    prompt: float
    completion: float

    def __post_init__(self):
        if not (0 <= self.prompt < math.inf and 0 <= self.completion < math.inf):
            raise ConfigError("--price: expected two numbers of at least 0, not "
                              f"{self.prompt:g} {self.completion:g}")  # fmt: skip

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


@dataclasses.dataclass
class Usage:
    """What an endpoint has been asked so far.

    Attributes:
        calls: that were answered.
        retries: failed tries that were repeated.
        uncounted: answered calls for which the endpoint gave no number of tokens.
        prompt_tokens, completion_tokens: of the others.
    """

    calls: int = 0
    retries: int = 0
    uncounted: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


# ---- messages


def text_part(text: str) -> dict:
    """A part of a message's content."""
    return {"type": "text", "text": text}


def image_part(path: str | os.PathLike) -> dict:
    """A part of a message's content with the bytes of an image file, as a data URL.

    Raises:
        FileError: the file can't be read.
    """
    kind = mimetypes.guess_type(os.fspath(path))[0] or "image/jpeg"
    return image_data(files.read_bytes(path), kind)


def image_data(data: bytes, kind: str = "image/jpeg") -> dict:
    """A part of a message's content with an encoded image of this media type."""
    url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


# ---- the endpoint


class _Again(Exception):
    """A try that failed in a way that may pass. `after`: seconds that the endpoint asks for."""

    def __init__(self, reason: str, after: float | None = None):
        super().__init__(reason)
        self.after = after


class Endpoint:
    """An OpenAI-compatible chat endpoint.

    Args:
        url: its address; None: what `url_variable` holds, or else OpenAI's own.
        url_variable, key_variable: names of environment variables. Without a key, endpoints other
            than OpenAI's own get a meaningless one.
        limits: of calls.
        price: of tokens; None: costs are unknown.
        clock: has `monotonic`, `time` and `sleep`.
        chance: draws the jitter of back-offs.

    Attributes:
        usage: what was asked so far.
        url: without user names and passwords, for messages.

    Raises:
        ConfigError: there is no `openai` package, no key, or the address is not one.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        url_variable: str = URL_VARIABLE,
        key_variable: str = KEY_VARIABLE,
        limits: Limits = Limits(),  # noqa: B008, it is frozen
        price: Price | None = None,
        clock=time,
        chance: random.Random | None = None,
    ):
        url = (url or os.environ.get(url_variable, "")).strip()
        self._key = _read_key(key_variable, needed=not url)
        if url and not re.match(r"https?://[^/\s]", url):
            raise ConfigError(f"{url_variable}: {shown(_public(url))} is not an http(s) address")
        self._openai = _import_openai()
        self.url = _public(url) or "https://api.openai.com/v1"
        self.limits, self.price, self.usage = limits, price, Usage()
        self._client = self._openai.OpenAI(
            api_key=self._key or "none", base_url=url or self.url, max_retries=0,
            timeout=limits.timeout,
        )  # fmt: skip
        self._clock, self._chance = clock, chance or random.Random()
        self._pace = _Pace(60 / limits.per_minute if limits.per_minute else 0.0, clock)
        self._slots = threading.BoundedSemaphore(limits.concurrency)
        self._lock = threading.Lock()
        self._most = "max_tokens"  # name of the option; OpenAI's newer models have another one

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r})"

    @property
    def cost(self) -> float | None:
        """Of the tokens counted so far; None without a price."""
        if self.price is None:
            return None
        return self.price.of(self.usage.prompt_tokens, self.usage.completion_tokens)

    def complete(
        self,
        messages: Sequence[Message],
        *,
        model: str,
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> Completion:
        """The reply to some messages; waits for its turn, and tries again where that may help.

        Args:
            messages: {"role", "content"}; content is text or a list of parts (`text_part`,
                `image_part`).
            model: as the endpoint names it.
            temperature, max_tokens, seed: None leaves it to the endpoint.

        Raises:
            RequestRefused: the endpoint won't answer these messages, but may answer others.
            EndpointError: it does not answer: a wrong key or model, or all tries failed.
        """
        options = {"temperature": temperature, "seed": seed}
        options = {name: value for name, value in options.items() if value is not None}
        for number in range(1, self.limits.tries + 1):
            if max_tokens is not None:
                options.pop("max_tokens", None)
                options[self._most] = max_tokens
            try:
                with self._slots:
                    self._pace.wait()
                    return self._counted(self._try(messages, model, options))
            except _Again as error:
                if number == self.limits.tries:
                    raise EndpointError(f"{self.url}: {error} (try {number} of {number})") from None
                self._back_off(number, error)
        raise AssertionError  # the loop returns or raises

    def _back_off(self, number: int, error: _Again) -> None:
        with self._lock:
            self.usage.retries += 1
        jitter = self._chance.uniform(0.5, 1.0)
        if error.after is None:
            self._clock.sleep(min(60.0, 2.0 ** (number - 1)) * jitter)
        elif error.after > LONGEST_WAIT:
            raise EndpointError(
                f"{self.url}: {error}; it asks to wait {error.after:.0f} s, more than the "
                f"{LONGEST_WAIT:.0f} s that are waited: start again later"
            )
        else:  # what it asks for concerns all calls
            self._pace.hold(error.after + jitter)

    def _try(self, messages, model: str, options: dict) -> dict:
        """The answer to one call.

        Raises:
            _Again, EndpointError, RequestRefused.
        """
        api, late = self._openai, f"no answer within {self.limits.timeout:g} s"
        end = self._clock.monotonic() + self.limits.timeout
        try:
            with self._client.chat.completions.with_streaming_response.create(
                messages=list(messages), model=model, **options
            ) as response:
                data = self._read(response, end, late)
            return files.parse(data, "the answer", dict)
        except FileError as error:
            raise _Again(self._said(str(error))) from None
        except api.APITimeoutError:
            raise _Again(late) from None
        except api.APIConnectionError as error:
            raise _Again(self._said(f"the connection failed ({error.__cause__})")) from None
        except api.APIStatusError as error:
            raise self._status(error, model, options) from None

    def _read(self, response, end: float, late: str) -> bytes:
        """The whole body of an answer, which has to be there at `end`; `_Again` otherwise."""
        data = b""
        chunks = response.iter_bytes()
        while self._clock.monotonic() <= end and len(data) <= files.MAX_BYTES:
            try:
                data += next(chunks)
            except StopIteration:
                return data
            except Exception as error:  # of the library below the one for endpoints
                what = str(error) or type(error).__name__
                raise _Again(self._said(f"the connection failed ({what})")) from None
        too_long = f"the answer has more than {files.MAX_BYTES:,} bytes"
        raise _Again(too_long if len(data) > files.MAX_BYTES else late)

    def _status(self, error, model: str, options: Mapping) -> Exception:
        """What a status other than 200 means."""
        code, body = error.status_code, error.body if isinstance(error.body, Mapping) else {}
        text = self._said(f"status {code}: {body.get('message') or error.message}")
        if code == 429 and body.get("code") == "insufficient_quota":
            return EndpointError(f"{self.url}: {text}")
        if code in (408, 409, 429) or code >= 500:
            return _Again(text, _retry_after(error.response.headers, self._clock.time()))
        if body.get("param") == "max_tokens" and "max_tokens" in options:
            self._most = "max_completion_tokens"
            return _Again(text, 0.0)
        if code in (400, 413, 422):
            return RequestRefused(f"{self.url}: {text}")
        hint = {
            401: "is the key right?",
            403: "is the key right?",
            404: f"is {shown(model, 60)!r} a model there, and does the address end in /v1?",
        }
        return EndpointError(f"{self.url}: {text}; {hint.get(code, 'expected status 200')}")

    def _said(self, text: str) -> str:
        """Text of others as it may be shown: without the key, on one line, not too long."""
        return shown(text.replace(self._key, "…") if self._key else text, 300)

    def _counted(self, answer: dict) -> Completion:
        """The completion in an answer, without text an empty one; `_Again` if it is none."""
        try:
            choice = answer["choices"][0]
            text = choice["message"].get("content") or ""
            cut = choice.get("finish_reason") == "length"
        except (LookupError, TypeError, AttributeError):
            text = None
        if not isinstance(text, str):
            raise _Again(self._said(f"the answer is not a chat completion: {json.dumps(answer)}"))
        usage = answer.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        found = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        read, wrote = (n if isinstance(n, int) and n >= 0 else 0 for n in found)
        with self._lock:
            self.usage.calls += 1
            self.usage.uncounted += not read
            self.usage.prompt_tokens += read
            self.usage.completion_tokens += wrote
        text = text.encode(errors="replace").decode()  # without halves of surrogate pairs
        return Completion(text, read, wrote, cut)


class _Pace:
    """Spaces calls by `interval` seconds, and holds all of them back on request."""

    def __init__(self, interval: float, clock):
        self.interval, self.clock = interval, clock
        self._next = clock.monotonic()
        self._lock = threading.Lock()

    def wait(self) -> None:
        while True:
            with self._lock:
                now = self.clock.monotonic()
                if now >= self._next:
                    self._next = now + self.interval
                    return
                left = self._next - now
            self.clock.sleep(left)

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, self.clock.monotonic() + seconds)


def _retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that an answer asks to wait: a number, or a date."""
    text = headers.get("retry-after", "")
    try:
        if not math.isnan(seconds := float(text)):
            return max(seconds, 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - now, 0.0)
    except (ValueError, TypeError, OverflowError):
        return None


def _read_key(variable: str, needed: bool) -> str:
    key = os.environ.get(variable, "").strip()
    if not key and needed:
        raise ConfigError(f"set {variable} to the key of the endpoint, or {URL_VARIABLE} to the "
                          "address of one that needs none")  # fmt: skip
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise ConfigError(f"{variable} is not a key: it has spaces or characters beyond ASCII")
    return key


def _public(url: str) -> str:
    """An address without a user name and password, and without a query."""
    return re.sub(r"(?<=://)[^/@]*@", "", url).partition("?")[0]


def _import_openai():
    try:
        import openai
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"endpoints need the package {error.name}: pip install 'metamorph-jax[eval]'"
        ) from error
    return openai


# ---- the command line


def add_arguments(parser) -> None:
    """Options of an endpoint, as a group of a command's parser."""
    group = parser.add_argument_group("endpoint", "an OpenAI-compatible chat endpoint")
    group.add_argument(
        "--endpoint-url-variable",
        default=URL_VARIABLE,
        metavar="NAME",
        help=f"environment variable with the address (default: {URL_VARIABLE})",
    )
    group.add_argument(
        "--endpoint-key-variable",
        default=KEY_VARIABLE,
        metavar="NAME",
        help=f"environment variable with the key (default: {KEY_VARIABLE})",
    )
    group.add_argument(
        "--concurrency", type=int, default=8, help="calls at the same time (default: 8)"
    )
    group.add_argument(
        "--requests-per-minute",
        type=float,
        default=0.0,
        metavar="N",
        help="0 (default) is no limit",
    )
    group.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="of a call (default: 120)"
    )
    group.add_argument("--tries", type=int, default=6, help="of each call (default: 6)")
    group.add_argument("--price", type=float, nargs=2, metavar=("IN", "OUT"),
                       help="of a million tokens that are read and written")  # fmt: skip


def limits_of(args) -> Limits:
    """The limits that the options of `add_arguments` ask for; ConfigError if they make no sense."""
    return Limits(args.concurrency, args.requests_per_minute, args.timeout, args.tries)


def price_of(args) -> Price | None:
    return Price(*args.price) if args.price else None


def open_endpoint(args, clock=time) -> Endpoint:
    """The endpoint that the options of `add_arguments` ask for; raises as `Endpoint`."""
    return Endpoint(
        url_variable=args.endpoint_url_variable, key_variable=args.endpoint_key_variable,
        limits=limits_of(args), price=price_of(args), clock=clock,
    )  # fmt: skip

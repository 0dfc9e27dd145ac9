"""Who writes: a chat endpoint, called by several threads, or a model of ours, in batches.

Both take jobs, and hand every reply on as soon as it is there.
"""

import dataclasses
import io
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from metamorph_jax.data import images
from metamorph_jax.data.sources.base import IMAGE, ImageRef, Turn
from metamorph_jax.endpoint import ChatClient, Completion, image_data, text_part
from metamorph_jax.errors import BadSample, EndpointError, FileError, RequestRefused
from metamorph_jax.sampling.requests import Request
from metamorph_jax.sampling.results import TextPart

SIDE = 1024  # pixels; longer sides of images are shrunk to it before they are sent
REFUSALS = 8  # refused requests in a row, from the first one on, that end a run


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing to ask.

    Attributes:
        id: of the sample.
        before: turns that come first: a system message, examples.
        text: of the question.
        image: a file that the question is about, or "".
        prompt: hash of all that the reply depends on.
        attempt: 0, or how often this was asked before.
    """

    id: str
    before: tuple[Turn, ...]
    text: str
    image: str = ""
    prompt: str = ""
    attempt: int = 0

    def messages(self) -> list[dict]:
        """As an endpoint takes them.

        Raises:
            BadSample: the image can't be used.
        """
        content = self.text
        if self.image:
            content = [image_data(encoded(self.image)), text_part(self.text)]
        turns = [{"role": role, "content": text} for role, text in self.before]
        return [*turns, {"role": "user", "content": content}]


def encoded(path: str) -> bytes:
    """An image as a JPEG whose sides have at most `SIDE` pixels; BadSample if it can't be used."""
    (image,) = images.load([ImageRef(path)])
    image.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=90)
    return data.getvalue()


Taken = Callable[[Job, Completion], None]
Failed = Callable[[Job, Exception], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How replies are drawn.

    Attributes:
        model: as the endpoint names it.
        temperature: None leaves it to the endpoint.
        max_tokens: of a reply.
        seed: sent with each request, plus the number of the attempt; None sends none.
    """

    model: str
    temperature: float | None = 0.7
    max_tokens: int = 1024
    seed: int | None = None


class Stopped(Exception):
    """Raised in place of sleeping, once the work is over."""


class Clock:
    """The time, for an endpoint whose calls stop waiting once `over` is set."""

    monotonic, time = staticmethod(time.monotonic), staticmethod(time.time)

    def __init__(self):
        self.over = threading.Event()

    def sleep(self, seconds: float) -> None:
        if self.over.wait(seconds):
            raise Stopped


def ask_endpoint(
    client: ChatClient,
    jobs: Iterable[Job],
    settings: Settings,
    taken: Taken,
    failed: Failed,
    threads: int,
    over: threading.Event,
) -> None:
    """Asks an endpoint all jobs.

    Whatever ends it early, calls that have begun come to their end, and their replies are taken.

    Args:
        client: of which `complete` is called by all threads.
        jobs: taken one by one, when a thread is free.
        taken: given each job with its reply, in the thread that has it.
        failed: given each job that can't be asked, with the reason: BadSample, RequestRefused.
        threads: number of calls at the same time.
        over: set when no more calls are to begin, and those that wait are to stop.

    Raises:
        EndpointError: the endpoint does not answer, or refused the first `REFUSALS` requests.
    """
    todo, lock = iter(jobs), threading.Lock()
    errors: list[BaseException] = []
    refused = {"row": 0, "ever": False}

    def one(job: Job) -> None:
        seed = None if settings.seed is None else settings.seed + job.attempt
        options = dataclasses.asdict(settings) | {"seed": seed}
        try:
            reply = client.complete(job.messages(), **options)
        except BadSample as error:
            return failed(job, error)
        except RequestRefused as error:
            refused["row"] += 1
            if refused["row"] >= REFUSALS and not refused["ever"]:
                raise EndpointError(f"every request is refused: {error}") from error
            return failed(job, error)
        refused["ever"] = True
        taken(job, reply)

    def work() -> None:
        while not over.is_set():
            with lock:
                job = next(todo, None)
            if job is None:
                return
            try:
                one(job)
            except Stopped:
                return
            except BaseException as error:
                errors.append(error)
                over.set()

    _join([threading.Thread(target=work, daemon=True) for _ in range(threads)], over)
    if errors:
        raise errors[0]


def _join(workers: Sequence[threading.Thread], over: threading.Event) -> None:
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except BaseException:  # Ctrl-C; a second one does not wait
        over.set()
        for worker in workers:
            worker.join()
        raise


def ask_model(generator, jobs: Sequence[Job], options, taken: Taken, failed: Failed) -> None:
    """Asks a model in this process all jobs.

    Args:
        generator: a `sampling.generator.Generator`.
        jobs, taken, failed: as in `ask_endpoint`; jobs that the context has no room for fail. A
            reply has the marker `<image>` where the model drew one.
        options: `sampling.options.Options`.
    """
    by_id = {job.id: job for job in jobs}
    requests = (
        Request(job.id, job.text, (job.image,) if job.image else (), sample=job.attempt,
                before=job.before)
        for job in jobs
    )  # fmt: skip

    def fail(request: Request, error: Exception) -> None:
        bad = error if isinstance(error, BadSample | FileError) else BadSample("unfit", str(error))
        failed(by_id[request.id], bad)

    for request, reply in generator.replies(requests, options, fail, draw=False):
        parts = [p if isinstance(p, TextPart) else TextPart(IMAGE, ()) for p in reply.segments]
        text, length = "".join(p.text for p in parts), sum(len(p.ids) for p in parts)
        taken(by_id[request.id], Completion(text, 0, length, cut=not reply.ended))

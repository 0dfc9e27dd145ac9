"""Judges of answers, and models behind an endpoint that answer tasks themselves.

    judge = Judge(EndpointModel(endpoint, "gpt-4o"), "gpt-4o")        # or any generator of ours
    bench.run_task(task, model, out, settings, judge)

What a judge said is kept in OUT/TASK/verdicts.jsonl as it comes: a run that was stopped goes on
there, and the same text is never paid for twice.
"""

import concurrent.futures
import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

import jax

from metamorph_jax import distributed, endpoint, files
from metamorph_jax.convert import hf
from metamorph_jax.data.sources.base import IMAGE
from metamorph_jax.endpoint import ChatClient, Completion, image_part, text_part
from metamorph_jax.errors import FileError, RequestRefused, UserError
from metamorph_jax.eval import asking
from metamorph_jax.eval.answers import Store
from metamorph_jax.sampling.options import Options
from metamorph_jax.sampling.requests import Request, place
from metamorph_jax.sampling.results import Reply, TextPart

ENDPOINT = "endpoint:"  # before the name of a model, where a judge is named


def check_judge(spec: str) -> None:
    """Raises what opening a judge would that is not there, before anything is asked or drawn.

    Args:
        spec: workdir of a run, published weights, or "endpoint:MODEL"; "" is none.

    Raises:
        UserError: there is no such folder, or no endpoint is set up.
    """
    if spec.startswith(ENDPOINT):
        endpoint.Endpoint()
    elif spec and not spec.startswith(hf.PREFIX) and not pathlib.Path(spec).exists():
        raise UserError(f"judge {files.shown(spec)!r}: there is no such folder (a model of an "
                        f"endpoint is {ENDPOINT}MODEL)")  # fmt: skip


class EndpointModel:
    """A model behind an endpoint, in place of a generator.

    Args:
        client: that is asked.
        model: as the endpoint names it.
        concurrency: calls at the same time.
    """

    def __init__(self, client: ChatClient, model: str, concurrency: int = 8):
        self.client, self.model, self.concurrency = client, model, concurrency

    def replies(
        self, requests: Iterable[Request], options: Options, failed: asking.Failed,
        stream: None = None, draw: bool = False,
    ) -> Iterator[tuple[Request, Reply]]:  # fmt: skip
        """Replies as they come; arguments as of `Generator.replies`. Nothing is drawn.

        Raises:
            EndpointError: the endpoint doesn't answer.
        """
        with concurrent.futures.ThreadPoolExecutor(self.concurrency) as pool:
            waiting = {pool.submit(self._complete, r, options): r for r in requests}
            try:
                for done in concurrent.futures.as_completed(waiting):
                    try:
                        found = done.result()
                    except (RequestRefused, FileError, ValueError) as error:
                        failed(waiting[done], error)
                        continue
                    yield waiting[done], Reply((TextPart(found.text, ()),), not found.cut)
            finally:
                pool.shutdown(cancel_futures=True)

    def _complete(self, request: Request, options: Options) -> Completion:
        return self.client.complete(
            messages(request), model=self.model, temperature=options.temperature,
            max_tokens=options.max_new_tokens, seed=options.seed_of(request),
        )  # fmt: skip

    def likelihoods(self, requests, answers, failed, batch_size: int = 8):
        raise UserError("an endpoint doesn't tell how likely answers are: the form choose needs a "
                        "model of ours")  # fmt: skip


def messages(request: Request) -> list[dict]:
    """A request as one message, its images where their markers are.

    Raises:
        ValueError: it has a video, or markers and images don't match.
        FileError: an image can't be read.
    """
    if request.video:
        raise ValueError("an endpoint is not sent videos")
    text, *rest = place(request).split(IMAGE)
    if len(rest) != len(request.images):
        raise ValueError(f"{len(rest)} markers, {len(request.images)} images")
    parts = [text_part(text)] if text.strip() else []
    for path, text in zip(request.images, rest, strict=True):
        parts.append(image_part(path))
        if text.strip():
            parts.append(text_part(text.lstrip("\n")))
    content = parts if request.images else request.prompt
    return [{"role": "user", "content": content}]


@dataclasses.dataclass(frozen=True)
class Judge:
    """Who judges, and how.

    Attributes:
        model: that is asked.
        name: for files; verdicts of another judge are never mixed with its own.
        options: of decoding.
    """

    model: asking.Answering
    name: str
    options: Options = Options(max_new_tokens=1024)

    def of(self, folder: pathlib.Path) -> "Remembered":
        """The judge of the task with this folder.

        Raises:
            UserError: the folder holds verdicts of another judge.
        """
        settings = {"judge": self.name, "decoding": dataclasses.asdict(self.options)}
        del settings["decoding"]["batch_size"]
        store = Store(folder, settings, "verdicts") if jax.process_index() == 0 else None
        return Remembered(self, store)


class Remembered:
    """Texts -> what the judge says (None: nothing), each text asked once (`tasks.base.Judge`)."""

    def __init__(self, judge: Judge, store: Store | None):
        self.judge, self.store, self.failures = judge, store, 0

    def __call__(self, texts: Sequence[str]) -> list[str | None]:
        ids = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]
        lines = {id: self.store.get(id, id) for id in ids} if self.store is not None else {}
        known = {id: line["text"] for id, line in lines.items() if line}
        known = distributed.gather(known)[0]  # those of the first host
        todo = {id: Request(id, text) for id, text in zip(ids, texts, strict=True)
                if id not in known}  # fmt: skip

        for request, reply in self.judge.model.replies(
            todo.values(), self.judge.options, self._failed, draw=False
        ):
            known[request.id] = reply.text.strip()
            if self.store is not None:
                self.store.add(request.id, request.id, text=known[request.id])
        known = distributed.gather(known)[0]
        return [known.get(id) for id in ids]

    def _failed(self, request: Request, error: Exception) -> None:
        self.failures += 1
        if self.failures <= 5 and self.store is not None:
            print(f"judge {files.shown(self.judge.name)}: {files.shown(error, 500)}; no verdict",
                  file=sys.stderr)  # fmt: skip

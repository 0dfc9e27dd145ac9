"""One step of writing data: ask for what is missing, keep what comes, make something of it all."""

import collections
import dataclasses
import json
import pathlib
import sys
import threading
import time
from collections.abc import Collection, Sequence
from typing import Protocol

from metamorph_jax import files
from metamorph_jax.endpoint import Completion, Price
from metamorph_jax.errors import BadSample, DataError
from metamorph_jax.files import escape, shown
from metamorph_jax.instruct.contexts import Context
from metamorph_jax.instruct.journal import Journal, Reply
from metamorph_jax.instruct.kinds import Kind, Parsed
from metamorph_jax.instruct.samples import Task
from metamorph_jax.instruct.writers import Failed, Job, Taken

EXAMPLES = 3  # details that are printed of each reason
SHOWN = 2  # prompts that a dry run prints
# For estimates: characters of a token, tokens of an image that was shrunk for sending and of a
# reply of which there is no example.
CHARACTERS, IMAGE_TOKENS, REPLY_TOKENS = 4, 800, 150


class Writer(Protocol):
    """Whoever answers jobs, see `writers.py`."""

    def ask(self, jobs: Sequence[Job], taken: Taken, failed: Failed) -> None: ...


class Tally:
    """Counts by reason, with the first few details; may be called from any thread."""

    def __init__(self):
        self.counts: collections.Counter[str] = collections.Counter()
        self._details: dict[str, list[str]] = collections.defaultdict(list)
        self._lock = threading.Lock()

    def add(self, error: BadSample, id: str = "") -> None:
        with self._lock:
            self.counts[error.reason] += 1
            if len(self._details[error.reason]) < EXAMPLES:
                detail = f"{shown(id, 60)}: {error.detail}" if id else error.detail
                self._details[error.reason].append(shown(detail, 300))

    def print(self, title: str) -> None:
        """A line for each reason and for its first details, on standard output."""
        if self.counts:
            print(f"{title}: {self.counts.total()}")
        for reason, count in self.counts.most_common():
            print(f"  {reason} {count}")
            for detail in self._details[reason]:
                print(f"    {detail}")


@dataclasses.dataclass
class Step:
    """What is to be written, by whom, and where.

    Attributes:
        task: what is asked.
        out: folder of the results.
        skipped: counts contexts that are left out.
        price: of tokens, or None.
        redo: ask again where the reply can't be used.
    """

    task: Task
    out: pathlib.Path
    skipped: Tally
    price: Price | None = None
    redo: bool = False

    @property
    def kind(self) -> Kind:
        return self.task.kind

    @property
    def journal(self) -> pathlib.Path:
        return self.out / f"{self.kind.name}_replies.jsonl"

    # ---- what becomes of the replies

    def captions(self, contexts: Sequence[Context], writer: Writer) -> dict[str, tuple[str, ...]]:
        """Id of a context -> sentences about it, for those that got some."""
        found = {}
        for context, parsed in self._replies(contexts, writer):
            if isinstance(parsed, BadSample):
                self.skipped.add(parsed, context.id)
            else:
                found[context.id] = tuple(sentence for _, sentence in parsed.pairs)
        return found

    def samples(self, contexts: Sequence[Context], writer: Writer) -> None:
        """Writes the samples and prints what became of the replies.

        Raises:
            DataError: not a single reply can be used.
        """
        made, aside, repaired = [], Tally(), 0
        for context, parsed in self._replies(contexts, writer):
            try:
                if isinstance(parsed, BadSample):
                    raise parsed
                made.append(self.task.sample(context, parsed))
                repaired += parsed.repaired
            except BadSample as error:
                aside.add(error, context.id)
        aside.print("replies set aside (--redo asks again)")
        file = self.out / f"{self.kind.name}.json"
        if not made:
            raise DataError(f"there is no usable reply; all of them are in {shown(self.journal)}")
        files.write_whole(file, json.dumps(made, indent=1, ensure_ascii=False) + "\n")
        print(f"{len(made)} samples of {len(contexts)} images in {shown(file)}, {repaired} of them "
              "from replies that were repaired")  # fmt: skip

    def write_contexts(self, contexts: Sequence[Context]) -> None:
        """Writes contexts as `--contexts` reads them."""
        file = self.out / f"{self.kind.name}.jsonl"
        lines = [json.dumps(c.record(), ensure_ascii=False) + "\n" for c in contexts]
        files.write_whole(file, "".join(lines))
        print(f"{len(lines)} images with captions in {shown(file)}")

    # ---- asking

    def _replies(
        self, contexts: Sequence[Context], writer: Writer
    ) -> list[tuple[Context, Parsed | BadSample]]:
        """What the reply to each context holds, or why it can't be used, once all are there."""
        jobs = self._jobs(contexts)
        with Journal(self.journal) as journal:
            todo = self._todo(journal, jobs)
            self._say_state(journal, jobs, todo)
            if todo:
                self._ask(journal, todo, writer)
            self._say_tokens([journal.find(job.id, job.prompt) for job in jobs])
            found = {job.id: self._parsed(journal, job) for job in jobs}
        pairs = ((context, found.get(context.id)) for context in contexts)
        return [(context, parsed) for context, parsed in pairs if parsed is not None]

    def _jobs(self, contexts: Sequence[Context]) -> list[Job]:
        jobs = []
        for context in contexts:
            try:
                jobs.append(self.task.job(context))
            except BadSample as error:
                self.skipped.add(error, context.id)
        return jobs

    def _parsed(self, journal: Journal, job: Job) -> Parsed | BadSample | None:
        """What the reply to a job holds, or why it can't be used; None if there is none."""
        reply = journal.find(job.id, job.prompt)
        if reply is None:
            return None
        try:
            return self.kind.parse(reply.text, reply.cut)
        except BadSample as error:
            return error

    def _todo(self, journal: Journal, jobs: Sequence[Job]) -> list[Job]:
        """The jobs without a reply; with `redo`, those with one that can't be used, too."""
        found = []
        for job in jobs:
            parsed = self._parsed(journal, job)
            if parsed is None:
                found.append(job)
            elif self.redo and isinstance(parsed, BadSample):
                earlier = journal.find(job.id, job.prompt).attempt
                found.append(dataclasses.replace(job, attempt=earlier + 1))
        return found

    def _ask(self, journal: Journal, todo: Sequence[Job], writer: Writer) -> None:
        progress = _Progress(self.kind.name, len(todo))

        def taken(job: Job, reply: Completion) -> None:
            text = reply.text.encode(errors="replace").decode()  # halves of surrogate pairs
            status, detail = "ok", ""
            try:
                if self.kind.parse(text, reply.cut).repaired:
                    status = "repaired"
            except BadSample as error:
                status, detail = error.reason, error.detail
            journal.add(Reply(
                job.id, job.prompt, text, reply.cut, status, detail, reply.prompt_tokens,
                reply.completion_tokens, job.attempt,
            ))  # fmt: skip
            progress.add()

        def failed(job: Job, error: Exception) -> None:
            known = isinstance(error, BadSample)
            self.skipped.add(error if known else BadSample("refused", str(error)), job.id)
            progress.add()

        try:
            writer.ask(todo, taken, failed)
        except BaseException:
            print(f"{self.kind.name}: {progress.done} of {len(todo)} were asked, their replies are "
                  f"in {shown(self.journal)}; the same command asks for the others",
                  file=sys.stderr)  # fmt: skip
            raise
        finally:
            progress.close()

    # ---- what is printed

    def _say_state(self, journal: Journal, jobs: Sequence[Job], todo: Sequence[Job]) -> None:
        other = sum(job.id in journal.replies and journal.find(job.id, job.prompt) is None
                    for job in jobs)  # fmt: skip
        line = f"{self.kind.name}: {len(jobs) - len(todo)} replies of {len(jobs)} are there"
        if other:
            line += f"; {other} others are to other prompts or settings and are asked for again"
        if journal.damaged:
            line += f"; {len(journal.damaged)} lines are damaged (line {journal.damaged[0]})"
        print(line, file=sys.stderr)

    def _say_tokens(self, replies: Collection[Reply | None]) -> None:
        replies = [reply for reply in replies if reply is not None]
        read = sum(reply.prompt_tokens for reply in replies)
        wrote = sum(reply.completion_tokens for reply in replies)
        line = f"{self.kind.name}: {len(replies)} replies, {read:,} tokens read, {wrote:,} written"
        if self.price is not None:
            line += f", cost {self.price.of(read, wrote):,.4f}"
        print(line)

    def dry_run(self, contexts: Sequence[Context]) -> None:
        """Prints what would be asked, and about how many tokens that is."""
        jobs = self._jobs(contexts)
        if self.journal.exists():
            with Journal(self.journal) as journal:
                jobs = self._todo(journal, jobs)
        for job in jobs[:SHOWN]:
            turns = [*job.before, ("user", f"[{job.image}]\n{job.text}" if job.image else job.text)]
            print(f"==== {self.kind.name}, {shown(job.id)}")
            for role, text in turns:
                print(f"---- {role}\n{escape(text)}")
        examples = [text for role, text in self.task.opening if role == "assistant"]
        wrote = len(jobs) * (_tokens(*examples) / len(examples) if examples else REPLY_TOKENS)
        asked = [_tokens(job.text, *(text for _, text in job.before)) for job in jobs]
        read = sum(asked) + IMAGE_TOKENS * sum(bool(job.image) for job in jobs)
        line = f"{len(jobs)} requests, about {read:,.0f} tokens to read and {wrote:,.0f} to write"
        if self.price is not None:
            line += f", cost about {self.price.of(read, wrote):,.4f}"
        print(f"==== {self.kind.name}: {line}")


def _tokens(*texts: str) -> float:
    return sum(map(len, texts)) / CHARACTERS


class _Progress:
    """A bar on a terminal, now and then a line elsewhere; may be called from any thread."""

    def __init__(self, name: str, total: int):
        from tqdm import tqdm

        self.done, self._name, self._total = 0, name, total
        self._bar = tqdm(total=total, desc=name, disable=None)
        self._lock, self._last = threading.Lock(), time.monotonic()

    def add(self) -> None:
        with self._lock:
            self.done += 1
            self._bar.update()
            if self._bar.disable and time.monotonic() - self._last > 30:
                self._last = time.monotonic()
                print(f"{self._name}: {self.done}/{self._total}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()

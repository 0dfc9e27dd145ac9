"""What models replied, in a file that only grows: one line of JSON for each reply as it comes.

    {"id": "17", "prompt": hash, "text": raw reply, "cut": false, "status": "ok", "detail": "",
     "prompt_tokens": 1200, "completion_tokens": 310, "attempt": 0}

`prompt` is the hash of all that the reply depends on. A reply counts as long as the prompt is the
same; of several replies to an id, the last one counts. `status` says what was made of it when it
came; the data are made from the texts, so that a better parser needs no new replies.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import threading

from metamorph_jax import files
from metamorph_jax.errors import FileError, UserError
from metamorph_jax.files import shown


@dataclasses.dataclass(frozen=True)
class Reply:
    """One line, see the module docstring."""

    id: str
    prompt: str
    text: str
    cut: bool = False
    status: str = "ok"
    detail: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    attempt: int = 0


_FIELDS = {field.name: field.type for field in dataclasses.fields(Reply)}


class Journal:
    """A journal, opened for this process alone.

    Args:
        path: of the file, which is made if it isn't there.

    Attributes:
        replies: id -> the last reply.
        damaged: numbers of lines that can't be read; a last line without its end, which a killed
            process leaves behind, is not one of them.

    Raises:
        UserError: another process writes it, or it can't be written.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.replies: dict[str, Reply] = {}
        self.damaged: list[int] = []
        self._lock = threading.Lock()
        try:
            if os.path.lexists(self.path):
                files.regular(self.path)
            self._file = open(self.path, "ab")  # noqa: SIM115
            # Not `lockf`: its lock ends when this process closes the file that it reads below.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process writes {shown(self.path)}: wait for its end, or choose another "
                "--out"
            ) from None
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"{shown(self.path)} can't be written: {why}") from error
        self._read()

    def _read(self) -> None:
        whole = 0
        for number, start, line in files.raw_lines(self.path):
            if not line.endswith(b"\n"):
                break
            whole = start + len(line)
            try:
                reply = _reply(files.parse(line, "the line", dict))
            except (FileError, TypeError):
                self.damaged.append(number)
                continue
            self.replies[reply.id] = reply
        self._file.truncate(whole)

    def find(self, id: str, prompt: str) -> Reply | None:
        """The reply to this very prompt."""
        found = self.replies.get(id)
        return found if found is not None and found.prompt == prompt else None

    def add(self, reply: Reply) -> None:
        """Appends a reply; may be called from any thread.

        Raises:
            UserError: it can't be written.
        """
        line = json.dumps(dataclasses.asdict(reply)).encode() + b"\n"
        with self._lock:
            try:
                self._file.write(line)
                self._file.flush()
            except OSError as error:
                why = error.strerror or error
                raise UserError(f"{shown(self.path)} can't be written: {why}") from error
            self.replies[reply.id] = reply

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.close()


def _reply(value: dict) -> Reply:
    reply = Reply(**{name: value[name] for name in _FIELDS if name in value})
    wrong = [n for n, kind in _FIELDS.items() if not isinstance(getattr(reply, n), kind)]
    if wrong:
        raise TypeError(f"{wrong[0]} is of another type")
    return reply


def digest(value) -> str:
    """A hash of JSON-able values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]

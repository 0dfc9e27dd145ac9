"""One process at a time in a folder that is written."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import time

from metamorph_jax import files
from metamorph_jax.errors import UserError


class Lock:
    """Keeps a second process from working in the same folder, until it is closed or dies.

    The file folder/lock says who holds it. It is a POSIX record lock: released by the system
    when the process ends in any way, and not inherited by workers. On NFS it holds between hosts;
    on a mounted bucket (gcsfuse) only between processes of one host.

    Args:
        folder: made if it isn't there.
        does: what the process does there, for messages; option: of the command line that names the
            folder.
        wait: for the other process to end, with a line on stderr.

    Attributes:
        message: for the log, where the file system has no locks; else "".

    Raises:
        UserError: another process holds it; the message says which and since when.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        does: str = "trains",
        option: str = "--workdir",
        wait: bool = False,
    ):
        folder = pathlib.Path(folder)
        self._path, self.message, self._does, self._option = folder / "lock", "", does, option
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(self._path):
                files.regular(self._path)
            self._file = open(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), "r+")  # noqa: SIM115
        except OSError as error:
            where = files.shown(folder)
            raise UserError(f"{option} {where} can't be written: {error.strerror}") from error
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                self.message = f"{folder} has no locks ({error.strerror}): start one run only in it"
            elif wait:
                print(f"{self._holder()}; waiting for its end", file=sys.stderr, flush=True)
                fcntl.lockf(self._file, fcntl.LOCK_EX)
            else:
                holder = self._holder()
                self._file.close()
                raise UserError(
                    f"{holder}; wait for its end, or choose another {option}"
                ) from error
        who = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
        self._file.truncate(0)
        self._file.write(json.dumps(who) + "\n")
        self._file.flush()

    def _holder(self) -> str:
        try:
            who = files.parse(os.pread(self._file.fileno(), 1000, 0), str(self._path), dict)
            said = ", ".join(f"{k} {files.shown(who.get(k), 60)}" for k in ("host", "pid", "since"))
        except files.FileError:
            said = "it has just started"
        return f"another process {self._does} in {files.shown(self._path.parent)} ({said})"

    def close(self) -> None:
        """Releases it. The file stays, as one that is removed could be locked twice."""
        with contextlib.suppress(OSError):
            self._file.truncate(0)
        self._file.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")

"""Joining the hosts of a run.

Every host starts the same command. The address of process 0 and the numbers come from, in order:

    options     --coordinator=HOST:PORT --processes=N --process=K
    variables   JAX_COORDINATOR_ADDRESS (with port, or JAX_COORDINATOR_PORT), JAX_NUM_PROCESSES or
                NNODES, JAX_PROCESS_ID or NODE_RANK or JOB_COMPLETION_INDEX (GKE, XPK on GPUs)
    platform    what JAX detects: TPU VMs, multi-slice, GKE with TPUs, SLURM's srun, Open MPI

Before JAX connects them (which blocks silently until all are there) they meet at the coordinator's
port, so that missing hosts can be reported. No JAX backend is started before that.
"""

import argparse
import dataclasses
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Mapping

from metamorph_jax.errors import JoinError

LOST_HOST = 75  # exit code: start the command again on all hosts (sysexits.h: EX_TEMPFAIL)
_PORT = "8482"
_MAGIC = "metamorph-join"


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process among all of a run.

    Attributes:
        coordinator: host:port of process 0.
        processes, process: how many there are, and which this is.
    """

    coordinator: str
    processes: int
    process: int


def find(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> Place | None:
    """The place of this process; None if nothing says that there are others.

    Args:
        coordinator, processes, process: None: found as the module docstring says.
        environ: variables, default those of the process.

    Raises:
        JoinError: if only some of the three can be found.
    """
    env = os.environ if environ is None else environ
    coordinator = coordinator or _address(env)
    processes = _first(processes, env, "JAX_NUM_PROCESSES", "NNODES")
    process = _first(process, env, "JAX_PROCESS_ID", "NODE_RANK", "JOB_COMPLETION_INDEX")
    if coordinator and ":" not in coordinator:
        coordinator += ":" + env.get("JAX_COORDINATOR_PORT", _PORT)
    if not coordinator or processes is None or process is None:
        found = _detect(coordinator, processes, process)
        if found is None and not coordinator:
            return None
        coordinator, processes, process = found or (coordinator, processes, process)
    if processes is None or process is None:
        raise JoinError(
            f"process 0 is at {coordinator}, but these are not known: "
            + " and ".join(n for n, v in (("--processes", processes), ("--process", process))
                           if v is None)
        )  # fmt: skip
    if not 0 <= process < processes:
        raise JoinError(f"process {process} of {processes}: they are counted from 0")
    return Place(coordinator, processes, process) if processes > 1 else None


def _address(env) -> str | None:
    return env.get("JAX_COORDINATOR_ADDRESS") or env.get("JAX_COORDINATOR_IP") or None


def _first(value: int | None, env, *names: str) -> int | None:
    if value is not None:
        return value
    for name in names:
        if env.get(name):
            try:
                return int(env[name])
            except ValueError as error:
                raise JoinError(f"${name} is {env[name]!r}, not a number") from error
    return None


def _detect(coordinator, processes, process):
    """(coordinator, processes, process) as JAX's own detection says, or None."""
    from jax._src import clusters  # nothing public tells it before all hosts are connected

    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    with warnings.catch_warnings(action="ignore"):  # "install jax[k8s]", wherever pods are
        found = detect(coordinator, processes, process, [0], None, 300)[:3]
    return None if None in found else found


def join(
    place: Place,
    hint_after: float = 60.0,
    timeout: float = 600.0,
    heartbeat: int = 100,
    say=None,
) -> None:
    """Connects the processes; returns when all are there. Call it before JAX is used.

    Args:
        place: of this process.
        hint_after: seconds until a hint at what to check is printed.
        timeout: seconds until joining fails.
        heartbeat: seconds of silence after which a host counts as lost and the others end.
        say: is called with each line of text; default: prints it.

    Raises:
        JoinError: if not all hosts came in time.
    """
    import jax

    say = say or (lambda text: print(text, flush=True))
    deadline = time.monotonic() + timeout
    meet = _gather if place.process == 0 else _report
    meet(place, hint_after, deadline, say)
    prepare_collectives()
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        initialization_timeout=max(int(deadline - time.monotonic()), 30),
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=heartbeat,
    )
    if place.process == 0:
        say(f"all {place.processes} hosts are connected; if one falls silent for {heartbeat} s the "
            "others end, and the same command resumes from the last checkpoint")  # fmt: skip


def prepare_collectives() -> None:
    """Chooses how CPUs talk to each other; call it before JAX's backend starts."""
    import jax

    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")


def _gather(place: Place, hint_after: float, deadline: float, say) -> None:
    """Process 0: counts the processes that arrive, and lets them go when all are there."""
    port = int(place.coordinator.rsplit(":", 1)[1])
    began, hinted = time.monotonic(), False
    there: dict[int, tuple[socket.socket, str]] = {}
    try:
        with _listen(port) as server:
            say(f"1 of {place.processes} hosts joined (waiting at port {port})")
            while len(there) < place.processes - 1:
                now = time.monotonic()
                missing = [k for k in range(1, place.processes) if k not in there]
                if now > deadline:
                    raise JoinError(_hint(place, missing))
                if not hinted and now - began > hint_after:
                    hinted = True
                    say(_hint(place, missing))
                try:
                    connection, (address, *_) = server.accept()
                except TimeoutError:
                    continue
                number = _greeting(connection, place.processes)
                if number is None:  # not one of ours
                    connection.close()
                    continue
                if number in there:  # it connected again
                    there[number][0].close()
                new = number not in there
                there[number] = connection, address
                if new:
                    say(f"{len(there) + 1} of {place.processes} hosts joined "
                        f"(process {number}, {address})")  # fmt: skip
        for connection, _ in there.values():
            connection.sendall(b"go\n")
    finally:
        for connection, _ in there.values():
            connection.close()


def _listen(port: int) -> socket.socket:
    try:
        server = socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise JoinError(
            f"port {port} can't be opened on this host ({error}); is an earlier run still alive? "
            "$JAX_COORDINATOR_PORT chooses another"
        ) from error
    server.settimeout(1.0)
    return server


def _greeting(connection: socket.socket, processes: int) -> int | None:
    connection.settimeout(2.0)
    try:
        words = connection.recv(256).decode(errors="replace").split()
    except OSError:
        return None
    if len(words) != 3 or words[0] != _MAGIC or not words[1].isdecimal():
        return None
    number = int(words[1])
    return number if 0 < number < processes and words[2] == str(processes) else None


def _report(place: Place, hint_after: float, deadline: float, say) -> None:
    """The others: tell process 0 that they are here, and wait until all are."""
    host, port = place.coordinator.rsplit(":", 1)
    began, hinted = time.monotonic(), False
    error: object = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5.0) as connection:
                connection.sendall(f"{_MAGIC} {place.process} {place.processes}\n".encode())
                connection.settimeout(max(deadline - time.monotonic(), 1.0))
                if connection.recv(16).startswith(b"go"):
                    return
                error = "it closed the connection"
        except OSError as found:
            error = found
        if not hinted and time.monotonic() - began > hint_after:
            hinted = True
            say(f"process {place.process} of {place.processes} does not reach process 0 at "
                f"{place.coordinator} ({error}). {_CHECK}")  # fmt: skip
        time.sleep(0.2)
    raise JoinError(f"process {place.process}: not all of {place.processes} hosts met at "
                    f"{place.coordinator} ({error}). {_CHECK}")  # fmt: skip


_CHECK = (
    "Check: was the same command started on every host (--worker=all, srun, one pod per host)? "
    "Is process 0 running, and its port open to the others? Do all give the same number of "
    "processes, and each its own number? Is an earlier run still alive on one of them?"
)


def _hint(place: Place, missing: list[int]) -> str:
    shown = ", ".join(map(str, missing[:20])) + ("…" if len(missing) > 20 else "")
    here = place.processes - len(missing)
    return f"{here} of {place.processes} hosts joined; missing: process {shown}. {_CHECK}"


# ---- the command line


def add_arguments(parser) -> None:
    """Options for joining the hosts, as a group of a command's parser."""
    group = parser.add_argument_group(
        "several hosts",
        "The same command on every host. TPU VMs, GKE and SLURM (srun) are recognised.",
    )
    group.add_argument(
        "--distributed",
        action=argparse.BooleanOptionalAction,
        help="require other hosts, or never join any; default: what the platform says",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process", type=int, metavar="K", help="number of this process, from 0")
    group.add_argument(
        "--hint-after", type=float, default=60.0, metavar="SECONDS",
        help="if hosts are still missing then, print what to check (60)",
    )  # fmt: skip
    group.add_argument(
        "--join-timeout", type=float, default=600.0, metavar="SECONDS",
        help="stop waiting for missing hosts (600)",
    )  # fmt: skip
    group.add_argument(
        "--heartbeat", type=int, default=100, metavar="SECONDS",
        help="a host that is silent for this long counts as lost, and the others exit (100)",
    )  # fmt: skip


def join_asked(args) -> Place | None:
    """This process's place, as the options of `add_arguments` say, after all hosts have met; None
    if it is alone.

    Raises:
        JoinError: the others are asked for and can't be found, or not all came.
    """
    if args.distributed is False:
        return None
    place = find(args.coordinator, args.processes, args.process)
    if place is not None:
        join(place, args.hint_after, args.join_timeout, args.heartbeat)
    elif args.distributed:
        raise JoinError(
            "--distributed: nothing says where the other hosts are; give --coordinator=HOST:PORT, "
            "--processes=N and --process=K"
        )
    return place


# ---- joined hosts


def gather(mine) -> list:
    """The values of all processes (anything that JSON can hold), in order; waits for them."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    text = json.dumps(mine).encode()
    if jax.process_count() == 1:
        return [json.loads(text)]
    sizes = multihost_utils.process_allgather(np.array([len(text)])).reshape(-1)
    padded = np.frombuffer(text.ljust(int(sizes.max())), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[: int(n)])) for row, n in zip(rows, sizes, strict=True)]


def leave(code: int) -> None:
    """Ends this process at once, when others may be gone or would wait for it forever.

    Without this Python would wait at its exit until all processes want to end. The others notice
    that this one is gone, and end as well.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

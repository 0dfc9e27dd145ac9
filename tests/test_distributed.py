"""Finding and joining hosts, without JAX's own part of it."""

import socket
import threading
import time

import pytest

from metamorph_jax import distributed
from metamorph_jax.distributed import Place, find
from metamorph_jax.errors import JoinError
from tests.train.forked import free_port

SRUN = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[007,009-011]", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "environ", "place"),
    [
        ((), {}, None),
        (("a:1", 4, 2), {}, Place("a:1", 4, 2)),
        (("a", 4, 2), {"JAX_COORDINATOR_PORT": "99"}, Place("a:99", 4, 2)),
        (("a:1", 1, 0), {}, None),
        ((), {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"},
         Place("a:1", 3, 0)),
        # as XPK sets them for GPUs
        ((), {"JAX_COORDINATOR_ADDRESS": "job-0-0.job", "JAX_COORDINATOR_PORT": "6002",
              "NNODES": "2", "JOB_COMPLETION_INDEX": "1"}, Place("job-0-0.job:6002", 2, 1)),
        ((None, None, 1), {"JAX_COORDINATOR_ADDRESS": "a:1", "NNODES": "2", "NODE_RANK": "0"},
         Place("a:1", 2, 1)),
        ((), SRUN, Place("node007:61441", 4, 2)),
    ],
)  # fmt: skip
def test_find(given, environ, place, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert find(*given) == place


@pytest.mark.parametrize(
    ("given", "environ", "message"),
    [
        (("a:1", None, 1), {}, "not known: --processes"),
        (("a:1", 2, 2), {}, "process 2 of 2: they are counted from 0"),
        ((), {"JAX_COORDINATOR_ADDRESS": "a:1", "NNODES": "two"}, "NNODES is 'two', not a number"),
    ],
)
def test_find_says_what_is_missing(given, environ, message):
    with pytest.raises(JoinError, match=message):
        find(*given, environ=environ)


def test_tpu_workers_on_gke(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda name: "10.0.0.1")
    for name, value in {
        "TPU_WORKER_HOSTNAMES": "w0,w1", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "s0-w0", "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert find() == Place("s0-w0:8482", 4, 3)


def meet(place, said, **kw):
    options = {"hint_after": 0.5, "seconds": 20.0} | kw
    role = distributed._gather if place.process == 0 else distributed._report
    deadline = time.monotonic() + options["seconds"]
    try:
        role(place, options["hint_after"], deadline, said.append)
        said.append("met")
    except JoinError as error:
        said.append(f"error: {error}")


def start(places, **kw):
    said = [[] for _ in places]
    threads = [
        threading.Thread(target=meet, args=(p, s), kwargs=kw)
        for p, s in zip(places, said, strict=True)
    ]
    for thread in threads:
        thread.start()
    return threads, said


def test_says_how_many_joined_and_who_is_missing():
    where = f"localhost:{free_port()}"
    threads, said = start([Place(where, 3, 0), Place(where, 3, 1)])
    deadline = time.monotonic() + 20
    while not any("missing: process 2. Check" in line for line in said[0]):
        assert time.monotonic() < deadline, said
        time.sleep(0.02)
    # A stranger at the port, and a host of another run, count for nothing.
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"metamorph-join 2 5\n"):
        with socket.create_connection(("localhost", int(where.split(":")[1]))) as stranger:
            stranger.sendall(text)
            assert stranger.recv(10) == b""
    more, last = start([Place(where, 3, 2)])
    for thread in threads + more:
        thread.join(20)
    assert said[0][0].startswith("1 of 3 hosts joined")
    assert [line.split(" (")[0] for line in said[0] if " (process" in line] == [
        "2 of 3 hosts joined", "3 of 3 hosts joined"
    ]  # fmt: skip
    assert [lines[-1] for lines in said + last] == ["met"] * 3


def test_gives_up_in_time():
    where = f"localhost:{free_port()}"
    (alone,), (said,) = start([Place(where, 2, 0)], seconds=1.0)
    alone.join(20)
    assert "error: 1 of 2 hosts joined; missing: process 1. Check" in said[-1]
    (alone,), (said,) = start([Place(where, 2, 1)], seconds=1.0)
    alone.join(20)
    assert "does not reach process 0" in said[0] and "not all of 2 hosts met" in said[-1]


def test_port_in_use_is_said():
    with socket.create_server(("", 0)) as other:
        place = Place(f"localhost:{other.getsockname()[1]}", 2, 0)
        (thread,), (said,) = start([place])
        thread.join(20)
    assert "can't be opened on this host" in said[-1] and "earlier run" in said[-1]

"""Threads that ask an endpoint: what happens to calls under way when something ends the run."""

import threading
import time

import pytest

from metamorph_jax.endpoint import Completion
from metamorph_jax.errors import EndpointError
from metamorph_jax.instruct.writers import Clock, Job, Settings, Stopped, ask_endpoint

JOBS = [Job(str(k), (), f"Question {k}") for k in range(20)]


class Client:
    """Answers by a function of the number of the job."""

    def __init__(self, answer):
        self.answer, self.seen, self.settings = answer, [], []

    def complete(self, messages, **settings):
        number = int(messages[-1]["content"].split()[-1])
        self.seen.append(number)
        self.settings.append(settings)
        return Completion(self.answer(number))


def ask(client, threads, clock=None, jobs=JOBS, settings=Settings("m")):  # noqa: B008
    taken = {}
    over = (clock or Clock()).over
    try:
        ask_endpoint(client, jobs, settings, lambda job, reply: taken.update({job.id: reply.text}),
                     None, threads, over)  # fmt: skip
    finally:
        client.taken = taken
    return taken


def test_every_job_is_asked_once():
    client = Client(str)
    assert ask(client, 5) == {job.id: job.id for job in JOBS}
    assert sorted(client.seen) == list(range(20))


def test_calls_under_way_come_to_their_end():
    """One call fails while two others are waiting for their replies; these are not lost."""
    begun = threading.Barrier(3)

    def answer(number):
        begun.wait(10)
        if number == 0:
            raise EndpointError("closed")
        time.sleep(0.1)
        return str(number)

    client = Client(answer)
    with pytest.raises(EndpointError, match="closed"):
        ask(client, 3)
    assert client.taken == {"1": "1", "2": "2"} and sorted(client.seen) == [0, 1, 2]


def test_calls_that_wait_for_another_try_stop():
    clock, begun = Clock(), threading.Barrier(2)
    stopped = []

    def answer(number):
        begun.wait(10)
        if number == 0:
            raise EndpointError("closed")
        try:
            clock.sleep(60)
        except Stopped:
            stopped.append(number)
            raise

    with pytest.raises(EndpointError, match="closed"):
        ask(Client(answer), 2, clock)
    assert stopped == [1]


def test_a_seed_is_sent_if_asked_for_and_grows_with_the_attempts():
    jobs = [Job("0", (), "Question 0"), Job("1", (), "Question 1", attempt=2)]
    client = Client(str)
    ask(client, 1, jobs=jobs, settings=Settings("m", 0.5, 9, seed=10))
    assert [s["seed"] for s in client.settings] == [10, 12]
    assert client.settings[0] | {"seed": 0} == dict(model="m", temperature=0.5, max_tokens=9,
                                                    seed=0)  # fmt: skip
    ask(client, 1, jobs=jobs)
    assert client.settings[-1]["seed"] is None

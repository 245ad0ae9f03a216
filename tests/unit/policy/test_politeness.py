"""Background jobs beside interactive users and each other, on servers in simulated time."""

from __future__ import annotations

import itertools
import math
import random
from typing import NamedTuple

import pytest

from beam_triton.policy.politeness import UNLIMITED, Background
from beam_triton.policy.server_times import Executions, ServerCounts
from tests.support.clock import FakeClock
from tests.unit.policy.simulation import Client, Server, Simulation, Visitors

SERVICE_SECONDS = 0.02


class Shared(NamedTuple):
    """Interactive latencies in service times, the jobs' share of what the users left, and each job's part."""

    median: float
    latency_99: float
    share: float
    parts: list[float]
    clients: list[Client]


def share(
    instances: int,
    *,
    jobs: int = 1,
    is_background: bool = True,
    load: float = 0.2,
    has_priorities: bool = False,
    rows: int = 1,
    seconds_a_row: float = 0.0,
    seconds: float = 60.0,
) -> Shared:
    """Users who keep a part ``load`` of the instances busy, and jobs, once these have settled."""
    generator = random.Random(1)
    simulation = Simulation()
    server = Server(simulation, instances, lambda: SERVICE_SECONDS, seconds_a_row=seconds_a_row)
    users = Visitors(server, load * instances / SERVICE_SECONDS, random.Random(2), is_urgent=has_priorities)
    clients = [
        Client(
            server,
            32,
            pause_seconds=lambda: 0.002 * generator.random(),
            asks=True,
            is_background=is_background,
            rows=rows,
        )
        for _ in range(jobs)
    ]
    for number, client in enumerate(clients):
        simulation.plan(0.4 * number, client.start)
    if load:
        simulation.plan(3.0, users.start)
    simulation.run(30.0)
    users.latencies.clear()
    for client in clients:
        client.succeeded = client.scored = 0
    simulation.run(seconds)
    busy = [
        client.succeeded * SERVICE_SECONDS + (client.scored - client.succeeded) * seconds_a_row
        for client in clients
    ]
    rest = instances * seconds - len(users.latencies) * SERVICE_SECONDS
    even = sum(busy) / len(busy) if busy else 1.0
    median, latency_99 = (users.percentile(50), users.percentile(99)) if users.latencies else (0.0, 0.0)
    return Shared(
        median / SERVICE_SECONDS,
        latency_99 / SERVICE_SECONDS,
        sum(busy) / rest,
        [each / even for each in busy],
        clients,
    )


@pytest.mark.parametrize(
    ("instances", "has_priorities", "most", "most_of_normal"),
    [
        (16, False, 1.25, 1.6),
        (16, True, 1.25, 1.4),
        (32, False, 1.15, 1.4),
        (8, True, 1.3, 1.4),
        (2, True, 1.25, 1.1),
        (1, True, 1.25, 1.2),
    ],
)
def test_interactive_users_hardly_notice_a_background_job(
    instances: int, has_priorities: bool, most: float, most_of_normal: float
) -> None:
    """At 20 % load: 99 % of their answers within 1.25 times of what they take alone, and the job gets 70 %.

    Beside a job that does not give way they take longer.
    """
    alone = share(instances, jobs=0, has_priorities=has_priorities)
    beside = share(instances, has_priorities=has_priorities)
    normal = share(instances, has_priorities=has_priorities, is_background=False)
    assert beside.latency_99 < most * alone.latency_99
    assert beside.share > 0.7
    assert normal.latency_99 > most_of_normal * alone.latency_99


@pytest.mark.parametrize(("instances", "most"), [(1, 1.75), (4, 1.9), (8, 1.5)])
def test_users_of_few_instances_notice_less_of_a_background_job_than_of_another(
    instances: int, most: float
) -> None:
    """Without priorities they wait for what is being executed, but not in a queue of the job's requests."""
    alone, beside = share(instances, jobs=0), share(instances)
    normal = share(instances, is_background=False)
    assert beside.latency_99 < most * alone.latency_99
    assert beside.share > 0.7
    assert normal.latency_99 > 1.25 * beside.latency_99


@pytest.mark.parametrize("instances", [1, 16])
def test_background_job_alone_is_as_fast_as_any(instances: int) -> None:
    assert share(instances, load=0.0).share > 0.99 * share(instances, load=0.0, is_background=False).share


@pytest.mark.parametrize(("instances", "jobs"), [(1, 4), (4, 2), (16, 2), (16, 4), (16, 16)])
def test_background_jobs_share_what_is_left(instances: int, jobs: int) -> None:
    """All of them get a fair part of it, those that come late, too."""
    shared = share(instances, jobs=jobs, seconds=120.0)
    assert shared.share > 0.8
    assert 0.6 < min(shared.parts) <= max(shared.parts) < 1.5


@pytest.mark.parametrize(("instances", "load"), [(1, 0.95), (4, 1.2), (16, 1.2)])
def test_background_job_gets_something_however_busy_the_server(instances: int, load: float) -> None:
    shared = share(instances, load=load, has_priorities=False, seconds=30.0)
    assert shared.clients[0].succeeded >= 3


def test_background_job_leaves_almost_everything_to_one_that_does_not_give_way() -> None:
    """And the other does not lose throughput by it."""
    simulation = Simulation()
    server = Server(simulation, 16, lambda: SERVICE_SECONDS)
    polite, other = (
        Client(server, 32, asks=True, is_background=is_background) for is_background in (True, False)
    )
    polite.start()
    simulation.plan(10.0, other.start)
    simulation.run(30.0)
    polite.succeeded = other.succeeded = 0
    simulation.run(30.0)
    assert other.succeeded > 0.9 * 16 * 30 / SERVICE_SECONDS
    assert 0.01 * other.succeeded < polite.succeeded < 0.1 * other.succeeded


def test_background_job_gives_way_within_two_seconds_and_takes_all_again() -> None:
    simulation = Simulation()
    server = Server(simulation, 16, lambda: SERVICE_SECONDS)
    job = Client(server, 32, asks=True, is_background=True)
    users = Visitors(server, 160.0, random.Random(1))
    job.start()
    simulation.run(10.0)
    assert job.background is not None and not job.background.gives_way
    users.start()
    simulation.run(2.0)
    assert job.background.gives_way
    users.rate = 1e-9
    simulation.run(8.0)
    assert not job.background.gives_way
    job.succeeded = 0
    simulation.run(10.0)
    assert job.succeeded > 0.99 * 16 * 10 / SERVICE_SECONDS


@pytest.mark.parametrize(("instances", "most"), [(1, 1.7), (16, 1.35)])
def test_batches_shrink_while_others_would_wait_for_them(instances: int, most: float) -> None:
    """64 elements take seven times as long as one: the job keeps to fewer, as long as others are about."""
    alone = share(instances, jobs=0, has_priorities=True)
    beside = share(instances, has_priorities=True, rows=64, seconds_a_row=0.002)
    assert beside.latency_99 < most * alone.latency_99
    assert beside.share > 0.7
    job = beside.clients[0]
    assert 4 < job.scored / job.succeeded < 32
    assert job.background is not None and job.background.most_rows < 64
    alone_at_last = share(instances, load=0.0, rows=64, seconds_a_row=0.002).clients[0]
    assert alone_at_last.scored == 64 * alone_at_last.succeeded


def counts(requests: int, seconds: float) -> ServerCounts:
    busy_ns = round(1e9 * seconds)
    return ServerCounts(requests, requests, busy_ns, 0, busy_ns)


class Exchange:
    """A background job whose server is asked every second, by hand."""

    def __init__(self, instances: int = 4) -> None:
        self.clock = FakeClock()
        self.job = Background(self.clock)
        self._instances = instances
        self._sizes: dict[int, Executions] = {}
        self.requests = 0

    def second(self, own: int, others: int, own_seconds: float = 0.02, rows: int = 8) -> None:
        """``own`` requests of so many rows and ``others`` of one row and 20 ms are executed."""
        self.clock.advance(1.0)
        for size, number, seconds in ((rows, own, own_seconds), (1, others, 0.02)):
            known = self._sizes.get(size, Executions(0, 0))
            self._sizes[size] = Executions(
                known.number + number, known.busy_ns + round(1e9 * number * seconds)
            )
        for _ in range(own):
            self.job.on_success(own_seconds + 0.001, rows)
        self.requests += own + others
        self.ask()

    def begun_within_a_second(self) -> int:
        """How many requests of the job may begin, tried each millisecond."""
        begun = 0
        for _ in range(1000):
            begun += self.job.try_send(0)
            self.clock.advance(0.001)
        return begun

    def ask(self) -> None:
        busy_seconds = sum(each.busy_ns for each in self._sizes.values()) / 1e9
        self.job.on_counts(
            counts(self.requests, busy_seconds),
            dict(self._sizes),
            instances=self._instances,
            in_flight=0,
            question_seconds=0.001,
        )


def test_batches_that_take_as_long_when_halved_are_not_halved() -> None:
    """A model may take as long for one element as for many: shorter batches would gain nobody anything."""
    server = Exchange()
    server.ask()
    rows = 8
    for _ in range(6):
        server.second(own=10, others=20, own_seconds=0.08, rows=rows)
        rows = min(8, server.job.most_rows)
    assert rows == 8


def test_batches_grow_again_when_they_become_shorter() -> None:
    server = Exchange()
    server.ask()
    server.second(own=10, others=20, own_seconds=0.08)
    assert server.job.most_rows == 4
    server.second(own=10, others=20, own_seconds=0.03, rows=4)
    assert server.job.most_rows == 4
    server.second(own=10, others=20, own_seconds=0.015, rows=4)
    assert server.job.most_rows == 8


def test_one_request_at_a_time_until_the_server_has_answered_twice() -> None:
    """Nobody knows whether others are about before; and not for ever, if it does not answer."""
    server = Exchange()
    assert server.job.try_send(0)
    assert not server.job.try_send(1)
    server.ask()
    assert not server.job.try_send(1)
    server.second(own=1, others=0)
    assert server.job.try_send(1)
    silent = Exchange()
    assert silent.job.try_send(0)
    silent.clock.advance(11.0)
    assert silent.job.try_send(1)


def test_requests_beside_others_begin_at_equal_distances() -> None:
    server = Exchange()
    server.ask()
    server.second(own=50, others=40)
    assert server.job.gives_way
    begun = []
    for _ in range(1000):
        if server.job.try_send(0):
            begun.append(server.clock())
        server.clock.advance(0.001)
    distances = [after - before for before, after in itertools.pairwise(begun)]
    assert 50 < len(begun) < 150
    assert max(distances) - min(distances) < 0.0025


def test_job_that_paused_goes_on_where_it_was() -> None:
    """A job with little to do for a while has not been told to send less."""
    server = Exchange()
    server.ask()
    for _ in range(5):
        server.second(own=120, others=40)
        before = server.begun_within_a_second()
    for _ in range(5):
        server.second(own=1, others=40)
        assert server.job.try_send(0)
    assert server.begun_within_a_second() == pytest.approx(before, rel=0.3)


def test_one_request_at_a_time_is_told_when_its_turn_is() -> None:
    server = Exchange()
    server.ask()
    server.second(own=50, others=40)
    assert server.job.try_send(0)
    turn_at = server.job.next_turn_at(1)
    assert server.clock() < turn_at < server.clock() + 0.1
    assert server.job.next_turn_at(1) == math.inf
    server.clock.advance(turn_at - server.clock())
    assert server.job.try_send(1)


def test_pauses_are_shorter_than_the_patience_of_those_who_wait() -> None:
    clock = FakeClock()
    server = Exchange(instances=1)
    server.clock, server.job = clock, Background(clock, patience_seconds=1.0)
    server.ask()
    for _ in range(5):
        server.second(own=1, others=50)
    assert server.job.gives_way
    server.job.try_send(0)
    assert server.job.next_turn_at(0) <= clock() + 0.5


@pytest.mark.parametrize("what", ["no instances", "an ensemble"])
def test_server_that_does_not_say_what_it_executes_does_not_hold_the_job_up(what: str) -> None:
    server = Exchange(instances=0 if what == "no instances" else 4)
    server.ask()
    server.clock.advance(1.0)
    server.requests += 5
    server.ask()
    assert not server.job.is_steered
    assert all(server.job.try_send(in_flight) for in_flight in range(40))


def test_several_servers_behind_one_address_are_not_taken_for_one() -> None:
    """What one of them executes says nothing about the part of this job that it got."""
    server = Exchange()
    server.ask()
    server.second(own=50, others=40)
    assert server.job.gives_way
    server.requests -= 60
    server.ask()
    assert not server.job.gives_way
    server.second(own=50, others=40)
    assert not server.job.gives_way and server.job.most_rows == UNLIMITED

"""The limit of requests in flight, against servers in simulated time."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.errors import ConfigurationError
from beam_triton.policy.concurrency_limit import ConcurrencyLimit
from beam_triton.policy.server_times import ServerTimes
from tests.support.clock import FakeClock
from tests.unit.policy.simulation import Client, Server, Simulation


def constantly(seconds: float) -> Callable[[], float]:
    return lambda: seconds


class Shared(NamedTuple):
    """Requests a second of all clients, and the least and the most of a fair share that one of them got."""

    rate: float
    latency_99_seconds: float
    least: float
    most: float


def share(
    clients: int,
    service_seconds: float,
    apart_seconds: float,
    *,
    settling_seconds: float,
    seconds: float,
    asks: bool = False,
) -> Shared:
    """Clients of sixteen instances, started ``apart_seconds`` after each other and measured once settled."""
    generator = random.Random(1)
    simulation = Simulation()
    server = Server(simulation, 16, constantly(service_seconds))
    users = [
        Client(server, 32, pause_seconds=lambda: 0.002 * generator.random(), asks=asks)
        for _ in range(clients)
    ]
    for number, client in enumerate(users):
        simulation.plan(number * apart_seconds, client.start)
    simulation.run(settling_seconds)
    for client in users:
        client.succeeded = 0
        client.latencies.clear()
    rate = throughput(simulation, server, seconds)
    latencies = sorted(latency for client in users for latency in client.latencies)
    shares = sorted(client.succeeded for client in users)
    even = sum(shares) / clients
    return Shared(rate, latencies[int(0.99 * len(latencies))], shares[0] / even, shares[-1] / even)


def throughput(simulation: Simulation, server: Server, seconds: float) -> float:
    """Requests per second that the server completes in the next ``seconds``."""
    before = server.completed
    simulation.run(seconds)
    return (server.completed - before) / seconds


@pytest.mark.parametrize(
    ("instances", "service_seconds", "maximum"),
    [(64, 2.0, 32), (32, 0.02, 32), (32, 0.001, 32), (100, 20.0, 100), (1, 0.05, 1)],
)
def test_limit_reaches_its_maximum_while_latency_stays_the_same(
    instances: int, service_seconds: float, maximum: int
) -> None:
    """Slow is not overloaded: where latency does not rise, the limit doubles with each round trip."""
    simulation = Simulation()
    client = Client(Server(simulation, instances, constantly(service_seconds)), maximum)
    assert client.limit.limit == 1
    client.start()
    # With 20 s of 30 it goes by half at a time, in case they are not all executed at once.
    simulation.run(13 * service_seconds)
    assert client.limit.limit == maximum
    client.limits.clear()
    simulation.run(1000 * service_seconds)
    assert set(client.limits) == {maximum}


@pytest.mark.parametrize(("clients", "apart_seconds"), [(1, 0.0), (4, 0.0), (16, 0.0), (4, 2.0), (16, 0.2)])
@pytest.mark.parametrize("service_seconds", [0.02, 0.1])
def test_clients_of_one_server_share_it_without_a_long_queue(
    clients: int, apart_seconds: float, service_seconds: float
) -> None:
    """One, four or sixteen processes use sixteen instances well, none waits for long, and all get as much.

    Those that start later find a queue, and do not know what the server takes without one, until the first
    common dips.
    """
    shared = share(
        clients,
        service_seconds,
        apart_seconds,
        settling_seconds=90.0 if apart_seconds else 30.0,
        seconds=60.0,
    )
    assert shared.rate > 0.95 * 16 / service_seconds
    assert shared.latency_99_seconds < 3.05 * service_seconds
    assert 0.8 < shared.least <= shared.most < 1.3


@pytest.mark.parametrize(("clients", "apart_seconds"), [(1, 0.0), (4, 0.0), (16, 0.0), (4, 2.0), (16, 0.6)])
@pytest.mark.parametrize("service_seconds", [0.02, 0.2])
def test_clients_of_a_server_that_reports_its_queue_share_it_at_once(
    clients: int, apart_seconds: float, service_seconds: float
) -> None:
    """A late one knows what the server takes without a queue, and no dip costs throughput."""
    shared = share(clients, service_seconds, apart_seconds, settling_seconds=20.0, seconds=30.0, asks=True)
    assert shared.rate > 0.99 * 16 / service_seconds
    assert shared.latency_99_seconds < 2.05 * service_seconds
    assert 0.85 < shared.least <= shared.most < 1.2


@pytest.mark.parametrize(
    ("instances", "service_seconds", "timeout_seconds"),
    [
        (1, 0.3, 3.0),
        (16, 0.3, 3.0),
        (1, 2.0, 3.0),
        (1, 2.9, 3.0),
        (2, 2.9, 3.0),
        (3, 2.0, 3.0),
        (4, 2.5, 3.0),
        (5, 1.2, 3.0),
        (7, 2.0, 3.0),
        (16, 1.0, 30.0),
        (1, 10.0, 30.0),
    ],
)
@pytest.mark.parametrize("asks", [False, True])
def test_slow_model_gets_its_work_once_and_is_kept_busy(
    instances: int, service_seconds: float, timeout_seconds: float, asks: bool
) -> None:
    """At most 15 % more time than the work takes and 5 % more requests, however near the deadline.

    Forty requests for one instance; sixty each where several are to be found first.
    """
    simulation = Simulation()
    server = Server(simulation, instances, constantly(service_seconds))
    requests = (40 if instances == 1 else 60) * instances
    client = Client(
        server,
        32,
        elements=requests,
        timeout_seconds=timeout_seconds,
        pause_seconds=constantly(0.001),
        asks=asks,
    )
    started = simulation.clock()
    client.start()
    while not client.has_finished:
        simulation.run(service_seconds / 10)
    assert client.succeeded == requests
    assert simulation.clock() - started < 1.15 * requests / instances * service_seconds
    assert client.sent <= 1.05 * requests


@pytest.mark.parametrize(
    ("draw", "mean_seconds"),
    [
        (lambda generator: generator.expovariate(50), 0.02),
        (lambda generator: generator.choice([0.05, 0.05, 0.2]), 0.1),
        (lambda generator: 0.01 * generator.paretovariate(1.5), 0.03),
    ],
    ids=["exponential", "two kinds", "heavy tail"],
)
@pytest.mark.parametrize("asks", [False, True])
def test_varying_latencies_are_not_taken_for_a_queue(
    draw: Callable[[random.Random], float], mean_seconds: float, asks: bool
) -> None:
    """Latencies that differ from request to request cost hardly any throughput."""
    generator = random.Random(1)
    simulation = Simulation()
    server = Server(simulation, 16, lambda: draw(generator))
    client = Client(server, 32, asks=asks)
    client.start()
    simulation.run(60.0)
    assert throughput(simulation, server, 100.0) > 0.9 * 16 / mean_seconds


@pytest.mark.parametrize("asks", [False, True])
def test_longer_inputs_are_not_taken_for_a_queue(asks: bool) -> None:
    """When requests take twenty times as long, the limit tries fewer, sees no gain, and returns."""
    simulation = Simulation()
    server = Server(simulation, 64, constantly(0.02))
    client = Client(server, 32, asks=asks)
    client.start()
    simulation.run(20.0)
    server.service_seconds = constantly(0.4)
    simulation.run(60.0)
    assert client.limit.limit >= 30
    assert throughput(simulation, server, 120.0) > 0.95 * 80


def test_dynamic_batching_does_not_lower_the_limit() -> None:
    """Where more in flight means larger batches, latency rises with throughput, and throughput decides."""
    simulation = Simulation()
    server = Server(simulation, 1000, constantly(0.0))
    client = Client(server, 32, work=2)
    server.service_seconds = lambda: 0.005 if client.work <= 2 else 0.04
    client.start()
    simulation.run(10.0)
    client.work = 32
    client.start()
    simulation.run(60.0)
    assert throughput(simulation, server, 120.0) > 0.95 * 32 / 0.04


@pytest.mark.parametrize("asks", [False, True])
def test_standing_queue_shrinks_without_losing_throughput(asks: bool) -> None:
    """When a server loses instances, fewer requests wait and as many succeed, until they are back."""
    simulation = Simulation()
    server = Server(simulation, 16, constantly(0.02))
    client = Client(server, 32, asks=asks)
    client.start()
    simulation.run(20.0)
    server.instances = 1
    simulation.run(10.0)
    client.limits.clear()
    assert throughput(simulation, server, 20.0) == pytest.approx(50, rel=0.03)
    assert max(client.limits) <= 4
    server.instances = 16
    simulation.run(20.0)
    assert throughput(simulation, server, 20.0) > 0.95 * 800


def test_limit_at_which_deadlines_passed_is_left_alone() -> None:
    """A server that takes two requests in time gets two; a third one is tried again once in a while."""
    simulation = Simulation()
    server = Server(simulation, 2, constantly(2.0))
    client = Client(server, 32, timeout_seconds=3.0)
    client.start()
    simulation.run(600.0)
    assert client.succeeded > 0.93 * 600
    assert client.sent - client.succeeded <= 10


def test_requests_given_up_count_against_the_limit_while_they_may_be_executed() -> None:
    """The server goes on with what its client has given up: the next request would wait behind it."""
    clock = FakeClock()
    limit = ConcurrencyLimit(8, 3.0, clock, clock)
    clock.advance(2.0)
    limit.was_reached = True
    limit.on_success(2.0)
    assert limit.limit == 2
    clock.advance(3.0)
    limit.on_deadline(3.0)
    assert limit.limit == 0
    clock.advance(2.0)
    assert limit.limit == 1


@pytest.mark.parametrize(("instances", "queue", "most_refused"), [(8, 8, 0.02), (2, 2, 0.06), (1, 0, 0.11)])
def test_full_queue_lowers_the_limit_to_the_capacity(instances: int, queue: int, most_refused: float) -> None:
    """The server stays fully used, and few requests are refused."""
    simulation = Simulation()
    server = Server(simulation, instances, constantly(0.02), max_queue_size=queue)
    client = Client(server, 32)
    client.start()
    simulation.run(10.0)
    client.limits.clear()
    server.rejected = 0
    assert throughput(simulation, server, 100.0) > 0.9 * instances / 0.02
    assert server.rejected < most_refused * 100 * instances / 0.02
    assert max(client.limits) <= instances + queue + 1


def test_limit_grows_again_after_overload() -> None:
    """When the queue has room again the limit returns to the maximum."""
    simulation = Simulation()
    server = Server(simulation, 16, constantly(0.02), max_queue_size=0)
    client = Client(server, 32)
    client.start()
    simulation.run(5.0)
    assert client.limit.limit < 20
    server.max_queue_size = None
    simulation.run(10.0)
    assert client.limit.limit >= 18


def test_clients_of_a_small_queue_share_the_server() -> None:
    """Eight workers fill the server together, and none gets less than a sixth of an even share."""
    simulation = Simulation()
    server = Server(simulation, 16, constantly(0.02), max_queue_size=16)
    generator = random.Random(1)
    clients = [Client(server, 32, pause_seconds=lambda: 0.002 * generator.random()) for _ in range(8)]
    for number, client in enumerate(clients):
        simulation.plan(number * 0.3, client.start)
    simulation.run(20.0)
    for client in clients:
        client.succeeded = 0
    assert throughput(simulation, server, 60.0) > 0.9 * 800
    shares = [client.succeeded / (60.0 * 800) for client in clients]
    assert min(shares) > 0.02


def limit_of_32(clock: FakeClock, latency_seconds: float) -> ConcurrencyLimit:
    """A limit that has grown to 32 while answers took ``latency_seconds``."""
    limit = ConcurrencyLimit(32, 30.0, clock, clock)
    while limit.limit < 32:
        limit.was_reached = True
        clock.advance(latency_seconds)
        limit.on_success(latency_seconds)
    return limit


def test_burst_of_refusals_lowers_the_limit_once() -> None:
    """Refusals of requests that were in flight together count as one."""
    clock = FakeClock()
    limit = limit_of_32(clock, 0.02)
    for _ in range(20):
        limit.on_overload(0.01)
        clock.advance(0.0004)
    assert limit.limit == 22
    clock.advance(0.05)
    limit.on_overload(0.01)
    assert limit.limit == 15


def test_usual_latency_separates_bursts_without_a_latency() -> None:
    """A refusal within a usual round trip of the last decrease belongs to its burst."""
    clock = FakeClock()
    limit = limit_of_32(clock, 0.5)
    limit.on_overload()
    clock.advance(0.4)
    limit.on_overload()
    assert limit.limit == 22
    clock.advance(0.2)
    limit.on_overload()
    assert limit.limit == 15


def test_limit_that_is_not_reached_stays() -> None:
    """A few slow requests far below the limit say nothing about a queue of this client."""
    simulation = Simulation()
    server = Server(simulation, 64, constantly(0.01))
    client = Client(server, 32)
    client.start()
    simulation.run(10.0)
    server.instances = 1
    client.work = 8
    simulation.run(1.0)
    client.limits.clear()
    simulation.run(3.0)
    assert len(set(client.limits)) == 1


@given(
    maximum=st.integers(1, 64),
    events=st.lists(
        st.tuples(
            st.sampled_from(["success", "overload", "bare overload", "deadline"]),
            st.floats(0, 100),
            st.floats(0, 9),
        ),
        max_size=400,
    ),
)
def test_limit_stays_within_its_bounds(maximum: int, events: list[tuple[str, float, float]]) -> None:
    """Whatever is reported, at most the maximum may be in flight, and at least one in the end."""
    clock = FakeClock()
    limit = ConcurrencyLimit(maximum, 30.0, clock, clock)
    assert limit.limit == 1
    for kind, latency_seconds, pause_seconds in events:
        clock.advance(pause_seconds)
        if kind == "success":
            limit.was_reached = True
            limit.on_success(latency_seconds)
        elif kind == "deadline":
            limit.on_deadline(latency_seconds)
        else:
            limit.on_overload(latency_seconds if kind == "overload" else None)
        assert 0 <= limit.limit <= maximum
    clock.advance(1000.0)
    assert limit.limit >= 1


def test_threads_read_the_limit_while_abandoned_requests_end() -> None:
    """Whoever looks whether there is room forgets those that the server must have ended by now."""
    limit = ConcurrencyLimit(64, 30.0, time.monotonic, time.time)
    limit.on_success(1e-5)
    ends_at = time.monotonic() + 0.5
    failures: list[Exception] = []

    def read() -> None:
        try:
            while time.monotonic() < ends_at:
                assert limit.limit >= 0
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    interval_seconds = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        while time.monotonic() < ends_at and not failures:
            limit.on_deadline(30.0)
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval_seconds)
    assert failures == []


@pytest.mark.parametrize("maximum", [0, -1, 1.5, True, None])
def test_maximum_below_one_is_rejected(maximum: object) -> None:
    """At least one request has to be allowed."""
    with pytest.raises(ConfigurationError, match="max_concurrent_requests must be a whole number"):
        ConcurrencyLimit(maximum, 30.0, FakeClock(), FakeClock())  # type: ignore[arg-type]  # the mistake under test


def test_endpoints_teach_their_common_limit() -> None:
    """It hears of the answers of each, and of what each server says a light load takes: with a queue it falls
    below one request for each endpoint."""
    clock = FakeClock()
    of_all = ConcurrencyLimit(32, 30.0, clock, clock, is_of_several=True)
    endpoints = [ConcurrencyLimit(32, 30.0, clock, clock, of_all=of_all) for _ in range(8)]

    def answer(latency_seconds: float) -> None:
        for number in range(128):
            clock.advance(latency_seconds)
            of_all.was_reached = True
            endpoints[number % 8].on_success(latency_seconds)

    answer(0.1)
    assert of_all.limit == 32
    for _ in range(4):
        answer(1.0)
        for endpoint in endpoints:
            endpoint.on_server_times(ServerTimes(0.9, 0.1), 1000.0)
    assert of_all.limit < 4


def test_endpoint_falls_where_all_together_are_at_their_limit() -> None:
    """One whose limit was high when requests were spread is not preferred for ever."""
    clock = FakeClock()
    of_all = ConcurrencyLimit(32, 30.0, clock, clock, is_of_several=True)
    endpoint = ConcurrencyLimit(32, 30.0, clock, clock, of_all=of_all)

    def answer(latency_seconds: float, *, is_reached: bool) -> None:
        for _ in range(128):
            clock.advance(latency_seconds)
            of_all.was_reached, endpoint.was_reached = True, is_reached
            endpoint.on_success(latency_seconds)

    answer(0.1, is_reached=True)
    high = endpoint.limit
    endpoint.on_server_times(ServerTimes(0.0, 0.1), 1000.0)
    answer(0.1, is_reached=False)
    assert endpoint.limit == high > 8
    answer(0.4, is_reached=False)
    assert endpoint.limit < high / 2

"""The limit of requests in flight, against servers in simulated time."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.errors import ConfigurationError
from beam_triton.policy.concurrency_limit import ConcurrencyLimit
from tests.support.clock import FakeClock
from tests.unit.policy.simulation import Client, Server, Simulation


def constantly(seconds: float) -> Callable[[], float]:
    return lambda: seconds


def throughput(simulation: Simulation, server: Server, seconds: float) -> float:
    """Requests per second that the server completes in the next ``seconds``."""
    before = server.completed
    simulation.run(seconds)
    return (server.completed - before) / seconds


@pytest.mark.parametrize(
    ("instances", "service_seconds", "maximum"),
    [(64, 2.0, 32), (32, 0.02, 32), (32, 0.001, 32), (100, 20.0, 100), (1, 0.05, 1)],
)
def test_constant_latency_never_lowers_the_limit(
    instances: int, service_seconds: float, maximum: int
) -> None:
    """Slow is not overloaded: where latency does not rise, the limit stays at the maximum."""
    simulation = Simulation()
    client = Client(Server(simulation, instances, constantly(service_seconds)), maximum)
    client.start()
    simulation.run(1000 * service_seconds)
    assert set(client.limits) == {maximum}


def test_well_used_server_keeps_its_requests_in_flight() -> None:
    """Two requests in flight for each of 16 instances double the latency, as they should."""
    simulation = Simulation()
    server = Server(simulation, 16, constantly(0.02))
    client = Client(server, 32)
    client.start()
    assert throughput(simulation, server, 300.0) == pytest.approx(800, rel=0.01)
    assert min(client.limits) >= 24


@pytest.mark.parametrize(
    "draw",
    [
        lambda generator: generator.expovariate(50),
        lambda generator: generator.choice([0.005, 0.005, 0.2]),
        lambda generator: 0.01 * generator.paretovariate(1.5),
    ],
    ids=["exponential", "two kinds", "heavy tail"],
)
def test_varying_latencies_are_not_taken_for_a_queue(draw: Callable[[random.Random], float]) -> None:
    """Latencies that differ from request to request cost hardly any throughput."""
    generator = random.Random(1)
    simulation = Simulation()
    server = Server(simulation, 16, lambda: draw(generator))
    client = Client(server, 32)
    client.start()
    simulation.run(100.0)
    assert sum(client.limits) / len(client.limits) > 28
    assert min(client.limits) >= 16


def test_longer_inputs_are_not_taken_for_a_queue() -> None:
    """When requests take twenty times as long, the limit tries fewer, sees throughput fall, and returns."""
    simulation = Simulation()
    server = Server(simulation, 64, constantly(0.02))
    client = Client(server, 32)
    client.start()
    simulation.run(20.0)
    server.service_seconds = constantly(0.4)
    simulation.run(20.0)
    assert client.limit.limit == 32
    assert throughput(simulation, server, 120.0) == pytest.approx(80, rel=0.03)


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
    before = server.completed
    simulation.run(120.0)
    assert client.limit.limit == 32
    assert (server.completed - before) / 120.0 > 0.97 * 32 / 0.04


def test_trial_that_costs_throughput_ends_at_once_and_pauses_for_a_minute() -> None:
    """Where fewer in flight means fewer per second, the limit is back after some round trips, in one step."""
    clock = FakeClock()
    limit = ConcurrencyLimit(32, clock)

    def limits_of_a_round_trip(latency_seconds: float) -> list[int]:
        in_flight = limit.limit
        limits = []
        for _ in range(in_flight):
            clock.advance(latency_seconds / in_flight)
            limit.on_success(latency_seconds)
            limits.append(limit.limit)
        return limits

    for _ in range(20):
        assert set(limits_of_a_round_trip(0.01)) == {32}
    slower = [seen for _ in range(12) for seen in limits_of_a_round_trip(0.1)]
    assert set(slower) == {32, 24}
    # The first round trip was sent under the larger limit and does not count.
    assert 4.5 * 24 <= slower.count(24) <= 6 * 24
    assert slower[-1] == 32
    resting = clock()
    while clock() < resting + 55:
        limits_of_a_round_trip(0.01)
        assert set(limits_of_a_round_trip(0.1)) == {32}


def test_standing_queue_shrinks_without_losing_throughput() -> None:
    """When a server loses instances, fewer requests wait and as many succeed, until they are back."""
    simulation = Simulation()
    server = Server(simulation, 16, constantly(0.02))
    client = Client(server, 32)
    client.start()
    simulation.run(20.0)
    server.instances = 1
    simulation.run(5.0)
    client.limits.clear()
    assert throughput(simulation, server, 20.0) == pytest.approx(50, rel=0.03)
    assert min(client.limits) <= 20
    server.instances = 16
    simulation.run(5.0)
    assert throughput(simulation, server, 20.0) == pytest.approx(800, rel=0.02)
    assert client.limit.limit == 32


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
    assert client.limit.limit == 32


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


def test_burst_of_refusals_lowers_the_limit_once() -> None:
    """Refusals of requests that were in flight together count as one."""
    clock = FakeClock()
    limit = ConcurrencyLimit(32, clock)
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
    limit = ConcurrencyLimit(32, clock)
    for _ in range(200):
        clock.advance(0.01)
        limit.on_success(0.5)
    limit.on_overload()
    clock.advance(0.4)
    limit.on_overload()
    assert limit.limit == 22
    clock.advance(0.2)
    limit.on_overload()
    assert limit.limit == 15


def test_latency_does_not_lower_the_limit_of_an_idle_client() -> None:
    """A few slow requests far below the limit say nothing about a queue of this client."""
    simulation = Simulation()
    server = Server(simulation, 1, constantly(0.01))
    client = Client(server, 32, work=1)
    client.start()
    simulation.run(10.0)
    client.work = 8
    client.start()
    simulation.run(60.0)
    assert set(client.limits) == {32}


@given(
    maximum=st.integers(1, 64),
    events=st.lists(
        st.tuples(
            st.sampled_from(["success", "overload", "bare overload"]), st.floats(0, 100), st.floats(0, 9)
        ),
        max_size=400,
    ),
)
def test_limit_stays_within_its_bounds(maximum: int, events: list[tuple[str, float, float]]) -> None:
    """Whatever is reported, at least one request may be in flight and at most the maximum."""
    clock = FakeClock()
    limit = ConcurrencyLimit(maximum, clock)
    assert limit.limit == maximum
    for kind, latency_seconds, pause_seconds in events:
        clock.advance(pause_seconds)
        if kind == "success":
            limit.on_success(latency_seconds)
        else:
            limit.on_overload(latency_seconds if kind == "overload" else None)
        assert 1 <= limit.limit <= maximum


@pytest.mark.parametrize("maximum", [0, -1, 1.5, True, None])
def test_maximum_below_one_is_rejected(maximum: object) -> None:
    """At least one request has to be allowed."""
    with pytest.raises(ConfigurationError, match="max_concurrent_requests must be a whole number"):
        ConcurrencyLimit(maximum, FakeClock())  # type: ignore[arg-type]  # the mistake under test

"""The search for settings, on simulated servers, and the figures of a measurement."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from beam_triton.cli.load import Measurement
from beam_triton.cli.search import Goal, Search
from beam_triton.errors import ServerOverloadedError

Server = Callable[[int, int], Measurement]

_SECONDS = 100.0


def measurement(
    size: int,
    in_flight: int,
    elements_per_second: float,
    *,
    failures: int = 0,
    latency_seconds: float = 0.01,
    fastest_seconds: float = 0.01,
    keeps_up: bool = True,
) -> Measurement:
    return Measurement(
        size,
        in_flight,
        _SECONDS,
        round(_SECONDS * elements_per_second / size),
        (latency_seconds,) * 10,
        failures,
        ServerOverloadedError("queue full") if failures else None,
        fastest_seconds=fastest_seconds,
        keeps_up=keeps_up,
    )


def simulated_server(fixed_seconds: float, seconds_an_element: float, instances: int) -> Server:
    """Instances with a fixed cost per request and one per element, 1 ms away on the network.

    Requests beyond the instances wait: latency is what is in flight over what a second takes.
    """

    def measure(batch_size: int, in_flight: int) -> Measurement:
        service = fixed_seconds + seconds_an_element * batch_size
        rate = min(instances / service, in_flight / (service + 0.001))
        return measurement(
            batch_size,
            in_flight,
            rate * batch_size,
            latency_seconds=in_flight / rate,
            fastest_seconds=service + 0.001,
        )

    return measure


def server_at_rate(server: Server, elements_per_second: float) -> Server:
    """The same server when elements arrive: the first of a batch waits for the last, and for the queue."""

    def measure(batch_size: int, in_flight: int) -> Measurement:
        alone = server(batch_size, 1)
        use = elements_per_second / server(batch_size, in_flight).elements_per_second
        if use >= 1:
            return measurement(batch_size, in_flight, elements_per_second / use, keeps_up=False)
        filling = (batch_size - 1) / elements_per_second
        latency = filling + alone.fastest_seconds / (1 - use)
        return measurement(batch_size, in_flight, elements_per_second, latency_seconds=latency)

    return measure


def search(
    server: Server, largest: int = 128, most: int = 64, tries: int = 100, goal: Goal | None = None
) -> Search:
    left = iter(range(tries))
    return Search(
        lambda size, count, is_look: server(size, count),
        largest,
        most,
        lambda: next(left, None) is not None,
        goal or Goal(),
    )


_SERVERS = [
    pytest.param(simulated_server(0.02, 0.0, 16), id="slow, many instances"),
    pytest.param(simulated_server(0.02, 0.0, 1), id="slow, one instance"),
    pytest.param(simulated_server(0.0002, 0.00001, 2), id="fast"),
    pytest.param(simulated_server(0.0, 0.001, 1), id="cost of elements alone"),
    pytest.param(simulated_server(0.002, 0.001, 4), id="cost of both"),
    pytest.param(simulated_server(0.5, 0.001, 1), id="one slow instance"),
]


@pytest.mark.parametrize("limit_seconds", [math.inf, 0.6, 0.1, 0.03])
@pytest.mark.parametrize("server", _SERVERS)
def test_the_search_finds_nine_tenths_of_the_best_of_the_grid(server: Server, limit_seconds: float) -> None:
    """With a limit and without, in a small part of the measurements of the whole grid."""
    goal = Goal(limit_seconds)
    grid = [server(1 << size, 1 << count) for size in range(8) for count in range(7)]
    best = max(map(goal.value, grid))
    one = search(server, goal=goal)
    found = one.run()
    if not best:
        assert found is None or goal.value(found) > 0
        return
    assert found is not None
    assert goal.value(found) >= 0.9 * best
    assert len(one.measured) <= (9 if math.isinf(limit_seconds) else 14)


@pytest.mark.parametrize("rate", [10, 100, 1000])
@pytest.mark.parametrize("server", _SERVERS)
def test_at_a_rate_the_batch_size_with_the_lowest_latency_is_found(server: Server, rate: float) -> None:
    """Larger ones wait for their elements, smaller ones for the server; some keep up with no rate."""
    measure = server_at_rate(server, rate)
    goal = Goal(rate=rate)
    grid = [measure(1 << size, 64) for size in range(8)]
    best = max(map(goal.value, grid))
    one = search(measure, goal=goal)
    found = one.run()
    if not best:
        assert found is None
        closest = one.closest()
        assert closest is not None and not closest.keeps_up
        return
    assert found is not None
    assert goal.value(found) >= 0.7 * best
    assert len(one.measured) <= 7


def test_without_a_setting_within_the_limit_the_closest_is_told() -> None:
    """One that answers in 501 ms at best, for a limit of 100 ms."""
    one = search(simulated_server(0.5, 0.0, 1), goal=Goal(0.1))
    assert one.run() is None
    closest = one.closest()
    assert closest is not None
    assert closest.latency_seconds(0.99) > 0.1


def test_of_equal_settings_the_one_with_the_fewest_in_flight_is_chosen() -> None:
    """If single elements keep an instance busy, more of them only wait."""
    found = search(simulated_server(0.0, 0.01, 1)).run()
    assert found is not None
    assert found.batch_size * found.in_flight <= 4


def test_settings_that_fail_are_not_chosen() -> None:
    """A queue of two: settings with more in flight fail, however fast they look."""

    def short_queue(batch_size: int, in_flight: int) -> Measurement:
        return measurement(batch_size, in_flight, 1000.0 * in_flight, failures=max(0, in_flight - 2))

    found = search(short_queue).run()
    assert found is not None
    assert (found.in_flight, found.failures) == (2, 0)


def test_no_setting_is_chosen_when_all_fail() -> None:
    """The result is None, and the smallest setting was tried."""
    one = search(lambda batch_size, in_flight: measurement(batch_size, in_flight, 0.0, failures=1))
    assert one.run() is None
    assert one.closest() is None
    assert (1, 1) in one.measured


@pytest.mark.parametrize("tries", [1, 2, 3])
def test_the_search_ends_when_its_time_is_over(tries: int) -> None:
    """The measurements so far decide."""
    one = search(simulated_server(0.02, 0.0, 16), tries=tries)
    assert one.run() is not None
    assert len(one.measured) == tries


def test_limits_of_one_leave_one_setting() -> None:
    """A model without batches, and one request at a time."""
    one = search(simulated_server(0.02, 0.0, 16), largest=1, most=1)
    assert one.run() is not None
    assert list(one.measured) == [(1, 1)]


def test_no_setting_exceeds_the_limits() -> None:
    """Neither limit is exceeded, though neither is a power of two."""
    one = search(simulated_server(0.02, 0.0, 64), largest=100, most=50)
    found = one.run()
    assert found is not None
    assert all(size <= 100 and count <= 50 for size, count in one.measured)


def test_rates_and_percentiles_ignore_failures() -> None:
    """Percentiles are nearest rank; failures do not count."""
    latencies = tuple(n / 1000 for n in range(1, 101))
    one = Measurement(8, 4, 2.0, 100, latencies, failures=3)
    assert (one.requests_per_second, one.elements_per_second) == (50.0, 400.0)
    assert one.latency_seconds(0.5) == 0.05
    assert one.latency_seconds(0.99) == 0.099
    assert one.latency_seconds(0.0) == 0.001


@pytest.mark.parametrize("best", [2, 5, 8, 16])
def test_a_peak_below_the_most_in_flight_is_found(best: int) -> None:
    """On a machine of its own, more requests at a time take processors from the model."""

    def crowded(batch_size: int, in_flight: int) -> Measurement:
        distance = abs(math.log2(in_flight / best))
        rate = 1000.0 / (1 + 0.2 * distance)
        return measurement(batch_size, in_flight, rate * batch_size, fastest_seconds=0.001)

    found = search(crowded).run()
    assert found is not None
    assert found.elements_per_second >= 0.9 * 1000 * 128

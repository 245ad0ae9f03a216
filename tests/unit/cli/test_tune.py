"""The search for settings, on simulated servers, and the figures of a measurement."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from beam_triton.cli.tune import Measurement, Search
from beam_triton.errors import ServerOverloadedError

Server = Callable[[int, int], Measurement]


_SECONDS = 100.0


def measurement(size: int, in_flight: int, elements_per_second: float, failures: int = 0) -> Measurement:
    requests = round(_SECONDS * elements_per_second / size)
    error = ServerOverloadedError("queue full") if failures else None
    return Measurement(size, in_flight, _SECONDS, (0.01,) * requests, failures, error)


def simulated_server(fixed_seconds: float, seconds_an_element: float, instances: int) -> Server:
    """Instances with a fixed cost per request and one per element, 1 ms away on the network."""

    def measure(batch_size: int, in_flight: int) -> Measurement:
        service = fixed_seconds + seconds_an_element * batch_size
        rate = min(instances / service, in_flight / (service + 0.001))
        return measurement(batch_size, in_flight, rate * batch_size)

    return measure


def search(server: Server, largest: int = 128, most: int = 64, tries: int = 100) -> Search:
    left = iter(range(tries))
    return Search(server, largest, most, lambda: next(left, None) is not None)


@pytest.mark.parametrize(
    "server",
    [
        pytest.param(simulated_server(0.02, 0.0, 16), id="slow, many instances"),
        pytest.param(simulated_server(0.0002, 0.00001, 2), id="fast"),
        pytest.param(simulated_server(0.0, 0.001, 1), id="cost of elements alone"),
        pytest.param(simulated_server(0.5, 0.001, 1), id="one slow instance"),
    ],
)
def test_the_search_finds_a_setting_near_the_best_of_the_grid(server: Server) -> None:
    """Within 15 % of the best of the whole grid, in a small part of its measurements."""
    grid = [server(1 << size, 1 << count) for size in range(8) for count in range(7)]
    one = search(server)
    found = one.run()
    assert found is not None
    assert found.elements_per_second >= 0.85 * max(each.elements_per_second for each in grid)
    assert len(one.measured) <= 26


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
    assert (1, 1) in one.measured


@pytest.mark.parametrize("tries", [1, 2, 5])
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
    one = Measurement(8, 4, 2.0, latencies, failures=3)
    assert (one.requests_per_second, one.elements_per_second) == (50.0, 400.0)
    assert one.latency_milliseconds(0.5) == 50.0
    assert one.latency_milliseconds(0.99) == 99.0
    assert one.latency_milliseconds(0.0) == 1.0

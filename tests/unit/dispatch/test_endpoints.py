"""Admissions: released once, with one outcome, whatever their owner does."""

from __future__ import annotations

import time

from beam_triton.dispatch.endpoints import Admission, EndpointSet, EndpointSetKey, Refusal
from beam_triton.policy.circuit_breaker import CircuitBreakerPolicy
from beam_triton.policy.retry import RetryPolicy
from beam_triton.transport.origin import EndpointUrl

POLICY = CircuitBreakerPolicy(minimum_requests=4)


def endpoint_set() -> EndpointSet:
    urls = (EndpointUrl.parse("http://127.0.0.1:1"),)
    return EndpointSet(EndpointSetKey(urls, "model", 8, 30.0, RetryPolicy(), POLICY))


def admit(endpoints: EndpointSet) -> Admission:
    admission = endpoints.admit(())
    assert isinstance(admission, Admission)
    return admission


def test_only_the_first_outcome_of_an_admission_counts() -> None:
    """A request is counted once, however often it is reported, and leaves its endpoint once."""
    endpoints = endpoint_set()
    (endpoint,) = endpoints.endpoints
    for _ in range(3):
        admission = admit(endpoints)
        for _ in range(10):
            admission.end(False)
            admission.end(True)
            admission.end(None)
    assert endpoint.in_flight == 0
    assert endpoint.is_healthy
    admit(endpoints).end(False)
    assert not endpoint.is_healthy


def several(count: int) -> EndpointSet:
    urls = tuple(EndpointUrl.parse(f"http://127.0.0.1:{port}") for port in range(1, count + 1))
    return EndpointSet(EndpointSetKey(urls, "model", 8, 30.0, RetryPolicy(), POLICY))


def test_equals_take_turns() -> None:
    """One request at a time goes to each endpoint in turn, wherever the list begins."""
    endpoints = several(4)
    asked = []
    for _ in range(12):
        admission = admit(endpoints)
        asked.append(admission.endpoint)
        admission.end(True)
    assert set(asked[:4]) == set(endpoints.endpoints)
    assert asked[4:8] == asked[8:] == asked[:4]


def test_first_turn_is_another_in_each_process() -> None:
    """Many processes that start together do not all meet at the first endpoint of the list."""
    first = {admit(several(4)).endpoint.url for _ in range(100)}
    assert len(first) == 4


def test_endpoints_share_a_limit_that_starts_with_one_request() -> None:
    """It grows as that of one endpoint does; what is refused waits though each endpoint has room."""
    endpoints = several(4)
    admission = admit(endpoints)
    assert isinstance(endpoints.admit(()), Refusal)
    for _ in range(3):
        admission.endpoint.limit.on_success(0.0)
        admission.end(True)
        admission = admit(endpoints)
    assert isinstance(endpoints.admit(()), Admission)


def test_one_endpoint_has_no_limit_beside_its_own() -> None:
    """A process with one server counts nothing twice."""
    assert endpoint_set().limit is None


def test_one_of_several_is_asked_where_requests_wait() -> None:
    """The same one for a while, and none while a single request does not wait for others."""
    endpoints = several(4)
    admit(endpoints)
    assert isinstance(endpoints.admit(()), Refusal)
    now = time.monotonic()
    assert endpoints.to_ask(now) is None
    endpoints.waiting_for_admission.join(lambda: None)
    asked = endpoints.to_ask(now)
    assert asked is not None
    assert {endpoints.to_ask(now + second) for second in range(10)} == {asked}
    asked.statistics.ask(now, 0.1)
    assert endpoints.to_ask(now) is None

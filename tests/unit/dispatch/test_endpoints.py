"""Admissions: released once, with one outcome, whatever their owner does."""

from __future__ import annotations

from beam_triton.dispatch.endpoints import Admission, EndpointSet, EndpointSetKey
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

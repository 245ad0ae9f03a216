"""The state of the servers that one model is asked on, shared by all DoFn instances of a process.

Who wants to send takes a *slot* first (``max_concurrent_requests`` of them in the process: that
bounds memory), and for each attempt an *admission* to an endpoint, which its circuit breaker and its
concurrency limit grant.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass

from beam_triton.dispatch.slots import WaitQueue
from beam_triton.policy.circuit_breaker import CircuitBreaker, CircuitBreakerPolicy, Permit, State
from beam_triton.policy.concurrency_limit import ConcurrencyLimit
from beam_triton.policy.retry import RetryBudget, RetryPolicy
from beam_triton.transport.origin import EndpointUrl

_logger = logging.getLogger(__name__)


class Endpoint:
    """One server: how it does, and how much it is given."""

    def __init__(
        self,
        url: EndpointUrl,
        max_concurrent_requests: int,
        retry: RetryPolicy,
        circuit_breaker: CircuitBreakerPolicy | None,
    ) -> None:
        self.url = url
        self.in_flight = 0
        self.limit = ConcurrencyLimit(max_concurrent_requests, time.monotonic)
        self.retry_budget = RetryBudget(retry, time.monotonic)
        self.breaker = (
            CircuitBreaker(
                circuit_breaker,
                time.monotonic,
                self._log_change,
                unreachable_limit=_unreachable_limit(circuit_breaker, max_concurrent_requests),
            )
            if circuit_breaker
            else None
        )

    @property
    def is_healthy(self) -> bool:
        """The breaker, where there is one, lets everything pass."""
        return self.breaker is None or self.breaker.state is State.CLOSED

    def _log_change(self, old: State, new: State) -> None:
        level = logging.WARNING if new is State.OPEN else logging.INFO
        _logger.log(level, "circuit breaker of %s: %s, was %s", self.url, new.value, old.value)


class Admission:
    """Leave to send attempts to ``endpoint``. `settle` ends it; a second call does nothing."""

    __slots__ = ("_endpoints", "_permit", "endpoint")

    def __init__(self, endpoints: EndpointSet, endpoint: Endpoint, permit: Permit | None) -> None:
        self._endpoints: EndpointSet | None = endpoints
        self._permit = permit
        self.endpoint = endpoint

    def settle(self, healthy: bool | None, *, unreachable: bool = False) -> None:
        """Say what it showed of the endpoint's health: ``None`` for nothing.

        ``unreachable`` failures are those that found nobody there, rather than a model that fails.
        """
        endpoints, self._endpoints = self._endpoints, None
        if endpoints is None:
            return
        if self._permit is not None:
            if healthy is None:
                self._permit.release()
            elif healthy:
                self._permit.success()
            else:
                self._permit.failure(unreachable=unreachable)
        endpoints.leave(self.endpoint)


@dataclass(frozen=True)
class Refusal:
    """No endpoint may be sent to now. ``open_seconds`` is set where breakers are the reason."""

    open_seconds: float | None


class EndpointSet:
    """The endpoints of one model and the process's slots for it; thread-safe.

    Args:
        urls: the servers; requests go to the healthy one with the fewest in flight.
        max_concurrent_requests: requests in flight, all endpoints together, waiting ones included.

    ``waiting_for_slot`` and ``waiting_for_admission`` are called as a slot, or a place at an endpoint, has
    become free.
    """

    def __init__(
        self,
        urls: tuple[EndpointUrl, ...],
        max_concurrent_requests: int,
        retry: RetryPolicy,
        circuit_breaker: CircuitBreakerPolicy | None,
    ) -> None:
        self.endpoints = tuple(Endpoint(url, max_concurrent_requests, retry, circuit_breaker) for url in urls)
        self._lock = threading.Lock()
        self._free_slots = max_concurrent_requests
        self.waiting_for_slot = WaitQueue()
        self.waiting_for_admission = WaitQueue()

    @property
    def any_breaker_open(self) -> bool:
        """Whether there is an endpoint that is kept out."""
        # Asked for each request: a generator would cost more than the question.
        for endpoint in self.endpoints:  # noqa: SIM110
            if not endpoint.is_healthy:
                return True
        return False

    @property
    def usual_latency_seconds(self) -> float | None:
        """What a request takes at the slowest endpoint that has answered; None before one has."""
        known = [endpoint.limit.usual_latency_seconds for endpoint in self.endpoints]
        return max((latency for latency in known if latency is not None), default=None)

    def try_take_slots(self, count: int) -> bool:
        """Take ``count`` slots if there is one left.

        Who wants several need not wait until as many are free, which might be never; who comes next waits
        for them to be given back instead.
        """
        with self._lock:
            if self._free_slots < 1:
                return False
            self._free_slots -= count
            return True

    def give_slots_back(self, count: int) -> None:
        with self._lock:
            self._free_slots += count
            free = self._free_slots
        for _ in range(min(count, free)):
            self.waiting_for_slot.call_next()

    def admit(self, avoid: Collection[Endpoint]) -> Admission | Refusal:
        """Leave to send to one endpoint, not one of ``avoid`` unless there is no other."""
        if len(self.endpoints) == 1:
            return self._enter(self.endpoints[0]) or Refusal(self._open_seconds())
        preferred = [endpoint for endpoint in self.endpoints if endpoint not in avoid]
        for candidates in (preferred, self.endpoints if avoid else ()):
            for endpoint in sorted(candidates, key=_preference):
                admission = self._enter(endpoint)
                if admission is not None:
                    return admission
        return Refusal(self._open_seconds())

    def leave(self, endpoint: Endpoint) -> None:
        with self._lock:
            endpoint.in_flight -= 1
        self.waiting_for_admission.call_next()

    def _enter(self, endpoint: Endpoint) -> Admission | None:
        with self._lock:
            if endpoint.in_flight >= endpoint.limit.limit:
                return None
            endpoint.in_flight += 1
        permit = None
        if endpoint.breaker is not None:
            permit = endpoint.breaker.try_acquire()
            if permit is None:
                with self._lock:
                    endpoint.in_flight -= 1
                return None
        return Admission(self, endpoint, permit)

    def _open_seconds(self) -> float | None:
        waits = [
            endpoint.breaker.seconds_until_probe()
            for endpoint in self.endpoints
            if endpoint.breaker is not None and not endpoint.is_healthy
        ]
        return min(waits) if len(waits) == len(self.endpoints) else None


def _preference(endpoint: Endpoint) -> tuple[int, float]:
    load = endpoint.in_flight / endpoint.limit.limit
    if endpoint.breaker is None or endpoint.is_healthy:
        return 1, load
    # A probe that is due comes first: while the others have room, this one would never get a request.
    return 2 if endpoint.breaker.seconds_until_probe() > 0 else 0, load


def _unreachable_limit(policy: CircuitBreakerPolicy, max_concurrent_requests: int) -> int:
    """How many requests in a row have to find the server away.

    Where requests wait for it, all that are in flight are enough: fewer may never come together.
    """
    if policy.when_open == "wait":
        return min(policy.minimum_requests, max_concurrent_requests)
    return policy.minimum_requests

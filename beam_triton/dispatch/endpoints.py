"""The state of the servers that one model is scored on, shared by all DoFn instances of a process.

A request takes a *slot* first, and for each attempt an *admission* to an endpoint, which the endpoint's
circuit breaker and its adaptive concurrency limit grant.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Sequence
from typing import NamedTuple

from beam_triton.dispatch.slots import Slots, WaitQueue
from beam_triton.errors import CircuitOpenError, PoolTimeoutError, TritonError
from beam_triton.policy.circuit_breaker import CircuitBreaker, CircuitBreakerPolicy, State
from beam_triton.policy.concurrency_limit import ConcurrencyLimit
from beam_triton.policy.retry import EndpointView, RetryBudget, RetryPolicy
from beam_triton.transport.origin import EndpointUrl

_logger = logging.getLogger(__name__)

# An endpoint that takes ten times its usual latency is treated as hung: no queue explains that.
_HUNG_AFTER_LATENCIES = 10


class EndpointSetKey(NamedTuple):
    """Users that agree on these share breakers, limits, budgets and slots.

    Requests go to the healthy one of ``urls`` with the fewest in flight; ``max_concurrent_requests`` bounds
    those of all endpoints together, waiting ones included.
    """

    urls: tuple[EndpointUrl, ...]
    model_name: str
    max_concurrent_requests: int
    retry: RetryPolicy
    circuit_breaker: CircuitBreakerPolicy | None


class Endpoint:
    """One server: its health, and how many requests it gets at a time."""

    def __init__(self, url: EndpointUrl, key: EndpointSetKey) -> None:
        self.url = url
        self.in_flight = 0
        self.limit = ConcurrencyLimit(key.max_concurrent_requests, time.monotonic)
        self.retry_budget = RetryBudget(key.retry, time.monotonic)
        self.breaker: CircuitBreaker | None = None
        policy = key.circuit_breaker
        if policy is not None:
            unreachable_limit = policy.minimum_requests
            if policy.when_open == "wait":
                # All that are in flight are enough: more may never fail together.
                unreachable_limit = min(unreachable_limit, key.max_concurrent_requests)
            self.breaker = CircuitBreaker(
                policy, time.monotonic, self._log_change, unreachable_limit=unreachable_limit
            )

    @property
    def is_healthy(self) -> bool:
        """The breaker, where there is one, is closed."""
        return self.breaker is None or self.breaker.state is State.CLOSED

    def _log_change(self, old: State, new: State) -> None:
        level = logging.WARNING if new is State.OPEN else logging.INFO
        _logger.log(level, "circuit breaker of %s: %s, was %s", self.url, new.value, old.value)


class Admission:
    """Permission to send one request to ``endpoint``. `end` gives it back; a second call does nothing."""

    __slots__ = ("_endpoints", "_permit", "endpoint")

    def __init__(self, endpoints: EndpointSet, endpoint: Endpoint, permit: int | None) -> None:
        self._endpoints: EndpointSet | None = endpoints
        self._permit = permit
        self.endpoint = endpoint

    def end(self, healthy: bool | None, *, unreachable: bool = False) -> None:
        """Report what the request showed of the endpoint's health, as `CircuitBreaker.record` takes it."""
        endpoints, self._endpoints = self._endpoints, None
        if endpoints is None:
            return
        if self._permit is not None:
            assert self.endpoint.breaker is not None
            self.endpoint.breaker.record(self._permit, healthy, unreachable=unreachable)
        endpoints.leave(self.endpoint)


class Refusal(NamedTuple):
    """No endpoint may be sent to now. ``open_seconds`` is set where circuit breakers are the reason."""

    open_seconds: float | None


class EndpointSet:
    """The endpoints of one model and the process's slots for it; thread-safe.

    Attributes:
        max_hold_seconds: how long a request may be held, outside its deadline, for an unhealthy or overloaded
            server.
        waiting_for_admission: is woken when a request to an endpoint has ended.
    """

    def __init__(self, key: EndpointSetKey) -> None:
        self.endpoints = tuple(Endpoint(url, key) for url in key.urls)
        self.slots = Slots(key.max_concurrent_requests)
        self.waiting_for_admission = WaitQueue()
        self.retry = key.retry
        breaker = key.circuit_breaker
        self.max_hold_seconds = breaker.max_wait_seconds if breaker and breaker.when_open == "wait" else 0.0
        self._lock = threading.Lock()

    @property
    def any_breaker_open(self) -> bool:
        """Whether some endpoint is unhealthy."""
        # Evaluated for each request: a generator would cost more than the question.
        for endpoint in self.endpoints:  # noqa: SIM110
            if not endpoint.is_healthy:
                return True
        return False

    def view(self, tried: Sequence[Endpoint], *, has_new_credentials: bool = False) -> EndpointView:
        """What `next_step` has to know after a request failed at the last endpoint of ``tried``."""
        return EndpointView(
            is_healthy=tried[-1].is_healthy,
            has_alternative=self._has_healthy_besides(tried),
            any_tried_unhealthy=any(not endpoint.is_healthy for endpoint in tried),
            overload_streak=tried[-1].limit.overloads_in_a_row,
            has_new_credentials=has_new_credentials,
        )

    def attempt_seconds(
        self, timeout_seconds: float, remaining_seconds: float, tried: Sequence[Endpoint]
    ) -> float:
        """How long an attempt at the last endpoint of ``tried`` may take.

        If another endpoint is healthy, a silent one is given up after half of the time that remains,
        unless answers usually take so long that half would be too little to call it hung.
        """
        latencies = [endpoint.limit.usual_latency_seconds for endpoint in self.endpoints]
        slowest = max((latency for latency in latencies if latency is not None), default=None)
        half = remaining_seconds / 2
        is_plenty = slowest is not None and slowest * _HUNG_AFTER_LATENCIES <= half
        return half if is_plenty and self._has_healthy_besides(tried) else timeout_seconds

    def admit(self, avoid: Collection[Endpoint]) -> Admission | Refusal:
        """Permission to send to one endpoint, not one of ``avoid`` unless there is no other."""
        if len(self.endpoints) == 1:
            return self._try_enter(self.endpoints[0]) or Refusal(self._open_seconds())
        preferred = [endpoint for endpoint in self.endpoints if endpoint not in avoid]
        for candidates in (preferred, self.endpoints if avoid else ()):
            for endpoint in sorted(candidates, key=_preference):
                admission = self._try_enter(endpoint)
                if admission is not None:
                    return admission
        return Refusal(self._open_seconds())

    def leave(self, endpoint: Endpoint) -> None:
        with self._lock:
            endpoint.in_flight -= 1
        self.waiting_for_admission.wake_next()

    def refusal_error(self, open_seconds: float | None, waited_seconds: float) -> TritonError:
        """The error of a request that was never sent: it was refused, as in `Refusal`, until it gave up."""
        if open_seconds is not None:
            waited = f" after {waited_seconds:g} s of waiting" if waited_seconds else ""
            return CircuitOpenError(
                f"the circuit breaker of {self} is open{waited}: the request was not sent; "
                f"next probe in {open_seconds:.1f} s",
                open_seconds_left=open_seconds,
            )
        limits = "+".join(str(endpoint.limit.limit) for endpoint in self.endpoints)
        return PoolTimeoutError(
            f"not sent within {waited_seconds:g} s: {self} is at its adaptive limit of {limits} requests "
            f"at a time, and others were queued first"
        )

    def __str__(self) -> str:
        return ", ".join(str(endpoint.url) for endpoint in self.endpoints)

    def _has_healthy_besides(self, tried: Sequence[Endpoint]) -> bool:
        return any(endpoint.is_healthy and endpoint not in tried for endpoint in self.endpoints)

    def _try_enter(self, endpoint: Endpoint) -> Admission | None:
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
    # A probe that is due comes first: while the others have room, this endpoint would never get a request.
    return 2 if endpoint.breaker.seconds_until_probe() > 0 else 0, load

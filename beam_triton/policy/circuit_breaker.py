"""The circuit breaker: stops sending requests to a server that fails, and lets a few probe it.

::

               the share of failures reaches the threshold, or too many in a row found it unreachable
    closed ────────────────────────────────────────────▶ open ◀──────────┐
       ▲                                                  │ open_seconds, │
       │                                                  │ or a health   │ a probe failed
       │        half_open_requests probes succeeded       ▼ check passed  │
       └────────────────────────────────────────────── half_open ─────────┘

A request is let through with a permit, the number of the breaker's epoch, and reports one outcome with it. A
request that shows nothing of the server's health (the element's fault, cancelled) reports None; in half-open
that lets the next request be the probe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from threading import Lock
from typing import Literal

from beam_triton.policy.sliding_count import SlidingCount
from beam_triton.validation import Options, check, fraction, not_negative, one_of, positive, positive_integer

# While all probes are out there is no moment to wait for, only outcomes: look again this soon.
_PROBES_OUT_WAIT_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class CircuitBreakerPolicy(Options):
    """When a server counts as unhealthy, and what happens to its requests until it is healthy again.

    Attributes:
        failure_threshold: the share of failures, above 0 and at most 1, at which the breaker opens.
        minimum_requests: how many outcomes it takes to judge by.
        window_seconds: how long an outcome counts. Older ones do not, so a long good time cannot hide a bad
            minute.
        open_seconds: how long nothing is sent before the server is probed.
        half_open_requests: how many requests probe at a time; as many successes close the breaker, one
            failure opens it again.
        when_open: ``"wait"`` holds requests until the server is healthy again, and also, outside their
            deadlines, those that it is too busy for; ``"fail"`` fails them at once with ``CircuitOpenError``,
            and lets overload count against the deadline.
        max_wait_seconds: how long a request is held at most, before it fails.
        health_check_interval_seconds: while open, how often the server's readiness is checked; a good answer
            starts the probes early. ``None``: never.

    Raises:
        ConfigurationError: a value is out of range.
    """

    failure_threshold: float = 0.5
    minimum_requests: int = 10
    window_seconds: float = 10.0
    open_seconds: float = 60.0
    half_open_requests: int = 3
    when_open: Literal["wait", "fail"] = "wait"
    max_wait_seconds: float = 600.0
    health_check_interval_seconds: float | None = 1.0

    def __post_init__(self) -> None:
        check(self, fraction, "failure_threshold")
        check(self, positive_integer, "minimum_requests", "half_open_requests")
        check(self, positive, "window_seconds", "open_seconds")
        check(self, one_of(("wait", "fail")), "when_open")
        check(self, not_negative, "max_wait_seconds")
        check(self, positive, "health_check_interval_seconds", allow_none=True)


def max_hold_seconds(policy: CircuitBreakerPolicy | None) -> float:
    """How long a request is held at most, outside its deadline; 0 where the policy does not let it wait."""
    return policy.max_wait_seconds if policy is not None and policy.when_open == "wait" else 0.0


class State(Enum):
    """Closed lets all requests pass, open none, half-open a few."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """The state of one endpoint, shared by the threads of a process.

    ``clock`` gives monotonic seconds. ``unreachable_limit`` requests in a row that cannot reach the server
    open the breaker whatever the window holds: the successes of a busy moment ago would outvote them. None
    takes ``minimum_requests``.

    ``on_change(old, new)`` is called after each change of state, on the thread that caused it and outside the
    lock: close changes on several threads may be reported out of order.

    ``state`` is that of the last call: an open breaker turns half-open at the next `try_acquire`.
    """

    def __init__(
        self,
        policy: CircuitBreakerPolicy,
        clock: Callable[[], float],
        on_change: Callable[[State, State], None] | None = None,
        *,
        unreachable_limit: int | None = None,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._on_change = on_change
        self._lock = Lock()
        self.state = State.CLOSED
        # Counts the changes of state. The outcome of an earlier epoch belongs to a time that has been judged.
        self._epoch = 0
        self._successes = SlidingCount(policy.window_seconds)
        self._failures = SlidingCount(policy.window_seconds)
        self._opened_at = 0.0
        self._next_health_check = 0.0
        self._probes_out = 0
        self._probes_succeeded = 0
        self._unreachable_limit = unreachable_limit or policy.minimum_requests
        self._unreachable_in_a_row = 0

    def try_acquire(self) -> int | None:
        """A permit to send one request, to be handed to `record`; None while the request has to wait."""
        with self._lock:
            old = self.state
            if old is State.CLOSED:
                return self._epoch
            if old is State.OPEN and self._clock() >= self._opened_at + self._policy.open_seconds:
                self._enter(State.HALF_OPEN)
            new = self.state
            permit = None
            if new is State.HALF_OPEN and self._has_probe_left():
                self._probes_out += 1
                permit = self._epoch
        self._notify(old, new)
        return permit

    def seconds_until_probe(self) -> float:
        """How long `try_acquire` will give no permit: 0 when one is available."""
        with self._lock:
            if self.state is State.OPEN:
                return max(0.0, self._opened_at + self._policy.open_seconds - self._clock())
            if self.state is State.HALF_OPEN and not self._has_probe_left():
                return _PROBES_OUT_WAIT_SECONDS
            return 0.0

    def claim_health_check(self) -> bool:
        """True if the caller is to check the server's readiness.

        One caller of a process at most gets True in each ``health_check_interval_seconds``, only while the
        breaker is open, and the first one an interval after it opened.
        """
        interval = self._policy.health_check_interval_seconds
        with self._lock:
            if interval is None or self.state is not State.OPEN:
                return False
            now = self._clock()
            if now < self._next_health_check:
                return False
            self._next_health_check = now + interval
            return True

    def health_check_passed(self) -> None:
        """Let an open breaker probe early; nothing in any other state.

        Readiness alone never closes the breaker: a ready server may hold a model that fails.
        """
        with self._lock:
            old = self.state
            if old is State.OPEN:
                self._enter(State.HALF_OPEN)
            new = self.state
        self._notify(old, new)

    def record(self, permit: int, healthy: bool | None, *, unreachable: bool = False) -> None:
        """Report the outcome of the request that ``permit`` let through; the caller does so once.

        Args:
            healthy: the server answered as a healthy one does; False for an error that ``counts_as_failure``;
                None for an outcome that shows nothing of its health.
            unreachable: the failure found no server, rather than a model that fails.
        """
        with self._lock:
            old = self.state
            if permit == self._epoch:
                if old is State.HALF_OPEN:
                    self._record_probe(healthy)
                elif healthy is not None:
                    self._count(healthy, unreachable)
            new = self.state
        self._notify(old, new)

    def _has_probe_left(self) -> bool:
        return self._probes_out + self._probes_succeeded < self._policy.half_open_requests

    def _record_probe(self, healthy: bool | None) -> None:
        self._probes_out -= 1
        if healthy is False:
            self._enter(State.OPEN)
        elif healthy:
            self._probes_succeeded += 1
            if self._probes_succeeded == self._policy.half_open_requests:
                self._enter(State.CLOSED)

    def _count(self, healthy: bool, unreachable: bool) -> None:
        now = self._clock()
        if healthy:
            self._unreachable_in_a_row = 0
            self._successes.add(now)
            if not self._failures.total:
                return
        else:
            self._failures.add(now)
            self._unreachable_in_a_row += unreachable
        if self._unreachable_in_a_row >= self._unreachable_limit:
            self._enter(State.OPEN)
            return
        self._failures.advance(now)
        self._successes.advance(now)
        total = self._successes.total + self._failures.total
        if (
            total >= self._policy.minimum_requests
            and self._failures.total >= self._policy.failure_threshold * total
        ):
            self._enter(State.OPEN)

    def _enter(self, state: State) -> None:
        self.state = state
        self._epoch += 1
        self._probes_out = 0
        self._probes_succeeded = 0
        self._unreachable_in_a_row = 0
        self._successes.clear()
        self._failures.clear()
        if state is State.OPEN:
            self._opened_at = self._clock()
            self._next_health_check = self._opened_at + (self._policy.health_check_interval_seconds or 0.0)

    def _notify(self, old: State, new: State) -> None:
        if self._on_change is not None and old is not new:
            self._on_change(old, new)

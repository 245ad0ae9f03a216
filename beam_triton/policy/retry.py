"""What happens after a failure: the one place that decides whether, when and where a request is sent again.

`next_step` is a pure function. `beam_triton.dispatch.call` carries out its steps for requests in flight,
`repeat` for callers that wait; nothing else repeats a request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple, TypeAlias, TypeVar

from beam_triton.errors import (
    CircuitOpenError,
    ConnectError,
    DeadlineExceededError,
    InferenceError,
    ModelExecutionError,
    ProxyError,
    SharedMemoryError,
    SilentConnectionError,
    TlsError,
    TritonError,
)
from beam_triton.policy.sliding_count import SlidingCount
from beam_triton.validation import Options, check, not_negative, not_negative_integer, positive

BUDGET_WINDOW_SECONDS = 10.0

# 2**64 times the smallest backoff is beyond any maximum, and far from overflowing a float.
_MOST_DOUBLINGS = 64

# Errors from before a request was held are kept for its user, this many at most.
_MAX_EARLIER_ERRORS = 8

# A request of this much suspicion is itself why its deadlines pass: a model can hang on an element.
CERTAIN = 8
# That of the halves of such a request, one of which is to blame; and what a deadline adds that nothing else
# explains.
HALF_CERTAIN = CERTAIN // 2

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RetryPolicy(Options):
    """How failed requests are repeated.

    Attributes:
        max_retries: attempts after the first one; 0 switches retries off.
        initial_backoff_seconds: the wait before the first retry, doubled for each further one. Half
            of it is fixed and half is random (equal jitter).
        max_backoff_seconds: where the doubling ends.
        max_server_error_retries: of ``max_retries``, how many may follow a plain 500 of a single element,
            where the model itself raised. A batch is bisected instead.
        budget_ratio: over 10 seconds, an endpoint gets at most ``budget_ratio`` x requests +
            ``budget_min_per_second`` x 10 retries, so that a failing server is not given much more work
            than a healthy one. Refused connections and overload are not counted.
        budget_min_per_second: the second term, which lets a quiet job retry at all.

    Raises:
        ConfigurationError: a value is out of range.
    """

    max_retries: int = 10
    initial_backoff_seconds: float = 0.1
    max_backoff_seconds: float = 30.0
    max_server_error_retries: int = 1
    budget_ratio: float = 0.1
    budget_min_per_second: float = 1.0

    def __post_init__(self) -> None:
        check(self, not_negative_integer, "max_retries", "max_server_error_retries")
        check(self, positive, "initial_backoff_seconds", "max_backoff_seconds")
        check(self, not_negative, "budget_ratio", "budget_min_per_second")


class History(NamedTuple):
    """The failures of one request so far.

    ``errors`` are those since it was last held (or since its start), the latest one last; ``earlier`` the
    last ones before that; ``holds`` counts how often a server asked for time. ``suspicion``, up to `CERTAIN`,
    grows with every deadline that the request passes although the server had time for it.
    """

    errors: tuple[TritonError, ...] = ()
    earlier: tuple[TritonError, ...] = ()
    holds: int = 0
    suspicion: int = 0

    @property
    def is_to_blame(self) -> bool:
        """Whether the request itself is, for certain, why its deadlines pass."""
        return self.suspicion >= CERTAIN

    def after(self, error: TritonError, endpoint: EndpointView | None = None) -> History:
        """The history with one more failure, at ``endpoint``."""
        suspicion = self.suspicion
        if endpoint is not None and isinstance(error, DeadlineExceededError):
            suspicion += endpoint.suspicion
        return self._replace(errors=(*self.errors, error), suspicion=suspicion)

    def held(self, *, for_overload: bool) -> History:
        """The history of a request that starts over once its server has time for it, or is healthy."""
        earlier = (self.earlier + self.errors)[-_MAX_EARLIER_ERRORS:]
        return History((), earlier, self.holds + for_overload, self.suspicion)


class Limits(NamedTuple):
    """How far repeating may go.

    Attributes:
        remaining_seconds: until the request's deadline.
        hold_seconds: how long the request may still be held outside its deadline; 0 for not at all.
        max_retries: instead of the policy's.
        max_server_error_retries: instead of the policy's.
        is_sequence: the request belongs to a sequence, whose model would see a repeated request twice:
            nothing that may have run is repeated.
        may_be_too_large: the request is a batch that may have been refused for its size, and no other as
            large has passed lately.
        was_in_shared_memory: its tensors were in the last attempt. Those of the next one go by HTTP.
    """

    remaining_seconds: float
    hold_seconds: float = 0.0
    max_retries: int | None = None
    max_server_error_retries: int | None = None
    is_sequence: bool = False
    may_be_too_large: bool = False
    was_in_shared_memory: bool = False


class EndpointView(NamedTuple):
    """What matters of the endpoint that failed, and of the others.

    Attributes:
        is_healthy: its circuit breaker is closed.
        has_alternative: another endpoint is healthy, and has not failed this request yet.
        any_tried_unhealthy: an endpoint that failed this request is known to be unhealthy.
        overload_streak: round trips in a row in which this endpoint was overloaded, for all of its callers.
        has_new_credentials: it refused credentials that have been replaced since.
        has_answered: it has answered a request for the model before.
        answered_meanwhile: it answered others while this request was in flight.
        was_stalled: when the request was sent, another one had passed its deadline, and none had been
            answered since.
        is_slow: its answers usually take more than half of the deadline.
        is_ready: it passed a health check shortly before the request was sent.
    """

    is_healthy: bool = True
    has_alternative: bool = False
    any_tried_unhealthy: bool = False
    overload_streak: int = 0
    has_new_credentials: bool = False
    has_answered: bool = False
    answered_meanwhile: bool = False
    was_stalled: bool = False
    is_slow: bool = False
    is_ready: bool = False

    @property
    def suspicion(self) -> int:
        """How far a deadline that passed here speaks against the request itself.

        A queue in a slow server explains it in full. Silence for all, as after a request that hangs the only
        instance of a model, may be another request's doing.
        """
        if self.answered_meanwhile:
            return 0 if self.is_slow else HALF_CERTAIN
        return 1 if self.was_stalled else HALF_CERTAIN


class Resend(NamedTuple):
    """Send the request again at once, to the same endpoint: the failure is not the request's."""


class Retry(NamedTuple):
    """Send the request again after a backoff, within its deadline.

    ``is_budgeted``: the retry is spent from the endpoint's retry budget.
    """

    after_seconds: float
    is_budgeted: bool


class Hold(NamedTuple):
    """Wait outside the deadline, then start over: for a server that has too much to do ``after_seconds``, for
    an unhealthy one (``for_overload`` is false) until an endpoint admits requests again."""

    after_seconds: float
    for_overload: bool


class Fail(NamedTuple):
    """Give up: ``error`` is the request's outcome."""

    error: TritonError


Step: TypeAlias = Resend | Retry | Hold | Fail


def next_step(
    policy: RetryPolicy,
    error: TritonError,
    history: History,
    limits: Limits,
    endpoint: EndpointView,
    random: Callable[[], float],
) -> Step:
    """Decide what happens to a request that failed with ``error``, the last one of ``history``.

    In this order:

    1. A reused connection that the server had closed while it was idle, or credentials that have been
       replaced since, or shared memory that the server does not know: resend. No retry is counted.
    2. A batch that may be too large: fail, to be bisected.
    3. An overloaded server, or a ``Retry-After`` that ends after the deadline: hold, if that is allowed.
    4. A retryable error, within the limits of the policy: retry. Another healthy endpoint, or another
       connection than a silent one, is tried at once. A TLS error, or a proxy's refusal, is final for one
       endpoint, not for another that has a certificate of its own.
    5. An endpoint known to be unhealthy: hold until it is healthy again. Not for an error that bisects the
       batch: a model that raises may go on raising for the same element. Nor for a request that is itself
       to blame for the silence of a ready server.
    6. A passed deadline, or a silent connection, at a server that has answered before: hold, until the
       request itself is to blame. A server that answers is healthy, however slow.
    7. Fail.

    ``random`` gives numbers in [0, 1).
    """
    if endpoint.has_new_credentials or (error.was_stale and not limits.is_sequence):
        return Resend()
    if limits.was_in_shared_memory and isinstance(error, SharedMemoryError):
        return Resend()
    if limits.may_be_too_large:
        return Fail(error)
    # Waiting for the circuit breaker is CircuitBreakerPolicy's decision, and it has been taken.
    is_repeatable = (
        error.retryable
        and not (limits.is_sequence and error.may_have_run)
        and not isinstance(error, CircuitOpenError)
    )
    max_retries = policy.max_retries if limits.max_retries is None else limits.max_retries
    if limits.remaining_seconds > 0:
        if is_repeatable and limits.hold_seconds > 0 and max_retries and _asks_for_time(error, limits):
            # The backoff of a request that was refused more often than others grows with the server's
            # overload only, or it would starve.
            holds = min(history.holds + 1, max(1, endpoint.overload_streak))
            after_seconds = _pause_seconds(policy, error, holds, random)
            if after_seconds < limits.hold_seconds:
                return Hold(after_seconds, for_overload=True)
        if len(history.errors) <= max_retries:
            delay = _retry_delay(policy, error, history, limits, random) if is_repeatable else None
            if isinstance(error, TlsError | ProxyError) and endpoint.has_alternative:
                delay = 0.0
            is_usable = endpoint.is_healthy or not error.counts_as_failure or endpoint.has_alternative
            if delay is not None and is_usable:
                elsewhere = isinstance(error, SilentConnectionError) or endpoint.has_alternative
                if elsewhere and not error.is_overload:
                    delay = 0.0
                # A refused connection costs the server nothing; the concurrency limit bounds what an
                # overloaded one gets.
                return Retry(delay, is_budgeted=type(error) is not ConnectError and not error.is_overload)
    if (
        is_repeatable
        and limits.hold_seconds > 0
        and endpoint.any_tried_unhealthy
        and error.counts_as_failure
        and not error.splits_batch
        and not (isinstance(error, DeadlineExceededError) and history.is_to_blame and endpoint.is_ready)
    ):
        return Hold(0.0, for_overload=False)
    if (
        is_repeatable
        and max_retries
        and isinstance(error, DeadlineExceededError | SilentConnectionError)
        and endpoint.has_answered
        and not history.is_to_blame
    ):
        after_seconds = _pause_seconds(policy, error, 1, random)
        if after_seconds < limits.hold_seconds:
            return Hold(after_seconds, for_overload=True)
    return Fail(error)


def repeat(
    operation: Callable[[], T],
    policy: RetryPolicy,
    limits: Callable[[], Limits],
    wait: Callable[[float, TritonError], None],
    random: Callable[[], float],
    endpoint: EndpointView | None = None,
) -> T:
    """Call ``operation`` until it succeeds or `next_step` gives up; for callers that may block.

    ``limits`` is evaluated after each failure; ``wait(seconds, error)`` waits before a retry. Raises the last
    error, with those before it as its ``attempts``.
    """
    history = History()
    while True:
        try:
            return operation()
        except TritonError as error:
            step = next_step(
                policy, error, history.after(error), limits(), endpoint or EndpointView(), random
            )
            if isinstance(step, Fail | Hold):
                error.attempts = (*history.errors[-_MAX_EARLIER_ERRORS:], *error.attempts)
                raise
            if isinstance(step, Retry):
                history = history.after(error)
                wait(step.after_seconds, error)


def resend(operation: Callable[[], T], random: Callable[[], float]) -> T:
    """Call ``operation`` again only after a stale connection; every other error is raised."""
    return repeat(operation, RetryPolicy(), lambda: Limits(0.0), lambda seconds, error: None, random)


def _asks_for_time(error: TritonError, limits: Limits) -> bool:
    asked_for = _retry_after_seconds(error)
    return error.is_overload or (asked_for > 0 and asked_for >= limits.remaining_seconds)


def _retry_delay(
    policy: RetryPolicy, error: TritonError, history: History, limits: Limits, random: Callable[[], float]
) -> float | None:
    """The backoff before a retry; None where the error has used up its retries, or the deadline is too near.

    A backoff that would use up the deadline is cut to half of the time that is left, to find a server that
    comes back in time.
    """
    if isinstance(error, ModelExecutionError):
        server_errors = sum(isinstance(earlier, ModelExecutionError) for earlier in history.errors)
        allowed = limits.max_server_error_retries
        if server_errors > (policy.max_server_error_retries if allowed is None else allowed):
            return None
    delay = _pause_seconds(policy, error, len(history.errors), random)
    if delay < limits.remaining_seconds:
        return delay
    cut = max(policy.initial_backoff_seconds, limits.remaining_seconds) / 2
    return cut if cut < limits.remaining_seconds else None


def _pause_seconds(
    policy: RetryPolicy, error: TritonError, attempts: int, random: Callable[[], float]
) -> float:
    """Exponential backoff after ``attempts`` failures: half of it fixed, half of it random (equal jitter).

    A ``Retry-After`` takes the place of the fixed half where it is longer; the random half stays, so that
    clients that were given the same second do not all come back in it.
    """
    doublings = min(attempts - 1, _MOST_DOUBLINGS)
    half = min(policy.initial_backoff_seconds * 2.0**doublings, policy.max_backoff_seconds) / 2
    return max(half, _retry_after_seconds(error)) + half * random()


def _retry_after_seconds(error: TritonError) -> float:
    return (error.retry_after_seconds or 0.0) if isinstance(error, InferenceError) else 0.0


class RetryBudget:
    """Bounds the retries that one endpoint gets from one process; shared by its threads.

    At the moment a retry is allowed, the retries of the last 10 seconds, this one included, are at most
    ``budget_ratio`` x the requests of that time + ``budget_min_per_second`` x 10.
    """

    def __init__(self, policy: RetryPolicy, clock: Callable[[], float]) -> None:
        self._ratio = policy.budget_ratio
        self._free = policy.budget_min_per_second * BUDGET_WINDOW_SECONDS
        self._clock = clock
        self._lock = Lock()
        self._requests = SlidingCount(BUDGET_WINDOW_SECONDS)
        self._retries = SlidingCount(BUDGET_WINDOW_SECONDS, over_count=True)

    def record_request(self) -> None:
        """Count a request's first attempt."""
        with self._lock:
            self._requests.add(self._clock())

    def try_spend(self) -> bool:
        """Take one retry out of the budget; False, and nothing taken, when there is none."""
        with self._lock:
            now = self._clock()
            self._requests.advance(now)
            self._retries.advance(now)
            if self._retries.total + 1 > self._ratio * self._requests.total + self._free:
                return False
            self._retries.add(now)
            return True

"""When an attempt is made again, after how long, and how many retries a server may be given in all.

This is the only owner of retries: nothing below repeats a request by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from beam_triton.errors import CircuitOpenError, InferenceError, ModelExecutionError, TritonError
from beam_triton.policy.sliding_count import SlidingCount
from beam_triton.validation import Options, check, not_negative, not_negative_integer, positive

BUDGET_WINDOW_SECONDS = 10.0

# 2**64 times the smallest backoff is beyond any maximum, and far from overflowing a float.
_MOST_DOUBLINGS = 64

# The edge of a bucket of time is not exact in floating point: a wait of nothing could end before it.
_SHORTEST_WAIT_SECONDS = 0.001


@dataclass(frozen=True, kw_only=True)
class RetryPolicy(Options):
    """How failed requests are repeated.

    Attributes:
        max_retries: attempts after the first one; 0 switches retries off.
        initial_backoff_seconds: the wait before the first retry, doubled for each further one. Half
            of it is fixed and half is random (equal jitter).
        max_backoff_seconds: where the doubling ends.
        max_server_error_retries: of ``max_retries``, how many may follow a plain 500, where the model
            itself raised: repeating a bad element would only delay its being found.
        budget_ratio: over 10 seconds, an endpoint gets at most ``budget_ratio`` x requests +
            ``budget_min_per_second`` x 10 retries, so that a sick server is not given much more work
            than a healthy one. Refused connections and refusals for being busy are not in it.
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

    def backoff_seconds(self, retry_number: int, random: Callable[[], float]) -> float:
        """The wait before retry ``retry_number`` (1 is the first one); ``random`` gives numbers in [0, 1)."""
        half = self._half_backoff_seconds(retry_number)
        return half + half * random()

    def _half_backoff_seconds(self, retry_number: int) -> float:
        doublings = min(retry_number - 1, _MOST_DOUBLINGS)
        return min(self.initial_backoff_seconds * 2.0**doublings, self.max_backoff_seconds) / 2


def decide(
    policy: RetryPolicy,
    error: TritonError,
    attempts_made: int,
    server_error_attempts: int,
    *,
    sequence: bool,
    remaining_seconds: float,
    random: Callable[[], float],
) -> float | None:
    """Seconds to wait before the next attempt, or None when ``error`` is final.

    ``attempts_made`` counts the attempts so far, the failed one included; ``server_error_attempts``
    those of them that ended in `ModelExecutionError`. ``sequence`` says that the request belongs to a
    sequence, whose model would see it twice. ``remaining_seconds`` is what is left until the deadline.

    A wait that would use up the deadline is cut to half of what is left, so that a server that comes back in
    time is found; what a ``Retry-After`` asks for beyond it can only be had outside the deadline.
    """
    if not error.retryable or attempts_made > policy.max_retries:
        return None
    if isinstance(error, CircuitOpenError):
        # Waiting for the breaker is CircuitBreakerPolicy's decision, and it has been taken.
        return None
    if isinstance(error, ModelExecutionError) and server_error_attempts > policy.max_server_error_retries:
        return None
    if sequence and error.may_have_run:
        return None
    delay = pause_seconds(policy, error, attempts_made, random)
    if delay < remaining_seconds:
        return delay
    cut = max(policy.initial_backoff_seconds, remaining_seconds) / 2
    return cut if cut < remaining_seconds else None


def pause_seconds(
    policy: RetryPolicy, error: TritonError, attempts_made: int, random: Callable[[], float]
) -> float:
    """How long to let the server be after ``error``.

    A ``Retry-After`` takes the place of the backoff's fixed half where it is longer; the random half
    stays, so that clients who were told the same second do not all come back in it.
    """
    half = policy._half_backoff_seconds(attempts_made)
    return max(half, asked_for_seconds(error)) + half * random()


def asked_for_seconds(error: TritonError) -> float:
    """The server's ``Retry-After``, 0 without one."""
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
            self._advance(now)
            if not self._affords(self._retries.total + 1, self._requests.total):
                return False
            self._retries.add(now)
            return True

    def seconds_until_token(self) -> float:
        """The wait until `try_spend` may succeed: 0 for at once, infinity if only more requests can help."""
        with self._lock:
            now = self._clock()
            self._advance(now)
            retries, requests = self._retries.total, self._requests.total
            if self._affords(retries + 1, requests):
                return 0.0
            # Requests sort before retries that leave at the same moment: both are gone after it.
            leaving = [(when, count, 0) for when, count in self._retries.expiries()]
            leaving += [(when, 0, count) for when, count in self._requests.expiries()]
            for when, fewer_retries, fewer_requests in sorted(leaving):
                requests -= fewer_requests
                retries -= fewer_retries
                if self._affords(retries + 1, requests):
                    return max(_SHORTEST_WAIT_SECONDS, when - now)
            return math.inf

    def _advance(self, now: float) -> None:
        self._requests.advance(now)
        self._retries.advance(now)

    def _affords(self, retries: int, requests: int) -> bool:
        return retries <= self._ratio * requests + self._free

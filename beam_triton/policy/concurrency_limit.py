"""The adaptive limit of requests in flight: lower when the server is overloaded, higher again when it is not.

Two signals shrink the limit:

- **Overload** (429, queue full): by three tenths, once per round trip; requests that were in flight at the
  last decrease carry no new information.
- **A standing queue**: the smallest latency of a few round trips is more than three times the smallest
  of the last minute, while the limit is being used. A well-used server shows twice: 32 requests at 16 model
  instances wait once as long as they run. The smallest latency is compared, not the mean, because a queue
  delays every request, and a few slow ones delay only themselves.

The second is a guess, so it is tried: the limit goes down by a quarter for a few round trips. If as many
requests per second succeed, the others only waited, and the decrease stays. If fewer do, the server needs
that many in flight (longer inputs, dynamic batching, a slower model), so the limit is restored and left alone
for a minute: a slow server that is healthy is not fought.

The successes of a round trip, sixteen at least, raise the limit by one, up to the maximum, where it starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from threading import Lock
from typing import NamedTuple

from beam_triton.validation import positive_integer

_OVERLOAD_FACTOR = 0.7
# A limit of 4 would otherwise overshoot every few requests: of those sent to two instances with a queue of
# two, 13 % were refused with a step each round trip, 4 % with this (simulated).
_MIN_GROWTH_SUCCESSES = 16

_TRIAL_FACTOR = 0.75
# Half of the throughput that would be lost if every withdrawn request had been useful.
_TRIAL_KEEPS = (1 + _TRIAL_FACTOR) / 2
_TRIAL_PAUSE_SECONDS = 60.0

_QUEUE_RATIO = 3.0
_BASELINE_SECONDS = 30.0

_WINDOW_ROUND_TRIPS = 4
_MIN_WINDOW_SUCCESSES = 32

# Assumed until successes have shown what a round trip takes.
_FIRST_ROUND_TRIP_SECONDS = 0.1
_ROUND_TRIP_SMOOTHING = 1 / 16


class ConcurrencyLimit:
    """The limit of one endpoint, shared by the threads of a process; between 1 and ``maximum``.

    ``overloads_in_a_row`` counts round trips that met overload since the last success.

    ``clock`` gives monotonic seconds. Raises `ConfigurationError` unless ``maximum`` is a whole number
    of 1 or more.
    """

    def __init__(self, maximum: int, clock: Callable[[], float]) -> None:
        positive_integer("max_concurrent_requests", maximum)
        self._maximum = float(maximum)
        self._clock = clock
        self._lock = Lock()
        self._limit = self._maximum
        self._decreased_at = -math.inf
        self._round_trip_seconds = _FIRST_ROUND_TRIP_SECONDS
        self._has_answered = False
        self.overloads_in_a_row = 0
        self._window = _Sample(clock())
        self._baseline = _Baseline(clock())
        self._trial: _Trial | None = None
        self._next_trial_at = -math.inf

    @property
    def usual_latency_seconds(self) -> float | None:
        """The recent latency of a successful request; None before the first one."""
        return self._round_trip_seconds if self._has_answered else None

    @property
    def limit(self) -> int:
        """How many requests may be in flight."""
        return int(self._limit)

    def on_success(self, latency_seconds: float) -> None:
        """A request succeeded, ``latency_seconds`` after it was sent."""
        with self._lock:
            now = self._clock()
            self._has_answered = True
            self.overloads_in_a_row = 0
            self._round_trip_seconds += (latency_seconds - self._round_trip_seconds) * _ROUND_TRIP_SMOOTHING
            if self._trial is None and self._limit < self._maximum:
                growth = 1 / max(self._limit, _MIN_GROWTH_SUCCESSES)
                self._limit = min(self._limit + growth, self._maximum)
            window = self._window
            window.add(latency_seconds, now)
            if window.count >= _MIN_WINDOW_SUCCESSES and window.count >= _WINDOW_ROUND_TRIPS * self._limit:
                self._judge(window, now)

    def on_overload(self, latency_seconds: float | None = None) -> None:
        """The server refused a request because it is overloaded.

        ``latency_seconds`` is the time since the request was sent, by default the usual latency: refusals of
        a burst for which the limit has shrunk already change nothing.
        """
        with self._lock:
            now = self._clock()
            sent_at = now - (self._round_trip_seconds if latency_seconds is None else latency_seconds)
            if sent_at >= self._decreased_at:
                self.overloads_in_a_row += 1
                self._trial = None
                self._decrease(_OVERLOAD_FACTOR, now)

    def _judge(self, window: _Sample, now: float) -> None:
        self._window = _Sample(now)
        trial, self._trial = self._trial, None
        if trial is not None:
            if window.successes_per_second(now) < trial.needed_per_second:
                self._limit = trial.limit_before
                self._next_trial_at = now + _TRIAL_PAUSE_SECONDS
        elif self._has_standing_queue(window, now):
            self._trial = _Trial(self._limit, window.successes_per_second(now) * _TRIAL_KEEPS)
            self._decrease(_TRIAL_FACTOR, now)
        self._baseline.add(window.smallest_seconds, now)

    def _has_standing_queue(self, window: _Sample, now: float) -> bool:
        return (
            self._limit >= 2
            and now >= self._next_trial_at
            and window.smallest_seconds > _QUEUE_RATIO * self._baseline.smallest_seconds
            and window.mean_in_flight(now) > self._limit / 2
        )

    def _decrease(self, factor: float, now: float) -> None:
        self._limit = max(1.0, self._limit * factor)
        self._decreased_at = now
        # Answers to requests sent under the larger limit still come back for a round trip.
        self._window = _Sample(now + self._round_trip_seconds)


class _Trial(NamedTuple):
    """A decrease that stays if at least ``needed_per_second`` requests keep succeeding."""

    limit_before: float
    needed_per_second: float


class _Sample:
    """The successes since ``opens_at``, which may be in the future."""

    __slots__ = ("_opens_at", "_total_seconds", "count", "smallest_seconds")

    def __init__(self, opens_at: float) -> None:
        self._opens_at = opens_at
        self._total_seconds = 0.0
        self.count = 0
        self.smallest_seconds = math.inf

    def add(self, latency_seconds: float, now: float) -> None:
        if now < self._opens_at:
            return
        self.count += 1
        self._total_seconds += latency_seconds
        self.smallest_seconds = min(self.smallest_seconds, latency_seconds)

    def successes_per_second(self, now: float) -> float:
        return self.count / (now - self._opens_at) if now > self._opens_at else math.inf

    def mean_in_flight(self, now: float) -> float:
        """By Little's law: arrivals per second times the time that each one stays."""
        return self.successes_per_second(now) * self._total_seconds / self.count


class _Baseline:
    """The smallest latency of the last 30 to 60 seconds."""

    __slots__ = ("_current", "_previous", "_started_at")

    def __init__(self, now: float) -> None:
        self._started_at = now
        self._current = math.inf
        self._previous = math.inf

    @property
    def smallest_seconds(self) -> float:
        return min(self._current, self._previous)

    def add(self, latency_seconds: float, now: float) -> None:
        if now - self._started_at >= _BASELINE_SECONDS:
            self._previous = self._current
            self._current = math.inf
            self._started_at = now
        self._current = min(self._current, latency_seconds)

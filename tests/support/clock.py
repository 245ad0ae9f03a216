"""A clock that only the test, or a sleep, advances."""

from __future__ import annotations

import threading


class FakeClock:
    """A call returns seconds as ``time.monotonic`` does; ``sleep`` advances the clock and returns at once."""

    def __init__(self, start_seconds: float = 1000.0) -> None:
        self._now = start_seconds
        self._lock = threading.Lock()
        self.sleeps: list[float] = []

    def __call__(self) -> float:
        with self._lock:
            return self._now

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError(f"a monotonic clock cannot go back by {-seconds} s")
        with self._lock:
            self._now += seconds

    def sleep(self, seconds: float) -> None:
        self.advance(max(seconds, 0.0))
        self.sleeps.append(seconds)

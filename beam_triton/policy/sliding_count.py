"""Counts of events in the last few seconds, in buckets of time.

Counts leave with their bucket, so old events cannot dilute recent ones. A total covers the bucket
in progress and the whole buckets before it: between ``(buckets - 1) / buckets`` of the window and all
of it, never more. Not thread-safe: the owner holds its own lock.
"""

from __future__ import annotations

_BUCKETS = 10


class SlidingCount:
    """How often something happened within the last ``window_seconds``.

    ``over_count`` keeps one bucket more: a total then covers at least the window and at most a tenth
    more, which is the safe side for whatever must stay below a bound.
    """

    __slots__ = ("_bucket_ends", "_bucket_seconds", "_buckets", "_counts", "_newest", "total")

    def __init__(self, window_seconds: float, *, over_count: bool = False) -> None:
        self._buckets = _BUCKETS + over_count
        self._bucket_seconds = window_seconds / _BUCKETS
        self._counts = [0] * self._buckets
        self._newest = 0
        self._bucket_ends = 0.0
        self.total = 0

    def add(self, now: float) -> None:
        if now >= self._bucket_ends:
            self.advance(now)
        self._counts[self._newest % self._buckets] += 1
        self.total += 1

    def advance(self, now: float) -> None:
        """Drop what has left the window at ``now``; afterwards ``total`` is exact."""
        bucket = int(now // self._bucket_seconds)
        steps = bucket - self._newest
        if steps <= 0:
            return
        for gone in range(self._newest + 1, self._newest + 1 + min(steps, self._buckets)):
            index = gone % self._buckets
            self.total -= self._counts[index]
            self._counts[index] = 0
        self._newest = bucket
        self._bucket_ends = (bucket + 1) * self._bucket_seconds

    def clear(self) -> None:
        self._counts = [0] * self._buckets
        self.total = 0

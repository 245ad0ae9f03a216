"""Latency buckets whose counts add up across threads, workers and machines.

A distribution metric of Beam keeps sum, count, minimum and maximum: no percentile comes out of it. Counts
per bucket do add up, so a request's latency is counted in a bucket, and percentiles are read from the sums.

Bucket 0 ends at 0.1 ms and the last but one at 600 s; between them the bounds grow by a constant factor of
`GROWTH`, about 1.51, and the last bucket holds what took longer. 40 buckets over nearly seven decades put a
percentile within a factor of 1.23 (half a bucket) of the truth if its bucket holds nothing but its own
middle; a run uses a dozen of them, so that a metrics service shows a dozen counters, not hundreds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from math import inf

FIRST_BOUND_SECONDS = 0.0001
LAST_BOUND_SECONDS = 600.0
BUCKETS = 40
GROWTH = (LAST_BOUND_SECONDS / FIRST_BOUND_SECONDS) ** (1 / (BUCKETS - 2))

COUNTER_PREFIX = "request_latency_bucket_"

_COUNTER_NAMES = tuple(f"{COUNTER_PREFIX}{index:02d}" for index in range(BUCKETS))
_UPPER_BOUNDS = (*(FIRST_BOUND_SECONDS * GROWTH**step for step in range(BUCKETS - 2)), LAST_BOUND_SECONDS)


def index_of(seconds: float) -> int:
    """The bucket that counts a latency of ``seconds``; a bound belongs to the bucket below it."""
    return bisect_left(_UPPER_BOUNDS, seconds)


def bounds(index: int) -> tuple[float, float]:
    """Lower (excluded, but for 0) and upper (included) bound of a bucket, in seconds.

    The last bucket's upper bound is infinite. Raises IndexError for an index that is no bucket.
    """
    if not 0 <= index < BUCKETS:
        raise IndexError(f"latency buckets are numbered 0 to {BUCKETS - 1}, not {index}")
    lower = _UPPER_BOUNDS[index - 1] if index else 0.0
    return lower, _UPPER_BOUNDS[index] if index < len(_UPPER_BOUNDS) else inf


def counter_name(index: int) -> str:
    """The name of the Beam counter that holds a bucket's count."""
    return _COUNTER_NAMES[index]


def index_of_counter(name: str) -> int | None:
    """The bucket whose count a Beam counter of that name holds; None for any other counter."""
    number = name.removeprefix(COUNTER_PREFIX)
    if number == name or not (number.isascii() and number.isdigit()) or int(number) >= BUCKETS:
        return None
    return int(number)


def percentile(
    counts: Mapping[int, int],
    q: float,
    *,
    minimum_seconds: float = 0.0,
    maximum_seconds: float = inf,
) -> float | None:
    """The latency in seconds that a share ``q`` (0 to 1) of the counted ones does not exceed.

    ``counts`` maps bucket index to count; buckets without an entry are empty. Within its bucket the value is
    interpolated on the logarithmic scale that the bounds have. ``minimum_seconds`` and ``maximum_seconds``,
    where a distribution metric knows them exactly, keep the answer inside what was seen; without a maximum,
    the last bucket answers with its lower bound. None when nothing was counted.

    Raises ValueError when ``q`` is not between 0 and 1.
    """
    if not 0 <= q <= 1:
        raise ValueError(f"q is the share of the latencies, from 0 to 1, not {q!r}")
    total = sum(counts.values())
    if total <= 0:
        return None
    rank = q * total
    passed = 0
    for index in sorted(counts):
        count = counts[index]
        if count <= 0:
            continue
        if passed + count >= rank:
            value = _within(index, max(rank - passed, 0.0) / count, maximum_seconds)
            return min(max(value, minimum_seconds), maximum_seconds)
        passed += count
    raise AssertionError("the last bucket reaches every rank")


def _within(index: int, share: float, maximum_seconds: float) -> float:
    lower, upper = bounds(index)
    if upper == inf:
        upper = maximum_seconds if lower < maximum_seconds < inf else lower
    if lower == 0.0:
        return upper * share
    return float(lower * (upper / lower) ** share)

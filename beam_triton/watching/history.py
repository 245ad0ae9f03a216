"""What the requests of this process did, a few samples a second; of a longer run, fewer and longer ones.

Nothing here is on a request's way: what ended comes out of `ACTIVITY`, and what is now (in flight, limits,
connections, the server's queue) is read off the process's own objects.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from beam_triton.dispatch.activity import ACTIVITY, EndedRequest, FailedElements, OpenedModel
from beam_triton.dispatch.channel import ENDPOINT_SETS
from beam_triton.dispatch.endpoints import Endpoint
from beam_triton.policy.server_times import ServerTimes
from beam_triton.transport.pool import ConnectionPool
from beam_triton.transport.session import SESSIONS, session_pool

SAMPLE_SECONDS = 0.25

# Neighbours are merged where there are more: a chart is about as many pixels wide.
_MOST_SAMPLES = 720
_RECENT_SECONDS = 60.0
_MOST_REASONS = 20
_MOST_MODELS = 20

# Bounds of latency buckets grow by this factor: a percentile is off by half of that at most.
_GROWTH = 1.05
_FIRST_BOUND_SECONDS = 1e-5
_LOG_FACTOR = 1 / math.log(_GROWTH)
_LOG_OFFSET = -math.log(_FIRST_BOUND_SECONDS) * _LOG_FACTOR

_SUMS = ("elements", "failures", "requests", "retries", "request_bytes", "response_bytes", "opened")
_MEANS = ("in_flight", "waiting", "active", "idle")
_MEANS_OF_KNOWN = ("limit", "queue_seconds")


@dataclass
class Sample:
    """What happened between ``start`` and ``start + seconds``, counted from the beginning of the history.

    ``latencies`` are counts of requests by bucket, ``sizes`` by the elements in a request. ``in_flight``,
    ``waiting`` (for their turn), ``limit``, ``active`` and ``idle`` (connections) are means; ``limit`` is
    None while no model is open. ``queue_seconds`` is what a request lately waited in the server's queue, None
    where that is not known.
    ``unhealthy`` endpoints are the most that there were.
    """

    start: float = 0.0
    seconds: float = 0.0
    elements: int = 0
    failures: int = 0
    requests: int = 0
    retries: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    opened: int = 0
    latencies: Counter[int] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    in_flight: float = 0.0
    waiting: float = 0.0
    active: float = 0.0
    idle: float = 0.0
    limit: float | None = None
    queue_seconds: float | None = None
    unhealthy: int = 0

    @property
    def done(self) -> int:
        """Elements that have a result or have failed."""
        return self.elements + self.failures

    def latency(self, q: float) -> float | None:
        """The latency in seconds that a share ``q`` of the answers does not exceed; None without any."""
        bucket = quantile(self.latencies, q)
        return None if bucket is None else _FIRST_BOUND_SECONDS * _GROWTH ** (bucket - 0.5)

    def add(self, later: Sample) -> None:
        """Merge the next sample into this one."""
        total = self.seconds + later.seconds
        share = later.seconds / total if total else 0.5
        for name in _MEANS:
            before = getattr(self, name)
            setattr(self, name, before + (getattr(later, name) - before) * share)
        for name in _MEANS_OF_KNOWN:
            before, new = getattr(self, name), getattr(later, name)
            if before is None or new is None:
                setattr(self, name, new if before is None else before)
            else:
                setattr(self, name, before + (new - before) * share)
        self.unhealthy = max(self.unhealthy, later.unhealthy)
        self.seconds = total
        self.latencies.update(later.latencies)
        self.sizes.update(later.sizes)
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(later, name))


@dataclass
class Reason:
    """Elements that failed alike: how many, and what the first of them said, ``at`` seconds."""

    count: int
    message: str
    at: float


class History:
    """Samples of a run, with its sums, its failures by kind, and the models that it used.

    Attributes:
        samples: all of the run, in order; each as long as the others or shorter.
        recent: the newest ones, unmerged, of about a minute.
        total: the sums of all, with the latencies and sizes of every request.
        reasons: by kind of failure, in the order of their first; those of further kinds under "others".
        models: those that were opened, with their settings.
        servers: models and their endpoints as text; the values say nothing.
    """

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.recent: deque[Sample] = deque()
        self.total = Sample()
        self.reasons: dict[str, Reason] = {}
        self.models: list[OpenedModel] = []
        self.servers: dict[str, None] = {}
        self._seconds = 0.0

    def add(self, sample: Sample) -> None:
        """Append a sample; merges neighbours where there are too many."""
        self.total.add(sample)
        self.recent.append(sample)
        while self.recent[0].start < sample.start - _RECENT_SECONDS:
            self.recent.popleft()
        last = self.samples[-1] if self.samples else None
        # A little more than the length, as threads wake a little late.
        if last is not None and last.seconds + sample.seconds <= self._seconds * 1.05:
            last.add(sample)
            return
        merged = Sample(start=sample.start)
        merged.add(sample)
        self.samples.append(merged)
        if len(self.samples) > _MOST_SAMPLES:
            for first, second in zip_longest(self.samples[::2], self.samples[1::2]):
                if second is not None:
                    first.add(second)
            self.samples = self.samples[::2]
            self._seconds = max(sample.seconds for sample in self.samples)

    def failed(self, kind: str, message: str, count: int, at: float) -> None:
        if kind not in self.reasons and len(self.reasons) >= _MOST_REASONS:
            kind = "others"
        self.reasons.setdefault(kind, Reason(0, message, at)).count += count

    def lately(self, seconds: float) -> Sample:
        """The last ``seconds`` as one sample."""
        newest = Sample()
        for sample in self.recent:
            if sample.start >= self.total.seconds - seconds - SAMPLE_SECONDS / 2:
                newest.add(sample)
        return newest


class Sampler:
    """Fills a history; used by one thread at a time. ``close`` when no more samples are taken.

    Args:
        now: when the history begins, in seconds of a monotonic clock.
    """

    def __init__(self, now: float) -> None:
        self.history = History()
        self._began_at = self._sampled_at = now
        self._events = ACTIVITY.watch()
        self._pools: dict[int, tuple[ConnectionPool, int]] = {}
        for pool in _pools_now():
            self._pools[id(pool)] = pool, pool.statistics().opened
        # What a server said last, and when it was seen first.
        self._observed: dict[int, tuple[Endpoint, ServerTimes, float]] = {}

    def close(self) -> None:
        ACTIVITY.unwatch(self._events)

    def sample(self, now: float) -> None:
        """Append what has happened since the last sample."""
        start = self._sampled_at - self._began_at
        sample = Sample(start=start, seconds=max(now - self._sampled_at, 1e-6))
        self._sampled_at = now
        self._read_endpoints(sample, now)
        self._read_connections(sample)
        self._take_events(sample, now - self._began_at)
        self.history.add(sample)

    def _take_events(self, sample: Sample, at: float) -> None:
        taken, sizes, latencies = self._events.popleft, sample.sizes, sample.latencies
        elements = retries = request_bytes = response_bytes = 0
        # As many as there are now: requests go on meanwhile. Thousands, so no attribute is assigned for each.
        for _ in range(len(self._events)):
            event = taken()
            if isinstance(event, EndedRequest):
                answered, size, seconds, again, sent, received = event
                elements += answered
                if size:
                    retries += again
                    request_bytes += sent
                    response_bytes += received
                    sizes[size] += 1
                    if seconds:
                        latencies[_bucket_of(seconds)] += 1
            elif isinstance(event, FailedElements):
                sample.failures += event.elements
                self.history.failed(event.kind, event.message, event.elements, at)
            elif len(self.history.models) < _MOST_MODELS and event not in self.history.models:
                self.history.models.append(event)
        sample.elements, sample.retries, sample.requests = elements, retries, sizes.total()
        sample.request_bytes, sample.response_bytes = request_bytes, response_bytes

    def _read_endpoints(self, sample: Sample, now: float) -> None:
        before, self._observed = self._observed, {}
        queues = []
        for endpoints in ENDPOINT_SETS.values():
            servers = endpoints.endpoints
            if len(self.history.servers) < _MOST_MODELS:
                self.history.servers[f"{endpoints.model_name} on {endpoints}"] = None
            sample.in_flight += sum(server.in_flight for server in servers)
            limit = sum(server.limit.limit for server in servers)
            limit = limit if endpoints.limit is None else min(limit, endpoints.limit.limit)
            sample.limit = (sample.limit or 0.0) + limit
            sample.waiting += len(endpoints.waiting_for_admission)
            sample.unhealthy += sum(not server.is_healthy for server in servers)
            for server in servers:
                times = server.statistics.observed
                if times is None:
                    continue
                seen = before.get(id(server))
                seen_at = seen[2] if seen is not None and seen[1] is times else now
                self._observed[id(server)] = server, times, seen_at
                if now < seen_at + server.statistics.valid_seconds:
                    queues.append(times.queue_seconds)
        sample.queue_seconds = sum(queues) / len(queues) if queues else None

    def _read_connections(self, sample: Sample) -> None:
        pools = {id(pool): pool for pool in _pools_now()}
        gone = {key: pool for key, (pool, _) in self._pools.items() if key not in pools}
        before, self._pools = self._pools, {}
        for key, pool in (*pools.items(), *gone.items()):
            figures = pool.statistics()
            sample.opened += figures.opened - (before[key][1] if key in before else 0)
            # One that was closed since is read a last time.
            if key in pools:
                sample.active += figures.active
                sample.idle += figures.idle
                self._pools[key] = pool, figures.opened


def _pools_now() -> list[ConnectionPool]:
    return [session_pool(session) for session in SESSIONS.values()]


def _bucket_of(seconds: float) -> int:
    return max(math.ceil(math.log(seconds) * _LOG_FACTOR + _LOG_OFFSET), 0)


def quantile(counts: Mapping[int, int], q: float) -> int | None:
    """The value that a share ``q`` of those counted does not exceed; None where there are none."""
    left = q * sum(counts.values())
    value = None
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            break
    return value


def spread(samples: Iterable[Sample], cells: int, seconds: float, until: float) -> Sequence[Sample | None]:
    """The ``seconds`` up to ``until`` in so many samples of equal length, None where nothing was sampled.

    Cells begin at multiples of their length, so that a picture moves by whole cells.
    """
    length = seconds / cells
    last = math.floor(until / length)
    found: list[Sample | None] = [None] * cells
    for sample in samples:
        index = cells - 1 - (last - math.floor(sample.start / length))
        if 0 <= index < cells:
            cell = found[index]
            if cell is None:
                cell = found[index] = Sample(start=sample.start)
            cell.add(sample)
    return found

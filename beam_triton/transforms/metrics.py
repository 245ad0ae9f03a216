"""Beam metrics of the namespace ``beam_triton``, and the latency buckets among them.

Metrics are written on the bundle's thread only: on the DirectRunner, a counter incremented on another thread
vanishes without a word (measured: 0 of 5).

A distribution metric of Beam keeps sum, count, minimum and maximum: no percentile comes out of it. Counts per
bucket do add up across threads, workers and machines, so a request's latency is counted in a bucket, and
percentiles are read from the sums. Bucket 0 ends at 0.1 ms and the last but one at 600 s; between them the
bounds grow by a constant factor of `GROWTH`, about 1.51, and the last bucket holds all longer latencies. 40
buckets over nearly seven decades put a percentile within a factor of 1.23 (half a bucket) of the truth; a run
uses a dozen of them, so that a metrics service shows a dozen counters, not hundreds.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import inf
from typing import Any
from weakref import WeakSet

from apache_beam.io.components.adaptive_throttler import ThrottlingSignaler
from apache_beam.metrics import Metrics

from beam_triton.compression import compress
from beam_triton.dispatch.call import CallRecord
from beam_triton.dispatch.channel import Channel
from beam_triton.dispatch.dispatcher import Dispatcher
from beam_triton.dispatch.endpoints import Totals
from beam_triton.transport.event_stream import EventStream
from beam_triton.transport.reactor import current_reactor

NAMESPACE = "beam_triton"

# Writing every counter for every request would cost as much as a small request's head.
_FLUSH_SECONDS = 1.0

# What is known of a bundle that lasts as long is written at its end.
_LONG_BUNDLE_SECONDS = 0.1
_SAMPLE_BYTES = 16 * 1024
# The worker, a request and an answer.
_SEEN_ONCE = 3

FIRST_BOUND_SECONDS = 0.0001
LAST_BOUND_SECONDS = 600.0
BUCKETS = 40
GROWTH = (LAST_BOUND_SECONDS / FIRST_BOUND_SECONDS) ** (1 / (BUCKETS - 2))

COUNTER_PREFIX = "request_latency_bucket_"

_COUNTER_NAMES = tuple(f"{COUNTER_PREFIX}{index:02d}" for index in range(BUCKETS))
_UPPER_BOUNDS = (*(FIRST_BOUND_SECONDS * GROWTH**step for step in range(BUCKETS - 2)), LAST_BOUND_SECONDS)


class InferenceMetrics:
    """Collects what happens in plain integers and writes it to Beam about once a second.

    Counters: ``elements``, ``failures``, ``default_values``, ``requests`` (HTTP requests sent, retries
    included), ``retries``, ``split_batches``, ``isolated_requests``, ``connections_opened`` (the control
    plane's included), ``connections_reused``, ``connection_waits``, ``cumulativeThrottlingSeconds``, and the
    latency buckets ``request_latency_bucket_NN``. Distributions: ``batch_size``, ``request_bytes``,
    ``response_bytes``, ``request_latency_milliseconds``. With a ``channel`` whose pool is monitored, the
    gauges ``connections_idle``, ``connections_active`` and ``connections_waiting``, as they are in this
    process.

    Counters of microseconds, by which `beam_triton.explain` finds out where a job's time goes; docs/tuning.md
    says what each counts. Those of the bundle's thread run from here to the last `flush`, with
    ``times_bundle``; by default where there is a ``channel``.

    Of generated text, where an event counts as a token: the counter ``tokens``, and the distributions
    ``time_to_first_token_milliseconds`` and ``tokens_per_second``, that of one request after its first token.
    """

    def __init__(self, channel: Channel | None = None, *, times_bundle: bool | None = None) -> None:
        self._pool = channel.pool if channel is not None else None
        self._totals = channel.endpoints.totals if channel is not None else None
        self._counts: Counter[str] = Counter()
        # What tells where time goes, in seconds where the counter has microseconds, as those are integers.
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._facts: Counter[str] = Counter()
        self._clock: _BundleClock | None = None
        if times_bundle if times_bundle is not None else channel is not None:
            self._clock = _BundleClock()
            self._facts["bundles"] = 1
        self.wants_request = self.wants_answer = False
        if self._totals is not None and len(self._totals.seen) < _SEEN_ONCE:
            self._look_once(self._totals)
        self._throttled_seconds = 0.0
        self._flush_at = time.monotonic() + _FLUSH_SECONDS
        # The signal that Beam's own IOs give to Dataflow's autoscaling.
        self._throttling = ThrottlingSignaler(NAMESPACE)
        self._batch_size = _distribution("batch_size")
        self._request_bytes = _distribution("request_bytes")
        self._response_bytes = _distribution("response_bytes")
        self._latency = _distribution("request_latency_milliseconds")

    def _look_once(self, totals: Totals) -> None:
        seen = totals.seen
        if "worker" not in seen:
            seen.add("worker")
            if _process.begin(totals):
                self._facts["workers"] = 1
        self.wants_request, self.wants_answer = "request" not in seen, "answer" not in seen

    def count(self, name: str, increase: int = 1) -> None:
        """Add to a counter."""
        self._counts[name] += increase

    def took(self, name: str, seconds: float) -> None:
        """Add to a counter of microseconds."""
        self._seconds[name] += seconds

    def throttled(self, seconds: float) -> None:
        """Add time in which an overloaded or unhealthy server held the bundle up."""
        self._throttled_seconds += seconds

    def take_waits(self, dispatcher: Dispatcher[Any]) -> None:
        """Add the time that the bundle has waited for a slot, and for an overloaded or unhealthy server."""
        if dispatcher.throttled_seconds:
            self.throttled(dispatcher.throttled_seconds)
            dispatcher.throttled_seconds = 0.0
        if dispatcher.slot_seconds:
            self.took("slot_wait_microseconds", dispatcher.slot_seconds)
            dispatcher.slot_seconds = 0.0

    def bundle_drained(self, batches: int, limit: int, *, early: int = 0, pads: bool) -> None:
        """A bundle's last ``batches`` leave though they hold less than the ``limit``, as others did ``early``
        for the bounds of what is buffered. Those beside each other differ in their elements' shapes, for
        which padding is no remedy where the job ``pads`` already."""
        self._facts["unfilled_batches"] += batches + early
        if not pads:
            self._facts["unfilled_for_shape"] += early + max(0, batches - 1)
        if batches and limit:
            self._facts["limited_batches"] += 1
            self._facts["batch_limits"] += limit

    def request_ended(self, batch_size: int, record: CallRecord) -> None:
        """Add a call's record, whatever its outcome."""
        counts = self._counts
        counts["requests"] += record.attempts
        counts["connections_reused"] += record.connections_reused
        # Of most requests these are 0; a look costs less than an addition.
        if record.retries:
            counts["retries"] += record.retries
        if record.connections_opened:
            counts["connections_opened"] += record.connections_opened
        if record.connection_waits:
            counts["connection_waits"] += record.connection_waits
        if record.shared_memory_requests:
            counts["shared_memory_requests"] += record.shared_memory_requests
        seconds = self._seconds
        if record.queued_seconds:
            seconds["admission_wait_microseconds"] += record.queued_seconds
        if record.has_joined:
            return
        self._batch_size.update(batch_size + record.joined_rows)
        self._request_bytes.update(record.request_bytes)
        if record.response_bytes:
            self._response_bytes.update(record.response_bytes)
            self._latency.update(round(record.latency_seconds * 1000))
            counts[bucket_counter(bucket_of(record.latency_seconds))] += 1
            if record.connecting_seconds:
                seconds["connecting_microseconds"] += record.connecting_seconds
            seconds["answer_microseconds"] += record.latency_seconds - record.connecting_seconds
            seconds["answer_busy_microseconds"] += record.busy_seconds
            seconds["decoding_microseconds"] += record.decoding_seconds
            if record.unasked_compression:
                self._facts["unasked_compressed_answers"] += 1
            elif record.asked_compression:
                self._facts["compressed_answers"] += 1
        if time.monotonic() >= self._flush_at:
            self.flush()

    def sample(self, kind: str, parts: Sequence[Any]) -> None:
        """Find out how well the bytes of a "request", or of an "answer", compress: once a process, as it
        takes a millisecond, while ``wants_request`` or ``wants_answer``."""
        assert self._totals is not None
        self._totals.seen.add(kind)
        self._look_once(self._totals)
        size, taken = 0, []
        for part in parts:
            taken.append(memoryview(part).cast("B")[: _SAMPLE_BYTES - size])
            size += len(taken[-1])
        self._facts[f"sampled_{kind}_bytes"] += size
        self._facts[f"sampled_{kind}_compressed_bytes"] += len(compress(taken, "gzip"))

    def stream_ended(self, stream: EventStream, tokens: int) -> None:
        """Add the ``tokens`` of one request, at least one."""
        seconds = stream.last_at - stream.first_at
        self._counts["tokens"] += tokens
        waited = Metrics.distribution(NAMESPACE, "time_to_first_token_milliseconds")
        waited.update(round((stream.first_at - stream.sent_at) * 1000))
        if seconds > 0:
            rate = Metrics.distribution(NAMESPACE, "tokens_per_second")
            rate.update(round((tokens - 1) / seconds))

    def flush(self) -> None:
        """Write what has been collected."""
        self._flush_at = time.monotonic() + _FLUSH_SECONDS
        # Counters are integers: a fraction of a second stays here until a whole one has come together.
        whole_seconds = int(self._throttled_seconds)
        self._throttled_seconds -= whole_seconds
        if whole_seconds:
            self._throttling.signal_throttled(whole_seconds)
        if self._pool is not None:
            self._counts["connections_opened"] += self._pool.take_uncounted_opened()
            if self._pool.has_faster:
                _distribution("round_trip_microseconds").update(round(self._pool.take_round_trip() * 1e6))
        self._flush_facts()
        for name, value in self._counts.items():
            if value:
                _counter(name).inc(value)
        self._counts.clear()
        if self._pool is not None and self._pool.config.monitoring_enabled:
            figures = self._pool.statistics()
            Metrics.gauge(NAMESPACE, "connections_idle").set(figures.idle)
            Metrics.gauge(NAMESPACE, "connections_active").set(figures.active)
            Metrics.gauge(NAMESPACE, "connections_waiting").set(figures.waiting)

    def _flush_facts(self) -> None:
        """Write where time went, or leave it to a later bundle, if this one is one of many."""
        facts, totals, lasted_seconds = self._facts, self._totals, _LONG_BUNDLE_SECONDS
        if self._clock is not None:
            lasted_seconds = self._clock.read(self._seconds)
        for name, time_seconds in self._seconds.items():
            facts[name] += round(time_seconds * 1e6)
        self._seconds.clear()
        if totals is None:
            self._counts.update(facts)
        else:
            totals.add(facts)
            if lasted_seconds >= _LONG_BUNDLE_SECONDS or self._flush_at - _FLUSH_SECONDS >= totals.due_at:
                self._counts.update(totals.take())
        facts.clear()


@lru_cache(maxsize=256)
def _counter(name: str) -> Any:
    """A counter of Beam's: it counts for the step whose bundle the calling thread is in."""
    return Metrics.counter(NAMESPACE, name)


@lru_cache(maxsize=256)
def _distribution(name: str) -> Any:
    """The same of a distribution."""
    return Metrics.distribution(NAMESPACE, name)


class _BundleClock:
    """How long a bundle takes, how much of that its thread computes and waits; and its process, once."""

    def __init__(self) -> None:
        self._reactor = current_reactor()
        self._at, self._cpu, self._waited = self._now()
        self._begun_at = self._at

    def _now(self) -> tuple[float, float, float]:
        return time.monotonic(), time.thread_time(), self._reactor.waited_seconds

    def read(self, seconds: dict[str, float]) -> float:
        """Add what has passed since the last time; gives the seconds since the beginning."""
        at, cpu, waited = self._now()
        seconds["bundle_microseconds"] += at - self._at
        # Of another thread, where a caller that is no runner ends the bundle there: it may say anything.
        seconds["bundle_cpu_microseconds"] += min(max(0.0, cpu - self._cpu), at - self._at)
        seconds["bundle_wait_microseconds"] += waited - self._waited
        self._at, self._cpu, self._waited = at, cpu, waited
        _process.read(at, seconds)
        return at - self._begun_at


class _ProcessClock:
    """What a process does from a job's first bundle on; each second is counted by one bundle."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin as a new process."""
        self._lock = threading.Lock()
        self._models: WeakSet[Totals] = WeakSet()
        self._at, self._cpu = time.monotonic(), time.process_time()

    def begin(self, totals: Totals) -> bool:
        """Forget what was before this model's first bundle; whether it is the process's only model, so that a
        process with several counts as one worker."""
        with self._lock:
            self._at, self._cpu = time.monotonic(), time.process_time()
            is_first = not self._models
            self._models.add(totals)
            return is_first

    def read(self, now: float, seconds: dict[str, float]) -> None:
        """Add what has passed since any bundle of this process read it."""
        with self._lock:
            if now > self._at:
                cpu = time.process_time()
                seconds["worker_microseconds"] += now - self._at
                seconds["worker_cpu_microseconds"] += cpu - self._cpu
                self._at, self._cpu = now, cpu


_process = _ProcessClock()
if hasattr(os, "register_at_fork"):
    # Its lock may have been held.
    os.register_at_fork(after_in_child=_process.forget)


def bucket_of(seconds: float) -> int:
    """The bucket that counts a latency of ``seconds``; a bound belongs to the bucket below it."""
    return bisect_left(_UPPER_BOUNDS, seconds)


def bucket_bounds(index: int) -> tuple[float, float]:
    """Lower (excluded, but for 0) and upper (included) bound of a bucket, in seconds.

    The last bucket's upper bound is infinite. Raises IndexError for an index that is no bucket.
    """
    if not 0 <= index < BUCKETS:
        raise IndexError(f"latency buckets are numbered 0 to {BUCKETS - 1}, not {index}")
    lower = _UPPER_BOUNDS[index - 1] if index else 0.0
    return lower, _UPPER_BOUNDS[index] if index < len(_UPPER_BOUNDS) else inf


def bucket_counter(index: int) -> str:
    """The name of the Beam counter that holds a bucket's count."""
    return _COUNTER_NAMES[index]


def bucket_of_counter(name: str) -> int | None:
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
    lower, upper = bucket_bounds(index)
    if upper == inf:
        upper = maximum_seconds if lower < maximum_seconds < inf else lower
    if lower == 0.0:
        return upper * share
    return float(lower * (upper / lower) ** share)

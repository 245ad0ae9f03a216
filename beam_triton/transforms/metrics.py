"""Beam metrics of the namespace ``beam_triton``, written on the bundle's thread only."""

from __future__ import annotations

import time
from collections import Counter

from apache_beam.io.components.adaptive_throttler import ThrottlingSignaler
from apache_beam.metrics import Metrics

from beam_triton.dispatch.call_options import CallRecord
from beam_triton.transforms.latency_histogram import counter_name, index_of
from beam_triton.transport.pool import ConnectionPool

NAMESPACE = "beam_triton"

# Writing every counter for every request would cost as much as a small request's head.
_FLUSH_SECONDS = 1.0


class InferenceMetrics:
    """Collects what happens in plain integers and writes it to Beam about once a second.

    Counters: ``elements``, ``failures``, ``default_values``, ``requests`` (HTTP requests sent, retries
    included), ``retries``, ``split_batches``, ``connections_opened`` (those that asked for the model, before
    the bundle, among them), ``connections_reused``, ``connection_waits``, ``cumulativeThrottlingSeconds``,
    and the latency buckets of `beam_triton.transforms.latency_histogram`. Distributions: ``batch_size``,
    ``request_bytes``, ``response_bytes``, ``request_latency_milliseconds``. With a ``pool`` whose monitoring
    is enabled, the gauges ``connections_idle``, ``connections_active`` and ``connections_waiting``, as they
    are in this process.
    """

    def __init__(self, pool: ConnectionPool | None = None) -> None:
        self._pool = pool
        self._counts: Counter[str] = Counter()
        self._throttled_seconds = 0.0
        self._flush_at = 0.0
        # What Beam's own IOs tell Dataflow's autoscaling with.
        self._throttling = ThrottlingSignaler(NAMESPACE)
        self._batch_size = Metrics.distribution(NAMESPACE, "batch_size")
        self._request_bytes = Metrics.distribution(NAMESPACE, "request_bytes")
        self._response_bytes = Metrics.distribution(NAMESPACE, "response_bytes")
        self._latency = Metrics.distribution(NAMESPACE, "request_latency_milliseconds")

    def count(self, name: str, increase: int = 1) -> None:
        """Add to a counter."""
        self._counts[name] += increase

    def throttled(self, seconds: float) -> None:
        """Add time in which an overloaded or sick server held the bundle up."""
        self._throttled_seconds += seconds

    def request_ended(self, batch_size: int, record: CallRecord) -> None:
        """Take up what a call's record says, whatever its outcome."""
        counts = self._counts
        counts["requests"] += record.attempts
        counts["retries"] += record.retries
        counts["connections_opened"] += record.connections_opened
        counts["connections_reused"] += record.connections_reused
        counts["connection_waits"] += record.connection_waits
        self._batch_size.update(batch_size)
        self._request_bytes.update(record.request_bytes)
        if record.response_bytes:
            self._response_bytes.update(record.response_bytes)
            self._latency.update(round(record.latency_seconds * 1000))
            counts[counter_name(index_of(record.latency_seconds))] += 1
        if time.monotonic() >= self._flush_at:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected."""
        self._flush_at = time.monotonic() + _FLUSH_SECONDS
        # Counters are integral: a part of a second stays here until it has become a whole one.
        whole_seconds = int(self._throttled_seconds)
        self._throttled_seconds -= whole_seconds
        if whole_seconds:
            self._throttling.signal_throttled(whole_seconds)
        if self._pool is not None:
            self._counts["connections_opened"] += self._pool.take_uncounted_opened()
        for name, value in self._counts.items():
            if value:
                Metrics.counter(NAMESPACE, name).inc(value)
        self._counts.clear()
        if self._pool is not None and self._pool.config.monitoring_enabled:
            figures = self._pool.statistics()
            Metrics.gauge(NAMESPACE, "connections_idle").set(figures.idle)
            Metrics.gauge(NAMESPACE, "connections_active").set(figures.active)
            Metrics.gauge(NAMESPACE, "connections_waiting").set(figures.waiting)

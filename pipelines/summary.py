"""What a finished job did, read from its Beam metrics, and the table that shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from apache_beam.metrics.metric import MetricsFilter

from beam_triton.score import METRICS_NAMESPACE as FILES_NAMESPACE
from beam_triton.transforms.metrics import bucket_of_counter, percentile

NAMESPACE = "beam_triton"


@dataclass(frozen=True)
class Summary:
    """Counts of a job. ``latencies`` are requests per latency bucket; seconds are wall-clock time."""

    elements: int
    results: int
    failures: int
    requests: int
    retries: int
    connections_opened: int
    connections_reused: int
    seconds: float
    latencies: dict[int, int] = field(default_factory=dict)
    minimum_latency_seconds: float = 0.0
    maximum_latency_seconds: float = float("inf")

    @classmethod
    def of(cls, metrics: Any, seconds: float) -> Summary:
        """Read ``PipelineResult.metrics()``; steps of the same counter are added up."""
        inference = _counters(metrics, NAMESPACE)
        files = _counters(metrics, FILES_NAMESPACE)
        latencies = {
            index: count
            for name, count in inference.items()
            if (index := bucket_of_counter(name)) is not None
        }
        minimum, maximum = _extremes(metrics, "request_latency_milliseconds")
        return cls(
            elements=files["rows_read"],
            results=files["results_written"],
            failures=files["failures_written"],
            requests=inference["requests"],
            retries=inference["retries"],
            connections_opened=inference["connections_opened"],
            connections_reused=inference["connections_reused"],
            seconds=seconds,
            latencies=latencies,
            minimum_latency_seconds=minimum,
            maximum_latency_seconds=maximum,
        )

    def latency_seconds(self, q: float) -> float | None:
        """The share ``q`` of the answered requests took at most this; None without a request."""
        return percentile(
            self.latencies,
            q,
            minimum_seconds=self.minimum_latency_seconds,
            maximum_seconds=self.maximum_latency_seconds,
        )

    def table(self, output: str, failures: str) -> str:
        """The summary as lines of text; the paths are where results and failures went."""
        scored = max(self.elements, self.results)
        batch = f"{self.results / self.requests:,.1f} elements a request" if self.requests else ""
        if self.retries:
            batch += f", {self.retries:,} of them retries"
        rate = f"{scored / self.seconds:,.0f} elements/s" if self.seconds > 0 else ""
        latency = "   ".join(
            f"{name} {_duration(value)}"
            for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
            if (value := self.latency_seconds(q)) is not None
        )
        reused = f"opened, {self.connections_reused:,} times reused"
        rows = [
            ("elements", f"{self.elements:>12,}", rate),
            ("results", f"{self.results:>12,}", f"in {output}"),
            ("failures", f"{self.failures:>12,}", f"in {failures}" if self.failures else ""),
            ("requests", f"{self.requests:>12,}", batch),
            ("connections", f"{self.connections_opened:>12,}", reused),
            ("latency", "", latency or "no request was answered"),
            ("time", f"{_duration(self.seconds):>12}", ""),
        ]
        return "\n".join(f"  {name:<12}{count:>12}  {note}".rstrip() for name, count, note in rows)


def _duration(seconds: float) -> str:
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _values(metrics: Any, kind: str, namespace: str) -> Iterator[tuple[str, Any]]:
    """Name and value of each metric of a kind; several steps may have one of the same name."""
    for entry in metrics.query(MetricsFilter().with_namespace(namespace))[kind]:
        # Some runners report what is committed, others only what has been attempted.
        value = entry.committed if entry.committed is not None else entry.attempted
        if value is not None:
            yield entry.key.metric.name, value


def _counters(metrics: Any, namespace: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name, value in _values(metrics, "counters", namespace):
        counts[name] += value
    return counts


def _extremes(metrics: Any, wanted: str) -> tuple[float, float]:
    known = [
        value
        for name, value in _values(metrics, "distributions", NAMESPACE)
        if name == wanted and value.count
    ]
    if not known:
        return 0.0, float("inf")
    # The distribution holds whole milliseconds: half of one either way is what it knows.
    low = min(value.min for value in known) / 1000 - 0.0005
    return max(low, 0.0), max(value.max for value in known) / 1000 + 0.0005

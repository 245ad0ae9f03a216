"""What a job shows: a line of progress while it works, and a table of its Beam metrics when it has ended."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from apache_beam.metrics.metric import MetricsFilter

from beam_triton.transforms.metrics import bucket_of_counter, percentile

METRICS_NAMESPACE = "beam_triton_files"
_INFERENCE_NAMESPACE = "beam_triton"


@dataclass
class Progress:
    """Counts of this process, seen at once where Beam's metrics wait for the end of a bundle.

    They are for showing: threads may lose an increment to each other, so nothing is decided by them.
    ``bytes_read`` counts a file's bytes as stored, so that it is comparable to the file's size.
    """

    bytes_read: int = 0
    results: int = 0
    failures: int = 0


PROGRESS = Progress()


class ProgressLine:
    """A context manager; while it is open a thread reports every ``interval_seconds``.

    ``total_bytes`` is the size of all files; once rows have been read their share of it is shown. On a
    terminal one line is written over; elsewhere each report is a line. ``counts_here`` False: the workers are
    other processes, and only the time is shown. An interval of 0 reports nothing.
    """

    def __init__(
        self,
        interval_seconds: float,
        total_bytes: int,
        *,
        counts_here: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self._interval_seconds = interval_seconds
        self._total_bytes = total_bytes
        self._counts_here = counts_here
        self._stream: TextIO = stream if stream is not None else sys.stderr
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._width = 0

    def __enter__(self) -> ProgressLine:
        PROGRESS.bytes_read = PROGRESS.results = PROGRESS.failures = 0
        if self._interval_seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._width:
            self._write("", "\r")

    def _run(self) -> None:
        started_at = before = time.monotonic()
        last = 0
        while not self._ended.wait(self._interval_seconds):
            at, done = time.monotonic(), PROGRESS.results + PROGRESS.failures
            rate = (done - last) / (at - before)
            before, last = at, done
            self._write(self.text(at - started_at, rate), "")

    def text(self, seconds: float, rows_per_second: float) -> str:
        """What is shown after ``seconds``."""
        if not self._counts_here:
            return f"{seconds:5.0f} s  working; other processes count, the summary will have the figures"
        done = PROGRESS.results + PROGRESS.failures
        share = PROGRESS.bytes_read / self._total_bytes if self._total_bytes else 0
        read = f"  {min(share, 1):4.0%} read" if share else ""
        failed = f"  {PROGRESS.failures:,} failed" if PROGRESS.failures else ""
        return f"{seconds:5.0f} s  {done:>11,} rows done  {rows_per_second:>9,.0f}/s{read}{failed}"

    def _write(self, text: str, end: str) -> None:
        if self._stream.isatty():
            text = "\r" + text.ljust(self._width) + end
            self._width = max(self._width, len(text))
        else:
            text += "\n"
        self._stream.write(text)
        self._stream.flush()


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
        files: Counter[str] = Counter()
        inference: Counter[str] = Counter()
        for counts, namespace in ((files, METRICS_NAMESPACE), (inference, _INFERENCE_NAMESPACE)):
            for name, value in _values(metrics, "counters", namespace):
                counts[name] += value
        seen = [
            value
            for name, value in _values(metrics, "distributions", _INFERENCE_NAMESPACE)
            if name == "request_latency_milliseconds" and value.count
        ]
        return cls(
            elements=files["rows_read"],
            results=files["results_written"],
            failures=files["failures_written"],
            requests=inference["requests"],
            retries=inference["retries"],
            connections_opened=inference["connections_opened"],
            connections_reused=inference["connections_reused"],
            seconds=seconds,
            latencies={
                index: count
                for name, count in inference.items()
                if (index := bucket_of_counter(name)) is not None
            },
            # The distribution holds whole milliseconds: half of one either way is what it knows.
            minimum_latency_seconds=max(min((v.min for v in seen), default=0) / 1000 - 0.0005, 0.0),
            maximum_latency_seconds=max((v.max for v in seen), default=float("inf")) / 1000 + 0.0005,
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
        batch = f"{self.results / self.requests:,.1f} elements a request" if self.requests else ""
        retries = f", {self.retries:,} of them retries" if self.retries else ""
        quantiles = {
            name: self.latency_seconds(q) for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
        }
        latency = "   ".join(
            f"{name} {_duration(each)}" for name, each in quantiles.items() if each is not None
        )
        rate = f"{max(self.elements, self.results) / self.seconds:,.0f} elements/s" if self.seconds else ""
        rows = [
            ("elements", f"{self.elements:,}", rate),
            ("results", f"{self.results:,}", f"in {output}"),
            ("failures", f"{self.failures:,}", f"in {failures}" if self.failures else ""),
            ("requests", f"{self.requests:,}", batch + retries),
            (
                "connections",
                f"{self.connections_opened:,}",
                f"opened, {self.connections_reused:,} times reused",
            ),
            ("latency", "", latency or "no request was answered"),
            ("time", _duration(self.seconds), ""),
        ]
        return "\n".join(f"  {name:<12}{count:>12}  {note}".rstrip() for name, count, note in rows)


def _duration(seconds: float) -> str:
    if seconds >= 120:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 0.001 else f"{seconds * 1e6:.0f} µs"


def _values(metrics: Any, kind: str, namespace: str) -> Iterator[tuple[str, Any]]:
    """Name and value of each metric of a kind; several steps may have one of the same name."""
    for entry in metrics.query(MetricsFilter().with_namespace(namespace))[kind]:
        # Some runners report what is committed, others only what has been attempted.
        value = entry.committed if entry.committed is not None else entry.attempted
        if value is not None:
            yield entry.key.metric.name, value

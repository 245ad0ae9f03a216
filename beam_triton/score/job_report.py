"""The reports of a job: lines of progress while it runs, and a table of its Beam metrics at the end."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from apache_beam.metrics.metric import MetricsFilter

from beam_triton.transforms.metrics import NAMESPACE, bucket_of_counter, percentile
from beam_triton.watching.terminal import can_draw
from beam_triton.watching.watch import Watch

METRICS_NAMESPACE = "beam_triton_files"

_REASONS = 3


@dataclass
class Progress:
    """Counts of this process, for display: current where Beam's metrics wait for the end of a bundle.

    ``bytes_read`` are bytes as stored, comparable to a file's size; ``written`` are rows by kind, and
    ``reasons`` the first kinds of failures, each with its first row.
    """

    bytes_read: int = 0
    written: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)

    def begin(self) -> None:
        """Forget an earlier job."""
        self.bytes_read = 0
        self.written.clear()
        self.reasons.clear()

    def failed(self, kind: str, text: str) -> None:
        """Remember the text of a failure, if it is the first one of its kind and one of the first kinds."""
        if len(self.reasons) < _REASONS:
            self.reasons.setdefault(kind, text)


PROGRESS = Progress()


@contextlib.contextmanager
def watched(interval_seconds: float, total_bytes: int, report: str | None) -> Iterator[Watch]:
    """A context in which the job's progress is shown, unless the interval is 0, and ``report`` is written.

    The interval is that of lines, where the terminal is none for a picture; ``total_bytes`` is the size of
    all files.

    Raises:
        ConfigurationError: the report cannot be written.
    """
    draws = interval_seconds > 0 and can_draw(sys.stderr)

    def note() -> str:
        return f"{min(PROGRESS.bytes_read / total_bytes, 1):.0%} read" if total_bytes else ""

    watch = Watch(report, progress_seconds=interval_seconds if draws else 0, note=note, is_transient=True)
    with progress_lines(0 if draws else interval_seconds, total_bytes):
        if draws or report is not None:
            with watch:
                yield watch
        else:
            yield watch


@contextlib.contextmanager
def progress_lines(interval_seconds: float, total_bytes: int, stream: TextIO | None = None) -> Iterator[None]:
    """A context in which a thread reports to ``stream`` (stderr) at an interval, unless that is 0.

    ``total_bytes`` is the size of all files. On a terminal, each report replaces the one before.
    """
    ended = threading.Event()
    PROGRESS.begin()
    arguments = (ended, interval_seconds, total_bytes, stream or sys.stderr)
    thread = threading.Thread(target=_report, args=arguments, name="progress", daemon=True)
    if interval_seconds > 0:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()


def _report(ended: threading.Event, interval_seconds: float, total_bytes: int, stream: TextIO) -> None:
    line = "{:<79}\r" if stream.isatty() else "{}\n"
    started_at = before = time.monotonic()
    last = 0
    while not ended.wait(interval_seconds):
        at, done = time.monotonic(), PROGRESS.written.total()
        text = progress_text(at - started_at, (done - last) / (at - before), total_bytes)
        print(line.format(text), end="", file=stream, flush=True)
        before, last = at, done
    if stream.isatty():
        print(line.format(""), end="", file=stream, flush=True)


def progress_text(seconds: float, rows_per_second: float, total_bytes: int) -> str:
    """The report after ``seconds``; only the time while nothing is counted here."""
    done, failures = PROGRESS.written.total(), PROGRESS.written["failures"]
    if not (done or PROGRESS.bytes_read):
        return f"{seconds:5.0f} s  running"
    read = f"  {min(PROGRESS.bytes_read / total_bytes, 1):4.0%} read" if total_bytes else ""
    failed = f"  {failures:,} failed" if failures else ""
    return f"{seconds:5.0f} s  {done:>11,} rows done  {rows_per_second:>9,.0f}/s{read}{failed}"


def counts_of(metrics: Any) -> Counter[str]:
    """The counters of a ``PipelineResult.metrics()`` by name, those of all steps together."""
    counts: Counter[str] = Counter()
    for namespace in (METRICS_NAMESPACE, NAMESPACE):
        for entry in metrics.query(MetricsFilter().with_namespace(namespace))["counters"]:
            counts[entry.key.metric.name] += entry.result or 0
    return counts


def complaint(counts: Counter[str], max_failures: int | None, failures: str) -> str:
    """What is wrong with a job that has these counts; empty when it is as it should be.

    ``failures`` is the path of the file that has them.
    """
    failed = counts["failures_written"]
    if max_failures is not None and failed > max_failures:
        return f"{failed} rows failed, more than --max_failures={max_failures}"
    if failed and not counts["results_written"]:
        first = "".join(f"{reason}; " for reason in PROGRESS.reasons.values())
        return f"none of {failed} rows has a result: {first}see {failures}"
    return ""


def summary(counts: Counter[str], seconds: float, output: str, failures: str) -> str:
    """A job's counts as a table; the arguments are those of `summary_rows`."""
    rows = summary_rows(counts, seconds, output, failures)
    return "\n".join(f"  {name:<12}{count:>12}  {note}".rstrip() for name, count, note in rows)


def summary_rows(
    counts: Counter[str], seconds: float, output: str, failures: str
) -> list[tuple[str, str, str]]:
    """Name, value and remark of each; ``seconds`` is the job's wall-clock time, the paths are its files'."""
    results, requests, reused = (
        counts["results_written"],
        counts["requests"],
        counts["connections_reused"],
    )
    failed, replay = counts["failures_written"], "; python -m beam_triton replay scores them again"
    rate = max(counts["rows_read"], results) / (seconds or 1)
    batch = f"{results / (requests or 1):,.1f} elements a request, {counts['retries']:,} of them retries"
    buckets = {bucket: n for name, n in counts.items() if (bucket := bucket_of_counter(name)) is not None}
    quantiles = {q: percentile(buckets, q / 100) for q in (50, 95, 99)}
    latency = "   ".join(f"p{q} {each * 1e3:.3g} ms" for q, each in quantiles.items() if each is not None)
    return [
        ("elements", f"{counts['rows_read']:,}", f"{rate:,.0f} elements/s"),
        ("results", f"{results:,}", f"in {output}"),
        ("failures", f"{failed:,}", f"in {failures}{replay if failed else ''}"),
        ("requests", f"{requests:,}", batch),
        ("connections", f"{counts['connections_opened']:,}", f"opened, {reused:,} times reused"),
        ("latency", "", latency or "no request was answered"),
        ("time", f"{seconds:.1f} s", ""),
    ]

"""The summary of a job, from Beam's metrics, and the line of progress while it works."""

from __future__ import annotations

import io
import re
import time
from collections import Counter

import apache_beam as beam
from apache_beam.metrics.metric import Metrics
from apache_beam.testing.test_pipeline import TestPipeline

from beam_triton.score.job_report import (
    PROGRESS,
    complaint,
    counts_of,
    progress_lines,
    progress_text,
    summary,
)
from beam_triton.transforms.metrics import bucket_bounds, bucket_counter, bucket_of


def count(_: None) -> None:
    """Write the metrics that a job's steps write, the same counter in two of them."""
    counts = {"requests": 4, "retries": 1, "connections_opened": 2, "connections_reused": 2}
    for name, value in counts.items():
        Metrics.counter("beam_triton", name).inc(value)
    for milliseconds in (10, 10, 10, 80):
        Metrics.counter("beam_triton", bucket_counter(bucket_of(milliseconds / 1000))).inc()
    for name, value in (("rows_read", 1003), ("results_written", 1000), ("failures_written", 3)):
        Metrics.counter("beam_triton_files", name).inc(value)
    Metrics.counter("somebody_elses", "requests").inc(100)


def test_metrics_of_all_steps_are_added_up() -> None:
    """Latency buckets become percentiles, to the width of a bucket."""
    pipeline = TestPipeline("FnApiRunner")
    _ = pipeline | beam.Create([None]) | "One" >> beam.Map(count)
    _ = pipeline | "Again" >> beam.Create([None]) | "Two" >> beam.Map(count)
    result = pipeline.run()
    result.wait_until_finish()
    counts = counts_of(result.metrics())
    names = ("rows_read", "results_written", "failures_written", "requests", "retries")
    assert [counts[name] for name in names] == [2006, 2000, 6, 8, 2]
    assert (counts["connections_opened"], counts["connections_reused"]) == (4, 4)
    assert counts[bucket_counter(bucket_of(0.01))] == 6
    table = summary(counts, 2.0, "r", "f")
    for name, seconds in (("p50", 0.01), ("p99", 0.08)):
        shortest, longest = bucket_bounds(bucket_of(seconds))
        found = re.search(rf"{name} ([\d.]+) ms", table)
        assert found is not None
        assert shortest <= float(found[1]) / 1000 <= longest


def test_the_table_shows_counts_rates_and_latencies() -> None:
    """Counts with thousands apart, rates, percentiles with units, and where the output is."""
    counts = {
        "rows_read": 1_000_010,
        "results_written": 1_000_000,
        "failures_written": 10,
        "requests": 7_900,
        "retries": 3,
        "connections_opened": 16,
        "connections_reused": 7_884,
        bucket_counter(bucket_of(0.012)): 7_900,
    }
    lines = summary(Counter(counts), 20.0, "out/r.jsonl", "out/f.jsonl").splitlines()
    latencies = lines.pop(5)
    assert lines == [
        "  elements       1,000,010  50,000 elements/s",
        "  results        1,000,000  in out/r.jsonl",
        "  failures              10  in out/f.jsonl; python -m beam_triton replay scores them again",
        "  requests           7,900  126.6 elements a request, 3 of them retries",
        "  connections           16  opened, 7,884 times reused",
        "  time              20.0 s",
    ]
    assert re.fullmatch(r"  latency {19}p50 [\d.]+ ms   p95 [\d.]+ ms   p99 [\d.]+ ms", latencies), latencies


def test_the_table_of_a_job_without_a_request() -> None:
    """Nothing is divided by nothing."""
    table = summary(Counter(), 0.0, "r", "f")
    assert "no request was answered" in table


def test_lines_show_the_progress_of_the_job() -> None:
    """Rows done, their rate, the share of the bytes, and failures once there are some."""
    stream = io.StringIO()
    with progress_lines(0.02, total_bytes=1000, stream=stream):
        PROGRESS.bytes_read = 250
        assert "failed" not in progress_text(1.0, 10.0, 1000)
        PROGRESS.written.update(results=1200, failures=3)
        shown = progress_text(12.0, 100.4, 1000)
        assert shown == "   12 s        1,203 rows done        100/s   25% read  3 failed"
        deadline = time.monotonic() + 10
        while "rows done" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    written = stream.getvalue()
    assert "1,203 rows done" in written
    time.sleep(0.1)
    assert stream.getvalue() == written


def test_no_counts_are_shown_while_there_are_none() -> None:
    """Zero rows done would be wrong where other processes do the work."""
    with progress_lines(0, total_bytes=1000):
        assert progress_text(3.0, 0.0, 1000) == "    3 s  running"


def test_an_interval_of_zero_reports_nothing() -> None:
    """Nothing is written, and no thread runs."""
    stream = io.StringIO()
    with progress_lines(0, total_bytes=1000, stream=stream):
        time.sleep(0.05)
    assert stream.getvalue() == ""


def test_a_job_without_a_result_has_failed() -> None:
    """Rows, and none of them scored: the first reasons, each once, and where all of them are."""
    PROGRESS.begin()
    for row in range(5):
        PROGRESS.failed("RowError: no number", f"a.csv, row {row}: RowError: no number")
    PROGRESS.failed("E: other", "a.csv, row 9: E: other")
    counts = Counter({"rows_read": 6, "failures_written": 6})
    assert complaint(counts, None, "out/f.jsonl") == (
        "none of 6 rows has a result: a.csv, row 0: RowError: no number; a.csv, row 9: E: other; "
        "see out/f.jsonl"
    )
    assert "more than --max_failures=5" in complaint(counts, 5, "f")
    PROGRESS.begin()
    assert complaint(counts, None, "f") == "none of 6 rows has a result: see f"
    assert complaint(counts + Counter({"results_written": 1}), None, "f") == ""
    assert complaint(Counter(), 0, "f") == ""

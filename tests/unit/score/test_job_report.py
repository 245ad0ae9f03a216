"""The summary of a job, from Beam's metrics, and the line of progress while it works."""

from __future__ import annotations

import io
import time

import apache_beam as beam
from apache_beam.metrics.metric import Metrics
from apache_beam.testing.test_pipeline import TestPipeline

from beam_triton.score.job_report import PROGRESS, ProgressLine, Summary
from beam_triton.transforms.metrics import bucket_counter, bucket_of


def count(_: None) -> None:
    """Write the metrics that a job's steps write, the same counter in two of them."""
    counts = {"requests": 4, "retries": 1, "connections_opened": 2, "connections_reused": 2}
    for name, value in counts.items():
        Metrics.counter("beam_triton", name).inc(value)
    for milliseconds in (10, 10, 10, 80):
        Metrics.counter("beam_triton", bucket_counter(bucket_of(milliseconds / 1000))).inc()
        Metrics.distribution("beam_triton", "request_latency_milliseconds").update(milliseconds)
    for name, value in (("rows_read", 1003), ("results_written", 1000), ("failures_written", 3)):
        Metrics.counter("beam_triton_files", name).inc(value)
    Metrics.counter("somebody_elses", "requests").inc(100)


def test_metrics_of_all_steps_are_added_up() -> None:
    """Latency buckets become percentiles, within what the distribution has seen."""
    pipeline = TestPipeline("FnApiRunner")
    _ = pipeline | beam.Create([None]) | "One" >> beam.Map(count)
    _ = pipeline | "Again" >> beam.Create([None]) | "Two" >> beam.Map(count)
    result = pipeline.run()
    result.wait_until_finish()
    summary = Summary.of(result.metrics(), seconds=2.0)
    assert (summary.elements, summary.results, summary.failures) == (2006, 2000, 6)
    assert (summary.requests, summary.retries) == (8, 2)
    assert (summary.connections_opened, summary.connections_reused) == (4, 4)
    median, slowest = summary.latency_seconds(0.5), summary.latency_seconds(0.99)
    assert median is not None
    assert slowest is not None
    assert 0.0095 <= median <= 0.0125
    assert 0.06 <= slowest <= 0.0805


def test_the_table_shows_counts_rates_and_latencies() -> None:
    """Counts with thousands apart, rates, percentiles with units, and where the output is."""
    summary = Summary(
        elements=1_000_010,
        results=1_000_000,
        failures=10,
        requests=7_900,
        retries=3,
        connections_opened=16,
        connections_reused=7_884,
        seconds=20.0,
        latencies={bucket_of(0.012): 7_900},
        minimum_latency_seconds=0.012,
        maximum_latency_seconds=0.012,
    )
    assert summary.table("out/r.jsonl", "out/f.jsonl").splitlines() == [
        "  elements       1,000,010  50,000 elements/s",
        "  results        1,000,000  in out/r.jsonl",
        "  failures              10  in out/f.jsonl",
        "  requests           7,900  126.6 elements a request, 3 of them retries",
        "  connections           16  opened, 7,884 times reused",
        "  latency                   p50 12 ms   p95 12 ms   p99 12 ms",
        "  time              20.0 s",
    ]


def test_the_table_of_a_job_without_a_request() -> None:
    """Nothing is divided by nothing."""
    table = Summary(0, 0, 0, 0, 0, 0, 0, 0.0).table("r", "f")
    assert "no request was answered" in table


def test_lines_say_how_far_the_job_is() -> None:
    """Rows done, their rate, the share of the bytes, and failures once there are some."""
    stream = io.StringIO()
    with ProgressLine(0.02, total_bytes=1000, stream=stream) as line:
        assert "failed" not in line.text(1.0, 10.0)
        PROGRESS.results, PROGRESS.failures, PROGRESS.bytes_read = 1200, 3, 250
        assert line.text(12.0, 100.4) == "   12 s        1,203 rows done        100/s   25% read  3 failed"
        deadline = time.monotonic() + 10
        while "rows done" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    written = stream.getvalue()
    assert "1,203 rows done" in written
    time.sleep(0.1)
    assert stream.getvalue() == written


def test_progress_shows_no_counts_of_other_processes() -> None:
    """Zero rows done would be a lie."""
    assert "rows" not in ProgressLine(1, 1000, counts_here=False).text(3.0, 0.0)


def test_an_interval_of_zero_reports_nothing() -> None:
    """Nothing is written, and no thread runs."""
    stream = io.StringIO()
    with ProgressLine(0, total_bytes=1000, stream=stream):
        time.sleep(0.05)
    assert stream.getvalue() == ""

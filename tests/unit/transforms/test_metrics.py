"""What reaches Beam's metrics, and in which units."""

from __future__ import annotations

from collections.abc import Callable

import apache_beam as beam

from beam_triton.dispatch.call_options import CallRecord
from beam_triton.transforms.latency_histogram import counter_name, index_of
from beam_triton.transforms.metrics import InferenceMetrics
from tests.support.pipelines import Run, run


def written_by(write: Callable[[InferenceMetrics], None]) -> Run:
    """The metrics of a pipeline that does this on a bundle's thread."""

    def work(_: int) -> None:
        metrics = InferenceMetrics()
        write(metrics)
        metrics.flush()

    def build(pipeline: beam.Pipeline) -> dict[str, beam.PCollection[None]]:
        _ = pipeline | beam.Create([0]) | beam.Map(work)
        return {}

    return run(build)


def test_parts_of_throttled_seconds_add_up() -> None:
    """Beam's counter is integral: parts of a second wait until they are a whole one."""

    def write(metrics: InferenceMetrics) -> None:
        for _ in range(5):
            metrics.throttled(0.7)
            metrics.flush()

    assert written_by(write).counters == {"cumulativeThrottlingSeconds": 3}


def test_a_record_of_a_request() -> None:
    """Attempts are requests; sizes and the latency are distributions, the latency a bucket as well."""
    record = CallRecord(
        attempts=3,
        retries=2,
        connections_opened=1,
        connections_reused=2,
        connection_waits=1,
        request_bytes=1000,
        response_bytes=50,
        latency_seconds=0.0256,
    )

    def write(metrics: InferenceMetrics) -> None:
        metrics.request_ended(8, record)
        metrics.request_ended(2, record)

    found = written_by(write)
    assert found.counters == {
        "requests": 6,
        "retries": 4,
        "connections_opened": 2,
        "connections_reused": 4,
        "connection_waits": 2,
        counter_name(index_of(0.0256)): 2,
    }
    assert (found.distributions["batch_size"].sum, found.distributions["batch_size"].max) == (10, 8)
    assert found.distributions["request_bytes"].sum == 2000
    assert found.distributions["response_bytes"].sum == 100
    assert found.distributions["request_latency_milliseconds"].max == 26


def test_a_request_without_an_answer() -> None:
    """It has no latency and no response: only what was sent counts."""
    found = written_by(lambda metrics: metrics.request_ended(1, CallRecord(attempts=1, request_bytes=10)))
    assert found.counters == {"requests": 1}
    assert sorted(found.distributions) == ["batch_size", "request_bytes"]


def test_nothing_is_written_of_nothing() -> None:
    """Counters that never moved do not appear."""
    assert written_by(lambda metrics: metrics.count("failures", 0)).counters == {}

"""What reaches Beam's metrics, in which units, and the buckets for latency percentiles."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from math import inf

import apache_beam as beam
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.dispatch.call import CallRecord
from beam_triton.transforms import metrics as histogram
from beam_triton.transforms.metrics import InferenceMetrics, bucket_counter, bucket_of
from tests.support.dispatching import open_channel
from tests.support.pipelines import Run, run


def written_by(write: Callable[[InferenceMetrics], None]) -> Run:
    """The metrics of a pipeline that runs ``write`` on a bundle's thread."""

    def work(_: int) -> None:
        metrics = InferenceMetrics()
        write(metrics)
        metrics.flush()

    def build(pipeline: beam.Pipeline) -> dict[str, beam.PCollection[None]]:
        _ = pipeline | beam.Create([0]) | beam.Map(work)
        return {}

    return run(build)


def test_fractions_of_throttled_seconds_add_up() -> None:
    """Beam's counter is integral: fractions of a second accumulate to whole ones."""

    def write(metrics: InferenceMetrics) -> None:
        for _ in range(5):
            metrics.throttled(0.7)
            metrics.flush()

    assert written_by(write).counters == {"cumulativeThrottlingSeconds": 3}


def test_request_record_becomes_counters_and_distributions() -> None:
    """Attempts are requests; sizes and latency are distributions, and the latency also counts in a bucket."""
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
    record.connecting_seconds, record.queued_seconds, record.unasked_compression = 0.005, 0.25, True

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
        bucket_counter(bucket_of(0.0256)): 2,
        "admission_wait_microseconds": 500_000,
        "connecting_microseconds": 10_000,
        "answer_microseconds": 41_200,
        "unasked_compressed_answers": 2,
    }
    assert (found.distributions["batch_size"].sum, found.distributions["batch_size"].max) == (10, 8)
    assert found.distributions["request_bytes"].sum == 2000
    assert found.distributions["response_bytes"].sum == 100
    assert found.distributions["request_latency_milliseconds"].max == 26


def test_request_without_an_answer_has_no_latency() -> None:
    """Without a response only what was sent is counted."""
    found = written_by(lambda metrics: metrics.request_ended(1, CallRecord(attempts=1, request_bytes=10)))
    assert found.counters == {"requests": 1}
    assert sorted(found.distributions) == ["batch_size", "request_bytes"]


def test_process_with_two_models_is_one_worker() -> None:
    """The others' share of a server is reckoned from how many processes have asked it."""

    def write(_: InferenceMetrics) -> None:
        channels = [open_channel(f"http://localhost:{port}") for port in (1, 2)]
        for channel in channels:
            metrics = InferenceMetrics(channel, times_bundle=False)
            metrics.count("elements")
            metrics.flush()
        for channel in channels:
            channel.close()

    found = written_by(write).counters
    assert found["elements"] == 2
    # None, where models of another test are still open.
    assert found.get("workers", 0) <= 1


def test_bundle_that_ends_on_another_thread_has_no_more_cpu_than_time() -> None:
    """That thread's CPU time is of all that it has ever done."""

    def write(_: InferenceMetrics) -> None:
        made: list[InferenceMetrics] = []
        thread = threading.Thread(target=lambda: made.append(InferenceMetrics(times_bundle=True)))
        thread.start()
        thread.join()
        while time.thread_time() < 0.5:
            pass
        made[0].flush()

    found = written_by(write).counters
    assert found["bundle_cpu_microseconds"] <= found["bundle_microseconds"]


def test_zero_counters_are_not_written() -> None:
    """Counters that never moved do not appear."""
    assert written_by(lambda metrics: metrics.count("failures", 0)).counters == {}


def test_forty_buckets_cover_a_tenth_of_a_millisecond_to_ten_minutes() -> None:
    """They reach from 0.1 ms to 600 s without a gap, each at most 1.52 times as wide as the previous one."""
    edges = [histogram.bucket_bounds(index) for index in range(histogram.BUCKETS)]
    assert edges[0] == (0.0, 0.0001)
    assert edges[-1] == (600.0, inf)
    assert all(left[1] == right[0] for left, right in pairwise(edges))
    assert all(1 < upper / lower < 1.52 for lower, upper in edges[1:-1])


@given(st.floats(min_value=0.0, max_value=1e6))
def test_latency_is_counted_between_its_buckets_bounds(seconds: float) -> None:
    """``bucket_of`` and ``bucket_bounds`` agree, upper bounds included."""
    lower, upper = histogram.bucket_bounds(histogram.bucket_of(seconds))
    assert lower < seconds <= upper or (lower == 0.0 and seconds <= upper)


@pytest.mark.parametrize("index", [-1, histogram.BUCKETS])
def test_index_outside_the_buckets_is_rejected(index: int) -> None:
    """A negative index must not wrap around to the last bucket."""
    with pytest.raises(IndexError, match=str(index)):
        histogram.bucket_bounds(index)


def test_counter_names_map_back_to_their_bucket() -> None:
    """Names and indexes are inverse, and other counters are recognized as such."""
    names = [histogram.bucket_counter(index) for index in range(histogram.BUCKETS)]
    assert len(set(names)) == histogram.BUCKETS
    assert [histogram.bucket_of_counter(name) for name in names] == list(range(histogram.BUCKETS))
    for other in ("requests", "request_latency_bucket_", "request_latency_bucket_99", "bucket_01"):
        assert histogram.bucket_of_counter(other) is None


@pytest.mark.parametrize("q", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("median_seconds", [0.0007, 0.02, 3.0])
def test_percentiles_from_buckets_are_within_10_percent(q: float, median_seconds: float) -> None:
    """For log-normal latencies the percentile from buckets is within 10 % of the sorted sample's own."""
    generator = random.Random(7)
    latencies = sorted(median_seconds * generator.lognormvariate(0, 0.6) for _ in range(20_000))
    counts = Counter(histogram.bucket_of(latency) for latency in latencies)
    exact = latencies[int(q * len(latencies)) - 1]
    found = histogram.percentile(counts, q)
    assert found is not None
    assert found == pytest.approx(exact, rel=0.10)


def test_known_extremes_bound_the_percentiles() -> None:
    """The percentiles of a single request are its own latency if minimum and maximum are given."""
    counts = {histogram.bucket_of(0.0123): 1}
    for q in (0.0, 0.5, 0.99, 1.0):
        assert histogram.percentile(counts, q, minimum_seconds=0.0123, maximum_seconds=0.0123) == 0.0123


def test_percentile_in_the_last_bucket_is_bounded_by_the_maximum() -> None:
    """Beyond 600 s the result is the lower bound, or below the known maximum."""
    counts = {histogram.BUCKETS - 1: 4}
    assert histogram.percentile(counts, 0.5) == 600.0
    slow = histogram.percentile(counts, 1.0, maximum_seconds=900.0)
    assert slow is not None
    assert slow == pytest.approx(900.0)


def test_empty_histogram_has_no_percentile() -> None:
    """Without a request there is no latency to report."""
    assert histogram.percentile({}, 0.5) is None
    assert histogram.percentile({3: 0}, 0.5) is None


def test_quantile_outside_0_to_1_is_rejected() -> None:
    """95 instead of 0.95 is an error with a message."""
    with pytest.raises(ValueError, match="95"):
        histogram.percentile({1: 1}, 95)

"""A table of jobs: their metrics in, shares and one advice out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from beam_triton.policy import diagnosis
from beam_triton.policy.diagnosis import Distribution, JobMetrics, ServerSettings, diagnose

SECOND = 1_000_000


def job(
    *,
    requests: int = 1_000,
    batch: float = 64,
    limit: float = 64,
    bundle: float = 100.0,
    wait: float = 90.0,
    answer: float = 0.09,
    queue: float = 0.0,
    compute: float = 0.08,
    busy: float = 0.5,
    own: float = 1.0,
    round_trip: float = 0.0005,
    nbytes: float = 32_768,
    fastest: float = 0.05,
    **counters: float,
) -> JobMetrics:
    """A job of one bundle and one request at a time; times in seconds, or seconds a request.

    ``counters`` are further counters, or others in the place of these; those of times are in seconds.
    """
    counts = {
        "bundles": 1,
        "elements": requests * batch,
        "workers": 1,
        "bundle_microseconds": bundle,
        "bundle_wait_microseconds": wait,
        "bundle_cpu_microseconds": bundle - wait,
        "worker_microseconds": bundle,
        "worker_cpu_microseconds": bundle - wait,
        "answer_microseconds": answer * requests,
        "server_requests": requests / own,
        "server_requests_of_job": requests,
        "server_executions": requests / own,
        "server_microseconds": (queue + compute) * requests / own,
        "server_queue_microseconds": queue * requests / own,
        "server_compute_microseconds": compute * requests / own,
        "server_busy_microseconds": busy * bundle,
        "server_instance_microseconds": bundle,
        "unfilled_batches": 1,
        "limited_batches": 1,
        "batch_limits": limit,
        **counters,
    }
    return JobMetrics(
        {
            name: round(value * SECOND if name.endswith("microseconds") else value)
            for name, value in counts.items()
        },
        {
            "batch_size": Distribution(requests, batch * requests, batch, batch),
            "request_latency_milliseconds": Distribution(
                requests, answer * 1e3 * requests, fastest * 1e3, 99
            ),
            "request_bytes": Distribution(requests, nbytes * requests, nbytes, nbytes),
            "response_bytes": Distribution(requests, nbytes * requests, nbytes, nbytes),
            "round_trip_microseconds": Distribution(1, round_trip * 1e6, round_trip * 1e6, round_trip * 1e6),
        },
    )


COMPRESSIBLE: Any = {"sampled_request_bytes": 1_000, "sampled_request_compressed_bytes": 100}
ON_THE_NETWORK: Any = {"answer": 0.09, "compute": 0.001, "busy": 0.01}

WANTS = [
    ("instance_group", "others keep the server full", job(queue=0.06, compute=0.02, busy=0.95, own=0.2)),
    ("instance_group", "the same, without instances", job(
        queue=0.06, compute=0.02, own=0.2, server_busy_microseconds=0, server_instance_microseconds=0)),
    ("bundle size", "tiny bundles", job(batch=2, bundles=1_000, unfilled_batches=1_000)),
    ("bundle size", "tiny bundles that fill the server", job(
        batch=2, bundles=1_000, unfilled_batches=1_000, busy=0.99)),
    ("batching.bucket_boundaries", "many shapes", job(
        batch=3, wait=10, sending_microseconds=60, unfilled_batches=900, unfilled_for_shape=890)),
    ("worker processes", "a worker that computes", job(wait=1, busy=0.1)),
    ("worker processes", "threads that take turns", job(
        wait=1, busy=0.1, bundle=400, bundle_cpu_microseconds=95, worker_microseconds=100,
        worker_cpu_microseconds=97)),
    ("beam.Reshuffle()", "a fused step that waits", job(
        wait=1, busy=0.1, bundle_cpu_microseconds=5, worker_cpu_microseconds=5)),
    ("compression", "a slow link", job(**ON_THE_NETWORK, **COMPRESSIBLE)),
    ("region", "a slow link, and bytes that do not compress", job(**ON_THE_NETWORK)),
    ("region", "a far server", job(**ON_THE_NETWORK, **COMPRESSIBLE, round_trip=0.085)),
    ("max_concurrent_requests", "slots", job(
        answer=0.09, compute=0.08, busy=0.1, slot_wait_microseconds=80)),
    ("Accept-Encoding", "a proxy that compresses", job(
        **ON_THE_NETWORK, **COMPRESSIBLE, unasked_compressed_answers=1_000)),
    ("response_compression", "compression that was asked for", job(
        **{**ON_THE_NETWORK, "answer": 0.003}, compressed_answers=1_000)),
    ("keep-alive", "connections that do not last", job(
        answer=0.04, compute=0.03, connecting_microseconds=50, connections_opened=1_000)),
    ("pool.max_total", "a pool that is too small", job(
        answer=0.04, compute=0.03, connecting_microseconds=50, connection_waits=900)),
]  # fmt: skip

WANTS_NOTHING = [
    ("fully", "uses its server", job(queue=0.03, compute=0.05, busy=0.97)),
    ("wait for elements", "an idle stream", job(
        batch=2, bundle=10, wait=9, answer=0.009, compute=0.008, bundles=1_000, unfilled_batches=1_000,
        worker_microseconds=100, worker_cpu_microseconds=3)),
    ("too few", "short", job(requests=4)),
    ("too few", "fast", job(bundle=0.2, wait=0.1, answer=0.0004, compute=0.0003)),
    ("stands out", "connections of a start", job(
        requests=16, bundle=0.7, wait=0.65, answer=0.04, compute=0.03, connecting_microseconds=9.6,
        connections_opened=16)),
    ("stands out", "half of each", job(wait=50, answer=0.05, compute=0.045, busy=0.7)),
    ("stands out", "a fast link that copies large tensors", job(**ON_THE_NETWORK, nbytes=8e6)),
    ("stands out", "a proxy that is slow now and then", job(
        **ON_THE_NETWORK, **COMPRESSIBLE, fastest=0.0015)),
    ("stands out", "a network that takes what a well used server leaves", job(
        answer=0.09, compute=0.03, busy=0.7, **COMPRESSIBLE)),
    ("stands out", "compressed answers that hardly cost anything", job(
        answer=0.09, compute=0.088, unasked_compressed_answers=1_000)),
    ("stands out", "a few shapes in full requests", job(
        batch=60, unfilled_batches=300, unfilled_for_shape=300)),
    ("stands out", "slots in a link that is slow, behind a server that is not asked", job(
        server_requests=0, server_requests_of_job=0)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "metrics"),
    [(setting, metrics) for setting, _, metrics in WANTS],
    ids=[name for _, name, _ in WANTS],
)
def test_cause_names_its_setting(setting: str, metrics: JobMetrics) -> None:
    """The advice names the setting, with a figure."""
    said = diagnose(metrics)
    assert said.advice is not None, said
    assert said.advice.setting == setting, said
    assert any(character.isdigit() for character in said.advice.figure), said


@pytest.mark.parametrize(
    ("why", "metrics"),
    [(why, metrics) for why, _, metrics in WANTS_NOTHING],
    ids=[name for _, name, _ in WANTS_NOTHING],
)
def test_job_without_a_cause_gets_no_advice(why: str, metrics: JobMetrics) -> None:
    """It says why there is nothing to change."""
    said = diagnose(metrics)
    assert said.advice is None, said
    assert why in said.summary, said


def test_small_requests_that_fill_a_server_want_dynamic_batching_where_it_is_off() -> None:
    """Only the server knows whether it is on."""
    metrics = job(batch=4, queue=0.03, compute=0.05, busy=0.97)
    assert diagnose(metrics).advice is None
    assert diagnose(metrics, ServerSettings(True)).advice is None
    said = diagnose(metrics, ServerSettings(False))
    assert said.advice is not None
    assert said.advice.setting == "dynamic_batching"


@pytest.mark.parametrize(
    "metrics", [metrics for _, _, metrics in WANTS + WANTS_NOTHING], ids=lambda metrics: ""
)
def test_shares_add_up_to_the_bundles_time(metrics: JobMetrics) -> None:
    """None is negative."""
    shares = [station.share for station in diagnose(metrics).stations if station.share is not None]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= 0


def test_waiting_is_divided_as_requests_spend_their_time() -> None:
    """Nine tenths of the bundle are waiting: 10 ms network, 20 ms queue and 60 ms computing of each 90 ms."""
    said = diagnose(job(answer=0.09, queue=0.02, compute=0.06))
    assert said.share(diagnosis.BEAM) == pytest.approx(0.1)
    assert said.share(diagnosis.NETWORK) == pytest.approx(0.1)
    assert said.share(diagnosis.QUEUE) == pytest.approx(0.2)
    assert said.share(diagnosis.COMPUTING) == pytest.approx(0.6)
    with pytest.raises(KeyError):
        said.share("the moon")


def test_answers_that_wait_for_a_busy_worker_are_not_the_networks() -> None:
    """An answer that took 0.5 s, of which the thread computed 0.42 s, may have come long before."""
    said = diagnose(job(answer=0.5, compute=0.08, answer_busy_microseconds=420))
    assert said.share(diagnosis.NETWORK) == pytest.approx(0, abs=1e-6)


def test_no_share_is_above_the_whole() -> None:
    """Batches that joined other bundles' requests, and executions that began before the first look."""
    text = str(
        diagnose(
            job(
                batch=3,
                wait=10,
                sending_microseconds=60,
                busy=1.3,
                unfilled_batches=3_000,
                unfilled_for_shape=2_900,
            )
        )
    )
    assert "instances are busy 100% of the time" in text
    assert "100% of the requests left unfilled" in text


def test_answers_that_are_compressed_are_not_to_be_compressed() -> None:
    """The link is slow all the same; a sample, taken of the tensors, compresses well."""
    sample: Any = {"sampled_answer_bytes": 1_000, "sampled_answer_compressed_bytes": 100}

    def said_of(**counters: Any) -> Any:
        metrics = job(**ON_THE_NETWORK, **sample, **counters)
        few = {"request_bytes": Distribution(1_000, 1_000, 1, 1)}
        return diagnose(replace(metrics, distributions={**metrics.distributions, **few})).advice

    assert said_of().setting == "response_compression"
    advice = said_of(compressed_answers=1_000)
    assert advice.setting == "region"
    assert "compressed already" in advice.figure


def test_slots_before_a_server_that_is_not_known_to_be_idle() -> None:
    """As with an ensemble, whose models' instances a job does not see: the text does not claim it."""
    metrics = job(slot_wait_microseconds=80, server_busy_microseconds=0, server_instance_microseconds=0)
    said = diagnose(metrics)
    assert said.advice is not None
    assert said.advice.setting == "max_concurrent_requests"
    assert "whether the server could take more is not known" in said.summary


def test_failures_and_retries_are_facts() -> None:
    """Nothing else in the text tells that the time went to requests that failed."""
    assert "failed" not in str(diagnose(job()))
    said = str(diagnose(job(failures=12, default_values=3, retries=40)))
    assert "15 elements failed, 40 requests were sent again" in said


def test_requests_without_the_time_of_bundles_are_not_called_no_job() -> None:
    """Bundles of a tenth of a second are written once a second: a shorter job has none."""
    said = diagnose(job(bundle=0, wait=0))
    assert (said.stations, said.advice) == ((), None)
    assert "less than a second" in str(said)


def test_no_metrics_say_nothing() -> None:
    """As of a job that has not run, or of another library."""
    said = diagnose(JobMetrics())
    assert (said.stations, said.advice) == ((), None)
    assert "no finished bundle" in str(said)

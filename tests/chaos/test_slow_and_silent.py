"""Servers that are slow and healthy, elements that hang a model, and connections that go silent."""

from __future__ import annotations

import time
from collections.abc import Iterator

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.util import assert_that, equal_to

from beam_triton import TritonClient, TritonInference
from beam_triton.errors import DeadlineExceededError
from beam_triton.testing import LocalTriton
from tests.support.certificates import Certificates
from tests.support.connection_proxy import ConnectionProxy
from tests.support.executions import executed, port
from tests.support.models import Model, Tensor, sleeping
from tests.support.nginx import Nginx
from tests.support.numbered_run import repeat_during_run, run_numbered

MODELS = (
    sleeping("slow", 0.3),
    sleeping("nearly_late", 0.6),
    sleeping("too_slow", 2.0),
    sleeping("remote", 0.02, instances=4),
    Model(
        "hanging",
        (Tensor("x", "FP32", (1,)),),
        (Tensor("y", "FP32", (1,)),),
        source="on_negative",
        max_batch_size=16,
        instances=2,
        parameters={"on_negative": "hang", "hang_seconds": "2.5"},
    ),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    folder = tmp_path_factory.mktemp("slow_models")
    for model in MODELS:
        model.write(folder)
    with LocalTriton(folder) as triton:
        yield triton
        triton.kill()


@pytest.mark.parametrize(("model_name", "seconds"), [("slow", 0.3), ("nearly_late", 0.6)])
def test_slow_model_loses_nothing_and_gets_its_work_once(
    server: LocalTriton, model_name: str, seconds: float
) -> None:
    """32 slots and one instance: most requests would pass their deadlines in its queue, were all sent."""
    batches = 25
    before = executed(server, model_name)
    transform = TritonInference(server.endpoint, model_name, timeout_seconds=1.0)
    run = run_numbered(transform, 20 * batches)
    assert "failures" not in run.counters
    # The pipeline starts and ends within this time as well.
    assert run.seconds < 1.15 * batches * seconds + 1.5
    assert executed(server, model_name) - before <= 1.05 * batches
    assert run.counters["requests"] <= 1.05 * batches


def test_model_that_is_too_slow_fails_with_what_to_raise(server: LocalTriton) -> None:
    """Even a request alone is not answered in time: the error says what the user can change."""
    with (
        pytest.raises(Exception, match=r"has answered no request .* raise timeout_seconds or lower batching"),
        beam.Pipeline("FnApiRunner") as pipeline,
    ):
        _ = (
            pipeline
            | beam.Create([np.zeros(1, np.float32)])
            | TritonInference(server.endpoint, "too_slow", timeout_seconds=1.0)
        )


def test_element_that_hangs_the_model_is_found(server: LocalTriton) -> None:
    """Its batch is bisected; all others are scored, though it blocks an instance at each attempt."""
    count, bad = 16 * 12, 71
    elements = [np.array([-1.0 if number == bad else number], np.float32) for number in range(count)]
    transform = TritonInference(server.endpoint, "hanging", timeout_seconds=1.0).with_exception_handling()
    with beam.Pipeline("FnApiRunner") as pipeline:
        results, failures = pipeline | beam.Create(elements, reshuffle=False) | transform
        scored = results | beam.Map(lambda result: float(result.inference["y"][0]))
        expected = [2.0 * number for number in range(count) if number != bad]
        assert_that(scored, equal_to(expected), label="scored")
        failed = failures | beam.Map(lambda failure: (float(failure[0][0]), failure[1][0]))
        assert_that(failed, equal_to([(-1.0, DeadlineExceededError)]), label="failed")


@pytest.mark.parametrize("through", ["tcp", "nginx with tls"])
def test_connections_that_go_silent_lose_nothing(
    server: LocalTriton, certificates: Certificates, through: str
) -> None:
    """Everything sent on the connections of that moment is swallowed, twice in a run; new ones work."""
    elements = 40_000
    if through == "tcp":
        with ConnectionProxy(port(server)) as proxy:
            transform = TritonInference(proxy.endpoint, "remote")
            run = run_numbered(transform, elements, meanwhile=repeat_during_run(2, elements, proxy.hole))
    else:
        with (
            Nginx([port(server)], certificate=certificates.good) as nginx,
            ConnectionProxy(nginx.port) as proxy,
        ):
            transform = TritonInference(
                f"https://127.0.0.1:{proxy.port}", "remote", tls={"ca_bundle": str(certificates.ca)}
            )
            run = run_numbered(transform, elements, meanwhile=repeat_during_run(2, elements, proxy.hole))
    assert run.counters["retries"] > 0
    batches = elements / 20
    assert run.counters["requests"] < 1.1 * batches
    assert run.seconds < 1.5 * batches * 0.02 / 4 + 2 * 5.0


def test_request_on_a_connection_that_went_silent_takes_seconds(server: LocalTriton) -> None:
    """A client's single connection swallows what it is sent while it is idle."""
    inputs = {"x": np.zeros((1, 1), np.float32)}
    with (
        ConnectionProxy(port(server)) as proxy,
        TritonClient(proxy.endpoint) as client,
    ):
        client.infer("remote", inputs)
        proxy.hole()
        started = time.monotonic()
        client.infer("remote", inputs)
        assert time.monotonic() - started < 3.0
        proxy.hole()
        started = time.monotonic()
        assert client.is_server_ready()
        assert time.monotonic() - started < 8.0

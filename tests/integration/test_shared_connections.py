"""All DoFn instances of a process share one session and its connections, and leave none behind."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton import ConnectionPoolConfig, TlsConfig, TritonInference, TritonInferenceDoFn
from beam_triton.dispatch.channel import ENDPOINT_SETS
from beam_triton.testing import LocalTriton
from beam_triton.transport.session import SESSIONS, SessionKey
from tests.support import sockets
from tests.support.pipelines import run, score

X = np.zeros(128, np.float32)


def port_of(triton: LocalTriton) -> int:
    return int(triton.endpoint.rpartition(":")[2])


class Peaks:
    """The highest number of each that was seen at one time."""

    connections = 0
    sessions = 0
    references = 0


@contextmanager
def watching(port: int, pool: ConnectionPoolConfig) -> Iterator[Peaks]:
    """Samples the server's connections and the session's reference count a hundred times a second."""
    peaks, stopped = Peaks(), threading.Event()

    def watch() -> None:
        while not stopped.wait(0.01):
            peaks.connections = max(peaks.connections, sockets.established(port))
            peaks.sessions = max(peaks.sessions, len(SESSIONS))
            references = SESSIONS.reference_count(SessionKey(pool, TlsConfig()))
            peaks.references = max(peaks.references, references)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        stopped.set()
        thread.join()


@pytest.fixture(autouse=True)
def no_leaks(triton: LocalTriton) -> Iterator[None]:
    """Before and after each test: no session, no endpoint state, no connection at the server."""
    for when in ("before", "after"):
        gc.collect()
        assert len(SESSIONS) == 0, (when, vars(SESSIONS))
        assert len(ENDPOINT_SETS) == 0, (when, vars(ENDPOINT_SETS))
        assert sockets.settles(lambda: sockets.established(port_of(triton)), 0) == 0, when
        if when == "before":
            yield


def repeated(n: int) -> Iterator[Any]:
    for _ in range(4):
        yield n, X


def test_sixty_four_instances_share_max_total_connections(triton: LocalTriton) -> None:
    """64 DoFn instances on 64 threads: one session, at most ``max_total`` connections, none afterwards."""
    pool = ConnectionPoolConfig(max_total=8, max_idle=8)

    def build(pipeline: beam.Pipeline) -> Any:
        transform = TritonInference(
            triton.endpoint,
            "remote_like",
            pool=pool,
            max_concurrent_requests=8,
            batching={"max_batch_size": 2},
        )
        return pipeline | beam.Create(range(256)) | beam.Reshuffle() | beam.FlatMap(repeated) | transform

    with watching(port_of(triton), pool) as peaks:
        outcome = run(build, "--direct_running_mode=multi_threading", "--direct_num_workers=64")
    assert len(outcome.results) == 1024
    assert peaks.sessions == 1
    # Each instance holds one reference; a client that asks for the model in setup holds another.
    assert peaks.references >= 64
    assert 2 <= peaks.connections <= 8
    assert outcome.counters["connections_opened"] <= 8
    assert outcome.counters["connections_reused"] >= outcome.counters["requests"] - 8


def test_two_models_share_one_pool(triton: LocalTriton) -> None:
    """``max_concurrent_requests`` is per model, ``max_total`` is shared: some requests wait, none fails."""
    pool = ConnectionPoolConfig(max_total=4, max_idle=4)
    options: dict[str, Any] = {
        "pool": pool,
        "max_concurrent_requests": 4,
        "batching": {"max_batch_size": 1},
    }

    def build(pipeline: beam.Pipeline) -> dict[str, Any]:
        elements = pipeline | beam.Create(range(60)) | beam.Reshuffle() | beam.Map(lambda n: X[:128])
        return {
            name: elements | name >> TritonInference(triton.endpoint, name, **options)
            for name in ("echo", "remote_like")
        }

    with watching(port_of(triton), pool) as peaks:
        outcome = run(build, "--direct_running_mode=multi_threading", "--direct_num_workers=4")
    assert len(outcome.outputs["echo"]) == len(outcome.outputs["remote_like"]) == 60
    assert peaks.sessions == 1
    assert 1 <= peaks.connections <= 4


@pytest.mark.parametrize("mode", ["in_memory", "multi_threading"])
def test_two_transforms_in_one_stage_do_not_deadlock_on_one_slot(triton: LocalTriton, mode: str) -> None:
    """A model applied to its own results in one fused stage progresses with one slot."""
    options: dict[str, Any] = {
        "max_concurrent_requests": 1,
        "pool": {"max_total": 1, "max_idle": 1},
        "batching": {"max_batch_size": 3},
    }

    def build(pipeline: beam.Pipeline) -> Any:
        return (
            pipeline
            | beam.Create(range(200))
            | beam.Map(lambda n: np.full(4, n, np.float32))
            | "once" >> TritonInference(triton.endpoint, "double", **options)
            | beam.Map(lambda result: result.inference["y"])
            | "twice" >> TritonInference(triton.endpoint, "double", **options)
        )

    started = time.monotonic()
    outcome = run(build, f"--direct_running_mode={mode}", "--direct_num_workers=4")
    found = sorted(float(result.inference["y"][0]) for result in outcome.results)
    assert found == [4.0 * n for n in range(200)]
    assert time.monotonic() - started < 30


def fail_after(count: int) -> Iterator[Any]:
    yield from [X] * count
    raise ValueError("the source fails")


def fail(result: Any) -> None:
    raise ValueError("downstream fails")


def test_downstream_failure_cancels_requests_in_flight(triton: LocalTriton) -> None:
    """When a downstream step of the bundle fails, requests in flight are cancelled."""
    elements = [X] * 400
    transform = TritonInference(triton.endpoint, "remote_like", batching={"max_batch_size": 1})
    with pytest.raises(Exception, match="downstream fails"):
        run(lambda pipeline: pipeline | beam.Create(elements, reshuffle=False) | transform | beam.Map(fail))


def test_upstream_failure_cancels_requests_in_flight(triton: LocalTriton) -> None:
    """When an upstream step fails in mid-bundle, requests in flight are cancelled."""

    transform = TritonInference(triton.endpoint, "remote_like", batching={"max_batch_size": 1})
    with pytest.raises(Exception, match="the source fails"):
        run(lambda pipeline: pipeline | beam.Create([10]) | beam.FlatMap(fail_after) | transform)


def feed(dofn: TritonInferenceDoFn, *values: float) -> list[Any]:
    """The outputs emitted while the values are processed."""
    emitted: list[Any] = []
    for value in values:
        element = np.array([value], np.float32)
        emitted += dofn.process(element, WindowedValue(element, 0, (GlobalWindow(),))) or ()
    return emitted


def test_restarted_bundle_has_all_slots(triton: LocalTriton) -> None:
    """A bundle that starts again, as after a failure, does not wait for requests of the previous one."""
    dofn = TritonInferenceDoFn(
        triton.endpoint, "slow", max_concurrent_requests=2, batching={"max_batch_size": 1}
    )
    dofn.setup()
    dofn.start_bundle()
    feed(dofn, 3.0, 3.0)
    started = time.monotonic()
    dofn.start_bundle()
    found = [*feed(dofn, 0.0, 0.0, 0.0), *dofn.finish_bundle()]
    assert len(found) == 3
    assert time.monotonic() - started < 2.5
    dofn.teardown()


def test_teardown_on_another_thread_closes_connections(triton: LocalTriton) -> None:
    """Beam may tear down the DoFn of a failed bundle on any thread: connections close, slots are released."""
    dofn = TritonInferenceDoFn(triton.endpoint, "slow", batching={"max_batch_size": 1})
    dofn.setup()
    dofn.start_bundle()
    feed(dofn, 3.0, 3.0)
    # The limit of requests in flight starts at one.
    assert sockets.settles(lambda: sockets.established(port_of(triton)), 1) == 1
    thread = threading.Thread(target=dofn.teardown)
    thread.start()
    thread.join()
    assert sockets.settles(lambda: sockets.established(port_of(triton)), 0) == 0


def test_without_reuse_every_request_opens_a_connection(triton: LocalTriton) -> None:
    """With ``reuse_enabled=False`` there are as many connections as requests, and none is kept."""
    transform = TritonInference(
        triton.endpoint, "echo", pool={"reuse_enabled": False}, batching={"max_batch_size": 5}
    )
    outcome = score([X] * 50, transform)
    assert outcome.counters["requests"] == 10
    # Metadata, extensions and configuration take three more, and a question for statistics may take one.
    assert outcome.counters["connections_opened"] - 10 in (3, 4)
    assert "connections_reused" not in outcome.counters

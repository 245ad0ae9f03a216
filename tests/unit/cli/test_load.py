"""What a measurement shows of servers that stall, are too slow, refuse or go silent."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest

from beam_triton.cli.load import Load
from beam_triton.cli.sample import Sample
from beam_triton.client import TritonClient
from beam_triton.options import InferenceOptions
from beam_triton.testing import FakeModel, FakeTriton

Array = npt.NDArray[np.float32]


class Stalling:
    """A model that answers in a millisecond, except that it stops once, for ``seconds``, for everybody."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._stalls_at = math.inf

    def stall_after(self, seconds: float) -> None:
        self._stalls_at = time.monotonic() + seconds

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if time.monotonic() >= self._stalls_at:
            self._stalls_at = math.inf
            time.sleep(self._seconds)
        return {"y": inputs["x"]}


def echo(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"y": inputs["x"]}


def sleeping(seconds: float) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    def answer(inputs: Mapping[str, Array]) -> dict[str, Array]:
        time.sleep(seconds)
        return {"y": inputs["x"]}

    return answer


@contextmanager
def load_of(function: Callable[[Mapping[str, Array]], dict[str, Array]]) -> Iterator[tuple[Load, FakeTriton]]:
    tensors = {"x": ("FP32", [1])}
    model = FakeModel(function, inputs=tensors, outputs={"y": ("FP32", [1])}, max_batch_size=8)
    with FakeTriton({"m": model}) as server:
        options = InferenceOptions.from_options(
            {"endpoint": server.endpoint, "retry": {"max_retries": 0}, "circuit_breaker": None}
        )
        with TritonClient.from_inference_options(options) as client:
            opened = client.open_model("m")
            try:
                yield Load(options, opened, Sample({}), lambda: None), server
            finally:
                opened.close()


def test_what_arrives_while_the_server_stalls_has_waited() -> None:
    """At a rate, all that arrived in the stall counts with its wait; one after the other, a single request
    does, and the p99 hides it."""
    model = Stalling(0.4)
    with load_of(model) as (load, _):
        model.stall_after(0.7)
        at_rate = load.measure_rate(1, 32, 1.0, rate=200)
        model.stall_after(0.5)
        closed = load.measure(1, 1, 1.0)
    assert at_rate.keeps_up
    assert at_rate.latency_seconds(0.99) > 0.3
    assert at_rate.latency_seconds(0.75) > 0.1
    assert closed.latency_seconds(0.99) < 0.1
    assert closed.latency_seconds(1.0) > 0.35


def test_elements_of_a_batch_wait_for_each_other() -> None:
    """Eight elements at 40 a second: the first of them waits a fifth of a second for the last."""
    with load_of(echo) as (load, _):
        found = load.measure_rate(8, 32, 2.0, rate=40)
    assert found.keeps_up
    assert 0.1 < found.latency_seconds(0.99) < 0.6
    assert 30 < found.elements_per_second < 50


def test_a_server_that_does_not_keep_up_is_found_out_in_time() -> None:
    """Twice as many as it can take: what it has left unanswered counts with its wait so far."""
    started = time.monotonic()
    with load_of(sleeping(0.02)) as (load, _):
        found = load.measure_rate(1, 32, 1.0, rate=100)
    assert time.monotonic() - started < 3
    assert not found.keeps_up
    assert found.elements_per_second < 60
    assert found.latency_seconds(0.99) > 0.4


def test_a_settled_rate_ends_a_measurement_early() -> None:
    """A tenth of the time is left over, and the rate is that of the model."""
    with load_of(sleeping(0.005)) as (load, _):
        started = time.monotonic()
        found = load.measure(1, 4, 2.0, ends_early=True)
        took = time.monotonic() - started
    assert took < 1.8
    assert found.elements_per_second == pytest.approx(1 / 0.0053, rel=0.15)


def test_too_many_late_answers_end_a_measurement_early() -> None:
    """Each takes 20 ms, for a limit of 5 ms: that is known long before the end."""
    with load_of(sleeping(0.02)) as (load, _):
        found = load.measure(1, 1, 3.0, p99_seconds=0.005)
    assert found.seconds < 2.0
    assert found.latency_seconds(0.99) > 0.005


def test_the_first_failure_ends_a_measurement() -> None:
    """It says why; what was answered before counts."""
    with load_of(echo) as (load, server):
        threading.Timer(0.3, server.fail_next, kwargs={"message": "Exceeds maximum queue size"}).start()
        started = time.monotonic()
        found = load.measure(1, 2, 5.0)
    assert time.monotonic() - started < 2
    assert found.failures == 1 and found.is_overloaded
    assert found.requests > 20


def test_a_silent_connection_is_no_failure() -> None:
    """A pipeline sends its request again, on another connection."""
    with load_of(echo) as (load, server):
        threading.Timer(0.7, server.hang_next).start()
        found = load.measure(1, 2, 2.5)
    assert not found.failures
    assert found.requests > 100

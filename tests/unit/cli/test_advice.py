"""Advice about the server, by what it counted: each sentence needs its figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from beam_triton.cli.advice import ModelSettings, advice
from beam_triton.cli.load import Measurement
from beam_triton.cli.server_side import ServerSide
from beam_triton.errors import ServerOverloadedError
from beam_triton.policy.server_times import ServerCounts

CONFIG = {"max_batch_size": 64, "instance_group": [{"kind": "KIND_CPU", "count": 2}]}
BATCHING: Mapping[str, Any] = {"dynamic_batching": {}}


def measured(
    size: int,
    *,
    execution_seconds: float,
    busy: float = 0.3,
    queue_seconds: float = 0.0,
    requests_an_execution: float = 1.0,
    error: ServerOverloadedError | None = None,
    in_flight: int = 8,
) -> Measurement:
    executions = round(2 * busy / execution_seconds)
    requests = round(executions * requests_an_execution)
    server = ServerSide(
        1.0, requests, requests * size, executions, requests * queue_seconds, executions * execution_seconds
    )
    failures = 0 if error is None else 1
    return Measurement(size, in_flight, 1.0, requests, (0.1,), failures, error, server=server)


def advised(
    config: Mapping[str, Any], *found: Measurement, busy: Mapping[str, float] | None = None
) -> list[str]:
    """The subjects, the last measurement being the chosen one."""
    sentences = advice(ModelSettings.of(config), found, found[-1], busy or {})
    return [sentence.partition(":")[0] for sentence in sentences]


def counts(
    at: float, requests: int, elements: int, executions: int, queue_ns: int, busy_ns: int
) -> ServerCounts:
    return ServerCounts(requests, executions, 0, queue_ns, 0, busy_ns=busy_ns, at=at, elements=elements)


def test_nothing_is_advised_where_nothing_waits() -> None:
    """Neither for a model that is idle, nor for one whose time grows with its elements."""
    assert advised(CONFIG, measured(1, execution_seconds=0.001), measured(16, execution_seconds=0.016)) == []


def test_more_instances_are_counted_as_the_configuration_counts_them() -> None:
    """On each of its GPUs."""
    group = {"kind": "KIND_GPU", "count": 1, "gpus": [0, 1]}
    settings = ModelSettings.of({**CONFIG, **BATCHING, "instance_group": [group]})
    busy = measured(64, execution_seconds=0.02, busy=1.0)
    (sentence,) = advice(settings, [busy], busy, {})
    assert "its 2 instances were busy 100%" in sentence and "{ kind: KIND_GPU count: 2 }" in sentence


def test_instances_that_the_model_places_itself_are_left_to_it() -> None:
    """Nothing is known of what they run on."""
    busy = measured(64, execution_seconds=0.02, busy=1.0)
    assert advised({**CONFIG, **BATCHING}, busy) == ["Instances"]
    assert advised({**CONFIG, **BATCHING, "instance_group": [{"kind": "KIND_MODEL", "count": 2}]}, busy) == []


def test_a_server_that_does_not_time_executions_says_nothing() -> None:
    """Nothing is divided by them."""
    assert ServerSide.between(counts(0.0, 0, 0, 0, 0, 0), counts(1.0, 10, 10, 10, 10, 0)) is None


def test_dynamic_batching_needs_executions_of_one_that_wait_and_batches_that_are_cheap() -> None:
    """All three, and a model that does not have it yet."""
    waiting = measured(1, execution_seconds=0.02, queue_seconds=0.02)
    cheap, dear = measured(32, execution_seconds=0.021), measured(32, execution_seconds=0.6)
    assert advised(CONFIG, waiting, cheap) == ["Dynamic batching"]
    assert advised({**CONFIG, **BATCHING}, waiting, cheap) == []
    assert advised(CONFIG, waiting, dear) == []
    assert advised(CONFIG, measured(1, execution_seconds=0.02), cheap) == []
    assert advised({**CONFIG, "max_batch_size": 0}, waiting) == []


def test_a_larger_max_batch_size_needs_full_batches_that_cost_no_more() -> None:
    """Half as many take as long: four times as many may, too."""
    half, full = measured(32, execution_seconds=0.02), measured(64, execution_seconds=0.021)
    assert advised({**CONFIG, **BATCHING}, half, full) == ["max_batch_size"]
    assert advised({**CONFIG, **BATCHING}, full, half) == []
    assert advised({**CONFIG, **BATCHING}, half, measured(64, execution_seconds=0.04)) == []


@pytest.mark.parametrize(
    ("share", "busy", "expected"),
    [(0.97, {"cpu": 0.1}, True), (0.97, {}, True), (0.97, {"cpu": 0.95}, False), (0.5, {"cpu": 0.1}, False)],
)
def test_more_instances_need_busy_ones_and_room(share: float, busy: dict[str, float], expected: bool) -> None:
    """Where it is not known whether there is room, the advice says so; where there is none, there is none."""
    found = measured(64, execution_seconds=0.02, busy=share)
    assert advised(CONFIG, found, busy=busy) == (["Instances"] if expected else [])
    if expected and not busy:
        (sentence,) = advice(ModelSettings.of(CONFIG), [found], found, {})
        assert "--metrics-url" in sentence


def test_instances_on_a_gpu_are_judged_by_the_gpu() -> None:
    """Its processors may be idle meanwhile; each GPU has so many instances."""
    config = {**CONFIG, "instance_group": [{"kind": "KIND_GPU", "count": 1, "gpus": [0, 1]}]}
    assert ModelSettings.of(config).instances == 2
    found = measured(64, execution_seconds=0.02, busy=0.97)
    assert advised(config, found, busy={"cpu": 0.1, "gpu": 0.99}) == []
    assert advised(config, found, busy={"cpu": 0.1, "gpu": 0.4}) == ["Instances"]


def test_a_queue_delay_is_too_long_where_instances_are_idle_meanwhile() -> None:
    """A server that is busy anyway loses nothing by it."""
    config = {**CONFIG, "dynamic_batching": {"max_queue_delay_microseconds": "50000"}}
    idle = measured(8, execution_seconds=0.01, busy=0.1, queue_seconds=0.045)
    assert advised(config, idle) == ["Queue delay"]
    assert advised(config, measured(8, execution_seconds=0.01, busy=0.8, queue_seconds=0.045)) == []
    assert advised(config, measured(8, execution_seconds=0.01, busy=0.1)) == []


def test_a_queue_is_too_short_where_it_refused() -> None:
    """By the fewest in flight that it refused."""
    config = {**CONFIG, "dynamic_batching": {"default_queue_policy": {"max_queue_size": 2}}}
    refused = measured(4, execution_seconds=0.01, error=ServerOverloadedError("full"), in_flight=16)
    assert advised(config, refused, measured(4, execution_seconds=0.01)) == ["Queue"]
    assert advised(CONFIG, refused, measured(4, execution_seconds=0.01)) == []


def test_nothing_is_advised_of_a_server_that_does_not_count() -> None:
    """Not even what might be guessed."""
    found = [replace(measured(64, execution_seconds=0.02, busy=1.0), server=None)]
    assert advised(CONFIG, *found) == []


def test_counts_of_a_server_that_was_restarted_show_nothing() -> None:
    """They went down, or nothing was executed in between."""
    before = counts(1.0, 10, 10, 10, 100, 1000)
    assert ServerSide.between(before, before._replace(at=2.0)) is None
    assert ServerSide.between(before, counts(2.0, 30, 30, 30, 0, 10)) is None
    found = ServerSide.between(before, counts(2.0, 30, 50, 20, 300, 2000))
    assert found is not None
    assert (found.requests, found.elements, found.executions) == (20, 40, 10)
    assert found.compute_an_execution == pytest.approx(100e-9)

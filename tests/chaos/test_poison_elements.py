"""Elements that a model rejects: only they fail, and finding them takes a bounded number of requests."""

from __future__ import annotations

import math
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing.util import assert_that, equal_to

from beam_triton import TritonInference
from beam_triton.errors import InvalidRequestError
from beam_triton.testing import LocalTriton
from tests.support.answers import forward_to
from tests.support.fault_server import FaultServer, infer_requests

BATCH = 256


def numbered(poisoned: set[int], count: int = BATCH) -> list[tuple[int, Any]]:
    """Keyed elements; the poisoned ones are negative, which makes the models fail."""
    return [(key, np.array([-1.0 - key if key in poisoned else key], np.float32)) for key in range(count)]


def assert_only_negative_elements_fail(
    endpoint: str, model_name: str, elements: list[tuple[int, Any]], **options: Any
) -> None:
    """Runs the elements, as one bundle, and asserts that the negative ones and only those fail."""
    poisoned = [key for key, x in elements if x[0] < 0]
    valid = [(key, 2.0 * key) for key, x in elements if x[0] >= 0]
    transform = TritonInference(endpoint, model_name, **options).with_exception_handling()
    with beam.Pipeline("FnApiRunner") as pipeline:
        results, failures = pipeline | beam.Create(elements, reshuffle=False) | transform
        scored = results | beam.MapTuple(lambda key, result: (key, float(result.inference["y"][0])))
        failed = failures | beam.Map(lambda failure: (failure[0][0], failure[1][0].__name__))
        assert_that(scored, equal_to(valid), label="scored")
        expected = {"rejecting": "InvalidRequestError", "raising": "ModelExecutionError"}[model_name]
        assert_that(failed, equal_to([(key, expected) for key in poisoned]), label="failed")


@pytest.mark.parametrize(
    "poisoned",
    [
        pytest.param(set(), id="none"),
        pytest.param({0}, id="the first"),
        pytest.param({BATCH - 1}, id="the last"),
        pytest.param(set(range(100, 110)), id="ten neighbours"),
        pytest.param(set(range(0, BATCH, 26)), id="ten spread out"),
        pytest.param(set(range(0, BATCH, 2)), id="every second one"),
        pytest.param(set(range(BATCH)), id="all"),
    ],
)
def test_batch_is_bisected_to_its_rejected_elements(triton: LocalTriton, poisoned: set[int]) -> None:
    """Each bad element of a batch of 256 is found with at most 2 log2(256) extra requests."""
    upstream = forward_to(int(triton.endpoint.rpartition(":")[2]))
    with FaultServer(upstream) as counting:
        assert_only_negative_elements_fail(
            counting.endpoint, "rejecting", numbered(poisoned), batching={"max_batch_size": BATCH}
        )
        sent = sum(infer_requests(request.target.encode()) for request in counting.requests)
    assert sent - 1 <= 2 * math.log2(BATCH) * len(poisoned)
    # Bisection sends at most one request for each node of a binary tree over the batch.
    assert sent <= 2 * BATCH - 1


def test_batch_is_bisected_to_the_elements_that_make_the_model_raise(triton: LocalTriton) -> None:
    """A plain 500 is retried once, and then the batch is bisected as after a rejection."""
    assert_only_negative_elements_fail(
        triton.endpoint, "raising", numbered({7, 200}), batching={"max_batch_size": BATCH}
    )


def test_rejected_elements_do_not_open_the_circuit_breaker(triton: LocalTriton) -> None:
    """Many bad elements say nothing about the server's health: no request is held."""
    upstream = forward_to(int(triton.endpoint.rpartition(":")[2]))
    breaker = {"minimum_requests": 2, "when_open": "fail", "open_seconds": 600.0}
    with FaultServer(upstream) as counting:
        assert_only_negative_elements_fail(
            counting.endpoint,
            "rejecting",
            numbered(set(range(0, 512, 3)), 512),
            batching={"max_batch_size": 16},
            circuit_breaker=breaker,
        )


def test_raising_elements_do_not_open_the_circuit_breaker(triton: LocalTriton) -> None:
    """The parts of a bisected batch count once, with the whole, however many of them fail."""
    assert_only_negative_elements_fail(
        triton.endpoint,
        "raising",
        numbered({1, 2, 3, 50, 90, 91, 200, 255}),
        batching={"max_batch_size": BATCH},
        circuit_breaker={"minimum_requests": 3, "when_open": "fail", "open_seconds": 600.0},
    )


def test_pipeline_error_names_the_failing_element(triton: LocalTriton) -> None:
    """The pipeline fails with the server's message and the element's key."""
    transform = TritonInference(triton.endpoint, "rejecting", batching={"max_batch_size": BATCH})
    pipeline = beam.Pipeline("FnApiRunner")
    _ = pipeline | beam.Create(numbered({77}), reshuffle=False) | transform
    with pytest.raises(InvalidRequestError) as caught:
        pipeline.run().wait_until_finish()
    assert "x is negative: -78" in str(caught.value)
    assert "77" in str(caught.value).replace("x is negative: -78", "")


def test_rejected_elements_yield_the_default_value(triton: LocalTriton) -> None:
    """With ``default_value`` a bad element yields it, and the others their own scores."""
    transform = TritonInference(
        triton.endpoint, "rejecting", batching={"max_batch_size": BATCH}, default_value={"y": [-5.0]}
    )
    with beam.Pipeline("FnApiRunner") as pipeline:
        results = pipeline | beam.Create(numbered({3, 4}, 8), reshuffle=False) | transform
        scored = results | beam.MapTuple(lambda key, result: (key, float(result.inference["y"][0])))
        expected = [(key, -5.0 if key in (3, 4) else 2.0 * key) for key in range(8)]
        assert_that(scored, equal_to(expected))

"""A Triton with dynamic batching executes requests together, and all of them fail if the model raises."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.ml.inference.base import RunInference

from beam_triton import (
    ModelExecutionError,
    TritonBatchInference,
    TritonInference,
    TritonModelHandler,
)
from beam_triton.testing import LocalTriton
from tests.integration.test_numpy_batches import Batches
from tests.support.models import CATALOGUE, Model, sleeping, throwaway_triton
from tests.support.pipelines import Run, run, score

ROWS = 3000
BAD = range(50, ROWS, 100)
# Requests that come within that time are executed together.
DELAY = "dynamic_batching { max_queue_delay_microseconds: 2000 }"
SHORT_OF_MEMORY = sleeping("short_of_memory", 0.002, max_batch_size=64, max_rows=32)


def served(repository: Any, *models: Model) -> LocalTriton:
    for model in models:
        dataclasses.replace(model, settings=DELAY).write(repository)
    return throwaway_triton(repository)


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    repository = tmp_path_factory.mktemp("shared_executions") / "models"
    with served(repository, CATALOGUE["raising"], SHORT_OF_MEMORY) as server:
        yield server


def signed(number: int) -> float:
    return float(-number - 1 if number in BAD else number)


def by_element(endpoint: str, **options: Any) -> Run:
    transform = TritonInference(endpoint, "raising", **options).with_exception_handling()
    return score([np.array([signed(n)], np.float32) for n in range(ROWS)], transform)


def by_rows(endpoint: str, **options: Any) -> Run:
    transform = TritonBatchInference(endpoint, "raising", **options).with_exception_handling()
    return run(
        lambda pipeline: (
            pipeline
            | beam.Create([ROWS], reshuffle=False)
            | beam.ParDo(Batches(1, negative=BAD, batch_rows=200))
            | transform
        )
    )


def scored_numbers(outcome: Run) -> list[float]:
    values = [getattr(result, "inference", result) for result in outcome.results]
    return sorted(float((each["y"] if isinstance(each, dict) else each)[0]) for each in values)


@pytest.mark.parametrize("way", [by_element, by_rows])
@pytest.mark.parametrize("batch_size", [256, 7, 1])
def test_only_the_rows_that_make_the_model_raise_fail(triton: LocalTriton, way: Any, batch_size: int) -> None:
    """The others have their results, whatever the server executes them with."""
    outcome = way(triton.endpoint, batching={"max_batch_size": batch_size})
    assert scored_numbers(outcome) == [2.0 * n for n in range(ROWS) if n not in BAD]
    assert len(outcome.failures) == len(BAD)
    assert {failure[1][0] for failure in outcome.failures} == {ModelExecutionError}


def test_an_element_alone_is_never_blamed_for_another(triton: LocalTriton) -> None:
    """Small bundles, as of streams: their requests are executed together, and sent again by themselves."""
    outcome = by_element(triton.endpoint, batching={"max_batch_size": 1})
    assert outcome.counters["isolated_requests"] >= len(BAD)
    assert outcome.counters["requests"] < 4 * ROWS


def test_run_inference_isolates_as_well(triton: LocalTriton) -> None:
    """Beam hands over batches; a failure there is of a whole batch."""
    handler = TritonModelHandler(triton.endpoint, "raising", default_value={"y": [-1.0]})
    elements = [np.array([signed(n)], np.float32) for n in range(ROWS)]
    outcome = score(elements, RunInference(handler))
    values = sorted(float(result.inference["y"][0]) for result in outcome.results)
    assert values == sorted([-1.0] * len(BAD) + [2.0 * n for n in range(ROWS) if n not in BAD])


def test_a_model_that_takes_less_than_it_says_loses_nothing(triton: LocalTriton) -> None:
    """Requests as large as the configuration allows fail there, even those of one element and its copies."""
    outcome = score(
        [np.array([n], np.float32) for n in range(ROWS)],
        TritonInference(triton.endpoint, SHORT_OF_MEMORY.name).with_exception_handling(),
    )
    assert outcome.failures == []
    assert scored_numbers(outcome) == [float(n) for n in range(ROWS)]
    assert outcome.counters["requests"] < 2 * ROWS

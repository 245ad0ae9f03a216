"""Padded batches through the transforms: right answers, and everything else as for other batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.ml.inference.base import RunInference

from beam_triton import ConfigurationError, TritonEnrichmentHandler, TritonInference, TritonModelHandler
from beam_triton.testing import FakeModel, FakeTriton
from tests.support.pipelines import bundle_of, run, score

BATCHING = {"bucket_boundaries": [8, 16], "mask": "mask"}
GENERATOR = np.random.default_rng(1)
ELEMENTS = [GENERATOR.integers(1, 100, length) for length in GENERATOR.integers(1, 40, 200)]
POISON = np.array([1, 2, -1])


def _attend(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Each value less the mean of its element's values, which are those under the mask."""
    ids, mask = inputs["ids"], inputs["mask"]
    if (ids < 0).any():
        raise ValueError("a negative id")
    if len(ids) > 16:
        raise MemoryError("too many rows")
    mean = (ids * mask).sum(1, keepdims=True) / mask.sum(1, keepdims=True)
    return {"mean": mean.astype("f4"), "centred": ((ids - mean) * mask).astype("f4")}


def _model(**changes: Any) -> FakeModel:
    described: dict[str, Any] = {
        "inputs": {"ids": ("INT64", [-1]), "mask": ("INT64", [-1])},
        "outputs": {"mean": ("FP32", [1]), "centred": ("FP32", [-1])},
        "max_batch_size": 16,
    }
    return FakeModel(_attend, **(described | changes))


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    with FakeTriton({"attend": _model(), "too_large": _model(max_batch_size=64)}) as server:
        yield server


def _check(results: list[Any], count: int = len(ELEMENTS)) -> None:
    assert len(results) == count
    for result in results:
        ids = result.example
        np.testing.assert_allclose(result.inference["mean"], [ids.mean()], rtol=1e-5)
        np.testing.assert_allclose(result.inference["centred"], ids - ids.mean(), atol=1e-4)


def test_each_element_gets_the_answer_that_it_would_get_alone(triton: FakeTriton) -> None:
    """In full batches, of as many shapes as there are buckets up to the last boundary."""
    _check(score(ELEMENTS, TritonInference(triton.endpoint, "attend", batching=BATCHING)).results)
    widths = {request.inputs["ids"].shape[1] for request in triton.requests}
    assert {8, 16} < widths and len(triton.requests) <= 200 / 16 + 4


def test_bad_element_of_a_padded_batch_is_the_only_dead_letter(triton: FakeTriton) -> None:
    """The batch is bisected as any other."""
    transform = TritonInference(triton.endpoint, "attend", batching=BATCHING).with_exception_handling()
    found = score([*ELEMENTS, POISON, {"ids": [1, 2], "mask": [1]}], transform)
    _check(found.results)
    letters = {str(error): element for element, (_, error, _) in found.failures}
    assert len(letters) == 2
    assert any("a negative id" in error and element is not None for error, element in letters.items())
    assert any("equal lengths, not 2 and 1" in error for error in letters)


def test_size_that_passes_is_learned_from_padded_batches(triton: FakeTriton) -> None:
    """A model that refuses 64 rows is sent 16 afterwards."""
    transform = TritonInference(
        triton.endpoint, "too_large", batching=BATCHING, max_concurrent_requests=1
    ).with_exception_handling()
    found = score(ELEMENTS * 4, transform)
    assert not found.failures
    _check(found.results, 4 * len(ELEMENTS))
    assert {request.batch_size for request in triton.requests[-5:]} <= set(range(17))


def test_model_that_changes_in_mid_job_is_padded_anew(triton: FakeTriton) -> None:
    """Elements that wait in buckets are prepared for the inputs as they are then."""
    transform = TritonInference(triton.endpoint, "attend", batching={"bucket_boundaries": [8, 16], "pad": 0})
    elements = [{"ids": ids, "mask": np.ones_like(ids)} for ids in ELEMENTS[:40]]
    collected: list[Any] = []
    with bundle_of(transform._new_dofn()) as dofn:
        for number, element in enumerate(elements):
            if number == 20:
                inputs = {"ids": ("INT32", [-1]), "mask": ("INT32", [-1])}
                triton.stop()
                triton = FakeTriton(
                    {"attend": _model(inputs=inputs)}, port=int(triton.endpoint.rsplit(":")[-1])
                )
                triton.start()
            collected += dofn.process(element, beam.transforms.window.GlobalWindows.windowed_value(element))
        collected += dofn.finish_bundle()
    triton.stop()
    assert len(collected) == 40
    for each in collected:
        ids = each.value.example["ids"]
        np.testing.assert_allclose(each.value.inference["centred"], ids - ids.mean(), atol=1e-4)


@pytest.mark.parametrize("options", [{"linger_seconds": 0.001}, {"max_batch_bytes": 1000}])
def test_other_limits_hold_for_padded_batches(triton: FakeTriton, options: dict[str, Any]) -> None:
    """Time, and bytes with their padding."""
    batching = {**BATCHING, **options}
    _check(score(ELEMENTS, TritonInference(triton.endpoint, "attend", batching=batching)).results)
    for request in triton.requests:
        nbytes = sum(array.nbytes for array in request.inputs.values())
        assert request.batch_size == 1 or nbytes <= options.get("max_batch_bytes", nbytes)


def test_keyed_elements_and_rows_are_padded(triton: FakeTriton) -> None:
    """Whatever `TritonInference` takes."""
    elements = [("key", {"ids": [1, 2, 3]}), beam.Row(ids=[4, 5]), {"ids": [6], "mask": [1]}]
    results = score(elements, TritonInference(triton.endpoint, "attend", batching=BATCHING)).results
    assert len(triton.requests) == 1
    keyed = next(result for result in results if type(result) is tuple)
    assert (keyed[0], keyed[1].inference["centred"].tolist()) == ("key", [-1, 0, 1])
    assert sorted(result.inference["centred"].size for result in results if type(result) is not tuple) == [
        1,
        2,
    ]


@pytest.mark.parametrize("inputs", [None, {"ids": "tokens"}])
def test_rows_come_out_without_padding(triton: FakeTriton, inputs: dict[str, Any] | None) -> None:
    """The mask is no column, and kept columns stay beside their own answers."""
    column = "tokens" if inputs else "ids"
    elements = [beam.Row(number=n, **{column: ids.tolist()}) for n, ids in enumerate(ELEMENTS)]
    rows = score(
        elements,
        TritonInference(
            triton.endpoint, "attend", batching=BATCHING, inputs=inputs, output="row", keep=["number"]
        ),
    ).results
    assert sorted(row.number for row in rows) == list(range(len(ELEMENTS)))
    for row in rows:
        ids = ELEMENTS[row.number]
        np.testing.assert_allclose(row.centred, ids - ids.mean(), atol=1e-4)
        np.testing.assert_allclose(row.mean, ids.mean(), rtol=1e-5)


def test_run_inference_pads_as_well(triton: FakeTriton) -> None:
    """`TritonModelHandler` has the same options."""
    handler = TritonModelHandler(triton.endpoint, "attend", batching={**BATCHING, "max_batch_size": 16})
    _check(run(lambda p: p | beam.Create(ELEMENTS, reshuffle=False) | RunInference(handler)).results)
    assert len(triton.requests) <= 200 / 16 + 4


def test_rules_that_do_not_fit_fail_when_the_model_is_opened(triton: FakeTriton) -> None:
    """Not one element at a time."""
    batching = {"bucket_boundaries": [8], "pad": {"input_ids": 0}}
    with pytest.raises(ConfigurationError, match=r"has no input 'input_ids'"):
        TritonInference(triton.endpoint, "attend", batching=batching)._new_dofn().setup()


def test_enrichment_makes_the_mask_too(triton: FakeTriton) -> None:
    """A row needs no column for it, neither to be scored nor to be found in the cache."""
    pytest.importorskip("google.api_core")
    rows = [beam.Row(id=number, ids=[1, 2, 3][: number + 1]) for number in range(3)]
    handler = TritonEnrichmentHandler(triton.endpoint, "attend", outputs=["mean"], batching=BATCHING)
    with handler:
        assert [answer.mean for _, answer in handler(rows)] == [1.0, 1.5, 2.0]
    assert len(set(map(handler.get_cache_key, rows))) == 3

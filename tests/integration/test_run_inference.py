"""`TritonModelHandler` under Beam's RunInference, on a real Triton."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.ml.inference.base import KeyedModelHandler, KeyModelMapping, PredictionResult, RunInference
from apache_beam.utils import shared

from beam_triton import (
    ConfigurationError,
    DefaultResult,
    InvalidRequestError,
    ModelNotFoundError,
    TritonModelHandler,
)
from beam_triton.testing import LocalTriton
from beam_triton.transport.session import SESSIONS
from tests.support.pipelines import Run, run, score


class _Nothing:
    pass


@pytest.fixture(autouse=True)
def release_the_last_model(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Beam keeps the last model of a process alive: loading another one in its place releases it."""
    yield
    # Log records of errors hold tracebacks, whose frames hold the model.
    caplog.get_records("call").clear()
    shared.Shared().acquire(_Nothing, tag="nothing")
    gc.collect()
    assert len(SESSIONS) == 0


def fp32(*values: float) -> Any:
    return np.array(values, np.float32)


def handler_of(triton: LocalTriton, model_name: str, **options: Any) -> TritonModelHandler:
    return TritonModelHandler(triton.endpoint, model_name, **options)


def inference_of(result: PredictionResult) -> Any:
    return result.inference


def ys(results: list[Any]) -> list[float]:
    return [float(result.inference["y"][0]) for result in results]


def test_results_keep_the_order_of_the_batch(triton: LocalTriton) -> None:
    """Every element has its result, in the order of the batch, also over several requests."""
    elements = [fp32(n) for n in range(100)]
    results = score(elements, RunInference(handler_of(triton, "rejecting", batching={"max_batch_size": 7})))
    assert ys(results.results) == [2.0 * n for n in range(100)]
    first = results.results[0]
    assert type(first) is PredictionResult
    assert (first.example, first.model_id) == (elements[0], "rejecting:1")


def test_arrays_lists_and_dicts_share_a_batch(triton: LocalTriton) -> None:
    """Elements of different types and lengths share a batch."""
    elements = [[1.0, 2.0], fp32(3), {"values": [4.0] * 3}, [], {"values": fp32(5, 6)}]
    outcome = score(elements, RunInference(handler_of(triton, "ragged", batching={"max_batch_size": 32})))
    totals = [float(result.inference["total"][0]) for result in outcome.results]
    assert totals == [3.0, 3.0, 12.0, 0.0, 11.0]


def test_one_batch_keeps_many_requests_in_flight(triton: LocalTriton) -> None:
    """Beam's batch is as large as the requests allowed in flight, and they overlap: 64 of 20 ms each."""
    handler = handler_of(triton, "remote_like", batching={"max_batch_size": 1}, max_concurrent_requests=16)
    arguments = handler.batch_elements_kwargs()
    assert (arguments["min_batch_size"], arguments["max_batch_size"]) == (16, 16)
    outcome = score([np.zeros(128, np.float32)] * 64, RunInference(handler))
    assert outcome.counters["requests"] == 64
    assert outcome.distributions["inference_request_batch_size"].max == 16
    assert outcome.counters["connections_opened"] > 4
    # One after the other, 16 requests would take at least 16 times 20 ms.
    assert outcome.distributions["inference_batch_latency_micro_secs"].min < 16 * 20_000


def test_keyed_model_handler_restores_keys(triton: LocalTriton) -> None:
    """KeyedModelHandler removes keys and restores them."""
    elements = [(f"key {n}", fp32(n)) for n in range(20)]
    handler: Any = KeyedModelHandler(handler_of(triton, "rejecting"))
    results = score(elements, RunInference(handler)).results
    assert [(key, ys([result])[0]) for key, result in results] == [(f"key {n}", 2.0 * n) for n in range(20)]


def test_keyed_model_handler_selects_the_model_by_key(triton: LocalTriton) -> None:
    """KeyedModelHandler selects one of several of these handlers."""
    mappings = [
        KeyModelMapping(["a"], handler_of(triton, "double")),
        KeyModelMapping(["b"], handler_of(triton, "ensemble")),
    ]
    elements = [("a", [1.0] * 4), ("b", [1.0] * 4), ("a", [2.0] * 4)]

    def build(pipeline: beam.Pipeline) -> dict[str, Any]:
        results = pipeline | beam.Create(elements) | RunInference(KeyedModelHandler(mappings))
        firsts = results | beam.MapTuple(lambda key, result: (key, float(result.inference["y"][0])))
        _ = firsts | beam.combiners.ToList() | beam.Map(check_models)
        return {}

    # Beam never releases several models: they live as long as the process that holds them.
    run(build, "--direct_running_mode=multi_processing", "--direct_num_workers=1")


def check_models(found: list[tuple[str, float]]) -> None:
    """Runs in another process, where a failing assertion fails the pipeline."""
    assert sorted(found) == [("a", 2.0), ("a", 4.0), ("b", 4.0)]


def test_inference_args_are_request_parameters(triton: LocalTriton) -> None:
    """``inference_args`` are sent with every request and override ``request_parameters``."""
    handler = handler_of(triton, "request_facts", request_parameters={"a": 1, "b": 2})
    outcome = score([fp32(1)], RunInference(handler, inference_args={"b": 3, "c": "four"}))
    facts = json.loads(outcome.results[0].inference["facts"][0])
    assert facts["parameters"] == {"a": 1, "b": 3, "c": "four"}


def test_invalid_inference_args_are_rejected(triton: LocalTriton) -> None:
    """A value that cannot be a request parameter is rejected while the pipeline is built."""
    transform = RunInference(handler_of(triton, "request_facts"), inference_args={"a": [1]})
    with pytest.raises(ConfigurationError, match="a"):
        score([fp32(1)], transform)


def with_dead_letters(elements: list[Any], handler: Any) -> Run:
    def build(pipeline: beam.Pipeline) -> dict[str, Any]:
        results, others = (
            pipeline
            | beam.Create(elements, reshuffle=False)
            | RunInference(handler).with_exception_handling()
        )
        return {"results": results, "failures": others.failed_inferences}

    return run(build)


def test_one_failed_element_fails_its_batch(triton: LocalTriton) -> None:
    """RunInference's dead letters are batches; the message names the failing element."""
    elements = [fp32(-1 if n == 13 else n) for n in range(40)]
    handler = handler_of(triton, "rejecting", batching={"max_batch_size": 5}, max_concurrent_requests=2)
    outcome = with_dead_letters(elements, handler)
    ((batch, (kind, message, _)),) = outcome.failures
    assert [float(element[0]) for element in batch] == [10, 11, 12, -1, 14, 15, 16, 17, 18, 19]
    assert kind is InvalidRequestError
    assert "element 3 of its batch" in message and "x is negative" in message
    assert ys(outcome.results) == [2.0 * n for n in range(40) if not 10 <= n < 20]
    assert outcome.counters["failed_batches_counter"] == 1


def test_default_value_keeps_the_batch_from_failing(triton: LocalTriton) -> None:
    """Failing elements are found by bisection and yield the default; the others are scored."""
    elements: list[Any] = [fp32(-1 if n in (3, 4, 30) else n) for n in range(40)]
    elements[20] = "text"
    outcome = with_dead_letters(elements, handler_of(triton, "rejecting", default_value={"y": [-5.0]}))
    assert outcome.failures == []
    assert ys(outcome.results) == [-5.0 if n in (3, 4, 20, 30) else 2.0 * n for n in range(40)]
    assert sum(isinstance(result, DefaultResult) for result in outcome.results) == 4
    assert outcome.counters["default_values"] == 4


def test_pipeline_error_names_the_failing_element(triton: LocalTriton) -> None:
    """The pipeline fails with the server's message and the element's index in its batch."""
    with pytest.raises(InvalidRequestError, match=r"element 2 of its batch: .*x is negative"):
        handler = handler_of(triton, "rejecting", batching={"max_batch_size": 32})
        score([fp32(0), fp32(1), fp32(-1)], RunInference(handler))


def test_metrics_share_the_namespace_of_run_inference(triton: LocalTriton) -> None:
    """RunInference's own metrics stand beside those of connections and requests."""
    outcome = score(
        [fp32(n) for n in range(64)],
        RunInference(handler_of(triton, "rejecting", batching={"max_batch_size": 16})),
    )
    assert outcome.counters["num_inferences"] == 64
    assert outcome.counters["elements"] == 64
    assert outcome.counters["requests"] == 4
    assert outcome.distributions["inference_request_batch_byte_size"].sum == 64 * 4


def test_beam_chooses_the_batch_size_by_default(triton: LocalTriton) -> None:
    """Without a configured size Beam chooses the batches, and they are split to the model's limit."""
    handler = handler_of(triton, "request_facts")
    assert handler.batch_elements_kwargs() == {}
    model = handler.load_model()
    results = list(handler.run_inference([fp32(n) for n in range(70)], model))
    rows = [json.loads(inference["facts"][0])["rows"] for inference in map(inference_of, results)]
    assert rows == [32] * 64 + [6] * 6
    assert list(handler.run_inference([], model)) == []


def test_linger_seconds_batches_across_bundles(triton: LocalTriton) -> None:
    """With ``linger_seconds`` Beam collects batches in its state, across bundles."""
    batching = {"max_batch_size": 10, "linger_seconds": 5}
    handler = handler_of(triton, "rejecting", batching=batching, max_concurrent_requests=1)
    outcome = run(
        lambda pipeline: (
            pipeline | beam.Create(range(40)) | beam.Map(lambda n: [float(n)]) | RunInference(handler)
        )
    )
    assert sorted(ys(outcome.results)) == [2.0 * n for n in range(40)]


def test_preprocess_and_postprocess_functions_apply(triton: LocalTriton) -> None:
    """Beam's wrappers work around this handler."""
    handler: Any = (
        handler_of(triton, "double", batching={"max_batch_size": 4})
        .with_preprocess_fn(lambda n: [float(n)] * 4)
        .with_postprocess_fn(lambda result: float(inference_of(result)["y"][0]))
    )
    assert score([1, 2, 3], RunInference(handler)).results == [2.0, 4.0, 6.0]


def test_prebatched_input_is_sent_as_given(triton: LocalTriton) -> None:
    """With ``with_no_batching`` each input of the pipeline is a batch."""
    handler: Any = handler_of(triton, "rejecting").with_no_batching()
    outcome = score([[fp32(1), fp32(2)], [fp32(3)]], RunInference(handler))
    assert ys(outcome.results) == [2.0, 4.0, 6.0]
    assert outcome.counters["requests"] == 2


def test_run_inference_timeout_does_not_change_results(triton: LocalTriton) -> None:
    """Beam's own timeout, which loads and calls the model on other threads, gives the same results."""

    def build(pipeline: beam.Pipeline) -> Any:
        inference = RunInference(handler_of(triton, "rejecting")).with_exception_handling(timeout=20)
        results, _ = pipeline | beam.Create([fp32(n) for n in range(20)], reshuffle=False) | inference
        return results

    outcome = run(build)
    assert sorted(ys(outcome.results)) == [2.0 * n for n in range(20)]
    assert outcome.counters["elements"] == 20


def test_unknown_model_error_lists_available_models(triton: LocalTriton) -> None:
    """Loading fails at the start and lists the models that the server has."""
    with pytest.raises(ModelNotFoundError, match=r"the server has: .*double"):
        score([fp32(1)], RunInference(handler_of(triton, "doubel")))


def test_session_is_released_with_the_model(triton: LocalTriton) -> None:
    """RunInference has no teardown: the session is released when the model is garbage-collected."""
    handler = handler_of(triton, "double")
    model = handler.load_model()
    assert len(SESSIONS) == 1
    is_alive = weakref.ref(model)
    list(handler.run_inference([[1.0] * 4] * 100, model))
    del model
    gc.collect()
    assert is_alive() is None
    assert len(SESSIONS) == 0

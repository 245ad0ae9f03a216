"""`TritonModelHandler` under Beam's RunInference, on a real Triton."""

from __future__ import annotations

import contextlib
import gc
import json
import pickle
import socket
import weakref
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.ml.inference.base import KeyedModelHandler, KeyModelMapping, PredictionResult, RunInference

from beam_triton import (
    ConfigurationError,
    DefaultResult,
    InvalidRequestError,
    LocalProtocolError,
    ModelNotFoundError,
    ServerOverloadedError,
    TritonModelHandler,
)
from beam_triton.testing import LocalTriton
from beam_triton.transport.session import SESSIONS
from tests.support.pipelines import Run, release_the_last_model, run, score
from tests.support.sockets import settles

EnvoyRateLimiter: Any = None
with contextlib.suppress(ImportError):
    EnvoyRateLimiter = import_module("apache_beam.io.components.rate_limiter").EnvoyRateLimiter


@pytest.fixture(autouse=True)
def no_session_is_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing holds a session once Beam's last model is gone."""
    yield
    # Log records of errors hold tracebacks, whose frames hold the model.
    caplog.get_records("call").clear()
    release_the_last_model()
    assert settles(lambda: len(SESSIONS), 0) == 0


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


def with_dead_letters(elements: list[Any], handler: Any, **handling: Any) -> Run:
    def build(pipeline: beam.Pipeline) -> dict[str, Any]:
        results, others = (
            pipeline
            | beam.Create(elements, reshuffle=False)
            | RunInference(handler).with_exception_handling(**handling)
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


def test_batches_are_split_to_the_limit_of_the_model(triton: LocalTriton) -> None:
    """Beam's batches are made before the model's limit is known."""
    handler = handler_of(triton, "request_facts")
    model = handler.load_model()
    results = list(handler.run_inference([fp32(n) for n in range(70)], model))
    rows = [json.loads(inference["facts"][0])["rows"] for inference in map(inference_of, results)]
    assert rows == [32] * 64 + [6] * 6
    assert list(handler.run_inference([], model)) == []


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"max_batch_weight": 100_000}, 25),
        ({"max_batch_weight": 10, "element_size_fn": len}, 1),
        ({"max_batch_weight": 5 * 1000, "element_size_fn": len}, 5),
        ({}, 100),
    ],
)
def test_batches_are_bounded_by_weight(triton: LocalTriton, options: dict[str, Any], size: int) -> None:
    """By bytes, or by what a function makes of an element: 100 of 1,000 numbers."""
    handler = TritonModelHandler(triton.endpoint, "echo_variable", **options)
    outcome = score([np.zeros(1000, np.float32)] * 100, RunInference(handler))
    batches = outcome.distributions["inference_request_batch_size"]
    assert (batches.max, batches.count, batches.sum) == (size, 100 // size, 100)


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


def test_batch_that_takes_too_long_is_a_dead_letter(triton: LocalTriton) -> None:
    """Beam's timeout ends the batch, not those before it."""
    handler: Any = handler_of(triton, "slow").with_no_batching()
    outcome = with_dead_letters([[fp32(0)], [fp32(2)]], handler, timeout=1)
    assert ys(outcome.results) == [0.0]
    ((batch, (kind, _, _)),) = outcome.failures
    assert (float(batch[0][0]), kind) == (2.0, TimeoutError)


def test_server_that_does_not_answer_makes_dead_letters_in_time() -> None:
    """The timeout includes opening the model."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        handler = TritonModelHandler(endpoint, "m", timeout_seconds=1.5, circuit_breaker=None)
        outcome = with_dead_letters([fp32(0)], handler, timeout=1)
    assert [error[0] for _, error in outcome.failures] == [TimeoutError]


def test_failing_functions_make_dead_letters_of_their_own(triton: LocalTriton) -> None:
    """What fails before, in and after the model comes out apart."""
    handler: Any = (
        handler_of(triton, "rejecting", batching={"max_batch_size": 1}, max_concurrent_requests=1)
        .with_preprocess_fn(lambda text: fp32(float(text)))
        .with_postprocess_fn(lambda result: 1 / inference_of(result)["y"].item())
    )

    def build(pipeline: beam.Pipeline) -> dict[str, Any]:
        elements = pipeline | beam.Create(["1", "one", "-1", "0"], reshuffle=False)
        results, others = elements | RunInference(handler).with_exception_handling()
        return {
            "results": results,
            "before": others.failed_preprocessing[0],
            "failures": others.failed_inferences,
            "after": others.failed_postprocessing[0],
        }

    outcome = run(build)
    assert outcome.results == [0.5]
    assert [output.value[0] for output in outcome.outputs["before"]] == ["one"]
    assert [float(batch[0][0]) for batch, _ in outcome.failures] == [-1]
    assert [float(output.value[0].example[0]) for output in outcome.outputs["after"]] == [0]


@pytest.mark.skipif(not hasattr(RunInference, "with_monitoring_transform"), reason="came with Beam 2.77")
def test_monitoring_transform_sees_every_result(triton: LocalTriton) -> None:
    """Before the postprocessing function."""
    handler: Any = handler_of(triton, "rejecting").with_postprocess_fn(lambda result: "done")
    seen = beam.Map(lambda result: beam.metrics.Metrics.counter("beam_triton", result.model_id).inc())
    transform: Any = RunInference(handler).with_monitoring_transform(seen)
    outcome = score([fp32(1), fp32(2)], transform)
    assert outcome.results == ["done"] * 2
    assert outcome.counters["rejecting:1"] == 2


class Limiter:
    """Counts in itself, as all copies of a handler in a process share it; allows ``limit`` elements."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def allow(self, *, hits_added: int) -> bool:
        beam.metrics.Metrics.counter("beam_triton", "asked_for").inc(hits_added)
        self._left -= hits_added
        return self._left >= 0


def test_rate_limiter_is_asked_before_each_batch(triton: LocalTriton) -> None:
    """With the number of its elements, on the bundle's thread, where metrics count."""
    handler = handler_of(triton, "rejecting", batching={"max_batch_size": 8}, rate_limiter=Limiter(1000))
    outcome = score([fp32(n) for n in range(600)], RunInference(handler))
    assert ys(outcome.results) == [2.0 * n for n in range(600)]
    assert outcome.counters["asked_for"] == 600


def test_batch_that_the_rate_limiter_refuses_is_not_sent(triton: LocalTriton) -> None:
    """It fails with what to do, and copies of the handler share the limit."""
    handler = handler_of(triton, "rejecting", rate_limiter=Limiter(3))
    first, second = (pickle.loads(pickle.dumps(handler)) for _ in range(2))
    model = first.load_model()
    assert len(list(first.run_inference([fp32(1)] * 3, model))) == 3
    with pytest.raises(ServerOverloadedError, match="does not allow 1 elements now"):
        second.run_inference([fp32(1)], model)


@pytest.mark.skipif(EnvoyRateLimiter is None, reason="came after Beam 2.70")
def test_rate_limiter_of_beam_is_taken(triton: LocalTriton) -> None:
    """EnvoyRateLimiter asks its service; one that allows everything stands in for it."""
    limiter = EnvoyRateLimiter("localhost:1", "domain", [{"key": "value"}], namespace="beam_triton")
    limiter.allow = lambda hits_added: hits_added == 2
    handler = handler_of(triton, "rejecting", rate_limiter=limiter)
    assert ys(score([fp32(1), fp32(2)], RunInference(handler)).results) == [2.0, 4.0]


@pytest.mark.parametrize("element", [("a", fp32(1)), (1, 2)])
def test_keyed_element_without_keyed_model_handler_gets_a_hint(triton: LocalTriton, element: Any) -> None:
    """The error says which handler takes keys."""
    with pytest.raises(LocalProtocolError, match=r"RunInference\(KeyedModelHandler\(handler\)\)"):
        score([element], RunInference(handler_of(triton, "rejecting")))


def test_env_vars_are_set_before_the_model_is_opened(
    triton: LocalTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that options may refer to them."""
    monkeypatch.setenv("RUN_INFERENCE_TOKEN", "removed afterwards")
    monkeypatch.delenv("RUN_INFERENCE_TOKEN")
    handler = handler_of(
        triton, "rejecting", auth_token="env:RUN_INFERENCE_TOKEN", env_vars={"RUN_INFERENCE_TOKEN": "t"}
    )
    assert ys(score([fp32(1)], RunInference(handler)).results) == [2.0]


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
    # A question for the server's statistics may be on its way.
    assert settles(lambda: len(SESSIONS), 0) == 0

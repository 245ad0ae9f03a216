"""`TritonInference` on a real Triton: elements in, results out."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.transforms.error_handling import ErrorHandler
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton import (
    ConfigurationError,
    ConnectError,
    DefaultResult,
    InvalidRequestError,
    LocalProtocolError,
    ModelNotFoundError,
    TritonInference,
    TritonInferenceDoFn,
)
from beam_triton.testing import LocalTriton
from tests.support import faults
from tests.support.pipelines import bundle_of, run, score


class Pair(NamedTuple):
    a: Any
    b: Any


class One(NamedTuple):
    x: Any


ROW = [1.0, 2.0, 3.0, 4.0]


def fp32(*values: float) -> Any:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    "element",
    [
        pytest.param(np.array(ROW, np.float32), id="array"),
        pytest.param(np.array(ROW, np.float64), id="array of another dtype"),
        pytest.param(np.array(ROW, ">f4"), id="big-endian array"),
        pytest.param(np.repeat(np.array(ROW, np.float32), 2)[::2], id="array with gaps"),
        pytest.param(ROW, id="list"),
        pytest.param([1, 2, 3, 4], id="list of whole numbers"),
        pytest.param(tuple(ROW), id="tuple of four"),
        pytest.param({"x": ROW}, id="dict"),
        pytest.param(One(ROW), id="NamedTuple"),
    ],
)
def test_single_input_accepts_arrays_lists_dicts_and_rows(triton: LocalTriton, element: Any) -> None:
    """Each form of one tensor gives the same result, and the element comes back as it was given."""
    (result,) = score([element], TritonInference(triton.endpoint, "double")).results
    assert type(result) is PredictionResult
    assert result.model_id == "double:1"
    inference: Any = result.inference
    assert list(inference) == ["y"]
    assert inference["y"].dtype == np.float32
    assert inference["y"].tolist() == [2.0, 4.0, 6.0, 8.0]
    assert type(result.example) is type(element)
    np.testing.assert_equal(result.example, element)


def test_beam_rows_are_accepted(triton: LocalTriton) -> None:
    """A ``beam.Row`` is read by its field names, before and after it passes through Beam's coders."""

    def build(pipeline: beam.Pipeline) -> Any:
        rows = pipeline | beam.Create([ROW]) | beam.Map(lambda row: beam.Row(x=row))
        coded = rows | beam.Reshuffle() | "coded" >> TritonInference(triton.endpoint, "double")
        return {"results": rows | TritonInference(triton.endpoint, "double"), "coded": coded}

    outcome = run(build)
    (result,), (coded,) = outcome.results, outcome.outputs["coded"]
    assert isinstance(result.example, beam.Row)
    for each in (result, coded.value):
        assert each.example.x == ROW
        assert each.inference["y"].tolist() == [2.0, 4.0, 6.0, 8.0]


@pytest.mark.parametrize(
    "element",
    [
        pytest.param({"a": np.arange(16), "b": np.ones(16, int)}, id="dict"),
        pytest.param(beam.Row(a=list(range(16)), b=[1] * 16), id="Row"),
        pytest.param(Pair(list(range(16)), [1] * 16), id="NamedTuple of two"),
    ],
)
def test_two_inputs_are_matched_by_name(triton: LocalTriton, element: Any) -> None:
    """A NamedTuple of two fields is a row, not a key and an element."""
    (result,) = score([element], TritonInference(triton.endpoint, "sum_and_difference")).results
    assert sorted(result.inference) == ["difference", "sum"]
    assert result.inference["sum"].tolist() == list(range(1, 17))
    assert result.inference["difference"].tolist() == list(range(-1, 15))


@pytest.mark.parametrize("element", [3, 3.0, np.float32(3), np.array(3.0), [3.0], fp32(3)])
def test_scalar_is_accepted_for_shape_one(triton: LocalTriton, element: Any) -> None:
    """An input of shape [1] accepts a single number."""
    (result,) = score([element], TritonInference(triton.endpoint, "rejecting")).results
    assert result.inference["y"].tolist() == [6.0]


@pytest.mark.parametrize(
    ("element", "loud", "length_bytes"),
    [("grüße", "GRüßE", 7), (b"a\xffb", b"A\xffB", 3), (["hello"], "HELLO", 5), ({"text": "a"}, "A", 1)],
)
def test_strings_are_sent_as_utf8_and_returned_as_bytes(
    triton: LocalTriton, element: Any, loud: str | bytes, length_bytes: int
) -> None:
    """``str`` is encoded as UTF-8, bytes are sent as they are; results are bytes."""
    (result,) = score([element], TritonInference(triton.endpoint, "shout")).results
    expected = loud if isinstance(loud, bytes) else loud.encode()
    assert result.inference["loud"].tolist() == [expected]
    assert result.inference["length_bytes"].tolist() == [length_bytes]


def test_keys_are_returned_with_results(triton: LocalTriton) -> None:
    """(key, element) gives (key, result) for any type of key; the example is the element without its key."""
    elements = [("name", ROW), (7, {"x": ROW}), (None, fp32(*ROW)), (("a", "b"), One(ROW))]
    results = score(elements, TritonInference(triton.endpoint, "double")).results
    assert len(results) == len(elements)
    result_of = dict(results)
    for key, element in elements:
        assert result_of[key].inference["y"].tolist() == [2.0, 4.0, 6.0, 8.0]
        np.testing.assert_equal(result_of[key].example, element)


def test_only_the_outermost_pair_is_split_into_key_and_element(triton: LocalTriton) -> None:
    """The element of a pair may be a tuple of two itself."""
    ((key, result),) = score([("key", (1.0, 2.0))], TritonInference(triton.endpoint, "identity_fp32")).results
    assert key == "key"
    assert result.inference["y"].tolist() == [1.0, 2.0]


def test_outputs_selects_which_outputs_are_returned(triton: LocalTriton) -> None:
    """Only the outputs that ``outputs`` names are returned."""
    transform = TritonInference(triton.endpoint, "sum_and_difference", outputs=["difference"])
    (result,) = score([{"a": [3] * 16, "b": [1] * 16}], transform).results
    assert {name: array.tolist() for name, array in result.inference.items()} == {"difference": [2] * 16}


def test_optional_inputs_may_be_omitted_per_element(triton: LocalTriton) -> None:
    """Elements with and without an optional input share a bundle."""
    elements = [{"x": [n] * 4, "factor": [10.0]} if n % 2 else {"x": [n] * 4} for n in range(10)]
    results = score(elements, TritonInference(triton.endpoint, "optional_input")).results
    found = sorted(float(result.inference["y"][0]) for result in results)
    assert found == sorted([10.0 * n if n % 2 else n for n in range(10)])


def test_ragged_elements_share_a_bundle(triton: LocalTriton) -> None:
    """Elements of different lengths are all scored, each at its own length; none fails another."""
    elements = [(n, np.full(n % 7, n, np.float32)) for n in range(200)]
    outcome = score(elements, TritonInference(triton.endpoint, "ragged"))
    assert len(outcome.results) == 200
    for n, result in outcome.results:
        assert result.inference["total"].tolist() == [n * (n % 7)]
        assert result.inference["doubled"].tolist() == [2 * n] * (n % 7)
    # 200 elements of 7 lengths, at most 32 per request.
    assert outcome.counters["requests"] == 7


def test_two_variable_dimensions_keep_each_elements_shape(triton: LocalTriton) -> None:
    """With two variable dimensions each result has the shape of its own element, transposed."""
    shapes = [(1, 2), (2, 1), (3, 3), (1, 2), (2, 1)]
    elements = [np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for shape in shapes]
    for result in score(elements, TritonInference(triton.endpoint, "transpose")).results:
        np.testing.assert_array_equal(result.inference["y"], result.example.T)


def test_unbatched_model_gets_one_element_per_request(triton: LocalTriton) -> None:
    """With ``max_batch_size: 0`` an element is a whole request, and its result the whole response."""
    elements = [np.full((rows, 4), rows, np.float32) for rows in (1, 2, 3, 0)]
    outcome = score(elements, TritonInference(triton.endpoint, "unbatched"))
    assert outcome.counters["requests"] == 4
    for result in outcome.results:
        np.testing.assert_array_equal(result.inference["y"], result.example + 1)
        assert result.inference["y"].shape == result.example.shape


def test_batches_are_split_to_the_models_limit(triton: LocalTriton) -> None:
    """The model takes 32 rows: 100 elements go as 32, 32, 32 and 4, whatever the policy allows."""
    for options in ({}, {"batching": {"max_batch_size": 1000}}):
        outcome = score([fp32(n) for n in range(100)], facts_of(triton, **options))
        rows = sorted(facts(result)["rows"] for result in outcome.results)
        assert rows == [4] * 4 + [32] * 96
        assert outcome.counters["requests"] == 4


def test_max_batch_size_and_max_batch_bytes_bound_requests(triton: LocalTriton) -> None:
    """Requests exceed the policy neither in elements nor in bytes."""
    few = score([fp32(n) for n in range(10)], facts_of(triton, batching={"max_batch_size": 3}))
    assert sorted(facts(result)["rows"] for result in few.results) == [1] + [3] * 9
    small = score([fp32(n) for n in range(10)], facts_of(triton, batching={"max_batch_bytes": 8}))
    assert {facts(result)["rows"] for result in small.results} == {2}


@pytest.mark.parametrize("element", [ROW, fp32(*ROW)], ids=["list", "array"])
def test_linger_seconds_sends_incomplete_batches(triton: LocalTriton, element: Any) -> None:
    """A batch older than ``linger_seconds`` is sent when the next element arrives, though it is not full."""
    with bundle_of(TritonInferenceDoFn(triton.endpoint, "double", batching={"linger_seconds": 0.05})) as dofn:
        assert len(fed_slowly(dofn, element, 25)) >= 10
    with bundle_of(TritonInferenceDoFn(triton.endpoint, "double")) as dofn:
        assert fed_slowly(dofn, element, 25) == []


def fed_slowly(dofn: TritonInferenceDoFn, element: Any, count: int) -> list[Any]:
    """The outputs emitted before the bundle ends, with one element every 10 ms."""
    found: list[Any] = []
    for _ in range(count):
        time.sleep(0.01)
        found += dofn.process(element, WindowedValue(element, 0, (GlobalWindow(),))) or ()
    return found


def test_request_parameters_and_version_reach_the_model(triton: LocalTriton) -> None:
    """Parameters reach the requested version of the model; ``priority`` is not one of them."""
    transform = facts_of(triton, model_version=1, request_parameters={"tag": "blue", "n": 3}, priority=2)
    (result,) = score([fp32(1)], transform).results
    assert result.model_id == "request_facts:1"
    assert facts(result)["version"] == "1"
    assert facts(result)["parameters"] == {"tag": "blue", "n": 3}


def test_model_id_contains_the_version_that_served(triton: LocalTriton) -> None:
    """Without ``model_version`` the server uses the latest version, and the result names it."""
    (result,) = score([fp32(1)], facts_of(triton)).results
    assert result.model_id == "request_facts:3"


def test_classification_returns_top_classes_with_labels(triton: LocalTriton) -> None:
    """The k highest-scoring classes come as BYTES ``value:index:label``, best first."""
    transform = TritonInference(triton.endpoint, "classifier", classification={"scores": 2})
    (result,) = score([[0.1, 0.7, 0.05, 0.15]], transform).results
    classes = [text.decode().split(":", 1)[1] for text in result.inference["scores"]]
    assert classes == ["1:bee", "3:dog"]


def test_empty_outputs_still_give_results(triton: LocalTriton) -> None:
    """A model may return no values for its elements; each element still has its result."""
    results = score([[1.0], [2.0]], TritonInference(triton.endpoint, "empty_output")).results
    assert [result.inference["y"].shape for result in results] == [(0,), (0,)]


def test_ensembles_are_scored_like_models(triton: LocalTriton) -> None:
    """An ensemble is scored like any other model."""
    (result,) = score([ROW], TritonInference(triton.endpoint, "ensemble")).results
    assert result.inference["y"].tolist() == [4.0, 8.0, 12.0, 16.0]


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compression_does_not_change_results(triton: LocalTriton, encoding: str) -> None:
    """Compressed requests and responses give the same results."""
    transform = TritonInference(
        triton.endpoint, "double", compression=encoding, response_compression=encoding
    )
    results = score([ROW] * 40, transform).results
    assert [result.inference["y"].tolist() for result in results] == [[2.0, 4.0, 6.0, 8.0]] * 40


def test_options_may_be_plain_dicts(triton: LocalTriton) -> None:
    """Every policy may be a plain dict, as YAML pipelines and other SDKs pass them."""
    options = json.loads(
        """{"timeout_seconds": 20, "max_concurrent_requests": 4, "retry": {"max_retries": 1},
            "batching": {"max_batch_size": 8}, "pool": {"max_total": 4, "max_idle": 2},
            "circuit_breaker": {"open_seconds": 5}, "tls": {"verify": true},
            "default_value": {"y": [0, 0, 0, 0]}, "outputs": ["y"]}"""
    )
    results = score([ROW] * 20, TritonInference([triton.endpoint], "double", **options)).results
    assert [result.inference["y"].tolist() for result in results] == [[2.0, 4.0, 6.0, 8.0]] * 20


def test_transform_and_dofn_pickle_before_and_after_use(triton: LocalTriton) -> None:
    """Pickled copies score as the originals do."""
    transform = TritonInference(triton.endpoint, "double")
    dofn = TritonInferenceDoFn(triton.endpoint, "double")
    for _ in range(2):
        transform, dofn = pickle.loads(pickle.dumps((transform, dofn)))
        assert len(score([ROW], transform).results) == 1
        assert len(score([ROW], beam.ParDo(dofn)).results) == 1


def test_empty_input_sends_no_requests(triton: LocalTriton) -> None:
    """An empty PCollection and bundles without elements send no requests."""
    outcome = score([], TritonInference(triton.endpoint, "double"))
    assert outcome.results == []
    assert "requests" not in outcome.counters
    with bundle_of(TritonInferenceDoFn(triton.endpoint, "double")) as dofn:
        for _ in range(3):
            assert list(dofn.finish_bundle()) == []
            dofn.start_bundle()


def test_monitoring_enabled_reports_pool_gauges(triton: LocalTriton) -> None:
    """The figures that monitoring logs are metrics, too, and only where it is enabled."""
    elements = [fp32(n) for n in range(10)]
    pool = {"monitoring_enabled": True}
    outcome = score(elements, TritonInference(triton.endpoint, "rejecting", pool=pool))
    assert outcome.gauges == {"connections_idle": 1, "connections_active": 0, "connections_waiting": 0}
    assert score(elements, TritonInference(triton.endpoint, "rejecting")).gauges == {}


def test_metrics_add_up_to_the_requests_sent(triton: LocalTriton) -> None:
    """Counters and distributions add up to the requests that were sent."""
    elements = [fp32(n if n % 10 else -n - 1) for n in range(100)]
    transform = TritonInference(
        triton.endpoint, "rejecting", batching={"max_batch_size": 10}, max_concurrent_requests=3
    ).with_exception_handling()
    outcome = score(elements, transform)
    counters, distributions = outcome.counters, outcome.distributions
    assert len(outcome.results) == 90
    assert counters["elements"] == 100
    assert counters["failures"] == 10
    # Ten batches of ten, each bisected down to its bad element: 10, 5 5, 2 3, 1 1 or similar.
    assert counters["requests"] == distributions["batch_size"].count
    assert counters["split_batches"] * 2 + 10 == counters["requests"]
    # A question for the server's statistics may have one of them.
    assert 1 <= counters["connections_opened"] <= 4
    # One connection was opened for the model's metadata, and reused.
    assert counters["connections_opened"] + counters["connections_reused"] == counters["requests"] + 1
    assert distributions["batch_size"].max == 10
    assert distributions["batch_size"].min == 1
    assert distributions["request_bytes"].count == counters["requests"]
    assert distributions["request_bytes"].min > 0
    assert distributions["response_bytes"].count == counters["requests"]
    assert distributions["request_latency_milliseconds"].count == counters["requests"]
    buckets = [count for name, count in counters.items() if name.startswith("request_latency_bucket_")]
    assert sum(buckets) == counters["requests"]
    for name in ("retries", "default_values", "connection_waits"):
        assert name not in counters


def test_default_values_are_not_counted_as_failures(triton: LocalTriton) -> None:
    """An element that yields its default counts as an element, but not as a failure."""
    transform = TritonInference(triton.endpoint, "rejecting", default_value=[0.0])
    counters = score([fp32(1), fp32(-1)], transform).counters
    assert counters["elements"] == 2
    assert counters["default_values"] == 1
    assert "failures" not in counters


def test_default_value_replaces_failed_elements(triton: LocalTriton) -> None:
    """Failed elements yield the default as a ``DefaultResult`` of its own, whose arrays are not shared."""
    transform = TritonInference(triton.endpoint, "rejecting", default_value={"y": [-5]})
    results = dict(score([("good", fp32(3)), ("bad", fp32(-1)), ("worse", "text")], transform).results)
    assert results["good"].inference["y"].tolist() == [6.0]
    assert not isinstance(results["good"], DefaultResult)
    for key, example in (("bad", fp32(-1)), ("worse", "text")):
        assert isinstance(results[key], DefaultResult)
        assert results[key].model_id == "default"
        assert results[key].example == example
        assert results[key].inference["y"].dtype == np.float32
        assert results[key].inference["y"].tolist() == [-5.0]
    results["bad"].inference["y"][0] = 1
    assert results["worse"].inference["y"].tolist() == [-5.0]


@pytest.mark.parametrize(
    ("default_value", "message"),
    [
        ({"z": [1.0]}, r"missing \['y'\], unknown \['z'\]"),
        ([1.0, 2.0], "y"),
        ("text", "y"),
    ],
)
def test_invalid_default_value_is_rejected_in_setup(
    triton: LocalTriton, default_value: Any, message: str
) -> None:
    """It is rejected before any element is scored, and the message says why."""
    transform = TritonInference(triton.endpoint, "rejecting", default_value=default_value)
    with pytest.raises(ConfigurationError, match=message) as caught:
        score([fp32(1)], transform)
    assert "default_value" in str(caught.value)


def test_default_value_for_several_outputs_requires_names(triton: LocalTriton) -> None:
    """One value for two outputs is rejected; it is accepted when only one of them is requested."""
    element = {"a": "text", "b": [0] * 16}
    with pytest.raises(ConfigurationError, match="difference"):
        score([element], TritonInference(triton.endpoint, "sum_and_difference", default_value=[0] * 16))
    transform = TritonInference(
        triton.endpoint, "sum_and_difference", default_value=[0] * 16, outputs=["sum"]
    )
    (result,) = score([element], transform).results
    assert {name: array.tolist() for name, array in result.inference.items()} == {"sum": [0] * 16}


def test_failures_are_a_second_output(triton: LocalTriton) -> None:
    """A failure is the element as it was given, with type, message and traceback lines of its error."""
    elements = [("a", fp32(1)), ("b", fp32(-1)), ("c", fp32(1, 2)), ("d", fp32(4))]
    transform = TritonInference(triton.endpoint, "rejecting").with_exception_handling()
    outcome = score(elements, transform)
    assert sorted(key for key, _ in outcome.results) == ["a", "d"]
    failures = {element[0]: (element[1], *reason) for element, reason in outcome.failures}
    assert sorted(failures) == ["b", "c"]
    example, kind, message, lines = failures["b"]
    assert (example.tolist(), kind) == ([-1.0], InvalidRequestError)
    assert "x is negative" in message
    assert lines and all(isinstance(line, str) for line in lines)
    example, kind, message, lines = failures["c"]
    assert (example.tolist(), kind) == ([1.0, 2.0], LocalProtocolError)
    assert "'x'" in message and "[1]" in message
    assert any("LocalProtocolError" in line for line in lines)


def test_unconvertible_elements_fail_alone(triton: LocalTriton) -> None:
    """An element that cannot be converted fails alone, and the message says what the model takes."""
    wrong = [None, object, "text", {}, {"y": ROW}, {"x": None}, [[1, 2], [3]], [*ROW, 5.0], ["1", "2"]]
    transform = TritonInference(triton.endpoint, "double").with_exception_handling()
    outcome = score([*wrong, ROW], transform)
    assert len(outcome.results) == 1
    assert len(outcome.failures) == len(wrong)
    for _, (kind, message, _) in outcome.failures:
        assert kind is LocalProtocolError
        assert "x" in message


class FailureTypeNames(beam.PTransform[Any, Any]):
    def expand(self, failures: Any) -> Any:
        return failures | beam.Map(lambda failure: failure[1][0].__name__)


def test_with_error_handler_receives_the_failures(triton: LocalTriton) -> None:
    """``with_error_handler`` routes failures to the handler and leaves the results; None changes nothing."""

    def build(pipeline: beam.Pipeline) -> dict[str, Any]:
        elements = pipeline | beam.Create([fp32(1), fp32(-1)], reshuffle=False)
        handler = ErrorHandler(FailureTypeNames())
        with handler:
            transform = TritonInference(triton.endpoint, "rejecting").with_error_handler(handler)
            results = elements | transform
        return {"results": results, "failures": handler.output()}

    outcome = run(build)
    assert [result.inference["y"].tolist() for result in outcome.results] == [[2.0]]
    assert outcome.failures == ["InvalidRequestError"]
    transform = TritonInference(triton.endpoint, "double").with_error_handler(None)
    assert len(score([ROW], transform).results) == 1


@pytest.mark.parametrize("keyed", [False, True])
def test_pipeline_error_names_the_failing_element(triton: LocalTriton, keyed: bool) -> None:
    """The first failure fails the pipeline; the message has the element's index and key."""
    elements: list[Any] = [fp32(n if n != 5 else -1) for n in range(8)]
    if keyed:
        elements = [(f"key {n}", element) for n, element in enumerate(elements)]
    with pytest.raises(InvalidRequestError, match="x is negative") as caught:
        score(elements, TritonInference(triton.endpoint, "rejecting"))
    assert "element 5 of its bundle" in str(caught.value)
    assert ("'key 5'" in str(caught.value)) is keyed


def test_response_with_missing_rows_fails_all_its_elements(triton: LocalTriton) -> None:
    """Results are never guessed: all elements of such a request fail."""
    transform = TritonInference(triton.endpoint, "one_row_less").with_exception_handling()
    outcome = score([fp32(n) for n in range(5)], transform)
    assert outcome.results == []
    assert {kind.__name__ for _, (kind, _, _) in outcome.failures} == {"UnexpectedOutputError"}
    assert len(outcome.failures) == 5


def test_unknown_model_error_lists_available_models(triton: LocalTriton) -> None:
    """The error lists the models that the server has."""
    with pytest.raises(ModelNotFoundError, match=r"'doubel'.*the server has: .*\bdouble\b"):
        score([ROW], TritonInference(triton.endpoint, "doubel"))


def test_unknown_version_raises_model_not_found(triton: LocalTriton) -> None:
    """A missing version is a missing model, and the message names the version."""
    with pytest.raises(ModelNotFoundError, match="7"):
        score([ROW], TritonInference(triton.endpoint, "double", model_version=7))


def test_unknown_output_is_rejected_in_setup(triton: LocalTriton) -> None:
    """The error lists the outputs that the model has."""
    with pytest.raises(ConfigurationError, match="sum"):
        score([ROW], TritonInference(triton.endpoint, "sum_and_difference", outputs=["product"]))


@pytest.mark.parametrize(("model_name", "word"), [("countdown", "decoupled"), ("running_sum", "sequence")])
def test_decoupled_and_sequence_models_are_rejected_in_setup(
    triton: LocalTriton, model_name: str, word: str
) -> None:
    """Models whose requests depend on each other, or have several responses, are rejected."""
    with pytest.raises(ConfigurationError, match=word):
        score([1], TritonInference(triton.endpoint, model_name))


def test_unreachable_server_error_names_the_server() -> None:
    """The error is raised as soon as ``timeout_seconds`` is over, and names the server."""
    with faults.refusing_port() as port:
        transform = TritonInference(
            f"http://127.0.0.1:{port}", "double", timeout_seconds=0.5, pool={"connect_timeout_seconds": 0.4}
        )
        with pytest.raises(ConnectError, match=f"127.0.0.1:{port}"):
            score([ROW], transform)


def hundred(n: int) -> Iterator[Any]:
    """A hundred copies of one keyed element."""
    yield from ((n, fp32(n, n, n, n)) for _ in range(100))


@pytest.mark.parametrize("mode", ["in_memory", "multi_threading", "multi_processing"])
def test_each_element_comes_out_once_in_every_running_mode(triton: LocalTriton, mode: str) -> None:
    """However the runner distributes elements over threads and processes."""
    options = [f"--direct_running_mode={mode}", "--direct_num_workers=2"]

    def build(pipeline: beam.Pipeline) -> Any:
        scored = (
            pipeline
            | beam.Create(range(20))
            | beam.FlatMap(hundred)
            | TritonInference(triton.endpoint, "double", batching={"max_batch_size": 16})
        )
        _ = (
            scored
            | beam.MapTuple(lambda n, result: (n, float(result.inference["y"][0])))
            | beam.combiners.Count.PerElement()
            | beam.combiners.ToList()
            | beam.Map(check_counts)
        )
        # Workers in other processes cannot reach what this process collects.
        return {}

    run(build, *options)


def check_counts(counts: Iterable[tuple[tuple[int, float], int]]) -> None:
    """Runs on a worker, which may be another process, where a failing assertion fails the pipeline."""
    assert sorted(counts) == [((n, 2.0 * n), 100) for n in range(20)]


def facts_of(triton: LocalTriton, **options: Any) -> TritonInference:
    """A transform on the model that returns what came with its request."""
    return TritonInference(triton.endpoint, "request_facts", **options)


def facts(result: PredictionResult) -> dict[str, Any]:
    inference: Any = result.inference
    found: dict[str, Any] = json.loads(inference["facts"][0])
    return found

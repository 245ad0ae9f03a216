"""`TritonInference` on a real Triton: what goes in, and what comes out of it."""

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
def test_forms_of_one_input(triton: LocalTriton, element: Any) -> None:
    """Each way of giving one tensor gives the same result, and the element comes back as it was given."""
    (result,) = score([element], TritonInference(triton.endpoint, "double")).results
    assert type(result) is PredictionResult
    assert result.model_id == "double:1"
    inference: Any = result.inference
    assert list(inference) == ["y"]
    assert inference["y"].dtype == np.float32
    assert inference["y"].tolist() == [2.0, 4.0, 6.0, 8.0]
    assert type(result.example) is type(element)
    np.testing.assert_equal(result.example, element)


def test_rows_of_beams(triton: LocalTriton) -> None:
    """A Row is taken by its names, both as it is made and as Beam's coders give it back."""

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
def test_forms_of_two_inputs(triton: LocalTriton, element: Any) -> None:
    """Inputs come by name; a NamedTuple of two fields is a row, not a key and its element."""
    (result,) = score([element], TritonInference(triton.endpoint, "sum_and_difference")).results
    assert sorted(result.inference) == ["difference", "sum"]
    assert result.inference["sum"].tolist() == list(range(1, 17))
    assert result.inference["difference"].tolist() == list(range(-1, 15))


@pytest.mark.parametrize("element", [3, 3.0, np.float32(3), np.array(3.0), [3.0], fp32(3)])
def test_a_scalar_is_a_tensor_of_one(triton: LocalTriton, element: Any) -> None:
    """A number alone is taken by an input of shape [1]."""
    (result,) = score([element], TritonInference(triton.endpoint, "rejecting")).results
    assert result.inference["y"].tolist() == [6.0]


@pytest.mark.parametrize(
    ("element", "loud", "length_bytes"),
    [("grüße", "GRüßE", 7), (b"a\xffb", b"A\xffB", 3), (["hello"], "HELLO", 5), ({"text": "a"}, "A", 1)],
)
def test_strings(triton: LocalTriton, element: Any, loud: str | bytes, length_bytes: int) -> None:
    """str travels as UTF-8, bytes as they are; what comes back is bytes."""
    (result,) = score([element], TritonInference(triton.endpoint, "shout")).results
    expected = loud if isinstance(loud, bytes) else loud.encode()
    assert result.inference["loud"].tolist() == [expected]
    assert result.inference["length_bytes"].tolist() == [length_bytes]


def test_keys_come_back(triton: LocalTriton) -> None:
    """(key, element) gives (key, result), whatever the key is; the example is without its key."""
    elements = [("name", ROW), (7, {"x": ROW}), (None, fp32(*ROW)), (("a", "b"), One(ROW))]
    results = score(elements, TritonInference(triton.endpoint, "double")).results
    assert len(results) == len(elements)
    result_of = dict(results)
    for key, element in elements:
        assert result_of[key].inference["y"].tolist() == [2.0, 4.0, 6.0, 8.0]
        np.testing.assert_equal(result_of[key].example, element)


def test_a_key_with_an_element_of_two_numbers(triton: LocalTriton) -> None:
    """Only the outermost plain tuple of two is taken apart: its second half may be one too."""
    ((key, result),) = score([("key", (1.0, 2.0))], TritonInference(triton.endpoint, "identity_fp32")).results
    assert key == "key"
    assert result.inference["y"].tolist() == [1.0, 2.0]


def test_named_outputs_only(triton: LocalTriton) -> None:
    """``outputs`` names what is asked for; nothing else comes."""
    transform = TritonInference(triton.endpoint, "sum_and_difference", outputs=["difference"])
    (result,) = score([{"a": [3] * 16, "b": [1] * 16}], transform).results
    assert {name: array.tolist() for name, array in result.inference.items()} == {"difference": [2] * 16}


def test_optional_inputs_may_be_left_out_by_some(triton: LocalTriton) -> None:
    """Elements with and without an optional input come in one bundle, and each is taken as it is."""
    elements = [{"x": [n] * 4, "factor": [10.0]} if n % 2 else {"x": [n] * 4} for n in range(10)]
    results = score(elements, TritonInference(triton.endpoint, "optional_input")).results
    found = sorted(float(result.inference["y"][0]) for result in results)
    assert found == sorted([10.0 * n if n % 2 else n for n in range(10)])


def test_ragged_elements_share_a_bundle(triton: LocalTriton) -> None:
    """Elements of many lengths are all scored, each with its own; none fails another."""
    elements = [(n, np.full(n % 7, n, np.float32)) for n in range(200)]
    outcome = score(elements, TritonInference(triton.endpoint, "ragged"))
    assert len(outcome.results) == 200
    for n, result in outcome.results:
        assert result.inference["total"].tolist() == [n * (n % 7)]
        assert result.inference["doubled"].tolist() == [2 * n] * (n % 7)
    # 200 elements of 7 lengths, 32 a request at the most.
    assert outcome.counters["requests"] == 7


def test_ragged_rows_of_matrices(triton: LocalTriton) -> None:
    """Two free dimensions at once: results have the element's own shape, turned."""
    shapes = [(1, 2), (2, 1), (3, 3), (1, 2), (2, 1)]
    elements = [np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for shape in shapes]
    for result in score(elements, TritonInference(triton.endpoint, "transpose")).results:
        np.testing.assert_array_equal(result.inference["y"], result.example.T)


def test_one_element_a_request_without_a_batch_dimension(triton: LocalTriton) -> None:
    """``max_batch_size: 0``: an element is a whole request, its result the whole answer."""
    elements = [np.full((rows, 4), rows, np.float32) for rows in (1, 2, 3, 0)]
    outcome = score(elements, TritonInference(triton.endpoint, "unbatched"))
    assert outcome.counters["requests"] == 4
    for result in outcome.results:
        np.testing.assert_array_equal(result.inference["y"], result.example + 1)
        assert result.inference["y"].shape == result.example.shape


def test_more_than_the_models_limit_is_split(triton: LocalTriton) -> None:
    """The model takes 32 a request: 100 elements go as 32, 32, 32 and 4, a larger setting or not."""
    for options in ({}, {"batching": {"max_batch_size": 1000}}):
        outcome = score([fp32(n) for n in range(100)], facts_of(triton, **options))
        rows = sorted(facts(result)["rows"] for result in outcome.results)
        assert rows == [4] * 4 + [32] * 96
        assert outcome.counters["requests"] == 4


def test_max_batch_size_and_max_batch_bytes(triton: LocalTriton) -> None:
    """Requests hold no more than the policy says, in elements and in bytes."""
    few = score([fp32(n) for n in range(10)], facts_of(triton, batching={"max_batch_size": 3}))
    assert sorted(facts(result)["rows"] for result in few.results) == [1] + [3] * 9
    small = score([fp32(n) for n in range(10)], facts_of(triton, batching={"max_batch_bytes": 8}))
    assert {facts(result)["rows"] for result in small.results} == {2}


@pytest.mark.parametrize("element", [ROW, fp32(*ROW)], ids=["list", "array"])
def test_a_lingering_batch_leaves_before_it_is_full(triton: LocalTriton, element: Any) -> None:
    """``linger_seconds``: what has waited for so long goes with the next element that comes."""
    with bundle_of(TritonInferenceDoFn(triton.endpoint, "double", batching={"linger_seconds": 0.05})) as dofn:
        assert len(fed_slowly(dofn, element, 25)) >= 10
    with bundle_of(TritonInferenceDoFn(triton.endpoint, "double")) as dofn:
        assert fed_slowly(dofn, element, 25) == []


def fed_slowly(dofn: TritonInferenceDoFn, element: Any, count: int) -> list[Any]:
    """What leaves a DoFn while an element goes in each hundredth of a second, before the bundle ends."""
    found: list[Any] = []
    for _ in range(count):
        time.sleep(0.01)
        found += dofn.process(element, WindowedValue(element, 0, (GlobalWindow(),))) or ()
    return found


def test_request_parameters_version_and_priority(triton: LocalTriton) -> None:
    """Request parameters and the model's version reach the model."""
    transform = facts_of(triton, model_version=1, request_parameters={"tag": "blue", "n": 3}, priority=2)
    (result,) = score([fp32(1)], transform).results
    assert result.model_id == "request_facts:1"
    assert facts(result)["version"] == "1"
    assert facts(result)["parameters"] == {"tag": "blue", "n": 3}


def test_the_servers_version_is_in_the_model_id(triton: LocalTriton) -> None:
    """Without ``model_version`` the server serves the latest, and the result says which one."""
    (result,) = score([fp32(1)], facts_of(triton)).results
    assert result.model_id == "request_facts:3"


def test_classification(triton: LocalTriton) -> None:
    """The k best classes come as BYTES ``value:index:label``, best first."""
    transform = TritonInference(triton.endpoint, "classifier", classification={"scores": 2})
    (result,) = score([[0.1, 0.7, 0.05, 0.15]], transform).results
    classes = [text.decode().split(":", 1)[1] for text in result.inference["scores"]]
    assert classes == ["1:bee", "3:dog"]


def test_empty_outputs(triton: LocalTriton) -> None:
    """A model may answer nothing for its elements; each still has its result."""
    results = score([[1.0], [2.0]], TritonInference(triton.endpoint, "empty_output")).results
    assert [result.inference["y"].shape for result in results] == [(0,), (0,)]


def test_an_ensemble(triton: LocalTriton) -> None:
    """An ensemble is a model as any other."""
    (result,) = score([ROW], TritonInference(triton.endpoint, "ensemble")).results
    assert result.inference["y"].tolist() == [4.0, 8.0, 12.0, 16.0]


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_both_ways(triton: LocalTriton, encoding: str) -> None:
    """Compressed requests and answers give the same results."""
    transform = TritonInference(
        triton.endpoint, "double", compression=encoding, response_compression=encoding
    )
    results = score([ROW] * 40, transform).results
    assert [result.inference["y"].tolist() for result in results] == [[2.0, 4.0, 6.0, 8.0]] * 40


def test_options_from_plain_dicts(triton: LocalTriton) -> None:
    """Every policy may be a plain dict, as YAML pipelines and other SDKs give them."""
    options = json.loads(
        """{"timeout_seconds": 20, "max_concurrent_requests": 4, "retry": {"max_retries": 1},
            "batching": {"max_batch_size": 8}, "pool": {"max_total": 4, "max_idle": 2},
            "circuit_breaker": {"open_seconds": 5}, "tls": {"verify": true},
            "default_value": {"y": [0, 0, 0, 0]}, "outputs": ["y"]}"""
    )
    results = score([ROW] * 20, TritonInference([triton.endpoint], "double", **options)).results
    assert [result.inference["y"].tolist() for result in results] == [[2.0, 4.0, 6.0, 8.0]] * 20


def test_pickled_transform_and_dofn(triton: LocalTriton) -> None:
    """Both pickle before and after use."""
    transform = TritonInference(triton.endpoint, "double")
    dofn = TritonInferenceDoFn(triton.endpoint, "double")
    for _ in range(2):
        transform, dofn = pickle.loads(pickle.dumps((transform, dofn)))
        assert len(score([ROW], transform).results) == 1
        assert len(score([ROW], beam.ParDo(dofn)).results) == 1


def test_no_elements(triton: LocalTriton) -> None:
    """An empty PCollection, and bundles without elements, send nothing."""
    outcome = score([], TritonInference(triton.endpoint, "double"))
    assert outcome.results == []
    assert "requests" not in outcome.counters
    with bundle_of(TritonInferenceDoFn(triton.endpoint, "double")) as dofn:
        for _ in range(3):
            assert list(dofn.finish_bundle()) == []
            dofn.start_bundle()


def test_a_monitored_pool_gives_gauges(triton: LocalTriton) -> None:
    """The figures that monitoring logs are metrics, too, and only where it is on."""
    elements = [fp32(n) for n in range(10)]
    pool = {"monitoring_enabled": True}
    outcome = score(elements, TritonInference(triton.endpoint, "rejecting", pool=pool))
    assert outcome.gauges == {"connections_idle": 1, "connections_active": 0, "connections_waiting": 0}
    assert score(elements, TritonInference(triton.endpoint, "rejecting")).gauges == {}


def test_metrics(triton: LocalTriton) -> None:
    """Counters and distributions add up to what was sent."""
    elements = [fp32(n if n % 10 else -n - 1) for n in range(100)]
    transform = TritonInference(
        triton.endpoint, "rejecting", batching={"max_batch_size": 10}, max_concurrent_requests=3
    ).with_exception_handling()
    outcome = score(elements, transform)
    counters, distributions = outcome.counters, outcome.distributions
    assert len(outcome.results) == 90
    assert counters["elements"] == 100
    assert counters["failures"] == 10
    # Ten batches of ten, each halved down to its bad element: 10, 5 5, 2 3, 1 1 or the like.
    assert counters["requests"] == distributions["batch_size"].count
    assert counters["split_batches"] * 2 + 10 == counters["requests"]
    assert 1 <= counters["connections_opened"] <= 3
    # One was opened to ask for the model, and reused.
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


def test_default_values_are_counted(triton: LocalTriton) -> None:
    """An element that yields its default is an element, but no failure."""
    transform = TritonInference(triton.endpoint, "rejecting", default_value=[0.0])
    counters = score([fp32(1), fp32(-1)], transform).counters
    assert counters["elements"] == 2
    assert counters["default_values"] == 1
    assert "failures" not in counters


def test_default_values(triton: LocalTriton) -> None:
    """Elements that fail yield the default: a result of its own kind, with arrays nobody else has."""
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
def test_a_default_value_that_does_not_fit(triton: LocalTriton, default_value: Any, message: str) -> None:
    """It is refused at the start, before any element, and says why."""
    transform = TritonInference(triton.endpoint, "rejecting", default_value=default_value)
    with pytest.raises(ConfigurationError, match=message) as caught:
        score([fp32(1)], transform)
    assert "default_value" in str(caught.value)


def test_the_default_value_of_several_outputs_needs_names(triton: LocalTriton) -> None:
    """One value for two outputs is refused; asking for one of them makes it fit."""
    element = {"a": "text", "b": [0] * 16}
    with pytest.raises(ConfigurationError, match="difference"):
        score([element], TritonInference(triton.endpoint, "sum_and_difference", default_value=[0] * 16))
    transform = TritonInference(
        triton.endpoint, "sum_and_difference", default_value=[0] * 16, outputs=["sum"]
    )
    (result,) = score([element], transform).results
    assert {name: array.tolist() for name, array in result.inference.items()} == {"sum": [0] * 16}


def test_failures_come_beside_the_results(triton: LocalTriton) -> None:
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


def test_elements_that_no_tensor_can_be_made_of(triton: LocalTriton) -> None:
    """Whatever an element is, it fails alone, and the message says what the model takes."""
    wrong = [None, object, "text", {}, {"y": ROW}, {"x": None}, [[1, 2], [3]], [*ROW, 5.0], ["1", "2"]]
    transform = TritonInference(triton.endpoint, "double").with_exception_handling()
    outcome = score([*wrong, ROW], transform)
    assert len(outcome.results) == 1
    assert len(outcome.failures) == len(wrong)
    for _, (kind, message, _) in outcome.failures:
        assert kind is LocalProtocolError
        assert "x" in message


class Handled(beam.PTransform[Any, Any]):
    def expand(self, failures: Any) -> Any:
        return failures | beam.Map(lambda failure: failure[1][0].__name__)


def test_an_error_handler_of_beams(triton: LocalTriton) -> None:
    """``with_error_handler`` sends the failures there and leaves the results; None changes nothing."""

    def build(pipeline: beam.Pipeline) -> dict[str, Any]:
        elements = pipeline | beam.Create([fp32(1), fp32(-1)], reshuffle=False)
        handler = ErrorHandler(Handled())
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
def test_without_exception_handling_the_element_is_named(triton: LocalTriton, keyed: bool) -> None:
    """The first failure fails the pipeline and says which element it was, by number and key."""
    elements: list[Any] = [fp32(n if n != 5 else -1) for n in range(8)]
    if keyed:
        elements = [(f"key {n}", element) for n, element in enumerate(elements)]
    with pytest.raises(InvalidRequestError, match="x is negative") as caught:
        score(elements, TritonInference(triton.endpoint, "rejecting"))
    assert "element 5 of its bundle" in str(caught.value)
    assert ("'key 5'" in str(caught.value)) is keyed


def test_an_answer_that_does_not_account_for_every_element(triton: LocalTriton) -> None:
    """Results are never guessed: all elements of such a request fail."""
    transform = TritonInference(triton.endpoint, "one_row_less").with_exception_handling()
    outcome = score([fp32(n) for n in range(5)], transform)
    assert outcome.results == []
    assert {kind.__name__ for _, (kind, _, _) in outcome.failures} == {"RemoteProtocolError"}
    assert len(outcome.failures) == 5


def test_a_model_that_is_not_there(triton: LocalTriton) -> None:
    """The error lists the models that are."""
    with pytest.raises(ModelNotFoundError, match=r"'doubel'.*the server has: .*\bdouble\b"):
        score([ROW], TritonInference(triton.endpoint, "doubel"))


def test_a_version_that_is_not_there(triton: LocalTriton) -> None:
    """A missing version is a missing model, and the message says so."""
    with pytest.raises(ModelNotFoundError, match="7"):
        score([ROW], TritonInference(triton.endpoint, "double", model_version=7))


def test_outputs_that_are_not_there(triton: LocalTriton) -> None:
    """An output that the model has not got is refused in setup, with those that it has."""
    with pytest.raises(ConfigurationError, match="sum"):
        score([ROW], TritonInference(triton.endpoint, "sum_and_difference", outputs=["product"]))


@pytest.mark.parametrize(("model_name", "word"), [("countdown", "decoupled"), ("running_sum", "sequence")])
def test_models_that_take_no_batches(triton: LocalTriton, model_name: str, word: str) -> None:
    """Models whose requests depend on each other, or have many answers, are refused in setup."""
    with pytest.raises(ConfigurationError, match=word):
        score([1], TritonInference(triton.endpoint, model_name))


def test_a_server_that_is_not_there() -> None:
    """The error names the server; it comes as soon as ``timeout_seconds`` is over."""
    with faults.refusing_port() as port:
        transform = TritonInference(
            f"http://127.0.0.1:{port}", "double", timeout_seconds=0.5, pool={"connect_timeout_seconds": 0.4}
        )
        with pytest.raises(ConnectError, match=f"127.0.0.1:{port}"):
            score([ROW], transform)


def hundred(n: int) -> Iterator[Any]:
    """A hundred elements of one key."""
    yield from ((n, fp32(n, n, n, n)) for _ in range(100))


@pytest.mark.parametrize("mode", ["in_memory", "multi_threading", "multi_processing"])
def test_every_running_mode(triton: LocalTriton, mode: str) -> None:
    """Each element comes out once, however the runner spreads them over threads and processes."""
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
        # What is kept in this process is out of reach for others.
        return {}

    run(build, *options)


def check_counts(counts: Iterable[tuple[tuple[int, float], int]]) -> None:
    """Runs on a worker, which may be another process: an assertion there fails the pipeline here."""
    assert sorted(counts) == [((n, 2.0 * n), 100) for n in range(20)]


def facts_of(triton: LocalTriton, **options: Any) -> TritonInference:
    """A transform on the model that tells what came with its request."""
    return TritonInference(triton.endpoint, "request_facts", **options)


def facts(result: PredictionResult) -> dict[str, Any]:
    inference: Any = result.inference
    found: dict[str, Any] = json.loads(inference["facts"][0])
    return found

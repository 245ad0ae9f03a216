"""A model and its version for each element: by a callable, by a column, by a side input."""

from __future__ import annotations

import gc
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.pvalue import AsDict, AsIter, AsList, AsMultiMap, AsSingleton
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton import (
    ConfigurationError,
    ConnectionPoolConfig,
    ModelNotFoundError,
    TritonBatchInference,
    TritonInference,
    TritonSequenceInference,
)
from beam_triton.options import InferenceOptions
from beam_triton.remote_model import is_in_use
from beam_triton.testing import FakeModel, FakeTriton
from beam_triton.transforms.inference import TritonInferenceDoFn
from tests.support.pipelines import bundle_of, run, score


def times(factor: int, versions: tuple[str, ...] = ("1",)) -> FakeModel:
    return FakeModel(
        lambda inputs: {"y": factor * inputs["x"]},
        inputs={"x": ("FP32", [1])},
        outputs={"y": ("FP32", [1])},
        max_batch_size=8,
        versions=versions,
    )


OTHER_OUTPUT = FakeModel(
    lambda inputs: {"z": inputs["x"]}, inputs={"x": ("FP32", [1])}, outputs={"z": ("FP32", [1])}
)


@pytest.fixture(scope="module")
def triton() -> Iterator[FakeTriton]:
    models = {f"times{factor}": times(factor) for factor in range(1, 6)}
    models |= {"versions": times(7, ("1", "2", "3")), "other_output": OTHER_OUTPUT}
    with FakeTriton(models) as triton:
        yield triton


def row(number: int, model: Any) -> beam.Row:
    return beam.Row(id=number, x=1.0, model=model)


def test_elements_are_scored_on_the_models_that_they_name(triton: FakeTriton) -> None:
    """Batches are made for each model; each result names its model."""
    before = len(triton.requests)
    rows = [row(number, f"times{number % 5 + 1}") for number in range(40)]
    results = score(rows, TritonInference(triton.endpoint, {"column": "model"})).results
    assert {result.example.id: result.inference["y"].item() for result in results} == {
        number: number % 5 + 1 for number in range(40)
    }
    assert all(result.model_id == f"{result.example.model}:1" for result in results)
    sent = Counter(request.model_name for request in triton.requests[before:] if request.model_name)
    assert sent == {f"times{factor}": 1 for factor in range(1, 6)}


def test_a_callable_sees_the_key(triton: FakeTriton) -> None:
    """It is given the element as the pipeline has it."""
    transform = TritonInference(triton.endpoint, lambda element: f"times{element[0]}")
    results = score([(2, [1.0]), (3, [1.0])], transform).results
    assert {key: result.inference["y"].item() for key, result in results} == {2: 2.0, 3: 3.0}


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("times9", "ModelNotFoundError", "times9"),
        (None, "LocalProtocolError", "model_name gives None"),
        ("", "LocalProtocolError", "names no model"),
    ],
)
def test_a_model_that_is_not_there_fails_its_own_elements_only(
    triton: FakeTriton, model: Any, error: str, message: str
) -> None:
    """The others are scored; the failure says which model was asked for."""
    rows = [row(number, model if number % 2 else "times2") for number in range(6)]
    outcome = score(rows, TritonInference(triton.endpoint, {"column": "model"}).with_exception_handling())
    assert sorted(result.example.id for result in outcome.results) == [0, 2, 4]
    assert sorted(element.id for element, _ in outcome.failures) == [1, 3, 5]
    assert all(kind.__name__ == error and message in text for _, (kind, text, _) in outcome.failures)
    assert (outcome.counters["elements"], outcome.counters["failures"]) == (6, 3)


def test_without_dead_letters_an_unknown_model_fails_the_bundle(triton: FakeTriton) -> None:
    """The error names the element and the model."""
    with pytest.raises(Exception, match="element 0 of its bundle") as caught:
        score([row(0, "times9")], TritonInference(triton.endpoint, {"column": "model"}))
    assert ModelNotFoundError.__name__ in repr(caught.value)


def test_errors_count_elements_as_their_bundle_does(triton: FakeTriton) -> None:
    """Whichever models the elements before were scored on."""
    rows = [row(0, "times1"), row(1, "times2"), beam.Row(id=2, x=[1.0, 2.0], model="times2")]
    with pytest.raises(Exception, match="element 2 of its bundle"):
        score(rows, TritonInference(triton.endpoint, {"column": "model"}))


def test_an_element_without_the_column_is_a_failure(triton: FakeTriton) -> None:
    """The columns that it has are named; so is what a callable raises."""
    by_column = TritonInference(triton.endpoint, {"column": "model"}).with_exception_handling()
    ((_, (_, message, _)),) = score([beam.Row(id=1, x=1.0)], by_column).failures
    assert "no column 'model' that names its model; its columns: 'id', 'x'" in message
    by_callable = TritonInference(triton.endpoint, lambda element: element["model"]).with_exception_handling()
    ((_, (_, message, _)),) = score([{"x": 1.0}], by_callable).failures
    assert "model_name, called with the element, raised KeyError: 'model'" in message


def test_rows_of_many_models_need_one_description(triton: FakeTriton) -> None:
    """Their schema is that of model_spec, which all models have to fit."""
    rows = [row(number, f"times{number + 1}") for number in range(2)]
    with pytest.raises(ConfigurationError, match="needs model_spec"):
        score(rows, TritonInference(triton.endpoint, {"column": "model"}, output="row"))
    tensor = {"datatype": "FP32", "shape": [1]}
    spec = {"name": "any", "inputs": [{"name": "x", **tensor}], "outputs": [{"name": "y", **tensor}]}
    transform = TritonInference(
        triton.endpoint, {"column": "model"}, output="row", model_spec={**spec, "max_batch_size": 4}
    )
    assert sorted((each.id, each.model, each.y) for each in score(rows, transform).results) == [
        (0, "times1", 1.0),
        (1, "times2", 2.0),
    ]


def test_requests_to_several_models_overlap() -> None:
    """A bundle's last batches are all sent before any of them is waited for."""
    with FakeTriton({f"times{factor}": times(factor) for factor in range(1, 6)}, delay_seconds=0.3) as slow:
        rows = [row(number, f"times{number + 1}") for number in range(5)]
        dofn = TritonInferenceDoFn(slow.endpoint, {"column": "model"})
        with bundle_of(dofn):
            for each in rows:
                list(dofn.process(each, WindowedValue(each, 0, (GlobalWindow(),))))
            started = time.monotonic()
            assert len(list(dofn.finish_bundle())) == 5
            assert time.monotonic() - started < 1.0


def test_teardown_and_garbage_release_every_model(triton: FakeTriton) -> None:
    """A DoFn that is never torn down holds no session once it is garbage."""
    options = InferenceOptions(endpoint=triton.endpoint)
    for is_torn_down in (True, False):
        dofn = TritonInferenceDoFn(triton.endpoint, {"column": "model"})
        dofn.setup()
        assert dofn._models is not None
        names = [f"times{factor}" for factor in range(1, 4)]
        for name in names:
            dofn._models.get(name)
        assert all(is_in_use(name, options) for name in names)
        if is_torn_down:
            dofn.teardown()
            dofn.teardown()
        del dofn
        gc.collect()
        give_up = time.monotonic() + 5
        while any(is_in_use(name, options) for name in names) and time.monotonic() < give_up:
            time.sleep(0.01)
        assert not any(is_in_use(name, options) for name in names)


@pytest.mark.parametrize("model_name", [{"column": ""}, {"columns": "m"}, {}, 3, ""])
def test_model_names_that_cannot_be_are_refused(model_name: Any) -> None:
    """At construction, as every option."""
    with pytest.raises(ConfigurationError):
        TritonInference("http://triton:8000", model_name)


def test_the_label_says_where_the_model_comes_from() -> None:
    """A column or a function, by name."""

    def by_size(element: Any) -> str:
        return "large" if np.size(element) > 8 else "small"

    assert TritonInference("http://t:8000", {"column": "m"}).default_label() == "TritonInference(column m)"
    assert TritonInference("http://t:8000", by_size).default_label() == "TritonInference(by_size)"


def test_elements_choose_their_versions(triton: FakeTriton) -> None:
    """By a callable or a column; None leaves it to the server, and each version has requests of its own."""
    rows = [beam.Row(x=1.0, version=version) for version in (1, "2", None, np.int64(1), "")] * 4
    for given in ({"column": "version"}, lambda element: element.version):
        before = len(triton.requests)
        results = score(rows, TritonInference(triton.endpoint, "versions", model_version=given)).results
        assert Counter((result.example.version, result.model_id) for result in results) == {
            (1, "versions:1"): 8,
            ("2", "versions:2"): 4,
            (None, "versions:3"): 4,
            ("", "versions:3"): 4,
        }
        sent = Counter(request.model_version for request in triton.requests[before:])
        assert sent == {"1": 1, "2": 1, "": 1}


def test_a_callable_may_give_the_model_with_its_version(triton: FakeTriton) -> None:
    """A pair; another version beside it is a failure."""
    pairs = {0: ("versions", 2), 1: ("times2", None), 2: "versions"}
    elements = [(n, [1.0]) for n in range(3)]
    results = score(elements, TritonInference(triton.endpoint, lambda element: pairs[element[0]])).results
    assert {n: result.model_id for n, result in results} == {0: "versions:2", 1: "times2:1", 2: "versions:3"}
    transform = TritonInference(triton.endpoint, lambda element: pairs[element[0]], model_version=1)
    outcome = score(elements, transform.with_exception_handling())
    assert {n: result.model_id for n, result in outcome.results} == {2: "versions:1"}
    messages = {element[0]: message for element, (_, message, _) in outcome.failures}
    assert "model_name gives ('versions', 2) for the element" in messages[0]
    assert "model_version gives 1: give only one of them" in messages[0]


@pytest.mark.parametrize("version", [-1, 2.0, True, "a b", [1], beam])
def test_what_is_no_version_fails_its_own_elements_only(triton: FakeTriton, version: Any) -> None:
    """The failure shows what was given."""
    elements = [{"x": [1.0], "n": n} for n in range(4)]
    transform = TritonInference(
        triton.endpoint, "versions", model_version=lambda element: version if element["n"] % 2 else 3
    )
    outcome = score(elements, transform.with_exception_handling())
    assert [result.model_id for result in outcome.results] == ["versions:3"] * 2
    assert all(
        re.match(r"model_version gives .* for the element, which is no version such as 3", message)
        for _, (_, message, _) in outcome.failures
    )
    assert len(outcome.failures) == 2


def test_a_model_whose_outputs_do_not_fit_makes_no_rows(triton: FakeTriton) -> None:
    """The schema holds: its elements fail and say why, and the others are scored."""
    tensor = {"datatype": "FP32", "shape": [1]}
    spec = {"name": "times2", "inputs": [{"name": "x", **tensor}], "outputs": [{"name": "y", **tensor}]}
    rows = [row(n, "other_output" if n % 2 else "times2") for n in range(6)]
    transform = TritonInference(
        triton.endpoint,
        {"column": "model"},
        output="row",
        version_column="version",
        model_spec={**spec, "max_batch_size": 8},
    )
    outcome = score(rows, transform.with_exception_handling())
    assert sorted((each.id, each.y, each.version) for each in outcome.results) == [
        (0, 2.0, "1"),
        (2, 2.0, "1"),
        (4, 2.0, "1"),
    ]
    messages = [each.error_message for each in outcome.failures]
    assert messages == [messages[0]] * 3
    assert messages[0] == "model 'other_output' has no output 'y'; it has z"


def test_a_default_value_has_no_version(triton: FakeTriton) -> None:
    """The version's column is None where no version answered."""
    rows = [beam.Row(x=[1.0]), beam.Row(x=[1.0, 2.0])]
    transform = TritonInference(
        triton.endpoint, "versions", output="row", version_column="version", default_value=0, keep=[]
    )
    assert sorted((each.y, each.version) for each in score(rows, transform).results) == [
        (0.0, None),
        (7.0, "3"),
    ]


def test_models_that_are_not_used_for_long_are_closed(triton: FakeTriton) -> None:
    """After the time that idle connections are kept; one that is named again is opened again."""
    pool = ConnectionPoolConfig(keep_alive_seconds=0.2)
    options = InferenceOptions(endpoint=triton.endpoint, pool=pool)
    versions = [options.of_model("versions", version) for version in ("1", "2")]
    current = 1

    def version_of(element: Any) -> int:
        return current

    dofn = TritonInferenceDoFn(triton.endpoint, "versions", model_version=version_of, pool=pool)

    def bundle() -> None:
        element = WindowedValue(np.ones(1, np.float32), 0, (GlobalWindow(),))
        dofn.start_bundle()
        dofn.process(element.value, element)
        assert len(list(dofn.finish_bundle())) == 1

    dofn.setup()
    try:
        bundle()
        current = 2
        bundle()
        assert [is_in_use("versions", each) for each in versions] == [True, True]
        time.sleep(0.3)
        bundle()
        assert [is_in_use("versions", each) for each in versions] == [False, True]
        current = 1
        bundle()
        assert is_in_use("versions", versions[0])
    finally:
        dofn.teardown()
    assert not any(is_in_use("versions", each) for each in versions)


def test_side_inputs_that_cannot_be_are_refused() -> None:
    """The sentence says which kinds there are."""
    numbers = beam.Pipeline() | beam.Create([1])
    for given in (AsMultiMap(numbers), AsDict(numbers), numbers):
        with pytest.raises(ConfigurationError, match=r"model_name as a side input is .*AsSingleton"):
            TritonInference("http://triton:8000", given)
    for given in (AsMultiMap(numbers), numbers):
        with pytest.raises(ConfigurationError, match=r"AsIter\(…\) .*, or AsDict\(…\) of model names"):
            TritonInference("http://triton:8000", "m", model_version=given)
    with pytest.raises(ConfigurationError, match="side input is for TritonInference"):
        TritonInferenceDoFn("http://triton:8000", "m", model_version=AsSingleton(numbers))


@pytest.mark.parametrize("version", [{"column": ""}, {"versions": 1}, {}, True, 1.5, "a b"])
def test_versions_that_cannot_be_are_refused(version: Any) -> None:
    """At construction, as every option."""
    with pytest.raises(ConfigurationError, match="model_version"):
        TritonInference("http://triton:8000", "m", model_version=version)


def test_doors_that_choose_the_version_take_no_other(triton: FakeTriton) -> None:
    """Whichever way it is said."""
    spec = {"name": "m", "inputs": [], "outputs": [], "max_batch_size": 1}
    door = "https://runtime.sagemaker.eu-central-1.amazonaws.com/endpoints/digits/invocations"
    with pytest.raises(ConfigurationError, match="chooses the model's version itself"):
        TritonInference(door, "m", model_version=lambda element: 1, model_spec=spec)


@pytest.mark.parametrize("kind", [TritonBatchInference, TritonSequenceInference])
@pytest.mark.parametrize("version", [lambda element: 1, {"column": "v"}])
def test_whole_batches_and_sequences_take_one_version(kind: Any, version: Any) -> None:
    """The sentence says what chooses by element."""
    with pytest.raises(ConfigurationError, match=r"scores all elements on one model.*TritonInference choo"):
        kind("http://triton:8000", "m", model_version=version)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version_column": "v"}, 'need output="row"'),
        ({"version_column": "", "output": "row"}, "version_column must be a column's name"),
        ({"version_column": 3, "output": "row"}, "version_column must be a column's name"),
        ({"version_column": "a b", "output": "row"}, "version_column must be a column's name"),
        ({"version_column": "y", "output": "row"}, "is the name of an output's column"),
        ({"version_column": "id", "output": "row"}, "or choose another version_column"),
    ],
)
def test_columns_that_cannot_hold_the_version_are_refused(
    triton: FakeTriton, options: Any, message: str
) -> None:
    """While the pipeline is built."""
    with pytest.raises(ConfigurationError, match=message):
        score([beam.Row(id=1, x=1.0)], TritonInference(triton.endpoint, "versions", **options))


def test_display_data_say_where_the_version_comes_from() -> None:
    """A job's page shows it."""
    versions = AsSingleton(beam.Pipeline() | beam.Create([1]))
    for given, shown in ((versions, "side input"), ({"column": "v"}, "column v"), (3, "3")):
        data = TritonInference("http://t:8000", "m", model_version=given).display_data()
        assert data["model_version"].value == shown


@pytest.mark.parametrize("kind", [AsIter, AsList])
@pytest.mark.parametrize(
    ("values", "model_id"), [([2], "versions:2"), ([2, 2, 2], "versions:2"), ([], "versions:3")]
)
def test_side_inputs_of_many_values_say_one_thing(
    triton: FakeTriton, kind: Any, values: list[int], model_id: str
) -> None:
    """Runners may repeat a value; an empty side input leaves the choice to the server."""

    def build(pipeline: beam.Pipeline) -> Any:
        versions = kind(pipeline | "Versions" >> beam.Create(values, reshuffle=False))
        elements = pipeline | beam.Create([[1.0]] * 3, reshuffle=False)
        return elements | TritonInference(triton.endpoint, "versions", model_version=versions)

    assert [result.model_id for result in run(build).results] == [model_id] * 3


def test_two_versions_at_a_time_are_a_failure(triton: FakeTriton) -> None:
    """Which of them is the later one is not known."""

    def build(pipeline: beam.Pipeline) -> Any:
        versions = AsIter(pipeline | "Versions" >> beam.Create([1, 2, 1], reshuffle=False))
        transform = TritonInference(triton.endpoint, "versions", model_version=versions)
        return pipeline | beam.Create([[1.0]] * 3) | transform.with_exception_handling()

    outcome = run(build)
    assert outcome.results == []
    assert all(
        "model_version gives [1, 2] for the element" in message for _, (_, message, _) in outcome.failures
    )
    assert len(outcome.failures) == 3


def test_a_name_that_no_version_can_be_looked_up_for_fails_its_own_element_only(triton: FakeTriton) -> None:
    def build(pipeline: beam.Pipeline) -> Any:
        versions = AsDict(pipeline | "Versions" >> beam.Create([("versions", 2)]))
        transform = TritonInference(triton.endpoint, {"column": "model"}, model_version=versions)
        rows = [row(0, "versions"), row(1, ["versions"])]
        return pipeline | beam.Create(rows) | transform.with_exception_handling()

    outcome = run(build)
    assert [result.model_id for result in outcome.results] == ["versions:2"]
    ((_, (_, message, _)),) = outcome.failures
    assert "model_name gives" in message and "names no model" in message

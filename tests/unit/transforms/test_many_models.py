"""A model for each element: by a callable, by a column."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton import ConfigurationError, ModelNotFoundError, TritonInference
from beam_triton.options import InferenceOptions
from beam_triton.remote_model import is_in_use
from beam_triton.testing import FakeModel, FakeTriton
from beam_triton.transforms.inference import TritonInferenceDoFn
from tests.support.pipelines import bundle_of, score


def times(factor: int) -> FakeModel:
    return FakeModel(
        lambda inputs: {"y": factor * inputs["x"]},
        inputs={"x": ("FP32", [1])},
        outputs={"y": ("FP32", [1])},
        max_batch_size=8,
    )


@pytest.fixture(scope="module")
def triton() -> Iterator[FakeTriton]:
    with FakeTriton({f"times{factor}": times(factor) for factor in range(1, 6)}) as triton:
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

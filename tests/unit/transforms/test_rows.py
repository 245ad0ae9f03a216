"""Rows in and rows out: columns and inputs, schemas, and the check of one against the other."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional

import apache_beam as beam
import numpy as np
import pandas
import pytest
from apache_beam.coders import registry
from apache_beam.dataframe.convert import to_dataframe, to_pcollection
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.typehints.row_type import RowTypeConstraint

from beam_triton import (
    ConfigurationError,
    LocalProtocolError,
    ModelSpec,
    TensorSpec,
    TritonInference,
    UnexpectedOutputError,
)
from beam_triton.testing import FakeModel, FakeTriton
from beam_triton.transforms.column_check import check_columns
from beam_triton.transforms.row_inputs import InputReader, columns_of
from beam_triton.transforms.row_results import OutputColumn
from tests.support.pipelines import run, score

LABELS = [b"caf\xc3\xa9", b"tea"]


def scored(inputs: dict[str, Any]) -> dict[str, Any]:
    x = inputs["x"]
    if (x < 0).any():
        raise ValueError("x is negative")
    return {
        "total-1": x.sum(axis=1, keepdims=True),
        "twice": 2 * x,
        "grid": np.repeat(x[:, np.newaxis], 2, axis=1).astype(np.int8),
        "label": np.array([[LABELS[0] if row[0] < 100 else b"\xff"] for row in x], dtype=object),
        "parts": np.array([LABELS] * len(x), dtype=object),
    }


MODEL = FakeModel(
    scored,
    inputs={"x": ("FP32", [2])},
    outputs={
        "total-1": ("FP32", [1]),
        "twice": ("FP32", [2]),
        "grid": ("INT8", [2, 2]),
        "label": ("BYTES", [1]),
        "parts": ("BYTES", [2]),
    },
    max_batch_size=4,
)
CLASSES = FakeModel(
    lambda inputs: {"probabilities": inputs["x"]},
    inputs={"x": ("FP32", [2])},
    outputs={"probabilities": ("FP32", [2])},
    labels={"probabilities": ["ant", "bee"]},
)


class Typed(NamedTuple):
    id: int
    note: Optional[str]  # noqa: UP045  # Beam's schemas do not read `str | None`.
    x: Sequence[float]


@dataclasses.dataclass
class Plain:
    id: int
    x: Any


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with FakeTriton({"m": MODEL, "classes": CLASSES}) as triton:
        yield triton.endpoint


# Columns to inputs.


@pytest.mark.parametrize(
    "row",
    [
        beam.Row(id=1, x=[1.0, 2.0]),
        Plain(1, [1.0, 2.0]),
        {"id": 1, "x": [1.0, 2.0]},
        pandas.Series({"id": 1, "x": [1.0, 2.0]}),
    ],
)
def test_columns_that_feed_no_input_ride_along(endpoint: str, row: Any) -> None:
    """Rows of each kind are read by column, and come back whole beside the result."""
    (result,) = score([row], TritonInference(endpoint, "m")).results
    assert type(result) is PredictionResult
    inference: Any = result.inference
    assert inference["twice"].tolist() == [2.0, 4.0]
    assert dict(columns_of(result.example) or {}) == {"id": 1, "x": [1.0, 2.0]}


@pytest.mark.parametrize("element", [np.zeros(2), [1], (1, 2), "text", None, 3.5, pandas.Series([1.0, 2.0])])
def test_other_elements_are_no_rows(element: Any) -> None:
    """They go to the model as they are; a Series that is not labelled by text is an array."""
    assert columns_of(element) is None


SPEC = ModelSpec(
    "m",
    inputs=(TensorSpec("x", "FP32", (2,)), TensorSpec("mask", "BOOL", (1,), optional=True)),
    outputs=(TensorSpec("y", "FP32", (1,)),),
    max_batch_size=8,
)


def test_several_columns_make_up_one_tensor() -> None:
    """A list of columns feeds one input, a value each; an absent optional input is left out."""
    read = InputReader(SPEC, {"x": ["a", "b"]})
    assert read(beam.Row(a=1.0, b=2, c="c")) == {"x": [1.0, 2]}
    assert read({"a": 1.0, "b": 2, "mask": True}) == {"x": [1.0, 2], "mask": True}


def test_missing_column_names_the_columns_that_are_there() -> None:
    """The message says which column was looked for, and how to name another."""
    with pytest.raises(LocalProtocolError, match=r"no column 'x'; .*inputs=\{'x': …\}.*: 'pixels', 'id'"):
        InputReader(SPEC, None)({"pixels": [1.0, 2.0], "id": 3})
    with pytest.raises(LocalProtocolError, match=r"no column 'pixels'\. Its columns: 'id'"):
        InputReader(SPEC, {"x": "pixels"})({"id": 3})


def test_inputs_for_an_unknown_input_is_refused() -> None:
    """The model's own inputs are named."""
    with pytest.raises(ConfigurationError, match=r"has no input 'image'.*x FP32"):
        InputReader(SPEC, {"image": "pixels"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": "x"}, "inputs must map"),
        ({"inputs": {"x": 3}}, "takes the name of a column"),
        ({"inputs": {"x": []}}, "takes the name of a column"),
        ({"ouput": "row"}, r"TritonInference has no option 'ouput' \(did you mean 'output'\?\)"),
        ({"output": "rows"}, 'output must be "row"'),
        ({"keep": ["id"]}, 'need output="row"'),
        ({"outputs": {"y": "score"}}, 'need output="row"'),
        ({"output": "row", "keep": "id"}, r"a list of columns such as \['id'\]"),
        ({"output": "row", "text_outputs": "label"}, "text_outputs must be True, or a list"),
        ({"output": "row", "keep_example": False}, "keep_example"),
    ],
)
def test_options_of_rows_are_checked_at_construction(options: dict[str, Any], message: str) -> None:
    """The message says what is wanted."""
    with pytest.raises(ConfigurationError, match=message):
        TritonInference("http://triton:8000", "m", **options)


def test_keep_example_false_lets_go_of_elements(endpoint: str) -> None:
    """Results of keyed elements keep their keys; defaults hold no example either."""
    transform = TritonInference(
        endpoint, "classes", keep_example=False, default_value=np.zeros(2, np.float32)
    )
    default, (key, result) = score([("k", [1.0, 2.0]), [1.0]], transform).results
    assert (key, result.example, default.example) == ("k", None, None)
    assert result.inference["probabilities"].tolist() == [1.0, 2.0]


# Rows out.


def test_a_row_holds_kept_columns_then_outputs(endpoint: str) -> None:
    """Columns that feed no input are kept; one value is no list; names are what a schema can have."""
    transform = TritonInference(endpoint, "m", output="row")
    (row,) = score([Typed(7, None, [1.0, 2.0])], transform).results
    assert row == beam.Row(
        id=7,
        note=None,
        total_1=3.0,
        twice=[2.0, 4.0],
        grid=[[1, 2], [1, 2]],
        label=LABELS[0],
        parts=LABELS,
    )
    assert type(row.total_1) is float
    assert type(row.twice) is list


def test_the_schema_is_known_when_the_pipeline_is_built(endpoint: str) -> None:
    """Kept columns keep their types; Beam's coder of the schema takes and gives back such a row."""
    pipeline = beam.Pipeline("FnApiRunner")
    elements = pipeline | beam.Create([Typed(7, None, [1.0, 2.0])]).with_output_types(Typed)
    rows = elements | TritonInference(endpoint, "m", output="row", text_outputs=["label"])
    expected: list[tuple[str, Any]] = [
        ("id", int),
        ("note", Optional[str]),  # noqa: UP045
        ("total_1", np.float32),
        ("twice", Sequence[np.float32]),
        ("grid", Sequence[Sequence[np.int16]]),
        ("label", str),
        ("parts", Sequence[bytes]),
    ]
    assert rows.element_type == RowTypeConstraint.from_fields(expected)
    row = beam.Row(
        **{
            "id": 7,
            "note": None,
            "total_1": 3.0,
            "twice": [2.0],
            "grid": [[-1]],
            "label": "é",
            "parts": [b""],
        }
    )
    coder = registry.get_coder(rows.element_type)
    assert coder.decode(coder.encode(row))._asdict() == row.as_dict()


@pytest.mark.parametrize(
    ("keep", "columns"), [("all", ["id", "x"]), (["x"], ["x"]), ([], []), ({"id": int}, ["id"])]
)
def test_keep_chooses_the_columns_that_stay(endpoint: str, keep: Any, columns: list[str]) -> None:
    """All, some, none, or some with their types."""
    transform = TritonInference(endpoint, "m", outputs=["twice"], output="row", keep=keep)
    (row,) = score([beam.Row(id=1, x=[1.0, 2.0])], transform).results
    assert list(row.as_dict()) == [*columns, "twice"]


def test_elements_without_a_schema_need_types_for_kept_columns(endpoint: str) -> None:
    """Dicts have none: the message says how to give it."""
    elements = [{"id": 4, "x": [1.0, 2.0]}]
    with pytest.raises(ConfigurationError, match=r"has no schema.*keep=\{'id': int\}"):
        score(elements, TritonInference(endpoint, "m", output="row"))
    transform = TritonInference(endpoint, "m", output="row", outputs={"twice": "y"}, keep={"id": int})
    assert score(elements, transform).results == [beam.Row(id=4, y=[2.0, 4.0])]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (["idd"], "no column 'idd'; the columns: id, x"),
        ({"idd": int}, "no column 'idd'; the columns: id, x"),
        ({"id": float}, r"column 'id' is int64, and not float: .*keep=\['id'\]"),
        ({"x": float}, "column 'x' is list of float64, and not float"),
    ],
)
def test_kept_columns_are_those_of_the_schema(endpoint: str, keep: Any, message: str) -> None:
    """Another type would change their values."""
    transform = TritonInference(endpoint, "m", outputs=["twice"], output="row", keep=keep)
    with pytest.raises(ConfigurationError, match=message):
        score([beam.Row(id=1, x=[1.0, 2.0])], transform)


def test_an_element_without_a_kept_column_fails_alone(endpoint: str) -> None:
    """Beam could not write its row, and would fail the bundle; an Optional column may be missing."""
    elements = [{"x": [1.0, 2.0]}, {"id": None, "x": [1.0, 2.0]}, {"id": 4, "x": [1.0, 2.0]}]
    options: dict[str, Any] = {"outputs": ["twice"], "output": "row"}
    strict = TritonInference(endpoint, "m", **options, keep={"id": int}).with_exception_handling()
    scored = score(elements, strict)
    assert scored.results == [beam.Row(id=4, twice=[2.0, 4.0])]
    assert len(scored.failures) == 2
    assert all("keep: column 'id' is missing or null" in each.error_message for each in scored.failures)
    lenient = TritonInference(endpoint, "m", **options, keep={"id": Optional[int]})  # noqa: UP045
    assert [row.id for row in score(elements, lenient).results] == [None, None, 4]


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [(int, 3, 5.7), (str, "a", 1), (Optional[float], 2, "b")],  # noqa: UP045
)
def test_an_element_whose_kept_column_is_of_another_type_fails_alone(
    endpoint: str, kind: Any, good: Any, bad: Any
) -> None:
    """Beam would write 5 for 5.7, and fail the bundle for a text that is a number."""
    elements = [{"id": value, "x": [1.0, 2.0]} for value in (bad, good)]
    options: dict[str, Any] = {"outputs": ["twice"], "output": "row", "keep": {"id": kind}}
    scored = score(elements, TritonInference(endpoint, "m", **options).with_exception_handling())
    assert [row.id for row in scored.results] == [good]
    (failure,) = scored.failures
    assert f"keep: column 'id' holds {bad!r} ({type(bad).__name__}), and not" in failure.error_message


def test_unknown_inputs_and_texts_are_refused_when_the_pipeline_is_built(endpoint: str) -> None:
    """Before a worker starts, for elements with and without a schema."""
    for element in ({"x": [1.0, 2.0]}, beam.Row(x=[1.0, 2.0])):
        for options, message in (
            ({"inputs": {"image": "x"}}, "has no input 'image'"),
            ({"text_outputs": ["twice"]}, r"text_outputs: twice FP32 \[2\] is not BYTES"),
        ):
            transform = TritonInference(endpoint, "m", output="row", keep=[], **options)
            with pytest.raises(ConfigurationError, match=message):
                _ = beam.Pipeline() | beam.Create([element]) | transform


def test_two_columns_of_one_name_are_refused(endpoint: str) -> None:
    """A prefix or names for the outputs' columns resolve it."""
    elements = [beam.Row(x=[1.0, 2.0], twice="kept")]
    with pytest.raises(ConfigurationError, match="name 'twice': name the outputs' columns by prefix="):
        score(elements, TritonInference(endpoint, "m", outputs=["twice"], output="row"))
    by_prefix = TritonInference(endpoint, "m", outputs=["twice"], output="row", prefix="m_")
    by_name = TritonInference(endpoint, "m", outputs={"twice": "y"}, output="row")
    assert score(elements, by_prefix).results == [beam.Row(twice="kept", m_twice=[2.0, 4.0])]
    assert score(elements, by_name).results == [beam.Row(twice="kept", y=[2.0, 4.0])]


def test_keyed_rows_keep_their_keys(endpoint: str) -> None:
    """The key's type is part of the schema."""
    transform = TritonInference(endpoint, "m", outputs=["twice"], output="row")
    assert score([("k", beam.Row(id=1, x=[1.0, 2.0]))], transform).results == [
        ("k", beam.Row(id=1, twice=[2.0, 4.0]))
    ]


def test_text_that_is_none_is_that_elements_failure(endpoint: str) -> None:
    """Its neighbours in the batch are rows; the failure names the option."""
    transform = TritonInference(endpoint, "m", output="row", outputs=["label"], text_outputs=True)
    elements = [beam.Row(id=number, x=[50.0 * number, 0.0]) for number in range(4)]
    outcome = score(elements, transform.with_exception_handling())
    assert outcome.results == [beam.Row(id=0, label="café"), beam.Row(id=1, label="café")]
    assert sorted((failure.id, failure.error_type) for failure in outcome.failures) == [
        (2, "UnexpectedOutputError"),
        (3, "UnexpectedOutputError"),
    ]
    assert "Leave it out of text_outputs" in outcome.failures[0].error_message


def test_classes_come_taken_apart(endpoint: str) -> None:
    """One class is three values, several are three lists."""
    elements = [beam.Row(id=1, x=[0.25, 0.75])]
    best, both = (
        TritonInference(endpoint, "classes", output="row", classification={"probabilities": count})
        for count in (1, 2)
    )
    assert score(elements, best).results == [
        beam.Row(id=1, probabilities_label="bee", probabilities_score=0.75, probabilities_index=1)
    ]
    (row,) = score(elements, both).results
    assert (row.probabilities_label, row.probabilities_index) == (["bee", "ant"], [1, 0])


def test_a_failure_is_a_row_too(endpoint: str) -> None:
    """It holds the element's columns, and what is known of the failure, with a schema."""
    transform = TritonInference(
        endpoint, "m", output="row", retry={"max_retries": 0}
    ).with_exception_handling()

    def build(pipeline: beam.Pipeline) -> Any:
        elements = pipeline | beam.Create([beam.Row(id=1, x=[-1.0, 0.0]), beam.Row(id=2, x=[1.0])])
        _, failures = elements | transform
        assert [name for name, _ in failures.element_type._fields][:3] == ["id", "x", "error_type"]
        return failures

    failed, misshapen = sorted(run(build).results, key=lambda row: row.id)
    assert (failed.x, failed.error_type, failed.error_status) == ([-1.0, 0.0], "ModelExecutionError", 500)
    assert (failed.error_endpoint, failed.error_attempts) == (endpoint, 1)
    assert (misshapen.error_type, misshapen.error_endpoint) == ("LocalProtocolError", None)
    assert "shape [2]" in misshapen.error_message


def test_failures_of_elements_without_a_schema_hold_the_element(endpoint: str) -> None:
    """Nothing of a dict is lost."""
    transform = TritonInference(endpoint, "m", output="row", keep=[]).with_exception_handling()
    (failure,) = score([{"id": 1, "x": [1.0]}], transform).failures
    assert failure.element == {"id": 1, "x": [1.0]}


def test_default_values_are_rows(endpoint: str) -> None:
    """They have the element's kept columns; a threshold could not count them."""
    options: dict[str, Any] = {"output": "row", "default_value": [0.0, 0.5]}
    transform = TritonInference(endpoint, "classes", **options)
    assert score([beam.Row(id=1, x=[1.0])], transform).results == [beam.Row(id=1, probabilities=[0.0, 0.5])]
    counted = TritonInference(endpoint, "classes", **options).with_exception_handling(threshold=0.5)
    with pytest.raises(ConfigurationError, match="threshold cannot count default values in rows"):
        score([beam.Row(id=1, x=[1.0])], counted)


def test_consumers_that_take_rows_in_batches_lose_none(endpoint: str) -> None:
    """Beam's DataFrames get the rows that leave by ``finish_bundle``, too."""
    with beam.Pipeline("FnApiRunner") as pipeline:
        elements = pipeline | beam.Create([beam.Row(id=number, x=[1.0, 2.0]) for number in range(10)])
        frame: Any = to_dataframe(
            elements | TritonInference(endpoint, "m", output="row", outputs=["total-1"])
        )
        frame["double"] = frame.total_1 * 2
        doubled = to_pcollection(frame) | beam.Map(lambda row: (row.id, row.double))
        assert_that(doubled, equal_to([(number, 6.0) for number in range(10)]))


def test_results_of_any_shape_fit_their_column_or_are_refused() -> None:
    """A shape that the schema does not have is the answer's fault, not a wrong value."""
    column = OutputColumn(TensorSpec("y", "FP32", (1,)), "y")
    column.check(np.zeros((3, 1), np.float32))
    with pytest.raises(UnexpectedOutputError, match=r"shape \[2\] for an element"):
        column.check(np.zeros((3, 2), np.float32))


# The schema of the input against the model.

WANTED = ModelSpec(
    "m",
    inputs=(
        TensorSpec("image", "FP32", (2, 2)),
        TensorSpec("count", "INT32", (1,)),
        TensorSpec("text", "BYTES", (1,)),
        TensorSpec("values", "FP32", (3,)),
        TensorSpec("flag", "BOOL", (1,)),
        TensorSpec("extra", "FP32", (1,), optional=True),
    ),
    max_batch_size=8,
)
FITTING: dict[str, Any] = {
    "id": str,
    "image": Sequence[Sequence[np.float32]],
    "count": np.int32,
    "text": str,
    "values": Sequence[np.float64],
    "flag": bool,
}


def test_a_fitting_schema_passes_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """A column of an unknown type, too: its values are looked at on the workers."""
    with caplog.at_level(logging.INFO):
        check_columns(FITTING, WANTED, None)
        check_columns(FITTING | {"image": Any, "extra": float}, WANTED, None)
        check_columns(
            FITTING | {"a": int, "b": float, "c": float}, WANTED, {"values": ["a", "b", "c"], "text": "id"}
        )
    assert not caplog.records


@pytest.mark.parametrize(
    ("changed", "inputs", "message"),
    [
        pytest.param({"image": None}, None, "no column 'image' for the input", id="missing column"),
        pytest.param({}, {"image": "pixels"}, "no column 'pixels', which", id="missing mapped column"),
        pytest.param({"count": str}, None, "column 'count' is text.*takes INT32", id="text for numbers"),
        pytest.param({"count": bytes}, None, "is text .bytes.", id="bytes for numbers"),
        pytest.param({"text": np.int64}, None, "is int64, .*takes BYTES", id="numbers for text"),
        pytest.param({"count": bool}, None, "is bool, .*write 0 and 1", id="bool for numbers"),
        pytest.param(
            {"count": Sequence[Sequence[int]]}, None, "lists 2 deep, .*takes a list", id="lists too deep"
        ),
        pytest.param({"values": float}, None, "is a single value, .*takes a list", id="value for a list"),
        pytest.param({"image": Sequence[float]}, None, "is a list, .*takes lists 2 deep", id="rank too low"),
        pytest.param({"flag": str}, None, "is text .*takes BOOL", id="text for a flag"),
        pytest.param({"count": dict[str, int]}, None, "no tensor is made", id="map"),
        pytest.param({"count": Typed}, None, "no tensor is made", id="row in a row"),
        pytest.param({"extra": str}, None, "input 'extra' takes FP32", id="optional input of another dtype"),
        pytest.param({"a": int}, {"values": ["a"]}, "feeds 1 columns to values FP32", id="too few columns"),
        pytest.param({"a": int}, {"image": ["a"]}, "which is no list of values", id="columns for an image"),
        pytest.param(
            {"a": Sequence[int]},
            {"values": ["a", "a", "a"]},
            "each of the columns",
            id="list for a value",
        ),
        pytest.param({}, {"values": ["a", "b", "c"]}, "no column 'b'", id="missing column of several"),
    ],
)
def test_schemas_that_cannot_fit_are_refused_when_the_pipeline_is_built(
    changed: dict[str, Any], inputs: Any, message: str
) -> None:
    """Each kind of mismatch is named, with the columns and what the model takes."""
    fields = {name: kind for name, kind in (FITTING | changed).items() if kind is not None}
    with pytest.raises(ConfigurationError, match=message) as caught:
        check_columns(fields, WANTED, inputs)
    assert "The rows' columns: id: str" in str(caught.value)
    assert "image FP32 [2, 2]" in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": Optional[np.int32]}, "may be null"),  # noqa: UP045
        ({"count": Sequence[int]}, "is a list, and input count INT32 [1] takes one value"),
        ({"count": np.float32}, "rows with fractions fail"),
        ({"count": np.int64}, "values out of its range fail"),
    ],
)
def test_schemas_that_may_not_fit_are_logged(
    changed: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Some rows may be failures; others are scored."""
    with caplog.at_level(logging.INFO):
        check_columns(FITTING | changed, WANTED, None)
    assert message in caplog.text


def test_every_mismatch_is_in_one_message() -> None:
    """The user mends all of them at once."""
    with pytest.raises(ConfigurationError) as caught:
        check_columns({"id": str, "text": int}, WANTED, None)
    message = str(caught.value)
    assert all(f"'{name}'" in message for name in ("image", "count", "text", "values", "flag"))
    assert "'extra'" not in message

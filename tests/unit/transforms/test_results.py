"""Keys and rows of incoming elements; results, defaults and failures going out."""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

import numpy as np
import pytest
from apache_beam.ml.inference.base import PredictionResult

from beam_triton import (
    ConfigurationError,
    DefaultResult,
    InferResponse,
    InvalidRequestError,
    ModelSpec,
    RemoteProtocolError,
    TensorSpec,
)
from beam_triton.transforms.results import (
    DefaultValue,
    failure_of,
    prediction_result,
    rows_of,
    split_key,
)

Y = TensorSpec("y", "FP32", (2,))
LABEL = TensorSpec("label", "BYTES", (1,))
MODEL = ModelSpec("m", "1", (), (Y, LABEL), 8)


def test_fast_result_equals_a_constructed_one() -> None:
    """The shortcut gives what the constructor gives, and pickles like it."""
    made = prediction_result(("example", {"y": 1}, "m:1"))
    assert made == PredictionResult("example", {"y": 1}, "m:1")
    assert type(made) is PredictionResult
    assert pickle.loads(pickle.dumps(made)) == made


def test_default_value_covers_several_outputs() -> None:
    """Each value has its output's dtype and shape, and the result is marked as a default."""
    default = DefaultValue({"label": ["none"], "y": [0, 1]}, MODEL, (Y, LABEL))
    result = default.result("example")
    inference: Any = result.inference
    assert (type(result), result.example, result.model_id) == (DefaultResult, "example", "default")
    assert isinstance(result, PredictionResult)
    assert inference["y"].dtype == np.float32
    assert inference["y"].tolist() == [0.0, 1.0]
    assert inference["label"].tolist() in (["none"], [b"none"])
    assert pickle.loads(pickle.dumps(result)).model_id == "default"


def test_default_results_share_no_arrays() -> None:
    """Changing one result changes neither another one nor the value that the user gave."""
    given = np.zeros(2, np.float32)
    default = DefaultValue(given, MODEL, (Y,))
    one: Any = default.result(1).inference
    one["y"][:] = 7
    rows = default.rows("y", 3)
    rows[0] = 8
    other: Any = default.result(2).inference
    assert other["y"].tolist() == [0.0, 0.0]
    assert given.tolist() == [0.0, 0.0]
    assert rows.tolist() == [[8.0, 8.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("value", "outputs", "message"),
    [
        ([0, 0], (Y, LABEL), "has 2 outputs: y, label"),
        ({"y": [0, 0]}, (Y, LABEL), r"missing \['label'\]"),
        ({"y": [0, 0], "z": 1}, (Y,), r"unknown \['z'\]"),
        ([0, 0, 0], (Y,), "default_value: output .y. takes"),
        (["a", "b"], (Y,), "default_value: .*y"),
        ([1e300, 0], (Y,), "default_value: .*y"),
    ],
)
def test_invalid_default_value_is_rejected(value: Any, outputs: tuple[TensorSpec, ...], message: str) -> None:
    """The error names the output and what was expected."""
    with pytest.raises(ConfigurationError, match=message):
        DefaultValue(value, MODEL, outputs)


def test_default_of_a_bf16_output_is_the_number() -> None:
    """As answers have it, not its bits."""
    spec = TensorSpec("y", "BF16", (1,))
    (default,) = DefaultValue(1.5, MODEL, (spec,)).rows("y", 1)
    assert (default.dtype, default.tolist()) == (np.float32, [1.5])


def test_default_value_defines_outputs_that_the_server_does_not_name() -> None:
    """Where nothing is known about the outputs, names and dtypes are the user's."""
    default = DefaultValue({"y": np.int64(3), "text": "none"}, ModelSpec("m"), ())
    inference: Any = default.result(1).inference
    assert inference["y"].dtype == np.int64
    assert str(inference["text"]) == "none"


def test_rows_of_batched_and_unbatched_responses() -> None:
    """With a batch dimension each row belongs to an element, without one the whole response does."""
    response = InferResponse("m", "1", "", {}, {"y": np.arange(4.0).reshape(2, 2)})
    assert [row["y"].tolist() for row in rows_of(response, True, 2)] == [[0.0, 1.0], [2.0, 3.0]]
    (whole,) = rows_of(response, False, 1)
    assert whole["y"].shape == (2, 2)
    with pytest.raises(RemoteProtocolError):
        rows_of(response, True, 3)


def test_failure_has_the_format_of_beams_own() -> None:
    """Element, then type, message and traceback lines; it pickles."""
    try:
        raise InvalidRequestError("refused", status=400)
    except InvalidRequestError as error:
        failure = failure_of(("key", 1), error)
    element, (kind, message, lines) = failure
    assert (element, kind, message) == (("key", 1), InvalidRequestError, "refused")
    assert "".join(lines).startswith("Traceback")
    assert pickle.loads(pickle.dumps(failure)) == failure


class Pair(NamedTuple):
    a: int
    b: int


X = np.zeros(2)


@pytest.mark.parametrize(
    ("element", "key", "rest"),
    [((1, X), 1, X), ((None, 2), None, 2), (("k", (1, 2)), "k", (1, 2)), ((X, "v"), X, "v")],
)
def test_plain_tuple_of_two_is_a_keyed_element(element: Any, key: Any, rest: Any) -> None:
    """Its first half is the key, whatever its type; only the outermost tuple is split."""
    assert split_key(element) == (True, key, rest)


@pytest.mark.parametrize(
    "element", [X, [1, 2], (1,), (1, 2, 3), (), "ab", b"ab", {"a": 1, "b": 2}, Pair(1, 2)]
)
def test_other_elements_are_not_keyed(element: Any) -> None:
    """Lists, NamedTuples and strings of length two are elements."""
    assert split_key(element) == (False, None, element)

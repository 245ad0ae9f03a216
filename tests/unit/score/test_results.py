"""Records of results and failures, as dicts and as lines of JSON."""

from __future__ import annotations

import datetime
import decimal
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from beam_triton.errors import ConfigurationError, InvalidRequestError
from beam_triton.protocol import ModelSpec, TensorSpec
from beam_triton.score.failures import failure_of_element
from beam_triton.score.result_files import ResultRecords, check_fields, failure_record, plain
from beam_triton.score.result_lines import ResultLines, json_line
from beam_triton.score.rows import Columns, Failure, Row, RowError

MODEL = ModelSpec(
    "m",
    "1",
    (TensorSpec("x", "FP32", (2,)),),
    (
        TensorSpec("label", "INT64", (1,)),
        TensorSpec("scores", "FP32", (-1,)),
        TensorSpec("text", "BYTES", (1,)),
    ),
    8,
)
ROW = Row("f.csv", 7, Columns(("id", "x")), ['a\u00e9"b', "1"])
INFERENCE = {
    "label": np.array([3]),
    "scores": np.array([0.1, 1.0, 3e-20], dtype=np.float32),
    "text": np.array([b"ok"], dtype=object),
}


def line(records: ResultRecords, inference: dict[str, Any], row: Row = ROW) -> dict[str, Any]:
    """A line of JSON, read back by a strict reader."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    text = ResultLines(records).line(row, inference, "m:1")
    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return found


def test_a_result_is_flat_and_in_order() -> None:
    """Kept columns, origin, outputs and model; one value is a value, others are lists."""
    records = ResultRecords(MODEL, {"name": "id"}, with_origin=True)
    record = records.record(ROW, INFERENCE, "m:1")
    assert list(record) == ["name", "file", "row", "label", "scores", "text", "model"]
    assert record["name"] == 'a\u00e9"b'
    assert (record["file"], record["row"]) == ("f.csv", 7)
    assert (record["label"], record["text"], record["model"]) == (3, "ok", "m:1")


def test_a_line_holds_the_same_as_a_record() -> None:
    """FP32 numbers are shorter, and still the same FP32 numbers."""
    records = ResultRecords(MODEL, {"name": "id"}, with_origin=True)
    record, found = records.record(ROW, INFERENCE, "m:1"), line(records, INFERENCE)
    assert list(found) == list(record)
    assert np.array(found.pop("scores"), dtype=np.float32).tolist() == record.pop("scores")
    assert found == record


@given(numpy_strategies.arrays(st.sampled_from(["<f2", "<f4", "<f8", "<i8", "?"]), st.integers(0, 5)))
def test_every_number_comes_back_exactly(array: np.ndarray[Any, Any]) -> None:
    """Whatever the datatype, a reader that knows it gets the very same values; NaN and infinity as text."""
    found = line(ResultRecords(ModelSpec("m"), {}), {"y": array})["y"]
    back = np.array([float(value) if isinstance(value, str) else value for value in found], dtype=array.dtype)
    np.testing.assert_array_equal(back, array)


def test_kept_columns_of_json_lines_may_be_missing() -> None:
    """Objects differ in their keys: what is not there is null."""
    records = ResultRecords(ModelSpec("m"), {"a": "a", "b": "b"})
    found = line(records, {"y": np.array(1.5)}, Row("f", 1, None, {"a": {"deep": [1]}}))
    assert found == {"a": {"deep": [1]}, "b": None, "y": 1.5, "model": "m:1"}


def test_bytes_are_text_or_base64() -> None:
    """Text where it is UTF-8, marked base64 where it is not, and bytes as they are for Parquet."""
    array = np.array([b"ok", b"\xff"], dtype=object)
    assert line(ResultRecords(ModelSpec("m"), {}), {"y": array})["y"] == ["ok", {"base64": "/w=="}]
    record = ResultRecords(ModelSpec("m"), {}, bytes_as_they_are=True).record(ROW, {"y": array}, "m:1")
    assert record["y"] == [b"ok", b"\xff"]


@pytest.mark.parametrize("field", ["label", "model", "file"])
def test_a_kept_column_may_not_hide_another_field(field: str) -> None:
    """The message says how to keep it under another name."""
    with pytest.raises(ConfigurationError, match=f"expected_{field}=c"):
        check_fields({field: "c"}, with_origin=True, outputs=["label"])


def test_what_json_lacks_is_written_as_text() -> None:
    """Values of Parquet files, in failures and kept columns."""
    value = {
        "date": datetime.date(2024, 2, 29),
        "price": decimal.Decimal("1.10"),
        "raw": b"\xff",
        "nan": [float("nan"), float("-inf")],
        1: (True, None),
    }
    assert plain(value) == {
        "date": "2024-02-29",
        "price": "1.10",
        "raw": {"base64": "/w=="},
        "nan": ["NaN", "-Infinity"],
        "1": [True, None],
    }
    assert json.loads(json_line(value))["price"] == "1.10"


def test_failures_of_reading_and_of_inference_look_alike() -> None:
    """File, row, the error's class, its message and the row's own data."""
    read = Failure.of(ROW, RowError("no number"))
    scored = failure_of_element(
        ((ROW, np.zeros(2)), (InvalidRequestError, "the model refused", ["Traceback …"]))
    )
    assert failure_record(read) == {
        "file": "f.csv",
        "row": 7,
        "error": "RowError",
        "message": "no number",
        "data": {"id": 'a\u00e9"b', "x": "1"},
    }
    assert failure_record(scored) == {
        **failure_record(read),
        "error": "InvalidRequestError",
        "message": "the model refused",
    }

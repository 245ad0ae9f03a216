"""Tensors as JSON data, both ways."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.errors import LocalProtocolError, RemoteProtocolError
from beam_triton.protocol import DATATYPES, TensorSpec, to_array
from beam_triton.protocol.json_tensors import from_json_data, json_items
from tests.unit.protocol.tensors_for_tests import arrays, same

WITH_JSON = tuple(name for name in DATATYPES if name not in ("BYTES", "BF16"))


@pytest.mark.parametrize("datatype", WITH_JSON)
@given(data=st.data())
def test_numbers_survive_json_unchanged(datatype: str, data: st.DataObject) -> None:
    """Any array, flat or nested, through JSON text that strict readers take; what is not finite becomes
    NaN."""
    array = data.draw(arrays(datatype))
    flat = json.loads(b"[" + json_items(array, datatype, "x") + b"]", parse_constant=pytest.fail)
    if array.dtype.kind == "f":
        array = np.where(np.isfinite(array), array, array.dtype.type(np.nan))
    back = from_json_data(flat, datatype, array.shape, "x")
    assert back.dtype == array.dtype and same(back, array)
    if array.ndim:
        assert same(from_json_data(array.tolist(), datatype, array.shape, "x"), array)


@given(st.lists(st.text(max_size=20), max_size=10))
def test_text_survives_json_as_utf8(values: list[str]) -> None:
    """Any text is written as JSON strings and read as bytes."""
    array = to_array(values, TensorSpec("x", "BYTES", (-1,)))
    flat = json.loads(b"[" + json_items(array, "BYTES", "x") + b"]")
    assert flat == values
    assert same(from_json_data(flat, "BYTES", (len(values),), "x"), array)


def test_bfloat16_has_no_json_form() -> None:
    """Refused both ways: the protocol defines none, and no server takes one."""
    with pytest.raises(LocalProtocolError, match="no JSON form"):
        json_items(np.zeros(1, DATATYPES["BF16"].wire_dtype), "BF16", "x")
    with pytest.raises(RemoteProtocolError, match="no JSON form"):
        from_json_data([0.0], "BF16", [1], "x")


def test_null_is_nan_and_bare_constants_are_read() -> None:
    """MLServer and KServe write NaN and infinity as null, other servers as Python does."""
    read = from_json_data([1.0, None, float("inf"), float("nan")], "FP32", [4], "x")
    assert np.array_equal(read, np.array([1, np.nan, np.inf, np.nan], "f4"), equal_nan=True)
    with pytest.raises(RemoteProtocolError):
        from_json_data([None], "FP32", [1], "x", is_strict=True)


def test_whole_floats_are_integers() -> None:
    """A server in C++ writes 0.0 for INT64; Triton's reader does not take that."""
    assert from_json_data([0.0, 7, -3.0], "INT64", [3], "y").tolist() == [0, 7, -3]
    with pytest.raises(RemoteProtocolError):
        from_json_data([1.0], "INT32", [1], "y", is_strict=True)


def test_a_wrong_value_may_be_one_elements_doing() -> None:
    """The batch is halved for it."""
    with pytest.raises(RemoteProtocolError) as caught:
        from_json_data(["a", 1.0], "FP32", [2], "y")
    assert caught.value.splits_batch


def test_bytes_that_are_not_utf8_are_refused_in_json() -> None:
    """JSON cannot hold them, and the message shows which ones."""
    array = to_array([b"fine", b"\xff\xfe"], TensorSpec("x", "BYTES", (-1,)))
    with pytest.raises(LocalProtocolError, match=r"input 'x'.*\\xff\\xfe.*not UTF-8"):
        json_items(array, "BYTES", "x")


@pytest.mark.parametrize(
    ("datatype", "shape", "data"),
    [
        ("FP32", [2], [1.0]),
        ("FP32", [2], [1.0, 2.0, 3.0]),
        ("FP32", [2], ["1.0", "2.0"]),
        ("FP32", [2], [1.0, "nan"]),
        ("INT64", [2], [1, None]),
        ("FP32", [2], [1.0, True]),
        ("FP32", [2], [[1.0], [2.0]]),
        ("FP32", [2, 2], [[1.0, 2.0], 3.0]),
        ("FP32", [1], 1.0),
        ("FP32", [1], {"0": 1.0}),
        ("FP64", [1], [10**400]),
        ("INT32", [1], [1.5]),
        ("INT64", [1], [float("inf")]),
        ("INT32", [1], [2**31]),
        ("UINT64", [1], [-1]),
        ("BOOL", [1], [1]),
        ("BYTES", [1], [1]),
        ("BYTES", [1], ["\ud800"]),
        ("FP32", [-1], [1.0]),
        ("FP32", [1.0], [1.0]),
        ("FP32", [True], [1.0]),
        ("FP32", [2**40, 2**40], []),
        ("FP32", [1] * 200, [1.0]),
    ],
)
def test_wrong_json_data_is_refused_with_the_outputs_name(datatype: str, shape: Any, data: Any) -> None:
    """Too few, too many, of the wrong kind, out of range, or of no possible shape."""
    with pytest.raises(RemoteProtocolError, match="output 'scores'"):
        from_json_data(data, datatype, shape, "scores")

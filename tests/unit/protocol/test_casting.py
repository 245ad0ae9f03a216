"""Values to arrays: what is accepted, what is refused, and the messages."""

from __future__ import annotations

import math
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from beam_triton.errors import LocalProtocolError
from beam_triton.protocol import DATATYPES, TensorSpec, to_array
from beam_triton.protocol.datatypes import Array
from tests.unit.protocol.tensors_for_tests import NUMBERS, SHAPES, arrays, same


def spec(datatype: str, *shape: int) -> TensorSpec:
    return TensorSpec("pixels", datatype, shape)


def any_shape(datatype: str, array: Array) -> TensorSpec:
    return TensorSpec("pixels", datatype, (-1,) * array.ndim)


@pytest.mark.parametrize("datatype", NUMBERS)
@given(data=st.data())
def test_an_array_of_the_right_dtype_is_returned_itself(datatype: str, data: st.DataObject) -> None:
    """No copy is made."""
    array = data.draw(arrays(datatype))
    assert to_array(array, any_shape(datatype, array)) is array


@pytest.mark.parametrize("datatype", NUMBERS)
@given(data=st.data())
def test_other_memory_layouts_are_converted(datatype: str, data: st.DataObject) -> None:
    """Big-endian, transposed, strided and reversed arrays: same values, contiguous, little-endian."""
    array = data.draw(arrays(datatype, hnp.array_shapes(min_dims=2, max_dims=3, min_side=0, max_side=4)))
    for odd in (array.astype(array.dtype.newbyteorder(">")), array.T, array[::-1], array[:, ::2]):
        sent = to_array(odd, any_shape(datatype, odd))
        assert sent.flags.c_contiguous and sent.dtype == DATATYPES[datatype].wire_dtype
        assert same(sent, odd.astype(array.dtype))


@given(st.sampled_from(NUMBERS), st.sampled_from(NUMBERS), st.data())
def test_a_cast_keeps_every_value_or_is_refused(source: str, target: str, data: st.DataObject) -> None:
    """Between any two number datatypes: equal values afterwards, floats rounded, or an error."""
    array = data.draw(arrays(source, 3))
    try:
        sent = to_array(array, spec(target, 3))
    except LocalProtocolError:
        kept = False
    else:
        kept = True
        assert sent.dtype == DATATYPES[target].wire_dtype
    expected = [fits(value, target) for value in array.tolist()]
    assert kept == all(expected)
    if kept:
        for before, after in zip(array.tolist(), sent.tolist(), strict=True):
            rounded = DATATYPES[target].wire_dtype.type(before) if isinstance(before, float) else before
            assert rounded == after or (before != before and after != after)


def fits(value: Any, target: str) -> bool:
    """Exact arithmetic of Python's own numbers, to check NumPy's."""
    if target == "BOOL":
        return value in (0, 1)
    dtype = DATATYPES[target].wire_dtype
    if dtype.kind in "iu":
        if value != value or value in (float("inf"), float("-inf")):
            return False
        return int(value) == value and np.iinfo(dtype).min <= int(value) <= np.iinfo(dtype).max
    with np.errstate(over="ignore"):
        try:
            rounded = float(dtype.type(value))
        except OverflowError:
            return False
    if isinstance(value, float):
        return math.isfinite(rounded) or not math.isfinite(value)
    return bool(rounded == value)


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("INT32", np.array([2**31])),
        ("UINT8", np.array([-1])),
        ("INT64", np.array([2**63], np.uint64)),
        ("INT32", np.array([1.5])),
        ("INT32", np.array([np.nan])),
        ("INT64", np.array([2.0**63])),
        ("FP32", np.array([1e300])),
        ("FP16", np.array([65520.0], "f4")),
        ("FP64", np.array([2**53 + 1])),
        ("FP64", np.array([2**63 - 1])),
        ("BOOL", np.array([2])),
        ("FP32", np.array([1 + 2j])),
        ("FP32", np.array(["1.0"])),
        ("INT64", np.array(["2020-01-01"], "M8[D]")),
        ("FP32", np.ma.masked_array([1.0], mask=[True])),
        ("FP32", ["1.0"]),
        ("FP32", [None]),
        ("FP32", [True]),
        ("INT64", [1, True]),
        ("INT64", [[True]]),
        ("FP32", ["a", 1.0]),
        ("BOOL", [2]),
        ("BOOL", [0.5]),
        ("INT32", [2**31]),
        ("UINT64", [-1]),
        ("UINT64", [2**64]),
        ("INT64", [2**63, -1]),
        ("INT64", [1.5]),
        ("FP32", [1e300]),
        ("FP32", [10**400]),
        ("FP16", [1e6]),
        ("BF16", [1e39]),
        ("BF16", [True]),
        ("FP32", [b"abc"]),
        ("FP32", [object()]),
    ],
)
def test_lossy_casts_are_refused(datatype: str, value: Any) -> None:
    """Nothing is clipped, wrapped, truncated or parsed; the message says which input takes what."""
    with pytest.raises(LocalProtocolError, match=rf"input 'pixels' takes {datatype} of shape \[1\], not "):
        to_array(value, spec(datatype, 1))


@pytest.mark.parametrize(
    ("datatype", "value", "expected"),
    [
        ("FP32", [0.1, 2], [np.float32(0.1), 2.0]),
        ("FP16", [0.1, 2], [np.float16(0.1), 2.0]),
        ("FP64", [0.1, 2**53 + 1], [0.1, 2.0**53]),
        ("FP32", (1, 2), [1.0, 2.0]),
        ("FP32", [float("nan"), float("inf")], [float("nan"), float("inf")]),
        ("INT8", [-128, 127], [-128, 127]),
        ("INT64", [1.0, 2.0], [1, 2]),
        ("UINT64", [2**63 + 1, 1], [2**63 + 1, 1]),
        ("UINT64", [2**64 - 1, 0], [2**64 - 1, 0]),
        ("UINT64", [2**63 + 1, 1.0], [2**63 + 1, 1]),
        ("BOOL", [True, False], [True, False]),
        ("BOOL", [1, 0], [True, False]),
        ("FP32", np.array([1, 2.5], dtype=object), [1.0, 2.5]),
        ("INT64", np.array([2**62, 3], dtype=object), [2**62, 3]),
        ("FP32", np.array([1.5, 2.5], ml_dtypes.bfloat16), [1.5, 2.5]),
        ("FP32", np.array([1.5, np.nan]), [1.5, np.nan]),
        ("FP32", np.array([0.1, -np.inf]), [np.float32(0.1), -np.inf]),
        ("FP16", np.array([0.1, 2], "f4"), [np.float16(0.1), 2.0]),
        ("FP32", np.array([3, 4], np.int64), [3.0, 4.0]),
        ("INT32", np.array([3.0, -4.0]), [3, -4]),
        ("INT64", np.array([True, False]), [1, 0]),
        ("FP32", [np.float64(0.1), np.float64(2)], [np.float32(0.1), 2.0]),
        ("FP32", range(2), [0.0, 1.0]),
    ],
)
def test_lossless_casts_are_accepted(datatype: str, value: Any, expected: list[Any]) -> None:
    """Floats are rounded to the input's precision; integers in arrays are kept exactly."""
    sent = to_array(value, spec(datatype, 2))
    assert sent.dtype == DATATYPES[datatype].wire_dtype and sent.flags.c_contiguous
    assert np.array_equal(sent, np.array(expected, sent.dtype), equal_nan=sent.dtype.kind == "f")


@given(hnp.arrays(np.dtype("<f4"), 4))
def test_bf16_is_sent_as_bits(values: Array) -> None:
    """float32 is rounded, ml_dtypes.bfloat16 passed on; finite values that become infinite are refused."""
    with np.errstate(over="ignore", invalid="ignore"):
        bits = values.astype(ml_dtypes.bfloat16)
        overflows = bool((np.isinf(bits.astype("f4")) & ~np.isinf(values)).any())
    if overflows:
        with pytest.raises(LocalProtocolError, match="range of BF16"):
            to_array(values, spec("BF16", 4))
    else:
        sent = to_array(values, spec("BF16", 4))
        assert sent.dtype == np.dtype("<u2")
        assert same(sent.view(ml_dtypes.bfloat16).astype("f4"), bits.astype("f4"))
    assert np.array_equal(to_array(bits, spec("BF16", 4)), bits.view(np.uint16))


@pytest.mark.parametrize("value", [3, 3.0, np.float64(3), np.array(3.0), np.int8(3)])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (-1,)])
def test_a_single_value_fits_an_input_of_one_value_of_any_rank(value: Any, shape: tuple[int, ...]) -> None:
    """A number fits any rank, if all dimensions are 1 or open."""
    sent = to_array(value, spec("FP32", *shape))
    assert sent.shape == (1,) * len(shape) and sent.item() == 3.0


@pytest.mark.parametrize(
    ("shape", "batched", "value", "expected", "came"),
    [
        ((4,), False, np.zeros(5, "f4"), "[4]", "[5]"),
        ((4,), False, np.zeros((4, 1), "f4"), "[4]", "[4, 1]"),
        ((-1, 4), False, np.zeros((2, 3), "f4"), "[any, 4]", "[2, 3]"),
        ((2,), False, 1.0, "[2]", "[]"),
        ((4,), True, np.zeros(4, "f4"), "[batch, 4]", "[4]"),
        ((4,), True, np.zeros((2, 5), "f4"), "[batch, 4]", "[2, 5]"),
        ((), True, 1.0, "[batch]", "[]"),
        ((), False, np.zeros(1, "f4"), "[]", "[1]"),
    ],
)
def test_a_wrong_shape_is_refused_with_both_shapes(
    shape: tuple[int, ...], batched: bool, value: Any, expected: str, came: str
) -> None:
    """The message shows both shapes, with -1 as "any"."""
    text = f"takes FP32 of shape {expected}, not shape {came}"
    with pytest.raises(LocalProtocolError, match=re.escape(text)):
        to_array(value, spec("FP32", *shape), batched=batched)


@given(SHAPES.flatmap(lambda shape: arrays("FP32", shape)))
def test_nested_lists_keep_shape_and_values(array: Array) -> None:
    """Lists of any depth keep shape and values."""
    if 0 not in array.shape:
        assert same(to_array(array.tolist(), any_shape("FP32", array)), array)


@pytest.mark.parametrize(
    "value",
    [
        ["añb", b"raw\x00"],
        ("añb", b"raw\x00"),
        [np.str_("añb"), np.bytes_(b"raw\x00")],
        np.array(["añb", b"raw\x00"], dtype=object),
        [bytearray("añb".encode()), memoryview(b"raw\x00")],
    ],
)
def test_str_and_bytes_of_all_kinds_are_accepted_for_bytes(value: Any) -> None:
    """str is UTF-8, bytes go as they are, trailing zeros included."""
    sent = to_array(value, spec("BYTES", 2))
    assert [bytes(item) for item in sent.tolist()] == ["añb".encode(), b"raw\x00"]


@pytest.mark.parametrize("value", [np.array(["ab", "c"]), np.array([b"ab", b"c"]), [["ab"], ["c"]]])
def test_arrays_of_text_keep_their_shape(value: Any) -> None:
    """NumPy's own text dtypes and nested lists."""
    sent = to_array(value, TensorSpec("pixels", "BYTES", (-1,) * np.ndim(value)))
    assert sent.shape == np.shape(value) and sent.ravel().tolist() == [b"ab", b"c"]


@pytest.mark.parametrize("value", ["text", b"text", bytearray(b"text"), memoryview(b"text")])
def test_a_single_string_is_one_value(value: Any) -> None:
    """A single str or bytes is one value, not a sequence of characters."""
    assert to_array(value, spec("BYTES", 1)).tolist() == [b"text"]


@pytest.mark.parametrize(
    "value", [1, [1], [None], np.array([1.0]), ["a", 1], [["a"], ["b", "c"]], ["\ud800"]]
)
def test_values_that_are_not_text_are_refused_for_bytes(value: Any) -> None:
    """Numbers are not converted to text implicitly."""
    with pytest.raises(LocalProtocolError, match="input 'pixels' takes BYTES"):
        to_array(value, spec("BYTES", -1))


def test_ragged_lists_and_broken_arrays_raise_local_protocol_errors() -> None:
    """Whatever the conversion raises becomes an error that names the input."""

    class Broken:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
            raise RuntimeError("tensor is on a GPU")

        def __repr__(self) -> str:
            raise RuntimeError("not even that")

    endless: list[Any] = []
    endless.append(endless)
    too_deep: Any = 1.0
    for _ in range(100):
        too_deep = [too_deep]
    for value in ([[1.0], [1.0, 2.0]], Broken(), endless, too_deep):
        with pytest.raises(LocalProtocolError, match="input 'pixels'"):
            to_array(value, spec("FP32", -1))

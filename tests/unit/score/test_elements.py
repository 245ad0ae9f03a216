"""Rows to arrays: text, typed values, shapes, and every way in which a row does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow
import pytest

from beam_triton.errors import ConfigurationError
from beam_triton.protocol import DATATYPES, ModelSpec, TensorSpec
from beam_triton.score.mapping import InputColumns
from beam_triton.score.row_elements import ElementMaker
from beam_triton.score.rows import Columns, RowError


def make(
    datatype: str, shape: tuple[int, ...], mapping: str, columns: tuple[str, ...] | None, values: Any
) -> Any:
    """The element of a model with one input ``x``; columns None is a row of JSON Lines."""
    model = ModelSpec("m", "1", (TensorSpec("x", datatype, shape),), (), 8)
    maker = ElementMaker(model, [InputColumns.parse(mapping)])
    return maker.compile(Columns(columns) if columns is not None else None)(values)


@pytest.mark.parametrize("datatype", [name for name in DATATYPES if name not in ("BYTES", "BOOL")])
def test_text_becomes_numbers_of_every_datatype(datatype: str) -> None:
    """Several columns of text are stacked in the datatype of the input; BF16 is rounded later."""
    array = make(datatype, (3,), "x=a:c", ("a", "b", "c"), ["1", " 2 ", "3.0"])
    assert array.dtype == (np.dtype("<f4") if datatype == "BF16" else DATATYPES[datatype].array_dtype)
    assert array.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9007199254740993", 2**53 + 1),
        ("9007199254740993.0", 2**53 + 1),
        ("18446744073709551615.000", 2**64 - 1),
        ("1.8446744073709551615e19", 2**64 - 1),
        ("1e3", 1000),
        ("-0.0", 0),
        ("0e999999999", 0),
    ],
)
def test_whole_numbers_keep_every_digit(text: str, number: int) -> None:
    """Written with a point or an exponent, too, which a float would round."""
    assert make("UINT64", (1,), "x=a", ("a",), [text]).tolist() == [number]
    assert make("UINT64", (2,), "x=a", ("a",), [f"{text} 1"]).tolist() == [number, 1]


def test_true_and_false_in_text() -> None:
    """BOOL takes words and digits, and nothing else."""
    columns = ("a", "b", "c", "d")
    array = make("BOOL", (4,), "x=a,b,c,d", columns, ["true", "False", "1", "0"])
    assert array.tolist() == [True, False, True, False]
    with pytest.raises(RowError, match="'maybe'; input x BOOL"):
        make("BOOL", (4,), "x=a,b,c,d", columns, ["true", "False", "1", "maybe"])


@pytest.mark.parametrize("text", ["[1, 2, 3, 4]", "[[1,2],[3,4]]", "1 2 3 4", " 1\t2  3 4 "])
def test_an_array_in_one_column_of_text(text: str) -> None:
    """JSON, flat or nested, and numbers with blanks between them, all in the input's shape."""
    array = make("FP32", (2, 2), "x=a", ("a",), [text])
    assert array.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (-1,)])
def test_one_number_fits_inputs_of_one_value(shape: tuple[int, ...]) -> None:
    """Whatever their rank."""
    array = make("INT32", shape, "x=a", ("a",), ["7"])
    assert array.shape == tuple(1 for _ in shape)
    assert array.ravel().tolist() == [7]


def test_free_dimensions_are_filled_in() -> None:
    """One dimension of any size takes what the others leave."""
    assert make("FP32", (-1, 2), "x=a:f", tuple("abcdef"), list("123456")).shape == (3, 2)
    assert make("FP32", (-1,), "x=a", ("a",), ["[1, 2, 3]"]).shape == (3,)
    assert make("FP32", (-1,), "x=a", ("a",), ["1 2 3 4"]).shape == (4,)


def test_text_for_bytes() -> None:
    """A string column feeds BYTES as it is; several strings come as columns or as a JSON array."""
    assert make("BYTES", (1,), "x=a", ("a",), ["[not an array"]).tolist() == [b"[not an array"]
    assert make("BYTES", (), "x=a", ("a",), ["\u00e9"]).item() == "\u00e9".encode()
    assert make("BYTES", (2,), "x=a,b", ("a", "b"), ["p", "q"]).tolist() == [b"p", b"q"]
    assert make("BYTES", (2,), "x=a", ("a",), ['["p", "q"]']).tolist() == [b"p", b"q"]


@pytest.mark.parametrize(
    ("datatype", "values", "message"),
    [
        ("FP32", ["1", "x"], "column 'b' holds 'x' where input x FP32"),
        ("FP32", ["1", ""], "column 'b' is empty"),
        ("FP32", ["1e39", "1"], "column 'a' holds '1e39', which is beyond what FP32 can hold"),
        ("INT8", ["1", "128"], "beyond what INT8"),
        ("UINT8", ["-1", "1"], "beyond what UINT8"),
        ("INT8", ["1", "1.5"], "takes a whole number"),
        ("INT64", ["1", "nan"], "takes a whole number"),
        ("INT64", ["1", "-inf"], "takes a whole number"),
        ("INT64", ["1", "1e-999999999"], "takes a whole number"),
        ("INT64", ["1", "9007199254740993.5"], "takes a whole number"),
        ("INT64", ["1", "1e999999999"], "column 'b' holds '1e999999999', which is beyond what INT64"),
        ("UINT64", ["1", "18446744073709551616.0"], "beyond what UINT64"),
        ("INT32", ["1_000", "1"], "column 'a' holds '1_000' where input x INT32 .2. takes a whole number"),
        ("INT32", ["1", "1_000.0"], "takes a whole number"),
        ("FP32", ["1", "1_0.5"], "column 'b' holds '1_0.5' where input x FP32 .2. takes a number"),
    ],
)
def test_text_that_is_no_such_number_names_column_and_value(
    datatype: str, values: list[str], message: str
) -> None:
    """Nothing is clipped, wrapped or guessed."""
    with pytest.raises(RowError, match=message):
        make(datatype, (2,), "x=a,b", ("a", "b"), values)


@pytest.mark.parametrize("text", ["[1, 2]", "1 2", "hello", "[1, 2", "", "[[1],[2]]", '["a", "b", "c"]'])
def test_text_that_is_no_such_array_is_refused(text: str) -> None:
    """Wrong lengths, broken JSON, nothing at all."""
    with pytest.raises(RowError, match="column 'a'"):
        make("FP32", (3,), "x=a", ("a",), [text])


def test_json_values_keep_their_types() -> None:
    """Numbers and lists become arrays; a flat list fits an input of higher rank."""
    assert make("FP32", (3,), "x=a", None, {"a": [1, 2.5, 3]}).tolist() == [1.0, 2.5, 3.0]
    assert make("FP32", (2, 2), "x=a", None, {"a": [1, 2, 3, 4]}).shape == (2, 2)
    assert make("FP32", (2, 2), "x=a", None, {"a": [[1, 2], [3, 4]]}).shape == (2, 2)
    assert make("INT64", (2,), "x=a,b", None, {"a": 1, "b": 2.0}).tolist() == [1, 2]
    assert make("FP32", (2, 2), "x=a,b", None, {"a": [1, 2], "b": [3, 4]}).tolist() == [[1, 2], [3, 4]]
    assert make("BYTES", (1,), "x=a", None, {"a": "text"}).tolist() == [b"text"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"b": 1}, "there is no 'a' for input x FP32 .2.; the row has b"),
        ({"a": None}, "null"),
        ({"a": [1, None]}, "null"),
        ({"a": "1 2"}, "column 'a'"),
        ({"a": [1, "2"]}, "column 'a'"),
        ({"a": [1, True]}, "column 'a'"),
        ({"a": [1, 2, 3]}, "column 'a'"),
        ({"a": {"b": 1}}, "column 'a'"),
        ({"a": [[1], [2, 3]]}, "column 'a'"),
    ],
)
def test_json_values_that_do_not_fit_are_refused(values: dict[str, Any], message: str) -> None:
    """Text is no number where types exist, and true is no 1."""
    with pytest.raises(RowError, match=message):
        make("FP32", (2,), "x=a", None, values)


def test_parquet_values_are_typed_though_they_come_in_order() -> None:
    """A column's pyarrow type says that text is text: it is not parsed."""
    model = ModelSpec("m", "1", (TensorSpec("x", "FP32", (2,)),), (), 8)
    maker = ElementMaker(model, [InputColumns.parse("x=a,b")])
    convert = maker.compile(Columns(("a", "b"), (pyarrow.int64(), pyarrow.int64())))
    assert convert((1, 2)).tolist() == [1.0, 2.0]  # type: ignore[union-attr]
    with pytest.raises(RowError, match="columns 'a' to 'b'"):
        convert(("1", "2"))


def test_a_model_of_several_inputs_gets_a_dict() -> None:
    """An optional input comes along where the row has its column."""
    model = ModelSpec(
        "m",
        "1",
        (
            TensorSpec("a", "FP32", (1,)),
            TensorSpec("b", "INT8", (1,)),
            TensorSpec("c", "INT8", (1,), optional=True),
        ),
        (),
        8,
    )
    maker = ElementMaker(model, [])
    with_c = maker.compile(Columns(("c", "b", "a")))(["3", "2", "1"])
    without = maker.compile(Columns(("b", "a")))(["2", "1"])
    from_json = maker.compile(None)({"a": 1, "b": 2, "c": None})
    assert isinstance(with_c, dict)
    assert {name: array.tolist() for name, array in with_c.items()} == {"a": [1.0], "b": [2], "c": [3]}
    assert sorted(without) == ["a", "b"]
    assert sorted(from_json) == ["a", "b"]


def test_columns_that_no_row_can_fit_are_told_at_once_or_row_by_row() -> None:
    """A launcher gets one error, a worker one failure a row: later files may differ from the first."""
    model = ModelSpec("m", "1", (TensorSpec("x", "FP32", (3,)),), (), 8)
    maker = ElementMaker(model, [InputColumns.parse("x=a,b,c")])
    for columns, message in (
        (Columns(("a", "b")), "there is no column 'c'.*the file has a, b"),
        (Columns(("a", "b", "c", "a")), "column 'a' appears more than once"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            maker.check(columns)
        with pytest.raises(RowError, match=message):
            maker.compile(columns)(["1", "2"])
    with pytest.raises(ConfigurationError, match=r"does not take 2 values.*inputs: x FP32 \[3\]"):
        ElementMaker(model, [InputColumns.parse("x=a,b")]).check(Columns(("a", "b")))


def test_what_a_parquet_file_is_asked_for() -> None:
    """The mapped columns, and those of optional inputs."""
    model = ModelSpec("m", "1", (TensorSpec("x", "FP32", (2,)), TensorSpec("o", "INT8", (1,), optional=True)))
    maker = ElementMaker(model, [InputColumns.parse("x=a:b")])
    assert maker.columns_used(Columns(("z", "a", "b"))) == {"a", "b", "o"}

"""Columns to arrays: text, typed values, shapes, and every way in which a row does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.errors import ConfigurationError
from beam_triton.protocol import DATATYPES, ModelSpec, TensorSpec
from beam_triton.score.column_arrays import ColumnArrays
from beam_triton.score.input_columns import InputColumns
from beam_triton.score.row_reading import RowBlock, RowError


def text_block(columns: tuple[str, ...], *rows: list[str]) -> RowBlock:
    """Rows of a CSV."""
    arrays = [pyarrow.array(values, pyarrow.string()) for values in zip(*rows, strict=True)]
    table = pyarrow.RecordBatch.from_arrays(arrays, names=list(columns))
    return RowBlock("f.csv", np.arange(1, 1 + len(rows)), table, is_text=True)


def json_block(*rows: dict[str, Any]) -> RowBlock:
    return RowBlock("f.jsonl", np.arange(1, 1 + len(rows)), None, rows)


def table_block(columns: dict[str, Any]) -> RowBlock:
    """Rows of a Parquet file."""
    table = pyarrow.RecordBatch.from_pydict(columns)
    return RowBlock("f.parquet", np.arange(1, 1 + table.num_rows), table)


def arrays_of(datatype: str, shape: tuple[int, ...], mapping: str, block: RowBlock) -> tuple[Any, Any]:
    """Row index to tensor, and row index to error, for a model with one input ``x``."""
    model = ModelSpec("m", "1", (TensorSpec("x", datatype, shape),), (), 8)
    groups, errors = ColumnArrays(model, [InputColumns.parse(mapping)]).arrays(block)
    found = {
        index: group.arrays["x"][place]
        for group in groups
        for place, index in enumerate(group.indices.tolist())
    }
    return found, errors


def make(
    datatype: str, shape: tuple[int, ...], mapping: str, columns: tuple[str, ...] | None, values: Any
) -> Any:
    """The tensor of a single row; columns None is a row of JSON Lines. Raises what the row's error is."""
    block = json_block(values) if columns is None else text_block(columns, values)
    found, errors = arrays_of(datatype, shape, mapping, block)
    if errors:
        raise errors[0]
    return np.asarray(found[0])


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
        ("7.", 7),
    ],
)
def test_whole_numbers_keep_every_digit(text: str, number: int) -> None:
    """Written with a point, too, which a float would round."""
    assert make("UINT64", (1,), "x=a", ("a",), [text]).tolist() == [number]


def test_true_and_false_in_text() -> None:
    """BOOL takes words and digits, and nothing else."""
    columns = ("a", "b", "c", "d")
    array = make("BOOL", (4,), "x=a,b,c,d", columns, ["true", "False", "1", "0"])
    assert array.tolist() == [True, False, True, False]
    with pytest.raises(RowError, match="'maybe' where input x BOOL"):
        make("BOOL", (4,), "x=a,b,c,d", columns, ["true", "False", "1", "maybe"])


@pytest.mark.parametrize("text", ["[1, 2, 3, 4]", "[[1,2],[3,4]]", " [1.0,2,3,4] "])
def test_an_array_in_one_column_of_text(text: str) -> None:
    """JSON, flat or nested, in the input's shape."""
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
    assert make("FP32", (-1,), "x=a", ("a",), ["5"]).tolist() == [5.0]


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
        (
            "FP32",
            ["1e39", "1"],
            "column 'a' holds '1e39' where input x FP32 .2. takes a number that FP32 can",
        ),
        ("INT8", ["1", "128"], "holds '128' .* takes a whole number that INT8 can hold"),
        ("UINT8", ["-1", "1"], "holds '-1' .* takes a whole number that UINT8 can hold"),
        ("INT8", ["1", "1.5"], "takes a whole number"),
        ("INT64", ["1", "nan"], "takes a whole number"),
        ("INT64", ["1", "-inf"], "takes a whole number"),
        ("INT64", ["1", "1e-999999999"], "takes a whole number"),
        ("INT64", ["1", "9007199254740993.5"], "takes a whole number"),
        ("INT64", ["1", "1e999999999"], "column 'b' holds '1e999999999' .* whole number that INT64 can hold"),
        ("UINT64", ["1", "18446744073709551616.0"], "takes a whole number that UINT64 can hold"),
        ("INT32", ["1_000", "1"], "column 'a' holds '1_000' where input x INT32 .2. takes a whole number"),
        ("INT32", ["1", "1_000.0"], "takes a whole number"),
        ("INT32", ["1", "0x10"], "holds '0x10' where input x INT32 .2. takes a whole number"),
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
        ({"b": 1}, "column 'a': missing or null where input x FP32 .2."),
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
    found, errors = arrays_of("FP32", (2,), "x=a,b", table_block({"a": [1, 3], "b": [2, 4]}))
    assert {index: array.tolist() for index, array in found.items()} == {0: [1.0, 2.0], 1: [3.0, 4.0]}
    assert not errors
    found, errors = arrays_of("FP32", (2,), "x=a,b", table_block({"a": ["1"], "b": ["2"]}))
    assert not found
    assert "column 'a': input 'x' takes FP32" in errors[0].message


@pytest.mark.parametrize(
    ("datatype", "shape", "values", "bad"),
    [
        ("FP32", (2,), [[1, 2], [3, 4], [5, 6]], []),
        ("FP32", (2,), [[1.5, 2], None, [5, 6], [7]], [1, 3]),
        ("INT8", (2,), [[1, 2], [3, 400], [5, 6]], [1]),
        ("INT64", (2,), [[1.0, 2.0], [3.5, 4.0]], [1]),
        ("FP16", (2,), [[1.0, 2.0], [1e9, 4.0]], [1]),
        ("FP32", (2, 1), [[[1], [2]], [[3], [4]]], []),
        ("FP32", (2, 2), [[1, 2, 3, 4], [5, 6, 7, 8]], []),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lists_of_a_block_are_converted_and_bad_rows_fail_alone(
    datatype: str, shape: tuple[int, ...], values: list[Any], bad: list[int], kind: str
) -> None:
    """Whether a list column's rows go at once or one by one, each has its own values or its own error."""
    if kind == "jsonl":
        block = json_block(*({"x": value} for value in values))
    else:
        block = table_block({"x": pyarrow.array(values)})
    found, errors = arrays_of(datatype, shape, "x=x", block)
    assert sorted(errors) == bad
    assert sorted([*found, *errors]) == list(range(len(values)))
    for index, array in found.items():
        assert array.shape == shape
        assert array.ravel().tolist() == np.array(values[index]).ravel().tolist()


@pytest.mark.parametrize(
    "list_type", [pyarrow.list_, lambda kind: pyarrow.list_(kind, 2), pyarrow.large_list]
)
def test_every_kind_of_list_column_is_converted(list_type: Any) -> None:
    """Embeddings are often stored as lists of a fixed size."""
    column = pyarrow.array([[1, 2], [3, 4], [5, 6]], list_type(pyarrow.float64())).slice(1)
    found, errors = arrays_of("FP32", (2,), "x=x", table_block({"x": column}))
    assert {index: array.tolist() for index, array in found.items()} == {0: [3.0, 4.0], 1: [5.0, 6.0]}
    assert not errors


def test_rows_of_several_shapes_are_grouped() -> None:
    """Lists of unequal lengths for a free dimension: rows of one length travel together."""
    model = ModelSpec("m", "1", (TensorSpec("x", "INT64", (-1,)),), (), 8)
    arrays = ColumnArrays(model, [])
    groups, errors = arrays.arrays(json_block({"x": [1]}, {"x": [1, 2]}, {"x": [3]}, {"x": "no"}))
    assert [(group.indices.tolist(), group.arrays["x"].tolist()) for group in groups] == [
        ([0, 2], [[1], [3]]),
        ([1], [[1, 2]]),
    ]
    assert list(errors) == [3]


WORDS = (
    *("1", "0", " 2 ", "3.0", "1e3", "-1", "+1", "1.5", ".5", "1e39", "1e400", "nan", "inf", "-Infinity"),
    *("true", "FALSE", "no", "", "0x10", "1_0", "9007199254740993", "18446744073709551615", "[1]"),
)


@pytest.mark.parametrize("datatype", ["FP32", "FP64", "FP16", "INT8", "INT64", "UINT64", "BOOL"])
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8))
def test_a_column_of_text_gives_what_each_value_gives_alone(datatype: str, texts: list[str]) -> None:
    """Rows that are converted at once come to the same as those that are looked at one by one."""
    together, errors = arrays_of(datatype, (1,), "x=a", text_block(("a",), *([text] for text in texts)))
    assert sorted([*together, *errors]) == list(range(len(texts)))
    for index, text in enumerate(texts):
        # Beside a word that is no number every other one is looked at apart.
        alone, alone_errors = arrays_of(datatype, (1,), "x=a", text_block(("a",), [text], ["no"]))
        assert (0 in alone_errors) == (index in errors), text
        if index in together:
            np.testing.assert_array_equal(together[index], alone[0])


def test_a_model_of_several_inputs_gets_an_array_for_each() -> None:
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
    arrays = ColumnArrays(model, [])
    ((_, with_c),), _ = arrays.arrays(text_block(("c", "b", "a"), ["3", "2", "1"]))
    ((_, without),), _ = arrays.arrays(text_block(("b", "a"), ["2", "1"]))
    groups, errors = arrays.arrays(json_block({"a": 1, "b": 2, "c": None}, {"a": 3, "b": 4, "c": 5}))
    assert {name: array.tolist() for name, array in with_c.items()} == {"a": [[1.0]], "b": [[2]], "c": [[3]]}
    assert sorted(without) == ["a", "b"]
    assert [sorted(group.arrays) for group in groups] == [["a", "b"], ["a", "b", "c"]]
    assert not errors


def test_columns_that_no_row_can_fit_are_an_error_at_launch_or_of_each_row() -> None:
    """A launcher gets one error, a worker one failure a row: later files may differ from the first."""
    model = ModelSpec("m", "1", (TensorSpec("x", "FP32", (3,)),), (), 8)
    arrays = ColumnArrays(model, [InputColumns.parse("x=a,b,c")])
    for names, message in (
        (("a", "b"), "there is no column 'c'.*the file has a, b"),
        (("a", "b", "c", "a"), "column 'a' appears more than once"),
    ):
        block = text_block(names, ["1"] * len(names), ["2"] * len(names))
        with pytest.raises(ConfigurationError, match=message):
            arrays.check(block)
        groups, errors = arrays.arrays(block)
        assert (groups, sorted(errors)) == ([], [0, 1])
        assert all(isinstance(error, RowError) for error in errors.values())
    with pytest.raises(ConfigurationError, match=r"does not take 2 values.*inputs: x FP32 \[3\]"):
        ColumnArrays(model, [InputColumns.parse("x=a,b")]).check(text_block(("a", "b"), ["1", "2"]))


def test_mapped_columns_and_optional_inputs_are_read_of_a_parquet_file() -> None:
    """The others are left alone."""
    model = ModelSpec("m", "1", (TensorSpec("x", "FP32", (2,)), TensorSpec("o", "INT8", (1,), optional=True)))
    arrays = ColumnArrays(model, [InputColumns.parse("x=a:b")])
    assert arrays.columns_used(("z", "a", "b")) == {"a", "b", "o"}

"""Columns of Arrow to tensors, and outputs to columns: every datatype, nulls, slices, and shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.protocol import DATATYPES, TensorSpec
from beam_triton.transforms.arrow_columns import (
    column_rows,
    input_rows,
    output_column,
    output_type,
    tensor_groups,
)

NUMBERS = [name for name in DATATYPES if name not in ("BYTES", "BF16")]


def rows_of(
    column: Any, datatype: str, shape: tuple[int, ...], **options: Any
) -> tuple[dict[int, Any], dict[int, str]]:
    """Each row's tensor as lists, and the message of each row that has none."""
    groups, errors = column_rows(column, TensorSpec("x", datatype, shape, **options))
    found = {
        row: tensor
        for group in groups
        for row, tensor in zip(group.indices.tolist(), group.array, strict=True)
    }
    assert sorted([*found, *errors]) == sorted({*found, *errors})
    tensors = {row: np.asarray(tensor).tolist() for row, tensor in found.items()}
    return tensors, {row: error.message for row, error in errors.items()}


def the_array(column: Any, datatype: str, shape: tuple[int, ...]) -> Any:
    """The tensors of a column whose rows are all alike."""
    ((indices, array),), errors = column_rows(column, TensorSpec("x", datatype, shape))
    assert not errors
    assert indices.tolist() == list(range(len(column)))
    return array


@pytest.mark.parametrize("datatype", NUMBERS)
def test_numbers_are_views_of_the_column(datatype: str) -> None:
    """Of plain columns, both kinds of lists and tensors, sliced or not; booleans, as bits, are copied."""
    dtype = DATATYPES[datatype].array_dtype
    values = np.arange(24).astype(dtype)
    flat = pa.array(values)
    ends = pa.array(np.arange(0, 25, 4, dtype=np.int32))
    for column in (
        pa.FixedSizeListArray.from_arrays(flat, 4),
        pa.ListArray.from_arrays(ends, flat),
        pa.LargeListArray.from_arrays(ends.cast(pa.int64()), flat),
        pa.chunked_array([pa.FixedSizeListArray.from_arrays(flat, 4)]),
    ):
        array = the_array(column.slice(1, 4), datatype, (4,))
        assert array.dtype == dtype
        assert array.tolist() == values.reshape(6, 4)[1:5].tolist()
        assert np.shares_memory(array, values) == (datatype != "BOOL")
    single = the_array(flat.slice(3), datatype, (1,))
    assert single.tolist() == values[3:, np.newaxis].tolist()
    assert the_array(flat, datatype, ()).shape == (24,)
    if datatype != "BOOL":
        tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(values.reshape(4, 2, 3))
        array = the_array(tensors.slice(1), datatype, (2, 3))
        assert np.shares_memory(array, values)
        assert array.tolist() == values.reshape(4, 2, 3)[1:].tolist()


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", "é", ""]),
        pa.array(["a", "é", ""], pa.large_string()),
        pa.array([b"a", "é".encode(), b""]),
        pa.array([b"a", "é".encode(), b""], pa.large_binary()),
        pa.array(["a", "é", ""]).dictionary_encode(),
        pa.chunked_array([["a"], ["é", ""]]),
    ],
)
def test_texts_and_bytes_of_every_type(column: Any) -> None:
    """Text is UTF-8."""
    array = the_array(column, "BYTES", (1,))
    assert array.tolist() == [[b"a"], ["é".encode()], [b""]]


def test_bytes_of_a_fixed_size_and_lists_of_texts() -> None:
    """They feed BYTES as any others do."""
    assert the_array(pa.array([b"ab", b"cd"], pa.binary(2)), "BYTES", (1,)).tolist() == [[b"ab"], [b"cd"]]
    assert the_array(pa.array([["a", "b"], ["c", "d"]]), "BYTES", (2,)).tolist() == [
        [b"a", b"b"],
        [b"c", b"d"],
    ]


def test_chunks_of_a_column_are_joined() -> None:
    """A column may come in several chunks, with offsets of their own."""
    part = pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    column = pa.chunked_array([part.slice(1), part.slice(0, 1), part.slice(0, 0)])
    assert the_array(column, "FP64", (2,)).tolist() == [[3.0, 4.0], [5.0, 6.0], [1.0, 2.0]]


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.list_(pa.int64(), 2), pa.large_list(pa.int64())])
def test_nulls_fail_their_rows_alone(kind: pa.DataType) -> None:
    """A null row, or one null among its values; integers around them stay integers."""
    column = pa.array([[0, 0], [1, 2], None, [3, None], [2**62 + 1, 4]], kind).slice(1)
    found, errors = rows_of(column, "INT64", (2,))
    assert found == {0: [1, 2], 3: [2**62 + 1, 4]}
    assert errors[1] == "null where input x INT64 [2] takes a value"
    assert errors[2].startswith("a null among the values")


@pytest.mark.parametrize(
    "column",
    [
        pa.array([None, None]),
        pa.array([None, None], pa.list_(pa.float32())),
        pa.array([[None], [None]], pa.list_(pa.float32())),
    ],
)
def test_nothing_but_nulls(column: Any) -> None:
    """No row has a tensor."""
    found, errors = rows_of(column, "FP32", (1,))
    assert (found, sorted(errors)) == ({}, [0, 1])


def test_a_null_of_an_optional_input_is_no_failure() -> None:
    """The row is sent without that input."""
    assert rows_of(pa.array([1, None], pa.int8()), "INT8", (1,), optional=True) == ({0: [1]}, {})


@pytest.mark.parametrize(
    "column",
    [
        pa.array([], pa.list_(pa.float32())),
        pa.array([], pa.list_(pa.float32(), 4)),
        pa.array([], pa.float32()),
        pa.array([], pa.string()),
        pa.array([], pa.null()),
        pa.chunked_array([], pa.list_(pa.float32())),
        pa.array([[1.0]]).slice(1),
    ],
)
def test_empty_columns(column: Any) -> None:
    """They have no rows, and no errors."""
    assert rows_of(column, "FP32", (4,)) == ({}, {})


def test_lists_of_several_lengths_are_grouped() -> None:
    """Rows of one length travel together, in their order."""
    column = pa.array([[1, 2], [3], [], [4, 5], [6]], pa.list_(pa.int64()))
    groups, errors = column_rows(column, TensorSpec("x", "INT64", (-1,)))
    assert {group.array.shape: group.indices.tolist() for group in groups} == {
        (1, 0): [2],
        (2, 1): [1, 4],
        (2, 2): [0, 3],
    }
    assert not errors
    assert rows_of(column, "INT64", (-1,))[0][3] == [4, 5]


def test_lists_in_lists() -> None:
    """A tensor's rows have one length; another null or length is that row's fault."""
    column = pa.array(
        [[[1, 2], [3, 4]], [[5], [6, 7]], [[8], None], [[9, 9]], [], [[], []], [[1, 2], [None, 4]]],
        pa.list_(pa.list_(pa.int64())),
    )
    found, errors = rows_of(column, "INT64", (-1, -1))
    assert found == {0: [[1, 2], [3, 4]], 3: [[9, 9]], 4: [], 5: [[], []]}
    assert errors[1] == "lists of several lengths where input x INT64 [-1, -1] takes one tensor"
    assert "null" in errors[2]
    assert "null" in errors[6]
    deep = pa.array([[[[1, 2]], [[3, 4]]], [[[5, 6]], [[7, 8]]]])
    assert the_array(deep, "INT64", (2, 1, 2)).tolist() == deep.to_pylist()


def test_a_flat_list_fits_a_tensor_of_any_rank() -> None:
    """Images are often stored as one list; of another number of values it keeps its shape, for the error."""
    flat = pa.array([[1, 2, 3, 4, 5, 6]], pa.list_(pa.float32()))
    assert the_array(flat, "FP32", (3, 2)).shape == (1, 3, 2)
    assert the_array(flat, "FP32", (-1, 2)).shape == (1, 3, 2)
    assert the_array(flat, "FP32", (4,)).shape == (1, 6)


def test_tensors_with_permuted_dimensions() -> None:
    """The type tells the order of the dimensions; rows without a value are left out."""
    storage = pa.array([[1, 2, 3, 4, 5, 6], None, [1, 2, 3, 4, 5, None]], pa.list_(pa.float32(), 6))
    kind = pa.fixed_shape_tensor(pa.float32(), (2, 3), permutation=[1, 0])
    found, errors = rows_of(pa.ExtensionArray.from_storage(kind, storage), "FP32", (3, 2))
    assert found == {0: [[1, 4], [2, 5], [3, 6]]}
    assert sorted(errors) == [1, 2]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2], pa.timestamp("us")),
        pa.array([1, 2], pa.date32()),
        pa.array([{"a": 1}, {"a": 2}]),
        pa.array([[{"a": 1}], [{"a": 2}]]),
        pa.array([[("k", 1)], [("k", 2)]], pa.map_(pa.string(), pa.int64())),
        pa.array([1, 2], pa.decimal128(5, 2)),
    ],
)
def test_other_types_fail_each_row(column: Any) -> None:
    """Nothing is guessed; the message names Arrow's type."""
    found, errors = rows_of(column, "INT64", (1,))
    assert (found, sorted(errors)) == ({}, [0, 1])
    assert "Arrow's type" in errors[0]


def test_several_columns_are_the_values_of_one_tensor() -> None:
    """One value each; a row with a null among them fails."""
    spec = TensorSpec("x", "FP32", (2,))
    columns = [pa.array([1.0, 2.0, None]), pa.chunked_array([[3.0], [4.0, 5.0]])]
    ((indices, array),), errors = input_rows(columns, spec)
    assert (indices.tolist(), array.tolist(), [*errors]) == ([0, 1], [[1.0, 3.0], [2.0, 4.0]], [2])
    groups, errors = input_rows([*columns, pa.array([1.0, 2.0, 3.0])], spec)
    assert not groups
    assert "3 columns are not the values of input x FP32 [2]" in errors[0].message
    groups, errors = input_rows([pa.array([[1.0, 2.0]]), pa.array([2.0])], spec)
    assert (groups, sorted(errors)) == ([], [0])


def test_inputs_of_a_row_travel_together() -> None:
    """Rows are grouped by the shapes of all inputs; an error of one input is the row's."""
    specs = [
        TensorSpec("a", "FP32", (-1,)),
        TensorSpec("b", "INT64", (1,)),
        TensorSpec("c", "BOOL", (1,), optional=True),
    ]
    columns = {
        "a": pa.array([[1.0], [2.0, 3.0], [4.0], None, [5.0]]),
        "b": pa.array([1, 2, 3, 4, None]),
        "c": pa.array([True, None, None, True, True]),
    }
    groups, errors = tensor_groups({spec.name: column_rows(columns[spec.name], spec) for spec in specs}, 5)
    found = {
        tuple(group.indices.tolist()): {name: array.tolist() for name, array in group.arrays.items()}
        for group in groups
    }
    assert found == {
        (0,): {"a": [[1.0]], "b": [[1]], "c": [[True]]},
        (1,): {"a": [[2.0, 3.0]], "b": [[2]]},
        (2,): {"a": [[4.0]], "b": [[3]]},
    }
    assert sorted(errors) == [3, 4]


def test_a_row_without_any_input_fails() -> None:
    """Where all of them are optional."""
    spec = TensorSpec("x", "FP32", (1,), optional=True)
    groups, errors = tensor_groups({"x": column_rows(pa.array([1.0, None]), spec)}, 2)
    assert [group.indices.tolist() for group in groups] == [[0]]
    assert sorted(errors) == [1]


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (-1,), (-1, 2), (2, -1)])
def test_outputs_of_every_datatype_and_shape_come_back(datatype: str, shape: tuple[int, ...]) -> None:
    """A column of the output's type gives the arrays that it was made of, and holds as many rows."""
    spec = TensorSpec("y", datatype, shape)
    arrays = []
    for count, size in ((2, 2), (1, 3), (0, 1)):
        own = (count, *(size if dim == -1 else dim for dim in shape))
        numbers = np.arange(np.prod(own)).reshape(own)
        dtype = DATATYPES[datatype].array_dtype
        texts = np.array([b"%d" % n for n in numbers.flat], object).reshape(own)
        arrays.append(texts if datatype == "BYTES" else numbers.astype(dtype))
    kind = output_type(spec)
    column = output_column(arrays, kind)
    column.validate(full=True)
    assert column.type == kind
    assert len(column) == 3
    found, errors = rows_of(column, "FP32" if datatype == "BF16" else datatype, shape)
    assert found == dict(enumerate(row for array in arrays for row in array.tolist()))
    assert not errors


def test_types_of_outputs() -> None:
    """The plainest that says all that is known."""
    kinds = {
        (): pa.float32(),
        (1,): pa.float32(),
        (4,): pa.list_(pa.float32(), 4),
        (2, 3): pa.fixed_shape_tensor(pa.float32(), (2, 3)),
        (-1,): pa.list_(pa.float32()),
        (-1, 2): pa.list_(pa.list_(pa.float32(), 2)),
    }
    assert {shape: output_type(TensorSpec("y", "FP32", shape)) for shape in kinds} == kinds
    text = TensorSpec("y", "BYTES", (1,))
    assert output_type(text) == pa.binary()
    assert output_type(text, is_text=True) == pa.string()
    assert output_type(TensorSpec("y", "BYTES", (2, 2))) == pa.list_(pa.list_(pa.binary(), 2), 2)


def test_numbers_of_an_answer_are_not_copied() -> None:
    """One answer's array is the column's buffer; a wider type is filled with the same values."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    column = output_column([array], pa.list_(pa.float32(), 4))
    assert np.shares_memory(column.flatten().to_numpy(), array)
    assert output_column([np.array([[200]], np.uint8)], pa.int16()).to_pylist() == [200]
    with pytest.raises(pa.ArrowInvalid):
        output_column([np.array([[2**63]], np.uint64)], pa.int64())


@given(
    st.lists(st.none() | st.lists(st.none() | st.integers(-100, 100), max_size=3), max_size=12),
    st.integers(0, 3),
)
def test_each_row_is_what_it_is_alone(values: list[Any], start: int) -> None:
    """Whatever stands beside it, and wherever a slice begins."""
    column = pa.array(values, pa.list_(pa.int32())).slice(min(start, len(values)))
    found, errors = rows_of(column, "INT32", (-1,))
    expected = values[start:]
    assert sorted([*found, *errors]) == list(range(len(expected)))
    for row, value in enumerate(expected):
        assert (row in errors) == (value is None or None in value)
        assert row in errors or found[row] == value

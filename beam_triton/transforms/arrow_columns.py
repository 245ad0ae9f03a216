"""Columns of Arrow to tensors of a model's inputs, and outputs to columns, without an object for each value.

Numbers stay where Arrow has them: an array of them is a view of the column's buffer, as long as the rows have
one shape and no value is null. BYTES need an object each, and booleans, which Arrow packs into bits, a copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from beam_triton.errors import LocalProtocolError
from beam_triton.protocol import DATATYPES, TensorSpec
from beam_triton.protocol.datatypes import Array

Numbers = npt.NDArray[np.int64]
Errors = dict[int, LocalProtocolError]


class RowGroup(NamedTuple):
    """Rows of a column whose tensors have one shape, by their indices, ascending."""

    indices: Numbers
    array: Array


class TensorGroup(NamedTuple):
    """Rows whose tensors have the same shapes, by their indices, ascending; ``arrays`` by input name."""

    indices: Numbers
    arrays: dict[str, Array]


def shape_of(spec: TensorSpec, count: int) -> tuple[int, ...] | None:
    """The input's shape for ``count`` values, -1 filled in; None when no shape fits, or more than one."""
    known = math.prod(dim for dim in spec.shape if dim != -1)
    if (spec.shape.count(-1) != 1 and known != count) or known == 0 or count % known:
        return None
    return tuple(count // known if dim == -1 else dim for dim in spec.shape)


def column_rows(column: Any, spec: TensorSpec) -> tuple[list[RowGroup], Errors]:
    """The rows of a column for an input, and by its index the error of each row that has no tensor.

    ``column`` is an Arrow array or chunked array of numbers, booleans, texts or bytes, of lists of them (of
    any depth, a list's items all of one length), or of fixed-shape tensors. A row of plain values takes the
    shape of the input where it has as many values. A null of an optional input has neither tensor nor error.
    Dtypes, and shapes that do not fit, are left to whoever makes the request.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    rows = np.arange(len(column))
    errors: Errors = {}
    if column.null_count:
        missing = f"null where input {spec.describe()} takes a value"
        is_null = column.is_null().to_numpy(zero_copy_only=False)
        if not spec.optional:
            errors = {row: LocalProtocolError(missing) for row in np.flatnonzero(is_null).tolist()}
        rows, column = np.flatnonzero(~is_null), column.drop_null()
    tensor_type = column.type if isinstance(column.type, pa.FixedShapeTensorType) else None
    nested = _unnest(column.storage if tensor_type else column)
    for bad, reason in (
        (nested.is_ragged, "lists of several lengths"),
        (nested.has_null, "a null among the values"),
    ):
        if bad.any():
            message = f"{reason} where input {spec.describe()} takes one tensor"
            errors |= {row: LocalProtocolError(message) for row in rows[bad].tolist()}
    good = ~(nested.has_null | nested.is_ragged)
    if not good.all():
        # Nulls among integers would make floats of all of them.
        rows, column = rows[good], column.filter(pa.array(good))
        nested = _unnest(column.storage if tensor_type else column)
    try:
        values = _values(nested.items)
    except LocalProtocolError as error:
        message = f"{error.message} where input {spec.describe()} takes {spec.datatype}"
        return [], errors | {row: LocalProtocolError(message) for row in rows.tolist()}
    found = []
    for where, shape in nested.shapes():
        count = math.prod(shape)
        if where is None:
            taken, array = rows, values.reshape(len(rows), *shape)
        else:
            taken = rows[where]
            array = values[nested.bounds[where][:, np.newaxis] + np.arange(count)].reshape(len(taken), *shape)
        if tensor_type is not None:
            array = _permuted(array.reshape(len(taken), *tensor_type.shape), tensor_type.permutation)
        fitting = shape_of(spec, count) if array.ndim <= 2 else None
        found.append(RowGroup(taken, array if fitting is None else array.reshape(len(taken), *fitting)))
    return found, errors


def input_rows(columns: Sequence[Any], spec: TensorSpec) -> tuple[list[RowGroup], Errors]:
    """As `column_rows`, for an input that several columns may feed, each of them one of its values."""
    if len(columns) == 1:
        return column_rows(columns[0], spec)
    single = replace(spec, shape=())
    groups, errors = tensor_groups(
        {str(place): column_rows(column, single) for place, column in enumerate(columns)}, len(columns[0])
    )
    found = []
    for indices, arrays in groups:
        wide = [array.shape for array in arrays.values() if array.ndim > 1]
        shape = shape_of(spec, len(columns))
        if wide or shape is None or len(arrays) < len(columns):
            reason = f"{len(columns)} columns are not the values of input {spec.describe()}, one each"
            errors |= dict.fromkeys(indices.tolist(), LocalProtocolError(reason))
        else:
            stacked = np.stack([*arrays.values()], axis=1)
            found.append(RowGroup(indices, stacked.reshape(len(indices), *shape)))
    return found, errors


class _Nested(NamedTuple):
    """Lists taken apart: row ``i`` has ``items[bounds[i]:bounds[i + 1]]``, in the shape ``sizes[i]``."""

    items: Any
    bounds: Numbers
    sizes: Numbers
    is_ragged: npt.NDArray[np.bool_]
    has_null: npt.NDArray[np.bool_]

    def shapes(self) -> list[tuple[Numbers | None, tuple[int, ...]]]:
        """Each shape with the rows that have it; None: all rows."""
        count, depth = self.sizes.shape
        if not count:
            return []
        if not depth or (self.sizes == self.sizes[0]).all():
            return [(None, tuple(self.sizes[0].tolist()))]
        kinds, kind_of_row = np.unique(self.sizes, axis=0, return_inverse=True)
        kind_of_row = kind_of_row.reshape(-1)  # NumPy 2.0.0 gave it another shape.
        return [
            (np.flatnonzero(kind_of_row == kind), tuple(shape.tolist())) for kind, shape in enumerate(kinds)
        ]


def _unnest(column: Any) -> _Nested:
    count = len(column)
    bounds = np.arange(count + 1)
    sizes: list[Numbers] = []
    is_ragged, has_null = np.zeros(count, bool), np.zeros(count, bool)
    items = column
    while True:
        if items.null_count:
            of_null = np.flatnonzero(items.is_null().to_numpy(zero_copy_only=False))
            has_null[np.searchsorted(bounds, of_null, "right") - 1] = True
        kind = items.type
        if isinstance(kind, pa.FixedSizeListType):
            # Its null items are dropped below, as those of the other lists.
            lengths = np.full(len(items), kind.list_size)
            if items.null_count:
                lengths[items.is_null().to_numpy(zero_copy_only=False)] = 0
        elif isinstance(kind, pa.ListType | pa.LargeListType):
            lengths = items.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        else:
            return _Nested(items, bounds, np.array(sizes).reshape(len(sizes), count).T, is_ragged, has_null)
        counts = np.diff(bounds)
        first = np.zeros(count, np.int64)
        first[counts > 0] = lengths[bounds[:-1][counts > 0]]
        if sizes:
            rows = np.repeat(np.arange(count), counts)
            is_ragged[rows[lengths != first[rows]]] = True
        sizes.append(first)
        bounds = np.concatenate(([0], np.cumsum(lengths)))[bounds]
        items = items.flatten()


def _values(items: Any) -> Array:
    """The values as an array, numbers without a copy. Raises LocalProtocolError for what no tensor holds."""
    if isinstance(items.type, pa.DictionaryType):
        items = items.dictionary_decode()
    kind = items.type
    if pa.types.is_large_string(kind):
        items = items.cast(pa.large_binary())
    elif pa.types.is_string(kind) or pa.types.is_fixed_size_binary(kind):
        items = items.cast(pa.binary())
    kinds = (
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
        pa.types.is_binary,
        pa.types.is_large_binary,
    )
    if not any(is_kind(items.type) for is_kind in kinds) and len(items):
        raise LocalProtocolError(f"the column has Arrow's type {kind}")
    values: Array = items.to_numpy(zero_copy_only=False)
    return values


def _permuted(array: Array, permutation: Sequence[int] | None) -> Array:
    """Rows of tensors with their dimensions in the order in which the type names them."""
    if not permutation:
        return array
    return np.ascontiguousarray(array.transpose(0, *(place + 1 for place in permutation)))


def tensor_groups(
    columns: Mapping[str, tuple[Sequence[RowGroup], Errors]], count: int
) -> tuple[list[TensorGroup], Errors]:
    """The rows of several inputs together: groups of equal shapes, and the error of each row that has one.

    ``columns`` are the results of `column_rows` for ``count`` rows, by input name. A row with neither tensor
    nor error for an input goes without it.
    """
    errors: Errors = {}
    for _, unfit in columns.values():
        errors = {**unfit, **errors}
    if not errors and all(
        len(groups) == 1 and len(groups[0].indices) == count for groups, _ in columns.values()
    ):
        arrays = {name: groups[0].array for name, (groups, _) in columns.items()}
        return [TensorGroup(np.arange(count), arrays)] if count else [], errors
    # For each row and input, the group that the row is in, and its place there.
    group_of = np.full((count, len(columns)), -1)
    place_of = np.zeros((count, len(columns)), np.int64)
    for place, (groups, _) in enumerate(columns.values()):
        for number, (indices, _) in enumerate(groups):
            group_of[indices, place] = number
            place_of[indices, place] = np.arange(len(indices))
    good = np.ones(count, bool)
    good[list(errors)] = False
    found = []
    for kind in np.unique(group_of[good], axis=0):
        rows = np.flatnonzero(good & (group_of == kind).all(axis=1))
        arrays = {}
        for place, (name, (groups, _)) in enumerate(columns.items()):
            if kind[place] >= 0:
                array = groups[kind[place]].array
                arrays[name] = array if len(array) == len(rows) else array[place_of[rows, place]]
        if arrays:
            found.append(TensorGroup(rows, arrays))
        else:
            error = LocalProtocolError("null where the model takes a value for at least one input")
            errors |= dict.fromkeys(rows.tolist(), error)
    return found, errors


def output_type(spec: TensorSpec, *, is_text: bool = False) -> pa.DataType:
    """Arrow's type of an output's column.

    One value of a shape [] or [1] is itself; one dimension of a known size is a fixed-size list, several of
    numbers are a fixed-shape tensor; everything else is lists in lists. BYTES are binary, or with ``is_text``
    string; BF16 is float.
    """
    kind = DATATYPES[spec.datatype]
    item = (
        pa.from_numpy_dtype(kind.array_dtype)
        if not kind.is_bytes
        else pa.string()
        if is_text
        else pa.binary()
    )
    shape = spec.shape
    if shape in ((), (1,)):
        return item
    if len(shape) > 1 and min(shape) > 0 and not kind.is_bytes:
        return pa.fixed_shape_tensor(item, shape)
    for dim in reversed(shape):
        item = pa.list_(item, dim if dim > 0 else -1)
    return item


def output_column(arrays: Sequence[Array], kind: pa.DataType) -> Any:
    """The rows of the arrays, one after the other, as an Arrow array of type ``kind``.

    Numbers become the type's, where it can hold them. Raises ArrowInvalid where it cannot, and for bytes that
    are not UTF-8 in a column of text.
    """
    if isinstance(kind, pa.FixedShapeTensorType):
        rows = [array.reshape(len(array), math.prod(kind.shape)) for array in arrays]
        return pa.ExtensionArray.from_storage(kind, output_column(rows, kind.storage_type))
    lists = []
    item = kind
    while isinstance(item, pa.ListType | pa.FixedSizeListType):
        lists.append(item)
        item = item.value_type
    flat = [array.reshape(-1) for array in arrays]
    joined = flat[0] if len(flat) == 1 else np.concatenate(flat)
    if joined.dtype.kind == "O":
        column = pa.array(joined.tolist(), pa.binary()).cast(item)
    else:
        column = pa.array(joined).cast(item)
    for axis in range(len(lists), 0, -1):
        if isinstance(lists[axis - 1], pa.FixedSizeListType):
            column = pa.FixedSizeListArray.from_arrays(column, type=lists[axis - 1])
            continue
        sizes = np.repeat(
            [array.shape[axis] for array in arrays], [math.prod(array.shape[:axis]) for array in arrays]
        )
        ends = np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)
        column = pa.ListArray.from_arrays(pa.array(ends), column, type=lists[axis - 1])
    return column

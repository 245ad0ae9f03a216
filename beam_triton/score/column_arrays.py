"""Columns of a block to the arrays of a model's inputs, for all rows at once.

A column of numbers, of text that holds numbers, or of lists is converted by pyarrow and NumPy. Rows that this
leaves out are looked at one by one: such a row may fit after all (``"9007199254740993.0"`` for INT64), or
needs a message. Text becomes numbers here and nowhere else; typed values (JSON Lines, Parquet) follow the
rules of `beam_triton.protocol.to_array`, which takes no text for a number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_triton.errors import ConfigurationError, LocalProtocolError
from beam_triton.protocol import DATATYPES, ModelSpec, TensorSpec, to_array
from beam_triton.protocol.text import shorten
from beam_triton.score.file_reading import RowBlock, RowError
from beam_triton.score.input_columns import InputColumns, list_columns, tensors_to_feed

Array = npt.NDArray[Any]

# What pyarrow parses as Python does: no hexadecimal digits, no more than 64 bits surely hold.
_FLOAT_TEXT = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_INTEGER_TEXT = r"^-?\d{1,18}$"
_TRUTH = {"true": True, "1": True, "false": False, "0": False}
# As many as 64 bits hold.
_MOST_DIGITS = 20


class ArrayGroup(NamedTuple):
    """Rows of a block whose tensors have the same shapes, by their indices; arrays by input name."""

    indices: npt.NDArray[np.int64]
    arrays: dict[str, Array]


class ColumnArrays:
    """Makes the arrays of a model's inputs out of blocks of rows.

    Raises ConfigurationError when the mapping does not fit the model.
    """

    def __init__(self, model: ModelSpec, mapping: Sequence[InputColumns]) -> None:
        self._model = model
        self._feeds = tensors_to_feed(model, mapping)
        if not self._feeds:
            raise ConfigurationError(
                f"no column feeds model {model.name!r}: map its inputs; {model.describe()}"
            )
        mapped = {entry.name for entry in mapping}
        self._optional = [spec for spec in model.inputs if spec.optional and spec.name not in mapped]

    def columns_used(self, names: Sequence[str]) -> set[str]:
        """Which of a file's columns are read. Raises ConfigurationError for a range that is not there."""
        used = {name for _, entry in self._feeds for name in entry.expand(names)}
        return used | {spec.name for spec in self._optional}

    def check(self, block: RowBlock) -> None:
        """Raise ConfigurationError when no row of a file that begins with this block can be scored."""
        self._check_present(self._plan(block), block.keys)

    def arrays(self, block: RowBlock) -> tuple[list[ArrayGroup], dict[int, RowError]]:
        """Tensors in groups of equal shapes, and by its index the error of each row that has none."""
        errors: dict[int, RowError] = {}
        try:
            plan = self._plan(block)
        except ConfigurationError as error:
            return [], dict.fromkeys(range(len(block)), RowError(error.message))
        inputs = {spec.name: _tensors(spec, names, block, errors) for spec, names in plan}
        for spec in self._optional:
            if block.names is None or spec.name in block.names:
                inputs[spec.name] = _tensors(spec, (spec.name,), block, errors, is_optional=True)
        good = np.array([index for index in range(len(block)) if index not in errors], np.int64)
        groups: dict[Any, list[int]] = {}
        if not any(isinstance(rows, list) for rows in inputs.values()):
            alike = {name: rows if len(good) == len(block) else rows[good] for name, rows in inputs.items()}
            return [ArrayGroup(good, alike)] if len(good) else [], errors
        for index in good.tolist():
            shapes = tuple(getattr(rows[index], "shape", None) for rows in inputs.values())
            groups.setdefault(shapes, []).append(index)
        found = []
        for shapes, indices in groups.items():
            present = [name for name, shape in zip(inputs, shapes, strict=True) if shape is not None]
            arrays = {name: np.stack([inputs[name][index] for index in indices]) for name in present}
            found.append(ArrayGroup(np.array(indices, np.int64), arrays))
        return found, errors

    def _plan(self, block: RowBlock) -> list[tuple[TensorSpec, tuple[str, ...]]]:
        names = block.names
        plan = [(spec, entry.expand(names)) for spec, entry in self._feeds]
        if names is not None:
            self._check_present(plan, names)
            twice = [name for _, columns in plan for name in columns if names.count(name) > 1]
            if twice:
                raise ConfigurationError(f"column {twice[0]!r} appears more than once in the header")
        for spec, columns in plan:
            # A column of lists may fit any input, several those of higher rank; rows will say.
            is_open = len(columns) == 1 or (len(spec.shape) > 1 and not block.is_text)
            if shape_of(spec, len(columns)) is None and not is_open:
                raise ConfigurationError(
                    f"input {spec.describe()} does not take {len(columns)} values, which are what its "
                    f"columns give; {self._model.describe()}"
                )
        return plan

    def _check_present(
        self, plan: Sequence[tuple[TensorSpec, tuple[str, ...]]], names: Sequence[str]
    ) -> None:
        missing = [column for _, columns in plan for column in columns if column not in names]
        if missing:
            raise ConfigurationError(
                f"there is no column {missing[0]!r} for the inputs of model {self._model.name!r} "
                f"({', '.join(spec.describe() for spec, _ in plan)}); the file has {list_columns(names)}"
            )


def _tensors(
    spec: TensorSpec,
    names: tuple[str, ...],
    block: RowBlock,
    errors: dict[int, RowError],
    is_optional: bool = False,
) -> Any:
    """One input's rows: an array where all have one shape, otherwise a list of arrays, None where absent.

    What stands there for the rows that are added to ``errors`` is of no use.
    """
    if spec.datatype == "BF16":
        # Its bits would be taken for whole numbers; float32 is rounded where the request is made.
        spec = replace(spec, datatype="FP32")
    columns = [block.column(name) for name in names]
    fast = _at_once(spec, [_arrow(column) for column in columns], block.is_text)
    array, fits = fast if fast is not None else (None, np.zeros(len(block), bool))
    found: dict[int, Any] = {}
    for index in np.flatnonzero(~fits).tolist():
        try:
            found[index] = _one(spec, names, block, columns, index, is_optional)
        except LocalProtocolError as error:
            errors[index] = RowError(error.message)
    if array is None or any(row is None or row.shape != array.shape[1:] for row in found.values()):
        return [
            array[index] if array is not None and fits[index] else found.get(index)
            for index in range(len(block))
        ]
    if found and not array.flags.writeable:
        array = array.copy()
    for index, row in found.items():
        array[index] = row
    return array


def _at_once(spec: TensorSpec, columns: list[Any], is_text: bool) -> tuple[Any, Any] | None:
    """An array of all rows, and which of them are right in it; None where nothing can be said at once."""
    if any(column is None for column in columns):
        return None
    shape, kind = shape_of(spec, len(columns)), DATATYPES[spec.datatype]
    if len(columns) == 1 and (shape is None or pa.types.is_nested(columns[0].type)):
        lists = _parsed_lists(columns[0]) if is_text else columns[0]
        return None if lists is None or kind.is_bytes else _from_lists(spec, lists)
    if shape is None:
        return None
    made: Array = np.empty((len(columns[0]), len(columns)), kind.array_dtype)
    fits = np.ones(len(made), bool)
    for place, column in enumerate(columns):
        values = _byte_strings(column) if kind.is_bytes else _numbers(column, made.dtype, is_text)
        if values is None:
            return None
        made[:, place] = values[0]
        fits &= values[1]
    return made.reshape(len(made), *shape), fits


def _from_lists(spec: TensorSpec, lists: Any) -> tuple[Any, Any] | None:
    sizes: list[int] = []
    values = lists
    while str(values.type).startswith(("list<", "large_list<", "fixed_size_list<")):
        lengths = np.unique(pc.list_value_length(values).to_numpy(zero_copy_only=False))
        if values.null_count or len(lengths) != 1:
            return None
        sizes.append(int(lengths[0]))
        values = values.flatten()
    shape = shape_of(spec, sizes[0]) if len(sizes) == 1 else tuple(sizes)
    if shape is None or len(shape) != len(spec.shape):
        return None
    if any(want not in (-1, dim) for dim, want in zip(shape, spec.shape, strict=True)):
        return None
    found = _numbers(values, DATATYPES[spec.datatype].array_dtype, is_text=False)
    if found is None:
        return None
    return found[0].reshape(len(lists), *shape), found[1].reshape(len(lists), -1).all(axis=1)


def _one(
    spec: TensorSpec,
    names: tuple[str, ...],
    block: RowBlock,
    columns: Sequence[Any],
    index: int,
    is_optional: bool,
) -> Any:
    """One row's tensor, None for an optional input that is absent. Raises LocalProtocolError."""
    if block.table is None:
        row = block.objects[index]
        if is_optional and row.get(names[0]) is None:
            return None
        missing = [name for name in names if name not in row]
        if missing:
            has = list_columns(list(row))
            raise RowError(f"there is no {missing[0]!r} for input {spec.describe()}; the row has {has}")
        values = [row[name] for name in names]
    else:
        values = [column[index].as_py() for column in columns]
    if block.is_text:
        values = [_from_text(text, spec, name) for text, name in zip(values, names, strict=True)]
    try:
        return _from_values(values if len(names) > 1 else values[0], spec)
    except LocalProtocolError as error:
        what = f"column {names[0]!r}" if len(names) == 1 else f"columns {names[0]!r} to {names[-1]!r}"
        raise RowError(f"{what}: {error.message}") from None


def shape_of(spec: TensorSpec, count: int) -> tuple[int, ...] | None:
    """The input's shape for ``count`` values, -1 filled in; None when no shape fits, or more than one."""
    known = math.prod(dim for dim in spec.shape if dim != -1)
    free = spec.shape.count(-1)
    if free == 0:
        return spec.shape if known == count else None
    if free > 1 and count != known:
        return None
    if known == 0 or count % known:
        return None
    return tuple(count // known if dim == -1 else dim for dim in spec.shape)


def _arrow(column: Any) -> Any:
    """A column as an Arrow array; None for values of JSON Lines that have no type in common."""
    if not isinstance(column, list):
        return column
    try:
        found = pa.array(column)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return None
    # Where floats are among them pyarrow takes true for 1.0.
    if pa.types.is_null(found.type) or ("double" in str(found.type) and _holds_bool(column)):
        return None
    return found


def _holds_bool(values: list[Any]) -> bool:
    kinds = set(map(type, values))
    return bool in kinds or (list in kinds and any(_holds_bool(each) for each in values if each))


def _parsed_lists(column: Any) -> Any:
    """Text that holds JSON arrays, all rows parsed together; None where a row holds something else."""
    texts = column.to_pylist()
    if not all(text.lstrip().startswith("[") for text in texts):
        return None
    try:
        found = json.loads(f"[{','.join(texts)}]")
    except (ValueError, RecursionError):
        return None
    return _arrow(found) if len(found) == len(texts) else None


def _byte_strings(column: Any) -> tuple[Array, Array] | None:
    if not (pa.types.is_string(column.type) or pa.types.is_binary(column.type)):
        return None
    return column.cast(pa.binary()).to_numpy(zero_copy_only=False), ~_nulls(column)


def _nulls(column: Any) -> Array:
    found: Array = column.is_null().to_numpy(zero_copy_only=False)
    return found


def _numbers(column: Any, dtype: np.dtype[Any], is_text: bool) -> tuple[Array, Array] | None:
    """Numbers of ``dtype``, and which of them are right; None for a column that holds no numbers."""
    if is_text:
        column = _parsed_numbers(column, dtype)
    elif pa.types.is_boolean(column.type) != (dtype.kind == "b") or not _is_number(column.type):
        return None
    fits = np.ones(len(column), bool)
    if column.null_count:
        fits = ~_nulls(column)
        column = column.fill_null(False if dtype.kind == "b" else 0)
    values: Array = column.to_numpy(zero_copy_only=False)
    if values.dtype == dtype:
        return values, fits
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(dtype)
        if dtype.kind == "f":
            if values.dtype.itemsize > dtype.itemsize or values.dtype.kind != "f":
                fits &= np.isfinite(cast) | ~np.isfinite(values)
        else:
            # A float at the very end of 64 bits is rounded out of range: rows near it are looked at alone.
            low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
            inside = (
                (values >= low) & (values <= high) if values.dtype.kind in "iu" else np.abs(values) < 2.0**53
            )
            fits &= inside & (cast == values)
    return cast, fits


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_primitive(kind) and not pa.types.is_temporal(kind))


def _parsed_numbers(column: Any, dtype: np.dtype[Any]) -> Any:
    """Text as Arrow numbers (BOOL: booleans); null where it has to be looked at alone."""
    if dtype.kind == "b":
        lower = pc.utf8_lower(pc.utf8_trim_whitespace(column))
        return pc.if_else(
            pc.is_in(lower, pa.array(list(_TRUTH))), pc.is_in(lower, pa.array(["true", "1"])), None
        )
    if dtype.kind == "f":
        try:
            return pc.cast(column, pa.float64())
        except pa.ArrowInvalid:
            pattern, kind = _FLOAT_TEXT, pa.float64()
    else:
        pattern, kind = _INTEGER_TEXT, pa.int64()
    text = pc.utf8_trim_whitespace(column)
    if kind == pa.int64():
        # pandas writes whole numbers as 3.0 as soon as one of the column is missing.
        text = pc.replace_substring_regex(text, r"^(-?\d+)\.0*$", r"\1")
    return pc.cast(pc.if_else(pc.match_substring_regex(text, pattern), text, None), kind)


def _from_values(value: Any, spec: TensorSpec) -> Array:
    if value is None or (isinstance(value, list) and None in value):
        raise RowError(f"null where input {spec.describe()} takes a value")
    # A flat list fits an input of any rank with as many values.
    is_flat = isinstance(value, list) and not isinstance(next(iter(value), None), list)
    shape = shape_of(spec, len(value)) if is_flat else None
    if shape is None:
        return to_array(value, spec)
    return to_array(value, replace(spec, shape=(len(value),))).reshape(shape)


def _from_text(text: str, spec: TensorSpec, column: str) -> Any:
    """The value that a column's text stands for: a number, or a list of them. Raises RowError."""
    words = text.split()
    if DATATYPES[spec.datatype].is_bytes and shape_of(spec, 1) is not None:
        return text
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RowError(f"column {column!r} holds no JSON array: {error}") from None
    if not words:
        raise RowError(f"column {column!r} is empty where input {spec.describe()} takes a value")
    if DATATYPES[spec.datatype].is_bytes:
        return words
    values = [_number(word, spec) for word in words]
    for word, value in zip(words, values, strict=True):
        said = f"column {column!r} holds {shorten(word)}"
        if value is None:
            kind = DATATYPES[spec.datatype].array_dtype.kind
            takes = {"b": "true, false, 1 or 0", "f": "a number"}.get(kind, "a whole number")
            raise RowError(f"{said} where input {spec.describe()} takes {takes}")
        try:
            to_array(value, replace(spec, shape=()))
        except LocalProtocolError:
            raise RowError(f"{said}, which is beyond what {spec.datatype} can hold") from None
    return values if len(values) > 1 else values[0]


def _number(word: str, spec: TensorSpec) -> float | None:
    """The number that a word stands for, with every digit of a whole one; None for no such number."""
    kind = DATATYPES[spec.datatype].array_dtype.kind
    if kind == "b":
        return _TRUTH.get(word.lower())
    try:
        # Python takes 1_000 for a number.
        value = Decimal("none" if "_" in word else word)
    except InvalidOperation:
        return None
    # An int of 1e999999999 would fill the memory.
    if value.is_finite() and value.adjusted() <= _MOST_DIGITS and value == value.to_integral_value():
        return int(value)
    return float(value) if kind == "f" or value.adjusted() > _MOST_DIGITS else None

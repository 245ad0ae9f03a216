"""Columns of a block to the arrays of a model's inputs, for all rows at once.

pyarrow and `to_array` convert a column as a whole; one that holds a misfit is halved until that stands alone,
with a message. Text becomes numbers here and nowhere else; typed values (JSON Lines, Parquet) follow the
rules of `to_array`, which takes no text for a number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_triton.errors import ConfigurationError, LocalProtocolError
from beam_triton.protocol import DATATYPES, ModelSpec, TensorSpec, to_array
from beam_triton.protocol.text import shorten
from beam_triton.score.input_columns import InputColumns, list_columns, tensors_to_feed
from beam_triton.score.row_reading import RowBlock, RowError
from beam_triton.transforms.arrow_columns import (
    Errors,
    RowGroup,
    TensorGroup,
    column_rows,
    shape_of,
    tensor_groups,
)

Array = npt.NDArray[Any]
# What pyarrow's cast refuses about a number: blanks around it, a plus sign.
_PADDED = r"^\s*(?:\+?([\w.]\S*?)|(-\S+?))"


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
        fed = {spec.name for spec, _ in self._feeds}
        self._optional = [spec for spec in model.inputs if spec.name not in fed]

    def columns_used(self, names: Sequence[str]) -> set[str]:
        """Which of a file's columns are read. Raises ConfigurationError for a range that is not there."""
        used = {name for _, entry in self._feeds for name in entry.expand(names)}
        return used | {spec.name for spec in self._optional}

    def check(self, block: RowBlock) -> None:
        """Raise ConfigurationError when no row of a file that begins with this block can be scored."""
        self._check_present(self._plan(block), block.keys)

    def arrays(self, block: RowBlock) -> tuple[list[TensorGroup], Errors]:
        """Tensors in groups of equal shapes, and by its index the error of each row that has none."""
        try:
            plan = self._plan(block)
        except ConfigurationError as error:
            return [], dict.fromkeys(range(len(block)), RowError(error.message))
        inputs = {spec.name: _input_rows(spec, names, block) for spec, names in plan}
        for spec in self._optional:
            if spec.name in block.keys:
                groups, errors = _input_rows(spec, (spec.name,), block)
                given = {i: error for i, error in errors.items() if block.row(i).get(spec.name) is not None}
                inputs[spec.name] = groups, given
        return tensor_groups(inputs, len(block))

    def _plan(self, block: RowBlock) -> list[tuple[TensorSpec, tuple[str, ...]]]:
        """Each input and its columns."""
        plan = [(spec, entry.expand(block.names)) for spec, entry in self._feeds]
        self._check_present(plan, block.names or ())
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
        for name in [name for _, columns in plan for name in columns] if names else ():
            if name not in names:
                raise ConfigurationError(
                    f"there is no column {name!r} for the inputs of model {self._model.name!r} "
                    f"({', '.join(spec.describe() for spec, _ in plan)}); the file has {list_columns(names)}"
                )
            if names.count(name) > 1:
                raise ConfigurationError(f"column {name!r} appears more than once in the header")


def _input_rows(spec: TensorSpec, names: tuple[str, ...], block: RowBlock) -> tuple[list[RowGroup], Errors]:
    """One input's rows in groups of equal shapes, and the error of each row that has no tensor."""
    errors: Errors = {}
    if spec.datatype == "BF16":
        # Its bits would be taken for whole numbers; float32 is rounded where the request is made.
        spec = replace(spec, datatype="FP32")
    columns, is_text, all_rows = [block.column(name) for name in names], block.is_text, np.arange(len(block))
    kind, shape = DATATYPES[spec.datatype], shape_of(spec, len(columns))
    # A single column of text may hold numbers in some rows and JSON arrays in others.
    if is_text:
        is_flat = len(columns) > 1 or kind.is_bytes
    else:
        is_flat = block.table is not None and not any(pa.types.is_nested(column.type) for column in columns)
    if shape is not None and is_flat:
        made = np.empty((len(block), len(columns)), kind.array_dtype)
        for place, (name, column) in enumerate(zip(names, columns, strict=True)):
            convert = partial(_convert, spec, f"column {name!r}", is_text, True)
            for start, array in _converted(convert, column, errors):
                made[start : start + len(array), place] = array
        good = np.setdiff1d(all_rows, [*errors]) if errors else all_rows
        rows = made.reshape(len(block), *shape)
        return [RowGroup(good, rows[good] if errors else rows)] if len(good) else [], errors
    label, values = f"column {names[0]!r}", columns[0]
    if len(columns) > 1:
        label = f"columns {names[0]!r} to {names[-1]!r}"
        values = list(map(list, zip(*map(block.values, names), strict=True)))
    groups = [RowGroup(all_rows, values)]
    if not is_text and not isinstance(values, list):
        groups, unfit = column_rows(values, spec)
        errors = {index: RowError(f"{label}: {error.message}") for index, error in unfit.items()}
    alike: dict[tuple[int, ...], list[RowGroup]] = {}
    for indices, rows in groups:
        misfits: Errors = {}
        for start, array in _converted(partial(_convert, spec, label, is_text, False), rows, misfits):
            part = RowGroup(indices[start : start + len(array)], array)
            alike.setdefault(array.shape[1:], []).append(part)
        errors |= {int(indices[place]): error for place, error in misfits.items()}
    found = [
        parts[0] if len(parts) == 1 else RowGroup(*map(np.concatenate, zip(*parts, strict=True)))
        for parts in alike.values()
    ]
    return found, errors


def _converted(
    convert: Callable[[Any], Array], values: Any, errors: Errors, start: int = 0
) -> Iterator[tuple[int, Array]]:
    """Arrays of as many values at once as fit, each with its place; an error for each value that does not."""
    try:
        found = convert(values)
    except RowError as error:
        if half := len(values) // 2:
            yield from _converted(convert, values[:half], errors, start)
            yield from _converted(convert, values[half:], errors, start + half)
        else:
            errors.setdefault(start, error)
    else:
        yield start, found


def _convert(spec: TensorSpec, label: str, is_text: bool, is_part: bool, values: Any) -> Array:
    """Values of several rows as one array, ``is_part``: each a number or text of a row. Raises RowError."""
    own = replace(spec, shape=()) if is_part else spec
    holds_arrays = not is_text
    try:
        if not is_text:
            return _fit(own, _arrow_values(values, own) if isinstance(values, pa.Array) else values)
        arrays = 0 if is_part else pc.sum(pc.match_substring_regex(values, r"^\s*\[")).as_py()
        holds_arrays = arrays > 0
        if 0 < arrays < len(values):
            raise RowError("arrays beside single values")
        return _fit(own, [*map(json.loads, values.to_pylist())] if holds_arrays else _from_text(spec, values))
    except (LocalProtocolError, ValueError, RecursionError) as error:
        if holds_arrays:
            raise RowError(f"{label}: {getattr(error, 'message', error)}") from None
    text, kind = values[0].as_py(), DATATYPES[spec.datatype].array_dtype.kind
    takes = {"b": "true, false, 1 or 0", "f": "a number", "O": "a text"}.get(kind, "a whole number")
    takes = takes if is_part or shape_of(spec, 1) is not None else "a JSON array"
    holds = f"holds {shorten(text)}" if text.strip() else "is empty"
    limit = f"that {spec.datatype} can hold"
    raise RowError(f"{label} {holds} where input {spec.describe()} takes {takes} {limit}")


def _from_text(spec: TensorSpec, texts: Any) -> Any:
    dtype = DATATYPES[spec.datatype].array_dtype
    if DATATYPES[spec.datatype].is_bytes:
        return texts.cast(pa.binary()).to_numpy(zero_copy_only=False)
    kind = pa.float64() if dtype.kind == "f" else pa.from_numpy_dtype(dtype)
    if dtype.kind in "iu" and pc.any(pc.match_substring(texts, "x", ignore_case=True)).as_py():
        raise ValueError("pyarrow takes 0x10 for 16")
    try:
        numbers = pc.cast(texts, kind)
    except pa.ArrowInvalid:
        # pandas writes whole numbers as 3.0 as soon as one of the column is missing.
        pattern = _PADDED + (r"\s*$" if dtype.kind == "f" else r"(?:\.0*)?\s*$")
        numbers = pc.cast(pc.replace_substring_regex(texts, pattern, r"\1\2"), kind)
    return numbers.to_numpy(zero_copy_only=False)


def _arrow_values(values: Any, spec: TensorSpec) -> Array:
    """Values that are no lists."""
    groups, errors = column_rows(values, spec)
    for error in errors.values():
        raise error
    return groups[0].array


def _fit(spec: TensorSpec, values: Any) -> Array:
    """Rows, as an array or a list, in the input's shape: a flat row fits any rank with as many values."""
    first, shape = values[0], None
    is_list = isinstance(first, (list, np.ndarray))
    if not is_list or not len(first) or not isinstance(first[0], (list, np.ndarray)):
        shape = shape_of(spec, len(first) if is_list else 1)
    own = spec if shape is None else replace(spec, shape=(len(first),) if is_list else ())
    if len(values) == 1 and (first is None or (isinstance(first, list) and None in first)):
        raise RowError(f"missing or null where input {spec.describe()} takes a value")
    kind = DATATYPES[spec.datatype].array_dtype
    if isinstance(values, np.ndarray) and values.dtype.kind == "b" != kind.kind:
        values = values.tolist()
    is_cast = isinstance(values, np.ndarray) and values.dtype.kind in "iuf" and values.dtype != kind
    if is_cast and kind.kind == "f":
        with np.errstate(over="ignore"):
            cast = values.astype(kind)
        if (np.isinf(cast) & np.isfinite(values)).any():
            raise RowError(f"{shorten(values[0])} is beyond what {spec.datatype} can hold")
        values = cast
    made = to_array(values[0], own)[np.newaxis] if len(values) == 1 else to_array(values, own, batched=True)
    return made if shape is None else made.reshape(len(values), *shape)

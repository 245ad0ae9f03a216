"""Values of columns to the array that an input takes.

Text, as a CSV holds it, is read as the input's datatype wants it: this is the one place where text becomes
numbers. Values that have types (JSON Lines, Parquet) follow the rules of `beam_triton.protocol.to_array`,
which takes no text for a number. A flat list fits an input of any rank with as many values.

Numbers are packed by `struct`, which is cheaper than making an array of Python numbers and refuses what the
datatype cannot hold. What it refuses is looked at again, slowly: it may fit after all, or needs a message.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from beam_triton.errors import LocalProtocolError
from beam_triton.protocol import DATATYPES, TensorSpec, to_array
from beam_triton.protocol.datatypes import Array
from beam_triton.protocol.packing import packer_of
from beam_triton.protocol.text import shorten
from beam_triton.score.rows import RowError

Convert = Callable[[Any], Array]

_FLOATS = frozenset({"FP16", "FP32", "FP64"})
# As many as 64 bits hold.
_MOST_DIGITS = 20
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def column_converter(spec: TensorSpec, column: str, *, is_text: bool) -> Convert:
    """From one column's value; its text may hold an array. Raises RowError, naming the column."""
    spec = _rounded_later(spec)
    if not is_text:
        return lambda value: _from_typed(value, spec, f"column {column!r}")
    if DATATYPES[spec.datatype].is_bytes:
        return lambda value: _text_to_bytes(value, spec, column)
    from_number = columns_converter(spec, (column,), is_text=True) if shape_of(spec, 1) is not None else None

    def convert(value: str) -> Array:
        if from_number is not None:
            try:
                return from_number((value,))
            except RowError:
                if value.strip()[:1] != "[" and len(value.split()) == 1:
                    raise
        return _from_array_text(value, spec, column)

    return convert


def columns_converter(spec: TensorSpec, columns: Sequence[str], *, is_text: bool) -> Convert:
    """From the values of several columns, one value each. Raises RowError, naming the column at fault.

    Raises LocalProtocolError at once when the input does not take that many values.
    """
    spec = _rounded_later(spec)
    count = len(columns)
    shape = shape_of(spec, count)
    # Columns of lists may fit an input of higher rank; rows will tell.
    if shape is None and (is_text or len(spec.shape) < 2):
        raise LocalProtocolError(
            f"input {spec.describe()} does not take {count} value{'s' if count > 1 else ''}, "
            f"which {'are' if count > 1 else 'is'} what its columns give"
        )
    if not is_text:
        return lambda values: _from_typed(list(values), spec, f"columns {columns[0]!r} to {columns[-1]!r}")
    assert shape is not None
    code = DATATYPES[spec.datatype].struct_code
    if code is None or spec.datatype == "BOOL":
        return lambda values: _one_by_one(values, spec, columns, shape)
    pack = struct.Struct(f"<{count}{code}").pack
    dtype = DATATYPES[spec.datatype].array_dtype
    number: Callable[[str], float] = float if spec.datatype in _FLOATS else int
    is_flat = shape == (count,)
    frombuffer = np.frombuffer

    def convert(values: Sequence[str]) -> Array:
        # Python takes 1_000 for a number; one search in all values is cheaper than one in each.
        if "_" in "".join(values):
            return _one_by_one(values, spec, columns, shape)
        try:
            array = frombuffer(pack(*map(number, values)), dtype)
        except (ValueError, TypeError, OverflowError, struct.error):
            return _one_by_one(values, spec, columns, shape)
        return array if is_flat else array.reshape(shape)

    return convert


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


def _rounded_later(spec: TensorSpec) -> TensorSpec:
    # The bits of BF16 would be taken for whole numbers; float32 is rounded where the request is made.
    return replace(spec, datatype="FP32") if spec.datatype == "BF16" else spec


def _from_typed(value: Any, spec: TensorSpec, what: str) -> Array:
    if value is None or (isinstance(value, list) and None in value):
        raise RowError(f"{what}: null where input {spec.describe()} takes a value")
    given = spec
    is_flat = isinstance(value, list) and not any(map(_is_nested, value[:1]))
    shape = shape_of(spec, len(value)) if is_flat else None
    if shape is not None:
        packed = _packed(value, spec)
        if packed is not None:
            return packed.reshape(shape)
        given = replace(spec, shape=(len(value),))
    try:
        array = to_array(value, given)
    except LocalProtocolError as error:
        raise RowError(f"{what}: {error.message}") from None
    return array if shape is None else array.reshape(shape)


def _packed(values: list[Any], spec: TensorSpec) -> Array | None:
    packer = packer_of(spec.datatype)
    packed = packer.pack_lists(values) if packer is not None else None
    return None if packed is None else np.frombuffer(packed[0], DATATYPES[spec.datatype].array_dtype)


def _is_nested(value: Any) -> bool:
    return isinstance(value, list)


def _text_to_bytes(text: str, spec: TensorSpec, column: str) -> Array:
    if shape_of(spec, 1) is not None:
        return _from_typed([text], spec, f"column {column!r}")
    return _from_array_text(text, spec, column)


def _from_array_text(text: str, spec: TensorSpec, column: str) -> Array:
    stripped = text.strip()
    if stripped.startswith("["):
        try:
            return _from_typed(json.loads(stripped), spec, f"column {column!r}")
        except (ValueError, RecursionError) as error:
            raise RowError(f"column {column!r} holds no JSON array: {error}") from None
    parts = stripped.split()
    if not parts:
        raise RowError(f"column {column!r} is empty where input {spec.describe()} takes a value")
    if shape_of(spec, len(parts)) is None:
        raise RowError(
            f"column {column!r} holds {len(parts)} value{'s' if len(parts) > 1 else ''} "
            f"where input {spec.describe()} takes others: {shorten(text)}"
        )
    return columns_converter(spec, [column] * len(parts), is_text=True)(parts)


def _one_by_one(
    values: Sequence[str], spec: TensorSpec, columns: Sequence[str], shape: tuple[int, ...]
) -> Array:
    if DATATYPES[spec.datatype].is_bytes:
        return _from_typed(list(values), spec, f"columns {columns[0]!r} to {columns[-1]!r}")
    parsed = [_parse(text, column, spec) for text, column in zip(values, columns, strict=True)]
    return np.array(parsed, dtype=DATATYPES[spec.datatype].array_dtype).reshape(shape)


def _parse(text: str, column: str, spec: TensorSpec) -> Any:
    stripped = text.strip()
    if not stripped:
        raise RowError(f"column {column!r} is empty where input {spec.describe()} takes a number")
    if spec.datatype == "BOOL":
        truth = _TRUTH.get(stripped.lower())
        if truth is None:
            raise RowError(
                f"column {column!r} holds {shorten(text)}; input {spec.describe()} takes true, false, 1 or 0"
            )
        return truth
    beyond = f"column {column!r} holds {shorten(text)}, which is beyond what {spec.datatype} can hold"
    try:
        value = _number(stripped, spec.datatype)
    except OverflowError:
        raise RowError(beyond) from None
    except ValueError:
        kind = "a number" if spec.datatype in _FLOATS else "a whole number"
        raise RowError(
            f"column {column!r} holds {shorten(text)} where input {spec.describe()} takes {kind}"
        ) from None
    try:
        struct.pack(f"<{DATATYPES[spec.datatype].struct_code}", value)
    except (struct.error, OverflowError):
        raise RowError(beyond) from None
    return value


def _number(text: str, datatype: str) -> float:
    if "_" in text:
        raise ValueError
    if datatype in _FLOATS:
        return float(text)
    try:
        return int(text)
    except ValueError:
        # pandas writes whole numbers as 3.0 as soon as one of the column is missing. A float would round it.
        try:
            value = Decimal(text)
        except InvalidOperation:
            raise ValueError from None
        if not value.is_finite():
            raise
        # 1e999999999 is a whole number, and as an int it would fill the memory.
        if value and value.adjusted() > _MOST_DIGITS:
            raise OverflowError from None
        if value != value.to_integral_value():
            raise
        return int(value)

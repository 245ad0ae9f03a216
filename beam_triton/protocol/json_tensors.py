"""Tensors as JSON ``data``: for servers without the binary extension, and for outputs in JSON.

Data may be nested or flat, row-major either way; we write it flat. JSON has neither NaN nor infinity:
MLServer, KServe and their like write both as ``null`` and read ``null`` as NaN, and so do we, for
floating-point datatypes. (An infinity that is sent arrives as NaN.) A server that writes them bare (``NaN``,
``Infinity``) is understood. FP16 travels as numbers; BF16 has no JSON form.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from beam_triton.errors import LocalProtocolError, RemoteProtocolError
from beam_triton.protocol.byte_strings import object_array
from beam_triton.protocol.datatypes import BF16, DATATYPES, Array
from beam_triton.protocol.tensors import element_count
from beam_triton.protocol.text import shorten

# JSON has one kind of number; `true` is not one, though Python's bool is an int.
_JSON_TYPES: dict[str, set[type]] = {"b": {bool}, "O": {str}, "f": {int, float, type(None)}}
# Servers in C++ write whole numbers as 0.0, too.
_WHOLE: set[type] = {int, float}


def json_items(array: Array, datatype: str, name: str) -> bytes:
    """The values of ``array``, which ``to_array`` made, as JSON without the brackets around them.

    The texts of several elements join with a comma. Raises LocalProtocolError for BF16, and BYTES that are
    not UTF-8.
    """
    kind = DATATYPES[datatype]
    if kind is BF16:
        raise LocalProtocolError(
            f"input {name!r}: {datatype} has no JSON form, and the server does not take binary tensors"
        )
    values: list[Any] = array.ravel().tolist()
    if kind.is_bytes:
        try:
            values = [value.decode() for value in values]
        except UnicodeDecodeError as error:
            raise LocalProtocolError(
                f"input {name!r}: the bytes {shorten(error.object)} are not UTF-8 and cannot go as JSON, "
                f"but the server does not take binary tensors"
            ) from None
    elif array.dtype.kind == "f" and not np.isfinite(array).all():
        values = [value if math.isfinite(value) else None for value in values]
    return json.dumps(values, separators=(",", ":"))[1:-1].encode("ascii")


def from_json_data(
    data: Any, datatype: str, shape: Sequence[int], name: str, *, is_strict: bool = False
) -> Array:
    """The tensor of ``shape`` from an answer's ``data``: an array of the datatype's ``array_dtype``.

    ``null`` is NaN in a floating-point tensor, and a whole float such as ``2.0`` an integer, unless
    ``is_strict``: Triton's reader takes neither.

    Raises RemoteProtocolError, naming the output, if the datatype has no JSON form, or the values are not of
    the datatype or not as many as the shape needs. An element of the batch may have given such values.
    """
    kind = DATATYPES[datatype]
    if kind is BF16:
        raise RemoteProtocolError(f"output {shorten(name)}: {datatype} has no JSON form, but came as JSON")
    count = element_count(shape, name)
    values = _flatten(data, len(shape), name)
    if len(values) != count:
        raise _refusal(name, f"shape {list(shape)} needs {count} values, but {len(values)} came")
    types = set(map(type, values))
    letter = kind.wire_dtype.kind
    allowed = _JSON_TYPES.get(letter, _WHOLE)
    if is_strict:
        allowed = allowed - ({float} if allowed is _WHOLE else {type(None)})
    if not types <= allowed:
        wrong = next(value for value in values if type(value) not in allowed)
        raise _refusal(name, f"{shorten(wrong)} is not a {datatype} value")
    if letter == "O":
        return object_array(_encoded(values, name), count, tuple(shape))
    try:
        if type(None) in types:
            values = [math.nan if value is None else value for value in values]
        if letter in "iu" and values:
            if float in types:
                values = _whole_numbers(values, datatype, name)
            info = np.iinfo(kind.wire_dtype)
            if min(values) < info.min or max(values) > info.max:
                raise OverflowError
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=kind.wire_dtype)
    except OverflowError:
        raise _refusal(name, f"a value does not fit {datatype}") from None
    return array.reshape(shape)


def _whole_numbers(values: list[Any], datatype: str, name: str) -> list[int]:
    for value in values:
        if type(value) is float and not value.is_integer():
            raise _refusal(name, f"{value!r} is not a {datatype} value")
    return list(map(int, values))


def _refusal(name: str, text: str) -> RemoteProtocolError:
    """The error for values that may be one element's doing: the batch is halved, its neighbours are saved."""
    error = RemoteProtocolError(f"output {shorten(name)}: {text}")
    error.splits_batch = True
    return error


def _encoded(values: list[str], name: str) -> list[bytes]:
    try:
        return list(map(str.encode, values))
    except UnicodeEncodeError:
        raise _refusal(name, "a string holds lone surrogates") from None


def _flatten(data: Any, rank: int, name: str) -> list[Any]:
    """``data`` as a flat list, unnested at most as deep as the shape has dimensions."""
    if not isinstance(data, list):
        raise _refusal(name, f"data must be a list, not {shorten(data)}")
    values: list[Any] = data
    for _ in range(rank - 1):
        if not values or not all(type(value) is list for value in values):
            break
        values = [item for row in values for item in row]
    return values

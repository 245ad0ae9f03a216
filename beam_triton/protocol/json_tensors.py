"""Tensors as JSON ``data``: for servers without the binary extension, and for outputs in JSON.

Data may be nested or flat, row-major either way; we write it flat. NaN and infinities are written bare
(``NaN``, ``Infinity``), which is not JSON, but what Triton and MLServer read and write. FP16 and BF16 have
no JSON form.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from beam_triton.errors import LocalProtocolError, RemoteProtocolError
from beam_triton.protocol.byte_strings import object_array
from beam_triton.protocol.datatypes import DATATYPES, Array
from beam_triton.protocol.tensors import element_count
from beam_triton.protocol.text import shorten

# JSON has one kind of number; `true` is not one, though Python's bool is an int.
_JSON_TYPES: dict[str, set[type]] = {"b": {bool}, "O": {str}, "f": {int, float}}
_WHOLE: set[type] = {int}


def json_items(array: Array, datatype: str, name: str) -> bytes:
    """The values of ``array``, which ``to_array`` made, as JSON without the brackets around them.

    The texts of several elements join with a comma. Raises LocalProtocolError for FP16, BF16, and BYTES that
    are not UTF-8.
    """
    kind = DATATYPES[datatype]
    if not kind.has_json:
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
    return json.dumps(values, separators=(",", ":"))[1:-1].encode("ascii")


def from_json_data(data: Any, datatype: str, shape: Sequence[int], name: str) -> Array:
    """The tensor of ``shape`` from an answer's ``data``: an array of the datatype's ``array_dtype``.

    Raises RemoteProtocolError, naming the output, if the datatype has no JSON form, or the values are not of
    the datatype or not as many as the shape needs.
    """
    kind = DATATYPES[datatype]
    if not kind.has_json:
        raise RemoteProtocolError(f"output {shorten(name)}: {datatype} has no JSON form, but came as JSON")
    count = element_count(shape, name)
    values = _flatten(data, len(shape), name)
    if len(values) != count:
        raise RemoteProtocolError(
            f"output {shorten(name)}: shape {list(shape)} needs {count} values, but {len(values)} came"
        )
    types = set(map(type, values))
    letter = kind.wire_dtype.kind
    allowed = _JSON_TYPES.get(letter, _WHOLE)
    if not types <= allowed:
        wrong = next(value for value in values if type(value) not in allowed)
        raise RemoteProtocolError(f"output {shorten(name)}: {shorten(wrong)} is not a {datatype} value")
    if letter == "O":
        return object_array(_encoded(values, name), count, tuple(shape))
    try:
        if letter in "iu" and values:
            info = np.iinfo(kind.wire_dtype)
            if min(values) < info.min or max(values) > info.max:
                raise OverflowError
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=kind.wire_dtype)
    except OverflowError:
        raise RemoteProtocolError(f"output {shorten(name)}: a value does not fit {datatype}") from None
    return array.reshape(shape)


def _encoded(values: list[str], name: str) -> list[bytes]:
    try:
        return list(map(str.encode, values))
    except UnicodeEncodeError:
        raise RemoteProtocolError(f"output {shorten(name)}: a string holds lone surrogates") from None


def _flatten(data: Any, rank: int, name: str) -> list[Any]:
    """``data`` as a flat list, unnested at most as deep as the shape has dimensions."""
    if not isinstance(data, list):
        raise RemoteProtocolError(f"output {shorten(name)}: data must be a list, not {shorten(data)}")
    values: list[Any] = data
    for _ in range(rank - 1):
        if not values or not all(type(value) is list for value in values):
            break
        values = [item for row in values for item in row]
    return values

"""Arrays of every datatype, drawn by hypothesis, and responses built as the specification describes them."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from beam_triton.protocol import DATATYPES
from beam_triton.protocol.datatypes import Array

NUMBERS = tuple(name for name in DATATYPES if name not in ("BYTES", "BF16"))
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


def arrays(datatype: str, shape: Any = SHAPES) -> st.SearchStrategy[Array]:
    """Arrays of ``datatype`` as a user gets them: float32 with BF16 values, object arrays of bytes."""
    if datatype == "BYTES":
        return hnp.arrays(np.dtype(object), shape, elements=st.binary(max_size=40), fill=st.nothing())
    if datatype == "BF16":
        return hnp.arrays(np.dtype("<u4"), shape, elements=st.integers(0, 0xFFFF)).map(
            lambda halves: (halves << np.uint32(16)).view("<f4")
        )
    return hnp.arrays(DATATYPES[datatype].wire_dtype, shape)


def raw(array: Array, datatype: str) -> bytes:
    """The wire form of ``array``, value by value as the specification describes it."""
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(value)) + value for value in array.ravel().tolist())
    if datatype == "BF16":
        return b"".join(struct.pack("<f", value)[2:] for value in array.ravel())
    return array.astype(array.dtype.newbyteorder("<")).tobytes("C")


def array_of(wire: bytes, datatype: str, shape: Sequence[int]) -> Array:
    """The array whose wire form is ``wire``, which has to hold exactly ``shape``."""
    if datatype == "BYTES":
        values: list[bytes] = []
        while wire:
            (length,) = struct.unpack_from("<I", wire)
            assert len(wire) >= 4 + length
            values.append(wire[4 : 4 + length])
            wire = wire[4 + length :]
        array = np.empty(len(values), object)
        array[:] = values
    elif datatype == "BF16":
        array = (np.frombuffer(wire, "<u2").astype("<u4") << np.uint32(16)).view("<f4")
    else:
        array = np.frombuffer(wire, DATATYPES[datatype].wire_dtype)
    return array.reshape(shape)


def announced(name: str, datatype: str, shape: Sequence[int], size: int) -> dict[str, Any]:
    """The entry of a binary output in a response's JSON."""
    return {
        "name": name,
        "datatype": datatype,
        "shape": list(shape),
        "parameters": {"binary_data_size": size},
    }


def response(outputs: Sequence[dict[str, Any]], tail: bytes = b"", **fields: Any) -> tuple[bytes, int]:
    """A response body, and the length of its JSON."""
    head = json.dumps({"model_name": "m", "model_version": "1", "outputs": outputs, **fields}).encode()
    return head + tail, len(head)


def binary_response(arrays: dict[str, tuple[str, Array]], **fields: Any) -> tuple[bytes, int]:
    """A response whose outputs (name → datatype, array) all are binary."""
    tails = {name: raw(array, datatype) for name, (datatype, array) in arrays.items()}
    entries = [
        announced(name, datatype, array.shape, len(tails[name])) for name, (datatype, array) in arrays.items()
    ]
    return response(entries, b"".join(tails.values()), **fields)


def same(left: Array, right: Array) -> bool:
    """Equal in shape and every value, NaN equal to NaN."""
    if left.shape != right.shape:
        return False
    if left.dtype.kind == "f":
        return bool(np.array_equal(left, right, equal_nan=True))
    return bool(left.tolist() == right.tolist())

"""The 14 datatypes of the Open Inference Protocol and what they are in NumPy.

Tensors are sent little-endian and row-major (Triton's "Binary Tensor Data Extension"), so every dtype of the
table is little-endian whatever the machine is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from beam_triton.errors import LocalProtocolError

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Datatype:
    """One row of the protocol's datatype table.

    ``wire_dtype`` is the dtype of an array that is ready to be sent: for BYTES an object array of ``bytes``,
    for BF16 (which NumPy lacks) the bits as uint16. ``array_dtype`` is the dtype of a decoded tensor: BF16
    is widened to float32, which is exact; all others keep the wire dtype. ``item_bytes`` is the size of one
    value on the wire, 0 for BYTES, whose values have their own lengths. ``struct_code`` is the format
    character of `struct` for one value, None for BYTES and BF16. ``has_json`` is False for the datatypes
    whose JSON form the protocol does not define (FP16, BF16); Triton refuses both, MLServer and KServe take
    FP16 as numbers.
    """

    name: str
    wire_dtype: np.dtype[Any]
    array_dtype: np.dtype[Any]
    item_bytes: int
    struct_code: str | None = None
    has_json: bool = True

    @cached_property
    def is_bytes(self) -> bool:
        return self.item_bytes == 0


def _number(name: str, dtype_code: str, struct_code: str, *, has_json: bool = True) -> Datatype:
    dtype = np.dtype(dtype_code)
    return Datatype(name, dtype, dtype, dtype.itemsize, struct_code, has_json)


BYTES = Datatype("BYTES", np.dtype(object), np.dtype(object), 0)
BF16 = Datatype("BF16", np.dtype("<u2"), np.dtype("<f4"), 2, has_json=False)

DATATYPES: Mapping[str, Datatype] = MappingProxyType(
    {
        datatype.name: datatype
        for datatype in (
            _number("BOOL", "?", "?"),
            _number("UINT8", "u1", "B"),
            _number("UINT16", "<u2", "H"),
            _number("UINT32", "<u4", "I"),
            _number("UINT64", "<u8", "Q"),
            _number("INT8", "i1", "b"),
            _number("INT16", "<i2", "h"),
            _number("INT32", "<i4", "i"),
            _number("INT64", "<i8", "q"),
            _number("FP16", "<f2", "e", has_json=False),
            _number("FP32", "<f4", "f"),
            _number("FP64", "<f8", "d"),
            BYTES,
            BF16,
        )
    }
)

FLOATS = frozenset({"FP16", "FP32", "FP64", "BF16"})

_BY_DTYPE = {
    (datatype.wire_dtype.kind, datatype.item_bytes): datatype
    for datatype in DATATYPES.values()
    if datatype not in (BYTES, BF16)
}


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether ``dtype`` is ``ml_dtypes.bfloat16``, recognised by name so that the package is not needed."""
    # NumPy builds the name at each access, which costs more than the rest of a conversion.
    return dtype.itemsize == 2 and dtype.kind in "Vf" and dtype.name == "bfloat16"


def datatype_of(array: Array, name: str) -> Datatype:
    """The datatype of ``array``, for a server that does not report which one it takes.

    Raises LocalProtocolError, naming the tensor ``name``, for dtypes that no datatype can hold.
    """
    dtype = array.dtype
    if dtype.kind in "OSUT":
        return BYTES
    if is_bfloat16(dtype):
        return BF16
    datatype = _BY_DTYPE.get((dtype.kind, dtype.itemsize))
    if datatype is None:
        raise LocalProtocolError(
            f"input {name!r}: no datatype of the protocol holds NumPy dtype {dtype}; "
            f"convert it to one of {', '.join(DATATYPES)}"
        )
    return datatype

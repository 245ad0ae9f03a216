"""The datatype table, and the datatype of an array whose input is not described."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from beam_triton.errors import LocalProtocolError
from beam_triton.protocol.datatypes import DATATYPES, datatype_of, is_bfloat16


def test_the_table_has_all_14_datatypes_little_endian() -> None:
    """Every datatype of the protocol is there, and none depends on the machine's byte order."""
    names = "BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 BYTES BF16"
    assert sorted(DATATYPES) == sorted(names.split(" "))
    for datatype in DATATYPES.values():
        assert datatype.wire_dtype == datatype.wire_dtype.newbyteorder("<")
        if not datatype.is_bytes:
            assert datatype.wire_dtype.itemsize == datatype.item_bytes


@pytest.mark.parametrize("name", [name for name in DATATYPES if name not in ("BYTES", "BF16")])
def test_an_arrays_dtype_gives_its_datatype(name: str) -> None:
    """In either byte order."""
    dtype = DATATYPES[name].wire_dtype
    assert datatype_of(np.zeros(1, dtype), "x").name == name
    assert datatype_of(np.zeros(1, dtype.newbyteorder(">")), "x").name == name


@pytest.mark.parametrize("values", [["a"], [b"a"], [None]])
def test_text_bytes_and_objects_are_byte_strings(values: list[object]) -> None:
    """Arrays of text, of bytes and of objects are sent as BYTES."""
    assert datatype_of(np.array(values), "x").name == "BYTES"


def test_bfloat16_is_recognised_by_the_name_of_its_dtype() -> None:
    """An array of ml_dtypes.bfloat16 is BF16; one of its other 2-byte or 1-byte types is not."""
    assert is_bfloat16(np.dtype(ml_dtypes.bfloat16))
    assert datatype_of(np.zeros(1, ml_dtypes.bfloat16), "x").name == "BF16"
    assert not is_bfloat16(np.dtype(np.float16))
    assert not is_bfloat16(np.dtype(ml_dtypes.float8_e4m3))


@pytest.mark.parametrize("dtype", ["complex64", "datetime64[s]", "V4", ml_dtypes.float8_e4m3])
def test_a_dtype_without_a_datatype_is_refused_by_name(dtype: object) -> None:
    """The message names the input, the dtype and all datatypes."""
    with pytest.raises(LocalProtocolError, match=r"input 'pixels'.*BF16"):
        datatype_of(np.zeros(1, dtype), "pixels")  # type: ignore[call-overload]

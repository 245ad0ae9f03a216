"""Arrays to bytes and back: Triton's binary tensor data extension.

Values are little-endian and row-major without padding. Nothing is copied in either direction but BYTES,
whose values have no fixed place, and BF16, which is widened to float32 when read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from beam_triton.errors import RemoteProtocolError
from beam_triton.protocol.bfloat16 import widen_bfloat16
from beam_triton.protocol.byte_strings import decode_byte_strings, encode_byte_strings, object_array
from beam_triton.protocol.datatypes import BF16, DATATYPES, Array
from beam_triton.protocol.text import shorten

MAX_RANK = 64 if int(np.__version__.split(".")[0]) >= 2 else 32
"""The greatest number of dimensions that NumPy's arrays can have."""


def flat_view(array: Array) -> memoryview:
    """The bytes of a C-contiguous array as a 1-D buffer of bytes, not copied."""
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def wire_bytes(array: Array, datatype: str, name: str = "") -> memoryview:
    """The bytes to send for ``array``, which ``to_array`` made: a 1-D buffer, a copy for BYTES alone.

    ``name`` is the tensor's, for errors. Raises LocalProtocolError for a BYTES value of 4 GiB or more.
    """
    if DATATYPES[datatype].is_bytes:
        return memoryview(encode_byte_strings(array.ravel().tolist(), name))
    return flat_view(array)


def element_count(shape: Sequence[int], name: str) -> int:
    """The number of values in ``shape``, as a server wrote it.

    Raises RemoteProtocolError unless it is a list of non-negative whole numbers that an array can have.
    """
    if len(shape) > MAX_RANK:
        raise RemoteProtocolError(
            f"output {shorten(name)}: {len(shape)} dimensions are more than NumPy's {MAX_RANK}"
        )
    count = 1
    span = 1
    for dim in shape:
        if type(dim) is not int or dim < 0:
            raise RemoteProtocolError(f"output {shorten(name)}: shape {shorten(list(shape))} is not a shape")
        count *= dim
        # An empty tensor costs no memory, but NumPy still refuses shapes whose other dimensions overflow.
        span *= max(dim, 1)
        if span > sys.maxsize // 8:
            raise RemoteProtocolError(f"output {shorten(name)}: shape {shorten(list(shape))} is too large")
    return count


def from_wire(
    buffer: bytes | bytearray | memoryview, datatype: str, shape: Sequence[int], name: str
) -> Array:
    """The tensor that ``buffer`` holds exactly: a view of it (read-only where the buffer is).

    BYTES are an object array of ``bytes``, BF16 a float32 array; both are copies. Raises
    RemoteProtocolError, naming the output, when the buffer's size is not what ``shape`` needs.
    """
    kind = DATATYPES[datatype]
    count = element_count(shape, name)
    view = memoryview(buffer).cast("B") if not isinstance(buffer, bytes) else memoryview(buffer)
    if kind.is_bytes:
        return object_array(decode_byte_strings(view, count, name), count, tuple(shape))
    if count * kind.item_bytes != len(view):
        raise RemoteProtocolError(
            f"output {shorten(name)}: {datatype} of shape {list(shape)} needs "
            f"{count * kind.item_bytes} bytes, but {len(view)} came"
        )
    array = np.frombuffer(view, dtype=kind.wire_dtype) if count else np.empty(0, dtype=kind.wire_dtype)
    if kind is BF16:
        array = widen_bfloat16(array)
    return array.reshape(shape)

"""Arrays as the bytes of Triton's binary tensor data extension: little-endian, row-major, no padding."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from beam_triton.errors import RemoteProtocolError
from beam_triton.protocol.byte_strings import LENGTH_BYTES, encode_byte_strings
from beam_triton.protocol.datatypes import DATATYPES, Array
from beam_triton.protocol.text import shorten

MAX_RANK = 64 if int(np.__version__.split(".")[0]) >= 2 else 32
"""The greatest number of dimensions that NumPy's arrays can have."""


def flat_view(array: Array) -> memoryview:
    """The bytes of a C-contiguous array as a 1-D buffer, not copied."""
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def wire_bytes(array: Array, datatype: str, name: str = "") -> memoryview:
    """The bytes to send for ``array``, a result of ``to_array``: a 1-D buffer, and a copy only for BYTES.

    ``name`` is the tensor's, for errors. Raises LocalProtocolError for a BYTES value of 4 GiB or more.
    """
    if DATATYPES[datatype].is_bytes:
        return memoryview(encode_byte_strings(array.ravel().tolist(), name))
    return flat_view(array)


def wire_size(array: Array) -> int:
    """How many bytes `wire_bytes` makes of ``array``."""
    if array.dtype != object:
        return array.nbytes
    return LENGTH_BYTES * array.size + sum(map(len, array.ravel().tolist()))


def element_count(shape: Sequence[int], name: str) -> int:
    """The number of values in a ``shape`` that a server sent.

    Raises RemoteProtocolError unless it consists of non-negative whole numbers and fits a NumPy array.
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
        # An empty tensor takes no memory, but NumPy refuses its shape if the other dimensions overflow.
        span *= max(dim, 1)
        if span > sys.maxsize // 8:
            raise RemoteProtocolError(f"output {shorten(name)}: shape {shorten(list(shape))} is too large")
    return count

"""BYTES on the wire: each value is its length as a little-endian uint32, then its bytes.

Tensors of many short strings are common, so the work for each value stays in C (``map``, slicing, ``join``);
interpreted code runs once per value only to decode strings of unequal lengths.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import numpy as np

from beam_triton.errors import LocalProtocolError, RemoteProtocolError
from beam_triton.protocol.datatypes import Array
from beam_triton.protocol.text import shorten

LENGTH_BYTES = 4
# The prefixes of all shorter lengths are made once: 65 KB of small bytes objects.
_CACHED_LENGTHS = 1024
_PREFIXES = [length.to_bytes(LENGTH_BYTES, "little") for length in range(_CACHED_LENGTHS)]
_MAX_LENGTH = 0xFFFFFFFF
_unpack_length = struct.Struct("<I").unpack_from


def encode_byte_strings(values: Sequence[bytes], name: str) -> bytes:
    """The wire form of ``values``; ``name`` is the tensor's, for errors.

    Raises LocalProtocolError for a value whose length does not fit 32 bits.
    """
    if len(values) == 1:
        return _prefix(len(values[0]), name) + values[0]
    lengths = list(map(len, values))
    if not lengths:
        return b""
    if lengths.count(lengths[0]) == len(lengths):
        prefix = _prefix(lengths[0], name)
        return prefix + prefix.join(values)
    pieces: list[bytes] = [b""] * (2 * len(lengths))
    try:
        pieces[0::2] = map(_PREFIXES.__getitem__, lengths)
    except IndexError:
        pieces[0::2] = [_prefix(length, name) for length in lengths]
    pieces[1::2] = values
    return b"".join(pieces)


def _prefix(length: int, name: str) -> bytes:
    if length < _CACHED_LENGTHS:
        return _PREFIXES[length]
    if length > _MAX_LENGTH:
        raise LocalProtocolError(f"input {name!r}: a BYTES value of {length} bytes exceeds the 32-bit length")
    return length.to_bytes(LENGTH_BYTES, "little")


def decode_byte_strings(buffer: memoryview, count: int, name: str) -> list[bytes]:
    """The ``count`` values that ``buffer`` (1-D, bytes) holds exactly, as copies.

    Raises RemoteProtocolError if the lengths do not add up to the buffer. Never allocates more than the
    buffer's size justifies, whatever ``count`` claims.
    """
    size = len(buffer)
    if count * LENGTH_BYTES > size:
        raise RemoteProtocolError(f"output {shorten(name)}: {size} bytes cannot hold {count} BYTES values")
    if count == 0:
        if size:
            raise RemoteProtocolError(f"output {shorten(name)}: {size} bytes follow its 0 BYTES values")
        return []
    equal = _decode_equal_lengths(buffer, count)
    return _walk(bytes(buffer), count, name) if equal is None else equal


def _decode_equal_lengths(buffer: memoryview, count: int) -> list[bytes] | None:
    """All values at once if they have equal lengths (labels, hashes, identifiers), otherwise None."""
    (length,) = _unpack_length(buffer)
    if length == 0 or count * (LENGTH_BYTES + length) != len(buffer):
        return None
    table = np.frombuffer(buffer, dtype=[("length", "<u4"), ("value", f"V{length}")])
    if not (table["length"] == length).all():
        return None
    values: list[bytes] = table["value"].tolist()
    return values


def _walk(data: bytes, count: int, name: str) -> list[bytes]:
    end = 0
    try:
        values = [
            data[(start := end + LENGTH_BYTES) : (end := start + _unpack_length(data, end)[0])]
            for _ in range(count)
        ]
    except struct.error:
        end = len(data) + 1
    if end > len(data):
        raise RemoteProtocolError(
            f"output {shorten(name)}: its {len(data)} bytes end before the last of {count} BYTES values"
        )
    if end < len(data):
        raise RemoteProtocolError(
            f"output {shorten(name)}: {len(data) - end} bytes follow its {count} BYTES values"
        )
    return values


def object_array(values: Iterable[object], count: int, shape: tuple[int, ...]) -> Array:
    """An object array of ``shape`` whose items are the ``count`` ``values``, even if they are sequences."""
    array = np.empty(count, dtype=object)
    if count:
        array[:] = values if isinstance(values, list) else list(values)
    return array.reshape(shape)

"""BYTES: lengths and values, both ways."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.errors import RemoteProtocolError
from beam_triton.protocol.byte_strings import decode_byte_strings, encode_byte_strings, object_array

LISTS = st.lists(st.binary(max_size=50), max_size=30) | st.integers(1, 40).flatmap(
    lambda size: st.lists(st.binary(min_size=size, max_size=size), min_size=1, max_size=20)
)


def reference(values: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


@given(LISTS)
def test_encoded_values_are_decoded_unchanged(values: list[bytes]) -> None:
    """Any values, of equal lengths or not, empty ones and trailing zero bytes included."""
    wire = encode_byte_strings(values, "x")
    assert wire == reference(values)
    assert decode_byte_strings(memoryview(wire), len(values), "x") == values


@pytest.mark.parametrize("size", [1023, 1024, 70_000])
def test_values_longer_than_the_cached_prefixes_are_encoded(size: int) -> None:
    """Values of lengths around and far beyond the cached ones."""
    values = [b"a" * size, b"", b"b" * (size + 1)]
    assert encode_byte_strings(values, "x") == reference(values)
    assert encode_byte_strings(values[:1], "x") == reference(values[:1])


@given(LISTS.filter(bool), st.data())
def test_truncated_bytes_are_refused(values: list[bytes], data: st.DataObject) -> None:
    """Any truncation of the bytes is an error that names the output."""
    wire = reference(values)
    cut = data.draw(st.integers(0, len(wire) - 1))
    with pytest.raises(RemoteProtocolError, match="output 'x'"):
        decode_byte_strings(memoryview(wire[:cut]), len(values), "x")


@given(LISTS, st.binary(min_size=1, max_size=20))
def test_trailing_bytes_are_refused(values: list[bytes], extra: bytes) -> None:
    """Bytes after the last value are an error, not ignored."""
    with pytest.raises(RemoteProtocolError, match="bytes"):
        decode_byte_strings(memoryview(reference(values) + extra), len(values), "x")


def test_a_claimed_count_or_length_does_not_allocate() -> None:
    """A count of 2**62 and a length of 4 GiB in a few bytes are refused before anything is allocated."""
    with pytest.raises(RemoteProtocolError, match="cannot hold"):
        decode_byte_strings(memoryview(b"\0" * 8), 2**62, "x")
    with pytest.raises(RemoteProtocolError, match="end before"):
        decode_byte_strings(memoryview(b"\xff\xff\xff\xff" + b"a" * 60), 1, "x")


def test_object_arrays_keep_sequences_as_single_values() -> None:
    """Values that are sequences themselves stay single values."""
    array = object_array([b"ab", b"cd"], 2, (2, 1))
    assert array.shape == (2, 1) and array.tolist() == [[b"ab"], [b"cd"]]
    assert object_array([], 0, (0, 3)).shape == (0, 3)
    assert object_array([[1, 2]], 1, ()).item() == [1, 2]
    assert array.dtype == np.dtype(object)

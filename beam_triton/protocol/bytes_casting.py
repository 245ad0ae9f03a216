"""Text and bytes to the values of a BYTES input."""

from __future__ import annotations

from typing import Any

import numpy as np

from beam_triton.protocol.mismatch import as_array, described, refuse
from beam_triton.protocol.model import TensorSpec
from beam_triton.protocol.text import shorten


def byte_string_values(value: Any, spec: TensorSpec) -> tuple[list[bytes], tuple[int, ...]]:
    """The values of ``value`` in row-major order, and its shape; ``str`` becomes UTF-8.

    Raises LocalProtocolError for values that are neither text nor bytes, and text that is not Unicode.
    """
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return [_one_byte_string(value, spec)], ()
    if isinstance(value, (list, tuple)):
        if set(map(type, value)).isdisjoint((list, tuple, np.ndarray)):
            # Values that NumPy would take for sequences (bytearray) must not become a dimension.
            return _byte_strings(list(value), spec), (len(value),)
        try:
            array = np.array(value, dtype=object)
        except ValueError:
            raise refuse(spec, f"lists of unequal lengths {shorten(value)}") from None
    else:
        array = as_array(value, spec)
    if array.dtype.kind not in "OSUT":
        raise refuse(spec, described(value, array), "BYTES are made of str or bytes")
    return _byte_strings(array.ravel().tolist(), spec), array.shape


def _byte_strings(values: list[Any], spec: TensorSpec) -> list[bytes]:
    kinds = set(map(type, values))
    if kinds <= {bytes}:
        return values
    if kinds == {str}:
        try:
            return list(map(str.encode, values))
        except UnicodeEncodeError:
            pass  # Found and named below.
    return [_one_byte_string(value, spec) for value in values]


def _one_byte_string(value: Any, spec: TensorSpec) -> bytes:
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError:
            raise refuse(
                spec, f"str {shorten(value)}", "it holds lone surrogates, which UTF-8 cannot"
            ) from None
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise refuse(spec, f"{type(value).__name__} {shorten(value)}", "BYTES are made of str or bytes")

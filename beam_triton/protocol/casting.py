"""Values of an element to arrays of a model's input: only what loses nothing, or a clear error.

Two kinds of values come in. One has a dtype of its own (arrays, and whatever ``numpy.asarray`` understands:
tensors, Series, columns): its author chose a precision, so that a cast must keep every value. Python numbers
and lists of them have none: floats are rounded to the input's precision, as writing ``0.1`` for an FP32
input means. Neither is ever clipped, wrapped, truncated or parsed from text.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from beam_triton.errors import LocalProtocolError
from beam_triton.protocol.byte_strings import object_array
from beam_triton.protocol.bytes_casting import byte_string_values
from beam_triton.protocol.datatypes import BF16, DATATYPES, Array
from beam_triton.protocol.mismatch import shape_text
from beam_triton.protocol.model import TensorSpec
from beam_triton.protocol.number_casting import number_array


def to_array(value: Any, spec: TensorSpec, *, batched: bool = False) -> Array:
    """``value`` as the array that is sent for ``spec``: C-contiguous, little-endian, of its wire dtype.

    ``value`` has the shape of one element, with a batch dimension in front if ``batched``. An array that
    already is what is wanted comes back itself, not a copy. A single value serves an input of one value
    whatever its rank: ``3.5`` fits shape [], [1] and [1, 1], unless ``batched``. BF16 comes back as its bits
    in uint16, BYTES as an object array of ``bytes`` (``str`` is encoded as UTF-8).

    Raises LocalProtocolError, naming the input, what it takes and what came.
    """
    datatype = DATATYPES[spec.datatype]
    if datatype.is_bytes:
        values, shape = byte_string_values(value, spec)
        return object_array(values, len(values), fit_shape(shape, spec, batched))
    if type(value) is np.ndarray and value.dtype == datatype.wire_dtype and datatype is not BF16:
        array = value
    else:
        array = number_array(value, spec, datatype)
    shape = fit_shape(array.shape, spec, batched)
    if shape != array.shape or not array.flags.c_contiguous:
        array = np.ascontiguousarray(array).reshape(shape)
    return array


def fit_shape(shape: tuple[int, ...], spec: TensorSpec, batched: bool) -> tuple[int, ...]:
    """The shape to send for a value of ``shape``: itself, or the input's for a single value.

    Raises LocalProtocolError for a shape that the input does not take.
    """
    wanted = spec.shape
    own = shape[1:] if batched else shape
    if len(shape) == len(wanted) + batched and all(
        want in (-1, dim) for dim, want in zip(own, wanted, strict=True)
    ):
        return shape
    if not shape and not batched and all(want in (1, -1) for want in wanted):
        return (1,) * len(wanted)
    expected = shape_text(("batch", *wanted) if batched else wanted)
    raise LocalProtocolError(
        f"input {spec.name!r} takes {spec.datatype} of shape {expected}, not shape {shape_text(shape)}"
    )

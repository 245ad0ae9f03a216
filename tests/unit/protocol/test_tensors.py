"""Raw tensors: the specification's bytes, as views where possible, and shapes that a server announces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.errors import RemoteProtocolError
from beam_triton.protocol import DATATYPES, TensorSpec, decode_infer_response, to_array
from beam_triton.protocol.datatypes import Array
from beam_triton.protocol.tensors import wire_bytes
from tests.unit.protocol.tensors_for_tests import announced, arrays, raw, response, same


def decoded(wire: bytes, datatype: str, shape: Sequence[Any]) -> Array:
    """What the decoder reads from a response that brings ``wire`` as its one output, named scores."""
    body, json_length = response([announced("scores", datatype, shape, len(wire))], wire)
    return decode_infer_response(body, json_length).outputs["scores"]


@pytest.mark.parametrize("datatype", DATATYPES)
@given(data=st.data())
def test_every_datatype_survives_the_wire(datatype: str, data: st.DataObject) -> None:
    """Any array: the specification's bytes on the wire, and the same array from them."""
    array = data.draw(arrays(datatype))
    sent = to_array(array, TensorSpec("x", datatype, (-1,) * array.ndim))
    wire = wire_bytes(sent, datatype)
    assert wire.ndim == 1 and wire.itemsize == 1
    if datatype != "BF16":  # A NaN's payload is not kept.
        assert bytes(wire) == raw(array, datatype)
    back = decoded(bytes(wire), datatype, array.shape)
    assert back.dtype == DATATYPES[datatype].array_dtype and same(back, array)


def test_numbers_are_views_both_ways() -> None:
    """Neither the array that is sent nor the bytes that arrive are copied."""
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    assert np.shares_memory(np.frombuffer(wire_bytes(array, "FP32"), np.uint8), array)
    body, json_length = response([announced("y", "FP32", [2, 3], 24)], array.tobytes())
    writeable = bytearray(body)
    back = decode_infer_response(writeable, json_length).outputs["y"]
    assert np.shares_memory(back, np.frombuffer(writeable, np.uint8)) and back.flags.writeable
    assert not decode_infer_response(body, json_length).outputs["y"].flags.writeable


@pytest.mark.parametrize(
    ("datatype", "shape", "size"),
    [
        ("FP32", [2], 7),
        ("FP32", [2], 9),
        ("FP32", [0], 1),
        ("FP32", [-1], 4),
        ("FP32", [2.0], 8),
        ("FP32", [2**62], 4),
        ("FP32", [2**62, 2**62], 4),
        ("FP32", [0, 2**62, 2**62], 0),
        ("FP32", [1] * 100, 4),
        ("BYTES", [2**62], 8),
        ("BYTES", [1], 3),
        ("BYTES", [0], 4),
        ("BF16", [2**40], 2),
    ],
)
def test_sizes_that_do_not_fit_the_shape_are_refused_with_the_outputs_name(
    datatype: str, shape: list[Any], size: int
) -> None:
    """Too few bytes, too many, negative dimensions, and more than fits into memory."""
    with pytest.raises(RemoteProtocolError, match="output 'scores'"):
        decoded(bytes(size), datatype, shape)

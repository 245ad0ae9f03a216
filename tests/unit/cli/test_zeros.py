"""Requests made up for a model: whatever it takes, with open sizes as the user says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from beam_triton import ConfigurationError, ModelSpec, TensorSpec
from beam_triton.cli.zeros import describe_zeros, zeros_request
from beam_triton.options import InferenceOptions
from beam_triton.protocol import DATATYPES
from beam_triton.remote_model import RemoteModel

IMAGE = TensorSpec("image", "FP32", (3, -1, -1))
NAME = TensorSpec("name", "BYTES", (1,))
SCALE = TensorSpec("scale", "INT8", (2,), optional=True)
SPEC = ModelSpec("m", "1", (IMAGE, NAME, SCALE), (), 8)


@contextmanager
def remote(spec: ModelSpec) -> Iterator[RemoteModel]:
    model = RemoteModel(spec, InferenceOptions(endpoint="http://127.0.0.1:9"))
    try:
        yield model
    finally:
        model.close()


def tensor_bytes(spec: ModelSpec, shapes: dict[str, tuple[int, ...]], rows: int) -> bytes:
    with remote(spec) as model:
        request = zeros_request(model, shapes, rows)
    body = b"".join(map(bytes, request.parts))
    return body[request.json_length :]


def test_open_sizes_are_one() -> None:
    """Optional inputs are left out, strings are empty: 4 bytes of length each."""
    assert tensor_bytes(SPEC, {}, 2) == bytes(2 * (3 * 4 + 4))
    assert describe_zeros(SPEC, {}) == "image FP32 [3, 1, 1], name BYTES [1]"


def test_given_shapes() -> None:
    """A shape that is given is taken, and an optional input that has one is sent."""
    shapes = {"image": (3, 4, 5), "scale": (2,)}
    assert len(tensor_bytes(SPEC, shapes, 1)) == 3 * 4 * 5 * 4 + 4 + 2
    assert describe_zeros(SPEC, shapes) == "image FP32 [3, 4, 5], name BYTES [1], scale INT8 [2]"


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype(datatype: str) -> None:
    """There is a zero of each."""
    spec = ModelSpec("m", "1", (TensorSpec("x", datatype, (3,)),), (), 8)
    size = DATATYPES[datatype].item_bytes or 4
    assert tensor_bytes(spec, {}, 2) == bytes(2 * 3 * size)


def test_without_a_batch_dimension() -> None:
    """The shape is the tensor's own."""
    spec = ModelSpec("m", "1", (TensorSpec("x", "FP32", (-1, 4)),))
    assert len(tensor_bytes(spec, {"x": (5, 4)}, 1)) == np.zeros((5, 4), np.float32).nbytes


@pytest.mark.parametrize(
    ("spec", "shapes", "message"),
    [
        (SPEC, {"image": (3, 4)}, "does not fit image FP32"),
        (SPEC, {"image": (4, 4, 4)}, "does not fit image FP32"),
        (SPEC, {"picture": (3, 4, 4)}, "no input .'picture'.*image FP32"),
        (ModelSpec("m"), {}, "does not name the inputs"),
    ],
)
def test_what_does_not_fit(spec: ModelSpec, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    """The error says what the model takes."""
    with remote(spec) as model, pytest.raises(ConfigurationError, match=message):
        zeros_request(model, shapes, 1)

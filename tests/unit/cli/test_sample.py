"""What commands send: zeros that fit any model, or the elements of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from beam_triton import ConfigurationError, ModelSpec, TensorSpec
from beam_triton.cli.sample import Sample, read_sample
from beam_triton.options import InferenceOptions
from beam_triton.protocol import DATATYPES
from beam_triton.remote_model import RemoteModel

IMAGE = TensorSpec("image", "FP32", (3, -1, -1))
NAME = TensorSpec("name", "BYTES", (1,))
SCALE = TensorSpec("scale", "INT8", (2,), optional=True)
SPEC = ModelSpec("m", "1", (IMAGE, NAME, SCALE), (), 8)


@contextmanager
def remote(spec: ModelSpec, *, binary: bool = True) -> Iterator[RemoteModel]:
    model = RemoteModel(spec, InferenceOptions(endpoint="http://127.0.0.1:9"), binary=binary)
    try:
        yield model
    finally:
        model.close()


def tensor_bytes(spec: ModelSpec, shapes: dict[str, tuple[int, ...]], rows: int) -> bytes:
    with remote(spec) as model:
        request = Sample(shapes).request(model, rows)
    body = b"".join(map(bytes, request.parts))
    return body[request.json_length :]


def test_open_sizes_are_one_in_zeros() -> None:
    """Optional inputs are left out, strings are empty: 4 bytes of length each."""
    assert tensor_bytes(SPEC, {}, 2) == bytes(2 * (3 * 4 + 4))
    assert Sample({}).describe(SPEC) == "zeros: image FP32 [3, 1, 1], name BYTES [1]"


def test_given_shapes_are_used_in_zeros() -> None:
    """A given shape replaces the open sizes, and an optional input that has one is sent."""
    shapes = {"image": (3, 4, 5), "scale": (2,)}
    assert len(tensor_bytes(SPEC, shapes, 1)) == 3 * 4 * 5 * 4 + 4 + 2
    assert Sample(shapes).describe(SPEC) == "zeros: image FP32 [3, 4, 5], name BYTES [1], scale INT8 [2]"


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_has_a_zero(datatype: str) -> None:
    """Numbers are zero bytes, and BYTES are strings of length 0."""
    spec = ModelSpec("m", "1", (TensorSpec("x", datatype, (3,)),), (), 8)
    size = DATATYPES[datatype].item_bytes or 4
    assert tensor_bytes(spec, {}, 2) == bytes(2 * 3 * size)


def test_zeros_for_a_model_without_a_batch_dimension() -> None:
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
def test_shapes_that_do_not_fit_the_model_are_refused(
    spec: ModelSpec, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    """The error says what the model takes."""
    with remote(spec) as model, pytest.raises(ConfigurationError, match=message):
        Sample(shapes).request(model, 1)


@pytest.mark.parametrize("binary", [True, False])
def test_elements_of_other_shapes_than_the_first_are_left_out(tmp_path: Path, binary: bool) -> None:
    """They could not share its request."""
    path = tmp_path / "ragged.jsonl"
    path.write_text("".join(json.dumps({"x": values}) + "\n" for values in ([1, 2], [3], [4, 5])))
    spec = ModelSpec("m", "1", (TensorSpec("x", "INT8", (-1,)),), (), 8)
    with remote(spec, binary=binary) as model:
        request = read_sample(str(path), {}).request(model, 3)
    body = b"".join(map(bytes, request.parts))
    assert b'"shape":[3,2]' in body
    assert body.endswith(bytes([1, 2, 4, 5, 1, 2])) or b'"data":[1,2,4,5,1,2]' in body

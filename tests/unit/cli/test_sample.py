"""What commands send: zeros that fit any model, or the elements of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
def test_elements_of_other_shapes_than_the_first_do_not_share_its_request(
    tmp_path: Path, binary: bool
) -> None:
    """Each shape has a request of its own, filled with the elements that there are."""
    path = tmp_path / "ragged.jsonl"
    path.write_text("".join(json.dumps({"x": values}) + "\n" for values in ([1, 2], [3], [4, 5])))
    spec = ModelSpec("m", "1", (TensorSpec("x", "INT8", (-1,)),), (), 8)
    with remote(spec, binary=binary) as model:
        first, second = read_sample(str(path), {}).requests(model, 3)
    for request, shape, values in ((first, b"[3,2]", [1, 2, 4, 5, 1, 2]), (second, b"[3,1]", [3, 3, 3])):
        body = b"".join(map(bytes, request.parts))
        assert b'"shape":' + shape in body
        assert body.endswith(bytes(values)) or json.dumps(values).replace(" ", "").encode() in body


X = ModelSpec("m", "1", (TensorSpec("x", "INT32", (2,)),), (), 8)


def rows_sent(path: Path, rows: int, **limits: int) -> list[list[int]]:
    """The values of each request."""
    with remote(X) as model:
        requests = read_sample(str(path), {}).requests(model, rows, **limits)
    bodies = [b"".join(map(bytes, request.parts))[request.json_length :] for request in requests]
    return [np.frombuffer(body, "<i4").tolist() for body in bodies]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_all_elements_of_a_file_are_sent_in_turn(tmp_path: Path, kind: str) -> None:
    """Of a table, columns that are no input are left out; vectors in a CSV are JSON."""
    values = [[n, n + 1] for n in range(0, 8, 2)]
    path = tmp_path / f"elements.{kind}"
    table = pa.table({"id": ["a", "b", "c", "d"], "x": values})
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "csv":
        path.write_text("id,x\n" + "".join(f'a,"{json.dumps(value)}"\n' for value in values))
    else:
        path.write_text("".join(json.dumps({"x": value}) + "\n" for value in values))
    assert rows_sent(path, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # The last request is filled up where it has half of its elements of its own, and left out otherwise.
    assert rows_sent(path, 3) == [[0, 1, 2, 3, 4, 5]]
    assert rows_sent(path, 8) == [[*range(8), *range(8)]]
    # Large files are cut.
    assert rows_sent(path, 1, most_bytes=8) == [[0, 1]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.parquet", b"no"),
        ("broken.csv", b"x,y\n1\n"),
        ("empty.jsonl", b""),
        ("broken.json", b"{"),
        ("deep.json", b"[" * 100_000),
        ("empty.npy", b""),
        ("broken.npz", b"PK\x03\x04 and no more"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    """The message is about the file, whatever reads it."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"--inputs .*{name}"):
        read_sample(str(path), {})

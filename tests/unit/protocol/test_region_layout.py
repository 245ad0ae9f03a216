"""How a request lies in shared memory: the JSON that says so, the bytes, and the sizes of outputs."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from beam_triton.errors import RemoteProtocolError
from beam_triton.protocol import (
    InferRequestEncoder,
    InferResponse,
    ModelSpec,
    TensorSpec,
    decode_infer_response,
)
from beam_triton.protocol.region_layout import LEAST_SHARED_BYTES, RegionLayout

WIDTH = LEAST_SHARED_BYTES // 4


def model(*outputs: TensorSpec, inputs: tuple[TensorSpec, ...] = ()) -> ModelSpec:
    return ModelSpec(
        "m", inputs=inputs or (TensorSpec("x", "FP32", (WIDTH,)),), outputs=outputs, max_batch_size=8
    )


def layout_of(encoder: InferRequestEncoder, inputs: Any) -> RegionLayout | None:
    return encoder.encode(inputs).layout


def placed(layout: RegionLayout) -> tuple[dict[str, Any], bytearray]:
    """The body that refers to region ``r``, and what was written into it."""
    memory = bytearray(layout.nbytes)
    return json.loads(layout.put("r", memoryview(memory))), memory


def place(entry: dict[str, Any]) -> slice:
    parameters = entry["parameters"]
    assert parameters["shared_memory_region"] == "r"
    start = parameters["shared_memory_offset"]
    assert start % 64 == 0
    return slice(start, start + parameters["shared_memory_byte_size"])


def test_inputs_and_outputs_have_places_of_their_own() -> None:
    """Aligned, one after the other; the rest of the request is as it is over HTTP."""
    inputs = (TensorSpec("x", "FP32", (WIDTH,)), TensorSpec("text", "BYTES", (1,)))
    spec = model(TensorSpec("y", "FP64", (3,)), TensorSpec("z", "INT8", (5,)), inputs=inputs)
    encoder = InferRequestEncoder(
        spec,
        parameters={"priority": 2},
        input_parameters={"text": {"content_type": "str"}},
        shared_memory=True,
    )
    x = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
    encoded = encoder.encode({"x": x, "text": np.array([[b"%d"], [b"longer"]], object)})
    assert encoded.layout is not None
    body, memory = placed(encoded.layout)
    over_http = json.loads(bytes(encoded.parts[0]))
    assert body["parameters"] == over_http["parameters"] == {"priority": 2}
    assert [entry["name"] for entry in body["inputs"]] == ["x", "text"]
    assert [entry["shape"] for entry in body["inputs"]] == [entry["shape"] for entry in over_http["inputs"]]
    assert body["inputs"][1]["parameters"]["content_type"] == "str"
    for entry, sent in zip(body["inputs"], (x.tobytes(), b"\2\0\0\0%d\6\0\0\0longer"), strict=True):
        assert memory[place(entry)] == sent
    places = [place(entry) for entry in body["inputs"] + body["outputs"]]
    assert [each.stop - each.start for each in places[2:]] == [2 * 3 * 8, 2 * 5]
    assert all(one.stop <= other.start for one, other in itertools.pairwise(places))
    assert places[-1].stop <= encoded.layout.nbytes


def test_rows_are_written_one_after_the_other() -> None:
    spec = model(TensorSpec("y", "FP32", (1,)))
    encoder = InferRequestEncoder(spec, shared_memory=True)
    rows = [np.full(WIDTH, number, np.float32) for number in range(3)]
    layout = encoder.encode_batch([encoder.prepare(row) for row in rows]).layout
    assert layout is not None
    body, memory = placed(layout)
    assert memory[place(body["inputs"][0])] == np.stack(rows).tobytes()


def test_small_requests_have_no_layout() -> None:
    encoder = InferRequestEncoder(model(TensorSpec("y", "FP32", (1,))), shared_memory=True)
    small = ModelSpec("m", inputs=(TensorSpec("x", "FP32", (4,)),), outputs=(), max_batch_size=8)
    assert layout_of(encoder, np.zeros((1, WIDTH), np.float32)) is not None
    assert layout_of(InferRequestEncoder(small, shared_memory=True), np.zeros((1, 4), np.float32)) is None
    large_answer = ModelSpec(
        "m", inputs=small.inputs, outputs=(TensorSpec("y", "FP32", (WIDTH,)),), max_batch_size=8
    )
    assert layout_of(InferRequestEncoder(large_answer, shared_memory=True), np.zeros((1, 4), np.float32))


def test_without_the_option_and_as_json_there_is_no_layout() -> None:
    spec, x = model(TensorSpec("y", "FP32", (1,))), np.zeros((1, WIDTH), np.float32)
    assert layout_of(InferRequestEncoder(spec), x) is None
    assert layout_of(InferRequestEncoder(spec, binary=False, shared_memory=True), x) is None


def test_the_size_of_a_variable_output_is_learned() -> None:
    """From an answer to the same shapes, a row; after an output that did not fit, outputs have no places."""
    encoder = InferRequestEncoder(model(TensorSpec("y", "FP32", (-1,))), shared_memory=True)
    x = np.zeros((2, WIDTH), np.float32)
    first = layout_of(encoder, x)
    assert first is not None and not first.outputs
    body, _ = placed(first)
    assert body["outputs"] == [{"name": "y", "parameters": {"binary_data": True}}]
    first.learn(InferResponse("m", "1", "", {}, {"y": np.zeros((2, 10), np.float32)}))
    second = layout_of(encoder, np.zeros((3, WIDTH), np.float32))
    assert second is not None and second.outputs["y"].nbytes == 3 * 40
    second.learn(InferResponse("m", "1", "", {}, {"y": np.zeros((3, 7), np.float32)}))
    third = layout_of(encoder, x)
    assert third is not None and third.outputs["y"].nbytes == 2 * 40
    third.outgrown()
    fourth = layout_of(encoder, x)
    assert fourth is not None and not fourth.outputs


def test_byte_strings_and_classes_come_in_the_answer() -> None:
    outputs = (
        TensorSpec("text", "BYTES", (1,)),
        TensorSpec("scores", "FP32", (4,)),
        TensorSpec("y", "FP32", (4,)),
    )
    encoder = InferRequestEncoder(model(*outputs), classification={"scores": 2}, shared_memory=True)
    layout = layout_of(encoder, np.zeros((1, WIDTH), np.float32))
    assert layout is not None and list(layout.outputs) == ["y"]
    body, _ = placed(layout)
    assert body["outputs"][1]["parameters"] == {"classification": 2, "binary_data": True}


def answer(shape: list[int]) -> bytes:
    return json.dumps(
        {
            "model_name": "m",
            "model_version": "1",
            "outputs": [{"name": "y", "datatype": "FP32", "shape": shape}],
        }
    ).encode()


def test_outputs_are_read_where_they_were_placed() -> None:
    memory = memoryview(bytearray(np.arange(6, dtype=np.float32).tobytes()))
    response = decode_infer_response(answer([2, 3]), None, places={"y": memory})
    assert np.array_equal(response.outputs["y"], np.arange(6).reshape(2, 3))
    memory[:4] = np.float32(9).tobytes()
    assert response.outputs["y"][0, 0] == 9


@pytest.mark.parametrize(
    "places", [{}, {"other": memoryview(bytearray(24))}, {"y": memoryview(bytearray(20))}]
)
def test_an_output_without_a_place_that_holds_it_is_an_error(places: dict[str, memoryview]) -> None:
    with pytest.raises(RemoteProtocolError, match="'y'"):
        decode_infer_response(answer([2, 3]), None, places=places)

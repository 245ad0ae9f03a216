"""Response bodies to arrays, and arrays to elements."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.errors import RemoteProtocolError
from beam_triton.protocol import DATATYPES, InferResponse, TensorSpec, decode_infer_response
from tests.unit.protocol.tensors_for_tests import announced, arrays, binary_response, response, same

FP32 = np.dtype("<f4")


@pytest.mark.parametrize("datatype", DATATYPES)
@given(data=st.data())
def test_every_datatype_is_decoded(datatype: str, data: st.DataObject) -> None:
    """Any array in binary, from bytes, bytearray and memoryview."""
    array = data.draw(arrays(datatype))
    body, json_length = binary_response({"y": (datatype, array)})
    for form in (body, bytearray(body), memoryview(body)):
        answer = decode_infer_response(form, json_length)
        assert same(answer.outputs["y"], array)
        assert answer.outputs["y"].dtype == DATATYPES[datatype].array_dtype


@given(st.lists(st.sampled_from(sorted(DATATYPES)), min_size=1, max_size=5), st.data())
def test_several_outputs_are_read_in_the_answers_order(datatypes: list[str], data: st.DataObject) -> None:
    """Offsets follow the answer's order, and JSON outputs may be in between."""
    tensors = {f"y{i}": (datatype, data.draw(arrays(datatype))) for i, datatype in enumerate(datatypes)}
    order = data.draw(st.permutations(sorted(tensors)))
    body, json_length = binary_response({name: tensors[name] for name in order})
    document = json.loads(body[:json_length])
    in_json = {"name": "j", "datatype": "INT32", "shape": [1, 2], "data": [[7, 8]]}
    document["outputs"].insert(data.draw(st.integers(0, len(datatypes))), in_json)
    head = json.dumps(document).encode()
    answer = decode_infer_response(head + body[json_length:], len(head))
    assert set(answer.outputs) == {*tensors, "j"}
    assert answer.outputs["j"].tolist() == [[7, 8]]
    assert all(same(answer.outputs[name], array) for name, (_, array) in tensors.items())


def test_numbers_are_views_of_the_body() -> None:
    """No copy: memory is the body's, aligned or not."""
    for padding in range(4):
        body, json_length = binary_response({"y": ("FP32", np.ones((2, 3), FP32))}, id="x" * padding)
        output = decode_infer_response(body, json_length).outputs["y"]
        assert np.shares_memory(output, np.frombuffer(body, np.uint8)) and not output.flags.writeable
        assert (output + 1).tolist() == [[2.0] * 3] * 2


def test_a_response_that_is_all_json_is_decoded() -> None:
    """No header length: the whole body is the document, its numbers and NaN in JSON."""
    head = b'{"model_name":"m","outputs":[{"name":"y","datatype":"FP32","shape":[2],"data":[1.5,NaN]}]}'
    answer = decode_infer_response(head, None)
    assert np.array_equal(answer.outputs["y"], np.array([1.5, np.nan], FP32), equal_nan=True)
    assert (answer.model_name, answer.model_version, answer.id) == ("m", "", "")


@pytest.mark.parametrize("datatype", DATATYPES)
def test_empty_outputs_are_decoded_without_a_header_length(datatype: str) -> None:
    """Triton leaves the header out when every binary output is empty; there is no data either."""
    body, json_length = response([announced("y", datatype, [2, 0], 0)])
    for length in (None, json_length):
        output = decode_infer_response(body, length).outputs["y"]
        assert output.shape == (2, 0) and output.dtype == DATATYPES[datatype].array_dtype


def test_id_and_parameters_of_a_response_are_returned() -> None:
    """Each response has its own copy."""
    body, json_length = response([announced("y", "FP32", [0], 0)], id="q1", parameters={"triton": 1})
    answer = decode_infer_response(body, json_length)
    assert (answer.id, answer.parameters) == ("q1", {"triton": 1})
    body, json_length = response([announced("y", "FP32", [0], 0)], parameters={"a": 1})
    decode_infer_response(body, json_length).parameters["a"] = 2
    assert decode_infer_response(body, json_length).parameters == {"a": 1}


def test_responses_with_one_header_do_not_share_their_outputs() -> None:
    """Equal headers are parsed once; the arrays belong to each body."""
    first, json_length = binary_response({"y": ("FP32", np.zeros((1, 2), FP32))})
    second, _ = binary_response({"y": ("FP32", np.ones((1, 2), FP32))})
    answers = [decode_infer_response(body, json_length) for body in (first, second, first)]
    assert [answer.outputs["y"].tolist() for answer in answers] == [[[0, 0]], [[1, 1]], [[0, 0]]]


@pytest.mark.parametrize(
    ("beginning", "request_id"),
    [
        ('{"id":"job-1.2_3",', "job-1.2_3"),
        ('{"id":"",', ""),
        ('{"id":"\\u00e9\\"",', '\u00e9"'),
        ('{"id":"first","id":"last",', "last"),
        ('{"id":null,', ""),
        ('{ "id" : "spaced" ,', "spaced"),
    ],
)
def test_answers_that_differ_in_their_id_are_alike_otherwise(beginning: str, request_id: str) -> None:
    """An id at the beginning is read without parsing what follows again; others are parsed."""
    for value in (1.0, 2.0):
        output = '{"name":"y","datatype":"FP32","shape":[1],"parameters":{"binary_data_size":4}}'
        head = f'{beginning}"model_name":"m","model_version":"1","outputs":[{output}]}}'.encode()
        decoded = decode_infer_response(head + np.float32(value).tobytes(), len(head))
        assert decoded.id == request_id
        assert decoded.model_id == "m:1"
        assert decoded.outputs["y"].tolist() == [value]


def test_expected_outputs_must_be_present_with_their_datatype() -> None:
    """A missing output and one of another datatype are refused; more than expected is not."""
    body, json_length = binary_response({name: ("FP32", np.zeros((1, 2), FP32)) for name in "yz"})
    assert decode_infer_response(body, json_length, expected=[TensorSpec("y", "FP32", (2,))])
    with pytest.raises(RemoteProtocolError, match=r"without output 'scores'; it sent 'y', 'z'"):
        decode_infer_response(body, json_length, expected=[TensorSpec("scores", "FP32", (2,))])
    with pytest.raises(RemoteProtocolError, match="'y' of model 'm' is FP32, not INT64"):
        decode_infer_response(body, json_length, expected=[TensorSpec("y", "INT64", (2,))])


Y = announced("y", "FP32", [1, 2], 8)


@pytest.mark.parametrize(
    ("outputs", "tail"),
    [
        ([Y], bytes(7)),
        ([Y], bytes(9)),
        ([Y], b""),
        ([Y, Y], bytes(16)),
        ([{**Y, "shape": [1, 3]}], bytes(8)),
        ([{**Y, "shape": [-1, 2]}], bytes(8)),
        ([{**Y, "shape": [1, "2"]}], bytes(8)),
        ([{**Y, "shape": [1.0, 2]}], bytes(8)),
        ([{**Y, "shape": [True, 2]}], bytes(8)),
        ([{**Y, "shape": 2}], bytes(8)),
        ([{**Y, "shape": None}], bytes(8)),
        ([{**Y, "shape": [2**62]}], bytes(8)),
        ([announced("y", "FP32", [0, 2**63], 0)], b""),
        ([announced("y", "FP32", [0, 2**62, 2**62], 0)], b""),
        ([{**Y, "shape": [1] * 99}], bytes(8)),
        ([{**Y, "shape": [10**300]}], bytes(8)),
        ([{**Y, "datatype": "FP8"}], bytes(8)),
        ([{**Y, "datatype": None}], bytes(8)),
        ([{**Y, "datatype": ["FP32"]}], bytes(8)),
        ([{**Y, "name": None}], bytes(8)),
        ([{**Y, "name": ["y"]}], bytes(8)),
        ([{**Y, "parameters": {"binary_data_size": -8}}], bytes(8)),
        ([{**Y, "parameters": {"binary_data_size": 8.0}}], bytes(8)),
        ([{**Y, "parameters": {"binary_data_size": "8"}}], bytes(8)),
        ([{**Y, "parameters": {"binary_data_size": 2**70}}], bytes(8)),
        ([{**Y, "parameters": {}}], b""),
        ([{**Y, "parameters": ["binary_data_size"]}], bytes(8)),
        ([{**Y, "data": [1.0, 2.0]}], bytes(8)),
        ([announced("y", "BYTES", [1], 8)], b"\x05\0\0\0abcd"),
        ([announced("y", "BYTES", [2], 8)], b"\x04\0\0\0abcd"),
        ([announced("y", "BYTES", [2**62], 8)], bytes(8)),
        ([announced("y", "BYTES", [0], 4)], bytes(4)),
        (["y"], b""),
        ([None], b""),
        ({"y": Y}, bytes(8)),
        (None, b""),
        (5, b""),
    ],
)
def test_a_malformed_answer_is_a_remote_protocol_error(outputs: Any, tail: bytes) -> None:
    """Wrong sizes, shapes, datatypes, names and kinds of JSON: one class of error."""
    body, json_length = response(outputs, tail)
    with pytest.raises(RemoteProtocolError):
        decode_infer_response(body, json_length)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b"<html></html>",
        b"\xff\xfe{\x00}\x00",
        b'{"error": "too late"}',
        b'{"model_name": 5, "outputs": []}',
        b'{"id": 5, "outputs": []}',
        b'{"parameters": [1], "outputs": []}',
        b'{"outputs": [' + b"9" * 5000 + b"]}",
        b"[" * 100_000,
        b'{"outputs":' * 100_000,
        b'{"outputs": [' + b"[" * 900 + b"]" * 900 + b"]}",
    ],
)
def test_json_that_is_not_a_response_is_refused(head: bytes) -> None:
    """No JSON, other JSON, JSON too deep or with numbers too long, with and without a header length."""
    for json_length in (None, len(head)):
        with pytest.raises(RemoteProtocolError):
            decode_infer_response(head, json_length)


@pytest.mark.parametrize("json_length", [-1, 0, 1000, 2**70])
def test_a_header_length_beyond_the_body_is_refused(json_length: int) -> None:
    """Whatever number the header held."""
    with pytest.raises(RemoteProtocolError, match="JSON should have"):
        decode_infer_response(response([])[0], json_length)


def test_decoding_memory_is_bounded_by_the_body() -> None:
    """Names, values and shapes that claim much, and messages about them, cost little more than the body."""
    name = "y" * 10**6
    bodies = [
        response([announced(name, "FP32", [2**40], 2**42)]),
        response([announced("y", "BYTES", [2**40], 10**6)], bytes(10**6)),
        response([{"name": name, "datatype": "FP32", "shape": [2], "data": [[name]] * 2}]),
        response([announced("y", "FP32", [2**60], 2**62)]),
        (b"\x00" * 10**6, 10**6),
    ]
    for body, json_length in bodies:
        tracemalloc.start()
        try:
            with pytest.raises(RemoteProtocolError) as caught:
                decode_infer_response(body, json_length)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 8 * len(body) + 10**5
        assert len(str(caught.value)) < 1000


@given(st.integers(1, 5), st.lists(st.sampled_from(sorted(DATATYPES)), min_size=1, max_size=4), st.data())
def test_each_element_gets_its_rows(n: int, datatypes: list[str], data: st.DataObject) -> None:
    """One dict per element, rows without the batch dimension, arrays even if no dimension is left."""
    shapes = st.sampled_from([(), (1,), (3,), (0,), (2, 2)])
    columns = {
        f"y{i}": (datatype, data.draw(arrays(datatype, (n, *data.draw(shapes)))))
        for i, datatype in enumerate(datatypes)
    }
    answer = decode_infer_response(*binary_response(columns))
    elements = list(answer.rows(n))
    assert len(elements) == n
    for index, element in enumerate(elements):
        assert list(element) == list(columns)
        for name, row in element.items():
            assert isinstance(row, np.ndarray) and row.dtype == answer.outputs[name].dtype
            assert same(row, np.asarray(answer.outputs[name][index : index + 1]).reshape(row.shape))
            assert row.shape == columns[name][1].shape[1:]
    assert answer.whole() is answer.outputs


@pytest.mark.parametrize("shape", [(), (1, 2), (3, 2), (0, 2)])
def test_an_answer_with_too_few_or_too_many_rows_is_refused(shape: tuple[int, ...]) -> None:
    """One row too few or too many, or no rows at all: nothing is truncated."""
    answer = decode_infer_response(
        *binary_response({"x": ("FP32", np.zeros((2, 1), FP32)), "y": ("FP32", np.zeros(shape, FP32))})
    )
    with pytest.raises(RemoteProtocolError, match=r"output 'y'.*must be 2"):
        answer.rows(2)


def test_an_answer_without_outputs_is_refused() -> None:
    """Otherwise elements would be lost silently."""
    with pytest.raises(RemoteProtocolError, match="without outputs"):
        InferResponse("m", "1", "", {}, {}).rows(1)

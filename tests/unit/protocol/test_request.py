"""Elements to request bodies, read back as a server reads them."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from beam_triton.errors import ConfigurationError, LocalProtocolError
from beam_triton.protocol import (
    DATATYPES,
    EncodedRequest,
    InferRequestEncoder,
    ModelSpec,
    TensorSpec,
)
from beam_triton.protocol.datatypes import Array
from beam_triton.protocol.request import LARGE_BUFFER_BYTES
from tests.unit.protocol.tensors_for_tests import array_of, arrays, same

IMAGE = TensorSpec("image", "FP32", (-1,))
TEXT = TensorSpec("text", "BYTES", (1,))
FACTOR = TensorSpec("factor", "FP32", (1,), optional=True)
SCORES = TensorSpec("scores", "FP32", (10,))


def model(*inputs: TensorSpec, outputs: tuple[TensorSpec, ...] = (SCORES,), limit: int = 8) -> ModelSpec:
    return ModelSpec("digits", "1", inputs, outputs, limit)


def read(request: EncodedRequest) -> tuple[dict[str, Any], dict[str, Array]]:
    """The JSON and the tensors of a request, parsed by the rules of the extension."""
    body = b"".join(request.parts)
    assert len(body) == request.content_length
    if request.json_length is None:
        assert request.content_type == "application/json"
        document = json.loads(body)
        return document, {}
    assert request.content_type == "application/octet-stream"
    document = json.loads(body[: request.json_length])
    start = request.json_length
    tensors = {}
    for entry in document["inputs"]:
        end = start + entry["parameters"]["binary_data_size"]
        tensors[entry["name"]] = array_of(body[start:end], entry["datatype"], entry["shape"])
        start = end
    assert start == len(body)
    return document, tensors


@pytest.mark.parametrize("datatype", DATATYPES)
@given(data=st.data())
def test_elements_of_every_datatype_are_stacked_in_order(datatype: str, data: st.DataObject) -> None:
    """Elements of one shape, any datatype: the server sees them stacked, in their order."""
    rows = data.draw(
        arrays(datatype, data.draw(st.sampled_from([(), (1,), (3,), (2, 0), (2, 2)]))).flatmap(
            lambda one: st.lists(arrays(datatype, one.shape), min_size=1, max_size=4)
        )
    )
    spec = TensorSpec("x", datatype, (-1,) * rows[0].ndim)
    encoder = InferRequestEncoder(model(spec))
    document, tensors = read(encoder.encode_batch([encoder.prepare(row) for row in rows]))
    expected = np.stack(rows) if rows else rows[0]
    assert document["inputs"][0]["shape"] == list(expected.shape)
    assert same(tensors["x"], expected)
    assert same(read(encoder.encode({"x": expected}))[1]["x"], expected)


def test_the_header_asks_for_every_output_in_binary() -> None:
    """Each output carries its own binary_data: Triton ignores the request's for outputs that it lists."""
    encoder = InferRequestEncoder(model(IMAGE, outputs=(SCORES, TEXT)))
    document, _ = read(encoder.encode_batch([encoder.prepare([1.0])]))
    assert document["outputs"] == [
        {"name": "scores", "parameters": {"binary_data": True}},
        {"name": "text", "parameters": {"binary_data": True}},
    ]
    assert "parameters" not in document and "id" not in document
    assert encoder.expected_outputs == (SCORES, TEXT)


def test_binary_is_requested_for_all_outputs_of_a_model_that_names_none() -> None:
    """Without names, only the request-wide parameter can ask for it."""
    encoder = InferRequestEncoder(model(IMAGE, outputs=()), parameters={"priority": 1})
    document, _ = read(encoder.encode_batch([encoder.prepare([1.0])]))
    assert document["parameters"] == {"priority": 1, "binary_data_output": True}
    assert "outputs" not in document


def test_named_outputs_and_classification_are_requested() -> None:
    """Only the named outputs, with the number of classes if one was given."""
    encoder = InferRequestEncoder(
        model(IMAGE, outputs=(SCORES, TEXT)), outputs=["scores"], classification={"scores": 3}
    )
    document, _ = read(encoder.encode_batch([encoder.prepare([1.0])]))
    assert document["outputs"] == [
        {"name": "scores", "parameters": {"classification": 3, "binary_data": True}}
    ]
    assert encoder.expected_outputs == (TensorSpec("scores", "BYTES", (3,)),)


def test_parameters_and_id_of_a_request_do_not_reach_the_next() -> None:
    """A request's own parameters override the encoder's, and are absent from the next request."""
    encoder = InferRequestEncoder(model(IMAGE), parameters={"priority": 1, "tag": "a"})
    element = encoder.prepare([1.0])
    own, _ = read(encoder.encode_in_parts([[1.0]], parameters={"tag": "b"}, request_id='q"1')[0])
    assert own["parameters"] == {"priority": 1, "tag": "b"} and own["id"] == 'q"1'
    own, _ = read(encoder.encode_batch([element], parameters={"tag": "b"}))
    assert own["parameters"] == {"priority": 1, "tag": "b"}
    following, _ = read(encoder.encode_batch([element]))
    assert following["parameters"] == {"priority": 1, "tag": "a"} and "id" not in following


@given(st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=8))
@example("100%", "%d%s")
def test_tensor_names_of_any_characters_are_sent_unchanged(input_name: str, output_name: str) -> None:
    """Quotes, percent signs, line breaks and surrogates in names reach the server as they are."""
    for datatype, value in (("BYTES", "a"), ("FP32", 1.0)):
        spec = TensorSpec(input_name, datatype, (1,))
        for binary in (True, False):
            encoder = InferRequestEncoder(
                model(spec, outputs=(TensorSpec(output_name, "FP32", (1,)),)),
                outputs=[output_name],
                binary=binary,
            )
            document, _ = read(encoder.encode_batch([encoder.prepare(value)]))
            assert document["inputs"][0]["name"] == input_name
            assert document["outputs"][0]["name"] == output_name


def test_an_array_that_needs_no_cast_is_not_copied() -> None:
    """The element's own memory is sent, for the first array of a shape and for later ones."""
    encoder = InferRequestEncoder(model(IMAGE))
    for _ in range(2):
        image = np.arange(LARGE_BUFFER_BYTES // 4, dtype="<f4")
        prepared = encoder.prepare(image)
        assert prepared.buffers[0] is image and prepared.nbytes == image.nbytes
        part = encoder.encode_batch([prepared, prepared]).parts[1]
        assert np.shares_memory(np.frombuffer(part, np.uint8), image)
        batch = image.reshape(1, -1)
        assert np.shares_memory(np.frombuffer(encoder.encode(batch).parts[1], np.uint8), batch)


def test_small_elements_are_joined_and_large_ones_gathered() -> None:
    """One part per input if the elements are small, one per element from 64 KiB on."""
    encoder = InferRequestEncoder(model(IMAGE, TEXT))
    small = [encoder.prepare({"image": np.zeros(3, "<f4"), "text": "a"}) for _ in range(4)]
    assert len(encoder.encode_batch(small).parts) == 1 + 1 + 1
    large = [
        encoder.prepare(
            {"image": np.full(LARGE_BUFFER_BYTES, index, "<f4"), "text": "a" * LARGE_BUFFER_BYTES}
        )
        for index in range(4)
    ]
    request = encoder.encode_batch(large)
    assert len(request.parts) == 1 + 4 + 4
    _, tensors = read(request)
    assert tensors["image"][:, -1].tolist() == [0, 1, 2, 3]
    assert tensors["text"].tolist() == [[b"a" * LARGE_BUFFER_BYTES]] * 4


@pytest.mark.parametrize("wrong", ["big-endian", "strided", "float64", "list", "other shape"])
def test_an_accepted_shape_does_not_accept_other_dtypes_or_layouts(wrong: str) -> None:
    """After an array was accepted, others of its shape are still converted or refused."""
    encoder = InferRequestEncoder(model(TensorSpec("x", "FP32", (4,))))
    values = np.array([1, 2, 3, 4], "<f4")
    encoder.prepare(values)
    other = {
        "big-endian": values.astype(">f4"),
        "strided": np.repeat(values, 2)[::2],
        "float64": values.astype("f8"),
        "list": values.tolist(),
        "other shape": values.reshape(2, 2),
    }[wrong]
    if wrong == "other shape":
        with pytest.raises(LocalProtocolError, match="shape"):
            encoder.prepare(other)
    else:
        _, tensors = read(encoder.encode_batch([encoder.prepare(other)]))
        assert tensors["x"].tolist() == [[1, 2, 3, 4]]


@given(
    st.sampled_from([name for name in DATATYPES if name != "BYTES"]),
    st.integers(-(2**70), 2**70) | st.floats() | st.booleans(),
)
def test_single_numbers_are_encoded_like_arrays_of_them(datatype: str, value: Any) -> None:
    """A bare Python number and a list of it: same bytes, or both refused."""
    encoder = InferRequestEncoder(model(TensorSpec("x", datatype, (1,))))
    outcomes = []
    for form in (value, [value], np.array([value], dtype=object)):
        try:
            outcomes.append(b"".join(encoder.encode_batch([encoder.prepare(form)]).parts))
        except LocalProtocolError:
            outcomes.append(b"refused")
    if isinstance(value, float) and math.isnan(value):
        assert len({outcome == b"refused" for outcome in outcomes}) == 1
    else:
        assert len(set(outcomes)) == 1


def test_optional_inputs_change_the_signature() -> None:
    """Elements with and without an optional input do not share a request."""
    encoder = InferRequestEncoder(model(IMAGE, FACTOR))
    without = encoder.prepare({"image": [1.0, 2.0]})
    assert without.signature == encoder.prepare({"image": [3.0, 4.0], "factor": None}).signature
    with_factor = encoder.prepare({"image": [1.0, 2.0], "factor": 3})
    assert with_factor.signature != without.signature
    document, tensors = read(encoder.encode_batch([without, without]))
    assert [entry["name"] for entry in document["inputs"]] == ["image"]
    document, tensors = read(encoder.encode_batch([with_factor]))
    assert tensors["factor"].tolist() == [[3.0]]
    assert [entry["name"] for entry in read(encoder.encode({"image": [[1.0]]}))[0]["inputs"]] == ["image"]


def test_equal_shapes_make_equal_signatures() -> None:
    """Ragged elements have different signatures, equal shapes equal ones, whatever they were made from."""
    encoder = InferRequestEncoder(model(IMAGE))
    two = encoder.prepare(np.zeros(2, "<f4")).signature
    assert two == encoder.prepare([1.0, 2.0]).signature == encoder.prepare({"image": (1, 2)}).signature
    assert two != encoder.prepare([1.0, 2.0, 3.0]).signature
    assert hash(two) == hash(encoder.prepare([5.0, 6.0]).signature)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"image": [1.0]}, "input 'text' of model 'digits' is missing"),
        ({"image": [1.0], "text": None}, "input 'text' of model 'digits' is missing"),
        ({"image": [1.0], "text": "a", "img": 1}, "has no input 'img'"),
        ({"Image": [1.0], "text": "a"}, "has no input 'Image'"),
        ({"image": [1.0], "text": "a", 3: 1}, "has no input 3"),
        ([1.0], "must map names to values"),
        (None, "must map names to values"),
    ],
)
@pytest.mark.parametrize("way", ["prepare", "encode"])
def test_missing_and_unknown_inputs_are_refused_with_the_models_inputs(
    inputs: Any, says: str, way: str
) -> None:
    """Missing and unknown inputs, with the model's own inputs in the message."""
    encoder = InferRequestEncoder(model(IMAGE, TEXT))
    with pytest.raises(LocalProtocolError, match=says) as caught:
        getattr(encoder, way)(inputs)
    if "pixels" not in says:
        assert "image FP32 [-1], text BYTES [1]" in str(caught.value)


def test_missing_and_unknown_inputs_of_a_one_input_model_are_refused() -> None:
    """The fast path for one input raises the same errors."""
    encoder = InferRequestEncoder(model(IMAGE))
    for inputs in ({"img": [1.0]}, {"image": [1.0], "extra": 1}):
        with pytest.raises(LocalProtocolError, match="has no input"):
            encoder.prepare(inputs)
    with pytest.raises(LocalProtocolError, match="is missing"):
        encoder.prepare({})
    with pytest.raises(LocalProtocolError, match="is missing"):
        encoder.prepare({"image": None})


def test_an_element_without_any_input_is_refused() -> None:
    """A request needs an input even if all are optional."""
    encoder = InferRequestEncoder(model(FACTOR, TensorSpec("other", "FP32", (1,), optional=True)))
    with pytest.raises(LocalProtocolError, match="at least one input"):
        encoder.prepare({})


def test_unnamed_inputs_come_from_the_element() -> None:
    """A server that names no inputs gets the element's own names and datatypes."""
    encoder = InferRequestEncoder(ModelSpec("any", outputs=(), max_batch_size=4))
    rows = [{"a": np.array([1, 2], np.int16), "b": "text"}, {"a": np.array([3, 4], np.int16), "b": "more"}]
    document, tensors = read(encoder.encode_batch([encoder.prepare(row) for row in rows]))
    assert [(e["name"], e["datatype"], e["shape"]) for e in document["inputs"]] == [
        ("a", "INT16", [2, 2]),
        ("b", "BYTES", [2]),
    ]
    assert tensors["a"].tolist() == [[1, 2], [3, 4]] and tensors["b"].tolist() == [b"text", b"more"]
    assert encoder.prepare({"a": 1.0}).signature != encoder.prepare({"a": 1}).signature
    document, tensors = read(encoder.encode({"a": np.ones((3, 2), np.int8)}))
    assert document["inputs"][0]["shape"] == [3, 2] and document["inputs"][0]["datatype"] == "INT8"
    for wrong in ({}, {"": 1}, {"a": None}, {"a": 1 + 2j}, [1.0]):
        with pytest.raises(LocalProtocolError):
            encoder.prepare(wrong)


def test_a_model_without_a_batch_dimension_takes_one_element_unchanged() -> None:
    """No dimension is added, and two elements are refused."""
    encoder = InferRequestEncoder(model(IMAGE, limit=0))
    element = encoder.prepare([1.0, 2.0])
    document, _ = read(encoder.encode_batch([element]))
    assert document["inputs"][0]["shape"] == [2]
    assert read(encoder.encode([1.0, 2.0]))[0]["inputs"][0]["shape"] == [2]
    with pytest.raises(LocalProtocolError, match="no batch dimension"):
        encoder.encode_batch([element, element])


def test_empty_oversized_and_uneven_batches_are_refused() -> None:
    """None, too many, unequal batch dimensions, mixed signatures."""
    encoder = InferRequestEncoder(model(IMAGE, TEXT, limit=2))
    element = encoder.prepare({"image": [1.0], "text": "a"})
    with pytest.raises(LocalProtocolError, match="at least one element"):
        encoder.encode_batch([])
    with pytest.raises(LocalProtocolError, match="at most 2 elements a request, not 3"):
        encoder.encode_batch([element] * 3)
    with pytest.raises(LocalProtocolError, match="at most 2 elements"):
        encoder.encode({"image": np.zeros((3, 1), "f4"), "text": [["a"]] * 3})
    with pytest.raises(LocalProtocolError, match="batch dimension is 0"):
        encoder.encode({"image": np.zeros((0, 1), "f4"), "text": np.zeros((0, 1), "S1")})
    with pytest.raises(LocalProtocolError, match=r"batch dimensions of the inputs differ.*'image': 1"):
        encoder.encode({"image": np.zeros((1, 1), "f4"), "text": [["a"]] * 2})
    with pytest.raises(LocalProtocolError, match="one signature"):
        encoder.encode_batch([element, encoder.prepare({"image": [1.0, 2.0], "text": "a"})])


def test_requests_of_two_gibibytes_are_refused() -> None:
    """Lengths are 32-bit integers in the server; the array here is never touched, so it costs no memory."""
    encoder = InferRequestEncoder(model(TensorSpec("x", "UINT8", (-1,))))
    with pytest.raises(LocalProtocolError, match="2 GiB"):
        encoder.encode_batch([encoder.prepare(np.zeros(2**31, np.uint8))])


@given(st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1, max_size=4))
def test_json_requests_hold_the_same_values(rows: list[list[float]]) -> None:
    """Without the binary extension everything is one JSON document; what is not finite is null."""
    encoder = InferRequestEncoder(model(TensorSpec("x", "FP32", (3,)), TEXT), binary=False)
    elements = [encoder.prepare({"x": row, "text": f'"{index}'}) for index, row in enumerate(rows)]
    document, _ = read(encoder.encode_batch(elements, parameters={"tag": "a"}))
    x, text = document["inputs"]
    assert (x["shape"], text["shape"]) == ([len(rows), 3], [len(rows), 1])
    values = np.array(rows, "f4").ravel()
    assert x["data"] == [value if np.isfinite(value) else None for value in values.tolist()]
    assert text["data"] == [f'"{index}' for index in range(len(rows))]
    assert document["parameters"] == {"tag": "a"} and "outputs" not in document
    tensors = {"x": rows, "text": [[f'"{i}'] for i in range(len(rows))]}
    whole, _ = read(encoder.encode_in_parts(tensors, request_id="q")[0])
    assert whole["id"] == "q"
    assert whole["inputs"][0]["data"] == x["data"]


def test_empty_elements_are_an_empty_json_list() -> None:
    """Nothing stands between elements that hold nothing."""
    encoder = InferRequestEncoder(model(TensorSpec("x", "FP32", (-1,))), binary=False)
    document, _ = read(encoder.encode_batch([encoder.prepare(np.empty(0, "f4"))] * 3))
    assert (document["inputs"][0]["shape"], document["inputs"][0]["data"]) == ([3, 0], [])


@pytest.mark.parametrize("binary", [True, False])
def test_inputs_carry_their_own_parameters(binary: bool) -> None:
    """MLServer's content types; beside the size of a binary tensor, and of that input only."""
    parameters = {"text": {"content_type": "100% str"}}
    spec = model(TensorSpec("x", "FP32", (1,)), TEXT)
    encoder = InferRequestEncoder(spec, input_parameters=parameters, binary=binary)
    document, _ = read(encoder.encode_batch([encoder.prepare({"x": 1.0, "text": "a"})]))
    x, text = document["inputs"]
    assert text["parameters"] == {"content_type": "100% str"} | ({"binary_data_size": 5} if binary else {})
    assert "content_type" not in x.get("parameters", {})
    with pytest.raises(ConfigurationError, match="no input 'picture'"):
        InferRequestEncoder(spec, input_parameters={"picture": {}})


def test_json_requests_insist_on_named_outputs_only() -> None:
    """Metadata may name outputs that come when they are asked for; binary requests ask for all."""
    outputs = (SCORES, TEXT)
    assert InferRequestEncoder(model(IMAGE, outputs=outputs)).required_outputs == outputs
    taken = InferRequestEncoder(model(IMAGE, outputs=outputs), binary=False)
    assert (taken.expected_outputs, taken.required_outputs) == (outputs, ())
    asked = InferRequestEncoder(model(IMAGE, outputs=outputs), outputs=["scores"], binary=False)
    assert asked.required_outputs == (SCORES,)


def test_large_json_elements_are_gathered_with_commas_between() -> None:
    """Elements of 64 KiB and more are separate parts of one JSON array."""
    encoder = InferRequestEncoder(model(IMAGE), binary=False)
    elements = [encoder.prepare([float(index)] * LARGE_BUFFER_BYTES) for index in range(3)]
    document, _ = read(encoder.encode_batch(elements))
    assert document["inputs"][0]["data"][::LARGE_BUFFER_BYTES] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "options",
    [
        {"outputs": ["nope"]},
        {"outputs": []},
        {"outputs": "scores"},
        {"outputs": ["scores", "scores"]},
        {"outputs": [1]},
        {"classification": {"nope": 1}},
        {"classification": {"scores": 0}},
        {"classification": {"scores": True}},
        {"classification": {"scores": "3"}},
        {"classification": ["scores"]},
        {"outputs": ["text"], "classification": {"scores": 1}},
        {"parameters": {"triton_x": 1}},
    ],
)
def test_wrong_encoder_options_are_refused_at_construction(options: dict[str, Any]) -> None:
    """Before any element is seen, as a configuration error."""
    with pytest.raises(ConfigurationError):
        InferRequestEncoder(model(IMAGE, outputs=(SCORES, TEXT)), **options)


def test_a_request_id_must_be_a_string() -> None:
    """Triton answers 500 to a number."""
    encoder = InferRequestEncoder(model(IMAGE))
    with pytest.raises(ConfigurationError, match="request_id"):
        encoder.encode_in_parts([[1.0]], request_id=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 20])
def test_more_rows_than_the_model_takes_become_several_requests(rows: int) -> None:
    """Parts hold the rows in order, as many as the model takes, whether given as an array or as a list."""
    encoder = InferRequestEncoder(model(IMAGE, TEXT))
    image = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    text = [[f"row {row}"] for row in range(rows)]
    parts = encoder.encode_in_parts({"image": image, "text": text}, request_id="7")
    tensors = [read(part)[1] for part in parts]
    assert [len(part["image"]) for part in tensors] == [8] * (rows // 8) + [rows % 8] * (rows % 8 > 0)
    assert np.concatenate([part["image"] for part in tensors]).tolist() == image.tolist()
    sent = np.concatenate([part["text"] for part in tensors])
    assert [bytes(value).decode() for value in sent.ravel()] == [value for (value,) in text]


@pytest.mark.parametrize("value", [np.float32(3), np.array(3.0), 3.0, [], np.zeros((0, 3))])
def test_values_without_rows_are_refused_as_a_batch(value: Any) -> None:
    """A value without a batch dimension, or with an empty one."""
    with pytest.raises(LocalProtocolError, match=r"image|batch"):
        InferRequestEncoder(model(IMAGE)).encode_in_parts(value)


def test_batch_dimensions_that_differ_are_refused() -> None:
    """Nine rows of one input and eight of another are refused before any split."""
    encoder = InferRequestEncoder(model(IMAGE, TEXT))
    with pytest.raises(LocalProtocolError, match=r"differ: \{'image': 9, 'text': 8\}"):
        encoder.encode_in_parts({"image": np.zeros((9, 3), np.float32), "text": [["a"]] * 8})


def test_integers_for_a_floating_input_are_mentioned_once_a_process_and_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever brings them; not Python's own numbers, and not arrays of floats."""
    pixels = np.arange(4, dtype=np.uint8)
    for name in ("first", "first", "second"):
        encoder = InferRequestEncoder(ModelSpec(f"{name} of integers", inputs=(IMAGE,), max_batch_size=8))
        encoder.prepare([1, 2, 3])
        encoder.prepare(np.zeros(4))
        encoder.prepare(pixels)
        encoder.encode(pixels[np.newaxis])
    encoder = InferRequestEncoder(ModelSpec("third of integers", inputs=(IMAGE,), max_batch_size=8))
    encoder.encode(pixels[np.newaxis])
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(":")[0] for text in said] == [
        f"model '{name} of integers'" for name in ("first", "second", "third")
    ]
    assert "input 'image' takes FP32 and is given uint8" in said[0]

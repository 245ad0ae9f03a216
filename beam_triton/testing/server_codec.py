"""The server's side of the protocol: the bytes of an infer request to arrays, arrays to an answer's bytes.

Requests are checked in the order in which Triton 2.51 checks them, and refused with its statuses and the
beginnings of its messages, from which clients draw conclusions. A missing check is a request that passes here
and fails in production, so that every check stands beside the real server in
``tests/integration/test_fake_triton_against_triton.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from beam_triton.errors import LocalProtocolError, RemoteProtocolError
from beam_triton.protocol import DATATYPES, ModelSpec, TensorSpec, to_array
from beam_triton.protocol.bfloat16 import widen_bfloat16
from beam_triton.protocol.byte_strings import decode_byte_strings, object_array
from beam_triton.protocol.datatypes import BF16, Array
from beam_triton.protocol.json_tensors import from_json_data
from beam_triton.protocol.tensors import element_count, wire_bytes

_NO_ID = "[request id: <id_unknown>] "
# What Triton says of a JSON value of the wrong kind, by the kind of the datatype's dtype.
_WRONG_JSON = {
    "b": "Unable to parse 'data': attempt to access JSON non-boolean as boolean",
    "i": "Unable to parse 'data': attempt to access JSON non-signed-integer as signed-integer",
    "u": "Unable to parse 'data': attempt to access JSON non-unsigned-integer as unsigned-integer",
    "f": "Unable to parse 'data': attempt to access JSON non-number as double",
    "O": "Unable to parse JSON bytes array: attempt to access JSON non-string as string",
}
_BATCH_NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended "
    "to each input shape."
)


class RefusedError(Exception):
    """The request gets an error answer: ``status`` and ``message``, the ``error`` of its JSON body."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True)
class RequestedOutput:
    """An output that a request asks for; ``classes`` above 0 asks for its best classes instead."""

    name: str
    is_binary: bool = False
    classes: int = 0


@dataclass(frozen=True)
class InferRequest:
    """A request that fits the model. ``batch_size`` is 1 where the model has no batch dimension.

    ``inputs`` are read-only arrays, with the batch dimension where the model has one; BYTES are object arrays
    of ``bytes``, BF16 is widened to float32.
    """

    id: str
    parameters: dict[str, Any]
    inputs: dict[str, Array]
    outputs: tuple[RequestedOutput, ...]
    batch_size: int


@dataclass
class _Input:
    """An input as the request's JSON gives it: its values are JSON ``data``, or ``raw`` bytes."""

    name: str
    datatype: str
    shape: list[int]
    data: Any = None
    raw: bytes | memoryview | None = None


def decode_infer_request(model: ModelSpec, body: bytes, json_bytes: int | None) -> InferRequest:
    """The request in ``body``, of which the first ``json_bytes`` are JSON; None means all of them.

    Raises RefusedError for a request that Triton would refuse.
    """
    document, tensors = _split(body, json_bytes)
    request_id = _member(document, "id", str, "JSON non-string as string") if "id" in document else ""
    try:
        return _decode(model, document, tensors, request_id)
    except RefusedError as error:
        if not request_id:
            raise
        named = error.message.replace(_NO_ID, f"[request id: {request_id}] ")
        raise RefusedError(error.status, named) from None


def _decode(model: ModelSpec, document: dict[str, Any], tensors: memoryview, request_id: str) -> InferRequest:
    inputs = _read_inputs(model, document, tensors)
    outputs = _read_outputs(model, document)
    parameters = _read_parameters(document)
    batch_size = _check_against_model(model, inputs)
    arrays = {each.name: _to_array(model, each) for each in inputs}
    return InferRequest(request_id, parameters, arrays, outputs, batch_size)


def _split(body: bytes, json_bytes: int | None) -> tuple[dict[str, Any], memoryview]:
    if json_bytes is None:
        json_bytes = len(body)
    if not 0 < json_bytes <= len(body):
        raise RefusedError(
            400, f"inference header size should be in range (0, {len(body)}), got: {json_bytes}"
        )
    try:
        document = json.loads(body[:json_bytes])
    except (ValueError, RecursionError) as error:
        raise RefusedError(500, f"failed to parse the request JSON buffer: {error}") from None
    return (document if isinstance(document, dict) else {}), memoryview(body)[json_bytes:]


def _read_inputs(model: ModelSpec, document: dict[str, Any], tensors: memoryview) -> list[_Input]:
    inputs: dict[str, _Input] = {}
    for entry in _member(document, "inputs", list, "JSON non-array as array"):
        each = _Input(
            _member(entry, "name", str, "JSON non-string as string"),
            _member(entry, "datatype", str, "JSON non-string as string"),
            _member(entry, "shape", list, "JSON non-array as array"),
            entry.get("data"),
        )
        if not all(type(dim) is int and dim >= 0 for dim in each.shape):
            raise RefusedError(
                500,
                "Unable to parse 'shape': attempt to access JSON non-unsigned-integer as unsigned-integer",
            )
        if each.datatype not in DATATYPES:
            raise RefusedError(400, f"invalid datatype for input {each.name}")
        if each.name in inputs:
            raise RefusedError(400, f"{_NO_ID}input '{each.name}' already exists in request")
        size = (entry.get("parameters") or {}).get("binary_data_size")
        if (size is None) == ("data" not in entry):
            found = "But no field is set" if size is None else "But set 'data' 'binary_data_size'"
            raise RefusedError(
                400,
                "Input must set only one of the following fields: 'data', 'binary_data_size' in "
                f"'parameters', 'shared_memory_region' in 'parameters'. {found}",
            )
        if size is not None:
            each.raw, tensors = tensors[:size], tensors[size:]
            if len(each.raw) < size:
                raise RefusedError(
                    400,
                    f"unexpected size for input '{each.name}', expecting {size - len(each.raw)} additional "
                    f"bytes for model '{model.name}'",
                )
        elif not DATATYPES[each.datatype].has_json:
            raise RefusedError(
                400,
                f"receiving {each.datatype} data via JSON is not supported. Please use the binary data "
                f"format for input {each.name}",
            )
        else:
            each.data = _from_json(each)
        inputs[each.name] = each
    if tensors:
        raise RefusedError(400, f"unexpected additional input data for model '{model.name}'")
    return list(inputs.values())


def _member(entry: Any, key: str, kind: type, wrong_kind: str) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        raise RefusedError(
            500, f"Unable to parse '{key}': attempt to access non-existing object member '{key}'"
        )
    if not isinstance(entry[key], kind):
        raise RefusedError(500, f"Unable to parse '{key}': attempt to access {wrong_kind}")
    return entry[key]


def _from_json(given: _Input) -> Array:
    if _count(given.data) != np.prod(given.shape, dtype=object):
        raise RefusedError(500, "Unable to parse 'data': Shape does not match true shape of 'data' field")
    try:
        return from_json_data(given.data, given.datatype, given.shape, given.name, is_strict=True)
    except RemoteProtocolError:
        raise RefusedError(500, _WRONG_JSON[DATATYPES[given.datatype].wire_dtype.kind]) from None


def _count(data: Any) -> int:
    return sum(map(_count, data)) if isinstance(data, list) else 1


def _read_outputs(model: ModelSpec, document: dict[str, Any]) -> tuple[RequestedOutput, ...]:
    asked = document.get("outputs") or []
    known = [spec.name for spec in model.outputs]
    if not asked:
        parameters = document.get("parameters")
        # Only outputs that the request does not list heed this one.
        is_binary = isinstance(parameters, dict) and parameters.get("binary_data_output") is True
        return tuple(RequestedOutput(name, is_binary) for name in known)
    outputs = []
    for entry in asked:
        name = _member(entry, "name", str, "JSON non-string as string")
        parameters = entry.get("parameters") or {}
        outputs.append(
            RequestedOutput(
                name, parameters.get("binary_data") is True, int(parameters.get("classification") or 0)
            )
        )
    for output in outputs:
        if output.name not in known:
            raise RefusedError(400, f"unexpected inference output '{output.name}' for model '{model.name}'")
    return tuple(outputs)


def _read_parameters(document: dict[str, Any]) -> dict[str, Any]:
    parameters = document.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise RefusedError(500, "failed to get request params.: attempt to get members for non-object")
    for key, value in parameters.items():
        if key in ("priority", "timeout") and (type(value) is not int or value < 0):
            raise RefusedError(
                500,
                f"Unable to parse '{key}': attempt to access JSON non-unsigned-integer as unsigned-integer",
            )
        if key.startswith("triton_"):
            raise RefusedError(
                400,
                "parameter keys starting with 'triton_' are reserved for Triton usage and should not be "
                "specified.",
            )
        if not isinstance(value, (bool, int, float, str)):
            raise RefusedError(
                400,
                f"parameter '{key}' has invalid type. It should be either 'int', 'bool', or 'string'.",
            )
    return parameters


def _check_against_model(model: ModelSpec, inputs: Sequence[_Input]) -> int:
    """The batch size of inputs that the model takes: names, datatypes, then shapes."""
    specs = {spec.name: spec for spec in model.inputs}
    _check_names(model, specs, [each.name for each in inputs])
    batch_size = None
    for each in inputs:
        spec = specs[each.name]
        if each.datatype != spec.datatype:
            raise RefusedError(
                400,
                f"{_NO_ID}inference input '{each.name}' data-type is '{each.datatype}', but model "
                f"'{model.name}' expects '{spec.datatype}'",
            )
        wanted = [-1, *spec.shape] if model.has_batch_dimension else list(spec.shape)
        fits = len(wanted) == len(each.shape) and all(
            want in (-1, dim) for want, dim in zip(wanted, each.shape, strict=True)
        )
        if model.has_batch_dimension and each.shape:
            batch_size = each.shape[0] if batch_size is None else batch_size
            if each.shape[0] != batch_size:
                raise RefusedError(
                    400,
                    f"{_NO_ID}input '{each.name}' batch size does not match other inputs for '{model.name}'",
                )
        if not fits:
            note = _BATCH_NOTE if model.has_batch_dimension else ""
            raise RefusedError(
                400,
                f"{_NO_ID}unexpected shape for input '{each.name}' for model '{model.name}'. Expected "
                f"{_shape_text(wanted)}, got {_shape_text(each.shape)}. {note}",
            )
    if not model.has_batch_dimension:
        return 1
    if batch_size is None or batch_size > model.max_batch_size:
        raise RefusedError(
            400,
            f"{_NO_ID}inference request batch-size must be <= {model.max_batch_size} for '{model.name}'",
        )
    if batch_size == 0:
        raise RefusedError(
            400,
            f"{_NO_ID}input byte size mismatch for input '{inputs[0].name}' for model '{model.name}'. "
            f"Expected more, got 0",
        )
    return batch_size


def _check_names(model: ModelSpec, specs: Mapping[str, TensorSpec], names: Sequence[str]) -> None:
    required = [name for name, spec in specs.items() if not spec.optional]
    if not len(required) <= len(names) <= len(specs):
        expected = f"{len(specs)} inputs"
        if len(required) < len(specs):
            expected = f"number of inputs between {len(required)} and {len(specs)}"
        missing = [name for name in required if name not in names]
        raise RefusedError(
            400,
            f"{_NO_ID}expected {expected} but got {len(names)} inputs for model '{model.name}'. Got input(s) "
            f"{_name_list(sorted(names))}, but missing required input(s) {_name_list(missing)}. Please "
            f"provide all required input(s).",
        )
    for name in names:
        if name not in specs:
            raise RefusedError(400, f"unexpected inference input '{name}' for model '{model.name}'")


def _name_list(names: Sequence[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"


def _shape_text(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def _from_wire(raw: memoryview, datatype: str, shape: Sequence[int], name: str) -> Array:
    """The tensor that ``raw`` holds: a view of it, but for BYTES (an object array) and BF16 (float32)."""
    kind = DATATYPES[datatype]
    count = element_count(shape, name)
    if kind.is_bytes:
        return object_array(decode_byte_strings(raw, count, name), count, tuple(shape))
    if count * kind.item_bytes != len(raw):
        raise RemoteProtocolError(
            f"{datatype} of shape {list(shape)} needs {count * kind.item_bytes} bytes, but {len(raw)} came"
        )
    array = np.frombuffer(raw, dtype=kind.wire_dtype) if count else np.empty(0, dtype=kind.wire_dtype)
    return (widen_bfloat16(array) if kind is BF16 else array).reshape(shape)


def _to_array(model: ModelSpec, given: _Input) -> Array:
    if given.raw is None:
        array: Array = given.data
        return array
    kind = DATATYPES[given.datatype]
    try:
        return _from_wire(memoryview(given.raw), given.datatype, given.shape, given.name)
    except RemoteProtocolError as error:
        if kind.is_bytes:
            raise RefusedError(
                400, f"incomplete string data for inference input '{given.name}': {error.message}"
            ) from None
        expected = int(np.prod(given.shape, dtype=object)) * kind.item_bytes
        raise RefusedError(
            400,
            f"{_NO_ID}input byte size mismatch for input '{given.name}' for model '{model.name}'. Expected "
            f"{expected}, got {len(given.raw)}",
        ) from None


@dataclass
class InferAnswer:
    """The body of an answer in parts; ``json_bytes`` is None where all of it is JSON."""

    parts: list[bytes | memoryview] = field(default_factory=list)
    json_bytes: int | None = None


def encode_infer_answer(
    model: ModelSpec,
    request: InferRequest,
    outputs: Mapping[str, Array],
    labels: Mapping[str, Sequence[str]],
) -> InferAnswer:
    """The answer with the outputs that the request asks for, in the order of the request.

    ``outputs`` come from `wire_array`. Raises RefusedError for an output that has no JSON form.
    """
    specs = {spec.name: spec for spec in model.outputs}
    entries, buffers = [], []
    for asked in request.outputs:
        array, datatype = outputs[asked.name], specs[asked.name].datatype
        if asked.classes:
            array = _best_classes(array, model, asked.classes, labels.get(asked.name, ()))
            datatype = "BYTES"
        entry: dict[str, Any] = {"name": asked.name, "datatype": datatype, "shape": list(array.shape)}
        if asked.is_binary:
            buffers.append(wire_bytes(array, datatype, asked.name))
            entry["parameters"] = {"binary_data_size": len(buffers[-1])}
        elif not DATATYPES[datatype].has_json:
            raise RefusedError(
                400,
                f"sending {datatype} data via JSON is not supported. Please use the binary data format for "
                f"output",
            )
        else:
            entry["data"] = _json_values(array)
        entries.append(entry)
    head: dict[str, Any] = {"id": request.id} if request.id else {}
    head |= {"model_name": model.name, "model_version": model.version, "outputs": entries}
    # BYTES that are not UTF-8 leave as they are, in JSON that no strict parser reads, as Triton's do.
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogateescape")
    # Triton announces no JSON length where no binary tensor follows.
    return InferAnswer([text, *buffers], len(text) if any(map(len, buffers)) else None)


def _json_values(array: Array) -> list[Any]:
    values: list[Any] = array.ravel().tolist()
    if array.dtype.kind == "O":
        return [value.decode("utf-8", "surrogateescape") for value in values]
    return values


def _best_classes(array: Array, model: ModelSpec, count: int, labels: Sequence[str]) -> Array:
    """Triton's classification extension: ``value:index[:label]`` of the greatest values of each row."""
    rows = array.reshape(len(array), -1) if model.has_batch_dimension else array.reshape(1, -1)
    count = min(count, rows.shape[1])
    texts = np.empty((len(rows), count), dtype=object)
    for number, row in enumerate(rows):
        for place, index in enumerate(np.argsort(-row.astype("f8"), kind="stable")[:count]):
            label = f":{labels[index]}" if index < len(labels) else ""
            texts[number, place] = f"{row[index]:f}:{index}{label}".encode()
    return texts if model.has_batch_dimension else texts[0]


def wire_array(value: Any, spec: TensorSpec) -> Array:
    """What a model's function gave for an output as the array to send, of whatever shape it has.

    Floats are rounded to the output's precision. Raises LocalProtocolError for anything else that does not
    fit the datatype.
    """
    kind = DATATYPES[spec.datatype]
    array = np.asarray(value, dtype=object if kind.is_bytes else None)
    if array.dtype.kind == "f" and kind.array_dtype.kind == "f":
        array = array.astype(kind.array_dtype)
    try:
        return to_array(array, TensorSpec(spec.name, spec.datatype, (-1,) * array.ndim))
    except LocalProtocolError as error:
        raise LocalProtocolError("output " + error.message.removeprefix("input ")) from None

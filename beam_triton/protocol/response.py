"""The body of an infer response to arrays.

A body is JSON, or JSON followed by the raw tensors that it announces: the JSON ends at ``json_length`` (the
response's ``Inference-Header-Content-Length``). Outputs are matched by name, and their bytes taken in the
order of the response, which need not be the request's. Whatever the bytes are, this file raises only
RemoteProtocolError, and takes no more memory than the body's size justifies.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from beam_triton.errors import RemoteProtocolError, UnexpectedOutputError
from beam_triton.protocol.bfloat16 import widen_bfloat16
from beam_triton.protocol.byte_strings import decode_byte_strings, object_array
from beam_triton.protocol.datatypes import BF16, DATATYPES, Array, Datatype
from beam_triton.protocol.json_tensors import from_json_data
from beam_triton.protocol.model import ModelSpec, TensorSpec
from beam_triton.protocol.tensors import element_count
from beam_triton.protocol.text import shorten

# A model answers batches of one size with the same header bytes again and again, but for the request's id,
# with which Triton begins: parsed and checked headers are cached, within bounds.
_MAX_CACHED_HEADERS = 256
_MAX_CACHED_HEADER_BYTES = 8 * 1024
_LEADING_ID = re.compile(rb'\{"id":"([\w.-]*)",')


@dataclass(frozen=True)
class InferResponse:
    """What a model answered. ``outputs`` maps names to arrays that include the batch dimension, if any.

    Numbers are views of the response's bytes (read-only if these are): a reference to one row keeps them
    all in memory. BYTES are object arrays of ``bytes``, BF16 is float32. ``id`` is the request's. For padded
    outputs, ``cuts`` has the part of each row that is the element's own.
    """

    model_name: str
    model_version: str
    id: str
    parameters: dict[str, Any]
    outputs: dict[str, Array]
    cuts: Mapping[str, Sequence[tuple[slice, ...]]] | None = None

    @property
    def model_id(self) -> str:
        """``name:version``, or the name alone where the answer holds no version."""
        return f"{self.model_name}:{self.model_version}" if self.model_version else self.model_name

    def of_elements(self, model: ModelSpec, count: int) -> InferResponse:
        """The answer to ``count`` elements of a model with a batch dimension.

        An output that has none (the model's description, or its number of dimensions, shows it) belongs to
        the request as a whole: to one element it is given with a dimension of 1 in front.

        Raises UnexpectedOutputError, which halving the batch resolves, where several elements would share it.
        """
        outputs = self.outputs
        for spec in model.outputs:
            array = outputs.get(spec.name)
            if array is None or (array.ndim == len(spec.shape) + 1 and not model.whole_outputs):
                continue
            fits_whole = array.ndim == len(spec.shape) and all(
                want in (-1, size) for size, want in zip(array.shape, spec.shape, strict=True)
            )
            is_whole = spec.name in model.whole_outputs
            if count > 1 and (is_whole or fits_whole):
                error = UnexpectedOutputError(
                    f"output {shorten(spec.name)} of model {shorten(model.name)} has no batch dimension: its "
                    f"shape {list(array.shape)} for {count} elements is that of one ({spec.describe()}), and "
                    f"its values cannot be divided among them. Leave it out by outputs=[…], or send elements "
                    f'alone by batching={{"max_batch_size": 1}}'
                )
                error.splits_batch = True
                raise error
            # Where every size is 1, a server may have left the last dimension out instead.
            if is_whole or (fits_whole and (not spec.shape or any(want != 1 for want in spec.shape))):
                outputs = {**outputs, spec.name: array[np.newaxis]}
        return self if outputs is self.outputs else replace(self, outputs=outputs)

    def first(self, count: int) -> InferResponse:
        """The answer to the first ``count`` of its elements."""
        outputs = {name: array[:count] for name, array in self.outputs.items()}
        cuts = self.cuts and {name: parts[:count] for name, parts in self.cuts.items()}
        return replace(self, outputs=outputs, cuts=cuts)

    def whole(self) -> dict[str, Array]:
        """The outputs of a model without a batch dimension, which belong to the one element."""
        return self.outputs

    def rows(self, n: int) -> Iterator[dict[str, Array]]:
        """One dict of output name → array for each of the ``n`` elements, without the batch dimension.

        The dicts are made lazily, without padding. Raises RemoteProtocolError at once unless every output
        has exactly ``n`` rows: an answer must account for every element.
        """
        for name, array in self.outputs.items():
            if array.ndim == 0 or array.shape[0] != n:
                raise UnexpectedOutputError(
                    f"output {shorten(name)} of model {shorten(self.model_name)} has shape "
                    f"{list(array.shape)}, but its first dimension must be {n}, the elements of the request"
                )
        if not self.outputs:
            raise RemoteProtocolError(f"model {shorten(self.model_name)} answered without outputs")
        if self.cuts is not None:
            return self._cut_rows()
        if len(self.outputs) == 1:
            ((only, array),) = self.outputs.items()
            return ({only: row} for row in _rows(array))
        names = tuple(self.outputs)
        columns = map(_rows, self.outputs.values())
        return (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))

    def _cut_rows(self) -> Iterator[dict[str, Array]]:
        cuts = self.cuts or {}
        columns = [
            map(operator.getitem, array, cuts[name]) if name in cuts else _rows(array)
            for name, array in self.outputs.items()
        ]
        return (dict(zip(self.outputs, values, strict=True)) for values in zip(*columns, strict=True))


def join_responses(responses: Sequence[InferResponse]) -> InferResponse:
    """The answers to the parts of one batch as one answer, with the rows in the order of ``responses``.

    It names a version where all of them have that.

    Raises RemoteProtocolError unless they have the same outputs, with rows of equal shapes.
    """
    first = responses[0]
    if len(responses) == 1:
        return first
    outputs = {}
    for name in first.outputs:
        try:
            outputs[name] = np.concatenate([response.outputs[name] for response in responses])
        except (KeyError, ValueError) as error:
            raise RemoteProtocolError(
                f"output {shorten(name)} of model {shorten(first.model_name)}: the answers to the parts of a "
                f"batch do not fit together: {shorten(str(error), 160)}"
            ) from None
    is_one_version = all(response.model_version == first.model_version for response in responses)
    version = first.model_version if is_one_version else ""
    return InferResponse(first.model_name, version, first.id, first.parameters, outputs)


def _rows(array: Array) -> Iterator[Array]:
    if array.ndim > 1:
        return iter(array)
    # Iteration over a 1-D array gives scalars, but a row without dimensions is still an array.
    return (array[index, ...] for index in range(len(array)))


class _Output(NamedTuple):
    """One output as the header announces it; ``size`` is None if its values are JSON ``data``, or where the
    request has placed them."""

    name: str
    kind: Datatype
    shape: tuple[int, ...]
    length: int
    size: int | None
    data: Any


class _Header(NamedTuple):
    model_name: str
    model_version: str
    id: str
    parameters: dict[str, Any]
    outputs: tuple[_Output, ...]
    binary_bytes: int


_PLACED = object()
_headers: dict[bytes, _Header] = {}


def decode_infer_response(
    body: bytes | bytearray | memoryview,
    json_length: int | None,
    *,
    expected: Sequence[TensorSpec] = (),
    places: Mapping[str, memoryview] | None = None,
) -> InferResponse:
    """Decode a decompressed response body.

    ``json_length`` is the value of ``Inference-Header-Content-Length``; None if the response has no such
    header and is all JSON. Each of the ``expected`` outputs must be present with its datatype; their shapes
    are not checked, and there may be other outputs. Others of a datatype that the protocol does not have are
    left out, unless there are no others. ``places`` hold the outputs that the request has placed in shared
    memory, by name: the arrays are views of it.

    Raises RemoteProtocolError for anything else.
    """
    try:
        return _decode(memoryview(body).cast("B"), json_length, expected, places or {})
    except RecursionError:
        raise RemoteProtocolError("the answer's JSON is nested too deeply") from None


def _decode(
    view: memoryview,
    json_length: int | None,
    expected: Sequence[TensorSpec],
    places: Mapping[str, memoryview],
) -> InferResponse:
    if json_length is None and places:
        (header, request_id), start = _binary_header(bytes(view)), len(view)
    elif json_length is None:
        header, start = _parse_header(view), len(view)
        request_id = header.id
    else:
        if not 0 < json_length <= len(view):
            raise RemoteProtocolError(
                f"the answer's JSON should have {json_length} bytes, but the whole answer has {len(view)}"
            )
        (header, request_id), start = _binary_header(bytes(view[:json_length])), json_length
    if start + header.binary_bytes != len(view):
        raise RemoteProtocolError(
            f"the outputs of model {shorten(header.model_name)} should have {header.binary_bytes} bytes, "
            f"but the answer holds {len(view) - start}"
        )
    outputs: dict[str, Array] = {}
    for name, kind, shape, length, size, data in header.outputs:
        if data is _PLACED:
            outputs[name] = _placed(name, kind, shape, length, places)
            continue
        if size is None:
            outputs[name] = from_json_data(data, kind.name, shape, name)
            continue
        if kind.is_bytes:
            values = decode_byte_strings(view[start : start + size], length, name)
            outputs[name] = object_array(values, length, shape)
        else:
            # NumPy refuses an offset at the very end of a buffer, even for an array of no bytes.
            dtype = kind.wire_dtype
            array: Array = np.ndarray(shape, dtype, view, start) if size else np.empty(shape, dtype)
            outputs[name] = widen_bfloat16(array) if kind is BF16 else array
        start += size
    if expected:
        _check_expected(header, expected)
    return InferResponse(
        header.model_name, header.model_version, request_id, dict(header.parameters), outputs
    )


def _placed(
    name: str, kind: Datatype, shape: tuple[int, ...], length: int, places: Mapping[str, memoryview]
) -> Array:
    place, size = places.get(name), length * kind.item_bytes
    if place is None or kind.is_bytes:
        raise RemoteProtocolError(f"output {shorten(name)} has neither data nor a binary_data_size")
    if size > len(place):
        raise RemoteProtocolError(
            f"output {shorten(name)} of shape {list(shape)} needs {size} bytes, but its place in shared "
            f"memory has {len(place)}"
        )
    array: Array = np.ndarray(shape, kind.wire_dtype, place) if size else np.empty(shape, kind.wire_dtype)
    return widen_bfloat16(array) if kind is BF16 else array


def _check_expected(header: _Header, expected: Sequence[TensorSpec]) -> None:
    kinds = {output.name: output.kind.name for output in header.outputs}
    for spec in expected:
        kind = kinds.get(spec.name)
        if kind is None:
            raise UnexpectedOutputError(
                f"model {shorten(header.model_name)} answered without output {shorten(spec.name)}; "
                f"it sent {', '.join(map(shorten, kinds)) or 'none'}"
            )
        if kind != spec.datatype:
            raise UnexpectedOutputError(
                f"output {shorten(spec.name)} of model {shorten(header.model_name)} is {kind}, "
                f"not {spec.datatype} as described"
            )


def _binary_header(text: bytes) -> tuple[_Header, str]:
    """The header, and the request's id."""
    leading, request_id = _LEADING_ID.match(text), ""
    if leading is not None:
        request_id, text = leading[1].decode(), b"{" + text[leading.end() :]
    header = _headers.get(text)
    if header is None:
        header = _parse_header(text)
        # Responses share a cached header: it must not hold the id of one request, or anything mutable.
        is_constant = all(isinstance(each, (str, int, float, bool)) for each in header.parameters.values())
        if len(text) <= _MAX_CACHED_HEADER_BYTES and is_constant and not header.id:
            if len(_headers) >= _MAX_CACHED_HEADERS:
                _headers.clear()
            _headers[text] = header
    # Of two ids the last one counts, as everywhere in JSON.
    return header, header.id or request_id


def _parse_header(text: bytes | memoryview) -> _Header:
    try:
        # Decoded first, since json.loads would guess UTF-16 or UTF-32 from the bytes.
        document = json.loads(str(text, "utf-8"))
    except ValueError as error:
        unreadable = RemoteProtocolError(
            f"the answer is not JSON where it should be: {shorten(bytes(text[:80]))} ({shorten(str(error))})"
        )
        # JSON up to some point: one element's value may be what breaks it, such as a bare nan.
        unreadable.splits_batch = bytes(text[:1]) == b"{"
        raise unreadable from None
    if not isinstance(document, dict):
        raise RemoteProtocolError(f"the answer should be a JSON object, not {shorten(document)}")
    if "error" in document and "outputs" not in document:
        raise RemoteProtocolError(f"the server answered with an error: {shorten(document['error'], 300)}")
    parameters = document.get("parameters") or {}
    entries = document.get("outputs")
    if not isinstance(parameters, dict) or not isinstance(entries, list):
        raise RemoteProtocolError(f"the answer's JSON has no list of outputs: {shorten(document, 200)}")
    readable = [entry for entry in entries if not _is_of_unknown_datatype(entry)]
    # Where no output is readable, the first one's datatype is the error.
    outputs = tuple(map(_parse_output, readable or entries))
    if len({output.name for output in outputs}) != len(outputs):
        raise RemoteProtocolError(
            f"the answer names an output twice: {shorten([output.name for output in outputs], 200)}"
        )
    return _Header(
        _text(document, "model_name"),
        _text(document, "model_version"),
        _text(document, "id"),
        parameters,
        outputs,
        sum(output.size or 0 for output in outputs),
    )


def _text(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RemoteProtocolError(f"the answer's {key!r} is {shorten(value)}, not a string")
    return value


def _is_of_unknown_datatype(entry: Any) -> bool:
    """Whether it is a JSON tensor of a datatype that the protocol does not have; its values take no bytes
    after the JSON, so that it can be left out."""
    if not isinstance(entry, dict) or "data" not in entry:
        return False
    datatype = entry.get("datatype")
    return isinstance(datatype, str) and datatype not in DATATYPES


def _parse_output(entry: Any) -> _Output:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise RemoteProtocolError(f"the answer holds an output without a name: {shorten(entry)}")
    name = entry["name"]
    datatype, shape, parameters = entry.get("datatype"), entry.get("shape"), entry.get("parameters") or {}
    kind = DATATYPES.get(datatype) if isinstance(datatype, str) else None
    if kind is None:
        raise RemoteProtocolError(f"output {shorten(name)}: {shorten(datatype)} is not a datatype")
    if not isinstance(shape, list) or not isinstance(parameters, dict):
        raise RemoteProtocolError(
            f"output {shorten(name)} has shape {shorten(shape)} and parameters {shorten(parameters)}"
        )
    count = element_count(shape, name)
    size = parameters.get("binary_data_size")
    if size is None:
        return _Output(name, kind, tuple(shape), count, None, entry.get("data", _PLACED))
    if type(size) is not int or size < 0 or "data" in entry:
        raise RemoteProtocolError(f"output {shorten(name)}: binary_data_size {shorten(size)} is not its size")
    if not kind.is_bytes and size != count * kind.item_bytes:
        raise RemoteProtocolError(
            f"output {shorten(name)}: {datatype} of shape {shape} needs {count * kind.item_bytes} bytes, "
            f"the answer announces {size}"
        )
    return _Output(name, kind, tuple(shape), count, size, None)

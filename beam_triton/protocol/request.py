"""Elements to the body of an infer request.

There are two steps, because elements arrive one by one and leave in batches: ``prepare`` checks an element
and makes its buffers, ``encode_batch`` joins the buffers of many behind a header.

In the header's JSON only sizes, ids and parameters change between batches, so its text is made once for a
signature and a number of rows. The sizes of BYTES inputs differ in every batch: their texts hold ``%d``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from beam_triton.errors import ConfigurationError, LocalProtocolError
from beam_triton.protocol.datatypes import DATATYPES, Array
from beam_triton.protocol.model import ModelSpec, TensorSpec
from beam_triton.protocol.padding import PaddedLengths, Padding, PaddingRules
from beam_triton.protocol.prepare import (
    Buffer,
    ElementPreparer,
    PreparedElement,
    Shape,
    Signature,
    match_inputs,
    mention_integers,
    to_buffer,
)
from beam_triton.protocol.region_layout import LEAST_SHARED_BYTES, OutputSizes, RegionLayout
from beam_triton.protocol.request_options import OutputRequest, checked_input_parameters, checked_parameters
from beam_triton.protocol.tensors import flat_view
from beam_triton.protocol.text import shorten

# From this size on, a gathering system call is cheaper than a copy into one buffer.
LARGE_BUFFER_BYTES = 64 * 1024
# From this size on, a copy into shared memory by itself is cheaper than one into a buffer before.
_LEAST_PLACED_BYTES = 8 * 1024
# Content-Length and Inference-Header-Content-Length are parsed as int32 (server#5649).
MAX_CONTENT_BYTES = 2**31 - 1

_MAX_CACHED_HEADERS = 4096

BINARY_CONTENT_TYPE = "application/octet-stream"
JSON_CONTENT_TYPE = "application/json"


class EncodedRequest(NamedTuple):
    """A request body: ``parts`` in the order in which they are sent, each a 1-D buffer of bytes.

    ``json_length`` is the value of ``Inference-Header-Content-Length``; None if the body is all JSON and
    needs no such header. ``content_length`` is the total size of the parts in bytes. Large parts are views
    of the elements' own arrays, which must not change before they have been sent. ``request_id`` is the
    request's ``id``, empty where it has none; ``rows`` its batch size, 1 without a batch dimension;
    ``lengths`` those of padded elements, to cut the answer by. ``layout`` is the request's other form, with
    its tensors in shared memory; None where it has none.
    """

    parts: list[bytes | memoryview]
    json_length: int | None
    content_length: int
    content_type: str
    request_id: str
    rows: int = 1
    lengths: PaddedLengths | None = None
    layout: RegionLayout | None = None


class InferRequestEncoder:
    """Encodes requests for one model; one encoder may be used by several threads.

    ``outputs`` names the requested outputs; None requests all. ``parameters`` are sent with every request
    (see ``checked_parameters``), ``input_parameters`` with every input of that name. ``classification`` maps
    an output to k: its k best classes are returned instead of its values, as BYTES ``value:index[:label]``.
    ``binary=False`` writes pure JSON, for servers without the binary tensor extension. ``new_id`` makes the
    id of a request that is given none: plain ASCII that needs no escaping in JSON. With ``shared_memory``,
    large requests have a `RegionLayout`. With ``padding``, elements of different lengths share requests;
    ``element_model`` is the model as they see it: the masks that the encoder makes are optional there.
    ``expected_outputs`` are the outputs that the answer should hold,
    ``required_outputs`` those that it must hold, for ``decode_infer_response``.

    Raises ConfigurationError for outputs that the model does not have, wrong parameters, and padding that
    does not fit the model.
    """

    prepare: Callable[[Any], PreparedElement]
    """``ElementPreparer.prepare``, or that of `Padding`: checks one element, without the batch dimension, and
    makes its buffers."""

    def __init__(
        self,
        model: ModelSpec,
        *,
        outputs: Sequence[str] | None = None,
        parameters: Mapping[str, Any] | None = None,
        classification: Mapping[str, int] | None = None,
        input_parameters: Mapping[str, Mapping[str, Any]] | None = None,
        binary: bool = True,
        new_id: Callable[[], str] | None = None,
        padding: PaddingRules | None = None,
        shared_memory: bool = False,
    ) -> None:
        self.model = model
        self.binary = binary
        asked = OutputRequest(model, outputs, classification, binary)
        self.expected_outputs = asked.expected
        self.required_outputs = asked.required
        self._own_parameters = asked.parameters
        self._parameters = checked_parameters(parameters)
        self._new_id = new_id
        self._beginning = self._begin(self._parameters, "")
        self._after_id = b'",' + self._beginning[1:]
        of_inputs = checked_input_parameters(model, input_parameters)
        self._headers = _RequestHeaders(model, asked.json_text, binary, of_inputs)
        # What goes into shared memory is copied there.
        self._least_uncopied_bytes = _LEAST_PLACED_BYTES if shared_memory else LARGE_BUFFER_BYTES
        self._output_sizes = OutputSizes(model, asked.entries) if shared_memory and binary else None
        # The bound method itself: a call in between would add a tenth to its cost for every element.
        self.prepare = self._prepare_exact = ElementPreparer(model, binary).prepare
        self.element_model = model
        self.padding = None
        if padding is not None:
            outputs_with_values = [spec for spec in asked.expected if spec.name not in (classification or {})]
            self.padding = Padding(model, outputs_with_values, padding, binary)
            self.prepare = self.padding.prepare
            self.element_model = self.padding.element_model

    def encode_batch(
        self, prepared: Sequence[PreparedElement], *, parameters: Mapping[str, Any] | None = None
    ) -> EncodedRequest:
        """One request of elements with equal signatures, in their order.

        ``parameters`` are this request's own, and override those of the encoder. An input's buffers are
        joined, unless they are of 64 KiB or more. Raises LocalProtocolError for no elements, more than the
        model's batch limit, elements of different signatures, or 2 GiB and more.
        """
        if not prepared:
            raise LocalProtocolError("a request needs at least one element")
        if self.padding is not None:
            signature, joined, lengths = self.padding.join(prepared)
            header = self._headers.get(signature, len(prepared))
            encoded = self._request(header, [self._column(column) for column in joined], parameters, "")
            return encoded._replace(lengths=lengths)
        by_element = [element[1] for element in prepared]
        by_input: Iterable[Sequence[Buffer]] = (
            [[buffer for (buffer,) in by_element]]
            if len(by_element[0]) == 1
            else zip(*by_element, strict=True)
        )
        header = self._headers.get(prepared[0].signature, len(prepared))
        return self._request(header, [self._column(column) for column in by_input], parameters, "")

    def encode_arrays(self, arrays: Sequence[Array]) -> EncodedRequest:
        """As ``encode_batch``, for arrays of the model's only input that need no ``prepare``.

        They must all have the dtype and shape of an array that ``prepare`` has passed on as it is.
        """
        header = self._headers.get((arrays[0].shape,), len(arrays))
        return self._request(header, [self._column(arrays)], None, "")

    def _column(self, buffers: Sequence[Buffer]) -> list[bytes | memoryview]:
        # Elements of a signature have as many values each: either all are empty, or none.
        separator = b"" if self.binary or not _size(buffers[0]) else b","
        if _size(buffers[0]) >= self._least_uncopied_bytes:
            return _interleaved([_flat(buffer) for buffer in buffers], separator)
        return [separator.join(cast("Sequence[bytes]", buffers))]

    def encode(self, inputs: Any) -> EncodedRequest:
        """One request of whole tensors, which have the batch dimension if the model has one.

        ``inputs`` is as for ``prepare``. Raises LocalProtocolError as ``prepare`` and ``encode_batch`` do,
        and for batch dimensions that differ.
        """
        whole = self._encode_as_is(inputs, None, "")
        if whole is not None:
            return whole
        matched = match_inputs(self.model, inputs, batched=self.model.has_batch_dimension)
        return self._encode_matched(matched, None, "")

    def encode_in_parts(
        self, inputs: Any, *, parameters: Mapping[str, Any] | None = None, request_id: str = ""
    ) -> list[EncodedRequest]:
        """As ``encode``; more rows than the model takes become several requests, in the rows' order."""
        whole = self._encode_as_is(inputs, parameters, request_id)
        if whole is not None:
            return [whole]
        matched = match_inputs(self.model, inputs, batched=self.model.has_batch_dimension)
        limit = self.model.max_batch_size
        counts = {spec.name: _row_count(value) for spec, value in matched}
        if not limit or max(counts.values()) <= limit:
            return [self._encode_matched(matched, parameters, request_id)]
        return [
            self._encode_matched(
                [(spec, value[start : start + limit]) for spec, value in matched], parameters, request_id
            )
            for start in range(0, _check_rows(counts), limit)
        ]

    def _encode_as_is(
        self, inputs: Any, parameters: Mapping[str, Any] | None, request_id: str
    ) -> EncodedRequest | None:
        """The request of an array that needs no cast and no split; None for all other inputs.

        It costs a third of matching and casting, which for small tensors takes a tenth of a request's time.
        """
        if type(inputs) is dict and len(inputs) == 1 and len(self.model.inputs) == 1:
            inputs = inputs.get(self.model.inputs[0].name)
        if type(inputs) is not np.ndarray or inputs.ndim < 2 or not inputs.flags.c_contiguous:
            return None
        if not 0 < len(inputs) <= self.model.max_batch_size:
            return None
        row = inputs[0]
        try:
            prepared = self._prepare_exact(row)
        except LocalProtocolError:
            return None
        if len(prepared[1]) != 1 or prepared[1][0] is not row:
            return None
        header = self._headers.get(prepared[0], len(inputs))
        return self._request(header, [[_flat(inputs)]], parameters, request_id)

    def _encode_matched(
        self, matched: Sequence[tuple[TensorSpec, Any]], parameters: Mapping[str, Any] | None, request_id: str
    ) -> EncodedRequest:
        batched = self.model.has_batch_dimension
        given = {}
        columns: list[list[bytes | memoryview]] = []
        for spec, value in matched:
            given[spec], buffer = to_buffer(value, spec, binary=self.binary, batched=batched)
            mention_integers(value, spec, self.model)
            columns.append([buffer])
        rows = 1
        if batched:
            rows = _check_rows({spec.name: shape[0] for spec, shape in given.items()})
            given = {spec: shape[1:] for spec, shape in given.items()}
        if self.model.inputs:
            signature: Signature = tuple(given.get(spec) for spec in self.model.inputs)
        else:
            signature = tuple((spec.name, spec.datatype, shape) for spec, shape in given.items())
        return self._request(self._headers.get(signature, rows), columns, parameters, request_id)

    def _request(
        self,
        header: _RequestHeader,
        columns: list[list[bytes | memoryview]],
        parameters: Mapping[str, Any] | None,
        request_id: str,
    ) -> EncodedRequest:
        beginning = self._beginning
        has_own = parameters or request_id
        if self._new_id is not None and not request_id:
            request_id = self._new_id()
            beginning = b'{"id":"' + request_id.encode("ascii") + self._after_id
        if has_own:
            beginning = self._begin({**self._parameters, **checked_parameters(parameters)}, request_id)
        layout = None
        if self.binary:
            sizes = [sum(map(len, column)) for column in columns]
            text = beginning + header.fill(sizes)
            content_length = len(text) + sum(sizes)
            parts: list[bytes | memoryview] = [text]
            for column in columns:
                parts += column
            json_length, content_type = len(text), BINARY_CONTENT_TYPE
            known = self._output_sizes
            if known and content_length + header.rows * known.row_bytes >= LEAST_SHARED_BYTES:
                shape = (header.signature, header.rows)
                layout = known.layout(header.inputs, columns, sizes, beginning, shape)
        else:
            parts = [beginning]
            for before, column in zip(header.texts, columns, strict=False):
                parts.append(before)
                parts += column
            parts.append(header.texts[-1])
            content_length = sum(map(len, parts))
            json_length, content_type = None, JSON_CONTENT_TYPE
        if content_length > MAX_CONTENT_BYTES:
            raise LocalProtocolError(
                f"a request of {content_length} bytes: Triton takes less than 2 GiB; send fewer elements"
            )
        return EncodedRequest(
            parts, json_length, content_length, content_type, request_id, header.rows, layout=layout
        )

    def _begin(self, parameters: Mapping[str, Any], request_id: str) -> bytes:
        """The JSON of a request up to its inputs."""
        fields: dict[str, Any] = {}
        if request_id:
            if not isinstance(request_id, str):
                raise ConfigurationError(f"request_id must be a string, not {shorten(request_id)}")
            fields["id"] = request_id
        if parameters or self._own_parameters:
            fields["parameters"] = {**parameters, **self._own_parameters}
        return _compact_json(fields)[:-1] + b"," if fields else b"{"


def _interleaved(views: list[bytes | memoryview], separator: bytes) -> list[bytes | memoryview]:
    return [piece for view in views for piece in (separator, view)][1:] if separator else views


def _row_count(value: Any) -> int:
    """The number of rows of a value that can be split between rows; 0 for any other."""
    if isinstance(value, np.ndarray):
        return len(value) if value.ndim else 0
    return len(value) if isinstance(value, (list, tuple)) else 0


def _check_rows(counts: Mapping[str, int]) -> int:
    """The number of rows, if it is the same for all inputs."""
    rows = next(iter(counts.values()))
    if len(set(counts.values())) > 1:
        raise LocalProtocolError(f"the batch dimensions of the inputs differ: {dict(counts)}")
    if rows == 0:
        raise LocalProtocolError("a request needs at least one element; the batch dimension is 0")
    return rows


def _size(buffer: Buffer) -> int:
    return buffer.nbytes if isinstance(buffer, np.ndarray) else len(buffer)


def _flat(buffer: Buffer) -> bytes | memoryview:
    return flat_view(buffer) if isinstance(buffer, np.ndarray) else buffer


class _RequestHeader(NamedTuple):
    """A request's JSON from its inputs on.

    A binary request has one text, which ends the JSON, and ``sizes``: the bytes of each input, None for
    BYTES; ``inputs`` are the JSON of each input up to its parameters, and further parameters of it. A request
    that is all JSON has a text before the values of each input, and one after the last.
    """

    texts: tuple[bytes, ...]
    sizes: tuple[int | None, ...]
    rows: int
    signature: Signature
    inputs: tuple[tuple[bytes, bytes], ...] = ()

    def fill(self, sizes: list[int]) -> bytes:
        """The text of a binary request whose inputs have ``sizes`` bytes.

        Raises LocalProtocolError if they are not what the signature needs.
        """
        for size, fixed in zip(sizes, self.sizes, strict=True):
            if fixed is not None and size != fixed:
                raise LocalProtocolError(
                    f"all elements of a request must have one signature: an input needs {fixed} bytes, "
                    f"not {size}"
                )
        (text,) = self.texts
        if None in self.sizes:
            varying = (size for size, fixed in zip(sizes, self.sizes, strict=True) if fixed is None)
            return text % tuple(varying)
        return text


class _RequestHeaders:
    """Request headers of one model; ``end`` is the JSON that requests outputs (``,"outputs":[…]``).

    ``parameters`` are those of inputs, by name.
    """

    def __init__(
        self, model: ModelSpec, end: bytes, binary: bool, parameters: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._end = end + b"}"
        self._binary = binary
        self._headers: dict[tuple[Signature, int], _RequestHeader] = {}

    def get(self, signature: Signature, rows: int) -> _RequestHeader:
        """The header for ``rows`` elements of ``signature``.

        Raises LocalProtocolError for more rows than the model takes.
        """
        key = (signature, rows)
        header = self._headers.get(key)
        if header is None:
            self._check_rows(rows)
            inputs = self._named(signature)
            texts = self._binary_header(inputs, rows) if self._binary else self._json_header(inputs, rows)
            header = texts._replace(signature=signature)
            if len(self._headers) >= _MAX_CACHED_HEADERS:
                self._headers.clear()
            self._headers[key] = header
        return header

    def _check_rows(self, rows: int) -> None:
        limit = self._model.max_batch_size
        if limit == 0 and rows != 1:
            raise LocalProtocolError(
                f"model {self._model.name!r} has no batch dimension: a request is one element, not {rows}"
            )
        if limit and rows > limit:
            raise LocalProtocolError(
                f"model {self._model.name!r} takes at most {limit} elements a request, not {rows}"
            )

    def _named(self, signature: Signature) -> list[tuple[str, str, Shape]]:
        if not self._model.inputs:
            return list(signature)
        specs = zip(self._model.inputs, signature, strict=True)
        return [(spec.name, spec.datatype, shape) for spec, shape in specs if shape is not None]

    def _entry(self, name: str, datatype: str, shape: Shape, rows: int) -> bytes:
        full = [rows, *shape] if self._model.has_batch_dimension else list(shape)
        # Without its closing brace, because more follows.
        return _compact_json({"name": name, "datatype": datatype, "shape": full})[:-1]

    def _parameters_of(self, name: str) -> bytes:
        """The parameters of an input, if any, as they go into a JSON object that holds others before."""
        given = self._parameters.get(name)
        return b"," + _compact_json(given)[1:-1] if given else b""

    def _binary_header(self, inputs: list[tuple[str, str, Shape]], rows: int) -> _RequestHeader:
        sizes = tuple(_byte_size(datatype, shape, rows) for _, datatype, shape in inputs)
        pieces = tuple((self._entry(*named, rows), self._parameters_of(named[0])) for named in inputs)
        entries = [
            _escaped(entry, None in sizes)
            + b',"parameters":{"binary_data_size":'
            + (b"%d" if size is None else str(size).encode("ascii"))
            + _escaped(parameters, None in sizes)
            + b"}}"
            for (entry, parameters), size in zip(pieces, sizes, strict=True)
        ]
        text = b'"inputs":[' + b",".join(entries) + b"]" + _escaped(self._end, None in sizes)
        return _RequestHeader((text,), sizes, rows, (), pieces)

    def _json_header(self, inputs: list[tuple[str, str, Shape]], rows: int) -> _RequestHeader:
        befores = [b'"inputs":['] + [b"]},"] * (len(inputs) - 1)
        texts = [
            before + self._entry(*named, rows) + self._json_parameters(named[0]) + b',"data":['
            for before, named in zip(befores, inputs, strict=True)
        ]
        return _RequestHeader((*texts, b"]}]" + self._end), (), rows, ())

    def _json_parameters(self, name: str) -> bytes:
        given = self._parameters_of(name)
        return b',"parameters":{' + given[1:] + b"}" if given else b""


def _compact_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def _escaped(text: bytes, will_be_filled: bool) -> bytes:
    return text.replace(b"%", b"%%") if will_be_filled else text


def _byte_size(datatype: str, shape: Shape, rows: int) -> int | None:
    size = DATATYPES[datatype].item_bytes * rows
    if size == 0:
        return None
    for dim in shape:
        size *= dim
    return size

"""The JSON of a binary infer request, of which only sizes, ids and parameters change between batches.

For a signature and a number of rows the text is made once. BYTES inputs have a size of their own in every
batch: their texts hold ``%d`` in its place.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from beam_triton.errors import LocalProtocolError
from beam_triton.protocol.datatypes import DATATYPES
from beam_triton.protocol.model import ModelSpec
from beam_triton.protocol.prepare import Shape, Signature

_MAX_CACHED_HEADERS = 4096


class RequestHeader(NamedTuple):
    """A request's JSON from its inputs on.

    A binary request has one text, which ends the JSON, and ``sizes``: the bytes of each input, None for
    BYTES. A request that is all JSON has a text before the values of each input, and one after the last.
    """

    texts: tuple[bytes, ...]
    sizes: tuple[int | None, ...]

    def fill(self, sizes: list[int]) -> bytes:
        """The text of a binary request whose inputs have ``sizes`` bytes.

        Raises LocalProtocolError when they are not what the signature needs.
        """
        for size, fixed in zip(sizes, self.sizes, strict=True):
            if fixed is not None and size != fixed:
                raise LocalProtocolError(
                    f"all elements of a request must have one signature: an input needs {fixed} bytes, "
                    f"but {size} came"
                )
        (text,) = self.texts
        if None in self.sizes:
            varying = (size for size, fixed in zip(sizes, self.sizes, strict=True) if fixed is None)
            return text % tuple(varying)
        return text


class RequestHeaders:
    """Request headers of one model; ``end`` is the JSON that asks for outputs (``,"outputs":[…]``)."""

    def __init__(self, model: ModelSpec, end: bytes, binary: bool) -> None:
        self._model = model
        self._end = end + b"}"
        self._binary = binary
        self._headers: dict[tuple[Signature, int], RequestHeader] = {}

    def get(self, signature: Signature, rows: int) -> RequestHeader:
        """The header for ``rows`` elements of ``signature``.

        Raises LocalProtocolError for more rows than the model takes.
        """
        key = (signature, rows)
        header = self._headers.get(key)
        if header is None:
            self._check_rows(rows)
            inputs = self._named(signature)
            header = self._binary_header(inputs, rows) if self._binary else self._json_header(inputs, rows)
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
        # Without its closing brace, for what follows.
        return compact_json({"name": name, "datatype": datatype, "shape": full})[:-1]

    def _binary_header(self, inputs: list[tuple[str, str, Shape]], rows: int) -> RequestHeader:
        sizes = tuple(_byte_size(datatype, shape, rows) for _, datatype, shape in inputs)
        entries = [
            _escaped(self._entry(*named, rows), None in sizes)
            + b',"parameters":{"binary_data_size":'
            + (b"%d" if size is None else str(size).encode("ascii"))
            + b"}}"
            for named, size in zip(inputs, sizes, strict=True)
        ]
        text = b'"inputs":[' + b",".join(entries) + b"]" + _escaped(self._end, None in sizes)
        return RequestHeader((text,), sizes)

    def _json_header(self, inputs: list[tuple[str, str, Shape]], rows: int) -> RequestHeader:
        befores = [b'"inputs":['] + [b"]},"] * (len(inputs) - 1)
        texts = [
            before + self._entry(*named, rows) + b',"data":['
            for before, named in zip(befores, inputs, strict=True)
        ]
        return RequestHeader((*texts, b"]}]" + self._end), ())


def compact_json(value: Any) -> bytes:
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

"""A request whose tensors lie in shared memory: Triton's system shared memory extension.

The body is JSON that says where in a region each input lies, and where each output is to be written. An
output's place must be known before the server computes it: its size follows from the model's description
where that fixes every dimension, and else from earlier answers to inputs of the same shapes. An output whose
size is not known yet, BYTES and classifications travel in the answer, as without shared memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from beam_triton.protocol.datatypes import DATATYPES
from beam_triton.protocol.model import ModelSpec, TensorSpec
from beam_triton.protocol.response import InferResponse

LEAST_SHARED_BYTES = 128 * 1024
"""Smaller requests, their outputs included, are sent by HTTP: their tensors cost less than another region
(docs/shared-memory.md)."""

# A cache line, which is also what NumPy and the backends' kernels align to.
_ALIGNMENT = 64
_MAX_LEARNED = 1024
_BEFORE_NAME = b',"parameters":{"shared_memory_region":"'

Buffer = bytes | memoryview


class _Place(NamedTuple):
    offset: int
    nbytes: int


class RegionLayout(NamedTuple):
    """How one request and its answer lie in a region of at least ``nbytes``.

    ``texts`` are the body between the names of the region; ``inputs`` the buffers with their offsets;
    ``shape`` is signature and number of rows, by which sizes of outputs are learned.
    """

    nbytes: int
    texts: Sequence[bytes]
    inputs: Sequence[tuple[int, Sequence[Buffer]]]
    outputs: Mapping[str, _Place]
    sizes: OutputSizes
    shape: tuple[Any, int]

    def put(self, name: str, memory: memoryview) -> bytes:
        """Write the inputs into the region; returns the body that refers to it."""
        for offset, buffers in self.inputs:
            for buffer in buffers:
                end = offset + len(buffer)
                memory[offset:end] = buffer
                offset = end
        return name.encode("ascii").join(self.texts)

    def places(self, memory: memoryview) -> dict[str, memoryview]:
        """The parts of the region that hold outputs, by name."""
        return {
            name: memory[place.offset : place.offset + place.nbytes] for name, place in self.outputs.items()
        }

    def learn(self, response: InferResponse) -> None:
        """Remember the sizes of an answer's outputs, for requests like this one."""
        self.sizes.learn(self.shape, response)

    def outgrown(self) -> None:
        """An output did not fit into its place: from now on outputs travel in the answer."""
        self.sizes.give_up()


class OutputSizes:
    """What is known of the sizes of one model's outputs.

    ``requested`` are names and parameters of the outputs that requests ask for.

    Attributes:
        row_bytes: of the outputs of one row, as far as they are known: those of the largest row so far.
    """

    def __init__(self, model: ModelSpec, requested: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        known = {spec.name: spec for spec in model.outputs}
        self._is_batched = model.has_batch_dimension
        self._requested = [(_json({"name": name})[:-1], name, _json(given)) for name, given in requested]
        self._placeable = {
            name: known[name]
            for name, given in requested
            if name in known and "classification" not in given and _item_bytes(known[name])
        }
        # Bytes a row by signature, as the largest answer so far had them.
        self._learned: dict[Any, dict[str, int]] = {}
        self._has_given_up = False
        self.row_bytes = sum(self._output_bytes(None, 1).values())

    def layout(
        self,
        inputs: Sequence[tuple[bytes, bytes]],
        columns: Sequence[Sequence[Buffer]],
        sizes: Sequence[int],
        beginning: bytes,
        shape: tuple[Any, int],
    ) -> RegionLayout | None:
        """The layout of a request; None where it is too small for one, or an input is empty.

        Args:
            inputs: the JSON of each input up to its parameters, and what follows its place.
            columns, sizes: the buffers of each input, and how many bytes they have together.
            beginning: the request's JSON before its inputs.
            shape: signature and number of rows.
        """
        placed = self._output_bytes(*shape)
        # Triton refuses a place of no bytes.
        if not columns or 0 in sizes or sum(sizes) + sum(placed.values()) < LEAST_SHARED_BYTES:
            return None
        texts: list[bytes] = []
        laid: list[tuple[int, Sequence[Buffer]]] = []
        text, offset = beginning + b'"inputs":[', 0
        for (entry, parameters), column, size in zip(inputs, columns, sizes, strict=True):
            texts.append(text + entry + _BEFORE_NAME)
            text = _after_name(offset, size) + parameters + b"}},"
            laid.append((offset, column))
            offset = _aligned(offset + size)
        text = text[:-1] + b"]"
        outputs: dict[str, _Place] = {}
        for index, (entry, name, given) in enumerate(self._requested):
            text += (b"," if index else b',"outputs":[') + entry
            if name in placed:
                place = outputs[name] = _Place(offset, placed[name])
                texts.append(text + _BEFORE_NAME)
                text = _after_name(*place) + b"}}"
                offset = _aligned(offset + place.nbytes)
            else:
                text += b',"parameters":' + given + b"}"
        texts.append(text + (b"]}" if self._requested else b"}"))
        return RegionLayout(offset, texts, laid, outputs, self, shape)

    def learn(self, shape: tuple[Any, int], response: InferResponse) -> None:
        """Remember the sizes of ``response``, which answers a request of that shape."""
        signature, rows = shape
        rows = rows if self._is_batched else 1
        known = self._learned.get(signature, {})
        sizes = {
            name: max(-(-array.size * _item_bytes(spec) // rows), known.get(name, 0))
            for name, spec in self._placeable.items()
            if (array := response.outputs.get(name)) is not None
        }
        if sizes != known:
            if len(self._learned) >= _MAX_LEARNED:
                self._learned.clear()
            self._learned[signature] = sizes
            self.row_bytes = max(self.row_bytes, sum(sizes.values()))

    def give_up(self) -> None:
        """Outputs are not what was learned: from now on they travel in the answer."""
        self._has_given_up = True

    def _output_bytes(self, signature: Any, rows: int) -> dict[str, int]:
        if self._has_given_up:
            return {}
        rows = rows if self._is_batched else 1
        learned = self._learned.get(signature, {})
        found = {}
        for name, spec in self._placeable.items():
            row_bytes = learned.get(name)
            if row_bytes is None and -1 not in spec.shape:
                row_bytes = prod(spec.shape) * _item_bytes(spec)
            if row_bytes:
                found[name] = rows * row_bytes
        return found


def _item_bytes(spec: TensorSpec) -> int:
    return DATATYPES[spec.datatype].item_bytes


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def _after_name(offset: int, nbytes: int) -> bytes:
    return b'","shared_memory_offset":%d,"shared_memory_byte_size":%d' % (offset, nbytes)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT

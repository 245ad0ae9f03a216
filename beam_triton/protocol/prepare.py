"""One element checked and turned into buffers, as soon as it arrives.

This runs for every element of a pipeline. An input's accepted shapes are remembered; an array of such a
shape that needs no cast is passed on as it is. Everything else goes through ``to_array``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from beam_triton.errors import LocalProtocolError, with_message
from beam_triton.protocol.byte_strings import encode_byte_strings
from beam_triton.protocol.casting import byte_string_values, fit_shape, to_array
from beam_triton.protocol.datatypes import BF16, DATATYPES, FLOATS, Array, datatype_of
from beam_triton.protocol.json_tensors import json_items
from beam_triton.protocol.model import ModelSpec, TensorSpec
from beam_triton.protocol.packing import packer_of
from beam_triton.protocol.tensors import wire_bytes, wire_size
from beam_triton.protocol.text import shorten

Buffer: TypeAlias = bytes | memoryview | Array
Shape: TypeAlias = tuple[int, ...]
Signature: TypeAlias = tuple[Any, ...]
"""For each input of the model its shape without the batch dimension, or None for an absent optional input.

If the server does not name the inputs: (name, datatype, shape) of each that the element has.
"""

_logger = logging.getLogger(__name__)

# Models and inputs of which `mention_integers` has spoken in this process.
_mentioned: set[tuple[str, str]] = set()

# Ragged elements would otherwise fill the caches of a long job without limit.
_MAX_CACHED_SHAPES = 4096


class PreparedElement(NamedTuple):
    """One checked element, which can share a request with others of an equal ``signature``.

    ``buffers`` holds one object with the buffer interface for each input that the element has, in the
    model's order. Arrays among them may be the element's own, not copies, and must not change before the
    request has been sent. ``nbytes`` is the total size of the buffers in bytes.
    """

    signature: Signature
    buffers: tuple[Buffer, ...]
    nbytes: int


class ElementPreparer:
    """Prepares elements of one model; ``binary=False`` makes JSON values instead of raw tensors.

    The buffers of inputs named in ``as_arrays`` are the arrays that ``to_array`` makes.
    """

    __slots__ = ("_binary", "_inputs", "_model", "_only")

    def __init__(self, model: ModelSpec, binary: bool, as_arrays: Collection[str] = ()) -> None:
        self._model = model
        self._binary = binary
        self._inputs = [_Input(spec, model, binary, spec.name in as_arrays) for spec in model.inputs]
        self._only = self._inputs[0] if len(self._inputs) == 1 else None

    def prepare(self, inputs: Any) -> PreparedElement:
        """Check one element (no batch dimension) and make its buffers.

        ``inputs`` maps input names to values, or is the value itself if the model has one input. An
        optional input may be absent or None. Raises LocalProtocolError, naming the input, what it takes and
        what it was given.
        """
        only = self._only
        if only is None:
            return self._prepare_several(inputs)
        if type(inputs) is np.ndarray:
            accepted = only.accepted.get(inputs.shape)
            if accepted is not None and inputs.dtype == only.dtype and inputs.flags.c_contiguous:
                return tuple.__new__(PreparedElement, (accepted[0], (inputs,), accepted[1]))
            value: Any = inputs
        elif type(inputs) is dict or isinstance(inputs, Mapping):
            value = inputs.get(only.name)
            if value is None or len(inputs) != 1:
                ((_, value),) = match_inputs(self._model, inputs)
        else:
            value = inputs
        shape, buffer, nbytes = only.take(value)
        return tuple.__new__(PreparedElement, ((shape,), (buffer,), nbytes))

    def _prepare_several(self, inputs: Any) -> PreparedElement:
        if not self._inputs:
            return self._prepare_unnamed(inputs)
        if not isinstance(inputs, Mapping):
            match_inputs(self._model, inputs)
        signature: list[Shape | None] = []
        buffers: list[Buffer] = []
        total = 0
        for entry in self._inputs:
            value = inputs.get(entry.name)
            if value is None:
                signature.append(None)
                continue
            shape, buffer, nbytes = entry.take(value)
            signature.append(shape)
            buffers.append(buffer)
            total += nbytes
        if len(buffers) != len(self._inputs) or len(inputs) != len(buffers):
            # Raises unless the absent inputs are optional and no name is unknown.
            match_inputs(self._model, inputs)
        return PreparedElement(tuple(signature), tuple(buffers), total)

    def _prepare_unnamed(self, inputs: Any) -> PreparedElement:
        signature = []
        buffers = []
        for spec, value in match_inputs(self._model, inputs):
            shape, buffer = to_buffer(value, spec, binary=self._binary)
            signature.append((spec.name, spec.datatype, shape))
            buffers.append(buffer)
        return PreparedElement(tuple(signature), tuple(buffers), sum(map(len, buffers)))


def to_buffer(
    value: Any, spec: TensorSpec, *, binary: bool, batched: bool = False
) -> tuple[Shape, bytes | memoryview]:
    """The shape of ``value``, and its bytes in a request's body (1-D).

    ``value``, ``batched`` and the errors are as for ``to_array``.
    """
    if binary and DATATYPES[spec.datatype].is_bytes:
        # Encoded directly: an object array in between would double the cost.
        values, shape = byte_string_values(value, spec)
        return fit_shape(shape, spec, batched), encode_byte_strings(values, spec.name)
    array = to_array(value, spec, batched=batched)
    if binary:
        return array.shape, wire_bytes(array, spec.datatype, spec.name)
    return array.shape, json_items(array, spec.datatype, spec.name)


def mention_integers(value: Any, spec: TensorSpec, model: ModelSpec) -> None:
    """Say, once per process and model, that integers go to a floating-point input as they are.

    ``value`` is one that ``to_array`` takes. Pixels from 0 to 255 are a wrong answer without an error where a
    model was trained on 0 to 1. Python's own numbers are taken to be meant.
    """
    if spec.datatype not in FLOATS or type(value) in (float, int, list, tuple):
        return
    key = model.name, spec.name
    if key in _mentioned:
        return
    dtype = np.asarray(value).dtype
    if dtype.kind in "iu":
        _mentioned.add(key)
        _logger.warning(
            "model %r: input %r takes %s and is given %s: its numbers go as they are. Scale them if the "
            "model was trained on others (pixels often from 0 to 1); if not, convert them",
            *(*key, spec.datatype, dtype),
        )


class _Input:
    """One input of the model, with the shapes it has accepted and its fast paths."""

    __slots__ = (
        *("_as_array", "_binary", "_model", "_pack_one", "_passes_arrays", "_single", "_spec"),
        *("accepted", "dtype", "name"),
    )

    def __init__(self, spec: TensorSpec, model: ModelSpec, binary: bool, as_array: bool) -> None:
        datatype = DATATYPES[spec.datatype]
        packer = packer_of(spec.datatype)
        self.name = spec.name
        self.dtype = datatype.wire_dtype
        # Shape → (signature of a one-input element, bytes), of arrays that need no cast.
        self.accepted: dict[Shape, tuple[Signature, int]] = {}
        self._spec = spec
        self._model = model
        self._binary = binary
        self._as_array = as_array
        self._passes_arrays = (binary or as_array) and not datatype.is_bytes and datatype is not BF16
        # The shape of a single value, if the input takes one.
        self._single = (1,) * len(spec.shape) if all(dim in (1, -1) for dim in spec.shape) else None
        if not binary or as_array or self._single is None:
            self._pack_one = None
        elif datatype.is_bytes:
            self._pack_one = self._pack_byte_string
        else:
            self._pack_one = packer.pack_one if packer is not None else None

    def take(self, value: Any) -> tuple[Shape, Buffer, int]:
        """The shape, buffer and size in bytes of one element's value. Raises LocalProtocolError."""
        if type(value) is np.ndarray:
            shape = value.shape
            accepted = self.accepted.get(shape)
            if accepted is not None and value.dtype == self.dtype and value.flags.c_contiguous:
                return shape, value, accepted[1]
        elif self._pack_one is not None:
            packed = self._pack_one(value)
            if packed is not None:
                assert self._single is not None
                return self._single, packed, len(packed)
        try:
            if not (self._passes_arrays or self._as_array):
                shape, buffer = to_buffer(value, self._spec, binary=self._binary)
                mention_integers(value, self._spec, self._model)
                return shape, buffer, len(buffer)
            array = to_array(value, self._spec)
        except LocalProtocolError as error:
            hint = _batch_hint(value, self._spec, self._model.has_batch_dimension)
            raise (with_message(error, f"{error.message}. {hint}") if hint else error) from error.__cause__
        mention_integers(value, self._spec, self._model)
        if not self._passes_arrays:
            return array.shape, array, wire_size(array)
        if len(self.accepted) >= _MAX_CACHED_SHAPES:
            self.accepted.clear()
        self.accepted[array.shape] = ((array.shape,), array.nbytes)
        return array.shape, array, array.nbytes

    def _pack_byte_string(self, value: Any) -> bytes | None:
        kind = type(value)
        if kind is str:
            try:
                value = value.encode()
            except UnicodeEncodeError:
                return None
        elif kind is not bytes:
            return None
        return encode_byte_strings((value,), self.name)


def _batch_hint(value: Any, spec: TensorSpec, has_batch: bool) -> str:
    """What to do about an element that has a dimension too many or too few, if that is the batch; or ""."""
    try:
        shape = np.shape(value)
    except Exception:
        # Ragged, or not made for NumPy at all: no shape to compare.
        return ""
    wanted = spec.shape
    if has_batch:
        fits = len(shape) == len(wanted) + 1 and _fits(shape[1:], wanted)
        return "An element comes without the batch dimension: each row is one" if fits else ""
    if not wanted or wanted[0] not in (-1, 1) or not _fits(shape, wanted[1:]):
        return ""
    if wanted[0] == 1:
        return (
            'The first dimension is fixed at 1: give elements with it, or batching={"max_batch_size": 1} to '
            "give them without"
        )
    return (
        'If the first dimension is the batch, give batching={"max_batch_size": …}: elements then come '
        "without it, and share requests"
    )


def _fits(shape: Shape, wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(
        want in (-1, size) for size, want in zip(shape, wanted, strict=True)
    )


def match_inputs(model: ModelSpec, inputs: Any, *, batched: bool = False) -> list[tuple[TensorSpec, Any]]:
    """The model's inputs that are given, in the model's order, each with its value.

    ``inputs`` is as for ``prepare``. If the server does not report the model's inputs, names and dtypes are
    those of the values, which become arrays (``batched``: with the batch as first dimension).

    Raises LocalProtocolError for a missing or unknown input, or if there is none at all.
    """
    if not isinstance(inputs, Mapping):
        if len(model.inputs) != 1:
            raise LocalProtocolError(
                f"inputs of model {model.name!r} must map names to values, "
                f"not be {type(inputs).__name__} {shorten(inputs)}; {model.describe()}"
            )
        inputs = {model.inputs[0].name: inputs}
    if not model.inputs:
        matched = _unnamed_inputs(inputs, batched)
    else:
        unknown = [name for name in inputs if all(name != spec.name for spec in model.inputs)]
        if unknown:
            raise LocalProtocolError(
                f"model {model.name!r} has no input {', '.join(map(shorten, unknown))}; {model.describe()}"
            )
        matched = [(spec, inputs[spec.name]) for spec in model.inputs if inputs.get(spec.name) is not None]
        if len(matched) < len(model.inputs):
            given = {spec.name for spec, _ in matched}
            for spec in model.inputs:
                if spec.name not in given and not spec.optional:
                    raise LocalProtocolError(
                        f"input {spec.name!r} of model {model.name!r} is missing; {model.describe()}"
                    )
    if not matched:
        raise LocalProtocolError(f"a request of model {model.name!r} needs at least one input")
    return matched


def _unnamed_inputs(inputs: Mapping[str, Any], batched: bool) -> list[tuple[TensorSpec, Any]]:
    matched: list[tuple[TensorSpec, Any]] = []
    for name, value in inputs.items():
        if not isinstance(name, str) or not name:
            raise LocalProtocolError(f"an input needs a name, not {shorten(name)}")
        if value is None:
            continue
        try:
            array = np.asarray(value)
        except Exception as error:
            raise LocalProtocolError(
                f"input {name!r}: NumPy makes no array of {shorten(value)}: {shorten(str(error), 160)}"
            ) from error
        rank = array.ndim - 1 if batched else array.ndim
        if rank < 0:
            raise LocalProtocolError(f"input {name!r} needs a batch dimension, not {shorten(value)} alone")
        datatype = datatype_of(array, name)
        spec = TensorSpec(name, datatype.name, (-1,) * rank)
        matched.append((spec, value if datatype.is_bytes else array))
    return matched

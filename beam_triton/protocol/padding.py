"""Elements of several lengths in one request: padded to one shape, and the answer cut back.

An element keeps its own arrays until its request is encoded; its signature and its size are those of its
bucket. What an element's inputs share are *lengths*: the sizes of the variable dimensions (-1) of each group
of inputs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from beam_triton.errors import ConfigurationError, LocalProtocolError
from beam_triton.protocol.byte_strings import LENGTH_BYTES
from beam_triton.protocol.casting import to_array
from beam_triton.protocol.datatypes import DATATYPES, Array
from beam_triton.protocol.json_tensors import json_items
from beam_triton.protocol.model import ModelSpec, TensorSpec
from beam_triton.protocol.prepare import Buffer, ElementPreparer, PreparedElement, Shape, Signature
from beam_triton.protocol.response import InferResponse
from beam_triton.protocol.tensors import wire_bytes

_MAX_CACHED_SIGNATURES = 4096

Lengths: TypeAlias = tuple[int, ...]


class PaddingRules(Protocol):
    """What `BatchingPolicy` says about padding; its docstring describes each."""

    @property
    def bucket_boundaries(self) -> Sequence[int] | None: ...
    @property
    def pad(self) -> Any: ...
    @property
    def mask(self) -> str | Sequence[str] | None: ...
    @property
    def cut_outputs(self) -> Mapping[str, str | None] | None: ...


class _PaddedInput(NamedTuple):
    """``variable`` are its dimensions of any size; ``group`` the inputs that have the same lengths."""

    spec: TensorSpec
    variable: tuple[int, ...]
    group: int
    pad: Any
    is_mask: bool


class _Bucket(NamedTuple):
    """What elements of one signature become: the bucket's ``signature``, the size of their padding, and the
    masks that they do not give, each with its place among the buffers."""

    signature: Signature
    padding_bytes: int
    masks: tuple[tuple[int, Array], ...]


class PaddedLengths(NamedTuple):
    """The lengths of a request's elements for each group of inputs, and what they were padded to.

    ``outputs`` maps output names to (dimension, group, which of its lengths), for each that may be cut.
    """

    outputs: Mapping[str, Sequence[tuple[int, int, int]]]
    padded: Sequence[Lengths | None]
    own: Sequence[Sequence[Lengths]]

    def cut(self, response: InferResponse) -> InferResponse:
        """The answer, with the padding cut off its rows."""
        cuts = {}
        for name, dimensions in self.outputs.items():
            array = response.outputs.get(name)
            found = [
                (dimension, group, which)
                for dimension, group, which in dimensions
                if array is not None
                and dimension + 1 < array.ndim
                and (padded := self.padded[group]) is not None
                and array.shape[dimension + 1] == padded[which]
            ]
            if found:
                cuts[name] = self._parts(found)
        return replace(response, cuts=cuts) if cuts else response

    def _parts(self, dimensions: Sequence[tuple[int, int, int]]) -> list[tuple[slice, ...]]:
        parts = []
        for row in range(len(self.own[dimensions[0][1]])):
            part = [slice(None)] * (dimensions[-1][0] + 1)
            for dimension, group, which in dimensions:
                part[dimension] = slice(self.own[group][row][which])
            parts.append(tuple(part))
        return parts


class Padding:
    """Prepares elements of one model for buckets, and pads those that share a request.

    Raises ConfigurationError for rules that do not fit the model and its ``outputs``.
    """

    def __init__(
        self, model: ModelSpec, outputs: Sequence[TensorSpec], rules: PaddingRules, binary: bool
    ) -> None:
        self._model = model
        self._binary = binary
        self._boundaries = tuple(rules.bucket_boundaries or ())
        self._inputs = _padded_inputs(model, rules)
        self._outputs = _cut_outputs(model, outputs, rules.cut_outputs or {}, self._inputs)
        self._group_count = 1 + max(entry.group for entry in self._inputs.values())
        masks = [name for name, entry in self._inputs.items() if entry.is_mask]
        others = [spec.name for spec in model.inputs if spec.name not in masks]
        self._only = others[0] if masks and len(others) == 1 else None
        # Masks are made here: elements may do without them.
        inputs = [replace(spec, optional=spec.optional or spec.name in masks) for spec in model.inputs]
        self.element_model = replace(model, inputs=tuple(inputs))
        self._exact = ElementPreparer(self.element_model, binary, as_arrays=self._inputs)
        self._buckets: dict[Signature, _Bucket] = {}

    def prepare(self, inputs: Any) -> PreparedElement:
        """As `ElementPreparer.prepare`; the signature and the size are those of the padded element.

        Raises LocalProtocolError, also where the lengths of inputs differ.
        """
        if self._only is not None and not isinstance(inputs, Mapping):
            inputs = {self._only: inputs}
        signature, buffers, nbytes = self._exact.prepare(inputs)
        bucket = self._buckets.get(signature) or self._bucket(signature)
        for place, mask in bucket.masks:
            buffers = (*buffers[:place], mask, *buffers[place:])
        return PreparedElement(bucket.signature, buffers, nbytes + bucket.padding_bytes)

    def join(
        self, prepared: Sequence[PreparedElement]
    ) -> tuple[Signature, list[Sequence[Buffer]], PaddedLengths]:
        """The elements' common shapes, their buffers for each input, and what the answer is cut by."""
        padded: list[Lengths | None] = [None] * self._group_count
        own: list[list[Lengths]] = [[] for _ in padded]
        shapes: list[Shape | None] = []
        columns: list[Sequence[Buffer]] = []
        for spec, shape in zip(self._model.inputs, prepared[0].signature, strict=True):
            entry = self._inputs.get(spec.name)
            if shape is not None:
                arrays: list[Any] = [element[1][len(columns)] for element in prepared]
                if entry is None:
                    columns.append(arrays)
                else:
                    lengths, group = padded[entry.group], own[entry.group]
                    if lengths is None:
                        group += _lengths_of(arrays, entry.variable)
                        bucket = tuple(shape[dim] for dim in entry.variable)
                        lengths = padded[entry.group] = self._padded_lengths(bucket, group)
                    shape = _with_lengths(shape, entry.variable, lengths)
                    columns.append([self._padded(entry, shape, arrays, group)])
            shapes.append(shape)
        return tuple(shapes), columns, PaddedLengths(self._outputs, padded, own)

    def is_fixed(self, signature: Signature) -> bool:
        """Whether every request of a bucket has the same shape, whichever its elements are."""
        lengths = [each for each in self._own_lengths(signature) if each is not None]
        return all(length <= self._boundaries[-1] for each in lengths for length in each)

    def _bucket(self, signature: Signature) -> _Bucket:
        """The bucket of elements of these exact shapes."""
        own = self._own_lengths(signature)
        shapes: list[Shape | None] = []
        masks: list[tuple[int, Array]] = []
        padding_bytes = given = 0
        for spec, exact in zip(self._model.inputs, signature, strict=True):
            entry = self._inputs.get(spec.name)
            shape: Shape | None = exact
            lengths = None if entry is None else own[entry.group]
            if entry is not None and lengths is not None and (exact is not None or entry.is_mask):
                if exact is None:
                    exact = _with_lengths(spec.shape, entry.variable, lengths)
                    one = to_array(1, TensorSpec(spec.name, spec.datatype, ()))
                    # Of one value in memory, however long: buckets are kept.
                    masks.append((given, np.broadcast_to(one, exact)))
                    padding_bytes += masks[-1][1].nbytes
                shape = _with_lengths(exact, entry.variable, tuple(map(self._boundary, lengths)))
                item_bytes = DATATYPES[spec.datatype].item_bytes or LENGTH_BYTES + len(entry.pad)
                padding_bytes += (_count(shape) - _count(exact)) * item_bytes
            given += shape is not None
            shapes.append(shape)
        bucket = _Bucket(tuple(shapes), padding_bytes, tuple(masks))
        if len(self._buckets) >= _MAX_CACHED_SIGNATURES:
            self._buckets.clear()
        self._buckets[signature] = bucket
        return bucket

    def _own_lengths(self, signature: Signature) -> list[Lengths | None]:
        """The lengths of each group of inputs, None where the element has none of them."""
        own: list[Lengths | None] = [None] * self._group_count
        first = [""] * self._group_count
        for spec, shape in zip(self._model.inputs, signature, strict=True):
            entry = self._inputs.get(spec.name)
            if entry is None or shape is None:
                continue
            lengths = tuple(shape[dim] for dim in entry.variable)
            known = own[entry.group]
            if known is None:
                own[entry.group], first[entry.group] = lengths, spec.name
            elif lengths != known:
                raise LocalProtocolError(
                    f"inputs {first[entry.group]!r} and {spec.name!r} of model {self._model.name!r} must be "
                    f"of equal lengths, not {_shown(known)} and {_shown(lengths)}. If their lengths are "
                    f"independent, give each its own mapping in a list, "
                    f"batching.pad=[{{{first[entry.group]!r}: 0}}, {{{spec.name!r}: 0}}]"
                )
        return own

    def _boundary(self, length: int) -> int:
        """Where the bucket of ``length`` ends."""
        place = bisect_left(self._boundaries, length)
        if place < len(self._boundaries):
            return self._boundaries[place]
        boundary = self._boundaries[-1]
        while boundary < length:
            boundary *= 2
        return boundary

    def _padded_lengths(self, bucket: Lengths, own: Sequence[Lengths]) -> Lengths:
        """The lengths that elements of a bucket are padded to."""
        last = self._boundaries[-1]
        return tuple(
            boundary if boundary <= last else max(lengths[which] for lengths in own)
            for which, boundary in enumerate(bucket)
        )

    def _padded(
        self, entry: _PaddedInput, shape: Shape, arrays: Sequence[Array], own: Sequence[Lengths]
    ) -> bytes | memoryview:
        """The arrays of one input, padded to ``shape``, as bytes of a request's body."""
        spec = entry.spec
        padded: Array = np.full((len(arrays), *shape), entry.pad, DATATYPES[spec.datatype].wire_dtype)
        if entry.variable == (0,):
            for row, array, (length,) in zip(padded, arrays, own, strict=True):
                row[:length] = array
        else:
            for row, array in zip(padded, arrays, strict=True):
                row[tuple(map(slice, array.shape))] = array
        if self._binary:
            return wire_bytes(padded, spec.datatype, spec.name)
        return json_items(padded, spec.datatype, spec.name)


def _padded_inputs(model: ModelSpec, rules: PaddingRules) -> dict[str, _PaddedInput]:
    """The inputs that are padded, in the model's order."""
    if not model.inputs:
        raise _misfit(model, "bucket_boundaries", "its server does not name the inputs: give model_spec")
    if not model.has_batch_dimension:
        raise _misfit(
            model, "bucket_boundaries", "it has no batch dimension, so that nothing shares a request"
        )
    variable = {
        spec.name: tuple(dim for dim, size in enumerate(spec.shape) if size == -1) for spec in model.inputs
    }
    masks = [] if rules.mask is None else [rules.mask] if isinstance(rules.mask, str) else list(rules.mask)
    for name in masks:
        _check_input(model, name, "mask", variable)
    groups: Sequence[Mapping[str, Any]]
    if isinstance(rules.pad, Mapping):
        groups = [rules.pad]
    elif isinstance(rules.pad, Sequence) and not isinstance(rules.pad, (str, bytes)):
        groups = rules.pad
    else:
        groups = [{name: rules.pad for name, dims in variable.items() if dims and name not in masks}]
        if not groups[0]:
            raise _misfit(
                model, "bucket_boundaries", f"no input has a variable dimension; {model.describe()}"
            )
    # Without a list, inputs with as many variable dimensions have the same lengths.
    keys: dict[str, tuple[int, int]] = {}
    values: dict[str, Any] = dict.fromkeys(masks)
    for number, group in enumerate(groups):
        for name, value in group.items():
            _check_input(model, name, "pad", variable)
            if name in keys:
                raise _misfit(model, "pad", f"input {name!r} is named twice")
            keys[name] = (number, len(variable[name]))
            values[name] = value
    for name in masks:
        if name not in keys:
            fitting = {key for key in keys.values() if key[1] == len(variable[name])}
            if len(fitting) != 1:
                raise _misfit(model, "mask", f"name {name!r} in the mapping of pad that holds its inputs")
            keys[name] = fitting.pop()
        if sum(key == keys[name] and other not in masks for other, key in keys.items()) == 0:
            raise _misfit(model, "mask", f"no input has as many variable dimensions as {name!r}")
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys.values()))}
    return {
        spec.name: _PaddedInput(
            spec,
            variable[spec.name],
            numbers[keys[spec.name]],
            _pad_value(model, spec, values[spec.name], spec.name in masks),
            spec.name in masks,
        )
        for spec in model.inputs
        if spec.name in keys
    }


def _check_input(model: ModelSpec, name: str, option: str, variable: Mapping[str, tuple[int, ...]]) -> None:
    dims = variable.get(name)
    if dims is None:
        raise _misfit(model, option, f"it has no input {name!r}; {model.describe()}")
    if not dims:
        raise _misfit(model, option, f"input {name!r} has no variable dimension; {model.describe()}")


def _pad_value(model: ModelSpec, spec: TensorSpec, value: Any, is_mask: bool) -> Any:
    """The value to pad with, as NumPy takes it for the wire dtype."""
    is_bytes = DATATYPES[spec.datatype].is_bytes
    if is_bytes and is_mask:
        raise _misfit(model, "mask", f"input {spec.name!r} takes BYTES, which hold no 0 and 1")
    if value is None:
        value = b"" if is_bytes else 0
    try:
        return to_array(value, TensorSpec(spec.name, spec.datatype, ())).item()
    except LocalProtocolError as error:
        raise _misfit(model, "pad", error.message) from None


def _cut_outputs(
    model: ModelSpec,
    outputs: Sequence[TensorSpec],
    given: Mapping[str, str | None],
    inputs: Mapping[str, _PaddedInput],
) -> dict[str, list[tuple[int, int, int]]]:
    """For each output that may be cut: its variable dimensions, with the group and the length of each."""
    known = {spec.name for spec in outputs}
    for name, source in given.items():
        if name not in known:
            raise _misfit(
                model, "cut_outputs", f"{name!r} is no output that is asked for; {model.describe()}"
            )
        if source is not None and source not in inputs:
            raise _misfit(model, "cut_outputs", f"{source!r} is no input that is padded: {', '.join(inputs)}")
    ranks = {entry.group: len(entry.variable) for entry in inputs.values()}
    cut = {}
    for spec in outputs:
        variable = [dim for dim, size in enumerate(spec.shape) if size == -1]
        source = given.get(spec.name)
        if not variable or spec.name in model.whole_outputs or (spec.name in given and source is None):
            continue
        candidates = [inputs[source].group] if source is not None else list(ranks)
        fitting = [group for group in candidates if ranks[group] == len(variable)] or [
            group for group in candidates if ranks[group] == 1
        ]
        if len(fitting) == 1:
            (group,) = fitting
            cut[spec.name] = [
                (dim, group, which if ranks[group] > 1 else 0) for which, dim in enumerate(variable)
            ]
        elif fitting:
            names = [next(name for name in inputs if inputs[name].group == group) for group in fitting]
            raise _misfit(
                model,
                "cut_outputs",
                f"output {spec.describe()} may have the lengths of {' or '.join(map(repr, names))}: say "
                f"which by batching.cut_outputs={{{spec.name!r}: {names[0]!r}}}, or None if neither",
            )
        elif source is not None:
            raise _misfit(
                model,
                "cut_outputs",
                f"output {spec.describe()} and input {inputs[source].spec.describe()} have different numbers "
                f"of variable dimensions",
            )
    return cut


def _misfit(model: ModelSpec, option: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"batching.{option} does not fit model {model.name!r}: {reason}")


def _lengths_of(arrays: Sequence[Array], variable: tuple[int, ...]) -> list[Lengths]:
    if variable == (0,):
        return [array.shape[:1] for array in arrays]
    return [tuple(array.shape[dim] for dim in variable) for array in arrays]


def _with_lengths(shape: Shape, variable: tuple[int, ...], lengths: Lengths) -> Shape:
    sizes = list(shape)
    for dim, length in zip(variable, lengths, strict=True):
        sizes[dim] = length
    return tuple(sizes)


def _count(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _shown(lengths: Lengths) -> str:
    return " x ".join(map(str, lengths))

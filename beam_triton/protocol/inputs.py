"""An element's values matched to the model's inputs by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from beam_triton.errors import LocalProtocolError
from beam_triton.protocol.datatypes import datatype_of
from beam_triton.protocol.model import ModelSpec, TensorSpec
from beam_triton.protocol.text import shorten


def match_inputs(model: ModelSpec, inputs: Any, *, batched: bool = False) -> list[tuple[TensorSpec, Any]]:
    """The inputs that ``inputs`` gives, in the model's order, each with its value.

    ``inputs`` maps names to values, or is the value itself where the model has one input. An optional input
    may be absent or None. Where the server does not say what the model takes, the names and dtypes are those
    of the values, which are arrays then (``batched``: the first dimension is the batch's).

    Raises LocalProtocolError for a missing input, an unknown one, or none at all.
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
                f"input {name!r}: no array can be made of {shorten(value)}: {shorten(str(error), 160)}"
            ) from error
        rank = array.ndim - 1 if batched else array.ndim
        if rank < 0:
            raise LocalProtocolError(f"input {name!r} needs a batch dimension, not {shorten(value)} alone")
        datatype = datatype_of(array, name)
        spec = TensorSpec(name, datatype.name, (-1,) * rank)
        matched.append((spec, value if datatype.is_bytes else array))
    return matched

"""Requests that fit a model without anybody's data: zeros and empty strings."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from beam_triton.errors import ConfigurationError
from beam_triton.protocol import DATATYPES, EncodedRequest, ModelSpec, TensorSpec
from beam_triton.remote_model import RemoteModel

Shapes = Mapping[str, tuple[int, ...]]


def zeros_request(model: RemoteModel, shapes: Shapes, rows: int) -> EncodedRequest:
    """A request of ``rows`` elements; open sizes are 1 unless ``shapes`` gives them.

    Raises:
        ConfigurationError: the server names no inputs, or a shape does not fit the model.
    """
    spec = model.spec
    if not spec.inputs:
        raise ConfigurationError(
            f"the server does not name the inputs of model {spec.name!r}: no request can be made up for it"
        )
    unknown = sorted(shapes.keys() - {tensor.name for tensor in spec.inputs})
    if unknown:
        raise ConfigurationError(f"--shape: model {spec.name!r} has no input {unknown}; {spec.describe()}")
    inputs = {}
    for tensor in spec.inputs:
        if tensor.optional and tensor.name not in shapes:
            continue
        shape = shape_of(tensor, shapes)
        datatype = DATATYPES[tensor.datatype]
        zero = np.full((), b"", object) if datatype.is_bytes else np.zeros((), datatype.array_dtype)
        inputs[tensor.name] = np.broadcast_to(zero, (rows, *shape) if spec.has_batch_dimension else shape)
    return model.encoder.encode(inputs)


def shape_of(tensor: TensorSpec, shapes: Shapes) -> tuple[int, ...]:
    """One element's shape of an input.

    Raises:
        ConfigurationError: the given one is not the model's.
    """
    given = shapes.get(tensor.name)
    if given is None:
        return tuple(1 if size == -1 else size for size in tensor.shape)
    if len(given) != len(tensor.shape) or any(
        size not in (-1, one) for size, one in zip(tensor.shape, given, strict=True)
    ):
        raise ConfigurationError(f"--shape {tensor.name}: {list(given)} does not fit {tensor.describe()}")
    return given


def describe_zeros(spec: ModelSpec, shapes: Shapes) -> str:
    """What such a request holds, for people: ``image FP32 [3, 224, 224]``."""
    sent = [tensor for tensor in spec.inputs if not tensor.optional or tensor.name in shapes]
    return ", ".join(f"{each.name} {each.datatype} {list(shape_of(each, shapes))}" for each in sent)

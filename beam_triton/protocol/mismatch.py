"""Refusing a value that does not fit an input: the message says what is taken and what came."""

from __future__ import annotations

from typing import Any

import numpy as np

from beam_triton.errors import LocalProtocolError
from beam_triton.protocol.datatypes import Array
from beam_triton.protocol.model import TensorSpec
from beam_triton.protocol.text import shorten


def shape_text(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join("any" if dim == -1 else str(dim) for dim in shape) + "]"


def refuse(spec: TensorSpec, came: str, advice: str = "") -> LocalProtocolError:
    return LocalProtocolError(
        f"input {spec.name!r} takes {spec.datatype} of shape {shape_text(spec.shape)}, "
        f"not {came}{f': {advice}' if advice else ''}"
    )


def as_array(value: Any, spec: TensorSpec) -> Array:
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise refuse(spec, "a masked array with masked values", "fill them first")
    try:
        return np.asarray(value)
    except Exception as error:
        # Whatever a foreign __array__ raises (a tensor on a GPU, ragged lists) is the element's fault.
        reason = shorten(str(error), 160)
        raise refuse(spec, f"{type(value).__name__} {shorten(value)}", f"NumPy says {reason}") from error


def described(value: Any, array: Array) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of dtype {array.dtype}"
    return f"{type(value).__name__} {shorten(value)}"

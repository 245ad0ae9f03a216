"""Values of an element to arrays of a model's input, without loss or with a clear error.

Floats are rounded to the precision of a narrower float type, as NumPy's ``same_kind`` casts do: float64 is
NumPy's default, not a choice of its author. Integers in arrays (and in whatever ``numpy.asarray``
understands: tensors, Series, columns) are kept exactly; Python's own numbers are rounded where the input is a
float. Nothing is ever clipped, wrapped, truncated, turned into infinity or parsed from text.

``numpy.can_cast`` decides by dtype where it is right. Where it is too strict (an int64 array of small values
for INT32) or too lenient (int64 to float64, which rounds beyond 2**53), the values decide.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from beam_triton.errors import LocalProtocolError
from beam_triton.protocol.bfloat16 import round_to_bfloat16, widen_bfloat16
from beam_triton.protocol.byte_strings import object_array
from beam_triton.protocol.datatypes import BF16, DATATYPES, Array, Datatype, is_bfloat16
from beam_triton.protocol.model import TensorSpec
from beam_triton.protocol.packing import packer_of
from beam_triton.protocol.text import shorten

_NUMBER_KINDS = "biuf"


def to_array(value: Any, spec: TensorSpec, *, batched: bool = False) -> Array:
    """``value`` as the array to send for ``spec``: C-contiguous, little-endian, of the wire dtype.

    ``value`` has the shape of one element, with a batch dimension in front if ``batched``. An array that
    needs no change is returned itself, not a copy. Unless ``batched``, a single value fits an input of one
    value whatever its rank: ``3.5`` fits shape [], [1] and [1, 1]. BF16 is returned as its bits in uint16,
    BYTES as an object array of ``bytes`` (``str`` is encoded as UTF-8).

    Raises LocalProtocolError, naming the input, what it takes and what it was given.
    """
    datatype = DATATYPES[spec.datatype]
    if datatype.is_bytes:
        values, shape = byte_string_values(value, spec)
        return object_array(values, len(values), fit_shape(shape, spec, batched))
    if type(value) is np.ndarray and value.dtype == datatype.wire_dtype and datatype is not BF16:
        array = value
    else:
        array = _number_array(value, spec, datatype)
    shape = fit_shape(array.shape, spec, batched)
    if shape != array.shape or not array.flags.c_contiguous:
        array = np.ascontiguousarray(array).reshape(shape)
    return array


def fit_shape(shape: tuple[int, ...], spec: TensorSpec, batched: bool) -> tuple[int, ...]:
    """The shape to send for a value of ``shape``: the same, or the input's for a single value.

    Raises LocalProtocolError for a shape that the input does not take.
    """
    wanted = spec.shape
    own = shape[1:] if batched else shape
    if len(shape) == len(wanted) + batched and all(
        want in (-1, dim) for dim, want in zip(own, wanted, strict=True)
    ):
        return shape
    if not shape and not batched and all(want in (1, -1) for want in wanted):
        return (1,) * len(wanted)
    expected = _shape_text(("batch", *wanted) if batched else wanted)
    raise LocalProtocolError(
        f"input {spec.name!r} takes {spec.datatype} of shape {expected}, not shape {_shape_text(shape)}"
    )


def byte_string_values(value: Any, spec: TensorSpec) -> tuple[list[bytes], tuple[int, ...]]:
    """The values of ``value`` in row-major order, and its shape; ``str`` becomes UTF-8.

    Raises LocalProtocolError for values that are neither text nor bytes, and text that is not Unicode.
    """
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return [_one_byte_string(value, spec)], ()
    if isinstance(value, (list, tuple)):
        if set(map(type, value)).isdisjoint((list, tuple, np.ndarray)):
            # Values that NumPy treats as sequences (bytearray) must not become a dimension.
            return _byte_strings(list(value), spec), (len(value),)
        try:
            array = np.array(value, dtype=object)
        except ValueError:
            raise _refuse(spec, f"lists of unequal lengths {shorten(value)}") from None
    else:
        array = _as_array(value, spec)
    if array.dtype.kind not in "OSUT":
        raise _refuse(spec, _described(value, array), "BYTES are made of str or bytes")
    return _byte_strings(array.ravel().tolist(), spec), array.shape


def _byte_strings(values: list[Any], spec: TensorSpec) -> list[bytes]:
    kinds = set(map(type, values))
    if kinds <= {bytes}:
        return values
    if kinds == {str}:
        try:
            return list(map(str.encode, values))
        except UnicodeEncodeError:
            pass  # The loop below finds and names it.
    return [_one_byte_string(value, spec) for value in values]


def _one_byte_string(value: Any, spec: TensorSpec) -> bytes:
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError:
            came = f"str {shorten(value)}"
            raise _refuse(spec, came, "UTF-8 cannot encode its lone surrogates") from None
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise _refuse(spec, f"{type(value).__name__} {shorten(value)}", "BYTES are made of str or bytes")


def _number_array(value: Any, spec: TensorSpec, datatype: Datatype) -> Array:
    """``value`` as an array of the wire dtype of ``datatype``, of whatever shape it has.

    Raises LocalProtocolError for text, objects, and numbers that the datatype cannot hold.
    """
    if type(value) in (list, tuple):
        packer = packer_of(datatype.name)
        packed = packer.pack_lists(value) if packer is not None else None
        if packed is not None:
            wire, shape = packed
            return np.frombuffer(wire, dtype=datatype.wire_dtype).reshape(shape)
    dtypeless = isinstance(value, (bool, int, float, list, tuple, np.generic))
    array = _as_array(value, spec)
    may_round = dtypeless or array.dtype.kind == "O"
    if may_round:
        array = _python_numbers(array, value, spec, datatype)
    if is_bfloat16(array.dtype):
        bits = array.view(np.uint16)
        if datatype is BF16:
            return bits
        array = widen_bfloat16(bits)
    if array.dtype.kind not in _NUMBER_KINDS:
        raise _refuse(spec, _described(value, array), "text and objects are not converted to numbers")
    if datatype is BF16:
        return _to_bfloat16(array, spec)
    return _cast(array, datatype.wire_dtype, spec, may_round)


def _python_numbers(array: Array, value: Any, spec: TensorSpec, datatype: Datatype) -> Array:
    """Check, and where necessary redo, what ``numpy.asarray`` made of values without a dtype."""
    kind = array.dtype.kind
    wants_bool = datatype.wire_dtype.kind == "b"
    if not wants_bool and (kind == "b" or (kind in "iuf" and _holds_bool(value))):
        raise _refuse(spec, f"the boolean(s) {shorten(value)}", "write 0 and 1, or convert them first")
    if kind == "O":
        return _from_objects(array, spec, datatype)
    if (
        kind == "f"
        and datatype.wire_dtype.kind in "iu"
        and datatype is not BF16
        and array.dtype.itemsize == 8
        and (np.abs(array) >= 2.0**53).any()
    ):
        # NumPy makes float64 of [2**63 + 1, 1], which loses the 1: start again from the integers.
        return _from_objects(np.array(value, dtype=object), spec, datatype)
    return array


def _holds_bool(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        kinds = set(map(type, value))
        if bool in kinds or np.bool_ in kinds:
            return True
        return not kinds.isdisjoint((list, tuple)) and any(map(_holds_bool, value))
    return isinstance(value, (bool, np.bool_))


def _from_objects(array: Array, spec: TensorSpec, datatype: Datatype) -> Array:
    items = array.ravel().tolist()
    wants_bool = datatype.wire_dtype.kind == "b"
    for item in items:
        is_bool = isinstance(item, (bool, np.bool_))
        if not (wants_bool if is_bool else isinstance(item, (int, float, np.integer, np.floating))):
            raise _refuse(spec, f"{type(item).__name__} {shorten(item)} among its values")
    try:
        if datatype.wire_dtype.kind in "iu" and datatype is not BF16:
            low, high = _integer_range(datatype.wire_dtype)
            whole = list(map(int, items))
            if whole != items or (whole and not low <= min(whole) <= max(whole) <= high):
                raise ValueError
            numbers: Array = np.array(whole, dtype=datatype.wire_dtype)
        else:
            numbers = np.array([float(item) for item in items], dtype=np.float64)
    except (ValueError, OverflowError):
        raise _refuse(spec, f"values such as {shorten(items[:3])}", "they do not fit its range") from None
    shaped: Array = numbers.reshape(array.shape)
    return shaped


def _cast(array: Array, dtype: np.dtype[Any], spec: TensorSpec, may_round: bool) -> Array:
    source = array.dtype
    if source == dtype:
        return array
    if source.kind == dtype.kind and source.itemsize == dtype.itemsize:
        return array.astype(dtype)
    if dtype.kind == "f" and source.kind == "f":
        return _float_to_float(array, dtype, spec)
    if dtype.kind == "f" and source.kind in "iu":
        return _integer_to_float(array, dtype, spec, may_round)
    if np.can_cast(source, dtype, "safe"):
        return array.astype(dtype)
    if source.kind == "f":
        return _float_to_integer(array, dtype, spec)
    if source.kind in "iu":
        low, high = _integer_range(dtype)
        if array.size and not (low <= int(array.min()) and int(array.max()) <= high):
            came = f"{source} values from {array.min()} to {array.max()}"
            raise _refuse(spec, came, f"it holds {low} to {high}")
        return array.astype(dtype)
    raise _refuse(spec, f"an array of dtype {source}")


def _integer_range(dtype: np.dtype[Any]) -> tuple[int, int]:
    if dtype.kind == "b":
        return 0, 1
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def _float_to_float(array: Array, dtype: np.dtype[Any], spec: TensorSpec) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    if np.can_cast(array.dtype, dtype, "safe"):
        return cast
    kept = np.isfinite(cast)
    if not kept.all():
        kept |= ~np.isfinite(array)
        _require(kept, array, spec, f"it does not fit the range of {spec.datatype}")
    return cast


def _integer_to_float(array: Array, dtype: np.dtype[Any], spec: TensorSpec, may_round: bool) -> Array:
    exact = 2 ** (np.finfo(dtype).nmant + 1)
    if array.size and -exact <= int(array.min()) and int(array.max()) <= exact:
        return array.astype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
        if may_round:
            kept = np.isfinite(cast)
        else:
            low, high = _integer_range(array.dtype)
            # float(high) may round up to high + 1, which the cast back cannot hold: stay strictly below.
            wide = cast.astype(np.float64)
            inside = (wide >= float(low)) & (wide < float(high + 1))
            kept = inside & (np.where(inside, wide, 0.0).astype(array.dtype) == array)
    _require(kept, array, spec, f"{spec.datatype} cannot hold it exactly")
    return cast


def _float_to_integer(array: Array, dtype: np.dtype[Any], spec: TensorSpec) -> Array:
    low, high = _integer_range(dtype)
    wide = array.astype(np.float64) if array.dtype.itemsize < 8 else array
    with np.errstate(invalid="ignore"):
        kept = (wide >= float(low)) & (wide < float(high + 1)) & (np.trunc(wide) == wide)
    _require(kept, array, spec, f"only whole numbers from {low} to {high} fit")
    return wide.astype(dtype)


def _to_bfloat16(array: Array, spec: TensorSpec) -> Array:
    floats = array if array.dtype.kind == "f" else array.astype(np.float64)
    bits = round_to_bfloat16(floats)
    kept = np.isfinite(widen_bfloat16(bits)) | ~np.isfinite(floats)
    _require(kept, array, spec, "it does not fit the range of BF16")
    return bits


def _require(kept: Any, array: Array, spec: TensorSpec, advice: str) -> None:
    if kept.all():
        return
    first = array[~kept][0] if array.ndim else array[()]
    shown = float(first) if isinstance(first, np.floating) else first
    raise _refuse(spec, f"{array.dtype} value {shown!r}" if math.isfinite(shown) else f"{shown!r}", advice)


def _shape_text(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join("any" if dim == -1 else str(dim) for dim in shape) + "]"


def _refuse(spec: TensorSpec, came: str, advice: str = "") -> LocalProtocolError:
    return LocalProtocolError(
        f"input {spec.name!r} takes {spec.datatype} of shape {_shape_text(spec.shape)}, "
        f"not {came}{f': {advice}' if advice else ''}"
    )


def _as_array(value: Any, spec: TensorSpec) -> Array:
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise _refuse(spec, "a masked array with masked values", "fill them first")
    try:
        return np.asarray(value)
    except Exception as error:
        # Whatever __array__ raises (a tensor on a GPU) and whatever is ragged is the element's fault.
        reason = shorten(str(error), 160)
        raise _refuse(spec, f"{type(value).__name__} {shorten(value)}", f"NumPy says {reason}") from error


def _described(value: Any, array: Array) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of dtype {array.dtype}"
    return f"{type(value).__name__} {shorten(value)}"

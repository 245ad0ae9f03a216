"""BF16, the upper half of a float32, as NumPy can hold it: its bits in uint16."""

from __future__ import annotations

import numpy as np

from beam_triton.protocol.datatypes import Array

_LOWER_HALF = np.uint32(0xFFFF)
_HALF_WAY = np.uint32(0x8000)
_QUIET_NAN = np.uint16(0x7FC0)


def round_to_bfloat16(values: Array) -> Array:
    """The bits of floating-point ``values`` rounded to the nearest BF16, ties to even; same shape.

    NaN stays NaN. A value that is too large becomes infinite, as rounding to nearest requires.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        narrowed = values.astype("<f4")
    bits = narrowed.view("<u4")
    if values.dtype.itemsize > 4:
        bits = _sticky(values, narrowed, bits)
    upper = bits >> np.uint32(16)
    lower = bits & _LOWER_HALF
    round_up = (lower > _HALF_WAY) | ((lower == _HALF_WAY) & ((upper & np.uint32(1)) == 1))
    rounded = (upper + round_up).astype("<u2")
    nan = np.isnan(narrowed)
    if nan.any():
        # Rounding would carry some NaN payloads into infinity.
        sign = (bits >> np.uint32(16)).astype("<u2") & np.uint16(0x8000)
        rounded = np.where(nan, sign | _QUIET_NAN, rounded).astype("<u2")
    contiguous: Array = np.ascontiguousarray(rounded).reshape(values.shape)
    return contiguous


def _sticky(values: Array, narrowed: Array, bits: Array) -> Array:
    # Rounding twice (to float32, then to BF16) errs if the first step lands exactly half way between two
    # BF16 values: moving one unit back towards the true value puts it on the right side.
    half_way = (bits & _LOWER_HALF) == _HALF_WAY
    if not half_way.any():
        return bits
    magnitude, true_magnitude = np.abs(narrowed.astype(values.dtype)), np.abs(values)
    nudge = (half_way & (magnitude < true_magnitude)).astype("<u4")
    nudge -= (half_way & (magnitude > true_magnitude)).astype("<u4")
    nudged: Array = bits + nudge
    return nudged


def widen_bfloat16(bits: Array) -> Array:
    """The float32 array that has exactly the values of the BF16 ``bits`` (a uint16 array)."""
    widened: Array = (bits.astype("<u4") << np.uint32(16)).view("<f4")
    return widened

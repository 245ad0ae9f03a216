"""BF16 against ml_dtypes, which rounds in C++."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from beam_triton.protocol.bfloat16 import round_to_bfloat16, widen_bfloat16
from beam_triton.protocol.datatypes import Array


@given(hnp.arrays(np.dtype("<u4"), hnp.array_shapes(max_dims=2, min_side=0)))
def test_float32_rounds_as_ml_dtypes_does(bits: Array) -> None:
    """Any float32 bit pattern: the same BF16 as ml_dtypes, NaN for NaN."""
    values = bits.view("<f4")
    expected = values.astype(ml_dtypes.bfloat16)
    rounded = round_to_bfloat16(values).view(ml_dtypes.bfloat16)
    assert np.array_equal(np.isnan(expected), np.isnan(rounded))
    assert np.array_equal(expected[~np.isnan(expected)], rounded[~np.isnan(rounded)])
    assert rounded.shape == values.shape


@given(st.integers(0, 0xFFFF), st.sampled_from([-1, 0, 1]))
def test_float64_near_a_tie_rounds_to_its_own_side(upper: int, side: int) -> None:
    """A float64 next to the middle of two BF16 values is not rounded as if it were the middle."""
    below = np.array([upper << 16], "<u4").view("<f4")[0]
    above = np.array([(upper + 1 & 0xFFFF) << 16], "<u4").view("<f4")[0]
    if not (np.isfinite(below) and np.isfinite(above)) or (upper & 0x7FFF) == 0x7F7F or upper == 0xFFFF:
        return
    middle = (np.float64(below) + np.float64(above)) / 2
    value = np.nextafter(middle, np.float64(above if side > 0 else below)) if side else middle
    got = widen_bfloat16(round_to_bfloat16(np.array([value])))[0]
    even = below if upper % 2 == 0 else above
    assert got == {-1: below, 0: even, 1: above}[side]


def test_zeros_infinities_and_nan_keep_their_kind() -> None:
    """Signed zeros, infinities and NaN with any payload keep their kind."""
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], "<f4")
    back = widen_bfloat16(round_to_bfloat16(special))
    assert np.array_equal(back, special, equal_nan=True)
    assert np.signbit(back).tolist() == np.signbit(special).tolist()
    payloads = np.array([0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF], "<u4").view("<f4")
    assert np.isnan(widen_bfloat16(round_to_bfloat16(payloads))).all()


@given(hnp.arrays(np.dtype("<u2"), 8))
def test_widening_is_exact(bits: Array) -> None:
    """Every BF16 widened to float32 rounds to the same bits again, unless it is NaN."""
    widened = widen_bfloat16(bits)
    numbers = ~np.isnan(widened)
    assert np.array_equal(round_to_bfloat16(widened)[numbers], bits[numbers])

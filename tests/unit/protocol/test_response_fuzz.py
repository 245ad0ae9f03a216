"""The decoder on random bytes: only RemoteProtocolError may escape."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.fuzz_decoder import check, mutated, valid_inputs

SEEDS = valid_inputs()


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_only_remote_protocol_errors(data: bytes) -> None:
    """Bytes without any structure."""
    check(data)


@given(st.sampled_from(SEEDS), st.data())
def test_answers_with_a_replaced_piece_raise_only_remote_protocol_errors(
    seed: bytes, data: st.DataObject
) -> None:
    """A valid answer with a piece of it replaced by other bytes, or left out."""
    start = data.draw(st.integers(0, len(seed)))
    end = data.draw(st.integers(start, min(len(seed), start + 8)))
    check(seed[:start] + data.draw(st.binary(max_size=8)) + seed[end:])


@given(st.sampled_from(SEEDS), st.randoms(use_true_random=False))
def test_mutated_answers_raise_only_remote_protocol_errors(seed: bytes, rng: random.Random) -> None:
    """The mutations of the long run, a few of them in every run of the tests."""
    check(mutated(seed, rng))


def test_the_seeds_of_the_fuzzer_are_decoded() -> None:
    """The fuzzer starts from answers that the decoder accepts; otherwise it would test little."""
    for seed in SEEDS:
        assert check(seed)

"""Padded batches on a real Triton: each element gets the answer that it gets alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from beam_triton import TritonInference
from beam_triton.testing import LocalTriton
from tests.support.pipelines import score


def test_padded_answers_are_those_of_the_elements_alone(triton: LocalTriton) -> None:
    """Token ids of log-normal lengths: less than a fifth of the requests, and the same values."""
    generator = np.random.default_rng(1)
    lengths = np.clip(generator.lognormal(4, 0.8, 1_000), 1, 512).astype(int)
    ids = [generator.integers(1, 1_000, length) for length in lengths]
    exact = score(
        [{"input_ids": each, "attention_mask": np.ones_like(each)} for each in ids],
        TritonInference(triton.endpoint, "attend"),
    )
    alone = {id_key(result.example["input_ids"]): result.inference for result in exact.results}
    batching: dict[str, Any] = {"bucket_boundaries": [16, 32, 64, 128, 256], "mask": "attention_mask"}
    padded = score(ids, TritonInference(triton.endpoint, "attend", batching=batching))
    assert len(padded.results) == 1_000 and len(alone) == len({id_key(each) for each in ids})
    for result in padded.results:
        expected = alone[id_key(result.example)]
        assert result.inference["mean"].tolist() == expected["mean"].tolist()
        assert result.inference["centred"].tolist() == expected["centred"].tolist()
        (width,), length = result.inference["width"], len(result.example)
        assert length <= width and (width in batching["bucket_boundaries"] or length > 256)
    assert padded.counters["requests"] < exact.counters["requests"] / 5


def id_key(ids: Any) -> bytes:
    """What identifies an element among others."""
    key: bytes = ids.tobytes()
    return key

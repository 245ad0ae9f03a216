"""The open batch of arrays that are all alike."""

from __future__ import annotations

import numpy as np
import pytest
from apache_beam.transforms.window import GlobalWindows

from beam_triton import BatchingPolicy
from beam_triton.transforms.uniform_batch import ArrayBatch

ARRAY = np.zeros(4, np.float32)


@pytest.mark.parametrize(
    ("policy", "model_limit", "size"),
    [
        (BatchingPolicy(), 32, 32),
        (BatchingPolicy(max_batch_size=8), 32, 8),
        (BatchingPolicy(max_batch_size=100), 32, 32),
        (BatchingPolicy(max_batch_bytes=100), 32, 6),
    ],
)
def test_how_many_it_collects(policy: BatchingPolicy, model_limit: int, size: int) -> None:
    """The model's limit, the policy's number and its bytes, whichever is the least."""
    batch = ArrayBatch(policy, model_limit)
    assert batch.begin(ARRAY)
    assert (batch.size, batch.shape, batch.dtype) == (size, (4,), np.dtype(np.float32))


@pytest.mark.parametrize(
    ("policy", "model_limit"),
    [
        (BatchingPolicy(), 0),
        (BatchingPolicy(), 1),
        (BatchingPolicy(max_batch_size=1), 32),
        (BatchingPolicy(max_batch_bytes=20), 32),
        (BatchingPolicy(linger_seconds=1), 32),
    ],
)
def test_what_it_leaves_to_others(policy: BatchingPolicy, model_limit: int) -> None:
    """Batches of one, models without batches, and batches that have to leave in time."""
    batch = ArrayBatch(policy, model_limit)
    assert not batch.begin(ARRAY)
    assert batch.shape is None


def test_one_kind_at_a_time() -> None:
    """Another shape may begin only when nothing waits; what is taken is taken once."""
    batch = ArrayBatch(BatchingPolicy(), 32)
    assert batch.begin(ARRAY)
    batch.windowed_values.append(GlobalWindows.windowed_value("first"))
    batch.tensors.append(ARRAY)
    batch.numbers.append(7)
    assert not batch.begin(np.zeros(5, np.float32))
    taken = batch.take()
    assert [value.value for value in taken.windowed_values] == ["first"]
    assert taken.numbers == [7] and taken.tensors[0] is ARRAY
    assert len(batch.take()) == 0
    assert batch.begin(np.zeros(5, np.float32))
    assert batch.shape == (5,)


def test_empty_arrays() -> None:
    """Arrays of no bytes are bounded by number alone."""
    batch = ArrayBatch(BatchingPolicy(max_batch_bytes=100), 32)
    assert batch.begin(np.zeros(0, np.float32))
    assert batch.size == 32

"""A bundle's open batch of arrays of one shape, and outputs that keep their windows."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from apache_beam import coders, pvalue
from apache_beam.transforms.window import GlobalWindow, GlobalWindows, IntervalWindow, SlidingWindows
from apache_beam.utils.windowed_value import PaneInfo, PaneInfoTiming, WindowedValue

from beam_triton import BatchingPolicy
from beam_triton.transforms.bundle import ArrayBatch, with_own_windows

ARRAY = np.zeros(4, np.float32)

PANE = PaneInfo(True, False, PaneInfoTiming.EARLY, 2, -1)
TWO = (IntervalWindow(0, 10), IntervalWindow(5, 15))


@pytest.mark.parametrize(
    ("policy", "model_limit", "size"),
    [
        (BatchingPolicy(), 32, 32),
        (BatchingPolicy(max_batch_size=8), 32, 8),
        (BatchingPolicy(max_batch_size=100), 32, 32),
        (BatchingPolicy(max_batch_bytes=100), 32, 6),
    ],
)
def test_array_batch_size_is_the_smallest_limit(policy: BatchingPolicy, model_limit: int, size: int) -> None:
    """The model's limit, the policy's size or its bytes, whichever is the smallest."""
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
def test_array_batch_refuses_batches_of_one_and_lingering_batches(
    policy: BatchingPolicy, model_limit: int
) -> None:
    """Models without batches, batches of one, and batches that must be sent in time."""
    batch = ArrayBatch(policy, model_limit)
    assert not batch.begin(ARRAY)
    assert batch.shape is None


def test_array_batch_holds_one_shape_at_a_time() -> None:
    """Another shape may begin only when nothing is pending; arrays are taken once."""
    batch = ArrayBatch(BatchingPolicy(), 32)
    assert batch.begin(ARRAY)
    batch.windowed_values.append(GlobalWindows.windowed_value("first"))
    batch.tensors.append(ARRAY)
    batch.indices.append(7)
    assert not batch.begin(np.zeros(5, np.float32))
    taken = batch.take()
    assert [value.value for value in taken.windowed_values] == ["first"]
    assert taken.indices == [7] and taken.tensors[0] is ARRAY
    assert len(batch.take()) == 0
    assert batch.begin(np.zeros(5, np.float32))
    assert batch.shape == (5,)


def test_empty_arrays_are_bounded_by_number_only() -> None:
    """Arrays without bytes count only towards the batch size."""
    batch = ArrayBatch(BatchingPolicy(max_batch_bytes=100), 32)
    assert batch.begin(np.zeros(0, np.float32))
    assert batch.size == 32


def test_windows_are_not_multiplied() -> None:
    """Beam repeats the windows of yielded values while an element has several, but not of these."""
    (output,) = with_own_windows([WindowedValue("a", 7, TWO, PANE)])
    output.windows *= 3
    assert list(output.windows) == list(TWO)
    assert (output.value, output.timestamp, output.pane_info) == ("a", 7, PANE)


def test_tagged_outputs_keep_their_tag() -> None:
    """A failure is wrapped inside its tag."""
    (output,) = with_own_windows([pvalue.TaggedOutput("failures", WindowedValue("a", 7, TWO))])
    output.value.windows *= 2
    assert (output.tag, list(output.value.windows)) == ("failures", list(TWO))


def test_input_values_are_not_changed() -> None:
    """Input values may be used elsewhere."""
    given = WindowedValue("a", 7, (GlobalWindow(),))
    list(with_own_windows([given]))
    given.windows *= 2
    assert len(given.windows) == 2


def test_outputs_with_own_windows_are_encoded_and_pickled() -> None:
    """Runners encode them, and pickle them between processes."""
    (output,) = with_own_windows([WindowedValue("a", 7, TWO, PANE)])
    coder: Any = coders.WindowedValueCoder(coders.StrUtf8Coder(), SlidingWindows(10, 5).get_window_coder())
    assert coder.decode(coder.encode(output)) == WindowedValue("a", 7, TWO, PANE)
    assert tuple(pickle.loads(pickle.dumps(output)).windows) == TWO

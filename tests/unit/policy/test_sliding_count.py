"""Counts within a sliding window, compared with a list of all events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.policy.sliding_count import SlidingCount

STEPS = st.lists(st.tuples(st.floats(min_value=0.0, max_value=7.0), st.booleans()), min_size=1, max_size=80)


@pytest.mark.parametrize("over_count", [False, True])
@given(steps=STEPS)
def test_total_is_the_number_of_recent_events(over_count: bool, steps: list[tuple[float, bool]]) -> None:
    """Within a bucket's width, the total counts the window's events: no older ones, or none missing."""
    window_seconds = 10.0
    bucket_seconds = window_seconds / 10
    count = SlidingCount(window_seconds, over_count=over_count)
    now, events = 1000.0, list[float]()
    for pause_seconds, happens in steps:
        now += pause_seconds
        if happens:
            count.add(now)
            events.append(now)
        else:
            count.advance(now)
        shortest = window_seconds - (0.0 if over_count else bucket_seconds)
        longest = shortest + bucket_seconds
        # The bucket's edge is rounded, so an event very close to it may be on either side.
        assert sum(now - event < shortest - 1e-6 for event in events) <= count.total
        assert count.total <= sum(now - event < longest + 1e-6 for event in events)


def test_long_pause_empties_the_count() -> None:
    """After more than a window without events no bucket counts anything."""
    count = SlidingCount(1.0)
    for tenth in range(10):
        count.add(5.0 + tenth / 10)
    count.advance(1e6)
    assert count.total == 0
    count.add(1e6)
    assert count.total == 1


def test_clear_empties_the_count_at_once() -> None:
    """A cleared count starts again within the same bucket."""
    count = SlidingCount(1.0)
    count.add(5.0)
    count.clear()
    assert count.total == 0
    count.add(5.0)
    assert count.total == 1

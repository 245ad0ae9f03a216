"""Batches: nothing is lost, mixed or empty, and the amount that waits is bounded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.errors import ConfigurationError
from beam_triton.policy.batching import Batcher, BatchingPolicy
from tests.support.clock import FakeClock


def no_clock() -> float:
    raise AssertionError("the clock is read although no batch lingers")


def batcher(
    model_limit: int = 4, clock: Callable[[], float] = no_clock, **options: object
) -> Batcher[object]:
    return Batcher(BatchingPolicy.from_options(options), model_limit, clock)


def test_full_batch_is_returned_with_its_last_item() -> None:
    """The model's limit is the batch size unless the user gives one."""
    batches = batcher(model_limit=3)
    assert [batches.add("s", n, 8) for n in range(7)] == [None, None, [0, 1, 2], None, None, [3, 4, 5], None]
    assert (batches.pending_count, batches.pending_bytes) == (1, 8)
    assert batches.drain() == [[6]]
    assert (batches.pending_count, batches.pending_bytes, batches.drain()) == (0, 0, [])


@pytest.mark.parametrize(
    ("model_limit", "max_batch_size", "expected"),
    [(8, 2, 2), (2, 8, 2), (0, 8, 1), (0, None, 1), (1, None, 1)],
)
def test_smaller_of_model_limit_and_max_batch_size_applies(
    model_limit: int, max_batch_size: int | None, expected: int
) -> None:
    """A model without batches gets single items."""
    batches = batcher(model_limit, max_batch_size=max_batch_size)
    added = [batches.add("s", n, 1) for n in range(expected)]
    assert added == [None] * (expected - 1) + [list(range(expected))]


def test_signatures_do_not_mix() -> None:
    """Items of two shapes fill two batches."""
    batches = batcher(model_limit=2)
    assert batches.add((1,), "a", 1) is None
    assert batches.add((2,), "b", 1) is None
    assert batches.add((1,), "c", 1) == ["a", "c"]
    assert batches.drain() == [["b"]]


def test_max_batch_bytes_closes_a_batch_before_it_overflows() -> None:
    """The item that would not fit starts the next batch."""
    batches = batcher(model_limit=100, max_batch_bytes=100)
    assert [batches.add("s", n, 40) for n in range(3)] == [None, None, [0, 1]]
    assert batches.pending_bytes == 40


@pytest.mark.parametrize("nbytes", [100, 101, 10**12])
def test_item_as_large_as_a_batch_is_returned_alone(nbytes: int) -> None:
    """A large item is returned at once, and pending items stay pending."""
    batches = batcher(model_limit=100, max_batch_bytes=100)
    assert batches.add("s", "small", 10) is None
    assert batches.add("s", "large", nbytes) == ["large"]
    assert batches.add("t", "large", nbytes) == ["large"]
    assert batches.drain() == [["small"]]


def test_large_items_do_not_displace_small_batches() -> None:
    """The larger part is returned, so that many small pending batches do not become many large ones."""
    batches = batcher(model_limit=100, max_batch_bytes=100)
    for signature in range(10):
        assert batches.add(signature, "small", 2) is None
    for signature in range(10):
        assert batches.add(signature, "large", 99) == ["large"]
    assert (batches.pending_bytes, batches.pending_count) == (20, 10)


def test_largest_batch_is_returned_when_too_many_bytes_wait() -> None:
    """Four batches' worth of bytes may wait."""
    batches = batcher(model_limit=1000, max_batch_bytes=100)
    for n in range(5):
        assert batches.add(n, n, 75 + n) is None
    assert batches.pending_bytes == 385
    assert batches.add("s", "last", 16) == [4]
    assert batches.pending_bytes == 385 + 16 - 79


def test_oldest_batch_is_returned_when_too_many_signatures_wait() -> None:
    """A stream of new shapes does not accumulate batches of one."""
    batches = batcher()
    assert {batches.add(n, n, 1) is None for n in range(1024)} == {True}
    assert batches.add("new", "new", 1) == [0]
    assert batches.add("newer", "newer", 1) == [1]
    assert batches.pending_count == 1024


def test_expired_batches_are_returned_oldest_first() -> None:
    """After ``linger_seconds`` a batch is returned though it is not full; the others stay."""
    clock = FakeClock()
    batches = batcher(linger_seconds=2.0, clock=clock)
    batches.add("a", 1, 1)
    clock.advance(1.0)
    batches.add("b", 2, 1)
    batches.add("a", 3, 1)
    assert batches.expired() == []
    clock.advance(1.0)
    assert batches.expired() == [[1, 3]]
    assert batches.expired() == []
    clock.advance(5.0)
    batches.add("c", 4, 1)
    assert batches.expired() == [[2]]
    assert (batches.pending_count, batches.pending_bytes) == (1, 1)


def test_linger_time_starts_with_each_batch() -> None:
    """It counts from the batch's first item, not from the first item of its signature."""
    clock = FakeClock()
    batches = batcher(model_limit=2, linger_seconds=2.0, clock=clock)
    batches.add("a", 1, 1)
    clock.advance(1.5)
    batches.add("b", 2, 1)
    assert batches.add("a", 3, 1) == [1, 3]
    batches.add("a", 4, 1)
    clock.advance(1.0)
    assert batches.expired() == []
    clock.advance(1.0)
    assert batches.expired() == [[2], [4]]


def test_without_linger_nothing_expires_and_no_clock_is_read() -> None:
    """A batch waits for the end of the bundle, without any clock call."""
    batches = batcher(clock=no_clock)
    batches.add("a", 1, 1)
    assert batches.expired() == []


SIZES = st.one_of(st.integers(0, 20), st.sampled_from([0, 1, 49, 50, 51, 98, 99, 100, 101, 1000]))


@given(
    items=st.lists(st.tuples(st.integers(0, 6), SIZES, st.floats(0, 2)), max_size=300),
    max_batch_size=st.one_of(st.none(), st.integers(1, 6)),
    model_limit=st.integers(0, 8),
    linger_seconds=st.sampled_from([0.0, 1.0]),
)
def test_every_item_is_returned_once_within_all_limits(
    items: list[tuple[int, int, float]], max_batch_size: int | None, model_limit: int, linger_seconds: float
) -> None:
    """For any items of any sizes: each once, in order, unmixed, within limits; pending items are bounded."""
    clock = FakeClock()
    batches = Batcher[tuple[int, int, int]](
        BatchingPolicy(max_batch_size=max_batch_size, max_batch_bytes=100, linger_seconds=linger_seconds),
        model_limit,
        clock,
    )
    returned: list[list[tuple[int, int, int]]] = []
    for number, (signature, nbytes, pause_seconds) in enumerate(items):
        clock.advance(pause_seconds)
        batch = batches.add(signature, (signature, number, nbytes), nbytes)
        if batch is not None:
            returned.append(batch)
        assert batches.pending_bytes <= 400
        assert batches.pending_count == number + 1 - sum(map(len, returned))
        returned.extend(batches.expired())
    returned.extend(batches.drain())
    assert sorted(item[1] for batch in returned for item in batch) == list(range(len(items)))
    limit = min(model_limit, max_batch_size or model_limit) or 1
    for batch in returned:
        assert 1 <= len(batch) <= limit
        assert len({signature for signature, _, _ in batch}) == 1
        assert len(batch) == 1 or sum(nbytes for _, _, nbytes in batch) <= 100
        assert batch == sorted(batch, key=lambda item: item[1])
    assert batches.pending_bytes == 0


def test_pending_bytes_stay_bounded_with_many_signatures() -> None:
    """A large item does not displace a small old batch when the bytes are used up."""
    batches = batcher(max_batch_bytes=100)
    for n in range(1020):
        assert batches.add(n, n, 0) is None
    for n in range(4):
        assert batches.add(f"large {n}", n, 99) is None
    assert batches.add("one more", "one more", 50) == ["one more"]
    assert batches.add("small", "small", 4) == [0]
    assert (batches.pending_bytes, batches.pending_count) == (400, 1024)


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_size": 0},
        {"max_batch_size": True},
        {"max_batch_bytes": 0},
        {"max_batch_bytes": None},
        {"linger_seconds": -1},
        {"linger_seconds": math.inf},
        {"bucket_boundaries": []},
        {"bucket_boundaries": 32},
        {"bucket_boundaries": [64, 32]},
        {"bucket_boundaries": [32, 32]},
        {"bucket_boundaries": [0, 32]},
        {"bucket_boundaries": [32.0]},
        {"pad": 0},
        {"mask": "m"},
        {"cut_outputs": {}},
        {"pad": [], "bucket_boundaries": [32]},
        {"pad": {"x": [0]}, "bucket_boundaries": [32]},
        {"pad": [{"x": 0}, 0], "bucket_boundaries": [32]},
        {"pad": {1: 0}, "bucket_boundaries": [32]},
        {"mask": "", "bucket_boundaries": [32]},
        {"mask": [3], "bucket_boundaries": [32]},
        {"cut_outputs": "y", "bucket_boundaries": [32]},
        {"cut_outputs": {"y": 1}, "bucket_boundaries": [32]},
    ],
)
def test_policy_out_of_range_is_rejected(options: dict[str, object]) -> None:
    """Each field is checked, and the error names it."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        BatchingPolicy.from_options(options)


def test_padding_is_read_from_a_dict_as_json_has_it() -> None:
    """Every form that the options have."""
    given = {
        "bucket_boundaries": [32, 64],
        "pad": [{"query": 0, "mask": 0}, {"text": ""}],
        "mask": ["mask"],
        "cut_outputs": {"scores": None, "hidden": "text"},
    }
    assert BatchingPolicy.from_options(json.loads(json.dumps(given))) == BatchingPolicy(**given)  # type: ignore[arg-type]

"""What is learned of sizes, as tables, on a clock set by hand."""

from __future__ import annotations

import pytest

from beam_triton.policy.learned_size import (
    UNLIMITED,
    BatchSize,
    FailedBatch,
    LearnedLimit,
    LearnedSizes,
    SizeLimits,
)
from tests.support.clock import FakeClock

_LATER = 6.0  # Seconds after which a size that passed shows nothing any more, twice.


def failed(
    rows: int, nbytes: int, *parts: tuple[int, int], suggests_bytes: bool = False, wanted: int = 0
) -> FailedBatch:
    """A batch whose parts have all passed."""
    batch = FailedBatch(
        BatchSize(rows, nbytes), len(parts), BatchSize(wanted or rows, nbytes), suggests_bytes=suggests_bytes
    )
    outcomes = [batch.part_passed(BatchSize(*part)) for part in parts]
    assert outcomes == [False] * (len(parts) - 1) + [True]
    return batch


@pytest.mark.parametrize(
    ("passed", "suggests_bytes", "rows", "nbytes"),
    [
        # Nothing else is known: the error decides.
        ([], False, 32, UNLIMITED),
        ([], True, UNLIMITED, 3200),
        # As many rows have passed: they are not to blame, and so with the bytes.
        ([(64, 1000)], False, UNLIMITED, 3200),
        ([(1, 6400)], True, 32, UNLIMITED),
        # A batch of this size passes: neither is.
        ([(64, 6400)], False, UNLIMITED, UNLIMITED),
        ([(64, 1000), (1, 6400)], True, UNLIMITED, UNLIMITED),
        ([(128, 10_000)], False, UNLIMITED, UNLIMITED),
        # Smaller ones say nothing.
        ([(63, 6399)], False, 32, UNLIMITED),
    ],
)
def test_rows_or_bytes_are_limited(
    passed: list[tuple[int, int]], suggests_bytes: bool, rows: int, nbytes: int
) -> None:
    """After a batch of 64 rows and 6,400 bytes has failed and its halves have passed."""
    sizes = LearnedSizes(FakeClock())
    for each in passed:
        sizes.passed(BatchSize(*each))
    sizes.lower(failed(64, 6400, (32, 3200), (32, 3200), suggests_bytes=suggests_bytes))
    assert (sizes.rows.value, sizes.nbytes.value) == (rows, nbytes)


def test_a_size_that_passed_long_ago_is_to_blame() -> None:
    """A model may run short of memory in mid-job."""
    clock = FakeClock()
    sizes = LearnedSizes(clock)
    sizes.passed(BatchSize(64, 6400))
    clock.advance(_LATER)
    assert sizes.lower(failed(64, 6400, (32, 3200), (32, 3200))) is None
    clock.advance(_LATER)
    assert sizes.lower(failed(64, 6400, (32, 3200), (32, 3200))) == "batches of 64 elements fail, 32 pass"
    assert sizes.rows.value == 32


def test_the_limit_is_the_largest_part_and_falls_further() -> None:
    """Sizes that were refused already change nothing; smaller ones that are refused do."""
    limit = LearnedLimit(FakeClock())
    steps = [(64, 32, True), (64, 32, False), (33, 17, False), (32, 16, True), (16, 8, True)]
    for refused, passed, is_new in steps:
        assert limit.lower(refused, passed, 64) is is_new
    assert limit.value == 8


def test_one_trial_after_each_pause() -> None:
    """Twice the limit, once a pause; a trial that fails doubles the pause."""
    clock = FakeClock()
    limit = LearnedLimit(clock)
    limit.lower(64, 32, 64)
    for pause_seconds in (10, 20, 40, 80, 160, 320, 640, 640):
        clock.advance(pause_seconds - 0.01)
        assert limit.next_size() == 32
        clock.advance(0.01)
        assert [limit.next_size(), limit.next_size()] == [64, 32]
        limit.lower(64, 32, 64)


def test_trials_that_pass_raise_the_limit_up_to_what_was_wanted() -> None:
    """Each is followed by a larger one at once, until batches are as large as they would have been."""
    clock = FakeClock()
    limit = LearnedLimit(clock)
    limit.lower(16, 8, 64)
    clock.advance(10)
    for size in (16, 32, 64):
        assert limit.next_size() == size
        limit.passed(size)
    assert limit.value == limit.next_size() == UNLIMITED


def test_a_trial_that_is_not_filled_is_followed_by_another() -> None:
    """A smaller request than the trial's changes nothing."""
    clock = FakeClock()
    limit = LearnedLimit(clock)
    limit.lower(64, 32, 64)
    clock.advance(10)
    assert limit.next_size() == 64
    limit.passed(20)
    assert (limit.value, limit.next_size()) == (32, 32)
    clock.advance(10)
    assert limit.next_size() == 64


def test_larger_requests_from_before_are_no_trial() -> None:
    """They were in flight when the limit was learned."""
    limit = LearnedLimit(FakeClock())
    limit.lower(64, 32, 64)
    limit.passed(64)
    assert limit.value == 32


def test_a_limit_that_returns_soon_is_left_alone_for_longer() -> None:
    """Where memory comes and goes the pauses grow, too."""
    clock = FakeClock()
    limit = LearnedLimit(clock)
    limit.lower(64, 32, 64)
    clock.advance(10)
    assert limit.next_size() == 64
    limit.passed(64)
    assert limit.value == UNLIMITED
    limit.lower(64, 32, 64)
    clock.advance(10)
    assert limit.next_size() == 32
    clock.advance(10)
    assert limit.next_size() == 64


@pytest.mark.parametrize(
    ("rows_limit", "bytes_limit", "size", "parts"),
    [
        (UNLIMITED, UNLIMITED, (64, 6400), 2),
        (32, UNLIMITED, (64, 6400), 2),
        (8, UNLIMITED, (64, 6400), 8),
        (24, UNLIMITED, (64, 6400), 3),
        (UNLIMITED, 1000, (64, 6400), 7),
        (8, 1000, (64, 6400), 8),
        # A batch that ought to pass holds a bad element.
        (100, 10_000, (64, 6400), 2),
    ],
)
def test_a_failed_batch_is_cut_into_parts_that_pass(
    rows_limit: int, bytes_limit: int, size: tuple[int, int], parts: int
) -> None:
    """Where a size is known to pass the rounds of halving in between are not paid again."""
    sizes = LearnedSizes(FakeClock())
    sizes.rows.value, sizes.nbytes.value = rows_limit, bytes_limit
    assert sizes.count_parts(BatchSize(*size)) == parts


def test_parts_are_smaller_than_what_was_refused_before() -> None:
    """Batches in flight together need not be halved by turns, each through the same sizes."""
    sizes = LearnedSizes(FakeClock())
    for refused, parts in ((6400, 2), (3201, 4), (801, 16)):
        sizes.nbytes.suspect(refused)
        assert sizes.count_parts(BatchSize(64, 6400)) == parts
    sizes.passed(BatchSize(64, 6400))
    assert sizes.count_parts(BatchSize(64, 6400)) == 2


def test_lost_request_is_suspected_for_its_size_where_its_server_is_well() -> None:
    """Or where that size was suspected before; not where it has passed lately."""
    limit = LearnedLimit(FakeClock())
    limit.passed(100)
    assert not limit.suspects(100, is_well=True)
    assert not limit.suspects(200, is_well=False)
    assert limit.suspects(200, is_well=True)
    assert not limit.suspects(199, is_well=False)
    assert limit.suspects(200, is_well=False)


@pytest.mark.parametrize(
    ("rows_limit", "bytes_limit", "next_batch"),
    [
        (UNLIMITED, UNLIMITED, (64, 4096)),
        (32, UNLIMITED, (32, 4096)),
        (100, 9000, (64, 4096)),
        # Less what a request holds besides its tensors.
        (UNLIMITED, 3000, (64, 1976)),
        (UNLIMITED, 500, (64, 1)),
    ],
)
def test_the_next_batch_is_as_large_as_every_limit_allows(
    rows_limit: int, bytes_limit: int, next_batch: tuple[int, int]
) -> None:
    """The policy's and the model's limits, and what was learned."""
    clock = FakeClock()
    sizes = LearnedSizes(clock)
    for limit, value in ((sizes.rows, rows_limit), (sizes.nbytes, bytes_limit)):
        if value != UNLIMITED:
            limit.lower(2 * value, value, 2 * value)
    assert SizeLimits(64, 4096, sizes).next_batch() == next_batch
    assert SizeLimits(64, 4096, None).next_batch() == (64, 4096)

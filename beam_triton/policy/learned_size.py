"""Which batches are too large, in rows or in bytes, is learned from those that fail.

A model that is short of memory raises, and a proxy refuses a body, without saying what would pass. A batch
that fails while all of its parts pass was too large; the limit falls to the size of these parts. After a
pause, which doubles each time, one batch of twice the limit is tried.

A batch with a bad element has a part that fails as well, so nothing is learned from it. A server that fails
at random teaches nothing either: where a size has passed a short time ago, it is not to blame.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import Lock
from typing import NamedTuple

UNLIMITED = sys.maxsize

# How long a size that has passed is known to pass.
_LATELY_SECONDS = 5.0

# What a request holds besides its tensors, about: the sizes learned are those of whole requests.
_HEADER_BYTES = 1024

_FIRST_PAUSE_SECONDS = 10.0
_MAX_PAUSE_SECONDS = 640.0


class BatchSize(NamedTuple):
    """The size of a request: rows, and bytes of its body."""

    rows: int
    nbytes: int


class LearnedLimit:
    """The largest size that passes, in rows or in bytes; shared by the threads of a process.

    ``clock`` gives monotonic seconds. ``value`` is the limit, `UNLIMITED` before one is learned;
    ``suspected`` the smallest size that was refused, or lost by a server that is well, until one as large
    passes. Both may be read at any time.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = Lock()
        self.value = UNLIMITED
        self.suspected = UNLIMITED
        # The largest batch that was cut: where one as large passes, there is no limit any more.
        self._wanted = 0
        self._is_trial_out = False
        self._trial_at = 0.0
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._lifted_at = -_MAX_PAUSE_SECONDS
        # The largest sizes of this period and of the one before it.
        self._period_ends_at = 0.0
        self._largest = 0
        self._largest_before = 0

    def next_size(self) -> int:
        """How large the next batch may be: ``value``, or twice as much when it is time for a trial."""
        if self.value == UNLIMITED or self._clock() < self._trial_at:
            return self.value
        with self._lock:
            now = self._clock()
            if self.value == UNLIMITED or now < self._trial_at:
                return self.value
            self._is_trial_out = True
            self._trial_at = now + self._pause_seconds
            return 2 * self.value

    def passed(self, size: int) -> None:
        """A request of ``size`` was answered."""
        now = self._clock()
        if now >= self._period_ends_at:
            self._largest_before = self._largest if now < self._period_ends_at + _LATELY_SECONDS else 0
            self._largest = 0
            self._period_ends_at = now + _LATELY_SECONDS
        if size > self._largest:
            self._largest = size
        if size >= self.suspected:
            self.suspected = UNLIMITED
        if self._is_trial_out and size > self.value:
            self._raise_to(size, now)

    def passed_lately(self, size: int) -> bool:
        """Whether a request of ``size`` or more was answered in the last few seconds."""
        left_seconds = self._period_ends_at - self._clock()
        if left_seconds > 0:
            return size <= max(self._largest, self._largest_before)
        return left_seconds > -_LATELY_SECONDS and size <= self._largest

    def suspect(self, size: int) -> None:
        """``size`` was refused as too large, or lost by a server that is well."""
        self.suspected = min(self.suspected, size)

    def suspects(self, size: int, *, is_well: bool) -> bool:
        """Whether a request that was lost may have been refused for its ``size``, which is suspected then.

        Not where one as large has passed lately; otherwise if the server ``is_well``, or ``size`` is above
        the limit or was suspected before.
        """
        if self.passed_lately(size) or not (is_well or size > self.value or size >= self.suspected):
            return False
        self.suspect(size)
        return True

    def lower(self, refused: int, passed: int, wanted: int) -> bool:
        """``refused`` does not pass, its parts of ``passed`` do; ``wanted`` is what they were first part of.

        Returns:
            Whether the limit is a new one.
        """
        with self._lock:
            now = self._clock()
            is_new = refused <= self.value
            if is_new:
                was_lifted = self.value == UNLIMITED
                if was_lifted and now - self._lifted_at >= self._pause_seconds:
                    self._pause_seconds = _FIRST_PAUSE_SECONDS
                elif was_lifted:
                    self._lengthen_pause()
                self.value = passed
                self._trial_at = now + self._pause_seconds
            elif self._is_trial_out:
                self._lengthen_pause()
                self._trial_at = now + self._pause_seconds
            self._is_trial_out = False
            self._wanted = max(self._wanted, wanted)
            return is_new

    def _raise_to(self, size: int, now: float) -> None:
        with self._lock:
            if not self._is_trial_out or size <= self.value:
                return
            self._is_trial_out = False
            # What passes once is followed by a larger trial at once.
            self._trial_at = now
            if size < self._wanted:
                self.value = size
            else:
                self.value, self._wanted = UNLIMITED, 0
                self._lifted_at = now

    def _lengthen_pause(self) -> None:
        self._pause_seconds = min(2 * self._pause_seconds, _MAX_PAUSE_SECONDS)


class LearnedSizes:
    """What is known of the sizes that one model takes: ``rows`` and ``nbytes``.

    ``polite_rows`` is what a background job keeps to while others use the server.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.rows = LearnedLimit(clock)
        self.nbytes = LearnedLimit(clock)
        self.polite_rows = UNLIMITED

    def passed(self, size: BatchSize) -> None:
        """A request of this size was answered."""
        self.rows.passed(size.rows)
        self.nbytes.passed(size.nbytes)

    def count_parts(self, size: BatchSize) -> int:
        """In how many parts a batch that failed is sent.

        All of a size that passes, where one is known; otherwise smaller than what was refused before.
        """
        nbytes = min(self.nbytes.value, -(-self.nbytes.suspected // 2))
        return max(2, -(-size.rows // self.rows.value), -(-size.nbytes // nbytes))

    def lower(self, failed: FailedBatch) -> str | None:
        """Learn from a batch whose parts have all passed.

        Rows or bytes, whichever has not been as large in any request that passed lately; where neither has,
        what the error suggests. Returns what the limit is now, in words; None if it is not a new one.
        """
        refused, passed, wanted = failed.size, failed.largest_part, failed.wanted
        rows_pass = self.rows.passed_lately(refused.rows)
        bytes_pass = self.nbytes.passed_lately(refused.nbytes)
        if rows_pass and bytes_pass:
            return None
        if bytes_pass or not (rows_pass or failed.suggests_bytes):
            is_new = self.rows.lower(refused.rows, passed.rows, wanted.rows)
            return f"batches of {refused.rows} elements fail, {passed.rows} pass" if is_new else None
        is_new = self.nbytes.lower(refused.nbytes, passed.nbytes, wanted.nbytes)
        return f"requests of {refused.nbytes} bytes fail, {passed.nbytes} pass" if is_new else None


class SizeLimits:
    """How large a batch may be: ``rows``, ``nbytes`` of tensors, and what is ``learned`` are all limits."""

    def __init__(self, rows: int, nbytes: int, learned: LearnedSizes | None) -> None:
        self._rows = rows
        self._nbytes = nbytes
        self._learned = learned

    def next_batch(self) -> tuple[int, int]:
        """The most rows and tensor bytes of the next batch; to be asked when one is begun."""
        rows, nbytes, learned = self._rows, self._nbytes, self._learned
        if learned is not None:
            rows = min(rows, learned.polite_rows)
            if learned.rows.value < rows:
                rows = min(rows, learned.rows.next_size())
            if learned.nbytes.value < nbytes:
                nbytes = min(nbytes, max(1, learned.nbytes.next_size() - _HEADER_BYTES))
        return rows, nbytes


class FailedBatch:
    """A batch that failed and was sent again in parts.

    Args:
        size: the batch's.
        parts: how many parts it was sent in.
        wanted: the size of the batch that it was itself a part of, and so on up to the first one.
        suggests_bytes: its error suggests that its bytes were too many, rather than its rows.
    """

    __slots__ = ("_parts_left", "largest_part", "size", "suggests_bytes", "wanted")

    def __init__(self, size: BatchSize, parts: int, wanted: BatchSize, *, suggests_bytes: bool) -> None:
        self.size = size
        self.wanted = wanted
        self.suggests_bytes = suggests_bytes
        self.largest_part = BatchSize(0, 0)
        self._parts_left = parts

    def part_passed(self, size: BatchSize) -> bool:
        """One of its parts has passed; True when all of them have. A part that fails is never reported."""
        largest = self.largest_part
        self.largest_part = BatchSize(max(largest.rows, size.rows), max(largest.nbytes, size.nbytes))
        self._parts_left -= 1
        return not self._parts_left

"""``politeness="background"``: a job takes a share of what others leave of a model's instances.

A Triton counts what it executes, for whomever, and for how long. What lies between two answers is how many
instances were busy on average, and whether requests came that are not this job's. From that:

- **Alone**, a job is not held back; `ConcurrencyLimit` alone decides.
- **Beside others** it keeps three times as many instances busy as are idle. With the others' load ``a`` on
  ``n`` instances that is three quarters of ``n - a``, and the quarter that stays idle is what an interactive
  request mostly finds. ``k`` background jobs see the same idle instances, so that each gets as much, and all
  together ``3k / (3k + 1)`` of ``n - a``.
- **Evenly spaced**: its requests begin one after the other at equal distances, and end so. An interactive
  request that finds every instance busy waits for the next one to end, which is one distance away at most,
  rather than up to a request's whole time.
- **In requests that end soon**: whoever waits for an instance waits for what is being executed there. Batches
  are halved while they take more than twice as long as the others' requests do; with more than eight
  instances, of which one ends sooner, a quarter as many times as long.
- **Never nothing**: where others leave nothing, a fiftieth of the instances, and a request every two seconds.

A server that does not say what it executes (no Triton, an ensemble, several servers behind one address) is
left to `ConcurrencyLimit`.

Each answer moves the job only as far as its own part of the load, so that many jobs do not all make room for
the same request, and then all take it back.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from threading import Lock
from typing import NamedTuple

from beam_triton.policy.server_times import Executions, ServerCounts

_BUSY_FOR_EACH_IDLE = 3.0
_LEAST_SHARE = 0.02
_LONGEST_PAUSE_SECONDS = 2.0
# Others are still about for so long after their last request, and for so many questions.
_ABOUT_SECONDS, _ABOUT_QUESTIONS = 5.0, 5
# Requests that begin late, as a thread was busy with something else, may follow each other at once.
_MOST_LATE = 2.0
# After so long without an answer about the model's instances there is none.
_PROBING_SECONDS = 10.0
# Several servers behind one address count for themselves: nobody knows what a single one executes.
_SEVERAL_SECONDS = 60.0
# Executions of the job may take so many times as long as the others': of few instances, and of many.
_LONGER, _LONGER_FOR_EACH_INSTANCE = 2.0, 0.25
# Half as many rows that take more than this share of the time are no gain.
_NO_GAIN = 0.8
UNLIMITED = sys.maxsize


class _Seen(NamedTuple):
    at: float
    counts: ServerCounts
    sizes: Mapping[int, Executions]
    answered: int
    latency_seconds: float


class Background:
    """When one process's background job may send to one server; shared by the threads of the process.

    Args:
        clock: monotonic seconds.
        patience_seconds: how long a request waits for its turn at a server that answers nothing: pauses are
            shorter.

    Attributes:
        is_steered: the server says what it executes, as far as is known.
        most_rows: how many elements a request may hold.
    """

    def __init__(self, clock: Callable[[], float], patience_seconds: float = math.inf) -> None:
        self._clock = clock
        self._longest_pause_seconds = min(_LONGEST_PAUSE_SECONDS, patience_seconds / 2)
        self._lock = Lock()
        self.is_steered = True
        self.most_rows = UNLIMITED
        # The largest batch lately; the last one that was halved, and its time.
        self._rows = 1
        self._halved: tuple[int, float] | None = None
        self._may_halve = True
        # One request at a time until the server has answered twice; None where nothing holds the job back.
        self._window: int | None = 1
        self._interval_seconds = 0.0
        self._next_at = -math.inf
        self._promised_at = -math.inf
        # How many instances the job may keep busy.
        self._allowed = 0.0
        self._probing_until: float | None = None
        self._seen: _Seen | None = None
        self._several_until = -math.inf
        # Requests of others, as far as is certain, and when there were some last.
        self._others = 0
        self._others_at = -math.inf
        self._unexplained_at_first = 0
        self._answered = 0
        self._latency_seconds = 0.0
        self._service_seconds = 0.0
        self._question_seconds = math.inf

    @property
    def gives_way(self) -> bool:
        """Others use the server, and the job sends less than it might."""
        return self._interval_seconds > 0.0

    def try_send(self, in_flight: int) -> bool:
        """Whether another request may begin now, which it does then, beside ``in_flight`` others."""
        if self._window is None:
            return True
        with self._lock:
            now = self._clock()
            window = self._window
            if window is None:
                return True
            if self._probing_until is None:
                self._probing_until = now + _PROBING_SECONDS
            elif not self._interval_seconds and now > self._probing_until:
                self._go_free()
                return True
            if in_flight >= window or now < self._next_at:
                return False
            self._next_at = (
                max(self._next_at, now - _MOST_LATE * self._interval_seconds) + self._interval_seconds
            )
            return True

    def next_turn_at(self, in_flight: int) -> float:
        """When a request that was refused may try again; infinite where another's end decides.

        Only one of those that wait gets a time: the others need not wake up for its turn.
        """
        with self._lock:
            now = self._clock()
            if self._window is None or in_flight >= self._window or now < self._promised_at:
                return math.inf
            self._promised_at = max(now, self._next_at)
            return self._promised_at

    def on_success(self, latency_seconds: float, rows: int) -> None:
        """A request of this job with so many elements was answered."""
        with self._lock:
            self._rows = max(self._rows, rows)
            self._answered += 1
            self._latency_seconds += latency_seconds

    def cannot_be_steered(self) -> None:
        """The server does not say what it executes."""
        self.is_steered = False
        self._go_free()

    def on_counts(
        self,
        counts: ServerCounts,
        sizes: Mapping[int, Executions],
        *,
        instances: int,
        in_flight: int,
        question_seconds: float,
    ) -> None:
        """The server's counts, of all its clients, while ``in_flight`` requests of this job are under way.

        ``sizes`` has the executions by the size of their batches. ``instances`` execute at a time. The answer
        took ``question_seconds``, mostly on its way.
        """
        with self._lock:
            now = self._clock()
            self._question_seconds = min(self._question_seconds, question_seconds)
            if instances < 1 or not self.is_steered:
                self.cannot_be_steered()
                return
            before, seen = self._seen, _Seen(now, counts, sizes, self._answered, self._latency_seconds)
            self._seen = seen
            if before is None:
                self._unexplained_at_first = counts.requests - seen.answered
                return
            if not counts.may_follow(before.counts):
                self._several_until = now + _SEVERAL_SECONDS
                self._unexplained_at_first = counts.requests - seen.answered
                self._others = 0
                self._go_free()
                return
            if now < self._several_until or now <= before.at or counts.requests == before.counts.requests:
                return
            seconds = now - before.at
            busy = (_busy_ns(seen) - _busy_ns(before)) / 1e9 / seconds
            if not busy:
                # An ensemble, whose models execute for it.
                self.cannot_be_steered()
                return
            self._look_for_others(seen, in_flight)
            if now - self._others_at > max(_ABOUT_SECONDS, _ABOUT_QUESTIONS * seconds):
                self._go_free()
                return
            self._make_room(before, seen, min(busy, instances), instances)
            self._limit_rows(before, seen, max(_LONGER, _LONGER_FOR_EACH_INSTANCE * instances))

    def _look_for_others(self, seen: _Seen, in_flight: int) -> None:
        """What the server has executed, and was not answered here, is others', or in flight."""
        unexplained = seen.counts.requests - seen.answered - self._unexplained_at_first
        if unexplained - in_flight > self._others:
            self._others = unexplained - in_flight
            self._others_at = seen.at
        self._others = max(0, min(self._others, unexplained))

    def _make_room(self, before: _Seen, seen: _Seen, busy: float, instances: int) -> None:
        seconds = seen.at - before.at
        answered = seen.answered - before.answered
        if answered:
            latency = (seen.latency_seconds - before.latency_seconds) / answered
            requests = seen.counts.requests - before.counts.requests
            queue = (seen.counts.queue_ns - before.counts.queue_ns) / 1e9 / requests
            self._service_seconds = max(latency / 10, latency - queue - self._question_seconds)
        service = self._service_seconds
        own = answered * service / seconds
        others = max(0.0, busy - own)
        as_the_only_job = _BUSY_FOR_EACH_IDLE / (1 + _BUSY_FOR_EACH_IDLE) * (instances - others)
        was_free = not self.gives_way
        if was_free:
            own = as_the_only_job
        else:
            has_paused = own < self._allowed / 2
            part = own / (own + _BUSY_FOR_EACH_IDLE * max(own, busy)) if own else 0.0
            own += part * (_BUSY_FOR_EACH_IDLE * (instances - busy) - own)
            if has_paused:
                # It had less to do than it might have done, which is no reason to allow it less.
                own = max(own, min(self._allowed, as_the_only_job))
        own = self._allowed = max(own, _LEAST_SHARE * instances)
        interval = service / own if service else self._longest_pause_seconds
        self._interval_seconds = min(interval, self._longest_pause_seconds)
        in_flight = own * (1 + self._question_seconds / service) if service else 1.0
        if in_flight > 1:
            # Requests of different lengths end at uneven distances.
            in_flight += math.sqrt(in_flight) / 2
        self._window = math.ceil(in_flight)
        if was_free:
            self._next_at = seen.at

    def _limit_rows(self, before: _Seen, seen: _Seen, longer: float) -> None:
        """Halve batches that take too long, as far as that makes them shorter; and double them again."""
        rows, self._rows = self._rows, 1
        own = _seconds_of(before, seen, lambda size: size == rows)
        others = _seconds_of(before, seen, lambda size: size != rows)
        if own is None or others is None:
            return
        if own > longer * others:
            if self._halved is not None and rows < self._halved[0] and own > _NO_GAIN * self._halved[1]:
                self.most_rows, self._halved, self._may_halve = self._halved[0], None, False
            elif self._may_halve and rows > 1:
                self._halved = rows, own
                self.most_rows = max(1, rows // 2)
        elif 2 * own < longer * others and rows == self.most_rows:
            self.most_rows, self._halved = 2 * rows, None

    def _go_free(self) -> None:
        self.most_rows, self._halved, self._may_halve = UNLIMITED, None, True
        self._window = None
        self._interval_seconds = 0.0
        self._next_at = self._promised_at = -math.inf


def _busy_ns(seen: _Seen) -> int:
    return sum(executions.busy_ns for executions in seen.sizes.values())


def _seconds_of(before: _Seen, seen: _Seen, is_meant: Callable[[int], bool]) -> float | None:
    """The mean time of executions of some sizes; None where there were none."""
    number = busy_ns = 0
    for size, executions in seen.sizes.items():
        if is_meant(size):
            earlier = before.sizes.get(size, Executions(0, 0))
            number += executions.number - earlier.number
            busy_ns += executions.busy_ns - earlier.busy_ns
    return busy_ns / 1e9 / number if number > 0 else None

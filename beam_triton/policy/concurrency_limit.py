"""The adaptive limit of requests in flight: low at first, higher while answers do not slow down.

Nothing says how many requests a server executes at a time, or how many other clients it has. Latency does: up
to the number of model instances it stays the same, beyond it requests wait in the server's queue. The limit
is judged once per *round*, as many answers as may be in flight, twice as many and at least sixteen once it
has settled:

- **Queue.** ``latency`` seconds at a limit, where a lightly used server takes ``light`` ones, mean that
  ``limit x light / latency`` requests are being executed and the others wait. The limit goes to the executed
  ones plus their square root, which keeps a server busy between two requests. It doubles at first, until
  answers slow down. Clients that share a server get equal limits by this rule, as each has the same number of
  requests waiting.
- **Server times.** A Triton says how long requests waited in its queue. What they took besides is what a
  lightly used server takes, which a late client could not know. Then a fixed number waits instead of
  the square root.
- **Dip.** Where the server does not say, what it takes changes, and a late client has never seen it. Now and
  then the limit falls to a third for a moment. Where answers become faster, requests had been waiting. Where
  they do not, they take longer for another reason (longer inputs, dynamic batching), and that is the new
  measure. All clients dip at the same moments of the wall clock: one of sixteen that dips alone learns
  nothing.
- **Overload** (429, queue full): three tenths fewer, once per round trip; requests that were in flight at the
  last decrease carry no new information.
- **Several endpoints.** Each has its own limit, of one request at least. For a thousand processes with twenty
  endpoints that is twenty thousand requests, so they have a limit together as well, which goes by the answers
  and server times of all.
- **Deadlines.** A request that is too late is work done for nothing, and the server may go on executing it.
  So growth that may end there goes by smaller steps, is taken back if it does, and is not tried again for a
  while.

Simulated with one, four and sixteen clients of sixteen instances: with server times 1.00 of the best
throughput, without them 0.96; 99 % of the answers within three times the model's time.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import NamedTuple

from beam_triton.policy.server_times import ServerTimes
from beam_triton.validation import positive_integer

_OVERLOAD_FACTOR = 0.7
_AFTER_DIP_FACTOR = 0.75

# Less than this is no queue worth acting on: the noise of two machines and a network is as large.
_SLOW_SECONDS = 0.005
# Below this no queue shows.
_FLAT_RATIO = 1.3

# The limit falls by this factor, for so many round trips, once in so many times as long.
_DIP_FACTOR = 3
_DIP_ROUND_TRIPS = 2.5
_DIP_INTERVAL = 16
_MIN_DIP_SECONDS = 0.5
# What lies between client and server may take longer from some day on.
_BETWEEN_SMOOTHING = 1 / 16

# How many of a client's requests wait in the server's queue, where it says how long requests wait. The same
# number for all clients makes their limits equal; with this one, sixteen clients of sixteen instances settle
# at 2.25, in the middle of what is rounded to two.
_WAITING = 1.25
# The same for several endpoints together, besides the square root of those that are executed. With more,
# processes that outnumber the instances would keep two requests waiting each, rather than one.
_WAITING_BESIDES = 1.0

# A dip whose answers are faster than before by this ratio has emptied a queue.
_DIP_RATIO = 1.25

# Of so many rounds, one looks whether the server executes more requests at a time than it did.
_EXECUTING_KNOWN_ROUNDS = 8

# How many answers, and how many times the limit, a round has at least once the limit has settled.
_SETTLED_ROUND = 16
_SETTLED_ROUND_TRIPS = 2

# Growth that may take answers beyond this share of the deadline has to be sure that there is no queue yet.
_CAREFUL_SHARE = 0.5
# A limit at which requests passed their deadlines is tried again after so many times the deadline.
_LATE_PAUSE = 60

# Assumed until successes have shown what a round trip takes.
_FIRST_ROUND_TRIP_SECONDS = 0.1
_ROUND_TRIP_SMOOTHING = 1 / 16


class ConcurrencyLimit:
    """The limit of one endpoint, shared by the threads of a process; from 1 up to ``maximum``.

    Args:
        maximum: ``max_concurrent_requests``.
        timeout_seconds: the deadline of a request.
        clock: monotonic seconds.
        wall_clock: seconds since the epoch, the same on all machines but for what their clocks are off.
        of_all: the limit of several endpoints together, which hears of the answers of each.
        is_of_several: this is such a limit.

    Attributes:
        was_reached: set by the owner when as many requests are in flight as may be.
        overloads_in_a_row: round trips that met overload since the last success.
        overloaded_at: when the limit last fell because of refusals or passed deadlines.
        fastest_seconds: the smallest latency of all; infinite before the first success.

    Raises:
        ConfigurationError: ``maximum`` is not a whole number of 1 or more.
    """

    def __init__(
        self,
        maximum: int,
        timeout_seconds: float,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        *,
        of_all: ConcurrencyLimit | None = None,
        is_of_several: bool = False,
    ) -> None:
        positive_integer("max_concurrent_requests", maximum)
        self._maximum = float(maximum)
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._wall_clock = wall_clock
        self._of_all = of_all
        self._is_of_several = is_of_several
        self._lock = Lock()
        self.overloaded_at = -math.inf
        self.fastest_seconds = math.inf
        self.overloads_in_a_row = 0
        self.was_reached = False
        self._limit = 1.0
        # The limit doubles until answers slow down; there are no dips so far.
        self._is_starting = True
        self._has_answered = False
        # How many requests the server executes at a time; not looked at again for so many rounds.
        self._executing = 1.0
        self._executing_known_rounds = 0
        # What a lightly used server takes, what answers take lately, and what they took in the last round.
        self._light_seconds = math.inf
        self._round_trip_seconds = _FIRST_ROUND_TRIP_SECONDS
        self._last_round_seconds = 0.0
        # Where a passed deadline goes back to; where one passed, and until when that is not tried again.
        self._last_good = 1.0
        self._too_many = math.inf
        self._too_many_until = -math.inf
        # What comes behind requests that may be late would be late as well: none is sent before all are back.
        self._is_wave = False
        self._dip: _Dip | None = None
        self._dips_at = math.inf
        # When the server has ended the requests whose deadlines passed, one entry each.
        self._abandoned_until: deque[float] = deque()
        # The answers since the server's queue was last known.
        self._answer_count = 0
        self._answer_seconds = 0.0
        # What answers take besides the server's own times: network, and the server's HTTP threads.
        self._between_seconds = math.inf
        self._queue_known_until = -math.inf
        self._round = _Round(clock(), 1, 0)

    @property
    def usual_latency_seconds(self) -> float | None:
        """The recent latency of a successful request; None before the first one."""
        return self._round_trip_seconds if self._has_answered else None

    @property
    def limit(self) -> int:
        """How many requests may be in flight; 0 while the server may still execute abandoned ones."""
        limit = _whole(self._limit)
        if self._is_wave:
            limit -= self._round.seen
        if self._abandoned_until:
            limit -= self._count_abandoned()
        return max(0, limit)

    @property
    def without_queue(self) -> int:
        """How many requests may be in flight so that none waits in the server's queue, as far as is known.

        With no more, the server is idle for a moment after each; what waits meanwhile can share a request.
        """
        if self._is_starting or self._executing_known_rounds <= 0:
            return self.limit
        return min(self.limit, max(1, _whole(self._executing)))

    def on_success(self, latency_seconds: float) -> None:
        """A request succeeded, ``latency_seconds`` after it was sent."""
        with self._lock:
            now = self._clock()
            if not self._has_answered:
                self._has_answered = True
                self._round_trip_seconds = self._light_seconds = latency_seconds
            self.overloads_in_a_row = 0
            if latency_seconds < self.fastest_seconds:
                self.fastest_seconds = latency_seconds
            self._answer_count += 1
            self._answer_seconds += latency_seconds
            self._round_trip_seconds += (latency_seconds - self._round_trip_seconds) * _ROUND_TRIP_SMOOTHING
            current = self._round
            if now - latency_seconds >= current.started_at:
                current.add(latency_seconds)
            if self._dip is not None:
                if now >= self._dip.ends_at:
                    self._end_dip(self._dip, now)
            elif now >= self._dips_at and now >= self._queue_known_until:
                self._begin_dip(now)
            elif current.is_complete:
                self._judge(now)
        if self._of_all is not None:
            self._of_all.on_success(latency_seconds)

    def on_overload(self, latency_seconds: float | None = None) -> None:
        """The server refused a request because it is overloaded.

        ``latency_seconds`` is the time since the request was sent, by default the usual latency: refusals of
        a burst for which the limit has shrunk already change nothing.
        """
        with self._lock:
            now = self._clock()
            sent_at = now - (self._round_trip_seconds if latency_seconds is None else latency_seconds)
            if sent_at >= self.overloaded_at:
                self.overloads_in_a_row += 1
                self._settle(now)
                self._shrink(self._limit * _OVERLOAD_FACTOR, now)

    def on_deadline(self, latency_seconds: float) -> None:
        """A request passed its deadline in the server's queue, ``latency_seconds`` after it was sent."""
        with self._lock:
            now = self._clock()
            if self._has_answered:
                self._abandoned_until.append(now + self._light_seconds)
            if now - latency_seconds >= self.overloaded_at:
                self._too_many = float(_whole(self._limit))
                self._too_many_until = now + _LATE_PAUSE * self._timeout_seconds
                good = self._last_good
                # The step that went too far is taken back; nothing else is known to be wrong.
                self._shrink(good if good < self._limit else self._limit * _OVERLOAD_FACTOR, now)

    def on_server_times(self, times: ServerTimes, valid_seconds: float) -> None:
        """The server has said how long requests took there since it last said so.

        No dip is needed for ``valid_seconds``.
        """
        light = None
        with self._lock:
            if self._answer_count:
                latency = self._answer_seconds / self._answer_count
                between = max(0.0, latency - times.queue_seconds - times.other_seconds)
                # It may have a queue as well, in front of the server: the least is nearest to none.
                drifted = (1 - _BETWEEN_SMOOTHING) * self._between_seconds + _BETWEEN_SMOOTHING * between
                self._between_seconds = min(between, drifted)
                light = self._light_seconds = times.other_seconds + self._between_seconds
                self._queue_known_until = self._clock() + valid_seconds
            self._answer_count, self._answer_seconds = 0, 0.0
        if self._of_all is not None and light is not None:
            self._of_all._on_light(light, valid_seconds)

    def _on_light(self, light_seconds: float, valid_seconds: float) -> None:
        """One of several servers has said how long requests took there; the others' queues may differ."""
        with self._lock:
            self._light_seconds = light_seconds
            self._queue_known_until = self._clock() + valid_seconds

    def _judge(self, now: float) -> None:
        """Choose the limit of the next round after what the last one has shown."""
        latency = self._last_round_seconds = self._round.mean_seconds
        self._is_wave = False
        # Where all endpoints together are at their limit, this one may never be. It follows theirs then, or
        # what it was at first would decide about its share.
        of_all = None if self.was_reached else self._of_all
        if self.was_reached or (of_all is not None and of_all.was_reached):
            is_queue_known = now < self._queue_known_until
            noise = 2 * self._round.standard_error_seconds
            if latency + noise < self._light_seconds and not is_queue_known:
                self._light_seconds = (self._light_seconds + latency) / 2
            elif self._limit < 2 and not is_queue_known:
                # There is no lighter load to compare with.
                self._light_seconds += (latency - self._light_seconds) / 4
            limit = _whole(self._limit)
            is_flat = latency <= self._light_seconds + max(_SLOW_SECONDS, noise)
            unqueued = limit if is_flat else limit * self._light_seconds / latency
            self._executing = unqueued
            self._executing_known_rounds = 0 if is_flat else _EXECUTING_KNOWN_ROUNDS
            waiting = _WAITING if is_queue_known else math.sqrt(limit)
            if self._is_of_several and is_queue_known:
                # A queue at one server keeps no other one busy.
                waiting = _WAITING_BESIDES + math.sqrt(unqueued)
            target = min(unqueued + waiting, self._maximum)
            if self._is_starting and not self._shows_queue(latency):
                target = min(2.0 * limit, self._maximum)
            else:
                self._settle(now)
            if of_all is not None:
                target = min(target, of_all._limit)
            if target <= limit:
                self._limit = max(1.0, target if is_queue_known else (self._limit + target) / 2)
            else:
                self._last_good = self._limit
                self._grow(target, latency, now)
        else:
            self._executing_known_rounds -= 1
        self._begin_round(now)

    def _shows_queue(self, latency: float) -> bool:
        return latency > _FLAT_RATIO * self._light_seconds + _SLOW_SECONDS

    def _grow(self, target: float, latency: float, now: float) -> None:
        """Raise the limit to ``target``, or as far as answers are in time even if those added queue."""
        limit = self._limit
        if latency * target / limit > _CAREFUL_SHARE * self._timeout_seconds:
            if self._shows_queue(latency):
                return
            target = min(target, limit + max(1.0, limit // 2))
            self._is_wave = True
            if now < self._too_many_until and target >= self._too_many:
                # Not to where requests were late, but a quarter of the way.
                target = limit + max(1.0, (self._too_many - limit) // 4)
                if target >= self._too_many:
                    self._is_wave = False
                    return
        self._limit = max(limit, target)

    def _begin_dip(self, now: float) -> None:
        """Lower the limit for a moment; the round counts what is sent once the queue has emptied."""
        seconds = self._dip_seconds()
        began_at = self._dips_at
        self._plan_dip(now)
        if self._last_round_seconds:
            self._dip = _Dip(self._limit, self._last_round_seconds, began_at + seconds)
            self._limit = max(1.0, self._limit / _DIP_FACTOR)
            self._round = _Round(began_at + self._last_round_seconds, sys.maxsize, 0)
        else:
            self._begin_round(now)

    def _dip_seconds(self) -> float:
        """The smallest power of two that is long enough: clients with similar latencies agree on it."""
        seconds = max(_DIP_ROUND_TRIPS * self._last_round_seconds, _MIN_DIP_SECONDS)
        return 2.0 ** math.ceil(math.log2(seconds))

    def _plan_dip(self, now: float) -> None:
        period = _DIP_INTERVAL * self._dip_seconds()
        self._dips_at = now + period - self._wall_clock() % period

    def _end_dip(self, dip: _Dip, now: float) -> None:
        self._dip = None
        self._limit = dip.limit_before
        if self._round.count:
            latency = self._round.mean_seconds
            if dip.latency_before >= _DIP_RATIO * latency:
                # Requests had been waiting.
                self._limit = max(1.0, dip.limit_before * _AFTER_DIP_FACTOR)
                self._light_seconds = min(self._light_seconds, latency)
            else:
                self._light_seconds = latency
        self._begin_round(now)

    def _count_abandoned(self) -> int:
        with self._lock:
            now = self._clock()
            while self._abandoned_until and self._abandoned_until[0] <= now:
                self._abandoned_until.popleft()
            return len(self._abandoned_until)

    def _settle(self, now: float) -> None:
        """The first steps are over: from now on growth is slow, and dips look for a queue."""
        if self._is_starting:
            self._is_starting = False
            self._plan_dip(now)

    def _shrink(self, limit: float, now: float) -> None:
        self._dip = None
        self._is_wave = False
        self._limit = max(1.0, limit)
        self._last_good = self._limit
        self.overloaded_at = now
        self._begin_round(now)

    def _begin_round(self, now: float) -> None:
        self.was_reached = False
        limit = _whole(self._limit)
        needed = (
            limit if self._is_starting or self._is_wave else max(_SETTLED_ROUND_TRIPS * limit, _SETTLED_ROUND)
        )
        self._round = _Round(now, needed, limit // 2)


class _Dip(NamedTuple):
    limit_before: float
    latency_before: float
    ends_at: float


class _Round:
    """The answers to requests sent since ``started_at``.

    The first ``skipped`` ones do not count: they were sent before the queue was as long as it gets.
    """

    __slots__ = ("_needed", "_skipped", "_squares", "_total_seconds", "seen", "started_at")

    def __init__(self, started_at: float, needed: int, skipped: int) -> None:
        self.started_at = started_at
        self._needed = needed
        self._skipped = skipped
        self.seen = 0
        self._total_seconds = 0.0
        self._squares = 0.0

    def add(self, latency_seconds: float) -> None:
        self.seen += 1
        if self.seen > self._skipped:
            self._total_seconds += latency_seconds
            self._squares += latency_seconds * latency_seconds

    @property
    def is_complete(self) -> bool:
        return self.seen >= self._needed

    @property
    def count(self) -> int:
        return self.seen - self._skipped

    @property
    def mean_seconds(self) -> float:
        return self._total_seconds / self.count

    @property
    def standard_error_seconds(self) -> float:
        variance = self._squares / self.count - self.mean_seconds**2
        return math.sqrt(max(0.0, variance) / self.count)


def _whole(limit: float) -> int:
    """A limit a little below the next whole number is that number: it would never get there otherwise."""
    return int(limit + 0.25)

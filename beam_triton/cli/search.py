"""Chooses the settings to measure, and of the measured ones the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from beam_triton.cli.load import Measurement

# Values within this share of the best count as equal: repeated measurements differ by as much.
_EQUAL_SHARE = 0.95
# Smaller sizes are not tried once one reaches less than this share of the best one so far: throughput has one
# peak, but measurements differ. Latencies at a rate differ more.
_GIVE_UP_SHARE, _GIVE_UP_SHARE_AT_RATE = 0.85, 0.7
# Sizes are tried in steps of this factor first, and in between later.
_STEP = 4
# Settings of one size that are tried to find the number of requests in flight.
_MOST_TRIES = 4
# What is to keep a limit stays below it by so much.
_MARGIN = 0.95


@dataclass(frozen=True)
class Goal:
    """What is best: the most elements a second, or at a given ``rate`` of them the lowest p99.

    Settings whose p99 exceeds ``p99_seconds`` have no value.
    """

    p99_seconds: float = math.inf
    rate: float | None = None

    def keeps_limit(self, found: Measurement) -> bool:
        return found.latency_seconds(0.99) <= self.p99_seconds

    def value(self, found: Measurement) -> float:
        """The higher the better; 0 where the setting is of no use."""
        if found.failures or not found.requests or not self.keeps_limit(found):
            return 0.0
        if self.rate is None:
            return found.elements_per_second
        return 1 / found.latency_seconds(0.99) if found.keeps_up else 0.0

    def potential(self, found: Measurement) -> float:
        """The most that the measured size may be worth with another number of requests in flight."""
        if self.rate is not None:
            return self.value(found)
        if found.failures or found.fastest_seconds > self.p99_seconds:
            return 0.0
        return found.elements_per_second


Measure = Callable[[int, int, bool], Measurement]
"""Takes elements a request, requests in flight, and whether a first look is enough."""


@dataclass
class Search:
    """Searches for the best setting with few measurements; none is made twice.

    With as many requests in flight as are allowed, the adaptive limit sends as many as the server works on:
    so one measurement shows the most that a batch size can give, and how many requests that takes (what a
    second brings, times what one takes). Batch sizes are tried from the largest down, a quarter each time,
    until that is clearly worse, and then beside the best. Only for the best, and for others that may be
    better within the limit, the number in flight is searched for: beginning with that many, fewer where the
    p99 is too high, more where the server is not busy.

    At a given rate the adaptive limit does all of that, and only sizes are tried, from the smallest up:
    elements of a larger batch wait for each other, those of a smaller one for the server.

    Args:
        measure: measures a setting.
        largest_batch, most_in_flight: the limits of what is tried.
        may_go_on: called before each measurement; False ends the search.
    """

    measure: Measure
    largest_batch: int
    most_in_flight: int
    may_go_on: Callable[[], bool]
    goal: Goal = field(default_factory=Goal)
    measured: dict[tuple[int, int], Measurement] = field(default_factory=dict)

    def run(self) -> Measurement | None:
        """The measurement of the recommended setting; None if no setting is of use."""
        if self.goal.rate is not None:
            self._try_sizes_at_rate(self.goal.rate)
            return self.chosen()
        self._try_sizes()
        if all(found.failures for found in self.measured.values()):
            self._try(1, 1)
        for size in self._promising_sizes():
            self._find_in_flight(size)
        within_limit = self.chosen()
        if within_limit is not None and not math.isinf(self.goal.p99_seconds):
            # Between it and the next larger one, which takes too long.
            size = 2 * within_limit.batch_size
            if size < self.largest_batch and size not in self._looks():
                self._look(size)
                if _EQUAL_SHARE * self._potential(size) > self._best():
                    self._find_in_flight(size)
        return self.chosen()

    def chosen(self) -> Measurement | None:
        """Of the settings that equal the best, the one with the fewest elements in flight.

        Fewer in flight means less waiting and less memory.
        """
        best = self._best()
        if not best:
            return None
        equal = [each for each in self.measured.values() if self.goal.value(each) >= _EQUAL_SHARE * best]
        return min(equal, key=lambda each: (each.batch_size * each.in_flight, each.in_flight))

    def closest(self) -> Measurement | None:
        """The measurement that comes nearest to the goal where none reaches it."""
        working = [each for each in self.measured.values() if each.requests and not each.failures]
        if self.goal.rate is not None and any(each.keeps_up for each in working):
            working = [each for each in working if each.keeps_up]
        elif self.goal.rate is not None:
            return max(working, key=lambda each: each.elements_per_second, default=None)
        return min(working, key=lambda each: each.latency_seconds(0.99), default=None)

    def _try_sizes(self) -> None:
        best = 0.0
        for size in _falling(self.largest_batch, _STEP):
            found = self._look(size)
            if found is None:
                return
            potential = self.goal.potential(found)
            if potential < _GIVE_UP_SHARE * best:
                break
            best = max(best, potential)
        for size in self._sizes_beside_the_best():
            self._look(size)

    def _look(self, size: int) -> Measurement | None:
        """With the most requests in flight; with fewer where the server refuses so many."""
        for count in _falling(self.most_in_flight, _STEP):
            found = self._try(size, count, is_look=True)
            if found is None or not found.is_overloaded:
                break
        return found

    def _sizes_beside_the_best(self) -> Iterator[int]:
        """Those that may be better than the best so far."""
        rates = {size: look.elements_per_second for size, look in self._looks().items()}
        best = max(rates, key=self._potential, default=0)
        if not best or not self._potential(best):
            return
        if best * 2 < self.largest_batch:
            yield best * 2
        smaller = best // 2
        # Rates that rise from here on have no peak below; and no execution takes longer than one of more
        # elements, so that twice the size is at most twice the rate.
        rises = rates.get(min(best * _STEP, self.largest_batch), 0.0) > rates[best]
        if smaller and not rises and 2 * rates.get(best // _STEP, math.inf) >= rates[best]:
            yield smaller

    def _promising_sizes(self) -> Iterator[int]:
        """Sizes that may be better than what has been found so far, the best of them first."""
        sizes = sorted(self._looks(), key=self._potential, reverse=True)
        most = self._potential(sizes[0]) if sizes else 0.0
        equal = [size for size in sizes if most and self._potential(size) >= _EQUAL_SHARE * most]
        if math.isinf(self.goal.p99_seconds):
            if equal:
                yield min(equal, key=lambda size: size * self._needed(size))
            return
        for size in sizes:
            if _EQUAL_SHARE * self._potential(size) > self._best():
                yield size

    def _find_in_flight(self, size: int) -> None:
        limit, alone_seconds = self.goal.p99_seconds, self._looks()[size].fastest_seconds
        busy = self._needed(size)
        # Where there is no time to wait, none may.
        count = busy if limit >= 2 * alone_seconds else max(1, busy - 1)
        wanted, before = _EQUAL_SHARE * self._potential(size), 0.0
        good, too_slow = 0, 2 * self.most_in_flight
        for _ in range(_MOST_TRIES):
            found = self._try(size, count)
            if found is None or not (found.is_overloaded or (found.requests and not found.failures)):
                return
            value, p99_seconds = self.goal.value(found), found.latency_seconds(0.99)
            if found.failures:
                too_slow, count = min(too_slow, count), count // 2
            elif self.goal.keeps_limit(found):
                good = max(good, count)
                # One more would wait for an execution.
                if count >= busy - 1 and p99_seconds + alone_seconds > limit:
                    return
                if value >= wanted and before > _EQUAL_SHARE * value:
                    return
                # The most in flight may have been in each other's way: what they gave may not be the peak.
                before = value
                count = min(2 * count, (count + too_slow) // 2, self.most_in_flight)
            else:
                too_slow = min(too_slow, count)
                count = max(1, min(count - 1, int(count * _MARGIN * limit / p99_seconds)))
            if count <= good or (size, count) in self.measured:
                return

    def _try_sizes_at_rate(self, rate: float) -> None:
        best = 0.0
        for size in _rising(self.largest_batch, _STEP):
            # The first element of a batch waits for the last one.
            waiting = (size - 1) / rate
            if best and waiting > 1 / (_GIVE_UP_SHARE_AT_RATE * best):
                break
            found = self._try(size, self.most_in_flight)
            if found is None:
                return
            value = self.goal.value(found)
            if value < _GIVE_UP_SHARE_AT_RATE * best:
                break
            best = max(best, value)
        chosen = self.chosen()
        if chosen is not None:
            for size in (chosen.batch_size * 2, chosen.batch_size // 2):
                if 1 <= size <= self.largest_batch:
                    self._try(size, self.most_in_flight)

    def _looks(self) -> dict[int, Measurement]:
        """By size, what was measured with the most requests in flight that work."""
        working = [each for each in self.measured.values() if each.requests and not each.failures]
        return {each.batch_size: each for each in sorted(working, key=lambda each: each.in_flight)}

    def _potential(self, size: int) -> float:
        look = self._looks().get(size)
        return 0.0 if look is None else self.goal.potential(look)

    def _needed(self, size: int) -> int:
        """How many requests of that size keep the server busy: those that it works on, and one that waits."""
        look = self._looks()[size]
        working = look.requests_per_second * look.fastest_seconds
        return max(1, min(self.most_in_flight, math.ceil(working - 0.25) + 1))

    def _best(self) -> float:
        return max(map(self.goal.value, self.measured.values()), default=0.0)

    def _try(self, batch_size: int, in_flight: int, *, is_look: bool = False) -> Measurement | None:
        setting = (batch_size, in_flight)
        if setting not in self.measured:
            if not self.may_go_on():
                return None
            self.measured[setting] = self.measure(batch_size, in_flight, is_look)
        return self.measured[setting]


def _falling(largest: int, step: int) -> Iterator[int]:
    value = largest
    while value > 1:
        yield value
        value = max(1, value // step)
    yield 1


def _rising(largest: int, step: int) -> Iterator[int]:
    value = 1
    while value < largest:
        yield value
        value *= step
    yield largest

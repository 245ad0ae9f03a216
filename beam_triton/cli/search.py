"""Which settings to measure, and which of those measured to use. Pure: measuring is handed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from beam_triton.cli.load import Measurement

# A setting this much slower than the fastest is as good: two measurements differ by as much by chance.
_AS_GOOD_AS = 0.95
# Below this, going further in the same direction finds nothing.
_HOPELESS = 0.7
_FIRST_IN_FLIGHT = 8


@dataclass
class Search:
    """Looks for the settings that give the most elements a second.

    Elements a request are halved from the most while that is no worse, then requests in flight are
    doubled and halved from 8, and at last sizes are tried again with what was found. No setting is
    measured twice.

    Args:
        measure: measures ``(batch size, requests in flight)``.
        largest_batch, most_in_flight: what may be tried.
        may_go_on: asked before each measurement; False ends the search.
    """

    measure: Callable[[int, int], Measurement]
    largest_batch: int
    most_in_flight: int
    may_go_on: Callable[[], bool]
    measured: dict[tuple[int, int], Measurement] = field(default_factory=dict)

    def run(self) -> Measurement | None:
        """The measurement of the settings to use; None where no setting worked."""
        in_flight = min(_FIRST_IN_FLIGHT, self.most_in_flight)
        self._vary(self.largest_batch, lambda size: size // 2, lambda size: (size, in_flight))
        if self.chosen() is None:
            # Too many at a time, perhaps.
            self._vary(in_flight // 2, lambda count: count // 2, lambda count: (self.largest_batch, count))
        if self.chosen() is None:
            self._vary(self.largest_batch // 2, lambda size: size // 2, lambda size: (size, 1))
        best = self.chosen()
        if best is None:
            return None
        size, in_flight = best.batch_size, best.in_flight
        self._vary(in_flight * 2, lambda count: count * 2, lambda count: (size, count))
        self._vary(in_flight // 2, lambda count: count // 2, lambda count: (size, count))
        best = self.chosen() or best
        count = best.in_flight
        self._vary(best.batch_size * 2, lambda size: size * 2, lambda size: (size, count))
        self._vary(best.batch_size // 2, lambda size: size // 2, lambda size: (size, count))
        return self.chosen()

    def chosen(self) -> Measurement | None:
        """Of the settings that are as good as the fastest, the one with the fewest elements in flight.

        Fewer in flight is less waiting and less memory. Settings with failures are not chosen.
        """
        sound = [each for each in self.measured.values() if not each.failures and each.latencies_seconds]
        if not sound:
            return None
        fastest = max(each.elements_per_second for each in sound)
        as_good = [each for each in sound if each.elements_per_second >= _AS_GOOD_AS * fastest]
        return min(as_good, key=lambda each: (each.batch_size * each.in_flight, each.in_flight))

    def _vary(
        self, value: int, following: Callable[[int], int], setting: Callable[[int], tuple[int, int]]
    ) -> None:
        while self._is_allowed(*setting(value)):
            found = self._try(*setting(value))
            best = max((each.elements_per_second for each in self._sound()), default=0.0)
            if found is None or (best and found.elements_per_second < _HOPELESS * best):
                return
            next_value = following(value)
            if next_value == value or (next_value > value and found.failures):
                return
            value = next_value

    def _sound(self) -> list[Measurement]:
        return [each for each in self.measured.values() if not each.failures]

    def _is_allowed(self, batch_size: int, in_flight: int) -> bool:
        return 1 <= batch_size <= self.largest_batch and 1 <= in_flight <= self.most_in_flight

    def _try(self, batch_size: int, in_flight: int) -> Measurement | None:
        setting = (batch_size, in_flight)
        if setting not in self.measured:
            if not self.may_go_on():
                return None
            self.measured[setting] = self.measure(*setting)
        return self.measured[setting]

"""Where one thread's CPU time goes: exclusive sections around a few functions, and the profile's own cost.

A profiler that samples from within the process sees a thread where it lets go of the GIL, and one that traces
every call makes small functions look large. Here a few functions are wrapped, each of them called once or a
few times a request, and a thread's CPU clock is read as one begins and ends. A section's time excludes that
of the sections within it. What the clock and the wrappers take is measured by themselves and taken out.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import thread_time_ns
from typing import Any

OUTSIDE = "outside"
"""The section of whatever is in no other."""
GARBAGE_COLLECTOR = "garbage collector"

_CALIBRATION_CALLS = 20_000


@dataclass
class _Section:
    """``inner`` are sections that began within it."""

    nanoseconds: int = 0
    calls: int = 0
    inner: int = 0


@dataclass(frozen=True)
class Spent:
    """Microseconds of CPU time by section, and what the profile's clock and wrappers cost in each of them.

    ``calls`` are how often a section began.
    """

    sections: dict[str, float]
    costs: dict[str, float]
    calls: dict[str, int]

    @property
    def cost(self) -> float:
        """Of the whole profile."""
        return sum(self.costs.values())

    def own(self, name: str) -> float:
        """A section's own time."""
        return self.sections.get(name, 0.0) - self.costs.get(name, 0.0)


@dataclass
class Profiler:
    """Collects the CPU time of the thread that `start` is called on; other threads pass by."""

    _sections: dict[str, _Section] = field(default_factory=dict)
    _current: _Section = field(default_factory=_Section)
    _since: int = 0
    _thread: int = 0
    _suspended: list[_Section] = field(default_factory=list)

    def start(self) -> None:
        """Begin, or go on; the garbage collector is a section of its own."""
        self._current = self._section(OUTSIDE)
        self._thread = threading.get_ident()
        gc.callbacks.append(self._on_collection)
        self._since = thread_time_ns()

    def pause(self) -> None:
        """What is spent from now on does not count."""
        self._current.nanoseconds += thread_time_ns() - self._since
        gc.callbacks.remove(self._on_collection)
        self._thread = 0

    def spent(self) -> Spent:
        """All that was spent between `start` and `pause`."""
        within, around = _cost_of_a_section()
        spent, costs, calls = {}, {}, {}
        for name, section in self._sections.items():
            spent[name] = section.nanoseconds / 1e3
            costs[name] = (within * section.calls + around * section.inner) / 1e3
            calls[name] = section.calls
        return Spent(spent, costs, calls)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` as a section."""

        def section(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            outer = self._current
            inner = self._section(name)
            outer.inner += 1
            inner.calls += 1
            self._current = inner
            now = thread_time_ns()
            outer.nanoseconds += now - self._since
            self._since = now
            try:
                return function(*args, **kwargs)
            finally:
                now = thread_time_ns()
                inner.nanoseconds += now - self._since
                self._since = now
                self._current = outer

        return section

    def timed_steps(self, name: str, make: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """The generator function ``make``, each step of its iterators as a section."""

        def steps(*args: Any, **kwargs: Any) -> Iterator[Any]:
            following = self.timed(name, make(*args, **kwargs).__next__)
            while True:
                try:
                    value = following()
                except StopIteration:
                    return
                yield value

        return steps

    def _section(self, name: str) -> _Section:
        section = self._sections.get(name)
        if section is None:
            section = self._sections[name] = _Section()
        return section

    def _on_collection(self, phase: str, info: dict[str, int]) -> None:
        if threading.get_ident() != self._thread:
            return
        now = thread_time_ns()
        self._current.nanoseconds += now - self._since
        self._since = now
        if phase == "start":
            self._suspended.append(self._current)
            self._current = self._section(GARBAGE_COLLECTOR)
        else:
            self._current = self._suspended.pop()


def _cost_of_a_section() -> tuple[float, float]:
    """Nanoseconds that a section adds to itself, and to the section around it."""
    calls = range(_CALIBRATION_CALLS)
    started = thread_time_ns()
    for _ in calls:
        pass
    loop = thread_time_ns() - started
    started = thread_time_ns()
    for _ in calls:
        _nothing()
    nothing = thread_time_ns() - started - loop
    profiler = Profiler()
    timed = profiler.timed("timed", _nothing)
    profiler.start()
    for _ in calls:
        timed()
    profiler.pause()
    within, around = profiler._section("timed").nanoseconds, profiler._section(OUTSIDE).nanoseconds
    return (within - nothing) / _CALIBRATION_CALLS, (around - loop) / _CALIBRATION_CALLS


def _nothing() -> None:
    pass

"""The profiler of the benchmarks: sections exclude each other, and add up to what the thread spent."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest

from benchmarks.profiler import GARBAGE_COLLECTOR, OUTSIDE, Profiler

_BURN_SECONDS = 0.05
_BURN = pytest.approx(1e6 * _BURN_SECONDS, rel=0.2)


def _burn(seconds: float = _BURN_SECONDS) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_section_excludes_the_sections_within_it() -> None:
    """The time of an inner section is its own, and what is in no section is outside."""
    profiler = Profiler()
    inner = profiler.timed("inner", _burn)

    def work() -> None:
        _burn()
        inner()
        inner()

    outer = profiler.timed("outer", work)
    profiler.start()
    _burn()
    outer()
    profiler.pause()
    _burn()
    spent = profiler.spent()
    assert spent.own(OUTSIDE) == _BURN
    assert spent.own("outer") == _BURN
    assert spent.own("inner") == pytest.approx(2e6 * _BURN_SECONDS, rel=0.2)
    assert spent.calls["inner"] == 2


def test_cost_of_many_sections_is_taken_out() -> None:
    """A hundred thousand empty sections take next to nothing, though the clock takes most of the time."""
    profiler = Profiler()
    empty = profiler.timed("empty", int)
    profiler.start()
    before = time.thread_time()
    for _ in range(100_000):
        empty()
    taken = 1e6 * (time.thread_time() - before)
    profiler.pause()
    spent = profiler.spent()
    assert spent.cost > 0.5 * taken
    assert abs(spent.own("empty")) < 0.2 * taken
    assert sum(spent.sections.values()) == pytest.approx(taken, rel=0.05)


def test_failing_function_ends_its_section() -> None:
    """What follows an exception belongs to the section around it."""
    profiler = Profiler()
    failing = profiler.timed("failing", int)
    profiler.start()
    with pytest.raises(ValueError, match="invalid literal"):
        failing("text")
    _burn()
    profiler.pause()
    assert profiler.spent().own(OUTSIDE) == _BURN


def test_steps_of_an_iterator_are_sections() -> None:
    """Making the values counts, and what their user does with them does not."""

    def make(count: int) -> Iterator[int]:
        for number in range(count):
            _burn(_BURN_SECONDS / count)
            yield number

    profiler = Profiler()
    steps = profiler.timed_steps("steps", make)
    profiler.start()
    values = []
    for value in steps(5):
        values.append(value)
        _burn(_BURN_SECONDS / 5)
    profiler.pause()
    spent = profiler.spent()
    assert values == [0, 1, 2, 3, 4]
    assert spent.own("steps") == _BURN
    assert spent.own(OUTSIDE) == _BURN


def test_other_threads_pass_by() -> None:
    """A section that another thread enters counts nothing, and disturbs none of this thread's."""
    profiler = Profiler()
    timed = profiler.timed("timed", _burn)
    profiler.start()
    thread = threading.Thread(target=timed)
    thread.start()
    thread.join()
    profiler.pause()
    assert "timed" not in profiler.spent().sections


def test_garbage_collection_is_a_section() -> None:
    """It is taken out of the section in which it happens."""
    profiler = Profiler()
    kept = [[number] for number in range(300_000)]
    collect = profiler.timed("collecting", gc.collect)
    profiler.start()
    collect()
    profiler.pause()
    spent = profiler.spent()
    assert len(kept) == 300_000
    assert spent.own(GARBAGE_COLLECTOR) > 5 * abs(spent.own("collecting"))

"""The threads that connections open on: used again, never in each other's way, gone when not needed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator

import pytest

from beam_triton.transport import opening_threads
from beam_triton.transport.opening_threads import OpeningThreads
from tests.support.socket_pair_connections import waits_for_a_job

PATIENCE_SECONDS = 5

Job = Callable[[], None]


class Threads:
    """`OpeningThreads` whose jobs are functions, and the threads that did them."""

    def __init__(self) -> None:
        self.used: list[threading.Thread] = []
        self.threads = OpeningThreads(self._do)

    def _do(self, job: Job) -> None:
        self.used.append(threading.current_thread())
        job()

    def do(self, job: Job) -> threading.Thread:
        """Start a job and wait until it is done."""
        done = threading.Event()

        def run() -> None:
            job()
            done.set()

        self.threads.start(run)
        assert done.wait(PATIENCE_SECONDS)
        assert waits_for_a_job(self.used[-1], within_seconds=PATIENCE_SECONDS)
        return self.used[-1]


@pytest.fixture
def threads() -> Iterator[Threads]:
    made = Threads()
    yield made
    made.threads.end()


def nothing() -> None:
    """A job that is over at once."""


def test_thread_is_used_again(threads: Threads) -> None:
    """Jobs that follow each other are done by one thread."""
    assert len({threads.do(nothing) for _ in range(20)}) == 1


def test_job_waits_for_no_other_job(threads: Threads) -> None:
    """While eight jobs take their time, the next one is done at once."""
    go_on, begun = threading.Event(), threading.Semaphore(0)

    def slow() -> None:
        begun.release()
        assert go_on.wait(PATIENCE_SECONDS)

    for _ in range(8):
        threads.threads.start(slow)
    assert all(begun.acquire(timeout=PATIENCE_SECONDS) for _ in range(8))
    threads.do(nothing)
    go_on.set()
    assert len(set(threads.used)) == 9


def test_thread_with_nothing_to_do_ends(threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays for a while, and a job that comes later gets another one."""
    monkeypatch.setattr(opening_threads, "_STAY_SECONDS", 0.05)
    first = threads.do(nothing)
    first.join(PATIENCE_SECONDS)
    assert not first.is_alive()
    assert threads.do(nothing) is not first


def test_end_lets_free_threads_go_at_once(threads: Threads) -> None:
    """Nothing is left behind, and what is under way ends with its job."""
    go_on, begun = threading.Event(), threading.Event()
    free = threads.do(nothing)

    def slow() -> None:
        begun.set()
        assert go_on.wait(PATIENCE_SECONDS)

    threads.threads.start(slow)
    assert begun.wait(PATIENCE_SECONDS)
    busy = threads.used[-1]
    assert busy is free
    other = threads.do(nothing)
    threads.threads.end()
    other.join(PATIENCE_SECONDS)
    assert not other.is_alive()
    assert busy.is_alive()
    go_on.set()
    busy.join(PATIENCE_SECONDS)
    assert not busy.is_alive()


def test_jobs_after_the_end_are_done(threads: Threads) -> None:
    """A connection may be asked for while the pool closes; its thread does not stay."""
    threads.threads.end()
    done = threading.Event()
    threads.threads.start(done.set)
    assert done.wait(PATIENCE_SECONDS)
    threads.used[-1].join(PATIENCE_SECONDS)
    assert not threads.used[-1].is_alive()


def test_thread_keeps_nothing_of_a_job(threads: Threads) -> None:
    """A waiting thread does not hold what the last job was about, such as a request and its answer."""

    class Held:
        def __call__(self) -> None:
            """Nothing."""

    held = Held()
    reference = weakref.ref(held)
    done = threading.Event()
    threads.threads.start(held)
    threads.do(done.set)
    for thread in set(threads.used):
        assert waits_for_a_job(thread, within_seconds=PATIENCE_SECONDS)
    del held
    assert reference() is None


def test_many_askers_get_every_job_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that end while jobs come lose none."""
    monkeypatch.setattr(opening_threads, "_STAY_SECONDS", 0.0001)
    done = threading.Semaphore(0)
    threads = OpeningThreads[int](lambda job: done.release())

    def ask() -> None:
        for job in range(300):
            threads.start(job)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(30)
    assert all(done.acquire(timeout=PATIENCE_SECONDS) for _ in range(1200))
    threads.end()

"""One thread's reactor: timers, descriptors, and wake-ups from other threads."""

from __future__ import annotations

import math
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from beam_triton.transport.reactor import Reactor, current_reactor


class Note:
    """A task that records when it was called, and calls ``then``."""

    def __init__(self, wake_at: float = math.inf, then: Callable[[], None] | None = None) -> None:
        self.wake_at = wake_at
        self.io = 0
        self.times = 0
        self._then = then

    def on_io(self) -> None:
        self.io += 1
        if self._then is not None:
            self._then()

    def on_time(self, now: float) -> None:
        assert now >= self.wake_at
        self.times += 1
        self.wake_at = math.inf
        if self._then is not None:
            self._then()


def test_step_ends_at_the_earliest_timer() -> None:
    """Not before and not much after, and it calls only that timer's task."""
    reactor, started = Reactor(), time.monotonic()
    soon, later = Note(started + 0.05), Note(started + 30)
    reactor.add(soon)
    reactor.add(later)
    reactor.step(math.inf)
    assert 0.05 <= time.monotonic() - started < 0.4
    assert (soon.times, later.times) == (1, 0)


def test_wait_until_bounds_a_step() -> None:
    """With a time in the past a step does not wait at all."""
    reactor, started = Reactor(), time.monotonic()
    reactor.step(0.0)
    assert time.monotonic() - started < 0.2
    reactor.step(time.monotonic() + 0.03)
    assert 0.03 <= time.monotonic() - started < 0.4


def test_endless_step_is_ended_by_another_thread() -> None:
    """Without a timer a step waits until another thread wakes it."""
    reactor, called = Reactor(), []
    wake = reactor.waker(lambda: called.append(threading.get_ident()))
    thread = threading.Timer(0.05, wake)
    thread.start()
    reactor.step(math.inf)
    thread.join()
    assert called == [threading.get_ident()]


def test_wake_up_before_the_step_is_not_lost() -> None:
    """It is handled at once in the next step."""
    reactor = Reactor()
    called: list[int] = []
    wakes = [reactor.waker(partial(called.append, number)) for number in range(3)]
    for wake in wakes:
        wake()
    started = time.monotonic()
    reactor.step(started + 30)
    assert called == [0, 1, 2]
    assert time.monotonic() - started < 0.5


def test_more_wake_ups_than_the_socket_holds_are_not_lost() -> None:
    """They do not block the thread that wakes either."""
    reactor, count = Reactor(), 0

    def callback() -> None:
        nonlocal count
        count += 1

    wake = reactor.waker(callback)
    for _ in range(100_000):
        wake()
    reactor.step(math.inf)
    assert count == 100_000


def test_concurrent_wake_ups_are_not_lost() -> None:
    """Not even while the reactor goes to sleep."""
    reactor, count = Reactor(), 0

    def callback() -> None:
        nonlocal count
        count += 1

    wake = reactor.waker(callback)
    threads = [threading.Thread(target=lambda: [wake() for _ in range(2000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while count < 8000 and time.monotonic() < deadline:
        reactor.step(deadline)
    for thread in threads:
        thread.join()
    assert count == 8000


def test_wake_up_within_a_callback_is_handled_without_a_pause() -> None:
    """A callback that wakes again is called again in the same step."""
    reactor, left = Reactor(), 3

    def callback() -> None:
        nonlocal left
        left -= 1
        if left:
            wake()

    wake = reactor.waker(callback)
    wake()
    reactor.step(math.inf)
    assert left == 0


def test_ready_descriptors_call_their_own_task() -> None:
    """Once per step; an unwatched descriptor calls nothing."""
    reactor = Reactor()
    pairs = [socket.socketpair() for _ in range(3)]
    tasks = [Note() for _ in pairs]
    for (near, _), task in zip(pairs, tasks, strict=True):
        reactor.watch(near.fileno(), select.POLLIN, task)
    for _, far in pairs[:2]:
        far.sendall(b"x")
    reactor.unwatch(pairs[1][0].fileno())
    reactor.unwatch(pairs[1][0].fileno())
    reactor.step(time.monotonic() + 5)
    assert [task.io for task in tasks] == [1, 0, 0]
    for near, far in pairs:
        near.close()
        far.close()


def test_task_removed_by_another_task_is_not_called() -> None:
    """Of two timers that are due, the first one's task may remove the second."""
    reactor = Reactor()
    tasks: list[Note] = []

    def end_the_other() -> None:
        for task in tasks:
            if not task.times:
                reactor.remove(task)

    tasks += [Note(0.0, end_the_other), Note(0.0, end_the_other)]
    for task in tasks:
        reactor.add(task)
    reactor.step(0.0)
    reactor.step(0.0)
    assert sorted(task.times for task in tasks) == [0, 1]


def test_io_is_handled_before_timers() -> None:
    """Bytes that have arrived when a deadline is checked count as arrived."""
    reactor, order = Reactor(), []
    near, far = socket.socketpair()
    far.sendall(b"x")
    task = Note(0.0)

    def on_io() -> None:
        order.append("io")
        reactor.remove(task)
        reactor.unwatch(near.fileno())

    reactor.add(task)
    reactor.watch(near.fileno(), select.POLLIN, Note(then=on_io))
    reactor.step(0.0)
    assert order == ["io"] and task.times == 0
    near.close()
    far.close()


def test_each_thread_has_its_own_reactor() -> None:
    """The same thread always gets the same one."""
    found: list[Reactor] = []
    thread = threading.Thread(target=lambda: found.append(current_reactor()))
    thread.start()
    thread.join()
    assert current_reactor() is current_reactor()
    assert found[0] is not current_reactor()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_has_its_own_reactor() -> None:
    """Wake-ups of the child's reactor do not reach the parent."""
    parents, called = current_reactor(), []
    parents.waker(lambda: called.append("parent"))
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(10)
            reactor = current_reactor()
            reactor.waker(lambda: called.append("child"))()
            reactor.step(time.monotonic() + 5)
            status = 0 if reactor is not parents and called == ["child"] else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    parents.step(0.0)
    assert called == []

"""The wait queue for slots: entries are woken in order, and no wake-up is lost."""

from __future__ import annotations

import threading
from functools import partial

from beam_triton.dispatch.slots import QueueEntry, WaitQueue
from beam_triton.transport.reactor import Reactor


def test_entries_are_woken_in_order() -> None:
    """Each call wakes one entry; waking an empty queue is not an error."""
    line = WaitQueue()
    called: list[int] = []
    for number in range(3):
        line.join(partial(called.append, number))
    for _ in range(4):
        line.wake_next()
    assert called == [0, 1, 2]


def test_entry_that_left_is_not_woken() -> None:
    """``leave`` also says whether the entry was still queued."""
    line, called = WaitQueue(), []

    def wake() -> None:
        called.append("woken")

    line.join(wake)
    assert line.leave(wake)
    line.wake_next()
    assert called == [] and not line.leave(wake)


def test_wake_up_runs_on_the_thread_of_the_entry() -> None:
    """A wake-up from another thread is delivered in the waiting thread's own step."""
    line, reactor, woken = WaitQueue(), Reactor(), []
    waiter = QueueEntry(line, reactor, lambda: woken.append(threading.get_ident()))
    assert waiter.join() and not waiter.join()
    threading.Thread(target=line.wake_next).start()
    reactor.step(float("inf"))
    assert woken == [threading.get_ident()]
    assert waiter.join(), "after its wake-up it may join the queue again"


def test_unused_wake_up_goes_to_the_next_entry() -> None:
    """An entry that leaves after its wake-up, before its step, wakes the next one at that moment."""
    line, idle, busy = WaitQueue(), Reactor(), Reactor()
    woken: list[str] = []
    first = QueueEntry(line, idle, lambda: woken.append("first"))
    second = QueueEntry(line, busy, lambda: woken.append("second"))
    first.join()
    second.join()
    line.wake_next()
    first.leave()
    busy.step(0.0)
    idle.step(0.0)
    assert woken == ["second"]


def test_old_wake_up_does_not_count_for_a_new_wait() -> None:
    """A wake-up that was passed on is gone, also for an entry that joins the queue again."""
    line, reactor, wake_ups = WaitQueue(), Reactor(), []
    waiter = QueueEntry(line, reactor, lambda: wake_ups.append("woken"))
    waiter.join()
    line.wake_next()
    waiter.leave()
    waiter.join()
    reactor.step(0.0)
    assert wake_ups == []
    line.wake_next()
    reactor.step(0.0)
    assert wake_ups == ["woken"]

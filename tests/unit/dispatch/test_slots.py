"""Turns: given in order, used or passed on, never lost."""

from __future__ import annotations

import threading
from functools import partial

from beam_triton.dispatch.slots import QueueEntry, WaitQueue
from beam_triton.transport.reactor import Reactor


def test_the_longest_waiting_is_called_first() -> None:
    """Each call reaches one, in order; nobody in line is no error."""
    line = WaitQueue()
    called: list[int] = []
    for number in range(3):
        line.join(partial(called.append, number))
    for _ in range(4):
        line.wake_next()
    assert called == [0, 1, 2]


def test_leaving() -> None:
    """Who leaves is not called, and learns whether he was before."""
    line, called = WaitQueue(), []

    def wake() -> None:
        called.append("woken")

    line.join(wake)
    assert line.leave(wake)
    line.wake_next()
    assert called == [] and not line.leave(wake)


def test_a_turn_reaches_its_thread() -> None:
    """A turn given on another thread is taken in the waiter's own step."""
    line, reactor, turns = WaitQueue(), Reactor(), []
    waiter = QueueEntry(line, reactor, lambda: turns.append(threading.get_ident()))
    assert waiter.join() and not waiter.join()
    threading.Thread(target=line.wake_next).start()
    reactor.step(float("inf"))
    assert turns == [threading.get_ident()]
    assert waiter.join(), "after its turn it may get in line again"


def test_a_turn_that_is_not_needed_is_passed_on() -> None:
    """Who stops after he was called, and before he looked, gives his turn to the next at that moment."""
    line, idle, busy = WaitQueue(), Reactor(), Reactor()
    turns: list[str] = []
    first = QueueEntry(line, idle, lambda: turns.append("first"))
    second = QueueEntry(line, busy, lambda: turns.append("second"))
    first.join()
    second.join()
    line.wake_next()
    first.leave()
    busy.step(0.0)
    idle.step(0.0)
    assert turns == ["second"]


def test_an_old_turn_does_not_count_for_a_new_wait() -> None:
    """A turn that was passed on is gone, also for the one who gets in line once more."""
    line, reactor, turns = WaitQueue(), Reactor(), []
    waiter = QueueEntry(line, reactor, lambda: turns.append("turn"))
    waiter.join()
    line.wake_next()
    waiter.leave()
    waiter.join()
    reactor.step(0.0)
    assert turns == []
    line.wake_next()
    reactor.step(0.0)
    assert turns == ["turn"]

"""One thread's waiting for many things: sockets, points in time, and word from other threads.

A bundle's thread drives its requests itself, between two elements and at the bundle's end. That
costs no hand-over of the GIL, which with a thread a request takes more time than the request
(docs/performance.md), and leaves no thread behind after teardown.

There is one reactor a thread, not one a DoFn: where two DoFns are fused, the second one waiting for
a free slot keeps the first one's requests moving, whose end may be what frees the slot.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

# A poll's timeout has to fit 32 bits of milliseconds.
_LONGEST_POLL_SECONDS = 60.0
# A thread that has elements to take in between steps without waiting, thousands of times a second: looking
# at every task's time each time would cost more than what there is to be late for.
_LOOK_EVERY_SECONDS = 0.002


class Task(Protocol):
    """Something that the reactor drives. ``wake_at`` is a monotonic time, ``math.inf`` for never."""

    wake_at: float

    def on_io(self) -> None: ...

    def on_time(self, now: float) -> None: ...


class Reactor:
    """Waits for the tasks of one thread. No method but `wake` may be called from another one."""

    def __init__(self) -> None:
        self._poller = select.poll()
        self._readers: dict[int, Task] = {}
        self._tasks: set[Task] = set()
        self._woken: deque[Callable[[], None]] = deque()
        self._wake_sockets: tuple[socket.socket, socket.socket] | None = None
        self._look_at = 0.0
        self.pid = os.getpid()

    def add(self, task: Task) -> None:
        """Have ``task.on_time`` called when its ``wake_at`` has come, until `remove`."""
        self._tasks.add(task)

    def remove(self, task: Task) -> None:
        self._tasks.discard(task)

    def watch(self, descriptor: int, events: int, task: Task) -> None:
        """Have ``task.on_io`` called whenever ``descriptor`` is ready for one of ``events``, and
        ``task.on_time`` as `add` does, until `unwatch`."""
        self._readers[descriptor] = task
        self._poller.register(descriptor, events)

    def unwatch(self, descriptor: int) -> None:
        if self._readers.pop(descriptor, None) is not None:
            self._poller.unregister(descriptor)

    def waker(self, callback: Callable[[], None]) -> Callable[[], None]:
        """A function for other threads: makes this reactor call ``callback`` on its own thread."""
        if self._wake_sockets is None:
            self._wake_sockets = receiver, sender = socket.socketpair()
            receiver.setblocking(False)
            sender.setblocking(False)
            self._poller.register(receiver.fileno(), select.POLLIN)

        def wake() -> None:
            self._woken.append(callback)
            self._ring()

        return wake

    def step(self, wait_until: float) -> None:
        """Do what is ready; if nothing is, wait for it, at most until ``wait_until`` (monotonic)."""
        if self._woken:
            self._call_woken()
            wait_until = 0.0
        timeout = 0
        if wait_until:
            for task in (*self._tasks, *self._readers.values()):
                wait_until = min(wait_until, task.wake_at)
            now = time.monotonic()
            self._look_at = min(self._look_at, wait_until)
            if wait_until > now:
                # poll() counts in whole milliseconds and rounds up here: waking early would only spin.
                timeout = int(min(wait_until - now, _LONGEST_POLL_SECONDS) * 1000) + 1
        for descriptor, _ in self._poller.poll(timeout):
            task_or_none = self._readers.get(descriptor)
            if task_or_none is not None:
                task_or_none.on_io()
            elif self._wake_sockets is not None and descriptor == self._wake_sockets[0].fileno():
                self._drain_bell()
        if self._woken:
            self._call_woken()
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_EVERY_SECONDS
            self._call_due(now)

    def _call_due(self, now: float) -> None:
        for task in [task for task in self._tasks if task.wake_at <= now]:
            # One task's end may be the end of another, or put its time off.
            if task.wake_at <= now and task in self._tasks:
                task.on_time(now)
        for descriptor, task in [item for item in self._readers.items() if item[1].wake_at <= now]:
            if task.wake_at <= now and self._readers.get(descriptor) is task:
                task.on_time(now)

    def _ring(self) -> None:
        sockets = self._wake_sockets
        if sockets is not None:
            # Where the bell is full, it rings already.
            with contextlib.suppress(BlockingIOError):
                sockets[1].send(b"\0")

    def _drain_bell(self) -> None:
        assert self._wake_sockets is not None
        with contextlib.suppress(BlockingIOError):
            while self._wake_sockets[0].recv(4096):
                pass

    def _call_woken(self) -> None:
        while self._woken:
            self._woken.popleft()()


_of_thread = threading.local()


def current_reactor() -> Reactor:
    """This thread's reactor; a forked child gets one of its own."""
    reactor: Reactor | None = getattr(_of_thread, "reactor", None)
    if reactor is None or reactor.pid != os.getpid():
        reactor = _of_thread.reactor = Reactor()
    return reactor

"""The reactor: one thread waits for many sockets, points in time, and wake-ups from other threads.

A bundle's thread drives its requests itself, between two elements and at the bundle's end. That costs no
hand-over of the GIL, which with a thread per request takes longer than the request (docs/performance.md), and
leaves no thread behind after teardown.

There is one reactor per thread, not one per DoFn: where two DoFns are fused, the second one waiting for a
free slot keeps the first one's requests moving, whose end may be what frees the slot.
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
# While a bundle takes elements, its thread steps thousands of times a second without waiting: checking every
# timer each time costs more than firing a timer this late.
_CHECK_TIMERS_EVERY_SECONDS = 0.002


class Timer(Protocol):
    """Something that waits for a point in time: ``wake_at``, in monotonic seconds, ``math.inf`` for never."""

    wake_at: float

    def on_time(self, now: float) -> None: ...


class SocketTask(Timer, Protocol):
    """A timer that also waits for a socket."""

    def on_io(self) -> None: ...


class Reactor:
    """Waits for the timers and sockets of one thread. Only what `waker` returns is thread-safe.

    Attributes:
        waited_seconds: for how long this thread has had nothing to do but wait, so far.
    """

    def __init__(self) -> None:
        self._poller = select.poll()
        self._sockets: dict[int, SocketTask] = {}
        self._timers: set[Timer] = set()
        self._woken: deque[Callable[[], None]] = deque()
        self._wake_sockets: tuple[socket.socket, socket.socket] | None = None
        self._check_timers_at = 0.0
        self.waited_seconds = 0.0
        self.pid = os.getpid()
        self._thread = threading.get_ident()

    def add(self, timer: Timer) -> None:
        """Call ``timer.on_time`` whenever its ``wake_at`` has come, until `remove`."""
        self._timers.add(timer)

    def remove(self, timer: Timer) -> None:
        self._timers.discard(timer)

    def watch(self, descriptor: int, events: int, task: SocketTask) -> None:
        """Call ``task.on_io`` whenever ``descriptor`` is ready for one of ``events``, and ``task.on_time`` as
        `add` does, until `unwatch`."""
        self._sockets[descriptor] = task
        self._poller.register(descriptor, events)

    def unwatch(self, descriptor: int) -> None:
        if self._sockets.pop(descriptor, None) is not None:
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
            sockets = self._wake_sockets
            # Its own thread looks before it waits.
            if sockets is not None and threading.get_ident() != self._thread:
                # A full buffer wakes the thread already; a closed socket belongs to a reactor that has ended.
                with contextlib.suppress(OSError):
                    sockets[1].send(b"\0")

        return wake

    def step(self, wait_until: float) -> None:
        """Do what is ready; if nothing is, wait for it, at most until ``wait_until`` (monotonic)."""
        if self._woken:
            self._call_woken()
            wait_until = 0.0
        timeout = 0
        if wait_until:
            for timer in (*self._timers, *self._sockets.values()):
                wait_until = min(wait_until, timer.wake_at)
            now = time.monotonic()
            self._check_timers_at = min(self._check_timers_at, wait_until)
            if wait_until > now:
                # poll() counts in whole milliseconds and rounds up here: waking early would only spin.
                timeout = int(min(wait_until - now, _LONGEST_POLL_SECONDS) * 1000) + 1
        ready = self._poller.poll(timeout)
        if timeout:
            self.waited_seconds += time.monotonic() - now
        for descriptor, _ in ready:
            task = self._sockets.get(descriptor)
            if task is not None:
                task.on_io()
            elif self._wake_sockets is not None and descriptor == self._wake_sockets[0].fileno():
                with contextlib.suppress(BlockingIOError):
                    while self._wake_sockets[0].recv(4096):
                        pass
        if self._woken:
            self._call_woken()
        now = time.monotonic()
        if now >= self._check_timers_at:
            self._check_timers_at = now + _CHECK_TIMERS_EVERY_SECONDS
            self._call_due(now)

    def close(self) -> None:
        """Close the sockets of `waker`. Wake-ups that come later do nothing."""
        sockets, self._wake_sockets = self._wake_sockets, None
        for each in sockets or ():
            each.close()

    def _call_due(self, now: float) -> None:
        for timer in [timer for timer in self._timers if timer.wake_at <= now]:
            # One timer's end may be the end of another, or put its time off.
            if timer.wake_at <= now and timer in self._timers:
                timer.on_time(now)
        for descriptor, task in [item for item in self._sockets.items() if item[1].wake_at <= now]:
            if task.wake_at <= now and self._sockets.get(descriptor) is task:
                task.on_time(now)

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

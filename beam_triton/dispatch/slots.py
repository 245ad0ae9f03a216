"""``max_concurrent_requests``: the slots of a process, and the queues of those that wait for something to be
free.

A woken queue entry must use what became free or wake the next one; otherwise the wake-up is lost for all
entries behind it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from beam_triton.transport.reactor import Reactor

# A wake-up lost to a bug must not hang a pipeline: whatever waits for others looks again after this.
POLL_AGAIN_SECONDS = 0.25


class WaitQueue:
    """Callbacks in the order of their arrival; thread-safe. Each is called once, or removed before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wakes: deque[Callable[[], None]] = deque()

    def join(self, wake: Callable[[], None]) -> None:
        with self._lock:
            self._wakes.append(wake)

    def leave(self, wake: Callable[[], None]) -> bool:
        """Remove ``wake``; False if it has been called already."""
        with self._lock:
            if wake not in self._wakes:
                return False
            self._wakes.remove(wake)
            return True

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not self._wakes

    def __len__(self) -> int:
        return len(self._wakes)

    def wake_next(self) -> None:
        """Call the entry that has waited longest, if there is one."""
        if not self._wakes:
            # An entry that joins now looks once more, and finds what became free.
            return
        with self._lock:
            wake = self._wakes.popleft() if self._wakes else None
        if wake is not None:
            wake()


class QueueEntry:
    """The place of one reactor's thread in a `WaitQueue`. ``on_wake`` is called on that thread."""

    def __init__(self, queue: WaitQueue, reactor: Reactor, on_wake: Callable[[], None]) -> None:
        self._queue = queue
        self._reactor = reactor
        self._on_wake = on_wake
        self._wake: Callable[[], None] | None = None
        self._round = 0
        self._is_withdrawn = False

    def join(self) -> bool:
        """Join the queue; False if the entry is in it already.

        What became free just before woke no entry: look once more after joining.
        """
        if self._wake is not None:
            return False
        self._round += 1
        self._is_withdrawn = False
        # Nothing here refers to itself once the entry was woken: its owner may hold megabytes.
        self._wake = self._reactor.waker(partial(self._on_woken, self._round))
        self._queue.join(self._wake)
        return True

    def leave(self) -> None:
        """Leave the queue, or pass on a wake-up that has come in between."""
        wake, self._wake = self._wake, None
        if wake is not None and not self._is_withdrawn and not self._queue.leave(wake):
            self._queue.wake_next()

    def withdraw(self) -> None:
        """Give its place up, on any thread; `leave` still passes on a wake-up that came in between."""
        wake = self._wake
        if wake is not None and self._queue.leave(wake):
            self._is_withdrawn = True

    def _on_woken(self, round_number: int) -> None:
        if self._wake is not None and round_number == self._round:
            self._wake = None
            self._on_wake()


class Slots:
    """Bounds the requests of a process, waiting ones included, and so its memory. Thread-safe."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._free = count
        self._queue = WaitQueue()

    def try_take(self, count: int) -> bool:
        """Take ``count`` slots if there is one left.

        A request for several need not wait until as many are free, which might be never; the next one waits
        until they have been released instead.
        """
        with self._lock:
            if self._free < 1:
                return False
            self._free -= count
            return True

    def take(self, count: int, reactor: Reactor, wait: Callable[[], None]) -> None:
        """Take ``count`` slots; call ``wait``, which drives the reactor, until there is one left."""
        if self.try_take(count):
            return
        # The wake-up itself ends the wait.
        entry = QueueEntry(self._queue, reactor, lambda: None)
        try:
            while not self.try_take(count):
                if not entry.join():
                    wait()
        finally:
            entry.leave()

    def release(self, count: int) -> None:
        with self._lock:
            self._free += count
            free = self._free
        for _ in range(min(count, free)):
            self._queue.wake_next()

"""Those who wait for something that becomes free now and then, on whatever thread, in their order.

Who is called either makes use of the turn or passes it on: a turn that goes to somebody who has got what
he wanted in another way, and who may not look at his messages for long, would leave the next one waiting.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from beam_triton.transport.reactor import Reactor


class WaitQueue:
    """Callbacks in the order of their arrival; thread-safe. Each is called once, or taken out before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wakes: deque[Callable[[], None]] = deque()

    def join(self, wake: Callable[[], None]) -> None:
        with self._lock:
            self._wakes.append(wake)

    def leave(self, wake: Callable[[], None]) -> bool:
        """Take ``wake`` out; False if it has been called already."""
        with self._lock:
            if wake not in self._wakes:
                return False
            self._wakes.remove(wake)
            return True

    def call_next(self) -> None:
        """Call the one that has waited longest, if somebody waits."""
        if not self._wakes:
            # Who joins now has yet to look once more, and will find what became free.
            return
        with self._lock:
            wake = self._wakes.popleft() if self._wakes else None
        if wake is not None:
            wake()


class QueueEntry:
    """One party of a reactor's thread, and its place in a line.

    ``on_wake`` is called on the reactor's thread.
    """

    def __init__(self, line: WaitQueue, reactor: Reactor, on_wake: Callable[[], None]) -> None:
        self._line = line
        self._reactor = reactor
        self._on_woken_up = on_wake
        self._wake: Callable[[], None] | None = None
        self._turn = 0

    def wait(self) -> bool:
        """Get in line; False if it stands there already.

        What became free before has called nobody: look once more after getting in line.
        """
        if self._wake is not None:
            return False
        self._turn += 1
        # Nothing here refers to itself once the turn has come: who waits may hold megabytes.
        self._wake = self._reactor.waker(partial(self._on_woken, self._turn))
        self._line.join(self._wake)
        return True

    def stop(self) -> None:
        """Get out of the line, or pass on the turn that has come meanwhile."""
        wake, self._wake = self._wake, None
        if wake is not None and not self._line.leave(wake):
            self._line.call_next()

    def _on_woken(self, turn: int) -> None:
        if self._wake is not None and turn == self._turn:
            self._wake = None
            self._on_woken_up()

"""Things that all users of a process share: counted references, released to nothing.

A reference count goes 1 → 0 → 1 as Beam tears idle DoFns down and sets others up in mid-job, on
whatever thread. The lock covers the decision; making and closing happen outside the lock of the
table, so that a slow close holds up nobody else.

A reference may be given back by the garbage collector, which runs anywhere, also on a thread that is in
the middle of this table's own work: giving back never waits for the lock. Where it is taken, whoever
holds it finishes the job.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

_logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lease(Generic[V]):
    """One reference. `release` gives it back; a second call does nothing.

    A forked child that has inherited a lease gets a reference of its own when it asks for the value:
    the parent's sockets are not for two processes.
    """

    def __init__(self, registry: SharedObjects[Any, V], key: Any) -> None:
        self._registry = registry
        self._key = key
        self._is_released = False
        self._entry: _Entry[V] | None = None
        registry._acquire(self)

    @property
    def value(self) -> V:
        """What is shared. After `release` it may have been closed."""
        entry = self._entry
        if entry is None or (entry.pid != os.getpid() and not self._is_released):
            entry = self._registry._acquire(self)
        return entry.value

    def release(self) -> None:
        if not self._is_released:
            self._registry._give_back(self)


class _Entry(Generic[V]):
    __slots__ = ("count", "pid", "value")

    def __init__(self, value: V) -> None:
        self.value = value
        self.count = 0
        self.pid = os.getpid()


class SharedObjects(Generic[K, V]):
    """A table of shared values by key, with a reference count each.

    A forked child starts with an empty table. The values it inherited are dropped without being closed
    properly, which leaves the parent's alone.

    Args:
        name: what the values are, for the log.
        make: builds a value; called under the registry's lock, so it must not wait for anything.
        close: ends a value whose last reference was released.
        first_and_last_level: log level of the counts that make or end a value; the others are DEBUG.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[K], V],
        close: Callable[[V], None],
        first_and_last_level: int = logging.DEBUG,
    ) -> None:
        self._name = name
        self._make = make
        self._close = close
        self._first_and_last_level = first_and_last_level
        self._lock = threading.Lock()
        self._entries: dict[K, _Entry[V]] = {}
        self._given_back: deque[Lease[V]] = deque()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget_all)

    def acquire(self, key: K) -> Lease[V]:
        """A reference to the value of ``key``, made if nobody holds one."""
        return Lease(self, key)

    def reference_count(self, key: K) -> int:
        """References held for ``key`` in this process."""
        with self._lock:
            entry = self._entries.get(key)
            count = entry.count if entry else 0
        self._process_releases()
        return count

    def __len__(self) -> int:
        return len(self._entries)

    def _acquire(self, lease: Lease[V]) -> _Entry[V]:
        try:
            with self._lock:
                if lease._entry is not None and lease._entry.pid == os.getpid():
                    # Another thread of a forked child was first.
                    return lease._entry
                entry = self._entries.get(lease._key)
                if entry is None:
                    entry = self._entries[lease._key] = _Entry(self._make(lease._key))
                entry.count += 1
                count = entry.count
                lease._entry = entry
        finally:
            self._process_releases()
        self._log("acquired", entry, count, count == 1)
        return entry

    def _give_back(self, lease: Lease[V]) -> None:
        self._given_back.append(lease)
        self._process_releases()

    def _process_releases(self) -> None:
        # Looked at again after each release of the lock: who was refused the lock relies on it.
        while self._given_back and self._lock.acquire(blocking=False):
            try:
                lease = self._given_back.popleft() if self._given_back else None
                if lease is None or lease._is_released:
                    continue
                lease._is_released = True
                entry = lease._entry
                if entry is None or entry.pid != os.getpid():
                    continue
                entry.count -= 1
                count = entry.count
                if count == 0 and self._entries.get(lease._key) is entry:
                    del self._entries[lease._key]
            finally:
                self._lock.release()
            self._log("released", entry, count, count == 0)
            if count == 0:
                self._close(entry.value)

    def _log(self, what: str, entry: _Entry[V], count: int, is_edge: bool) -> None:
        level = self._first_and_last_level if is_edge else logging.DEBUG
        _logger.log(level, "shared %s %#x %s: %d reference(s)", self._name, id(entry.value), what, count)

    def _forget_all(self) -> None:
        self._lock = threading.Lock()
        self._entries = {}
        self._given_back = deque()

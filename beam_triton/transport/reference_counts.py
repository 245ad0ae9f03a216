"""Reference counts of what all users of a process share; they may drop to zero and come back.

A count goes 1 → 0 → 1 as Beam tears idle DoFns down and sets others up in mid-job, on any thread. Objects are
closed outside the table's lock, so that a slow close delays no other user.

The garbage collector may release a reference, and runs anywhere, even on a thread that holds the table's
lock: releasing never waits for the lock. If the lock is taken, its holder processes the release.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

_logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lease(Generic[V]):
    """One reference; a second `release` does nothing.

    A forked child that has inherited a lease gets a reference of its own when it reads the value: two
    processes cannot share the parent's sockets.
    """

    def __init__(self, table: SharedObjects[Any, V], key: Any) -> None:
        self._table = table
        self._key = key
        self._is_released = False
        self._entry: _Entry[V] | None = None
        table._acquire(self)

    @property
    def value(self) -> V:
        """The shared object. It may be closed after `release`."""
        entry = self._entry
        if entry is None or (entry.pid != os.getpid() and not self._is_released):
            entry = self._table._acquire(self)
        return entry.value

    def release(self) -> None:
        if not self._is_released:
            self._table._releases.append(self)
            self._table._process_releases()


@dataclass(eq=False)
class _Entry(Generic[V]):
    value: V
    count: int = 0
    pid: int = field(default_factory=os.getpid)


class SharedObjects(Generic[K, V]):
    """Shared objects by key, each with a reference count.

    A forked child starts with an empty table. The objects it inherited are dropped without being closed,
    which leaves the parent's alone.

    Args:
        name: what the objects are, for the log.
        make: creates an object; called under the table's lock, so it must not wait for anything.
        close: closes an object whose last reference was released.
        first_and_last_level: log level of the first acquire and the last release; all others are DEBUG.
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
        self._releases: deque[Lease[V]] = deque()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget_all)

    def acquire(self, key: K) -> Lease[V]:
        """A reference to the object of ``key``, which is created if there is none."""
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

    def values(self) -> list[V]:
        """The objects that somebody refers to now."""
        with self._lock:
            values = [entry.value for entry in self._entries.values()]
        self._process_releases()
        return values

    def _acquire(self, lease: Lease[V]) -> _Entry[V]:
        try:
            with self._lock:
                if lease._entry is not None and lease._entry.pid == os.getpid():
                    # Another thread of the forked child was first.
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

    def _process_releases(self) -> None:
        # Checked again after each release of the lock: a releaser that did not get the lock relies on it.
        while self._releases and self._lock.acquire(blocking=False):
            try:
                lease = self._releases.popleft() if self._releases else None
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
        self._releases = deque()

"""Figures of a process's use of a model that wait to be written to its job's metrics."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping

_WRITE_EVERY_SECONDS = 1.0


class Totals:
    """Counts that are added on any thread, and taken about once a second.

    A metric costs as much to write as a small request costs to send, and streams have thousands of bundles a
    second: what is known of each goes together.

    Attributes:
        due_at: when they are to be taken, in monotonic seconds.
        seen: what is to be found out once in a process, and has been.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self.due_at = time.monotonic() + _WRITE_EVERY_SECONDS
        self.seen: set[str] = set()

    def add(self, counts: Mapping[str, int]) -> None:
        """Add to the counts."""
        with self._lock:
            for name, value in counts.items():
                self._counts[name] += value

    def take(self) -> Counter[str]:
        """What has been added since the last time."""
        self.due_at = time.monotonic() + _WRITE_EVERY_SECONDS
        with self._lock:
            taken, self._counts = self._counts, Counter()
        return taken

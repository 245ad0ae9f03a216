"""Threads that open connections, and stay for the next ones.

Where every request opens a connection, starting a thread for it costs more than the connection: about 100 us
of CPU, and a wait for the GIL before the thread that asks may go on.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_STAY_SECONDS = 5.0


class OpeningThreads(Generic[T]):
    """Calls ``open_one`` for each job on a thread of its own: one that has nothing to do, or a new one.

    A job never waits for another one, which may take as long as a name takes to be resolved. Thread-safe.
    """

    def __init__(self, open_one: Callable[[T], None]) -> None:
        self._open_one = open_one
        self._lock = threading.Lock()
        self._free: list[queue.SimpleQueue[T | None]] = []
        """Where each thread waits that has nothing to do; the last one to have worked works next."""
        self._ended = False

    def start(self, job: T) -> None:
        """Begin a job. RuntimeError where no thread can be started for it."""
        with self._lock:
            jobs = self._free.pop() if self._free else None
        if jobs is None:
            jobs = queue.SimpleQueue()
            threading.Thread(target=self._run, args=(jobs,), name="beam_triton-connect", daemon=True).start()
        jobs.put(job)

    def end(self) -> None:
        """Let every thread end with its job. Jobs that come later are still done."""
        with self._lock:
            self._ended = True
            free, self._free = self._free, []
        for jobs in free:
            jobs.put(None)

    def _run(self, jobs: queue.SimpleQueue[T | None]) -> None:
        job = jobs.get()
        while job is not None:
            self._open_one(job)
            # A request that has ended must not be kept until the next one comes.
            job = None
            job = self._next(jobs)

    def _next(self, jobs: queue.SimpleQueue[T | None]) -> T | None:
        with self._lock:
            if self._ended:
                return None
            self._free.append(jobs)
        try:
            return jobs.get(timeout=_STAY_SECONDS)
        except queue.Empty:
            with self._lock:
                if jobs in self._free:
                    self._free.remove(jobs)
                    return None
        # It was given a job at the last moment.
        return jobs.get()

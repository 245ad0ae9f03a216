"""A server and its clients in simulated time: requests wait for a free model instance, nothing sleeps."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from beam_triton.policy.concurrency_limit import ConcurrencyLimit
from tests.support.clock import FakeClock

REJECTION_SECONDS = 0.001
BACKOFF_SECONDS = 0.02


class Simulation:
    """Runs planned actions in the order of their time, on a clock that jumps."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self._plans: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def plan(self, delay_seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._plans, (self.clock() + delay_seconds, next(self._order), action))

    def run(self, seconds: float) -> None:
        end = self.clock() + seconds
        while self._plans and self._plans[0][0] <= end:
            when, _, action = heapq.heappop(self._plans)
            self.clock.advance(max(0.0, when - self.clock()))
            action()
        self.clock.advance(max(0.0, end - self.clock()))


@dataclass
class Server:
    """``instances`` requests run at a time, each for ``service_seconds()``; the others queue."""

    simulation: Simulation
    instances: int
    service_seconds: Callable[[], float]
    max_queue_size: int | None = None
    completed: int = 0
    rejected: int = 0
    _busy: int = 0
    _queue: deque[Callable[[], None]] = field(default_factory=deque)

    def send(self, on_done: Callable[[], None], on_rejected: Callable[[], None]) -> None:
        if self._busy < self.instances:
            self._execute(on_done)
        elif self.max_queue_size is None or len(self._queue) < self.max_queue_size:
            self._queue.append(on_done)
        else:
            self.rejected += 1
            self.simulation.plan(REJECTION_SECONDS, on_rejected)

    def _execute(self, on_done: Callable[[], None]) -> None:
        self._busy += 1

        def finish() -> None:
            self._busy -= 1
            self.completed += 1
            while self._queue and self._busy < self.instances:
                self._execute(self._queue.popleft())
            on_done()

        self.simulation.plan(self.service_seconds(), finish)


class Client:
    """Keeps as many requests in flight as its limit allows, or as it has work for.

    After a success it sends the next request once ``pause_seconds()`` have passed.
    """

    def __init__(
        self,
        server: Server,
        maximum: int,
        *,
        work: int | None = None,
        pause_seconds: Callable[[], float] = lambda: 0.001,
        timeout_seconds: float = 30.0,
    ) -> None:
        clock = server.simulation.clock
        self.limit = ConcurrencyLimit(maximum, timeout_seconds, clock, clock)
        self.limits: list[int] = []
        self.succeeded = 0
        self._server = server
        self.work = maximum if work is None else work
        self._pause_seconds = pause_seconds
        self._in_flight = 0

    def start(self) -> None:
        clock = self._server.simulation.clock
        while self._in_flight < min(self.limit.limit, self.work):
            self._in_flight += 1
            sent_at = clock()

            def done(sent_at: float = sent_at) -> None:
                self.limit.on_success(clock() - sent_at)
                self.succeeded += 1
                self._ended(self._pause_seconds())

            def rejected(sent_at: float = sent_at) -> None:
                self.limit.on_overload(clock() - sent_at)
                self._ended(BACKOFF_SECONDS)

            self._server.send(done, rejected)

    def _ended(self, pause_seconds: float) -> None:
        self._in_flight -= 1
        self.limits.append(self.limit.limit)
        if pause_seconds:
            self._server.simulation.plan(pause_seconds, self.start)
        else:
            self.start()

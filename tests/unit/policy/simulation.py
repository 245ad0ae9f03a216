"""A server and its clients in simulated time: requests wait for a free model instance, nothing sleeps."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from beam_triton.policy.concurrency_limit import ConcurrencyLimit
from beam_triton.policy.server_times import ServerCounts, ServerStatistics
from tests.support.clock import FakeClock

REJECTION_SECONDS = 0.001
BACKOFF_SECONDS = 0.02
POLL_SECONDS = 0.25


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
    _queue: deque[_Waiting] = field(default_factory=deque)
    _queue_seconds: float = 0.0
    _service_seconds: float = 0.0

    @property
    def counts(self) -> ServerCounts:
        """Of all clients, as in a Triton's statistics."""
        queue_ns, service_ns = round(1e9 * self._queue_seconds), round(1e9 * self._service_seconds)
        return ServerCounts(self.completed, self.completed, queue_ns + service_ns, queue_ns, service_ns)

    def cancel(self, on_done: Callable[[], None]) -> None:
        """Forget a request that waits; one that is being executed goes on."""
        self._queue = deque(each for each in self._queue if each.on_done is not on_done)

    def send(self, on_done: Callable[[], None], on_rejected: Callable[[], None]) -> None:
        request = _Waiting(self.simulation.clock(), on_done)
        if self._busy < self.instances:
            self._execute(request)
        elif self.max_queue_size is None or len(self._queue) < self.max_queue_size:
            self._queue.append(request)
        else:
            self.rejected += 1
            self.simulation.plan(REJECTION_SECONDS, on_rejected)

    def _execute(self, request: _Waiting) -> None:
        self._busy += 1
        queue_seconds = self.simulation.clock() - request.since
        service_seconds = self.service_seconds()

        def finish() -> None:
            self._busy -= 1
            self.completed += 1
            self._queue_seconds += queue_seconds
            self._service_seconds += service_seconds
            while self._queue and self._busy < self.instances:
                self._execute(self._queue.popleft())
            request.on_done()

        self.simulation.plan(service_seconds, finish)


class _Waiting(NamedTuple):
    since: float
    on_done: Callable[[], None]


class Client:
    """Keeps as many requests in flight as its limit allows, or as it has work for.

    After a success it sends the next request once ``pause_seconds()`` have passed. A request that takes
    longer than ``timeout_seconds`` is given up and sent again. With ``asks`` the server says how long
    requests wait in its queue.
    """

    def __init__(
        self,
        server: Server,
        maximum: int,
        *,
        work: int | None = None,
        elements: int = 1 << 60,
        pause_seconds: Callable[[], float] = lambda: 0.0,
        timeout_seconds: float = 30.0,
        asks: bool = False,
    ) -> None:
        clock = server.simulation.clock
        self.limit = ConcurrencyLimit(maximum, timeout_seconds, clock, clock)
        self.limits: list[int] = []
        self.latencies: list[float] = []
        self.succeeded = 0
        self.sent = 0
        self.work = maximum if work is None else work
        self._left = elements
        self._server = server
        self._timeout_seconds = timeout_seconds
        self._pause_seconds = pause_seconds
        self._in_flight = 0
        self._statistics = ServerStatistics()
        if not asks:
            self._statistics.cannot_be_asked()

    @property
    def has_finished(self) -> bool:
        return not self._left and not self._in_flight

    def start(self) -> None:
        while self._left and self._in_flight < min(self.limit.limit, self.work):
            self._send()
        if not self._in_flight and self._left:
            # The limit is 0 while the server may still execute requests that were given up.
            self._server.simulation.plan(POLL_SECONDS, self.start)

    def _send(self) -> None:
        clock = self._server.simulation.clock
        self._left -= 1
        self._in_flight += 1
        self.sent += 1
        if self._in_flight == self.limit.limit:
            self.limit.was_reached = True
        sent_at = clock()
        has_ended = False

        def done() -> None:
            nonlocal has_ended
            if has_ended:
                return
            has_ended = True
            latency_seconds = clock() - sent_at
            self._ask()
            self.limit.on_success(latency_seconds)
            self.latencies.append(latency_seconds)
            self.succeeded += 1
            self._ended(self._pause_seconds())

        def rejected() -> None:
            nonlocal has_ended
            has_ended = True
            self._left += 1
            self.limit.on_overload(clock() - sent_at)
            self._ended(BACKOFF_SECONDS)

        def timed_out() -> None:
            nonlocal has_ended
            if has_ended:
                return
            has_ended = True
            self._server.cancel(done)
            self._left += 1
            self.limit.on_deadline(clock() - sent_at)
            self._ended(0.0)

        self._server.send(done, rejected)
        self._server.simulation.plan(self._timeout_seconds, timed_out)

    def _ask(self) -> None:
        now = self._server.simulation.clock()
        if now >= self._statistics.ask_at and self.limit.was_reached:
            self._statistics.ask(now, self.limit.usual_latency_seconds or 0.0)
            times = self._statistics.add(self._server.counts)
            if times is not None:
                self.limit.on_server_times(times, self._statistics.valid_seconds)

    def _ended(self, pause_seconds: float) -> None:
        self._in_flight -= 1
        self.limits.append(self.limit.limit)
        if pause_seconds:
            self._server.simulation.plan(pause_seconds, self.start)
        else:
            self.start()

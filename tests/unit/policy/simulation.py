"""A server and its clients in simulated time: requests wait for a free model instance, nothing sleeps."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from beam_triton.policy.concurrency_limit import ConcurrencyLimit
from beam_triton.policy.politeness import Background
from beam_triton.policy.server_times import Executions, ServerCounts, ServerStatistics
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
    """``instances`` requests run at a time, each for ``service_seconds()``; the others queue.

    Each row after the first takes ``seconds_a_row`` more.
    """

    simulation: Simulation
    instances: int
    service_seconds: Callable[[], float]
    max_queue_size: int | None = None
    seconds_a_row: float = 0.0
    completed: int = 0
    rejected: int = 0
    _busy: int = 0
    _queue: deque[_Waiting] = field(default_factory=deque)
    _queue_seconds: float = 0.0
    _service_seconds: float = 0.0
    _executed: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def counts(self) -> ServerCounts:
        """Of all clients, as in a Triton's statistics."""
        queue_ns, service_ns = round(1e9 * self._queue_seconds), round(1e9 * self._service_seconds)
        return ServerCounts(self.completed, self.completed, queue_ns + service_ns, queue_ns, service_ns)

    @property
    def executions(self) -> dict[int, Executions]:
        """By the size of their batches."""
        return {
            rows: Executions(len(times), round(1e9 * sum(times))) for rows, times in self._executed.items()
        }

    def cancel(self, on_done: Callable[[], None]) -> None:
        """Forget a request that waits; one that is being executed goes on."""
        self._queue = deque(each for each in self._queue if each.on_done is not on_done)

    def send(
        self,
        on_done: Callable[[], None],
        on_rejected: Callable[[], None],
        *,
        rows: int = 1,
        is_urgent: bool = False,
    ) -> None:
        """A request; an urgent one is executed before those that are not."""
        request = _Waiting(self.simulation.clock(), on_done, rows, is_urgent)
        if self._busy < self.instances:
            self._execute(request)
        elif self.max_queue_size is None or len(self._queue) < self.max_queue_size:
            if is_urgent:
                urgent = sum(each.is_urgent for each in self._queue)
                self._queue.insert(urgent, request)
            else:
                self._queue.append(request)
        else:
            self.rejected += 1
            self.simulation.plan(REJECTION_SECONDS, on_rejected)

    def _execute(self, request: _Waiting) -> None:
        self._busy += 1
        queue_seconds = self.simulation.clock() - request.since
        service_seconds = self.service_seconds() + (request.rows - 1) * self.seconds_a_row

        def finish() -> None:
            self._busy -= 1
            self.completed += 1
            self._queue_seconds += queue_seconds
            self._service_seconds += service_seconds
            self._executed[request.rows].append(service_seconds)
            while self._queue and self._busy < self.instances:
                self._execute(self._queue.popleft())
            request.on_done()

        self.simulation.plan(service_seconds, finish)


class _Waiting(NamedTuple):
    since: float
    on_done: Callable[[], None]
    rows: int
    is_urgent: bool


class Visitors:
    """Interactive users: ``rate`` requests a second at random times, whatever became of earlier ones."""

    def __init__(
        self,
        server: Server,
        rate: float,
        generator: random.Random,
        *,
        is_urgent: bool = False,
    ) -> None:
        self.rate = rate
        self.latencies: list[float] = []
        self._server = server
        self._generator = generator
        self._is_urgent = is_urgent

    def start(self) -> None:
        self._server.simulation.plan(self._generator.expovariate(self.rate), self._arrive)

    def percentile(self, percent: int) -> float:
        """The latency that so many percent of the requests do not exceed."""
        return sorted(self.latencies)[len(self.latencies) * percent // 100]

    def _arrive(self) -> None:
        arrived_at = self._server.simulation.clock()
        self._server.send(
            lambda: self.latencies.append(self._server.simulation.clock() - arrived_at),
            lambda: None,
            is_urgent=self._is_urgent,
        )
        self.start()


class Client:
    """Keeps as many requests in flight as its limit allows, or as it has work for.

    After a success it sends the next request once ``pause_seconds()`` have passed. A request that takes
    longer than ``timeout_seconds`` is given up and sent again. With ``asks`` the server says how long
    requests wait in its queue. One that ``is_background`` gives way to others.
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
        is_background: bool = False,
        rows: int = 1,
    ) -> None:
        clock = server.simulation.clock
        self.limit = ConcurrencyLimit(maximum, timeout_seconds, clock, clock)
        self.limits: list[int] = []
        self.latencies: list[float] = []
        self.succeeded = 0
        self.scored = 0
        self.sent = 0
        self.work = maximum if work is None else work
        self._left = elements
        self._server = server
        self._timeout_seconds = timeout_seconds
        self._pause_seconds = pause_seconds
        self._in_flight = 0
        self.background = Background(clock) if is_background else None
        self._rows = rows
        self._statistics = ServerStatistics()
        if not asks:
            self._statistics.cannot_be_asked()

    @property
    def has_finished(self) -> bool:
        return not self._left and not self._in_flight

    def start(self) -> None:
        while self._left and self._in_flight < min(self.limit.limit, self.work):
            if self.background is not None and not self.background.try_send(self._in_flight):
                again_at = self.background.next_turn_at(self._in_flight)
                if again_at < math.inf:
                    self._server.simulation.plan(
                        max(0.0, again_at - self._server.simulation.clock()), self.start
                    )
                break
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
        rows = self._rows if self.background is None else min(self._rows, self.background.most_rows)

        def done() -> None:
            nonlocal has_ended
            if has_ended:
                return
            has_ended = True
            latency_seconds = clock() - sent_at
            if self.background is not None:
                self.background.on_success(latency_seconds, rows)
            self._ask()
            self.limit.on_success(latency_seconds)
            self.latencies.append(latency_seconds)
            self.succeeded += 1
            self.scored += rows
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

        self._server.send(done, rejected, rows=rows)
        self._server.simulation.plan(self._timeout_seconds, timed_out)

    def _ask(self) -> None:
        now = self._server.simulation.clock()
        if now >= self._statistics.ask_at and (self.limit.was_reached or self.background is not None):
            if self.background is not None:
                # The request that was just answered is not counted as ended yet.
                self.background.on_counts(
                    self._server.counts,
                    self._server.executions,
                    instances=self._server.instances,
                    in_flight=self._in_flight - 1,
                    question_seconds=0.001,
                )
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

"""A fleet on paper: processes of a job against servers, as a simulation of discrete events.

What decides is the library itself: each simulated request is a real `Call`, admitted by a real `EndpointSet`
with its breakers, limits, budgets and slots. They read a simulated clock and send over a simulated network:
`_in_simulated_time` replaces names of two modules of ``dispatch/``. Re-stated here, as the real ones have
sockets and threads:

- `_Connections`: the decisions of `transport/pool.py`; ``tests/unit/benchmarks/test_fleet.py`` compares both;
- `_Attempt`: when an attempt ends and with which error, of `transport/attempt.py`;
- `_check_health` and `_ask_for_statistics`: when a question is answered, of their namesakes in ``dispatch/``.

Of a server there are the instances of one model and their queue; of a process one thread, whose CPU time each
request needs. A heap of events is enough for that. SimPy, which would do as well, runs generators, and
everything here calls back; each call would need a generator around it.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import logging
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

from beam_triton.dispatch import call as call_module
from beam_triton.dispatch import endpoints as endpoints_module
from beam_triton.dispatch.call import Call, CallRecord, Phase
from beam_triton.dispatch.channel import CallContext, CallOptions
from beam_triton.dispatch.endpoints import Endpoint, EndpointSet, EndpointSetKey
from beam_triton.dispatch.request_head import HttpRequest
from beam_triton.errors import (
    ConnectError,
    ConnectionLostError,
    ConnectTimeoutError,
    DeadlineExceededError,
    PoolTimeoutError,
    ServerOverloadedError,
    SilentConnectionError,
    TritonError,
)
from beam_triton.options import InferenceOptions
from beam_triton.policy.retry import CERTAIN
from beam_triton.policy.server_times import ServerCounts
from beam_triton.transport.config import ConnectionPoolConfig
from beam_triton.transport.origin import EndpointUrl, Origin

_BALANCER = "http://balancer:8000"
_REQUEST = HttpRequest("POST", "/v2/models/model/infer")
_ANSWER, _QUEUE_FULL = (
    SimpleNamespace(body=b"", head=SimpleNamespace(status=status, get=lambda name: None))
    for status in (200, 503)
)
# How often idle connections that are too old are looked for.
_SWEEP_SECONDS = 5.0
# Calls that wait for their turn look for themselves four times a second. Here one does, and wakes the others,
# which look this rarely: most of the simulation's time would go there.
_OTHERS_POLL_SECONDS = 5.0


@dataclass(frozen=True)
class Event:
    """Something that happens to a server at a time.

    ``lost``: it is killed, and its address refuses connections. ``vanished``: it says nothing any more, as a
    machine that is switched off. ``added``: it was not there before. ``slowed``: the model takes ``factor``
    times as long.
    """

    at: float
    kind: Literal["lost", "vanished", "added", "slowed"]
    server: int = 0
    factor: float = 1.0


@dataclass(frozen=True)
class Fleet:
    """Processes and servers.

    Attributes:
        processes, servers, instances: instances are those of the model at each server.
        model_seconds, model_spread: the model's mean time for a request, and the standard deviation of its
            logarithm.
        cpu_seconds: a process's CPU time for a request, two thirds of it before it is sent.
        round_trip_seconds: of the network; a new connection takes one more.
        max_queue_size: how many requests a server queues before it refuses more; None for any number.
        is_balanced: the job has one URL, behind which each new connection goes to the next server; otherwise
            it has all servers' URLs.
        discovery_seconds: how long after a server was added each process knows of it, at most; with
            ``is_balanced`` new connections go there at once.
        requests_per_second: what a process has to send, at random times; None for as much as it can.
        bundle_requests: a process waits for all its answers after so many; None for one bundle without end.
        seconds, ramp_seconds: the duration, and in which time the processes start.
        events: what happens to the servers.
        options: keyword arguments of the transform.
        has_statistics: servers answer questions for the model's statistics.
    """

    processes: int = 1
    servers: int = 1
    instances: int = 4
    model_seconds: float = 0.1
    model_spread: float = 0.1
    cpu_seconds: float = 350e-6
    round_trip_seconds: float = 0.5e-3
    max_queue_size: int | None = None
    is_balanced: bool = False
    discovery_seconds: float = 30.0
    requests_per_second: float | None = None
    bundle_requests: int | None = None
    seconds: float = 30.0
    ramp_seconds: float = 5.0
    events: Sequence[Event] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    has_statistics: bool = True
    seed: int = 1

    @property
    def capacity(self) -> float:
        """Requests a second that all servers can execute."""
        return self.servers * self.instances / self.model_seconds


@dataclass(frozen=True)
class Ended:
    """A request that has ended: when, how long its last attempt took, and how long all of it.

    ``seconds`` counts from being ready to be sent; ``error`` is the name of its class.
    """

    at: float
    process: int
    latency_seconds: float
    seconds: float
    attempts: int
    error: str | None


@dataclass
class Outcome:
    """What a simulation has seen.

    Attributes:
        ended: the requests, in the order of their ends; ``unfinished`` ones were in flight at the end.
        executed: requests whose execution ended, by the second; with ``wasted`` ones, whose client had gone.
        most_connections: the most that a server had at a time.
        opened: connections, by the second.
        questions: for statistics, all together.
    """

    fleet: Fleet
    started: int = 0
    unfinished: int = 0
    ended: list[Ended] = field(default_factory=list)
    executed: Counter[int] = field(default_factory=Counter)
    wasted: int = 0
    most_connections: int = 0
    opened: Counter[int] = field(default_factory=Counter)
    questions: int = 0
    by_server: Counter[int] = field(default_factory=Counter)

    def between(self, begin: float, end: float) -> list[Ended]:
        """The requests that got their answer within a time."""
        return [each for each in self.ended if begin <= each.at < end and each.error is None]

    def rate(self, begin: float, end: float) -> float:
        """Answers a second within a time."""
        return len(self.between(begin, end)) / (end - begin)

    def latency(self, share: float, begin: float, end: float = math.inf) -> float:
        """The latency that a share of the answers does not exceed; NaN without any."""
        return quantile([each.latency_seconds for each in self.between(begin, end)], share)

    @property
    def errors(self) -> Counter[str]:
        """How many requests failed, by their error."""
        return Counter(each.error for each in self.ended if each.error is not None)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that a ``share`` of them does not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan


def simulate(fleet: Fleet) -> Outcome:
    """Run a fleet; the same fleet gives the same outcome."""
    return _Simulation(fleet).run()


class _Simulation:
    """The clock and the events; first those that are due now, in the order in which they were asked for."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.random = random.Random(fleet.seed)
        self.now = 1.0
        self.outcome = Outcome(fleet)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        absent = {event.server for event in fleet.events if event.kind == "added"}
        self.servers = [_Server(self, number, number not in absent) for number in range(fleet.servers)]
        self._next_server = 0
        self.at_origin = {EndpointUrl.parse(server.url).origin: server for server in self.servers}

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def run(self) -> Outcome:
        fleet, begin = self.fleet, self.now
        with _in_simulated_time(self):
            processes = [_Process(self, number) for number in range(fleet.processes)]
            for process in processes:
                starts_at = begin + fleet.ramp_seconds * process.number / fleet.processes
                self.at(starts_at, process.start)
            for event in fleet.events:
                self.at(begin + event.at, partial(self._happen, event, processes))
            end = begin + fleet.seconds
            events = self._events
            while events and events[0][0] <= end:
                self.now, _, what = heapq.heappop(events)
                what()
        self.outcome.unfinished = sum(len(process.calls) for process in processes)
        return self.outcome

    @property
    def elapsed(self) -> float:
        return self.now - 1.0

    def connect_to(self, origin: Origin) -> _Server | None:
        """The server that a new connection reaches; None where the balancer has none."""
        if not self.fleet.is_balanced:
            return self.at_origin[origin]
        # It checks their health, as balancers do, within seconds.
        there = [each for each in self.servers if each.is_up or self.elapsed < each.leaves_balancer_at]
        if not there:
            return None
        self._next_server += 1
        return there[self._next_server % len(there)]

    def _happen(self, event: Event, processes: Sequence[_Process]) -> None:
        server = self.servers[event.server]
        if event.kind == "slowed":
            server.factor = event.factor
        elif event.kind == "added":
            server.is_up = True
            if not self.fleet.is_balanced:
                urls = [EndpointUrl.parse(each.url) for each in self.servers if each.is_up]
                for process in processes:
                    hears_at = self.now + self.random.random() * self.fleet.discovery_seconds
                    self.at(hears_at, partial(process.endpoints.replace, urls))
        else:
            server.leave(is_silent=event.kind == "vanished")


class _Server:
    """The instances of a model, and a queue."""

    def __init__(self, simulation: _Simulation, number: int, is_up: bool) -> None:
        self._simulation = simulation
        self._fleet = simulation.fleet
        self.number = number
        self.url = f"http://server-{number}:8000"
        self.is_up = is_up
        self.is_silent = False
        self.leaves_balancer_at = -math.inf
        self.factor = 1.0
        self.connections = 0
        self._queue: deque[tuple[_Attempt, float]] = deque()
        self._executing = 0
        # All that was sent here and not answered; the epoch ends when the server does.
        self.unanswered: dict[_Attempt, None] = {}
        self.epoch = 0
        self._executions = 0
        self._queue_seconds = self._model_seconds = 0.0

    @property
    def counts(self) -> ServerCounts:
        queue_ns, compute_ns = int(self._queue_seconds * 1e9), int(self._model_seconds * 1e9)
        return ServerCounts(self._executions, self._executions, queue_ns + compute_ns, queue_ns, compute_ns)

    def take(self, attempt: _Attempt) -> None:
        """A request arrives."""
        if not self.is_up or attempt.has_ended:
            return
        if self._fleet.max_queue_size is not None and len(self._queue) >= self._fleet.max_queue_size:
            self._answer(attempt, _QUEUE_FULL)
            return
        self._queue.append((attempt, self._simulation.now))
        self._execute()

    def leave(self, *, is_silent: bool) -> None:
        """It is gone. What it had not answered is lost: the clients hear of that, or they do not."""
        simulation = self._simulation
        self.is_up, self.is_silent = False, is_silent
        self.leaves_balancer_at = simulation.elapsed + 5.0
        self.epoch += 1
        self._queue.clear()
        self._executing = 0
        lost, self.unanswered = self.unanswered, {}
        if is_silent:
            return
        hears_at = simulation.now + self._fleet.round_trip_seconds / 2
        for attempt in lost:
            simulation.at(hears_at, partial(attempt.end, ConnectionLostError("reset")))

    def _execute(self) -> None:
        simulation, fleet = self._simulation, self._fleet
        while self._queue and self._executing < fleet.instances:
            attempt, since = self._queue.popleft()
            if attempt.has_ended:
                # The connection was closed: Triton takes such a request out of its queue.
                continue
            self._executing += 1
            spread = fleet.model_spread
            seconds = fleet.model_seconds * self.factor
            if spread:
                seconds *= simulation.random.lognormvariate(-spread * spread / 2, spread)
            queued_seconds = simulation.now - since
            done = _Execution(self, attempt, self.epoch, queued_seconds, seconds)
            simulation.at(simulation.now + seconds, done)

    def executed(self, execution: _Execution) -> None:
        if execution.epoch != self.epoch:
            return
        simulation = self._simulation
        self._executing -= 1
        self._executions += 1
        self._queue_seconds += execution.queued_seconds
        self._model_seconds += execution.seconds
        simulation.outcome.executed[int(simulation.elapsed)] += 1
        simulation.outcome.by_server[self.number] += 1
        if execution.attempt.has_ended:
            simulation.outcome.wasted += 1
        else:
            self._answer(execution.attempt, _ANSWER)
        self._execute()

    def _answer(self, attempt: _Attempt, answer: SimpleNamespace) -> None:
        self.unanswered.pop(attempt, None)
        arrives_at = self._simulation.now + self._fleet.round_trip_seconds / 2
        self._simulation.at(arrives_at, lambda: attempt.receive(answer))


@dataclass(eq=False, slots=True)
class _Execution:
    server: _Server
    attempt: _Attempt
    epoch: int
    queued_seconds: float
    seconds: float

    def __call__(self) -> None:
        self.server.executed(self)


class _Process:
    """A worker process, whose only thread makes requests and takes answers; also the reactor of its calls."""

    waited_seconds = 0.0

    def __init__(self, simulation: _Simulation, number: int) -> None:
        fleet = simulation.fleet
        self.number = number
        self.simulation = simulation
        servers = [server.url for server in simulation.servers if server.is_up]
        options = InferenceOptions(endpoint=_BALANCER if fleet.is_balanced else servers, **fleet.options)
        self.endpoints = EndpointSet(
            EndpointSetKey(
                options.urls,
                "model",
                options.max_concurrent_requests,
                options.timeout_seconds,
                options.retry,
                options.circuit_breaker,
            )
        )
        self.connections = _Connections(options.pool, simulation)
        call_options = CallOptions(
            options.timeout_seconds,
            options.max_response_bytes,
            options.batching.max_batch_bytes,
            health_paths=("v2/health/ready",),
            statistics_path="v2/models/model/stats" if fleet.has_statistics else "",
        )
        writer: Any = SimpleNamespace(parts=lambda url, request: ())
        reactor: Any = self
        self.context = CallContext(reactor, reactor, self.endpoints, writer, call_options)
        self.calls: dict[Call, float] = {}
        self._cpu_free_at = 0.0
        self._is_making = False
        self._sent_of_bundle = 0
        # Times at which requests became ready, where a process has only so many.
        self._ready: deque[float] = deque()
        self._timers: set[Any] = set()
        self._polls_at = -math.inf

    def start(self) -> None:
        if self.simulation.fleet.requests_per_second is not None:
            self._arrive()
        self._go_on()
        self._sweep()

    def use_cpu(self, seconds: float, then: Callable[[], None]) -> None:
        """Call ``then`` once the thread has done what came before, and ``seconds`` more."""
        self._cpu_free_at = max(self._cpu_free_at, self.simulation.now) + seconds
        self.simulation.at(self._cpu_free_at, then)

    # The reactor of its calls.

    def add(self, timer: Any) -> None:
        self._timers.add(timer)
        if timer.phase is Phase.QUEUED:
            if self._polls_at > self.simulation.now:
                timer.wake_at += _OTHERS_POLL_SECONDS
            else:
                self._polls_at = timer.wake_at
        if timer.wake_at < math.inf:
            self.simulation.at(timer.wake_at, lambda: self._on_time(timer))

    def remove(self, timer: Any) -> None:
        self._timers.discard(timer)

    def waker(self, callback: Callable[[], None]) -> Callable[[], None]:
        return lambda: self.simulation.at(self.simulation.now, callback)

    def _on_time(self, timer: Any) -> None:
        if timer in self._timers and timer.wake_at <= self.simulation.now:
            timer.on_time(self.simulation.now)

    # What it has to do.

    def _arrive(self) -> None:
        rate = self.simulation.fleet.requests_per_second
        assert rate is not None
        self._ready.append(self.simulation.now)
        self._go_on()
        self.simulation.at(self.simulation.now + self.simulation.random.expovariate(rate), self._arrive)

    def _go_on(self) -> None:
        """Make the next request, if there is something to send and a slot for it."""
        fleet = self.simulation.fleet
        if self._is_making or (fleet.requests_per_second is not None and not self._ready):
            return
        if fleet.bundle_requests is not None and self._sent_of_bundle >= fleet.bundle_requests:
            if self.calls:
                return
            self._sent_of_bundle = 0
        if not self.endpoints.slots.try_take(1):
            return
        self._is_making = True
        self._sent_of_bundle += 1
        self.use_cpu(fleet.cpu_seconds * 2 / 3, self._submit)

    def _submit(self) -> None:
        simulation = self.simulation
        self._is_making = False
        ready_at = self._ready.popleft() if self._ready else simulation.now
        if self.endpoints.any_breaker_open:
            _check_health(self.context)
        call = Call(
            self.context,
            None,
            _REQUEST,
            _read,
            self._on_done,
            CallRecord(),
            slots=1,
            is_batch=True,
            is_sequence=False,
            suspicion=CERTAIN,
            lost_at=math.inf,
        )
        call._history = call._history._replace(suspicion=0)
        self.calls[call] = ready_at
        simulation.outcome.started += 1
        call.start()
        self._go_on()

    def _on_done(self, call: Call) -> None:
        ready_at, now = self.calls.pop(call), self.simulation.now
        self.endpoints.slots.release(1)
        error = None if call.error is None else type(call.error).__name__
        record = call.record
        self.simulation.outcome.ended.append(
            Ended(
                self.simulation.elapsed,
                self.number,
                record.latency_seconds,
                now - ready_at,
                record.attempts,
                error,
            )
        )
        self._go_on()

    def _sweep(self) -> None:
        self.connections.close_expired()
        self.simulation.at(self.simulation.now + _SWEEP_SECONDS, self._sweep)


def _read(exchange: Any) -> None:
    if exchange is _QUEUE_FULL:
        raise ServerOverloadedError("Exceeds maximum queue size", status=503)


@dataclass(eq=False, slots=True)
class _Connection:
    origin: Origin
    server: _Server
    epoch: int
    ages_at: float
    idle_since: float = 0.0

    @property
    def is_stale(self) -> bool:
        """The client knows that it is closed."""
        return self.epoch != self.server.epoch and not self.server.is_silent


class _Connections:
    """A process's pool: what `beam_triton.transport.pool.ConnectionPool` decides, without sockets."""

    def __init__(self, config: ConnectionPoolConfig, simulation: _Simulation) -> None:
        self.config = config
        self._simulation = simulation
        self._idle: deque[_Connection] = deque()
        self._open: Counter[Origin] = Counter()
        self.total = 0
        self._waiting: deque[_Attempt] = deque()

    @property
    def idle(self) -> int:
        return len(self._idle)

    def acquire(self, attempt: _Attempt) -> None:
        """Give it an idle connection, open one, or let it wait."""
        if not self._waiting:
            connection = self._pop_idle(attempt.origin)
            if connection is not None:
                attempt.send_on(connection, is_reused=True)
                return
        self._waiting.append(attempt)
        self._serve()

    def withdraw(self, attempt: _Attempt) -> None:
        if attempt in self._waiting:
            self._waiting.remove(attempt)

    def opened(self, connection: _Connection) -> None:
        """A connection that was being opened is there."""
        server = connection.server
        server.connections += 1
        outcome = self._simulation.outcome
        outcome.most_connections = max(outcome.most_connections, server.connections)
        outcome.opened[int(self._simulation.elapsed)] += 1

    def not_opened(self, origin: Origin) -> None:
        self._free(origin)
        self._serve()

    def release(self, connection: _Connection) -> None:
        now = self._simulation.now
        if not self.config.reuse_enabled or now >= connection.ages_at:
            self.close(connection)
            return
        connection.idle_since = now
        self._idle.append(connection)
        self._serve()
        while len(self._idle) > self.config.max_idle:
            self.close(self._idle.popleft())

    def close(self, connection: _Connection) -> None:
        self._gone(connection)
        self._serve()

    def close_idle(self, origin: Origin) -> None:
        for connection in [each for each in self._idle if each.origin == origin]:
            self._idle.remove(connection)
            self._gone(connection)
        self._serve()

    def close_expired(self) -> None:
        now = self._simulation.now
        for connection in [each for each in self._idle if now >= self._expires_at(each) or each.is_stale]:
            self._idle.remove(connection)
            self._gone(connection)
        self._serve()

    def ages_at(self) -> float:
        age = self.config.max_age_seconds
        return (
            math.inf if age is None else self._simulation.now + self._simulation.random.uniform(age / 2, age)
        )

    def _gone(self, connection: _Connection) -> None:
        connection.server.connections -= 1
        self._free(connection.origin)

    def _free(self, origin: Origin) -> None:
        self.total -= 1
        self._open[origin] -= 1

    def _pop_idle(self, origin: Origin) -> _Connection | None:
        now, idle = self._simulation.now, self._idle
        # With an age the one that has been idle for the longest is used first.
        order = range(len(idle)) if self.config.max_age_seconds is not None else range(len(idle) - 1, -1, -1)
        for index in order:
            connection = idle[index]
            if connection.origin is origin and now < self._expires_at(connection):
                del idle[index]
                if connection.is_stale:
                    self._gone(connection)
                    return self._pop_idle(origin)
                return connection
        return None

    def _expires_at(self, connection: _Connection) -> float:
        return min(connection.ages_at, connection.idle_since + self.config.keep_alive_seconds)

    def _serve(self) -> None:
        if not self._waiting:
            return
        limit = self.config.max_per_host or self.config.max_total
        for attempt in list(self._waiting):
            origin = attempt.origin
            connection = self._pop_idle(origin)
            if connection is not None:
                self._waiting.remove(attempt)
                attempt.send_on(connection, is_reused=True)
            elif self._open[origin] < limit and (self.total < self.config.max_total or self._idle):
                if self.total >= self.config.max_total:
                    self._gone(self._idle.popleft())
                self.total += 1
                self._open[origin] += 1
                self._waiting.remove(attempt)
                attempt.connect()


class _Attempt:
    """Takes the place of `beam_triton.transport.attempt.Attempt`."""

    def __init__(
        self,
        process: _Process,
        pool: Any,
        origin: Origin,
        parts: object,
        on_end: Callable[[Any], None],
        *,
        deadline: float,
        timeout_seconds: float,
        silence_seconds: float,
        on_silence: Callable[[Any], None],
        **_: object,
    ) -> None:
        self._process = process
        self._simulation = process.simulation
        self._pool = process.connections
        self.origin = origin
        self.parts = parts
        self._on_end = on_end
        self.deadline = self.wake_at = deadline
        self._timeout_seconds = timeout_seconds
        self._silence_seconds = silence_seconds
        self._on_silence = on_silence
        self.exchange: SimpleNamespace | None = None
        self.error: TritonError | None = None
        self.has_opened = self.has_reused = self.has_waited = self.has_ended = False
        self._is_connecting = False
        self.sent_at = 0.0
        self._connection: _Connection | None = None

    def start(self) -> None:
        self._pool.acquire(self)
        if self._connection is None and not self.has_ended:
            self.has_waited = not self._is_connecting
            self._wake_later()

    def connect(self) -> None:
        """Open a connection, within the connect timeout."""
        simulation = self._simulation
        self._is_connecting = True
        server = simulation.connect_to(self.origin)
        round_trip = simulation.fleet.round_trip_seconds
        if server is not None and server.is_silent:
            simulation.at(simulation.now + self._pool.config.connect_timeout_seconds, self._connected_to_none)
        elif server is None or not server.is_up:
            simulation.at(simulation.now + round_trip, self._connected_to_none)
        else:
            connection = _Connection(self.origin, server, server.epoch, self._pool.ages_at())
            simulation.at(simulation.now + round_trip, lambda: self._connected(connection))

    def send_on(self, connection: _Connection, *, is_reused: bool) -> None:
        self._connection = connection
        self.has_reused, self.has_opened = is_reused, not is_reused
        simulation, server = self._simulation, connection.server
        self.sent_at = simulation.now
        self.wake_at = min(self.deadline, simulation.now + self._silence_seconds)
        self._wake_later()
        if connection.epoch == server.epoch:
            server.unanswered[self] = None
            simulation.at(simulation.now + simulation.fleet.round_trip_seconds / 2, lambda: server.take(self))

    def receive(self, answer: SimpleNamespace) -> None:
        """The answer has come: the thread takes it when it has time."""
        if not self.has_ended:
            self._process.use_cpu(self._simulation.fleet.cpu_seconds / 3, lambda: self._take(answer))

    def end(self, error: TritonError) -> None:
        """End without an answer."""
        if self.has_ended:
            return
        self.error = error
        self.cancel()
        self._on_end(self)

    def cancel(self) -> None:
        self.has_ended = True
        self._pool.withdraw(self)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.server.unanswered.pop(self, None)
            self._pool.close(connection)

    def give_up(self) -> None:
        self._pool.close_idle(self.origin)
        self.end(SilentConnectionError("silent"))

    def _take(self, answer: SimpleNamespace) -> None:
        if self.has_ended:
            return
        self.has_ended = True
        self.exchange = answer
        connection, self._connection = self._connection, None
        assert connection is not None
        self._pool.release(connection)
        self._on_end(self)

    def _connected(self, connection: _Connection) -> None:
        self._is_connecting = False
        self._pool.opened(connection)
        if self.has_ended:
            self._pool.release(connection)
        else:
            self.send_on(connection, is_reused=False)

    def _connected_to_none(self) -> None:
        self._is_connecting = False
        self._pool.not_opened(self.origin)
        self.end(ConnectError("refused"))

    def _wake_later(self) -> None:
        self._simulation.at(self.wake_at, self._on_time)

    def _on_time(self) -> None:
        now = self._simulation.now
        if self.has_ended or now < self.wake_at:
            return
        if self._connection is None:
            error: TritonError = PoolTimeoutError("no connection became free")
            if self._is_connecting:
                error = ConnectTimeoutError("no connection")
            self.end(error)
        elif now >= self.deadline:
            self.end(DeadlineExceededError("late"))
        else:
            self.wake_at = self.deadline
            self._on_silence(self)
            if not self.has_ended:
                self._wake_later()


def _check_health(context: CallContext) -> None:
    """As `beam_triton.dispatch.health.start_health_checks`."""
    process: Any = context.reactor
    simulation: _Simulation = process.simulation
    for endpoint in context.endpoints.endpoints:
        breaker = endpoint.breaker
        if breaker is None or not breaker.claim_health_check():
            continue

        def passed(endpoint: Endpoint = endpoint) -> None:
            assert endpoint.breaker is not None
            endpoint.checked_at = simulation.now
            endpoint.breaker.health_check_passed()

        server = simulation.connect_to(endpoint.url.origin)
        if server is not None and server.is_up:
            simulation.at(simulation.now + 2 * simulation.fleet.round_trip_seconds, passed)


def _ask_for_statistics(context: CallContext, endpoint: Endpoint, now: float) -> None:
    """As `beam_triton.dispatch.server_statistics.ask_for_statistics`."""
    process: Any = context.reactor
    simulation: _Simulation = process.simulation
    if not context.options.statistics_path:
        endpoint.statistics.cannot_be_asked()
        return
    endpoint.statistics.ask(now, endpoint.limit.usual_latency_seconds or 0.0)
    simulation.outcome.questions += 1
    server = simulation.connect_to(endpoint.url.origin)
    if server is None or not server.is_up:
        return
    counts = server.counts

    def answered() -> None:
        times = endpoint.statistics.add(counts)
        if times is not None:
            endpoint.limit.on_server_times(times, endpoint.statistics.valid_seconds)

    simulation.at(now + simulation.fleet.round_trip_seconds, answered)


@contextmanager
def _in_simulated_time(simulation: _Simulation) -> Iterator[None]:
    clock = SimpleNamespace(
        monotonic=lambda: simulation.now, time=lambda: 1e9 + simulation.now, sleep=lambda seconds: None
    )
    logger = logging.getLogger("beam_triton")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    # It would look through all the fleet again and again, and find nothing.
    gc.disable()
    try:
        with (
            mock.patch.multiple(
                call_module,
                time=clock,
                random=simulation.random,
                Attempt=_Attempt,
                start_health_checks=_check_health,
                ask_for_statistics=_ask_for_statistics,
            ),
            mock.patch.multiple(endpoints_module, time=clock, random=simulation.random),
        ):
            yield
    finally:
        gc.enable()
        logger.setLevel(level)

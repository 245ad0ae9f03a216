"""The connection pool: limits, reuse, idle eviction and a fair queue.

Decisions are made under one lock; connections are opened, tested and closed outside it. Nothing blocks: a
request that gets no connection at once is queued as an `Acquisition`, which is served in the order of arrival
and wakes its owner. That lets one thread wait for many things at a time.

urllib3's own pool has neither an idle age nor a limit over several hosts, and its blocking mode waits without
a bound under requests (urllib3 issue 3184).
"""

from __future__ import annotations

import contextlib
import math
import random
import select
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice

from urllib3.connection import HTTPConnection

from beam_triton.errors import ConnectError, TritonError
from beam_triton.transport.config import ConnectionPoolConfig
from beam_triton.transport.connector import ConnectionOpener
from beam_triton.transport.dialing import USER_TIMEOUT_SECONDS, unset_user_timeout
from beam_triton.transport.opening_threads import OpeningThreads
from beam_triton.transport.origin import Origin

Clock = Callable[[], float]

# struct linger: on, for no time.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class PooledConnection:
    """A connection of the pool.

    Attributes:
        served: the exchanges it has carried.
        ages_at: when it is too old to carry more.
        longest_request_seconds: a request with a later deadline needs `allow_long_requests`.
    """

    __slots__ = (
        "_poller",
        "ages_at",
        "connection",
        "idle_since",
        "longest_request_seconds",
        "origin",
        "served",
        "sock",
    )

    def __init__(self, origin: Origin, connection: HTTPConnection, ages_at: float = math.inf) -> None:
        self.origin = origin
        self.connection = connection
        self.sock = connection.sock
        self.ages_at = ages_at
        self.idle_since = 0.0
        self.served = 0
        self.longest_request_seconds = USER_TIMEOUT_SECONDS
        self._poller = select.poll()
        self._poller.register(self.sock, select.POLLIN)

    def is_stale(self) -> bool:
        """Whether the peer closed it, or sent unexpected bytes, while it was idle."""
        return bool(self._poller.poll(0))

    def allow_long_requests(self) -> None:
        """Leave it to the deadlines of requests how long the peer may read nothing."""
        self.longest_request_seconds = math.inf
        unset_user_timeout(self.sock)


class AcquisitionState(Enum):
    WAITING = "waiting"
    CONNECTING = "connecting"
    READY = "ready"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(eq=False)
class Acquisition:
    """A pending request for a connection to ``origin``.

    ``wake`` is called, on any thread, when ``state`` has become READY (``connection`` is set) or FAILED
    (``error`` is). ``waited`` is set where the limits made it queue.
    """

    origin: Origin
    timeout_seconds: float
    wake: Callable[[], None]
    state: AcquisitionState = AcquisitionState.WAITING
    connection: PooledConnection | None = None
    error: TritonError | None = None
    waited: bool = False


@dataclass(frozen=True)
class PoolStatistics:
    """The pool's figures: connections now, and counts since it was created."""

    idle: int
    active: int
    waiting: int
    opened: int
    reused: int
    waited: int
    expired: int


@dataclass
class _Decision:
    """Decided under the lock, carried out outside it.

    An acquisition is in the list of the state that it was given: its owner may cancel it in the meantime, and
    its share of ``max_total`` must not be forgotten.
    """

    connect: list[Acquisition] = field(default_factory=list)
    ready: list[Acquisition] = field(default_factory=list)
    surplus: list[PooledConnection] = field(default_factory=list)


class ConnectionPool:
    """Connections to any number of origins, under the limits of a `ConnectionPoolConfig`.

    Args:
        config: the limits.
        open_connection: opens a connection within a time; runs on a thread of its own, so that a slow
            handshake delays nothing else.
        clock: monotonic seconds.

    With ``max_age_seconds`` the connection that has been idle for the longest is used first: requests spread
    over all connections, and so over the servers behind a balancer, however few are in flight; a pool that is
    larger than needed shrinks as its connections age. Without it the one used last comes first, so that those
    not needed stay idle, and are evicted.
    """

    def __init__(self, config: ConnectionPoolConfig, open_connection: ConnectionOpener, clock: Clock) -> None:
        self.config = config
        self._open_connection = open_connection
        self._clock = clock
        self._threads = OpeningThreads(self._connect)
        self._lock = threading.Lock()
        self._idle: deque[PooledConnection] = deque()  # the longest idle first
        self._open: Counter[Origin] = Counter()
        self._total = 0
        self._waiting: deque[Acquisition] = deque()
        self._opened = self._reused = self._waited = self._expired = 0
        self._uncounted_opened = 0
        self._fastest_seconds = math.inf
        self.has_faster = False
        self._closed = False

    def take_idle(self, origin: Origin) -> PooledConnection | None:
        """An idle connection to ``origin`` that is still alive."""
        while True:
            with self._lock:
                connection = self._pop_idle(origin)
                if connection is None:
                    return None
                self._reused += 1
            if not connection.is_stale():
                return connection
            with self._lock:
                self._reused -= 1
            self.discard(connection)

    def acquire(self, origin: Origin, timeout_seconds: float, wake: Callable[[], None]) -> Acquisition:
        """Ask for a connection: an idle one, a new one, or the next that becomes free.

        ``timeout_seconds`` bounds the connecting, not the waiting: the caller ends that by `cancel`.
        """
        acquisition = Acquisition(origin, timeout_seconds, wake)
        if not self._waiting:
            acquisition.connection = self.take_idle(origin)
            if acquisition.connection is not None:
                acquisition.state = AcquisitionState.READY
                return acquisition
        with self._lock:
            if self._closed:
                raise ConnectError("the connection pool is closed")
            self._waiting.append(acquisition)
            decision = self._serve()
            if acquisition.state is AcquisitionState.WAITING:
                acquisition.waited = True
                self._waited += 1
        self._carry_out(decision, acquired_here=acquisition)
        return acquisition

    def cancel(self, acquisition: Acquisition) -> None:
        """Withdraw the request; a connection that it got, or is about to get, goes back to the pool."""
        with self._lock:
            state = acquisition.state
            acquisition.state = AcquisitionState.CANCELLED
            if state is AcquisitionState.WAITING:
                self._waiting.remove(acquisition)
        if state is AcquisitionState.READY and acquisition.connection is not None:
            self.release(acquisition.connection)

    def release(self, connection: PooledConnection) -> None:
        """Return a connection whose exchange is complete."""
        now = self._clock()
        if not self.config.reuse_enabled or now >= connection.ages_at:
            self.discard(connection)
            return
        with self._lock:
            connection.idle_since = now
            self._idle.append(connection)
            max_idle = 0 if self._closed else self.config.max_idle
            if not self._waiting and len(self._idle) <= max_idle:
                return
            decision = self._serve()
            decision.surplus += self._take_out_oldest(len(self._idle) - max_idle)
        self._carry_out(decision)

    def discard(self, connection: PooledConnection) -> None:
        """Close a connection that must not be used again."""
        connection.connection.close()
        with self._lock:
            self._free_slot(connection.origin)
            decision = self._serve()
        self._carry_out(decision)

    def discard_idle(self, origin: Origin) -> None:
        """Close all idle connections to ``origin``."""
        with self._lock:
            idle = [connection for connection in self._idle if connection.origin == origin]
            self._take_out(idle)
            decision = self._serve()
        decision.surplus += idle
        self._carry_out(decision)

    def abort(self, connection: PooledConnection) -> None:
        """Close a connection in the middle of an exchange, so that the server notices at once.

        An ordinary close first delivers the rest of the request from the kernel's buffer, which never ends if
        the server does not read.
        """
        with contextlib.suppress(OSError):
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.discard(connection)

    def close_expired(self) -> float:
        """Close idle connections that are due; returns the seconds until the next one is."""
        with self._lock:
            decision = self._serve()
            decision.surplus += self._take_out_expired()
            now = self._clock()
            due = [self._expires_at(connection) - now for connection in self._idle]
        self._carry_out(decision)
        # One that is released in the meantime is due after ``keep_alive_seconds`` or at its age.
        return min(self.config.keep_alive_seconds, self.config.max_age_seconds or math.inf, *due)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called: no connection is to be had."""
        return self._closed

    def close(self) -> None:
        """Close idle connections and fail queued requests; active connections are closed on return."""
        with self._lock:
            self._closed = True
            idle = list(self._idle)
            self._take_out(idle)
            waiting = list(self._waiting)
            self._waiting.clear()
            for acquisition in waiting:
                acquisition.state = AcquisitionState.FAILED
                acquisition.error = ConnectError("the connection pool was closed while a request waited")
        self._threads.end()
        for connection in idle:
            connection.connection.close()
        for acquisition in waiting:
            acquisition.wake()

    def add_uncounted_opened(self) -> None:
        """Count a connection that was opened for a request without a `CallRecord`."""
        with self._lock:
            self._uncounted_opened += 1

    def note_round_trip(self, seconds: float) -> None:
        """Remember what the fastest of the small requests took, which tells the distance of the server."""
        if seconds < self._fastest_seconds:
            self._fastest_seconds = seconds
            self.has_faster = True

    def take_round_trip(self) -> float:
        """The fastest of them so far, in seconds; ``has_faster`` is true again once another one is faster."""
        self.has_faster = False
        return self._fastest_seconds

    def take_uncounted_opened(self) -> int:
        """How many were counted since the last call; the caller adds them to its metrics."""
        with self._lock:
            count, self._uncounted_opened = self._uncounted_opened, 0
            return count

    def statistics(self) -> PoolStatistics:
        with self._lock:
            return PoolStatistics(
                idle=len(self._idle),
                active=self._total - len(self._idle),
                waiting=len(self._waiting),
                opened=self._opened,
                reused=self._reused,
                waited=self._waited,
                expired=self._expired,
            )

    def _pop_idle(self, origin: Origin) -> PooledConnection | None:
        idle, now = self._idle, self._clock()
        idle_after = now - self.config.keep_alive_seconds
        oldest_first = self.config.max_age_seconds is not None
        for index in range(len(idle)) if oldest_first else range(len(idle) - 1, -1, -1):
            connection = idle[index]
            if (
                connection.origin == origin
                and now < connection.ages_at
                and idle_after < connection.idle_since
            ):
                del idle[index]
                return connection
        return None

    def _expires_at(self, connection: PooledConnection) -> float:
        return min(connection.ages_at, connection.idle_since + self.config.keep_alive_seconds)

    def _free_slot(self, origin: Origin) -> None:
        self._total -= 1
        self._open[origin] -= 1
        if not self._open[origin]:
            del self._open[origin]

    def _serve(self) -> _Decision:
        """Serve the queue in order, as far as there are connections; call under the lock.

        Idle connections to another origin are closed where that makes room.
        """
        decision = _Decision()
        if not self._waiting:
            return decision
        # A connection that no request may use must not take up its host's share of the limits.
        decision.surplus += self._take_out_expired()
        blocked: set[Origin] = set()
        limit = self.config.max_per_host or self.config.max_total
        for acquisition in list(self._waiting):
            origin = acquisition.origin
            if origin in blocked:
                continue
            connection = self._pop_idle(origin)
            if connection is not None:
                self._reused += 1
                acquisition.connection = connection
                acquisition.state = AcquisitionState.READY
                decision.ready.append(acquisition)
            elif self._open[origin] < limit and (self._total < self.config.max_total or self._idle):
                if self._total >= self.config.max_total:
                    decision.surplus += self._take_out_oldest(1)
                self._total += 1
                self._open[origin] += 1
                acquisition.state = AcquisitionState.CONNECTING
                decision.connect.append(acquisition)
            else:
                blocked.add(origin)
                if self._total >= self.config.max_total and not self._idle:
                    break
                continue
            self._waiting.remove(acquisition)
        return decision

    def _take_out_expired(self) -> list[PooledConnection]:
        now = self._clock()
        expired = [connection for connection in self._idle if now >= self._expires_at(connection)]
        self._expired += len(expired)
        return self._take_out(expired)

    def _take_out_oldest(self, count: int) -> list[PooledConnection]:
        return self._take_out(list(islice(self._idle, max(count, 0))))

    def _take_out(self, idle: list[PooledConnection]) -> list[PooledConnection]:
        """Forget idle connections; the caller closes them outside the lock."""
        for connection in idle:
            self._idle.remove(connection)
            self._free_slot(connection.origin)
        return idle

    def _carry_out(self, decision: _Decision, acquired_here: Acquisition | None = None) -> None:
        for connection in decision.surplus:
            connection.connection.close()
        for acquisition in decision.connect:
            try:
                self._threads.start(acquisition)
            except RuntimeError as error:
                self._connected(acquisition, None, ConnectError(f"no thread to connect on: {error}"))
        for acquisition in decision.ready:
            if acquisition is not acquired_here:
                acquisition.wake()

    def _connect(self, acquisition: Acquisition) -> None:
        timeout = min(self.config.connect_timeout_seconds, acquisition.timeout_seconds)
        origin = acquisition.origin
        try:
            opened = self._open_connection(origin, max(timeout, 0.001))
            connection = PooledConnection(origin, opened, self._ages_at())
        except TritonError as error:
            self._connected(acquisition, None, error)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._connected(acquisition, None, ConnectError(f"cannot connect to {origin}: {reason}"))
        else:
            self._connected(acquisition, connection, None)

    def _ages_at(self) -> float:
        age = self.config.max_age_seconds
        return math.inf if age is None else self._clock() + random.uniform(age / 2, age)

    def _connected(
        self, acquisition: Acquisition, connection: PooledConnection | None, error: TritonError | None
    ) -> None:
        with self._lock:
            decision = _Decision()
            if connection is None:
                self._free_slot(acquisition.origin)
                decision = self._serve()
            else:
                self._opened += 1
            if self._closed:
                error = ConnectError("the connection pool was closed while a request was connecting")
            was_cancelled = acquisition.state is AcquisitionState.CANCELLED
            if not was_cancelled:
                acquisition.connection = connection if error is None else None
                acquisition.error = error
                acquisition.state = AcquisitionState.READY if error is None else AcquisitionState.FAILED
        self._carry_out(decision)
        if connection is not None and (was_cancelled or error is not None):
            self.release(connection)
        if not was_cancelled:
            acquisition.wake()

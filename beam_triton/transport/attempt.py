"""One attempt of a request at one endpoint: a connection acquired, an exchange, within a deadline."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from enum import Enum

from beam_triton.errors import (
    ConnectionLostError,
    DeadlineExceededError,
    PoolTimeoutError,
    TritonError,
)
from beam_triton.transport.exchange import Buffer, Exchange
from beam_triton.transport.origin import Origin
from beam_triton.transport.pool import (
    STALE_WITHIN_SECONDS,
    Acquisition,
    AcquisitionState,
    ConnectionPool,
    PooledConnection,
    connect_overrun,
)
from beam_triton.transport.reactor import Reactor


class ConnectionUse(Enum):
    """How an attempt came by its connection."""

    NONE = "none"
    REUSED = "reused"
    OPENED = "opened"


class Attempt:
    """Runs from `start` until it calls ``on_end(attempt)``, on the reactor's thread, exactly once.

    Attributes, once it has ended:
        exchange: holds the answer, where ``error`` is ``None``.
        error: why there is no answer.
        connection_use, waited: how the connection was come by.
        was_stale: a reused connection ended before a byte of an answer, and too soon for the request to be
            why: the server closed it while it was idle, and the same request on another connection is
            due, not a retry.
    """

    wake_at = math.inf
    exchange: Exchange | None = None
    error: TritonError | None = None
    connection_use = ConnectionUse.NONE
    waited = False
    was_stale = False
    _begun_at = 0.0
    _acquisition: Acquisition | None = None
    _connection: PooledConnection | None = None

    def __init__(
        self,
        reactor: Reactor,
        pool: ConnectionPool,
        origin: Origin,
        parts: Sequence[Buffer],
        deadline: float,
        timeout_seconds: float,
        max_response_bytes: int,
        on_end: Callable[[Attempt], None],
    ) -> None:
        self._reactor = reactor
        self._pool = pool
        self._origin = origin
        self._parts = parts
        self._deadline = deadline
        self._timeout_seconds = timeout_seconds
        self._max_response_bytes = max_response_bytes
        self._on_end = on_end

    @property
    def head(self) -> Buffer:
        """The head of the request, as it was sent."""
        return self._parts[0]

    def start(self) -> None:
        connection = self._pool.take_idle(self._origin)
        if connection is not None:
            self._begin(connection)
            return
        self._reactor.add(self)
        remaining = self._deadline - time.monotonic()
        wake = self._reactor.waker(self._on_acquired)
        try:
            self._acquisition = self._pool.acquire(self._origin, remaining, wake)
        except TritonError as error:
            self._fail(error)
            return
        self.waited = self._acquisition.waited
        if self._acquisition.state in (AcquisitionState.READY, AcquisitionState.FAILED):
            self._on_acquired()
        else:
            connect_bound = time.monotonic() + self._pool.config.connect_timeout_seconds
            self.wake_at = self._deadline if self.waited else min(self._deadline, connect_bound)

    def cancel(self) -> None:
        """Give up without calling ``on_end``."""
        self._let_go()

    def on_time(self, now: float) -> None:
        acquisition = self._acquisition
        bound = self._pool.config.connect_timeout_seconds
        if acquisition is None:
            received = self.exchange.bytes_received if self.exchange else 0
            self._fail(
                DeadlineExceededError(
                    f"{self._origin} gave no complete answer within {self._timeout_seconds:g} s "
                    f"({received} bytes of it had come)"
                )
            )
        elif acquisition.state is AcquisitionState.CONNECTING and not self.waited:
            self._fail(connect_overrun(acquisition, min(bound, self._timeout_seconds)))
        elif acquisition.state in (AcquisitionState.WAITING, AcquisitionState.CONNECTING):
            # Who queued until there was no time left to connect in can blame no server.
            self._fail(
                PoolTimeoutError(
                    f"no connection became free within {self._timeout_seconds:g} s: all that "
                    f"max_total={self._pool.config.max_total} and "
                    f"max_per_host={self._pool.config.max_per_host} allow are in use"
                )
            )
        else:
            self._on_acquired()

    def _on_acquired(self) -> None:
        acquisition = self._acquisition
        if acquisition is None:
            return
        if acquisition.state is AcquisitionState.FAILED:
            self._acquisition = None
            assert acquisition.error is not None
            self._fail(acquisition.error)
        elif acquisition.state is AcquisitionState.READY:
            self._acquisition = None
            self._reactor.remove(self)
            assert acquisition.connection is not None
            self._begin(acquisition.connection)

    def _begin(self, connection: PooledConnection) -> None:
        self._connection = connection
        self.connection_use = ConnectionUse.REUSED if connection.served else ConnectionUse.OPENED
        self.wake_at = self._deadline
        self._begun_at = time.monotonic()
        self.exchange = Exchange(connection.sock, self._parts, max_response_bytes=self._max_response_bytes)
        self.on_io()

    def on_io(self) -> None:
        exchange, connection = self.exchange, self._connection
        assert exchange is not None and connection is not None
        try:
            events = exchange.advance()
        except TritonError as error:
            self.was_stale = (
                isinstance(error, ConnectionLostError)
                and connection.served > 0
                and exchange.bytes_received == 0
                and time.monotonic() - self._begun_at < STALE_WITHIN_SECONDS
            )
            self._fail(error)
            return
        if events:
            self._reactor.watch(connection.sock.fileno(), events, self)
            return
        self._end()

    def _end(self) -> None:
        exchange, connection = self.exchange, self._connection
        assert exchange is not None and connection is not None
        self._reactor.unwatch(connection.sock.fileno())
        self._connection = None
        connection.served += 1
        if exchange.reusable:
            self._pool.release(connection)
        else:
            self._pool.discard(connection)
        self._on_end(self)

    def _fail(self, error: TritonError) -> None:
        self.error = error
        self._let_go()
        self._on_end(self)

    def _let_go(self) -> None:
        self._reactor.remove(self)
        acquisition, self._acquisition = self._acquisition, None
        if acquisition is not None:
            self._pool.cancel(acquisition)
        connection, self._connection = self._connection, None
        if connection is not None:
            # A connection with an exchange cut short never goes back; closing it cancels the work on
            # the server.
            self._reactor.unwatch(connection.sock.fileno())
            self._pool.abort(connection)

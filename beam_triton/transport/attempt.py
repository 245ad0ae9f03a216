"""One attempt of a request at one server: a connection acquired, an exchange on it, both within a deadline.

`Attempt` runs on a reactor, beside many others; `exchange_within` runs one and waits for it. Neither repeats
anything: `beam_triton.policy.retry` decides about that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

from beam_triton.errors import (
    ConnectionLostError,
    ConnectTimeoutError,
    DeadlineExceededError,
    PoolTimeoutError,
    SilentConnectionError,
    TritonError,
)
from beam_triton.transport.event_stream import EventStream, StreamLimits
from beam_triton.transport.exchange import Buffer, Exchange
from beam_triton.transport.origin import Origin
from beam_triton.transport.pool import Acquisition, AcquisitionState, ConnectionPool, PooledConnection
from beam_triton.transport.reactor import Reactor

_STALE_WITHIN_SECONDS = 0.25
"""A reused connection that ends this soon after a request was sent, without a byte of an answer, had been
closed by the server before: the news takes a round trip. A connection that ends later may have carried a
request that ran."""

_SILENT_SECONDS = 5.0
"""After so long without a byte of an answer `exchange_within`, which does not know what answers usually take,
gives up a reused connection."""


class _AttemptState:
    """What changes while an attempt runs."""

    wake_at = math.inf
    exchange: Exchange | None = None
    error: TritonError | None = None
    has_opened = False
    has_reused = False
    has_waited = False
    sent_at = 0.0
    _acquisition: Acquisition | None = None
    _connection: PooledConnection | None = None
    _stream: EventStream | None = None


@dataclass(eq=False, repr=False)
class Attempt(_AttemptState):
    """Runs from `start` until it calls ``on_end(attempt)``, on the reactor's thread, exactly once.

    Args:
        parts: the request, head first.
        deadline: when the attempt ends at the latest, in monotonic seconds.
        timeout_seconds: the same as a duration, for messages.
        max_response_bytes: a larger answer is refused.
        expects_body: False for a HEAD request.
        silence_seconds: how long after sending ``on_silence(attempt)`` is called, on the reactor's thread, if
            not a byte has come. It may `give_up`, or set ``wake_at`` to be called again.
        stream_limits: the answer may be a stream of server-sent events, which have to come in time;
            ``on_event(attempt)`` is called when some have come, on the reactor's thread.

    Attributes, once it has ended:
        exchange: holds the answer, where ``error`` is ``None``.
        error: why there is no answer. ``was_stale`` is set on the error of a reused connection that the
            server had closed while it was idle: sending the request again is not a retry.
        has_opened, has_reused: how it got its connection, if it did.
        has_waited: the pool's limits made it queue.
        sent_at: when the request was sent last, in monotonic seconds.
    """

    reactor: Reactor
    pool: ConnectionPool
    origin: Origin
    parts: Sequence[Buffer]
    on_end: Callable[[Attempt], None]
    _: KW_ONLY
    deadline: float
    timeout_seconds: float
    max_response_bytes: int
    expects_body: bool = True
    silence_seconds: float = math.inf
    on_silence: Callable[[Attempt], None] | None = None
    stream_limits: StreamLimits | None = None
    on_event: Callable[[Attempt], None] | None = None

    def start(self) -> None:
        connection = self.pool.take_idle(self.origin)
        if connection is not None:
            self._send_on(connection)
            return
        self.reactor.add(self)
        remaining = self.deadline - time.monotonic()
        wake = self.reactor.waker(self._on_acquired)
        try:
            self._acquisition = self.pool.acquire(self.origin, remaining, wake)
        except TritonError as error:
            self._fail(error)
            return
        self.has_waited = self._acquisition.waited
        if self._acquisition.state in (AcquisitionState.READY, AcquisitionState.FAILED):
            self._on_acquired()
        else:
            connect_bound = time.monotonic() + self.pool.config.connect_timeout_seconds
            # A queued request connects later; the pool applies the connect timeout then.
            self.wake_at = self.deadline if self.has_waited else min(self.deadline, connect_bound)

    def cancel(self) -> None:
        """Give up without calling ``on_end``."""
        self.reactor.remove(self)
        acquisition, self._acquisition = self._acquisition, None
        if acquisition is not None:
            self.pool.cancel(acquisition)
        connection, self._connection = self._connection, None
        if connection is not None:
            # A connection with an interrupted exchange never goes back to the pool; closing it cancels the
            # work on the server.
            self.reactor.unwatch(connection.sock.fileno())
            self.pool.abort(connection)

    def give_up(self) -> None:
        """End with a `SilentConnectionError`.

        What lost this connection may have lost the idle ones as well: the next attempt gets a fresh one.
        """
        silent_seconds = time.monotonic() - self.sent_at
        self.pool.discard_idle(self.origin)
        self._fail(
            SilentConnectionError(
                f"{self.origin} said nothing for {silent_seconds:.1f} s, far longer than answers usually take"
            )
        )

    def on_time(self, now: float) -> None:
        acquisition = self._acquisition
        if acquisition is None:
            received = self.exchange.bytes_received if self.exchange else 0
            stream = self._stream
            if now < self.deadline:
                if stream is not None and now >= stream.due_at:
                    self._fail(DeadlineExceededError(f"{self.origin} {stream.late_message()}"))
                    return
                self.wake_at = self.deadline if stream is None else min(self.deadline, stream.due_at)
                if not received and self.on_silence is not None:
                    self.on_silence(self)
                return
            self._fail(
                DeadlineExceededError(
                    f"{self.origin} gave no complete answer within {self.timeout_seconds:g} s "
                    f"({received} bytes of it had come)"
                )
            )
        elif acquisition.state is AcquisitionState.CONNECTING and not self.has_waited:
            bound = min(self.pool.config.connect_timeout_seconds, self.timeout_seconds)
            self._fail(ConnectTimeoutError(f"{self.origin} did not accept a connection within {bound:g} s"))
        elif acquisition.state in (AcquisitionState.WAITING, AcquisitionState.CONNECTING):
            # A request that spent its deadline in the pool's queue says nothing about the server.
            config = self.pool.config
            self._fail(
                PoolTimeoutError(
                    f"no connection became free within {self.timeout_seconds:g} s: all that max_total="
                    f"{config.max_total} and max_per_host={config.max_per_host} allow are in use"
                )
            )
        else:
            self._on_acquired()

    def on_io(self) -> None:
        exchange, connection = self.exchange, self._connection
        assert exchange is not None and connection is not None
        try:
            events = exchange.advance()
        except TritonError as error:
            self._take_events(exchange)
            if (
                isinstance(error, ConnectionLostError)
                and connection.served > 0
                and exchange.bytes_received == 0
                and time.monotonic() - self.sent_at < _STALE_WITHIN_SECONDS
            ):
                error.was_stale = True
                error.counts_as_failure = False
            self._fail(error)
            return
        if self._stream is not None:
            self._take_events(exchange)
        if events:
            self.reactor.watch(connection.sock.fileno(), events, self)
            return
        self.reactor.unwatch(connection.sock.fileno())
        self._connection = None
        connection.served += 1
        if exchange.reusable:
            self.pool.release(connection)
        else:
            self.pool.discard(connection)
        self.on_end(self)

    def _take_events(self, exchange: Exchange) -> None:
        stream = self._stream
        if stream is not None and exchange.feed_stream(time.monotonic()):
            self.wake_at = min(self.deadline, stream.due_at)
            if self.on_event is not None:
                self.on_event(self)

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
            self.reactor.remove(self)
            assert acquisition.connection is not None
            self._send_on(acquisition.connection)

    def _send_on(self, connection: PooledConnection) -> None:
        self._connection = connection
        if self.timeout_seconds > connection.longest_request_seconds:
            connection.allow_long_requests()
        self.has_reused = connection.served > 0
        self.has_opened = not self.has_reused
        self.sent_at = now = time.monotonic()
        self.wake_at = min(self.deadline, now + self.silence_seconds)
        self.exchange = Exchange(
            connection.sock,
            self.parts,
            max_response_bytes=self.max_response_bytes,
            expects_body=self.expects_body,
        )
        if self.stream_limits is not None:
            self.exchange.stream = self._stream = stream = EventStream(self.stream_limits, now)
            self.wake_at = min(self.wake_at, stream.due_at)
        self.on_io()

    def _fail(self, error: TritonError) -> None:
        self.error = error
        self.cancel()
        self.on_end(self)


def exchange_within(
    pool: ConnectionPool,
    origin: Origin,
    parts: Sequence[Buffer],
    *,
    timeout_seconds: float,
    max_response_bytes: int,
    expects_body: bool = True,
) -> Exchange:
    """Send ``parts`` (the request, head first) to ``origin`` and wait for the whole answer.

    Raises:
        TransportError: no answer within ``timeout_seconds``, or none at all.
        RemoteProtocolError: an answer that is not HTTP/1.1.
    """

    def on_silence(attempt: Attempt) -> None:
        # A fresh connection that hears nothing shows a slow server: it has the whole time.
        if attempt.has_reused:
            attempt.give_up()
            assert attempt.error is not None
            attempt.error.was_stale = True

    reactor = Reactor()
    ended: list[Attempt] = []
    attempt = Attempt(
        reactor,
        pool,
        origin,
        parts,
        ended.append,
        deadline=time.monotonic() + timeout_seconds,
        timeout_seconds=timeout_seconds,
        max_response_bytes=max_response_bytes,
        expects_body=expects_body,
        silence_seconds=min(timeout_seconds / 3, _SILENT_SECONDS),
        on_silence=on_silence,
    )
    try:
        attempt.start()
        while not ended:
            reactor.step(math.inf)
    except BaseException:
        attempt.cancel()
        raise
    finally:
        # The attempt refers to the list: together they would keep the answer until the garbage collector
        # runs.
        ended.clear()
        reactor.close()
    if attempt.has_opened:
        pool.add_uncounted_opened()
    if attempt.error is not None:
        raise attempt.error
    pool.note_round_trip(time.monotonic() - attempt.sent_at)
    assert attempt.exchange is not None
    return attempt.exchange

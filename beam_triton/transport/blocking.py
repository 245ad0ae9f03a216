"""One exchange from acquiring its connection to its last byte, waited for: the control plane's way."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Sequence

from beam_triton.errors import ConnectionLostError, DeadlineExceededError, PoolTimeoutError
from beam_triton.transport.exchange import Buffer, Exchange
from beam_triton.transport.origin import Origin
from beam_triton.transport.pool import (
    STALE_WITHIN_SECONDS,
    AcquisitionState,
    ConnectionPool,
    PooledConnection,
    connect_overrun,
)


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

    Each reused connection that turns out to be stale before a byte of the answer came is replaced: only
    requests that may safely be repeated should come this way.

    Raises:
        TransportError: no answer within ``timeout_seconds``, or none at all.
        RemoteProtocolError: an answer that is no HTTP/1.1.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        connection = _acquire(pool, origin, deadline, timeout_seconds)
        if not connection.served:
            pool.add_uncounted_opened()
        begun_at = time.monotonic()
        exchange = Exchange(
            connection.sock, parts, max_response_bytes=max_response_bytes, expects_body=expects_body
        )
        try:
            _run(exchange, connection, deadline, timeout_seconds)
        except ConnectionLostError:
            pool.abort(connection)
            is_early = time.monotonic() - begun_at < STALE_WITHIN_SECONDS
            if connection.served and not exchange.bytes_received and is_early:
                continue
            raise
        except BaseException:
            pool.abort(connection)
            raise
        connection.served += 1
        if exchange.reusable:
            pool.release(connection)
        else:
            pool.discard(connection)
        return exchange


def _acquire(
    pool: ConnectionPool, origin: Origin, deadline: float, timeout_seconds: float
) -> PooledConnection:
    ready = threading.Event()
    started = time.monotonic()
    acquisition = pool.acquire(origin, deadline - started, ready.set)
    if acquisition.state is not AcquisitionState.READY:
        bound = pool.config.connect_timeout_seconds
        # Who had to queue starts connecting at a time that only the pool knows, and it keeps the bound.
        give_up_at = deadline if acquisition.waited else min(deadline, started + bound)
        try:
            in_time = ready.wait(max(0.0, give_up_at - time.monotonic()))
        except BaseException:
            pool.cancel(acquisition)
            raise
        if not in_time and acquisition.state in (AcquisitionState.WAITING, AcquisitionState.CONNECTING):
            pool.cancel(acquisition)
            if not acquisition.waited:
                raise connect_overrun(acquisition, min(bound, timeout_seconds))
            raise PoolTimeoutError(
                f"no connection became free within {timeout_seconds:g} s: all that max_total="
                f"{pool.config.max_total} and max_per_host={pool.config.max_per_host} allow are in use"
            )
    if acquisition.error is not None:
        raise acquisition.error
    assert acquisition.connection is not None
    return acquisition.connection


def _run(exchange: Exchange, connection: PooledConnection, deadline: float, timeout_seconds: float) -> None:
    poller = select.poll()
    while events := exchange.advance():
        poller.register(connection.sock, events)
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not poller.poll(remaining * 1000):
            raise DeadlineExceededError(
                f"{connection.origin} gave no complete answer within {timeout_seconds:g} s "
                f"({exchange.bytes_received} bytes of it had come)"
            )

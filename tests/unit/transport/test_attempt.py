"""One attempt: how it ends, how long it takes, and what it leaves behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from beam_triton.errors import (
    ConnectError,
    ConnectionLostError,
    ConnectTimeoutError,
    DeadlineExceededError,
    PoolTimeoutError,
)
from beam_triton.transport.attempt import Attempt
from beam_triton.transport.config import ConnectionPoolConfig, TlsConfig
from beam_triton.transport.connector import Connector
from beam_triton.transport.origin import Origin
from beam_triton.transport.pool import ConnectionPool
from beam_triton.transport.reactor import Reactor
from tests.support import faults, sockets
from tests.support.answers import Answer, always
from tests.support.fault_server import FaultServer, serve

OK = always(Answer(200, b"answer"))
HEAD = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\n"


class Bench:
    """A pool, a reactor, and attempts that record how they end."""

    def __init__(self, **limits: object) -> None:
        self.reactor = Reactor()
        config = ConnectionPoolConfig.from_options(limits)
        self.pool = ConnectionPool(config, Connector(TlsConfig()).open, time.monotonic)
        self.ended: list[Attempt] = []

    def start(self, port: int, timeout_seconds: float = 5.0) -> Attempt:
        attempt = Attempt(
            self.reactor,
            self.pool,
            Origin("http", "127.0.0.1", port),
            [HEAD, b"body"],
            deadline=time.monotonic() + timeout_seconds,
            timeout_seconds=timeout_seconds,
            max_response_bytes=1 << 20,
            on_end=self.ended.append,
        )
        attempt.start()
        return attempt

    def finish(self, attempt: Attempt) -> Attempt:
        patience = time.monotonic() + 10
        while attempt not in self.ended:
            assert time.monotonic() < patience
            self.reactor.step(patience)
        return attempt

    def step_until(self, condition: Callable[[], bool]) -> None:
        patience = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < patience
            self.reactor.step(time.monotonic() + 0.01)

    @property
    def in_use(self) -> int:
        return self.pool.statistics().active


@contextmanager
def bench(**limits: object) -> Iterator[Bench]:
    """Asserts after the test that no connection of the pool is in use."""
    made = Bench(**limits)
    yield made
    assert sockets.settles(lambda: made.in_use, 0) == 0
    made.pool.close()


def test_second_attempt_reuses_the_connection() -> None:
    """The first attempt opens a connection, the second uses it again."""
    with FaultServer(OK) as server, bench() as b:
        first = b.finish(b.start(server.port))
        second = b.finish(b.start(server.port))
        assert first.exchange is not None and bytes(first.exchange.body) == b"answer"
        assert (first.has_opened, first.has_reused) == (True, False)
        assert (second.has_opened, second.has_reused) == (False, True)
        assert first.error is second.error is None
        assert server.opened == 1


def test_connection_close_leaves_nothing_in_the_pool() -> None:
    """A connection whose answer has ``Connection: close`` is not kept."""
    closing = always(Answer(200, b"answer", (("Connection", "close"),)))
    with FaultServer(closing) as server, bench() as b:
        b.finish(b.start(server.port))
        assert b.pool.statistics().idle == 0


@pytest.mark.parametrize("fault", [faults.closed_without_answer, faults.reset_after_reading])
def test_only_a_reused_connection_is_stale(fault: Callable[..., None]) -> None:
    """A reused connection that ends without a byte was stale; a fresh one is lost."""
    with FaultServer(OK, [serve, fault, fault]) as server, bench() as b:
        b.finish(b.start(server.port))
        stale = b.finish(b.start(server.port))
        assert isinstance(stale.error, ConnectionLostError) and stale.error.was_stale
        fresh = b.finish(b.start(server.port))
        assert isinstance(fresh.error, ConnectionLostError) and not fresh.error.was_stale


def test_truncated_answer_is_not_a_stale_connection() -> None:
    """A connection that ends within the answer was not stale: the request has run."""
    with FaultServer(OK, [serve, faults.truncated(10)]) as server, bench() as b:
        b.finish(b.start(server.port))
        cut = b.finish(b.start(server.port))
        assert isinstance(cut.error, ConnectionLostError) and not cut.error.was_stale


def test_silent_server_fails_at_the_deadline() -> None:
    """The attempt ends at the deadline, and its connection is closed."""
    with FaultServer(OK, faults.silence) as server, bench() as b:
        started = time.monotonic()
        attempt = b.finish(b.start(server.port, 0.3))
        assert 0.3 <= time.monotonic() - started < 0.8
        assert isinstance(attempt.error, DeadlineExceededError)
        assert sockets.settles(lambda: server.open_now, 0) == 0


def test_wait_for_a_connection_ends_at_the_deadline() -> None:
    """The error names the limits of the pool."""
    with FaultServer(OK, faults.silence) as server, bench(max_total=1, max_idle=1) as b:
        holding = b.start(server.port, 1.0)
        waiting = b.finish(b.start(server.port, 0.2))
        assert isinstance(waiting.error, PoolTimeoutError) and waiting.has_waited
        assert "max_total=1" in waiting.error.message
        b.finish(holding)


def test_connecting_is_bounded_by_connect_timeout_seconds() -> None:
    """A host that never answers a connection request fails in time."""
    with faults.unanswering_port() as port, bench(connect_timeout_seconds=0.3) as b:
        started = time.monotonic()
        attempt = b.finish(b.start(port))
        assert 0.3 <= time.monotonic() - started < 0.8
        assert isinstance(attempt.error, ConnectTimeoutError)


def test_connecting_is_bounded_by_the_deadline() -> None:
    """A deadline shorter than ``connect_timeout_seconds`` bounds the connecting."""
    with faults.unanswering_port() as port, bench() as b:
        started = time.monotonic()
        attempt = b.finish(b.start(port, 0.3))
        assert time.monotonic() - started < 0.8
        assert isinstance(attempt.error, ConnectTimeoutError)


def test_refused_connection_names_host_and_port() -> None:
    """A port that refuses fails at once."""
    with faults.refusing_port() as port, bench() as b:
        attempt = b.finish(b.start(port))
        assert isinstance(attempt.error, ConnectError)
        assert f"127.0.0.1:{port}" in attempt.error.message
        assert not attempt.has_opened and not attempt.has_reused


def test_closed_pool_fails_the_attempt() -> None:
    """An attempt on a closed pool ends with an error, as every attempt does."""
    with bench() as b:
        b.pool.close()
        assert isinstance(b.finish(b.start(1)).error, ConnectError)


def test_cancel_while_connecting_calls_no_callback() -> None:
    """Cancelling while the connection is being opened ends the attempt silently."""
    with faults.unanswering_port() as port, bench(connect_timeout_seconds=0.3) as b:
        b.start(port).cancel()
        b.step_until(lambda: b.in_use == 0)
        assert b.ended == []


def test_cancel_in_the_pools_queue_lets_the_next_attempt_pass() -> None:
    """The cancelled attempt does not take the connection."""
    with FaultServer(OK, [faults.late(0.2)]) as server, bench(max_total=1, max_idle=1) as b:
        first, given_up, last = b.start(server.port), b.start(server.port), b.start(server.port)
        given_up.cancel()
        b.finish(first)
        assert b.finish(last).error is None
        assert given_up not in b.ended


def test_cancel_during_the_exchange_closes_the_connection() -> None:
    """Closing the connection cancels the work on the server."""
    with FaultServer(OK, faults.silence) as server, bench() as b:
        attempt = b.start(server.port)
        b.step_until(lambda: attempt.has_opened)
        attempt.cancel()
        attempt.cancel()
        assert sockets.settles(lambda: server.open_now, 0) == 0
        assert b.ended == []


def test_cancel_before_the_connection_is_used_returns_it() -> None:
    """A connection that is ready, but not yet used by the reactor, returns to the pool."""
    with FaultServer(OK) as server, bench() as b:
        attempt = b.start(server.port)
        assert sockets.settles(lambda: b.pool.statistics().opened, 1) == 1
        # If connecting took almost no time, the attempt was sending before `start` returned.
        kept = int(not attempt.has_opened)
        attempt.cancel()
        b.reactor.step(0.0)
        assert sockets.settles(lambda: b.pool.statistics().idle, kept) == kept
        assert b.ended == []

"""The background thread: it closes idle connections on time and logs the pool's figures."""

from __future__ import annotations

import logging
import time

import pytest

from beam_triton.transport.config import ConnectionPoolConfig
from beam_triton.transport.idle_eviction import IdleConnectionEvictor, pool_report
from beam_triton.transport.origin import Origin
from beam_triton.transport.pool import ConnectionPool, PoolStatistics
from tests.support import sockets
from tests.support.socket_pair_connections import Opener

A = Origin("http", "a.example", 80)


def test_idle_connections_are_closed_on_time() -> None:
    """A connection that became idle while the thread slept is closed at its own time, not a round later."""
    # Models that other tests left to the garbage collector.
    others = sockets.threads().count("beam_triton-pool")
    opener = Opener()
    config = ConnectionPoolConfig(keep_alive_seconds=0.3)
    pool = ConnectionPool(config, opener.open, time.monotonic)
    evictor = IdleConnectionEvictor(pool, time.monotonic)
    evictor.start()
    try:
        time.sleep(0.1)
        acquisition = pool.acquire(A, 5.0, lambda: None)
        assert sockets.settles(lambda: pool.statistics().opened, 1) == 1
        pool.cancel(acquisition)
        assert sockets.settles(lambda: pool.statistics().idle, 1) == 1
        since = time.monotonic()
        (peer,) = opener.peers.values()
        peer.settimeout(5)
        assert peer.recv(1) == b""
        assert 0.2 <= time.monotonic() - since < 0.5
        assert pool.statistics().expired == 1
    finally:
        evictor.stop()
        opener.close()
    assert sockets.threads().count("beam_triton-pool") <= others


def test_idle_connection_is_closed_at_its_age() -> None:
    """Long before it has been idle for ``keep_alive_seconds``."""
    opener = Opener()
    pool = ConnectionPool(ConnectionPoolConfig(max_age_seconds=0.4), opener.open, time.monotonic)
    evictor = IdleConnectionEvictor(pool, time.monotonic)
    evictor.start()
    try:
        since = time.monotonic()
        pool.cancel(pool.acquire(A, 5.0, lambda: None))
        assert sockets.settles(lambda: len(opener.peers), 1) == 1
        (peer,) = opener.peers.values()
        peer.settimeout(5)
        assert peer.recv(1) == b""
        # Up to one age later than its own, which is 0.2 to 0.4 s: the thread slept when it was opened.
        assert 0.2 <= time.monotonic() - since < 1.0
        assert sockets.settles(lambda: pool.statistics().expired, 1) == 1
    finally:
        evictor.stop()
        opener.close()


def test_monitoring_logs_the_pools_figures(caplog: pytest.LogCaptureFixture) -> None:
    """With monitoring enabled a line appears once per interval, and none after the thread has stopped."""
    caplog.set_level(logging.INFO)
    opener = Opener()
    config = ConnectionPoolConfig(monitoring_enabled=True, monitoring_interval_seconds=0.1)
    pool = ConnectionPool(config, opener.open, time.monotonic)
    evictor = IdleConnectionEvictor(pool, time.monotonic)
    evictor.start()
    time.sleep(0.35)
    evictor.stop()
    lines = [record.message for record in caplog.records if "connection pool" in record.message]
    assert 1 <= len(lines) <= 3
    assert lines[0].startswith("connection pool: 0 idle, 0 active, 0 waiting; 0 opened, 0 reused")


def test_stop_does_not_wait_for_the_next_eviction() -> None:
    """The thread ends at once, though its next eviction is minutes away; stopping twice is harmless."""
    pool = ConnectionPool(ConnectionPoolConfig(), Opener().open, time.monotonic)
    evictor = IdleConnectionEvictor(pool, time.monotonic)
    evictor.start()
    started = time.monotonic()
    evictor.stop()
    evictor.stop()
    assert time.monotonic() - started < 1


def test_report_contains_requests_per_second() -> None:
    """The rate counts every connection taken since the last line, opened or reused."""
    before = PoolStatistics(idle=0, active=0, waiting=0, opened=2, reused=8, waited=0, expired=0)
    after = PoolStatistics(idle=1, active=2, waiting=3, opened=4, reused=26, waited=5, expired=6)
    assert pool_report(before, after, 10.0) == (
        "connection pool: 1 idle, 2 active, 3 waiting; "
        "4 opened, 26 reused, 6 expired, 5 waits; 2.0 requests/s"
    )
    assert pool_report(before, before, 0.0).endswith("0.0 requests/s")

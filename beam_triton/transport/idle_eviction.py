"""Idle eviction: a pool's background thread closes idle connections in time and logs the pool's figures."""

from __future__ import annotations

import logging
import threading

from beam_triton.transport.pool import Clock, ConnectionPool, PoolStatistics

_logger = logging.getLogger(__name__)


class IdleConnectionEvictor:
    """Runs from `start` to `stop`.

    Releases need not wake it: it sleeps for ``keep_alive_seconds`` at most, so a connection that becomes idle
    in the meantime is due no earlier than the thread wakes.
    """

    def __init__(self, pool: ConnectionPool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beam_triton-pool", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it, which takes no time: it never does anything long."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        config = self._pool.config
        last_report = self._clock()
        last = self._pool.statistics()
        while True:
            wait = self._pool.close_expired()
            if config.monitoring_enabled:
                elapsed = self._clock() - last_report
                if elapsed >= config.monitoring_interval_seconds:
                    statistics = self._pool.statistics()
                    _logger.info("%s", pool_report(last, statistics, elapsed))
                    last, last_report, elapsed = statistics, self._clock(), 0.0
                wait = min(wait, config.monitoring_interval_seconds - elapsed)
            if self._stopped.wait(max(wait, 0.01)):
                return


def pool_report(before: PoolStatistics, after: PoolStatistics, elapsed_seconds: float) -> str:
    """The monitoring line. Every request either opens a connection or reuses one."""
    requests = after.opened + after.reused - before.opened - before.reused
    per_second = requests / elapsed_seconds if elapsed_seconds > 0 else 0.0
    return (
        f"connection pool: {after.idle} idle, {after.active} active, {after.waiting} waiting; "
        f"{after.opened} opened, {after.reused} reused, {after.expired} expired, "
        f"{after.waited} waits; {per_second:.1f} requests/s"
    )

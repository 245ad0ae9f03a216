"""Asking a server whether it is ready again, while its circuit breaker is open."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from beam_triton.dispatch.attempt import Attempt
from beam_triton.dispatch.call_options import CallOptions
from beam_triton.dispatch.endpoints import EndpointSet
from beam_triton.dispatch.reactor import Reactor
from beam_triton.dispatch.request import HeadWriter, HttpRequest
from beam_triton.errors import TritonError
from beam_triton.transport.origin import EndpointUrl
from beam_triton.transport.pool import ConnectionPool

# A server that takes longer to say that it is ready is not ready.
_LONGEST_CHECK_SECONDS = 5.0
_MAX_ANSWER_BYTES = 1_048_576


class HealthCheck:
    """Asks one endpoint for ``paths``, one after the other; calls ``on_healthy`` when all answered 200."""

    def __init__(
        self,
        reactor: Reactor,
        pool: ConnectionPool,
        head_writer: HeadWriter,
        url: EndpointUrl,
        paths: Sequence[str],
        timeout_seconds: float,
        on_healthy: Callable[[], None],
    ) -> None:
        self._reactor = reactor
        self._pool = pool
        self._head_writer = head_writer
        self._url = url
        self._left = list(paths)
        self._timeout_seconds = timeout_seconds
        self._on_healthy = on_healthy
        self._attempt: Attempt | None = None

    @property
    def is_running(self) -> bool:
        return self._attempt is not None

    def start(self) -> None:
        self._ask()

    def cancel(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.cancel()

    def _ask(self) -> None:
        try:
            parts = self._head_writer.parts(self._url, HttpRequest("GET", self._left.pop(0)))
        except TritonError:
            # A secret that cannot be read: the requests that wait for this check will say so.
            return
        self._attempt = attempt = Attempt(
            self._reactor,
            self._pool,
            self._url.origin,
            parts,
            time.monotonic() + self._timeout_seconds,
            self._timeout_seconds,
            _MAX_ANSWER_BYTES,
            self._on_attempt_end,
        )
        attempt.start()

    def _on_attempt_end(self, attempt: Attempt) -> None:
        self._attempt = None
        exchange = attempt.exchange
        if attempt.error is not None or exchange is None or exchange.head is None:
            return
        if exchange.head.status != 200:
            return
        if self._left:
            self._ask()
        else:
            self._on_healthy()


class HealthWatch:
    """The checks that one dispatcher makes; the breakers see to it that a process makes few in all.

    They outlive the calls that cause them: a call to a healthy server may be over before a check of
    a sick one is.
    """

    def __init__(
        self,
        reactor: Reactor,
        pool: ConnectionPool,
        endpoints: EndpointSet,
        head_writer: HeadWriter,
        options: CallOptions,
    ) -> None:
        self._reactor = reactor
        self._pool = pool
        self._endpoints = endpoints
        self._head_writer = head_writer
        self._paths = options.health_paths
        self._timeout_seconds = min(options.timeout_seconds, _LONGEST_CHECK_SECONDS)
        self._running: list[HealthCheck] = []

    def ask(self) -> None:
        """Check each endpoint whose breaker is open and lets this caller be the one to check."""
        if not self._paths:
            return
        for endpoint in self._endpoints.endpoints:
            breaker = endpoint.breaker
            if breaker is not None and breaker.claim_health_check():
                check = HealthCheck(
                    self._reactor,
                    self._pool,
                    self._head_writer,
                    endpoint.url,
                    self._paths,
                    self._timeout_seconds,
                    breaker.health_check_passed,
                )
                self._running = [check, *(other for other in self._running if other.is_running)]
                check.start()

    def cancel(self) -> None:
        """Let go of the checks under way."""
        running, self._running = self._running, []
        for check in running:
            check.cancel()

"""Asking a server whether it is ready again, while its circuit breaker is open."""

from __future__ import annotations

import time
from collections.abc import Callable

from beam_triton.dispatch.attempt import Attempt
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
    """Asks for ``paths`` one after the other; calls ``on_healthy`` when all of them answered 200."""

    def __init__(
        self,
        reactor: Reactor,
        pool: ConnectionPool,
        url: EndpointUrl,
        head_writer: HeadWriter,
        paths: tuple[str, ...],
        *,
        timeout_seconds: float,
        on_healthy: Callable[[], None],
    ) -> None:
        self._reactor = reactor
        self._pool = pool
        self._url = url
        self._head_writer = head_writer
        self._left = list(paths)
        self._timeout_seconds = min(timeout_seconds, _LONGEST_CHECK_SECONDS)
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
            # A secret that cannot be read: the request that waits for this check will say so.
            return
        self._attempt = attempt = Attempt(
            self._reactor,
            self._pool,
            self._url.origin,
            parts,
            deadline=time.monotonic() + self._timeout_seconds,
            timeout_seconds=self._timeout_seconds,
            max_response_bytes=_MAX_ANSWER_BYTES,
            on_end=self._on_attempt_end,
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
    """The checks that one waiting request makes; the breakers see to it that few are made in all."""

    def __init__(
        self,
        reactor: Reactor,
        pool: ConnectionPool,
        endpoints: EndpointSet,
        head_writer: HeadWriter,
        paths: tuple[str, ...],
        *,
        timeout_seconds: float,
    ) -> None:
        self._reactor = reactor
        self._pool = pool
        self._endpoints = endpoints
        self._head_writer = head_writer
        self._paths = paths
        self._timeout_seconds = timeout_seconds
        self._running: list[HealthCheck] = []

    def ask(self) -> None:
        """Check each endpoint whose breaker is open and lets this caller be the one to check."""
        for endpoint in self._endpoints.endpoints:
            breaker = endpoint.breaker
            if self._paths and breaker is not None and breaker.claim_health_check():
                check = HealthCheck(
                    self._reactor,
                    self._pool,
                    endpoint.url,
                    self._head_writer,
                    self._paths,
                    timeout_seconds=self._timeout_seconds,
                    on_healthy=breaker.health_check_passed,
                )
                self._running = [check, *(other for other in self._running if other.is_running)]
                check.start()

    def cancel(self) -> None:
        """Let go of the checks under way."""
        for check in self._running:
            check.cancel()

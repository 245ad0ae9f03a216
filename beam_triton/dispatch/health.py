"""Asking a server whether it is ready again, while its circuit breaker is open."""

from __future__ import annotations

import time
from collections.abc import Callable

from beam_triton.dispatch.attempt import Attempt
from beam_triton.dispatch.call_context import CallContext
from beam_triton.dispatch.request import HttpRequest
from beam_triton.errors import TritonError
from beam_triton.transport.origin import EndpointUrl

# A server that takes longer to say that it is ready is not ready.
_LONGEST_CHECK_SECONDS = 5.0
_MAX_ANSWER_BYTES = 1_048_576


class HealthCheck:
    """Asks for the health paths one after the other; calls ``on_healthy`` when all of them answered 200."""

    def __init__(self, context: CallContext, url: EndpointUrl, on_healthy: Callable[[], None]) -> None:
        self._context = context
        self._url = url
        self._left = list(context.options.health_paths)
        self._timeout_seconds = min(context.options.timeout_seconds, _LONGEST_CHECK_SECONDS)
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
            parts = self._context.head_writer.parts(self._url, HttpRequest("GET", self._left.pop(0)))
        except TritonError:
            # A secret that cannot be read: the request that waits for this check will say so.
            return
        self._attempt = attempt = Attempt(
            self._context.reactor,
            self._context.pool,
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
    """The checks that one waiting request makes; the breakers see to it that few are made in all."""

    def __init__(self, context: CallContext) -> None:
        self._context = context
        self._running: list[HealthCheck] = []

    def ask(self) -> None:
        """Check each endpoint whose breaker is open and lets this caller be the one to check."""
        if not self._context.options.health_paths:
            return
        for endpoint in self._context.endpoints.endpoints:
            breaker = endpoint.breaker
            if breaker is not None and breaker.claim_health_check():
                check = HealthCheck(self._context, endpoint.url, breaker.health_check_passed)
                self._running = [check, *(other for other in self._running if other.is_running)]
                check.start()

    def cancel(self) -> None:
        """Let go of the checks under way."""
        for check in self._running:
            check.cancel()

"""Asking a server whether it is ready again, while its circuit breaker is open."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

from beam_triton.dispatch.call_options import CallOptions
from beam_triton.dispatch.endpoints import Endpoint, EndpointSet
from beam_triton.dispatch.request import HeadWriter, HttpRequest
from beam_triton.errors import TritonError
from beam_triton.policy.circuit_breaker import CircuitBreaker
from beam_triton.transport.blocking import exchange_within
from beam_triton.transport.exchange import Buffer
from beam_triton.transport.pool import ConnectionPool

# A server that takes longer to say that it is ready is not ready.
_LONGEST_CHECK_SECONDS = 5.0
_MAX_ANSWER_BYTES = 1_048_576


class HealthWatch:
    """Makes the checks; the breakers see to it that a process makes few in all.

    Each runs on a thread of its own, which ends with it: the request that caused it may be over long before
    the server has answered, where others are well or requests fail at once.
    """

    def __init__(
        self, pool: ConnectionPool, endpoints: EndpointSet, head_writer: HeadWriter, options: CallOptions
    ) -> None:
        self._pool = pool
        self._endpoints = endpoints
        self._head_writer = head_writer
        self._paths = options.health_paths
        self._timeout_seconds = min(options.timeout_seconds, _LONGEST_CHECK_SECONDS)

    def ask(self) -> None:
        """Check each endpoint whose breaker is open and lets this caller be the one to check."""
        for endpoint in self._endpoints.endpoints:
            breaker = endpoint.breaker
            if breaker is not None and self._paths and breaker.claim_health_check():
                self._check(endpoint, breaker)

    def _check(self, endpoint: Endpoint, breaker: CircuitBreaker) -> None:
        # A secret that cannot be read, or no thread: who waits for the check will say so, or ask again.
        with contextlib.suppress(TritonError, RuntimeError):
            requests = [
                self._head_writer.parts(endpoint.url, HttpRequest("GET", path)) for path in self._paths
            ]
            threading.Thread(
                target=self._run, args=(endpoint, breaker, requests), name="beam_triton-health", daemon=True
            ).start()

    def _run(self, endpoint: Endpoint, breaker: CircuitBreaker, requests: Sequence[Sequence[Buffer]]) -> None:
        for parts in requests:
            try:
                exchange = exchange_within(
                    self._pool,
                    endpoint.url.origin,
                    parts,
                    timeout_seconds=self._timeout_seconds,
                    max_response_bytes=_MAX_ANSWER_BYTES,
                )
            except TritonError:
                return
            if exchange.head is None or exchange.head.status != 200:
                return
        breaker.health_check_passed()

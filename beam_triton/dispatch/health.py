"""Asking a server whether it is ready again, while its circuit breaker is open.

A check runs on a thread of its own, which ends with it: the request that caused it may be over long before
the server has answered, where others are well or requests fail at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

from beam_triton.dispatch.call_context import CallContext
from beam_triton.dispatch.request_head import HttpRequest
from beam_triton.errors import TritonError
from beam_triton.policy.circuit_breaker import CircuitBreaker
from beam_triton.transport.blocking import exchange_within
from beam_triton.transport.exchange import Buffer
from beam_triton.transport.origin import Origin
from beam_triton.transport.pool import ConnectionPool

# A server that takes longer to say that it is ready is not ready.
_LONGEST_CHECK_SECONDS = 5.0
_MAX_ANSWER_BYTES = 1_048_576


def start_health_checks(context: CallContext) -> None:
    """Check each endpoint whose breaker is open and lets this caller be the one to check.

    The breakers see to it that a process makes few checks in all.
    """
    paths = context.options.health_paths
    timeout_seconds = min(context.options.timeout_seconds, _LONGEST_CHECK_SECONDS)
    for endpoint in context.endpoints.endpoints:
        breaker = endpoint.breaker
        if breaker is None or not paths or not breaker.claim_health_check():
            continue
        # A secret that cannot be read, or no thread: who waits for the check will say so, or ask again.
        with contextlib.suppress(TritonError, RuntimeError):
            requests = [context.head_writer.parts(endpoint.url, HttpRequest("GET", path)) for path in paths]
            threading.Thread(
                target=_check,
                args=(context.pool, endpoint.url.origin, requests, timeout_seconds, breaker),
                name="beam_triton-health",
                daemon=True,
            ).start()


def _check(
    pool: ConnectionPool,
    origin: Origin,
    requests: Sequence[Sequence[Buffer]],
    timeout_seconds: float,
    breaker: CircuitBreaker,
) -> None:
    for parts in requests:
        try:
            exchange = exchange_within(
                pool,
                origin,
                parts,
                timeout_seconds=timeout_seconds,
                max_response_bytes=_MAX_ANSWER_BYTES,
            )
        except TritonError:
            return
        if exchange.head is None or exchange.head.status != 200:
            return
    breaker.health_check_passed()

"""Checking whether a server is ready again, while its circuit breaker is open.

A check runs on a thread of its own, which ends with it: the request that caused it may be over long before
the server has answered, where other endpoints are healthy or requests fail at once.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Sequence
from functools import partial

from beam_triton.dispatch.channel import CallContext
from beam_triton.dispatch.endpoints import Endpoint
from beam_triton.dispatch.request_head import HttpRequest
from beam_triton.errors import TritonError
from beam_triton.policy.retry import resend
from beam_triton.transport.attempt import exchange_within
from beam_triton.transport.exchange import Buffer
from beam_triton.transport.pool import ConnectionPool

# A server that takes longer to answer that it is ready is not ready.
_MAX_CHECK_SECONDS = 5.0
_MAX_ANSWER_BYTES = 1_048_576


def start_health_checks(context: CallContext) -> None:
    """Check each endpoint whose breaker is open and lets this caller be the one to check.

    The breakers keep the checks of a process few.
    """
    options = context.options
    timeout_seconds = min(options.timeout_seconds, _MAX_CHECK_SECONDS)
    for endpoint in context.endpoints.endpoints:
        breaker = endpoint.breaker
        if breaker is None or not options.health_paths or not breaker.claim_health_check():
            continue
        # A secret that cannot be read, or no thread: the request that waits for the check reports it, or the
        # next check succeeds.
        with contextlib.suppress(TritonError, RuntimeError):
            requests = [
                context.head_writer.parts(endpoint.url, HttpRequest("GET", path))
                for path in options.health_paths
            ]
            threading.Thread(
                target=_check,
                args=(context.pool, endpoint, requests, timeout_seconds),
                name="beam_triton-health",
                daemon=True,
            ).start()


def _check(
    pool: ConnectionPool, endpoint: Endpoint, requests: Sequence[Sequence[Buffer]], timeout_seconds: float
) -> None:
    for parts in requests:
        ask = partial(
            exchange_within,
            pool,
            endpoint.url.origin,
            parts,
            timeout_seconds=timeout_seconds,
            max_response_bytes=_MAX_ANSWER_BYTES,
        )
        try:
            exchange = resend(ask, random.random)
        except TritonError:
            return
        if exchange.head is None or exchange.head.status != 200:
            return
    assert endpoint.breaker is not None
    endpoint.checked_at = time.monotonic()
    endpoint.breaker.health_check_passed()

"""Checking whether a server is ready again, while its circuit breaker is open.

A check runs on a thread of its own, which ends with it: the request that caused it may be over long before
the server has answered, where other endpoints are healthy or requests fail at once.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from functools import partial

from beam_triton.dispatch.channel import CallContext, CallOptions
from beam_triton.dispatch.endpoints import Endpoint
from beam_triton.dispatch.request_head import HeadWriter, HttpRequest
from beam_triton.errors import TritonError
from beam_triton.policy.retry import resend
from beam_triton.transport.attempt import exchange_within
from beam_triton.transport.pool import ConnectionPool
from beam_triton.transport.redirects import MAX_REDIRECTS, Redirect, redirected

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
            # Secrets are read on this thread, as for requests; the other one finds them fresh.
            for path in options.health_paths:
                context.head_writer.parts(endpoint.url, HttpRequest("GET", path))
            threading.Thread(
                target=_check,
                args=(context.pool, context.head_writer, options, endpoint, timeout_seconds),
                name="beam_triton-health",
                daemon=True,
            ).start()


def _check(
    pool: ConnectionPool,
    head_writer: HeadWriter,
    options: CallOptions,
    endpoint: Endpoint,
    timeout_seconds: float,
) -> None:
    for path in options.health_paths:
        try:
            status = _status(pool, head_writer, options, Redirect(endpoint.url, path), timeout_seconds)
        except TritonError:
            return
        if status != 200:
            return
    assert endpoint.breaker is not None
    endpoint.checked_at = time.monotonic()
    endpoint.breaker.health_check_passed()


def _status(
    pool: ConnectionPool,
    head_writer: HeadWriter,
    options: CallOptions,
    target: Redirect,
    timeout_seconds: float,
) -> int:
    """The status that a GET is answered with, redirects followed."""
    status = 0
    for _ in range(MAX_REDIRECTS + 1):
        ask = partial(
            exchange_within,
            pool,
            target.url.origin,
            head_writer.parts(target.url, HttpRequest("GET", target.path)),
            timeout_seconds=timeout_seconds,
            max_response_bytes=_MAX_ANSWER_BYTES,
        )
        head = resend(ask, random.random).head
        assert head is not None
        status = head.status
        step = redirected(*target, "GET", status, head.get("location"), head_writer.given_host())
        if isinstance(step, str):
            break
        target = step._replace(url=options.network.routed(step.url))
    return status

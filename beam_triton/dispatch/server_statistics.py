"""Asking a Triton for its statistics of the model, which tell the concurrency limit of the server's queue.

A question runs on a thread of its own, as a health check does. There are few: only while several requests are
in flight, and as many as the limit admits; at most one a second. A server that has no statistics is asked
once.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Sequence
from typing import Any

from beam_triton.dispatch.channel import CallContext
from beam_triton.dispatch.endpoints import Endpoint
from beam_triton.dispatch.request_head import HttpRequest
from beam_triton.errors import TritonError
from beam_triton.policy.server_times import ServerCounts
from beam_triton.transport.attempt import exchange_within
from beam_triton.transport.exchange import Buffer
from beam_triton.transport.pool import ConnectionPool

_TIMEOUT_SECONDS = 5.0
_MAX_ANSWER_BYTES = 1 << 20


def ask_for_statistics(context: CallContext, endpoint: Endpoint, now: float) -> None:
    """Ask ``endpoint``, which has just answered a request."""
    path = context.options.statistics_path
    if not path:
        endpoint.statistics.cannot_be_asked()
        return
    endpoint.statistics.ask(now, endpoint.limit.usual_latency_seconds or 0.0)
    # A secret that cannot be read, or no thread: the next request reports it, or the next question succeeds.
    with contextlib.suppress(TritonError, RuntimeError):
        parts = context.head_writer.parts(endpoint.url, HttpRequest("GET", path))
        threading.Thread(
            target=_ask, args=(context.pool, endpoint, parts), name="beam_triton-statistics", daemon=True
        ).start()


def _ask(pool: ConnectionPool, endpoint: Endpoint, parts: Sequence[Buffer]) -> None:
    try:
        exchange = exchange_within(
            pool,
            endpoint.url.origin,
            parts,
            timeout_seconds=_TIMEOUT_SECONDS,
            max_response_bytes=_MAX_ANSWER_BYTES,
        )
    except TritonError:
        return
    assert exchange.head is not None
    if exchange.head.status in (429, 500, 502, 503, 504):
        return
    try:
        counts = _read(bytes(exchange.body))
    except (ValueError, LookupError, TypeError, AttributeError):
        # Another kind of server, or one that does not allow the question.
        endpoint.statistics.cannot_be_asked()
        return
    times = endpoint.statistics.add(counts)
    if times is not None:
        endpoint.limit.on_server_times(times, endpoint.statistics.valid_seconds)


def _read(body: bytes) -> ServerCounts:
    """The counts of all versions. Of anything else, ValueError, LookupError, TypeError or AttributeError."""
    counts = [_of_version(each) for each in json.loads(body)["model_stats"]]
    return ServerCounts(*(sum(column) for column in zip(*counts, strict=True)))


def _of_version(statistics: dict[str, Any]) -> ServerCounts:
    inference = statistics["inference_stats"]
    return ServerCounts(
        inference["success"]["count"],
        statistics["execution_count"],
        inference["success"]["ns"],
        inference["queue"]["ns"],
        sum(inference[f"compute_{step}"]["ns"] for step in ("input", "infer", "output")),
    )

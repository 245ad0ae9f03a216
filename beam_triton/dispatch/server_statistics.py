"""Asking a Triton for its statistics of the model, which tell the concurrency limit of the server's queue.

A question runs on a thread of its own, as a health check does. There are few: only while several requests are
in flight, and as many as the limit admits; at most one a second. A server that has no statistics is asked
once.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

from beam_triton.dispatch.channel import CallContext
from beam_triton.dispatch.endpoints import Endpoint
from beam_triton.dispatch.request_head import HttpRequest
from beam_triton.errors import TritonError
from beam_triton.policy.server_times import Executions, ServerCounts, figures_of
from beam_triton.transport.attempt import exchange_within
from beam_triton.transport.exchange import Buffer

_TIMEOUT_SECONDS = 5.0
_MAX_ANSWER_BYTES = 1 << 20


def ask_for_statistics(context: CallContext, endpoint: Endpoint, now: float) -> None:
    """Ask ``endpoint``, which has just answered a request."""
    path = context.options.statistics_path
    if not path:
        _is_silent(context, endpoint)
        return
    endpoint.statistics.ask(now, endpoint.limit.usual_latency_seconds or 0.0)
    # A secret that cannot be read, or no thread: the next request reports it, or the next question succeeds.
    with contextlib.suppress(TritonError, RuntimeError):
        parts = context.head_writer.parts(endpoint.url, HttpRequest("GET", path))
        threading.Thread(
            target=_ask,
            args=(context, endpoint, parts),
            name="beam_triton-statistics",
            daemon=True,
        ).start()


def _ask(context: CallContext, endpoint: Endpoint, parts: Sequence[Buffer]) -> None:
    asked_at = time.monotonic()
    try:
        exchange = exchange_within(
            context.pool,
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
        versions = json.loads(bytes(exchange.body))["model_stats"]
        counts, executions = counts_of(versions), _executions(versions)
        counts = counts._replace(at=time.monotonic(), own=endpoint.answers)
    except (ValueError, LookupError, TypeError, AttributeError):
        # Another kind of server, or one that does not allow the question.
        _is_silent(context, endpoint)
        return
    if endpoint.background is not None:
        endpoint.background.on_counts(
            counts,
            executions,
            instances=context.options.instances,
            in_flight=endpoint.in_flight,
            question_seconds=time.monotonic() - asked_at,
        )
        context.endpoints.give_way()
    times = endpoint.statistics.add(counts)
    if endpoint.statistics.difference is not None:
        context.endpoints.totals.add(figures_of(endpoint.statistics.difference, context.options.instances))
    if times is not None:
        endpoint.limit.on_server_times(times, endpoint.statistics.valid_seconds)


def _is_silent(context: CallContext, endpoint: Endpoint) -> None:
    endpoint.statistics.cannot_be_asked()
    if endpoint.background is not None:
        endpoint.background.cannot_be_steered()
        context.endpoints.give_way()


def counts_of(versions: list[Any]) -> ServerCounts:
    """The counts of all versions together, ``model_stats`` of a Triton's answer, but for ``at`` and ``own``.

    Of anything else, ValueError, LookupError, TypeError or AttributeError.
    """
    counts = [_of_version(each) for each in versions]
    return ServerCounts(*(sum(column) for column in zip(*counts, strict=True)))


def _of_version(statistics: dict[str, Any]) -> ServerCounts:
    inference = statistics["inference_stats"]
    return ServerCounts(
        inference["success"]["count"],
        statistics["execution_count"],
        inference["success"]["ns"],
        inference["queue"]["ns"],
        _compute_ns(inference),
        # By request, the times of an execution that several share would count several times.
        busy_ns=sum(map(_compute_ns, statistics.get("batch_stats") or ())),
        elements=statistics.get("inference_count", 0),
    )


def _executions(versions: list[Any]) -> dict[int, Executions]:
    """Those of all versions by the size of their batches; raises as `counts_of`."""
    found: dict[int, Executions] = {}
    for statistics in versions:
        for each in statistics.get("batch_stats") or ():
            size, count = int(each["batch_size"]), int(each["compute_infer"]["count"])
            known = found.get(size, Executions(0, 0))
            found[size] = Executions(known.number + count, known.busy_ns + _compute_ns(each))
    return found


def _compute_ns(times: dict[str, Any]) -> int:
    return sum(times[f"compute_{step}"]["ns"] for step in ("input", "infer", "output"))

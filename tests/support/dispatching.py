"""Requests through the library's dispatcher, with answers that are plain bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from beam_triton.dispatch.call import Call
from beam_triton.dispatch.channel import CallOptions, Channel
from beam_triton.dispatch.dispatcher import Dispatcher
from beam_triton.dispatch.endpoints import EndpointSetKey
from beam_triton.dispatch.request_head import HttpRequest
from beam_triton.policy.circuit_breaker import CircuitBreakerPolicy
from beam_triton.policy.retry import CERTAIN, RetryPolicy
from beam_triton.protocol import error_from_response
from beam_triton.transport.config import ConnectionPoolConfig, TlsConfig
from beam_triton.transport.exchange import Exchange
from beam_triton.transport.origin import EndpointUrl

NO_RETRIES = RetryPolicy(max_retries=0)
QUICK_RETRIES = RetryPolicy(initial_backoff_seconds=0.01, max_backoff_seconds=0.05)


def read(exchange: Exchange) -> bytes:
    """The body of a 200; raises the library's own error for any other status."""
    assert exchange.head is not None
    if exchange.head.status != 200:
        raise error_from_response(
            exchange.head.status, exchange.body, retry_after=exchange.head.get("retry-after")
        )
    return bytes(exchange.body)


def open_channel(
    endpoints: str | Iterable[str],
    *,
    timeout_seconds: float = 5.0,
    max_concurrent_requests: int = 4,
    retry: RetryPolicy = NO_RETRIES,
    circuit_breaker: CircuitBreakerPolicy | None = None,
    pool: Mapping[str, Any] | None = None,
    headers: Callable[[], Mapping[str, str]] = dict,
    max_response_bytes: int = 1 << 20,
    slot_bytes: int = 1 << 20,
    discovery_seconds: float | None = None,
    politeness: str | None = None,
    statistics_path: str = "",
) -> Channel:
    urls = [endpoints] if isinstance(endpoints, str) else list(endpoints)
    return Channel(
        EndpointSetKey(
            tuple(EndpointUrl.parse(url) for url in urls),
            "model",
            max_concurrent_requests,
            timeout_seconds,
            retry,
            circuit_breaker,
            discovery_seconds,
            politeness=politeness,
        ),
        ConnectionPoolConfig.from_options(pool),
        TlsConfig(),
        CallOptions(
            timeout_seconds=timeout_seconds,
            max_response_bytes=max_response_bytes,
            slot_bytes=slot_bytes,
            health_paths=("/v2/health/ready", "/v2/models/model/ready"),
            statistics_path=statistics_path,
        ),
        headers,
    )


def post(body: bytes = b"body") -> HttpRequest:
    return HttpRequest("POST", "/v2/models/model/infer", (), (body,), len(body))


def ask(
    channel: Channel,
    request: HttpRequest | None = None,
    *,
    is_batch: bool = False,
    is_sequence: bool = False,
    suspicion: int = CERTAIN,
    reads: Callable[[Exchange], Any] = read,
) -> Call:
    """Make one call on this thread and wait for its end."""
    dispatcher: Dispatcher[None] = Dispatcher(channel)
    try:
        dispatcher.submit(
            None,
            request or post(),
            reads,
            is_batch=is_batch,
            is_sequence=is_sequence,
            suspicion=suspicion,
        )
        dispatcher.drain()
        ((_, call),) = dispatcher.completed
        return call
    finally:
        dispatcher.cancel()


def free_slots(channel: Channel) -> int:
    """The number of free slots: takes all of them and gives them back."""
    taken = 0
    while channel.endpoints.slots.try_take(1):
        taken += 1
    channel.endpoints.slots.release(taken)
    return taken

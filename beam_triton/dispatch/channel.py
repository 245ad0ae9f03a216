"""What all users of one configuration share in a process, held by reference counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from beam_triton.dispatch.call_options import CallOptions
from beam_triton.dispatch.endpoints import EndpointSet
from beam_triton.dispatch.request_head import HeadWriter
from beam_triton.policy.circuit_breaker import CircuitBreakerPolicy
from beam_triton.policy.retry import RetryPolicy
from beam_triton.transport.config import ConnectionPoolConfig, TlsConfig
from beam_triton.transport.origin import EndpointUrl
from beam_triton.transport.pool import ConnectionPool
from beam_triton.transport.reference_counts import SharedObjects
from beam_triton.transport.session import acquire_session, session_pool


class EndpointSetKey(NamedTuple):
    """Who agrees on these shares breakers, limits, budgets and slots."""

    urls: tuple[EndpointUrl, ...]
    model_name: str
    max_concurrent_requests: int
    retry: RetryPolicy
    circuit_breaker: CircuitBreakerPolicy | None


ENDPOINT_SETS: SharedObjects[EndpointSetKey, EndpointSet] = SharedObjects(
    "endpoint state",
    lambda key: EndpointSet(key.urls, key.max_concurrent_requests, key.retry, key.circuit_breaker),
    lambda endpoints: None,
)


class Channel:
    """References to the shared session and endpoint state, and what all calls over them have in common.

    Args:
        key: whom the endpoint state is shared with.
        pool, tls: whom the session is shared with.
        options: of every call made here.
        headers: gives the user's own header fields, credentials resolved.
    """

    def __init__(
        self,
        key: EndpointSetKey,
        pool: ConnectionPoolConfig,
        tls: TlsConfig,
        options: CallOptions,
        headers: Callable[[], Mapping[str, str]],
    ) -> None:
        self._session_lease = acquire_session(pool, tls)
        self._endpoints_lease = ENDPOINT_SETS.acquire(key)
        self.options = options
        self.head_writer = HeadWriter(headers, pool.reuse_enabled)

    @property
    def pool(self) -> ConnectionPool:
        return session_pool(self._session_lease.value)

    @property
    def endpoints(self) -> EndpointSet:
        return self._endpoints_lease.value

    def close(self) -> None:
        """Give both references back; the last user's ends the connections. Never raises twice."""
        self._endpoints_lease.release()
        self._session_lease.release()

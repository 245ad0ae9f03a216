"""What all users of one configuration share in a process, held by reference counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from beam_triton.auth.hook import Auth
from beam_triton.dispatch.endpoints import EndpointSet, EndpointSetKey
from beam_triton.dispatch.request_head import HeadWriter
from beam_triton.server.lease import ServerLease
from beam_triton.transport.config import DEFAULT_NETWORK, ConnectionPoolConfig, NetworkConfig, TlsConfig
from beam_triton.transport.pool import ConnectionPool
from beam_triton.transport.reactor import Reactor
from beam_triton.transport.reference_counts import SharedObjects
from beam_triton.transport.session import acquire_session, session_pool

ENDPOINT_SETS: SharedObjects[EndpointSetKey, EndpointSet] = SharedObjects(
    "endpoint state", EndpointSet, EndpointSet.close
)


@dataclass(frozen=True)
class CallOptions:
    """What all requests of one user have in common.

    A request takes a slot for each ``slot_bytes``, at least one: slots bound bytes as well as requests.
    The model is executed by ``instances`` at a time, 0 where that is not known. Answers are
    ``compressed_on_purpose`` where the user has asked for it.
    ``network`` chooses the proxies for redirects. ``tracing`` is as in `beam_triton.dispatch.tracing`.
    """

    timeout_seconds: float
    max_response_bytes: int
    slot_bytes: int
    health_paths: tuple[str, ...] = ()
    tracing: bool | None = None
    statistics_path: str = ""
    instances: int = 0
    compressed_on_purpose: bool = False
    network: NetworkConfig = DEFAULT_NETWORK


@dataclass(frozen=True)
class CallContext:
    """What the calls of one bundle have in common: shared objects, and the thread that drives the calls."""

    reactor: Reactor
    pool: ConnectionPool
    endpoints: EndpointSet
    head_writer: HeadWriter
    options: CallOptions


class Channel:
    """References to the shared session and endpoint state, and what all calls over them have in common.

    Args:
        key: users with an equal key share the endpoint state.
        pool, tls: users with equal ones, and an equal network of ``options``, share the session.
        options: of every call made here.
        headers: gives the user's own header fields, credentials resolved.
        auth: sees each attempt before it is sent.
        server_lease: of the server on this machine that the calls go to; released with the others.
    """

    def __init__(
        self,
        key: EndpointSetKey,
        pool: ConnectionPoolConfig,
        tls: TlsConfig,
        options: CallOptions,
        headers: Callable[[], Mapping[str, str]],
        auth: Auth | None = None,
        server_lease: ServerLease | None = None,
    ) -> None:
        self._server_lease = server_lease
        self._session_lease = acquire_session(pool, tls, options.network)
        self._endpoints_lease = ENDPOINT_SETS.acquire(key)
        self.options = options
        self.head_writer = HeadWriter(headers, pool.reuse_enabled, auth)

    @property
    def pool(self) -> ConnectionPool:
        return session_pool(self._session_lease.value)

    @property
    def endpoints(self) -> EndpointSet:
        return self._endpoints_lease.value

    def context(self, reactor: Reactor) -> CallContext:
        """The shared objects as they are in this process: a forked child has its own."""
        return CallContext(reactor, self.pool, self.endpoints, self.head_writer, self.options)

    def close(self) -> None:
        """Release the references; the last user's release closes the connections."""
        self._endpoints_lease.release()
        self._session_lease.release()
        if self._server_lease is not None:
            self._server_lease.release()

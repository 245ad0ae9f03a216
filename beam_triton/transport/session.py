"""The process's ``requests.Session`` objects, one for each pool and TLS configuration."""

from __future__ import annotations

import logging
from typing import NamedTuple, cast

import requests

from beam_triton.transport.adapter import PooledAdapter
from beam_triton.transport.config import ConnectionPoolConfig, TlsConfig
from beam_triton.transport.pool import ConnectionPool
from beam_triton.transport.reference_counts import Lease, SharedObjects


class SessionKey(NamedTuple):
    """What two users must agree on to share connections."""

    pool: ConnectionPoolConfig
    tls: TlsConfig


def _make_session(key: SessionKey) -> requests.Session:
    session = requests.Session()
    # Proxies, netrc and CA bundles out of the environment: 250 us a request, and a surprise on workers.
    session.trust_env = False
    session.headers.clear()
    # requests' default would have Triton gzip every answer, ten times slower.
    session.headers["Accept-Encoding"] = "identity"
    adapter = PooledAdapter(key.pool, key.tls)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


SESSIONS: SharedObjects[SessionKey, requests.Session] = SharedObjects(
    "session", _make_session, requests.Session.close, first_and_last_level=logging.INFO
)


def acquire_session(pool: ConnectionPoolConfig, tls: TlsConfig) -> Lease[requests.Session]:
    """A reference to the session of this configuration; the last release closes all its sockets."""
    return SESSIONS.acquire(SessionKey(pool, tls))


def session_pool(session: requests.Session) -> ConnectionPool:
    """The connection pool under a session of this registry."""
    return cast(PooledAdapter, session.get_adapter("http://")).pool

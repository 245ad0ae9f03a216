"""The shared ``requests.Session``: reference-counted, over a tuned ``HTTPAdapter`` that owns the connection
pool.

The library's brief asks for this session. It carries metadata, configuration and health. Inference takes its
connections from the same pool (`session_pool`) and speaks HTTP itself (`beam_triton.transport.exchange`),
because the header objects of requests and urllib3 cost four fifths of a small request (docs/performance.md).
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from requests.utils import select_proxy
from urllib3 import HTTPHeaderDict, HTTPResponse

from beam_triton.compression import decompress
from beam_triton.credentials import redact_url
from beam_triton.errors import ConfigurationError
from beam_triton.transport.attempt import exchange_within
from beam_triton.transport.config import DEFAULT_NETWORK, ConnectionPoolConfig, NetworkConfig, TlsConfig
from beam_triton.transport.connector import Connector
from beam_triton.transport.idle_eviction import IdleConnectionEvictor
from beam_triton.transport.origin import UNIX, EndpointUrl
from beam_triton.transport.pool import ConnectionPool
from beam_triton.transport.reference_counts import Lease, SharedObjects

_DEFAULT_TIMEOUT_SECONDS = 30.0
_MAX_CONTROL_RESPONSE_BYTES = 64 * 1024 * 1024


class SessionKey(NamedTuple):
    """Users that agree on these share a session."""

    pool: ConnectionPoolConfig
    tls: TlsConfig
    network: NetworkConfig = DEFAULT_NETWORK


class PooledAdapter(HTTPAdapter):
    """``HTTPAdapter`` over a `ConnectionPool`. It retries nothing.

    TLS and proxies come from ``tls`` and ``network``, not from arguments of a single request. A ``timeout``
    given to requests bounds the whole request, the larger of a ``(connect, read)`` pair. An answer is
    decompressed here, within the bound of its size; urllib3 knows no such bound.
    """

    def __init__(self, config: ConnectionPoolConfig, tls: TlsConfig, network: NetworkConfig) -> None:
        super().__init__(max_retries=0)
        self._network = network
        connector = Connector(tls, trust_env=network.trust_env)
        self.pool = ConnectionPool(config, connector.open, time.monotonic)
        self._evictor = IdleConnectionEvictor(self.pool, time.monotonic)
        self._evictor.start()

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: float | tuple[float | None, float | None] | None = None,
        verify: bool | str = True,
        cert: object = None,
        proxies: Mapping[str, str] | None = None,
    ) -> requests.Response:
        """Send a prepared request and read its whole answer.

        Raises:
            ConfigurationError: a proxy is given for this request alone.
            TransportError, RemoteProtocolError: this library's own errors, not those of requests; also for an
                answer in an unknown encoding, or one that decompresses beyond 64 MiB.
        """
        del stream, verify, cert
        assert request.url is not None and request.method is not None
        if select_proxy(request.url, proxies):
            raise ConfigurationError(
                f"{redact_url(request.url)}: this session takes no proxies for a single request; "
                f"give them as the option proxies"
            )
        parts = urlsplit(request.url)
        endpoint = self._network.routed(EndpointUrl.parse(f"{parts.scheme}://{parts.netloc}"))
        exchange = exchange_within(
            self.pool,
            endpoint.origin,
            _request_parts(request, endpoint),
            timeout_seconds=_total_seconds(timeout),
            max_response_bytes=_MAX_CONTROL_RESPONSE_BYTES,
            expects_body=request.method != "HEAD",
        )
        assert exchange.head is not None
        headers = HTTPHeaderDict()
        for name, value in exchange.head.fields:
            if name.lower() != "transfer-encoding":
                headers.add(name, value)
        raw_headers = headers.copy()
        content: bytes | bytearray | memoryview = exchange.body
        encoding = headers.get("content-encoding", "").strip().lower()
        if content and encoding not in ("", "identity"):
            content = decompress(content, encoding, max_bytes=_MAX_CONTROL_RESPONSE_BYTES)
            raw_headers.discard("content-encoding")
            raw_headers.discard("content-length")
        raw = HTTPResponse(
            body=io.BytesIO(content),
            headers=raw_headers,
            status=exchange.head.status,
            version=10 + exchange.head.http_minor,
            reason=exchange.head.reason,
            preload_content=False,
            request_method=request.method,
        )
        response = self.build_response(request, raw)
        response.headers = CaseInsensitiveDict(headers)
        return response

    def close(self) -> None:
        """Close every idle connection and end the background thread."""
        self._evictor.stop()
        self.pool.close()
        super().close()


def _request_parts(request: requests.PreparedRequest, endpoint: EndpointUrl) -> list[bytes]:
    body = request.body
    if body is None:
        content = b""
    elif isinstance(body, bytes | bytearray | memoryview):
        content = bytes(body)
    elif isinstance(body, str):
        content = body.encode("utf-8")
    elif isinstance(body, Iterable):
        content = b"".join(body)
    else:
        raise ConfigurationError(f"a request body of type {type(body).__name__} cannot be sent")
    host = request.headers.get("Host", endpoint.host_header)
    lines = [
        f"{request.method} {endpoint.request_target(request.path_url)} HTTP/1.1",
        f"Host: {host.decode('latin-1') if isinstance(host, bytes) else host}",
    ]
    if endpoint.proxy_authorization is not None:
        lines.append(f"Proxy-Authorization: {endpoint.proxy_authorization}")
    for name, value in request.headers.items():
        if name.lower() not in ("host", "content-length", "transfer-encoding"):
            text = value.decode("latin-1") if isinstance(value, bytes) else value
            lines.append(f"{name}: {text}")
    if content or request.method not in ("GET", "HEAD"):
        lines.append(f"Content-Length: {len(content)}")
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    return [head, content] if content else [head]


def _total_seconds(timeout: float | tuple[float | None, float | None] | None) -> float:
    given = timeout if isinstance(timeout, tuple) else (timeout,)
    return max((float(value) for value in given if value is not None), default=_DEFAULT_TIMEOUT_SECONDS)


def _make_session(key: SessionKey) -> requests.Session:
    session = requests.Session()
    # requests would look for proxies, netrc and CA bundles at every request, which takes 250 us; the adapter
    # knows what it needs of them.
    session.trust_env = False
    session.headers.clear()
    # requests' default would have Triton gzip every answer, ten times slower.
    session.headers["Accept-Encoding"] = "identity"
    adapter = PooledAdapter(*key)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    session.mount(f"{UNIX}://", adapter)
    return session


SESSIONS: SharedObjects[SessionKey, requests.Session] = SharedObjects(
    "session", _make_session, requests.Session.close, first_and_last_level=logging.INFO
)


def acquire_session(
    pool: ConnectionPoolConfig, tls: TlsConfig, network: NetworkConfig = DEFAULT_NETWORK
) -> Lease[requests.Session]:
    """A reference to the session that equal configurations share; the last release closes its sockets."""
    return SESSIONS.acquire(SessionKey(pool, tls, network))


def session_pool(session: requests.Session) -> ConnectionPool:
    """The connection pool under a session of this registry."""
    return cast(PooledAdapter, session.get_adapter("http://")).pool

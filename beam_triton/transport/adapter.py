"""The tuned ``HTTPAdapter``: a ``requests.Session`` whose requests travel on the shared pool.

Inference takes the pool directly (`PooledAdapter.pool`); whatever else is sent through the session
goes the ordinary way of requests, on the same connections and under the same limits and deadline.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from requests.utils import select_proxy
from urllib3 import HTTPHeaderDict, HTTPResponse

from beam_triton.compression import decompress
from beam_triton.credentials import redact_url
from beam_triton.errors import ConfigurationError
from beam_triton.transport.blocking import exchange_within
from beam_triton.transport.config import ConnectionPoolConfig, TlsConfig
from beam_triton.transport.connector import Connector
from beam_triton.transport.idle_eviction import IdleConnectionEvictor
from beam_triton.transport.origin import EndpointUrl
from beam_triton.transport.pool import ConnectionPool

_DEFAULT_TIMEOUT_SECONDS = 30.0
_MAX_CONTROL_RESPONSE_BYTES = 64 * 1024 * 1024


class PooledAdapter(HTTPAdapter):
    """``HTTPAdapter`` over a `ConnectionPool`. It retries nothing, and takes no proxies.

    TLS comes from ``tls``, not from ``verify`` and ``cert`` of a single request. A ``timeout`` given
    to requests bounds the whole request, the larger of a ``(connect, read)`` pair. An answer is inflated
    here, within the bound of its size, not by urllib3, which knows none.
    """

    def __init__(self, config: ConnectionPoolConfig, tls: TlsConfig) -> None:
        super().__init__(max_retries=0)
        self.pool = ConnectionPool(config, Connector(tls).open, time.monotonic)
        self._maintenance = IdleConnectionEvictor(self.pool, time.monotonic)
        self._maintenance.start()

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
            ConfigurationError: a proxy is given for the URL.
            TransportError, RemoteProtocolError: this library's own errors, not those of requests; also
                for an answer in an encoding that nobody asked for, or one that inflates beyond 64 MiB.
        """
        del stream, verify, cert
        assert request.url is not None and request.method is not None
        if select_proxy(request.url, proxies):
            raise ConfigurationError(
                f"{redact_url(request.url)}: connections of this session go to the server itself, not by "
                f"way of a proxy; leave proxies out, or give the address of a reverse proxy as the endpoint"
            )
        parts = urlsplit(request.url)
        endpoint = EndpointUrl.parse(f"{parts.scheme}://{parts.netloc}")
        exchange = exchange_within(
            self.pool,
            endpoint.origin,
            _request_parts(request, endpoint.host_header),
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
        self._maintenance.stop()
        self.pool.close()
        super().close()


def _request_parts(request: requests.PreparedRequest, host_header: str) -> list[bytes]:
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
    lines = [f"{request.method} {request.path_url} HTTP/1.1", f"Host: {host_header}"]
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

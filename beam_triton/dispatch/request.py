"""A request as bytes: the HTTP head in front of a body that somebody else has encoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from beam_triton.transport.exchange import Buffer
from beam_triton.transport.origin import EndpointUrl

# Secrets are looked up again after this time, so that a rotated token is taken up.
_HEADERS_FRESH_SECONDS = 1.0


class HttpRequest(NamedTuple):
    """Method, path below the endpoint's prefix, the body's own header fields, and the body."""

    method: str
    path: str
    body_headers: tuple[tuple[str, str], ...] = ()
    body: Sequence[Buffer] = ()
    content_length: int = 0


class HeadWriter:
    """Writes request heads. The part that does not change from one request to the next is kept.

    Args:
        headers: gives the user's own headers, credentials resolved; asked again after a second.
        keep_alive: ``False`` asks the server to close the connection after its answer.
    """

    def __init__(self, headers: Callable[[], Mapping[str, str]], keep_alive: bool) -> None:
        self._headers = headers
        self._keep_alive = keep_alive
        self._fixed: dict[tuple[EndpointUrl, str, str], bytes] = {}
        self._fresh_until = 0.0

    def parts(self, url: EndpointUrl, request: HttpRequest) -> list[Buffer]:
        """The whole request for ``url``, head first."""
        now = time.monotonic()
        if now >= self._fresh_until:
            self._fixed = {}
            self._fresh_until = now + _HEADERS_FRESH_SECONDS
        key = (url, request.method, request.path)
        fixed = self._fixed.get(key)
        if fixed is None:
            fixed = self._fixed[key] = self._fixed_part(url, request)
        if request.method == "GET":
            return [fixed + b"\r\n"]
        lines = "".join([f"{name}: {value}\r\n" for name, value in request.body_headers])
        head = fixed + f"{lines}Content-Length: {request.content_length}\r\n\r\n".encode("latin-1")
        return [head, *request.body]

    def _fixed_part(self, url: EndpointUrl, request: HttpRequest) -> bytes:
        lines = [
            f"{request.method} {url.path_prefix}{request.path} HTTP/1.1",
            f"Host: {url.host_header}",
            # Without it Triton would compress every answer, ten times slower.
            "Accept-Encoding: identity",
        ]
        if not self._keep_alive:
            lines.append("Connection: close")
        headers = dict(self._headers())
        if url.basic_authorization and "authorization" not in {name.lower() for name in headers}:
            headers["Authorization"] = url.basic_authorization
        for name, value in headers.items():
            if name.lower() == "accept-encoding":
                lines = [line for line in lines if not line.startswith("Accept-Encoding")]
            lines.append(f"{name}: {value}")
        return ("\r\n".join(lines) + "\r\n").encode("latin-1")

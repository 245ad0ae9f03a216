"""A request as bytes: the HTTP head in front of a body that somebody else has encoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from beam_triton.transport.exchange import Buffer
from beam_triton.transport.origin import EndpointUrl

# Secrets are looked up again after this time, so that a rotated token is taken up.
_HEADERS_FRESH_SECONDS = 1.0
# Bodies of as many kinds as there are sizes would each have a head of their own.
_MAX_KEPT_HEADS = 256


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
        self._kept: dict[tuple[EndpointUrl, str, str, tuple[tuple[str, str], ...]], bytes] = {}
        self._fresh_until = 0.0

    def parts(self, url: EndpointUrl, request: HttpRequest) -> list[Buffer]:
        """The whole request for ``url``, head first."""
        now = time.monotonic()
        if now >= self._fresh_until or len(self._kept) >= _MAX_KEPT_HEADS:
            self._kept = {}
            self._fresh_until = now + _HEADERS_FRESH_SECONDS
        key = (url, request.method, request.path, request.body_headers)
        head = self._kept.get(key)
        if head is None:
            head = self._kept[key] = self._head(url, request)
        if request.method == "GET":
            return [head + b"\r\n"]
        return [head + b"Content-Length: %d\r\n\r\n" % request.content_length, *request.body]

    def _head(self, url: EndpointUrl, request: HttpRequest) -> bytes:
        """All fields but the body's length."""
        lines = [
            f"{request.method} {url.path_prefix}{request.path} HTTP/1.1",
            f"Host: {url.host_header}",
            # Without it Triton would compress every answer, ten times slower.
            "Accept-Encoding: identity",
        ]
        if not self._keep_alive:
            lines.append("Connection: close")
        for name, value in url.authorize(self._headers()).items():
            if name.lower() == "accept-encoding":
                lines = [line for line in lines if not line.startswith("Accept-Encoding")]
            lines.append(f"{name}: {value}")
        lines += [f"{name}: {value}" for name, value in request.body_headers]
        return ("\r\n".join(lines) + "\r\n").encode("latin-1")

"""The HTTP head of a request: path, host and credentials, in front of a body that is encoded already."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from beam_triton.auth.hook import Auth, authorized, renew
from beam_triton.errors import ConfigurationError
from beam_triton.protocol.region_layout import RegionLayout
from beam_triton.transport.exchange import Buffer
from beam_triton.transport.origin import EndpointUrl
from beam_triton.transport.redirects import given_host_of

_logger = logging.getLogger(__name__)

HEADERS_GRACE_SECONDS = 10.0
"""How long the last good headers stay in use when secrets can no longer be read."""

JSON_HEADERS = (("Content-Type", "application/json"),)
"""The fields of a body that is all JSON."""

# Secrets are read again after this time, so that a rotated token is noticed.
_HEADERS_FRESH_SECONDS = 1.0
# Each kind of body has a head of its own.
_MAX_HEADS = 256


class HttpRequest(NamedTuple):
    """Method, path below the endpoint's prefix, the body's own header fields, and the body.

    ``request_id`` is what the body names as its ``id``, ``rows`` its batch size. ``trace_headers`` are this
    one request's own fields. ``layout`` says how the same request lies in shared memory, where it may.
    """

    method: str
    path: str
    body_headers: tuple[tuple[str, str], ...] = ()
    body: Sequence[Buffer] = ()
    content_length: int = 0
    request_id: str = ""
    rows: int = 1
    trace_headers: tuple[tuple[str, str], ...] = ()
    layout: RegionLayout | None = None


class _Reading(NamedTuple):
    values: Mapping[str, str]
    at: float
    has_failed_since: bool = False


# The library's own fields that the user's may replace.
_OWN_NAMES = {"accept-encoding": "Accept-Encoding", "host": "Host"}


class HeadWriter:
    """Writes request heads, and caches the part that does not change from one request to the next.

    Headers are read again after a second, at the next request. If that fails although it succeeded before,
    the last good ones stay in use for another `HEADERS_GRACE_SECONDS`: a file that is being rewritten is
    missing or empty for a moment, which no request should fail for.

    Args:
        headers: gives the user's own headers, credentials resolved.
        keep_alive: ``False`` asks the server to close the connection after its answer.
        auth: sees each attempt and may change its header fields, so nothing is cached where there is one.
    """

    def __init__(
        self, headers: Callable[[], Mapping[str, str]], keep_alive: bool, auth: Auth | None = None
    ) -> None:
        self._headers = headers
        self._keep_alive = keep_alive
        self._auth = auth
        self._heads: dict[tuple[EndpointUrl, str, str, tuple[tuple[str, str], ...]], bytes] = {}
        self._fresh_until = -math.inf
        self._has_warned = False
        # Replaced, never changed: the threads of a client share this object.
        self._read: _Reading | None = None

    def parts(self, url: EndpointUrl, request: HttpRequest) -> list[Buffer]:
        """The whole request for ``url``, head first.

        Raises:
            ConfigurationError: the headers cannot be read, and the grace period is over; or ``auth`` failed.
        """
        if self._auth is not None and url.may_have_credentials:
            return self._authorized_parts(self._auth, url, request)
        now = time.monotonic()
        if now >= self._fresh_until or len(self._heads) >= _MAX_HEADS:
            self._heads = {}
            self._fresh_until = now + _HEADERS_FRESH_SECONDS
        key = (url, request.method, request.path, request.body_headers)
        head = self._heads.get(key)
        if head is None:
            head = self._heads[key] = self._head(url, request)
        if request.trace_headers:
            head += _encoded_fields(request.trace_headers)
        if request.method == "GET":
            return [head + b"\r\n"]
        return [head + b"Content-Length: %d\r\n\r\n" % request.content_length, *request.body]

    def forget(self) -> None:
        """Drop the cached heads: the next request reads the headers again, and ``auth`` renews its token."""
        self._fresh_until = -math.inf
        if self._auth is not None:
            renew(self._auth)

    def is_outdated(self, url: EndpointUrl, request: HttpRequest, head: Buffer) -> bool:
        """Whether headers that are read now make another head than ``head``, the first of `parts`.

        A request that a server refused as not authorized may succeed once its secret has been rotated.
        Headers that differ at each reading are always outdated, so the caller bounds how often it asks. False
        if they cannot be read: the server's refusal is the better error then.
        """
        self.forget()
        try:
            return bytes(self.parts(url, request)[0]) != head
        except ConfigurationError:
            return False

    def given_host(self) -> str | None:
        """The ``Host`` header that the user gave."""
        return given_host_of(self._header_values())

    def _header_values(self) -> Mapping[str, str]:
        last = self._read
        try:
            values = self._headers()
        except ConfigurationError as error:
            if last is None or time.monotonic() >= last.at + HEADERS_GRACE_SECONDS:
                raise
            if not last.has_failed_since:
                _logger.warning(
                    "%s; the headers read before stay in use for up to %g s", error, HEADERS_GRACE_SECONDS
                )
                self._read = last._replace(has_failed_since=True)
            return last.values
        self._read = _Reading(values, time.monotonic())
        return values

    def _authorized_parts(self, auth: Auth, url: EndpointUrl, request: HttpRequest) -> list[Buffer]:
        method, target, fields = self._translated(url, request)
        fields.update(request.trace_headers)
        if method != "GET":
            fields["Content-Length"] = str(request.content_length)
        seen = authorized(auth, method, url.base_url, target, fields, request.body)
        sent = dict(seen.headers)
        if url.proxy_authorization is not None:
            sent["Proxy-Authorization"] = url.proxy_authorization
        return [_encoded(method, url.request_target(seen.target), sent) + b"\r\n", *request.body]

    def _head(self, url: EndpointUrl, request: HttpRequest) -> bytes:
        """All fields but the body's length."""
        method, target, fields = self._translated(url, request)
        if request.method == "GET" and method != "GET":
            fields["Content-Length"] = "0"
        if url.proxy_authorization is not None:
            fields["Proxy-Authorization"] = url.proxy_authorization
        return _encoded(method, url.request_target(target), fields)

    def _translated(self, url: EndpointUrl, request: HttpRequest) -> tuple[str, str, dict[str, str]]:
        """Method, target and header fields."""
        method, target, own = url.translate(request.method, request.path, request.body_headers)
        # Triton would compress every answer if it might, which is ten times slower.
        fields = {"Host": url.host_header, "Accept-Encoding": "identity"}
        if not self._keep_alive:
            fields["Connection"] = "close"
        for name, value in url.authorize(self._header_values()).items():
            if name.lower() == "host" and url.origin.forwarding_proxy and not self._has_warned:
                self._has_warned = True
                _logger.warning(
                    "%s: a proxy that forwards plain requests replaces their Host header, so the one given "
                    "in headers is lost; reach this server by https, or without the proxy (NO_PROXY)",
                    url,
                )
            fields[_OWN_NAMES.get(name.lower(), name)] = value
        fields.update(own)
        return method, target, fields


def _encoded(method: str, target: str, fields: Mapping[str, str]) -> bytes:
    return f"{method} {target} HTTP/1.1\r\n".encode("latin-1") + _encoded_fields(fields.items())


def _encoded_fields(fields: Iterable[tuple[str, str]]) -> bytes:
    return "".join([f"{name}: {value}\r\n" for name, value in fields]).encode("latin-1")

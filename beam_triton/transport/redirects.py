"""Redirects, as ingresses answer them: where a request goes next, and what it takes along.

A request with a body keeps it, and its method, for 307 and 308 alone; 301 to 303 make a GET of it (RFC 9110,
section 15.4). What users put into headers may be a secret, so no other host gets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from beam_triton.errors import ConfigurationError
from beam_triton.transport.origin import UNIX, EndpointUrl, Origin

MAX_REDIRECTS = 5
"""How many redirects in a row are followed."""

_WITH_BODY = frozenset({307, 308})
_WITHOUT_BODY = _WITH_BODY | {301, 302, 303}
_STANDARD_PORTS = {("http", 80), ("https", 443)}
_SAFE_IN_TARGET = "%/:=&?~+!$,;'@()*[]"


class Redirect(NamedTuple):
    """Where to send the request again: ``path`` begins after the prefix of ``url``, which is empty."""

    url: EndpointUrl
    path: str


def given_host_of(headers: Mapping[str, str]) -> str | None:
    """The ``Host`` header that the user gave."""
    return next((value for name, value in headers.items() if name.lower() == "host"), None)


def redirected(
    url: EndpointUrl, path: str, method: str, status: int, location: str | None, given_host: str | None
) -> Redirect | str:
    """What follows from an answer to ``method`` at ``path`` of ``url``: a redirect, or why there is none.

    The reason is empty where the answer is no redirect that the method follows, or comes from a door.
    ``given_host`` is the ``Host`` header that the user gave: a redirect to that name stays at the same
    server, as the name may be in no DNS.
    """
    if url.door is not None:
        return ""
    if status not in (_WITHOUT_BODY if method in ("GET", "HEAD") else _WITH_BODY) or not location:
        return ""
    origin = url.origin
    authority = "http://localhost" if origin.scheme == UNIX else f"{origin.scheme}://{url.host_header}"
    base = f"{authority}{url.path_prefix}{path}"
    try:
        parts = urlsplit(urljoin(base, location))
        asked = EndpointUrl.parse(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}").origin
    except (ConfigurationError, ValueError):
        return "its address is no http or https URL"
    if asked.scheme == UNIX or (origin.scheme == UNIX and asked != Origin("http", "localhost", 80)):
        return "a unix socket and a host do not redirect to each other"
    if origin.scheme == "https" and asked.scheme == "http":
        return "it leads from https to http, where everybody on the way can read the request"
    target = quote(parts.path or "/", safe=_SAFE_IN_TARGET)
    if parts.query:
        target += f"?{quote(parts.query, safe=_SAFE_IN_TARGET)}"
    is_alias = _names(given_host, asked, origin)
    if origin.scheme == UNIX:
        asked = origin
    elif is_alias or asked.host == origin.host:
        has_port = urlsplit(f"//{parts.netloc}").port is not None
        port = asked.port if has_port or asked.scheme != origin.scheme else origin.port
        asked = origin._replace(scheme=asked.scheme, port=port if is_alias else asked.port, proxy=None)
    next_url = url._replace(origin=asked, path_prefix="")
    if not _may_have_credentials(origin, asked):
        kept = ("accept-encoding", "host") if is_alias else ("accept-encoding",)
        next_url = next_url._replace(basic_authorization=None, only_headers=kept)
    return Redirect(next_url, target)


def _names(given_host: str | None, asked: Origin, origin: Origin) -> bool:
    if not given_host or asked.host == origin.host:
        return False
    return urlsplit(f"//{given_host}").hostname == asked.host


def _may_have_credentials(origin: Origin, asked: Origin) -> bool:
    """The rule of requests: the same host, scheme and port, or the step from http to https."""
    if origin.host != asked.host:
        return False
    if (origin.scheme, origin.port) == (asked.scheme, asked.port):
        return True
    return {(origin.scheme, origin.port), (asked.scheme, asked.port)} == _STANDARD_PORTS

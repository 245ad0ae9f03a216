"""Where requests go: an endpoint URL, parsed once.

An *origin* is scheme, host and port, the unit that connections are pooled by (Flink's proposal and
OkHttp call it a *route*). A path in front of ``/v2``, as gateways use it, is part of the endpoint but not of
the origin.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from beam_triton.credentials import basic_authorization, redact_url
from beam_triton.doors import Door, Translated, door_at
from beam_triton.errors import ConfigurationError
from beam_triton.transport.proxies import Proxy

_DEFAULT_PORTS = {"http": 80, "https": 443}
UNIX = "http+unix"
"""The scheme of HTTP on a unix socket, whose path stands percent-encoded in place of the host."""


class Origin(NamedTuple):
    """Scheme, host and port; and how to get there: one of the host's addresses, or a proxy.

    Requests and certificates are for the host all the same. With the scheme `UNIX`, ``host`` is the path of a
    socket, and the port is 0.
    """

    scheme: str
    host: str
    port: int
    address: str | None = None
    proxy: Proxy | None = None

    @property
    def url(self) -> str:
        if self.scheme == UNIX:
            return f"{UNIX}://{quote(self.host, safe='')}"
        # RFC 6874: the percent sign before an IPv6 zone is encoded.
        host = f"[{self.host.replace('%', '%25')}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def way(self) -> str:
        """How to get there, for people: in front of it a space, and empty if there is nothing to say."""
        if self.proxy is not None:
            return f" (through the proxy {self.proxy})"
        return "" if self.address is None else f" ({self.address})"

    @property
    def forwarding_proxy(self) -> Proxy | None:
        """The proxy that reads requests and answers, and gives answers of its own; None for a tunnel."""
        return self.proxy if self.scheme == "http" else None

    def __str__(self) -> str:
        return f"{self.url}{self.way}"


class EndpointUrl(NamedTuple):
    """One server of the Open Inference Protocol.

    ``path_prefix`` comes before ``/v2`` and has no slash at its end. ``basic_authorization`` is the
    ``Authorization`` header made of the URL's user name and password; it is left out of ``repr``.
    ``only_headers`` are those of the user's headers that it may get, in lower case; None for all. Behind a
    ``door`` the protocol's paths are not below the prefix, which is the door's whole path then.
    """

    origin: Origin
    path_prefix: str = ""
    basic_authorization: str | None = None
    only_headers: tuple[str, ...] | None = None
    door: Door | None = None

    @property
    def host_header(self) -> str:
        """Value of the ``Host`` header: RFC 9110 section 7.2, without a default port or an IPv6 zone."""
        if self.origin.scheme == UNIX:
            return "localhost"
        host = self.origin.host
        host = f"[{host.partition('%')[0]}]" if ":" in host else host
        if _DEFAULT_PORTS[self.origin.scheme] == self.origin.port:
            return host
        return f"{host}:{self.origin.port}"

    @property
    def may_have_credentials(self) -> bool:
        """Whether it may get what identifies the user; a redirect to another server may not."""
        return self.only_headers is None

    @property
    def base_url(self) -> str:
        """Scheme, host and port as a URL begins with them, without a default port."""
        return f"{self.origin.scheme}://{self.host_header}"

    def translate(self, method: str, path: str, headers: Iterable[tuple[str, str]] = ()) -> Translated:
        """A request to ``path`` of the protocol as it is sent to this endpoint.

        Raises:
            ConfigurationError: the endpoint's door has nothing like it.
        """
        if self.door is not None:
            return self.door.translate(method, path, headers)
        return Translated(method, self.path_prefix + path, tuple(headers))

    def request_target(self, target: str) -> str:
        """What a request line names: path and query, or all of the URL for a proxy (RFC 9112 section 3.2)."""
        return target if self.origin.forwarding_proxy is None else self.base_url + target

    @property
    def proxy_authorization(self) -> str | None:
        """The header ``Proxy-Authorization`` for a proxy that forwards; a tunnel's goes with CONNECT."""
        proxy = self.origin.forwarding_proxy
        return None if proxy is None else proxy.authorization

    def authorize(self, headers: Mapping[str, str]) -> dict[str, str]:
        """The headers that it may get, with ``basic_authorization`` unless there is an ``Authorization``."""
        authorized = dict(headers)
        if self.only_headers is not None:
            authorized = {name: value for name, value in headers.items() if name.lower() in self.only_headers}
        if self.basic_authorization and "authorization" not in map(str.lower, authorized):
            authorized["Authorization"] = self.basic_authorization
        return authorized

    def at(self, address: str) -> EndpointUrl:
        """The same endpoint at one of its host's addresses."""
        return self._replace(origin=self.origin._replace(address=address))

    def __str__(self) -> str:
        return f"{self.origin.url}{self.path_prefix}{self.origin.way}"

    def __repr__(self) -> str:
        return f"EndpointUrl({str(self)!r})"

    @classmethod
    def parse(cls, url: str) -> EndpointUrl:
        """Parse an ``http``, ``https`` or ``http+unix`` URL.

        A path that ends in ``/v2`` or ``/v2/models`` is accepted and means the server above it. The path of
        an endpoint of Vertex AI or SageMaker makes it one of those (`beam_triton.doors`).

        Raises:
            ConfigurationError: the URL has no scheme, another scheme, no host, a port that is not a number, a
                query or a fragment. Credentials never appear in the message.
        """
        if not isinstance(url, str):
            raise ConfigurationError(
                f"endpoint must be a URL such as http://host:8000, not a {type(url).__name__}"
            )
        if not url.strip():
            raise ConfigurationError("endpoint must be a URL such as http://host:8000, and is empty")
        text = url.strip()
        shown = redact_url(text)
        try:
            parts = urlsplit(text)
            port = parts.port
            host = parts.hostname
        except ValueError:
            # The message of the error may hold a part of the password.
            raise ConfigurationError(
                f"endpoint {shown!r} is not a URL: its host or port cannot be read"
            ) from None
        if parts.scheme == UNIX:
            # A host is in lower case; the path of a socket is as it is.
            host = unquote(parts.netloc.rpartition("@")[2])
            if not host.startswith("/") or port is not None or "\0" in host:
                raise ConfigurationError(
                    f"endpoint {shown!r} names no unix socket: give its path percent-encoded in place of the "
                    f"host, as http+unix://%2Fpath%2Fto.sock"
                )
        elif parts.scheme not in _DEFAULT_PORTS or not host:
            hint = "give it as http://host:8000 or https://host"
            if parts.scheme in ("grpc", "grpcs"):
                hint = "beam_triton speaks HTTP only: give the server's HTTP port, as http://host:8000"
            elif "://" not in text:
                hint = f"a scheme is missing: did you mean http://{shown.lstrip('/')} ?"
            raise ConfigurationError(f"endpoint {shown!r} is not an http or https URL; {hint}")
        elif ":" in host:
            host = host.replace("%25", "%")
        if parts.query or parts.fragment:
            raise ConfigurationError(f"endpoint {shown!r} must not carry a query or a fragment")
        if any(character.isspace() or ord(character) < 33 for character in text) or not text.isascii():
            raise ConfigurationError(f"endpoint {shown!r} holds characters that a URL must percent-encode")
        prefix = parts.path.rstrip("/")
        for known in ("/v2/models", "/v2"):
            if prefix.endswith(known):
                prefix = prefix[: -len(known)]
                break
        origin = Origin(parts.scheme, host, _DEFAULT_PORTS.get(parts.scheme, 0) if port is None else port)
        door = door_at(prefix)
        return cls(origin, prefix if door is None else door.path, basic_authorization(parts), door=door)

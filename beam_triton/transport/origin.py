"""Where requests go: an endpoint URL, parsed once.

An *origin* is scheme, host and port, the unit that connections are pooled by (Flink's proposal and
OkHttp call it a *route*). A path in front of ``/v2``, as gateways use it, is part of the endpoint but not of
the origin.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from beam_triton.credentials import redact_url
from beam_triton.doors import Door, Translated, door_at
from beam_triton.errors import ConfigurationError

_DEFAULT_PORTS = {"http": 80, "https": 443}


class Origin(NamedTuple):
    """Scheme, host and port; and the one of the host's addresses to connect to, where somebody chose it.

    Requests and certificates are for the host all the same.
    """

    scheme: str
    host: str
    port: int
    address: str | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    def __str__(self) -> str:
        return self.url if self.address is None else f"{self.url} ({self.address})"


class EndpointUrl(NamedTuple):
    """One server of the Open Inference Protocol.

    ``path_prefix`` comes before ``/v2`` and has no slash at its end. ``basic_authorization`` is the
    ``Authorization`` header made of the URL's user name and password; it is left out of ``repr``. Behind a
    ``door`` the protocol's paths are not below the prefix, which is the door's whole path then.
    """

    origin: Origin
    path_prefix: str = ""
    basic_authorization: str | None = None
    door: Door | None = None

    @property
    def host_header(self) -> str:
        """Value of the ``Host`` header: RFC 9110 section 7.2, without a default port."""
        host = f"[{self.origin.host}]" if ":" in self.origin.host else self.origin.host
        if _DEFAULT_PORTS[self.origin.scheme] == self.origin.port:
            return host
        return f"{host}:{self.origin.port}"

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

    def authorize(self, headers: Mapping[str, str]) -> dict[str, str]:
        """The same headers, with ``basic_authorization`` unless they hold an ``Authorization`` already."""
        authorized = dict(headers)
        if self.basic_authorization and "authorization" not in map(str.lower, authorized):
            authorized["Authorization"] = self.basic_authorization
        return authorized

    def at(self, address: str) -> EndpointUrl:
        """The same endpoint at one of its host's addresses."""
        return self._replace(origin=self.origin._replace(address=address))

    def __str__(self) -> str:
        url, address = f"{self.origin.url}{self.path_prefix}", self.origin.address
        return url if address is None else f"{url} ({address})"

    def __repr__(self) -> str:
        return f"EndpointUrl({str(self)!r})"

    @classmethod
    def parse(cls, url: str) -> EndpointUrl:
        """Parse an ``http`` or ``https`` URL.

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
        if parts.scheme not in _DEFAULT_PORTS or not host:
            hint = "give it as http://host:8000 or https://host"
            if parts.scheme in ("grpc", "grpcs"):
                hint = "beam_triton speaks HTTP only: give the server's HTTP port, as http://host:8000"
            elif "://" not in text:
                hint = f"a scheme is missing: did you mean http://{shown.lstrip('/')} ?"
            raise ConfigurationError(f"endpoint {shown!r} is not an http or https URL; {hint}")
        if parts.query or parts.fragment:
            raise ConfigurationError(f"endpoint {shown!r} must not carry a query or a fragment")
        if any(character.isspace() or ord(character) < 33 for character in text) or not text.isascii():
            raise ConfigurationError(f"endpoint {shown!r} holds characters that a URL must percent-encode")
        prefix = parts.path.rstrip("/")
        for known in ("/v2/models", "/v2"):
            if prefix.endswith(known):
                prefix = prefix[: -len(known)]
                break
        authorization = None
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            authorization = "Basic " + base64.b64encode(pair.encode()).decode("ascii")
        origin = Origin(parts.scheme, host, _DEFAULT_PORTS[parts.scheme] if port is None else port)
        door = door_at(prefix)
        return cls(origin, prefix if door is None else door.path, authorization, door)

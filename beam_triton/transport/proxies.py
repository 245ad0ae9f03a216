"""HTTP proxies: which one a URL goes through, by the rules of requests but for loopback addresses, and its
credentials.

A proxy forwards plain requests, whose request lines hold the whole URL, and opens tunnels (CONNECT) for TLS.
Its credentials are in no text that this module makes.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from requests.utils import get_environ_proxies, select_proxy, should_bypass_proxies

from beam_triton.credentials import Secret, basic_authorization, redact_url, resolve
from beam_triton.errors import ConfigurationError

_logger = logging.getLogger(__name__)

_VARIABLES = tuple(
    name for scheme in ("http", "https", "all") for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper())
)
_DEFAULT_PORT = 80
_OPTION = "the option proxies"


class Proxy(NamedTuple):
    """An HTTP proxy; ``authorization`` is its ``Proxy-Authorization`` header, and is shown nowhere."""

    host: str
    port: int
    authorization: str | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def __repr__(self) -> str:
        return f"Proxy({str(self)!r})"

    @classmethod
    def parse(cls, url: str, said_by: str = _OPTION) -> Proxy:
        """A proxy from its URL, whose scheme and port (80) may be left out, as with requests.

        Raises:
            ConfigurationError: it is no HTTP proxy's URL. Credentials never appear in the message.
        """
        text = url.strip()
        text = text if "://" in text else f"http://{text}"
        shown = f"{said_by}: {redact_url(text)!r}"
        try:
            parts = urlsplit(text)
            port, host = parts.port, parts.hostname
        except ValueError:
            raise ConfigurationError(f"{shown} is not a URL: its host or port cannot be read") from None
        if parts.scheme != "http":
            hint = "only HTTP proxies are supported"
            if parts.scheme == "https":
                hint = (
                    "proxies over TLS are not supported. Most proxies take plain HTTP, for https endpoints "
                    "too: give it as http://host:port"
                )
            raise ConfigurationError(f"{shown}: {hint}")
        if not host or any(character.isspace() or ord(character) < 33 for character in text):
            raise ConfigurationError(f"{shown} is not a URL: give it as http://host:port")
        return cls(host, _DEFAULT_PORT if port is None else port, basic_authorization(parts))


def choose_proxy(url: str, given: Mapping[str, Secret | None], *, trust_env: bool) -> Proxy | None:
    """The proxy for an ``http`` or ``https`` URL, None where it is connected to directly.

    ``given`` maps as ``proxies`` of requests does: ``http``, ``https``, ``all``, each with ``://host`` after
    it for one host; None or an empty text means none, and a value may be a secret reference. ``no_proxy``
    lists what no proxy is for. What ``given`` leaves open the environment says, with ``trust_env``, unless
    the URL's host is a loopback address: a proxy on another machine would look for it there.

    Raises:
        ConfigurationError: the proxy that is named is not one, or the secret cannot be read.
    """
    no_proxy = given.get("no_proxy")
    if isinstance(no_proxy, str) and no_proxy and should_bypass_proxies(url, no_proxy):
        return None
    keys: dict[str, Any] = {key: value or "" for key, value in given.items() if key != "no_proxy"}
    chosen = select_proxy(url, keys)
    said_by = _OPTION
    if chosen:
        chosen = resolve(chosen, said_by)
    elif chosen is None and trust_env and _environment_may_name_one():
        parts = urlsplit(url)
        if not is_loopback(parts.hostname or ""):
            chosen = select_proxy(url, get_environ_proxies(url))
            said_by = f"{parts.scheme.upper()}_PROXY or ALL_PROXY"
    if not chosen:
        return None
    proxy = Proxy.parse(chosen, said_by)
    _log_once(url, proxy, said_by)
    return proxy


def _environment_may_name_one() -> bool:
    """Asked for each request of the control plane: looking at all variables would take a hundred times as
    long."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in _VARIABLES)


@lru_cache(maxsize=256)
def _log_once(url: str, proxy: Proxy, said_by: str) -> None:
    _logger.info("%s goes through the proxy %s (%s)", url, proxy, said_by)


def is_loopback(host: str) -> bool:
    """Whether the host is this machine by its name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

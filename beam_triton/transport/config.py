"""The user's settings of connections: the pool's limits and TLS."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from beam_triton.credentials import Secret, check_reference, is_reference
from beam_triton.errors import ConfigurationError
from beam_triton.transport.origin import UNIX, EndpointUrl
from beam_triton.transport.proxies import Proxy, choose_proxy
from beam_triton.validation import Options, boolean, check, positive, positive_integer

# A name, an IPv4 address, or an IPv6 address without brackets.
_HOST_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_.])?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")

_PROXY_KEY = re.compile(r"no_proxy|(?:https?|all)(?:://[^/@]+)?")


@dataclass(frozen=True, kw_only=True)
class ConnectionPoolConfig(Options):
    """Limits of the connection pool that all DoFn instances of a process share.

    A connection is *active* while a request uses it and *idle* between two requests. Limits hold
    per process; a *host* is an origin: scheme, host name and port (Flink's proposal says *route*).

    Attributes:
        max_idle: idle connections kept open, all hosts together. Surplus ones are closed as they
            are released, the longest idle first.
        keep_alive_seconds: an idle connection is closed after this time, by a background thread,
            whether or not requests follow. Keep it below the idle timeout of a proxy in between.
        max_age_seconds: a connection is closed between two requests, or while it is idle, once it is this old
            (half of it at the least, at random, so that not all are renewed at once). A balancer of
            connections, such as a Kubernetes Service, gives a new server new connections only: within this
            time it has its share of the requests. Renewing each connection twice a minute costs nothing that
            can be measured; at 300 s a new server would wait five minutes for its share. ``None`` keeps
            connections as long as they are used.
        max_total: connections open at a time, all hosts together, connecting ones included. A
            request beyond it waits, within its deadline, and then fails with ``PoolTimeoutError``.
        max_per_host: the same for one host; ``None`` sets no limit below ``max_total``.
        connect_timeout_seconds: time for name resolution, TCP and TLS handshake together.
        reuse_enabled: ``False`` opens a connection for every request and closes it afterwards.
        monitoring_enabled: log the pool's figures (idle, active, waiting, opened, reused, and
            requests a second, which Flink's proposal calls QPS, *queries per second*) every
            ``monitoring_interval_seconds``.

    Raises:
        ConfigurationError: a value is not positive, or ``max_idle`` is above ``max_total``, or
            ``max_per_host`` is.
    """

    max_idle: int = 20
    keep_alive_seconds: float = 300.0
    max_age_seconds: float | None = 30.0
    max_total: int = 100
    max_per_host: int | None = None
    connect_timeout_seconds: float = 10.0
    reuse_enabled: bool = True
    monitoring_enabled: bool = False
    monitoring_interval_seconds: float = 30.0

    def __post_init__(self) -> None:
        check(self, positive_integer, "max_idle", "max_total")
        check(self, positive_integer, "max_per_host", allow_none=True)
        check(self, positive, "keep_alive_seconds", "connect_timeout_seconds", "monitoring_interval_seconds")
        check(self, positive, "max_age_seconds", allow_none=True)
        check(self, boolean, "reuse_enabled", "monitoring_enabled")
        if self.max_idle > self.max_total:
            raise ConfigurationError(
                f"max_idle={self.max_idle} is above max_total={self.max_total}: "
                f"no more connections can be idle than may be open; lower max_idle or raise max_total"
            )
        if self.max_per_host is not None and self.max_per_host > self.max_total:
            raise ConfigurationError(
                f"max_per_host={self.max_per_host} is above max_total={self.max_total}: "
                f"one host can't have more connections than all of them; lower it or leave it out"
            )

    @classmethod
    def for_requests(cls, max_concurrent_requests: int, timeout_seconds: float) -> ConnectionPoolConfig:
        """The defaults, adapted to the number of requests in flight and to their timeout.

        As many connections, idle ones too, as requests: fewer would be closed at the end of every bundle and
        opened again in the next one. The connect timeout is at most half of a request's.
        """
        defaults = cls()
        return cls(
            max_idle=max(defaults.max_idle, max_concurrent_requests),
            max_total=max(defaults.max_total, max_concurrent_requests),
            connect_timeout_seconds=min(defaults.connect_timeout_seconds, timeout_seconds / 2),
        )


@dataclass(frozen=True, kw_only=True)
class TlsConfig(Options):
    """TLS of ``https`` endpoints.

    Attributes:
        verify: ``False`` accepts any certificate and logs a warning each time a session is made.
        ca_bundle: file with the certificates of the authorities to trust, PEM, or a directory of such files
            (named as ``openssl rehash`` does). ``None`` trusts those that the worker's environment names
            (``REQUESTS_CA_BUNDLE``, ``CURL_CA_BUNDLE``, or ``SSL_CERT_FILE`` and ``SSL_CERT_DIR``), and
            without these the ones that come with requests (certifi).
        client_certificate: file with the client's certificate chain, PEM; its private key may be
            in the same file.
        client_key: file with the private key, where that is a separate file.
        server_hostname: the name that the server's certificate must hold, also sent as SNI; ``None`` takes
            the endpoint's host. For a server that is reached by an address, or through a tunnel.

    The files are read on the worker, when the first connection is opened, and again when a connection is
    opened after a file has changed; while new files cannot be read, the old contents stay in use.
    """

    verify: bool = True
    ca_bundle: str | None = None
    client_certificate: str | None = None
    client_key: str | None = None
    server_hostname: str | None = None

    def __post_init__(self) -> None:
        check(self, boolean, "verify")
        if self.client_key is not None and self.client_certificate is None:
            raise ConfigurationError("client_key needs client_certificate: a key alone proves nothing")
        name = self.server_hostname
        if name is not None and (not isinstance(name, str) or not _HOST_NAME.fullmatch(name)):
            raise ConfigurationError(
                f"server_hostname={name!r} is not a host name or address: give it without scheme and port"
            )
        if not self.verify and self.ca_bundle is not None:
            raise ConfigurationError("ca_bundle and verify=False contradict each other: give one of them")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(Options):
    """The way to the servers.

    Attributes:
        trust_env: the worker's environment names what is left open: proxies, and certificate authorities
            where `TlsConfig` has none.
        proxies: pairs as `choose_proxy` takes them, in a mapping; a proxy's URL may be a secret reference or
            callable. Left out of ``repr``.

    Raises:
        ConfigurationError: a key names no scheme, or a value is no HTTP proxy's URL.
    """

    trust_env: bool = True
    proxies: tuple[tuple[str, Secret | None], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check(self, boolean, "trust_env")
        for key, value in self.proxies:
            if not isinstance(key, str) or not _PROXY_KEY.fullmatch(key):
                raise ConfigurationError(
                    f"proxies: {key!r} is none of http, https, all (each may have ://host after it), no_proxy"
                )
            if key == "no_proxy" and not isinstance(value, str | None):
                raise ConfigurationError("proxies: no_proxy must be a text of hosts with commas between them")
            if not value or key == "no_proxy":
                continue
            check_reference(value, f"proxies[{key!r}]")
            if not is_reference(value):
                assert isinstance(value, str)
                Proxy.parse(value, f"proxies[{key!r}]")

    def routed(self, url: EndpointUrl) -> EndpointUrl:
        """The same endpoint, through a proxy where there is one for it.

        Raises:
            ConfigurationError: the proxy that is named is not one, or a secret cannot be read.
        """
        if url.origin.scheme == UNIX:
            return url
        proxy = choose_proxy(url.origin.url, dict(self.proxies), trust_env=self.trust_env)
        return url if proxy is None else url._replace(origin=url.origin._replace(proxy=proxy))


DEFAULT_NETWORK = NetworkConfig()
"""The way that the worker's environment names."""

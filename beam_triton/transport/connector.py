"""Opens connections: urllib3 makes them, within one bound for name resolution, TCP and TLS together."""

from __future__ import annotations

import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, NameResolutionError
from urllib3.util.ssl_ import create_urllib3_context

from beam_triton.errors import ConfigurationError, ConnectError, ConnectTimeoutError, TlsError, TritonError
from beam_triton.transport.config import TlsConfig
from beam_triton.transport.dialing import Dialer, dial_unix, look_up
from beam_triton.transport.origin import UNIX, Origin
from beam_triton.transport.tunnel import connect_through

_logger = logging.getLogger(__name__)


class _BoundedTcp:
    """Tries the addresses of a host within one bound; urllib3 alone gives the whole bound to each address."""

    dialer: Dialer
    origin: Origin

    def _new_conn(self: HTTPConnection) -> socket.socket:  # type: ignore[misc] # a mixin of HTTPConnection
        dialer: Dialer = self.dialer  # type: ignore[attr-defined]
        origin: Origin = self.origin  # type: ignore[attr-defined]
        timeout_seconds = float(self.timeout)  # type: ignore[arg-type] # set by Connector.open
        deadline = time.monotonic() + timeout_seconds
        if origin.proxy is not None:
            sock = connect_through(origin.proxy, origin, dialer, timeout_seconds)
        elif origin.scheme == UNIX:
            sock = dial_unix(origin.host, deadline)
        else:
            try:
                addresses = look_up(origin.address or self._dns_host, self.port)
            except OSError as error:
                raise NameResolutionError(self.host, self, error) from error  # type: ignore[arg-type]
            sock = dialer.dial(addresses, deadline)
        # The TLS handshake that follows runs under this timeout as a whole.
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        return sock


class _BoundedHttpConnection(_BoundedTcp, HTTPConnection):
    pass


class _BoundedHttpsConnection(_BoundedTcp, HTTPSConnection):
    pass


class Connector:
    """Opens connections with one TLS context, built when the first ``https`` origin is met.

    It is rebuilt when one of its files has changed, or ``trust_env`` is set and the environment names others.
    Thread-safe.
    """

    def __init__(self, tls: TlsConfig, *, trust_env: bool = True) -> None:
        self._tls = tls
        self._trust_env = trust_env
        self._client_files = [file for file in (tls.client_certificate, tls.client_key) if file]
        self._dialer = Dialer()
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._stamps: _Stamps = ()
        self._failed_stamps: _Stamps = ()
        if not tls.verify:
            _logger.warning(
                "TLS certificates are NOT verified (verify=False): anybody between this worker and the "
                "server can read and change what is sent. Give ca_bundle=... instead."
            )

    def open(self, origin: Origin, timeout_seconds: float) -> HTTPConnection:
        """A connected connection whose socket does not block.

        Raises:
            ConnectTimeoutError: not connected within ``timeout_seconds``.
            TlsError: the handshake failed.
            ProxyError: the proxy refused.
            ConnectError: refused, unreachable, or the name has no address.
        """
        connection: _BoundedHttpConnection | _BoundedHttpsConnection
        authorities: _Authorities | None = None
        if origin.scheme == "https":
            authorities = self._authorities()
            context = self._ssl_context(authorities)
            connection = _BoundedHttpsConnection(
                origin.host,
                origin.port,
                timeout=timeout_seconds,
                ssl_context=context,
                cert_reqs=ssl.CERT_REQUIRED if self._tls.verify else ssl.CERT_NONE,
                assert_hostname=None if self._tls.verify else False,
                server_hostname=self._tls.server_hostname,
            )
        else:
            host = "localhost" if origin.scheme == UNIX else origin.host
            connection = _BoundedHttpConnection(host, origin.port, timeout=timeout_seconds)
        connection.dialer, connection.origin = self._dialer, origin
        try:
            connection.connect()
        except BaseException as error:
            connection.close()
            raise _connect_error(error, origin, timeout_seconds, authorities) from error
        connection.sock.setblocking(False)
        return connection

    def _authorities(self) -> _Authorities:
        if self._tls.verify and self._tls.ca_bundle is None and self._trust_env:
            return _authorities_of_environment()
        return _Authorities.at(self._tls.ca_bundle, "tls.ca_bundle") if self._tls.ca_bundle else _CERTIFI

    def _ssl_context(self, authorities: _Authorities) -> ssl.SSLContext:
        """The context of the files as they are now; the last good one while new files cannot be read.

        A job may outlive the certificates that it started with.
        """
        files = [file for file in (authorities.file, authorities.directory, *self._client_files) if file]
        stamps = _stamps(files)
        with self._lock:
            if self._context is not None and stamps == self._stamps:
                return self._context
            try:
                context = _new_context(self._tls, authorities)
            except (OSError, ssl.SSLError) as error:
                missing = [file for file in files if not os.path.exists(file)]
                reason = f"{', '.join(missing)} not found" if missing else str(error)
                if authorities.variable:
                    reason += f" ({authorities.variable} names {authorities.file or authorities.directory})"
                if self._context is not None:
                    if stamps != self._failed_stamps:
                        self._failed_stamps = stamps
                        _logger.warning("new TLS files cannot be used, the old ones still are: %s", reason)
                    return self._context
                raise ConfigurationError(f"TLS files cannot be used on this worker: {reason}") from error
            if self._context is not None:
                _logger.info("TLS files were renewed: new connections use them")
            # Taken before the files were read: a change in between is seen the next time.
            self._context, self._stamps = context, stamps
            return context


class _Authorities(NamedTuple):
    """Where the certificates of trusted authorities are, and what says so."""

    file: str | None
    directory: str | None = None
    said_by: str = ""
    variable: str = ""

    @classmethod
    def at(cls, path: str, said_by: str, variable: str = "") -> _Authorities:
        if os.path.isdir(path):
            return cls(None, path, said_by, variable)
        return cls(path, None, said_by, variable)


_CERTIFI = _Authorities(DEFAULT_CA_BUNDLE_PATH, None, "the public authorities that come with requests")


def _authorities_of_environment() -> _Authorities:
    """In the order of requests, then that of curl."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        path = os.environ.get(name)
        if path:
            return _Authorities.at(path, f"{name}={path}", name)
    file, directory = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if not file and not directory:
        return _CERTIFI
    # A directory adds to a file, and one that does not exist adds nothing, as in OpenSSL.
    said_by = f"SSL_CERT_FILE={file}" if file else _CERTIFI.said_by
    said_by += f" and SSL_CERT_DIR={directory}" if directory else ""
    return _Authorities(
        file or _CERTIFI.file, directory or None, said_by, "SSL_CERT_FILE" if file else "SSL_CERT_DIR"
    )


def _new_context(tls: TlsConfig, authorities: _Authorities) -> ssl.SSLContext:
    context = create_urllib3_context(cert_reqs=ssl.CERT_REQUIRED if tls.verify else ssl.CERT_NONE)
    context.set_alpn_protocols(["http/1.1"])
    if tls.verify:
        context.check_hostname = True
        context.load_verify_locations(cafile=authorities.file, capath=authorities.directory)
    if tls.client_certificate is not None:
        context.load_cert_chain(tls.client_certificate, tls.client_key)
    return context


_Stamps = tuple[tuple[str, int, int, int] | None, ...]


def _stamps(files: Sequence[str]) -> _Stamps:
    """A stamp per file that changes when it is written or replaced; None for a missing file."""
    stamps: list[tuple[str, int, int, int] | None] = []
    for file in files:
        try:
            found = os.stat(file)
        except OSError:
            stamps.append(None)
        else:
            stamps.append((file, found.st_mtime_ns, found.st_ino, found.st_size))
    return tuple(stamps)


# OpenSSL's X509_V_ERR_ codes of certificates that no trusted authority has signed, and of another name.
_NOT_TRUSTED = frozenset({2, 18, 19, 20, 21, 27})
_OTHER_NAME = frozenset({62, 64})


def _refused(error: ssl.SSLCertVerificationError, authorities: _Authorities | None) -> str:
    """Why a certificate is refused, and the option that changes it, if there is one."""
    reason = f"its certificate is refused: {error.verify_message}"
    if error.verify_code in _NOT_TRUSTED and authorities is not None:
        reason += f". Trusted are {authorities.said_by}: give the server's own authority as tls.ca_bundle"
    elif error.verify_code in _OTHER_NAME:
        reason += ". If the server is known by another name, give that as tls.server_hostname"
    return reason


def _connect_error(
    error: BaseException, origin: Origin, timeout_seconds: float, authorities: _Authorities | None
) -> BaseException:
    if isinstance(error, TritonError):
        return error
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            # A server that is being stopped does this as well: another attempt may succeed.
            return ConnectError(f"{origin} ended the connection within the TLS handshake: does it speak TLS?")
        if isinstance(cause, ssl.SSLError):
            reason = str(cause)
            if isinstance(cause, ssl.SSLCertVerificationError):
                reason = _refused(cause, authorities)
            return TlsError(f"TLS handshake with {origin} failed: {reason}")
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, TimeoutError):
        told = f" ({error})" if ";" in str(error) else ""
        return ConnectTimeoutError(f"{origin} did not accept a connection within {timeout_seconds:g} s{told}")
    if isinstance(error, NameResolutionError):
        return ConnectError(f"the host name of {origin} has no address: {error.__cause__}")
    if isinstance(error, OSError | HTTPError):
        return ConnectError(f"cannot connect to {origin}: {error}")
    return error


ConnectionOpener = Callable[[Origin, float], HTTPConnection]

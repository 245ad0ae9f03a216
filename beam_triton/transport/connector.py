"""Opens connections: urllib3 makes them, within one bound for name resolution, TCP and TLS together."""

from __future__ import annotations

import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence

from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, NameResolutionError
from urllib3.util.ssl_ import create_urllib3_context

from beam_triton.errors import ConfigurationError, ConnectError, ConnectTimeoutError, TlsError
from beam_triton.transport.config import TlsConfig
from beam_triton.transport.dialing import Dialer, look_up
from beam_triton.transport.origin import Origin

_logger = logging.getLogger(__name__)


class _BoundedTcp:
    """Tries the addresses of a host within one bound; urllib3 alone gives the whole bound to each address."""

    dialer: Dialer
    address: str | None

    def _new_conn(self: HTTPConnection) -> socket.socket:  # type: ignore[misc] # a mixin of HTTPConnection
        deadline = time.monotonic() + float(self.timeout)  # type: ignore[arg-type] # set by open_connection
        try:
            addresses = look_up(self.address or self._dns_host, self.port)  # type: ignore[attr-defined]
        except OSError as error:
            raise NameResolutionError(self.host, self, error) from error  # type: ignore[arg-type] # gaierror
        sock: socket.socket = self.dialer.dial(addresses, deadline)  # type: ignore[attr-defined]
        # The TLS handshake that follows runs under this timeout as a whole.
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        return sock


class _BoundedHttpConnection(_BoundedTcp, HTTPConnection):
    pass


class _BoundedHttpsConnection(_BoundedTcp, HTTPSConnection):
    pass


class Connector:
    """Opens connections with one TLS context, built when the first ``https`` origin is met.

    It is rebuilt when one of its files has changed. Thread-safe.
    """

    def __init__(self, tls: TlsConfig) -> None:
        self._tls = tls
        self._files = [file for file in (tls.ca_bundle, tls.client_certificate, tls.client_key) if file]
        self._dialer = Dialer()
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._stamps: tuple[tuple[int, int, int] | None, ...] = ()
        self._failed_stamps: tuple[tuple[int, int, int] | None, ...] = ()
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
            ConnectError: refused, unreachable, or the name has no address.
        """
        connection: _BoundedHttpConnection | _BoundedHttpsConnection
        if origin.scheme == "https":
            context = self._ssl_context()
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
            connection = _BoundedHttpConnection(origin.host, origin.port, timeout=timeout_seconds)
        connection.dialer, connection.address = self._dialer, origin.address
        try:
            connection.connect()
        except BaseException as error:
            connection.close()
            raise _connect_error(error, origin, timeout_seconds) from error
        connection.sock.setblocking(False)
        return connection

    def _ssl_context(self) -> ssl.SSLContext:
        """The context of the files as they are now; the last good one while new files cannot be read.

        A job may outlive the certificates that it started with.
        """
        stamps = _stamps(self._files)
        with self._lock:
            if self._context is not None and stamps == self._stamps:
                return self._context
            try:
                context = _new_context(self._tls)
            except (OSError, ssl.SSLError) as error:
                missing = [file for file in self._files if not os.path.exists(file)]
                reason = f"{', '.join(missing)} not found" if missing else str(error)
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


def _new_context(tls: TlsConfig) -> ssl.SSLContext:
    context = create_urllib3_context(cert_reqs=ssl.CERT_REQUIRED if tls.verify else ssl.CERT_NONE)
    context.set_alpn_protocols(["http/1.1"])
    if tls.verify:
        context.check_hostname = True
        context.load_verify_locations(cafile=tls.ca_bundle or DEFAULT_CA_BUNDLE_PATH)
    if tls.client_certificate is not None:
        context.load_cert_chain(tls.client_certificate, tls.client_key)
    return context


def _stamps(files: Sequence[str]) -> tuple[tuple[int, int, int] | None, ...]:
    """A stamp per file that changes when it is written or replaced; None for a missing file."""
    stamps: list[tuple[int, int, int] | None] = []
    for file in files:
        try:
            found = os.stat(file)
        except OSError:
            stamps.append(None)
        else:
            stamps.append((found.st_mtime_ns, found.st_ino, found.st_size))
    return tuple(stamps)


def _connect_error(error: BaseException, origin: Origin, timeout_seconds: float) -> BaseException:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            # A server that is being stopped does this as well: another attempt may succeed.
            return ConnectError(f"{origin} ended the connection within the TLS handshake: does it speak TLS?")
        if isinstance(cause, ssl.SSLError):
            reason = str(cause)
            if isinstance(cause, ssl.SSLCertVerificationError):
                reason = f"its certificate is refused: {cause.verify_message}"
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

"""Opening connections: bounded as a whole, with verified TLS."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from beam_triton.errors import ConfigurationError, ConnectError, ConnectTimeoutError, TlsError
from beam_triton.transport.config import TlsConfig
from beam_triton.transport.connector import Connector
from beam_triton.transport.exchange import Exchange
from beam_triton.transport.origin import Origin
from tests.support import faults
from tests.support.answers import Answer
from tests.support.certificates import CertificateFiles, Certificates
from tests.support.fault_server import Exchange as ServerSide
from tests.support.fault_server import FaultServer
from tests.support.names import resolving


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")


def subject_hash(certificate: Path) -> str:
    """The name under which OpenSSL looks for the certificate in a directory."""
    command = ["openssl", "x509", "-noout", "-subject_hash", "-in", str(certificate)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def tls_server(
    files: CertificateFiles,
    client_ca: Path | None = None,
    on_name: Callable[[str | None], None] = lambda name: None,
) -> Iterator[Origin]:
    """Answers one request on each connection with ``hello`` over TLS; ``on_name`` gets the name in SNI."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    context.sni_callback = lambda sock, name, context: on_name(name)
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(client_ca)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(plain, server_side=True) as sock:
                    sock.settimeout(5)
                    sock.recv(65536)
                    body = b"hello" * 100_000
                    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                    sock.recv(1)
            except OSError:
                continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield Origin("https", "localhost", listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def get(origin: Origin, tls: TlsConfig | Connector) -> bytes:
    """A whole exchange on a connection from the connector."""
    connector = tls if isinstance(tls, Connector) else Connector(tls)
    connection = connector.open(origin, 5.0)
    try:
        sock = connection.sock
        exchange = Exchange(sock, [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"], max_response_bytes=1 << 20)
        deadline = time.monotonic() + 10
        while exchange.advance():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return bytes(exchange.body)
    finally:
        connection.close()


def test_valid_certificate_is_trusted(certificates: Certificates) -> None:
    """A server whose certificate the CA bundle covers is used, and large answers arrive whole."""
    with tls_server(certificates.good) as origin:
        assert get(origin, TlsConfig(ca_bundle=str(certificates.ca))) == b"hello" * 100_000


@pytest.mark.parametrize(
    ("kind", "reason"), [("expired", "expired"), ("wrong_host", "localhost"), ("good", "issuer")]
)
def test_invalid_certificate_is_refused_with_the_reason(
    certificates: Certificates, kind: str, reason: str
) -> None:
    """Expired, for another host, or from an authority that is not trusted."""
    trusted = certificates.stranger_ca if kind == "good" else certificates.ca
    with tls_server(getattr(certificates, kind)) as origin, pytest.raises(TlsError, match=reason):
        get(origin, TlsConfig(ca_bundle=str(trusted)))


def test_certificate_is_checked_for_the_name_at_a_chosen_address(certificates: Certificates) -> None:
    """The server is asked for by its name, and has to prove that name."""
    connector = Connector(TlsConfig(ca_bundle=str(certificates.ca)))
    with tls_server(certificates.good) as origin, resolving({"triton": []}):
        assert get(origin._replace(address="127.0.0.1"), connector) == b"hello" * 100_000
        with pytest.raises(TlsError, match="triton"):
            get(origin._replace(host="triton", address="127.0.0.1"), connector)


def test_certificate_is_checked_for_the_given_name(certificates: Certificates) -> None:
    """``server_hostname`` is what the certificate must hold, whatever the host that is connected to."""
    ca = str(certificates.ca)
    with tls_server(certificates.wrong_host) as origin:
        named = TlsConfig(ca_bundle=ca, server_hostname="elsewhere.example")
        assert get(origin._replace(host="127.0.0.1"), named) == b"hello" * 100_000
        with pytest.raises(TlsError, match=r"other\.example"):
            get(origin, TlsConfig(ca_bundle=ca, server_hostname="other.example"))


def test_given_name_is_sent_as_sni(certificates: Certificates) -> None:
    """A front for several hosts chooses its certificate by it; an address has none."""
    asked: list[str | None] = []
    with tls_server(certificates.wrong_host, on_name=asked.append) as origin:
        by_address = origin._replace(host="127.0.0.1")
        ca = str(certificates.ca)
        get(by_address, TlsConfig(ca_bundle=ca, server_hostname="elsewhere.example"))
        get(by_address, TlsConfig(verify=False))
    assert asked == ["elsewhere.example", None]


def test_disabled_verification_accepts_any_certificate_and_warns(
    certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """``verify=False`` logs a warning."""
    with tls_server(certificates.wrong_host) as origin:
        assert get(origin, TlsConfig(verify=False)) == b"hello" * 100_000
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert any("NOT verified" in message for message in warnings)


def test_client_certificate_is_presented(certificates: Certificates) -> None:
    """A server that asks for a certificate gets it; the error for a wrong or missing one says so."""
    ca = str(certificates.ca)
    client, stranger = certificates.client, certificates.stranger
    with tls_server(certificates.good, client_ca=certificates.ca) as origin:
        shown = TlsConfig(
            ca_bundle=ca, client_certificate=str(client.certificate), client_key=str(client.key)
        )
        assert get(origin, shown) == b"hello" * 100_000
        wrong = TlsConfig(
            ca_bundle=ca, client_certificate=str(stranger.certificate), client_key=str(stranger.key)
        )
        for tls in (wrong, TlsConfig(ca_bundle=ca)):
            with pytest.raises(TlsError, match="this client's certificate"):
                get(origin, tls)


def test_renewed_certificate_files_are_read(certificates: Certificates, tmp_path: Path) -> None:
    """New connections use the new certificate and the new CA bundle, overwritten or replaced."""
    bundle, certificate, key = (tmp_path / name for name in ("ca.pem", "client.pem", "client.key"))

    def write(ca: Path, client: CertificateFiles) -> None:
        for source, target in ((ca, bundle), (client.certificate, certificate), (client.key, key)):
            shutil.copyfile(source, tmp_path / "next")
            (tmp_path / "next").replace(target)

    write(certificates.ca, certificates.stranger)
    connector = Connector(
        TlsConfig(ca_bundle=str(bundle), client_certificate=str(certificate), client_key=str(key))
    )
    with tls_server(certificates.good, client_ca=certificates.ca) as origin:
        with pytest.raises(TlsError, match="this client's certificate"):
            get(origin, connector)
        write(certificates.ca, certificates.client)
        assert get(origin, connector) == b"hello" * 100_000
        bundle.write_bytes(certificates.stranger_ca.read_bytes())
        with pytest.raises(TlsError, match="certificate is refused"):
            get(origin, connector)
        bundle.write_bytes(certificates.ca.read_bytes())
        assert get(origin, connector) == b"hello" * 100_000


def test_unreadable_renewed_files_keep_the_old_ones_in_use(
    certificates: Certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of a new pair, or no file: the old ones are used, and the log says so once."""
    certificate, key = tmp_path / "client.pem", tmp_path / "client.key"
    shutil.copyfile(certificates.client.certificate, certificate)
    shutil.copyfile(certificates.client.key, key)
    connector = Connector(
        TlsConfig(ca_bundle=str(certificates.ca), client_certificate=str(certificate), client_key=str(key))
    )
    with tls_server(certificates.good, client_ca=certificates.ca) as origin:
        get(origin, connector)
        for spoil in (
            lambda: certificate.write_bytes(certificates.stranger.certificate.read_bytes()),
            lambda: key.write_bytes(b""),
            key.unlink,
        ):
            spoil()
            caplog.clear()
            for _ in range(2):
                assert get(origin, connector) == b"hello" * 100_000
            assert len([record for record in caplog.records if "cannot be used" in record.message]) == 1
        shutil.copyfile(certificates.stranger.key, key)
        with pytest.raises(TlsError, match="this client's certificate"):
            get(origin, connector)


def test_unchanged_certificate_files_are_read_once(certificates: Certificates) -> None:
    """All connections share one context, as reading a bundle takes milliseconds."""
    connector = Connector(TlsConfig(ca_bundle=str(certificates.ca)))
    with tls_server(certificates.good) as origin:
        get(origin, connector)
        context = connector._context
        get(origin, connector)
    assert context is not None and connector._context is context


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that names no authorities."""
    for name in CA_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"])
def test_authorities_come_from_the_environment(
    certificates: Certificates, no_variables: pytest.MonkeyPatch, name: str
) -> None:
    """Unless ``trust_env`` is off, or ``ca_bundle`` says otherwise."""
    no_variables.setenv(name, str(certificates.ca))
    with tls_server(certificates.good) as origin:
        assert get(origin, TlsConfig()) == b"hello" * 100_000
        with pytest.raises(TlsError, match=r"public authorities .* as tls\.ca_bundle"):
            get(origin, Connector(TlsConfig(), trust_env=False))
        with pytest.raises(TlsError, match=r"stranger_ca\.pem|tls\.ca_bundle"):
            get(origin, TlsConfig(ca_bundle=str(certificates.stranger_ca)))


def test_variables_have_the_order_of_requests_and_curl(
    certificates: Certificates, no_variables: pytest.MonkeyPatch
) -> None:
    """The error names the one that was used."""
    good, stranger = str(certificates.ca), str(certificates.stranger_ca)
    with tls_server(certificates.good) as origin:
        no_variables.setenv("SSL_CERT_FILE", stranger)
        for name in ("CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
            no_variables.setenv(name, good)
            assert get(origin, TlsConfig()) == b"hello" * 100_000
            no_variables.setenv(name, stranger)
            with pytest.raises(TlsError, match=f"Trusted are {name}={stranger}.*tls.ca_bundle"):
                get(origin, TlsConfig())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "ca_bundle"])
def test_authorities_may_be_a_directory(
    certificates: Certificates, no_variables: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """Named by hashes, as OpenSSL and requests have it."""
    shutil.copy(certificates.ca, tmp_path / f"{subject_hash(certificates.ca)}.0")
    tls = TlsConfig(ca_bundle=str(tmp_path)) if name == "ca_bundle" else TlsConfig()
    if name != "ca_bundle":
        no_variables.setenv(name, str(tmp_path))
    with tls_server(certificates.good) as origin:
        assert get(origin, tls) == b"hello" * 100_000


def test_authorities_of_the_environment_are_read_for_the_next_connection(
    certificates: Certificates, no_variables: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A bundle that is replaced counts, and a variable that names another file."""
    bundle, connector = tmp_path / "ca.pem", Connector(TlsConfig())
    shutil.copy(certificates.stranger_ca, bundle)
    no_variables.setenv("SSL_CERT_FILE", str(bundle))
    with tls_server(certificates.good) as origin:
        with pytest.raises(TlsError):
            get(origin, connector)
        os.utime(shutil.copy(certificates.ca, bundle), ns=(1, 1))
        assert get(origin, connector) == b"hello" * 100_000
        no_variables.setenv("REQUESTS_CA_BUNDLE", str(certificates.stranger_ca))
        with pytest.raises(TlsError, match="REQUESTS_CA_BUNDLE"):
            get(origin, connector)


def test_variable_that_names_a_missing_file_is_named(no_variables: pytest.MonkeyPatch) -> None:
    """It is a mistake on the worker, not of the server."""
    no_variables.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    with pytest.raises(ConfigurationError, match=r"/nowhere/ca\.pem not found .*REQUESTS_CA_BUNDLE"):
        Connector(TlsConfig()).open(Origin("https", "localhost", 1), 1.0)


@pytest.mark.parametrize(
    ("kind", "hint", "other"),
    [
        ("expired", "expired", "tls."),
        ("wrong_host", "tls.server_hostname", "tls.ca_bundle"),
        ("good", "tls.ca_bundle", "tls.server_hostname"),
    ],
)
def test_refused_certificate_names_the_option_that_applies(
    certificates: Certificates, kind: str, hint: str, other: str
) -> None:
    """And no other one."""
    trusted = certificates.stranger_ca if kind == "good" else certificates.ca
    with tls_server(getattr(certificates, kind)) as origin, pytest.raises(TlsError) as raised:
        get(origin, TlsConfig(ca_bundle=str(trusted)))
    assert hint in str(raised.value) and other not in str(raised.value)


@pytest.mark.parametrize("option", ["ca_bundle", "client_certificate"])
def test_missing_certificate_file_is_named(option: str) -> None:
    """Files are read when the first connection is opened."""
    connector = Connector(TlsConfig(**{option: "/nowhere/file.pem"}))  # type: ignore[arg-type] # by name
    with pytest.raises(ConfigurationError, match=r"/nowhere/file\.pem not found"):
        connector.open(Origin("https", "localhost", 1), 1.0)


def test_every_address_of_a_host_is_tried() -> None:
    """A name with an address that refuses is reached at its next one."""
    with FaultServer(lambda request: Answer()) as server:
        # localhost is ::1 and 127.0.0.1 on most machines; the server listens only at the second.
        connection = Connector(TlsConfig()).open(Origin("http", "localhost", server.port), 2.0)
        assert connection.sock.getpeername()[0] == "127.0.0.1"
        assert connection.sock.gettimeout() == 0.0
        connection.close()


def test_connect_timeout_covers_a_host_that_never_answers() -> None:
    """A full backlog ends as a timeout, in time."""
    started = time.monotonic()
    with faults.unanswering_port() as port, pytest.raises(ConnectTimeoutError, match=r"0\.3 s"):
        Connector(TlsConfig()).open(Origin("http", "127.0.0.1", port), 0.3)
    assert 0.3 <= time.monotonic() - started < 0.8


@pytest.mark.parametrize("interval_seconds", [None, 0.05])
def test_connect_timeout_covers_the_tls_handshake(interval_seconds: float | None) -> None:
    """Whether the server is silent or sends a byte now and then."""

    def shake(sock: socket.socket) -> None:
        # The first bytes of an endless record.
        for byte in b"\x16\x03\x03\x40\x00" + bytes(100):
            time.sleep(interval_seconds or 5)
            try:
                sock.sendall(bytes([byte]))
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        origin = Origin("https", "127.0.0.1", listener.getsockname()[1])
        accepted: list[socket.socket] = []

        def accept() -> None:
            accepted.append(listener.accept()[0])
            shake(accepted[0])

        threading.Thread(target=accept, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(ConnectTimeoutError):
            Connector(TlsConfig()).open(origin, 0.4)
        assert 0.4 <= time.monotonic() - started < 0.9
        for sock in accepted:
            sock.close()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 64 + ".example"])
def test_unresolvable_host_raises_an_error(host: str) -> None:
    """A name that has no address, or cannot have one, raises an error."""
    with pytest.raises((ConnectError, UnicodeError)):
        Connector(TlsConfig()).open(Origin("http", host, 80), 5.0)


def test_https_to_a_plain_http_port_raises_tls_error() -> None:
    """The error differs from that of a server that is down."""

    def complain(exchange: ServerSide) -> None:
        exchange.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        exchange.close()

    with (
        FaultServer(lambda request: Answer(), on_accept=complain) as server,
        pytest.raises(TlsError, match="TLS handshake"),
    ):
        Connector(TlsConfig()).open(Origin("https", "127.0.0.1", server.port), 2.0)


def test_connection_lost_during_the_handshake_is_retryable() -> None:
    """It is no verdict on certificates."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        origin = Origin("https", "127.0.0.1", listener.getsockname()[1])

        def accept() -> None:
            with listener.accept()[0] as sock:
                sock.recv(65_536)

        threading.Thread(target=accept, daemon=True).start()
        with pytest.raises(ConnectError, match="within the TLS handshake") as raised:
            Connector(TlsConfig()).open(origin, 2.0)
        assert raised.value.retryable

"""nginx runs in front of servers with the TLS, time limits and upstreams that a test gives it."""

from __future__ import annotations

import http.client
import ssl
import time
from pathlib import Path

import pytest

from tests.support import faults
from tests.support.answers import Answer, always
from tests.support.certificates import CertificateFiles, Certificates
from tests.support.fault_server import FaultServer
from tests.support.nginx import Nginx
from tests.support.sockets import settles

pytestmark = pytest.mark.nginx


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


def tls_status(nginx: Nginx, ca: Path, client: CertificateFiles | None = None) -> int:
    context = ssl.create_default_context(cafile=str(ca))
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    connection = http.client.HTTPSConnection("127.0.0.1", nginx.port, timeout=5.0, context=context)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_good_certificate_is_accepted(certificates: Certificates) -> None:
    """Clients that trust the CA accept the good certificate, others reject it."""
    with (
        FaultServer(always(Answer())) as upstream,
        Nginx([upstream.port], certificate=certificates.good) as nginx,
    ):
        assert tls_status(nginx, certificates.ca) == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            tls_status(nginx, certificates.stranger_ca)


@pytest.mark.parametrize(("name", "reason"), [("expired", "expired"), ("wrong_host", "mismatch")])
def test_a_bad_certificate_is_rejected(certificates: Certificates, name: str, reason: str) -> None:
    """Clients reject the expired certificate as expired, and the other one for its host name."""
    with (
        FaultServer(always(Answer())) as upstream,
        Nginx([upstream.port], certificate=getattr(certificates, name)) as nginx,
        pytest.raises(ssl.SSLCertVerificationError, match=reason),
    ):
        tls_status(nginx, certificates.ca)


def test_a_client_certificate_is_required(certificates: Certificates) -> None:
    """Only clients with a certificate of the right CA reach the upstream."""
    with (
        FaultServer(always(Answer())) as upstream,
        Nginx([upstream.port], certificate=certificates.good, client_ca=certificates.ca) as nginx,
    ):
        assert tls_status(nginx, certificates.ca, certificates.client) == 200
        assert tls_status(nginx, certificates.ca) == 400
        assert tls_status(nginx, certificates.ca, certificates.stranger) == 400
        assert len(upstream.requests) == 1


def test_idle_connections_are_closed_by_nginx() -> None:
    """nginx closes a connection that is idle for its keep-alive time."""
    with FaultServer(always(Answer())) as upstream, Nginx([upstream.port], keep_alive_seconds=0.3) as nginx:
        connection = http.client.HTTPConnection("127.0.0.1", nginx.port, timeout=5.0)
        connection.request("GET", "/")
        connection.getresponse().read()
        started = time.monotonic()
        assert connection.sock.recv(1) == b""
        assert 0.2 <= time.monotonic() - started <= 3.0
        connection.close()


def test_a_dead_upstream_is_502_and_a_slow_one_504() -> None:
    """The status tells the two apart."""
    with (
        faults.refusing_port() as port,
        FaultServer(always(Answer()), faults.silence) as upstream,
        Nginx([upstream.port], read_timeout_seconds=0.3) as nginx,
    ):
        assert plain_status(nginx) == 504
        nginx.reload([port])
        assert plain_status(nginx) == 502


def plain_status(nginx: Nginx, path: str = "/") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", nginx.port, timeout=5.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_reload_changes_the_upstreams() -> None:
    """After ``reload``, new connections reach the new server."""
    with (
        FaultServer(always(Answer(200))) as old,
        FaultServer(always(Answer(201))) as new,
        Nginx([old.port]) as nginx,
    ):
        assert plain_status(nginx) == 200
        nginx.reload([new.port])
        assert plain_status(nginx) == 201


def test_statuses_of_infer_requests_are_counted() -> None:
    """Other requests do not count; ``answer_always`` replaces the server until it is reset."""
    with FaultServer(always(Answer())) as upstream, Nginx([upstream.port], access_log=True) as nginx:
        assert plain_status(nginx, "/v2/models/m/infer") == plain_status(nginx) == 200
        nginx.answer_always(503)
        assert plain_status(nginx, "/v2/models/m/infer") == 503
        nginx.answer_always(None)
        assert plain_status(nginx, "/v2/models/m/infer") == 200
        # nginx writes its log after the answer.
        assert settles(lambda: nginx.statuses().total(), 3) == 3
        assert nginx.statuses() == {200: 2, 503: 1}
        assert len(upstream.requests) == 3


def test_stopping_nginx_leaves_nothing_behind() -> None:
    """Its port refuses connections and its processes have ended."""
    with FaultServer(always(Answer())) as upstream, Nginx([upstream.port]) as nginx:
        workers = nginx.workers
        assert workers
    with pytest.raises(ConnectionRefusedError):
        plain_status(nginx)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)

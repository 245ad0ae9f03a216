"""Connecting through a proxy: its refusals and silences, told apart from the server's."""

from __future__ import annotations

import time
from contextlib import closing

import pytest

from beam_triton.errors import ConnectError, ConnectTimeoutError, ProxyError
from beam_triton.transport.dialing import Dialer
from beam_triton.transport.origin import Origin
from beam_triton.transport.proxies import Proxy
from beam_triton.transport.tunnel import connect_through
from tests.support import faults
from tests.support.answers import Answer
from tests.support.fault_server import Exchange, Fault, FaultServer

SERVER = Origin("https", "triton", 8443)


def scripted(fault: Fault) -> FaultServer:
    """A proxy that plays this for every request."""
    return FaultServer(lambda request: Answer(), fault)


def connect(
    port: int, authorization: str | None = None, seconds: float = 5.0, origin: Origin = SERVER
) -> bytes:
    """What the other end of a tunnel sends first."""
    proxy = Proxy("127.0.0.1", port, authorization)
    with closing(connect_through(proxy, origin, Dialer(), seconds)) as sock:
        return sock.recv(100)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 Connection established\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\nProxy-Agent: x\r\n\r\nhello",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 Fine\r\n\r\nhello",
    ],
)
def test_tunnel_is_opened_and_nothing_of_it_is_lost(answer: bytes) -> None:
    """What follows the answer's head comes from the server."""

    def play(exchange: Exchange) -> None:
        exchange.read_head()
        exchange.send(answer)
        exchange.hold()

    with scripted(play) as server:
        assert connect(server.port, "Basic abc") == b"hello"
        (request,) = server.requests
        assert (request.method, request.target) == ("CONNECT", "triton:8443")
        assert request.header("Host") == "triton:8443"
        assert request.header("Proxy-Authorization") == "Basic abc"


def test_tunnel_to_an_ipv6_address_is_asked_for_in_brackets() -> None:
    """As authorities are written."""
    with scripted(faults.answered(Answer(403))) as server:
        with pytest.raises(ProxyError):
            connect(server.port, origin=Origin("https", "::1", 443))
        assert server.requests[0].target == "[::1]:443"


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (Answer(407, reason="Who?"), ProxyError, "asks for credentials \\(407 Who\\?\\)"),
        (
            Answer(403, reason="Filtered"),
            ProxyError,
            "refuses to connect to https://triton:8443.*403 Filtered",
        ),
        (Answer(502), ConnectError, "cannot connect to https://triton:8443.*502"),
        (Answer(504), ConnectError, "cannot connect to https://triton:8443.*504"),
        (Answer(302), ProxyError, ".*302"),
    ],
)
def test_refusals_say_that_it_was_the_proxy(answer: Answer, kind: type[ConnectError], message: str) -> None:
    """A proxy that cannot reach the server may do so later; what it does not allow is final."""
    with (
        scripted(faults.answered(answer)) as server,
        pytest.raises(kind, match=f"the proxy http://127.0.0.1:{server.port} {message}") as raised,
    ):
        connect(server.port)
    assert type(raised.value) is kind and raised.value.retryable is (kind is ConnectError)


def test_refused_credentials_are_told_from_missing_ones() -> None:
    """And not shown."""
    with scripted(faults.answered(Answer(407))) as server, pytest.raises(ProxyError) as raised:
        connect(server.port, "Basic s3cret")
    assert "refuses the credentials" in str(raised.value) and "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (faults.closed_without_answer, ConnectError, "ended the connection"),
        (faults.reset_after_reading, ConnectError, "ended the connection"),
        (faults.raw_answer(b"HTTP/1.1 200 Con"), ConnectError, "closed within its answer"),
        (faults.raw_answer(b"SSH-2.0-OpenSSH\r\n\r\n"), ProxyError, "named as the proxy .* is none"),
        (faults.raw_answer(b"x" * 70_000), ProxyError, "is none"),
    ],
)
def test_proxy_that_gives_no_answer(fault: Fault, kind: type[ConnectError], message: str) -> None:
    """It closed the connection, or is something else."""
    with scripted(fault) as server, pytest.raises(kind, match=message):
        connect(server.port)


@pytest.mark.parametrize("fault", [faults.silence, faults.trickle(0.1)])
def test_proxy_is_waited_for_within_the_connect_timeout(fault: Fault) -> None:
    """Whether it is silent, or sends a byte now and then."""
    started = time.monotonic()
    with (
        scripted(fault) as server,
        pytest.raises(ConnectTimeoutError, match=r"did not connect .* within 0\.4 s"),
    ):
        connect(server.port, seconds=0.4)
    assert 0.4 <= time.monotonic() - started < 0.9


def test_proxy_that_cannot_be_reached_is_named() -> None:
    """Refused, silent, or unknown: the server behind it is not to blame."""
    with (
        faults.refusing_port() as port,
        pytest.raises(ConnectError, match=f"the proxy http://127.0.0.1:{port}"),
    ):
        connect(port)
    with faults.unanswering_port() as port, pytest.raises(ConnectTimeoutError, match="the proxy"):
        connect(port, seconds=0.3)
    with pytest.raises(ConnectError, match=r"host name of the proxy http://no-such\.invalid:1"):
        connect_through(Proxy("no-such.invalid", 1), SERVER, Dialer(), 5.0)

"""A requests session over the pool: it behaves as users of requests expect."""

from __future__ import annotations

import gzip
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from beam_triton.errors import (
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    DeadlineExceededError,
    PoolTimeoutError,
    RemoteProtocolError,
)
from beam_triton.transport.config import ConnectionPoolConfig, TlsConfig
from beam_triton.transport.reference_counts import Lease
from beam_triton.transport.session import SESSIONS, SessionKey, acquire_session, session_pool
from tests.support import faults, sockets
from tests.support.answers import Answer, Request
from tests.support.fault_server import FaultServer, serve


def origin(request: Request) -> Answer:
    """Echoes the request, or does what the path says."""
    if request.target == "/redirect":
        return Answer(302, b"", (("Location", "/echo"),))
    if request.target == "/gzip":
        return Answer(200, gzip.compress(b"inflated"), (("Content-Encoding", "gzip"),))
    if request.target == "/json":
        return Answer(200, b'{"a": 1}', (("Content-Type", "application/json"), ("X-A", "1"), ("X-A", "2")))
    if request.target == "/missing":
        return Answer(404, b"no such thing", reason="Not Here")
    return Answer(200, request.method.encode() + b" " + request.body)


@pytest.fixture
def lease() -> Iterator[Lease[requests.Session]]:
    lease = acquire_session(ConnectionPoolConfig(max_total=4, max_idle=4), TlsConfig())
    yield lease
    lease.release()


@pytest.fixture
def session(lease: Lease[requests.Session]) -> requests.Session:
    return lease.value


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(origin) as running:
        yield running


def test_all_kinds_of_requests_share_one_connection(session: requests.Session, server: FaultServer) -> None:
    """GET, and POST with each kind of body, parameters, headers and JSON."""
    url = server.endpoint
    assert session.get(url + "/echo?a=b c").content == b"GET "
    assert session.post(url, data=b"bytes").content == b"POST bytes"
    array: Any = bytearray(b"array")
    assert session.post(url, data=array).content == b"POST array"
    assert session.post(url, data="t\u00e9xt").content == "POST t\u00e9xt".encode()
    assert session.post(url, data={"a": "b"}).content == b"POST a=b"
    assert session.post(url, data=iter([b"in ", b"parts"])).content == b"POST in parts"
    assert session.post(url).content == b"POST "
    assert session.put(url, json={"a": 1}).content == b'PUT {"a": 1}'
    answer = session.get(url + "/json", headers={"X-Mine": "yes"})
    assert answer.json() == {"a": 1} and answer.headers["x-a"] == "1, 2"
    assert server.opened == 1
    assert server.requests[0].target == "/echo?a=b%20c"
    last = server.requests[-1]
    assert (last.header("X-Mine"), last.header("Accept-Encoding")) == ("yes", "identity")
    assert last.header("Host") == f"127.0.0.1:{server.port}"


def test_head_has_a_length_and_no_body(session: requests.Session, server: FaultServer) -> None:
    """The connection is reused after it."""
    server.play([faults.raw_answer(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", close=False), serve])
    answer = session.head(server.endpoint, timeout=5)
    assert answer.content == b"" and answer.headers["Content-Length"] == "5"
    assert session.get(server.endpoint).content == b"GET "
    assert server.opened == 1


def test_error_statuses_are_answers(session: requests.Session, server: FaultServer) -> None:
    """``raise_for_status`` raises the error of requests."""
    answer = session.get(server.endpoint + "/missing")
    assert (answer.status_code, answer.reason, answer.ok) == (404, "Not Here", False)
    with pytest.raises(requests.HTTPError):
        answer.raise_for_status()


def test_redirects_are_followed_unless_disabled(session: requests.Session, server: FaultServer) -> None:
    """As requests follows them."""
    assert session.get(server.endpoint + "/redirect", allow_redirects=False).status_code == 302
    answer = session.get(server.endpoint + "/redirect")
    assert answer.content == b"GET " and len(answer.history) == 1


def test_gzip_answers_are_inflated(session: requests.Session, server: FaultServer) -> None:
    """By requests as usual, whole and in pieces."""
    assert session.get(server.endpoint + "/gzip").text == "inflated"
    streamed = session.get(server.endpoint + "/gzip", stream=True)
    assert b"".join(streamed.iter_content(3)) == b"inflated"


def test_headers_of_compressed_answers_are_kept(session: requests.Session, server: FaultServer) -> None:
    """They are those that were sent, also for HEAD."""
    answer = session.get(server.endpoint + "/gzip")
    assert answer.headers["Content-Encoding"] == "gzip"
    assert int(answer.headers["Content-Length"]) == len(gzip.compress(b"inflated"))
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\n"
    server.play([faults.raw_answer(head, close=False)])
    answer = session.head(server.endpoint)
    assert answer.content == b"" and answer.headers["Content-Encoding"] == "gzip"


def test_gzip_bomb_is_not_inflated(session: requests.Session, server: FaultServer) -> None:
    """A compressed answer costs no more memory than an answer may have, whatever it inflates to."""
    server.play(faults.gzip_bomb(1 << 30))
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match="inflates beyond"):
            session.get(server.endpoint)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 100 << 20
    assert session_pool(session).statistics().active == 0


@pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "zstd", "deflate"])
def test_unknown_or_wrong_encoding_raises_remote_protocol_error(
    session: requests.Session, server: FaultServer, encoding: str
) -> None:
    """Unknown, nested, or other than its name: the error names it."""
    body = gzip.compress(b"inflated")
    server.play(faults.answered(Answer(200, body, (("Content-Encoding", encoding),))))
    with pytest.raises(RemoteProtocolError, match=encoding):
        session.get(server.endpoint)


@pytest.mark.parametrize("timeout", [0.3, (0.1, 0.3), (None, 0.3)])
def test_timeout_bounds_the_whole_request(
    session: requests.Session, server: FaultServer, timeout: float | tuple[float | None, float]
) -> None:
    """A server that trickles forever fails at the timeout, and its connection is closed."""
    server.play(faults.trickle(0.05))
    started = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        session.get(server.endpoint, timeout=timeout)
    assert 0.3 <= time.monotonic() - started < 0.8
    assert sockets.settles(lambda: server.open_now, 0) == 0


def test_stale_connection_is_reported_as_stale(session: requests.Session, server: FaultServer) -> None:
    """A reused connection that ends before a byte of the answer was stale, one that ends later was not."""
    server.play([serve, faults.closed_without_answer, serve, faults.truncated(10)])
    assert session.get(server.endpoint).content == b"GET "
    for was_stale in (True, False):
        with pytest.raises(ConnectionLostError) as caught:
            session.get(server.endpoint)
        assert caught.value.was_stale is was_stale
        if was_stale:
            assert session.get(server.endpoint).content == b"GET "


def test_answer_that_is_not_http_raises_remote_protocol_error(
    session: requests.Session, server: FaultServer
) -> None:
    """The error shows the bytes."""
    server.play(faults.garbage_status_line)
    with pytest.raises(RemoteProtocolError, match="SSH"):
        session.get(server.endpoint)


def test_max_total_holds_for_the_session(lease: Lease[requests.Session], server: FaultServer) -> None:
    """Eight threads on four connections: no more are opened, and all are answered."""
    server.play(faults.late(0.05))
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: lease.value.get(server.endpoint).status_code, range(16)))
    assert answers == [200] * 16
    assert server.most_open <= 4


def test_wait_for_a_connection_ends_at_the_timeout(server: FaultServer) -> None:
    """The error names the limit."""
    server.play(faults.late(1.0))
    lease = acquire_session(ConnectionPoolConfig(max_total=1, max_idle=1), TlsConfig())
    thread = threading.Thread(target=lambda: lease.value.get(server.endpoint))
    thread.start()
    assert sockets.settles(lambda: len(server.requests), 1) == 1
    started = time.monotonic()
    with pytest.raises(PoolTimeoutError, match="max_total=1"):
        lease.value.get(server.endpoint, timeout=0.2)
    assert time.monotonic() - started < 0.7
    thread.join()
    lease.release()


def test_failed_requests_leave_no_connection_in_use(server: FaultServer) -> None:
    """Requests that time out or are refused while connecting."""
    lease = acquire_session(ConnectionPoolConfig(connect_timeout_seconds=0.2), TlsConfig())
    with faults.unanswering_port() as silent, faults.refusing_port() as refusing:
        for port in (silent, refusing):
            with pytest.raises(ConnectError):
                lease.value.get(f"http://127.0.0.1:{port}", timeout=1)
    assert sockets.settles(lambda: session_pool(lease.value).statistics().active, 0) == 0
    lease.release()


def test_last_release_closes_sockets_and_thread(server: FaultServer) -> None:
    """The last reference closes the connections and stops the background thread."""
    config, threads = ConnectionPoolConfig(max_total=50), sockets.threads()
    first, second = acquire_session(config, TlsConfig()), acquire_session(config, TlsConfig())
    session = first.value
    assert session is second.value
    session.get(server.endpoint)
    first.release()
    assert session.get(server.endpoint).ok and server.open_now == 1
    second.release()
    assert SESSIONS.reference_count(SessionKey(config, TlsConfig())) == 0
    assert sockets.settles(lambda: server.open_now, 0) == 0
    assert "beam_triton-pool" not in set(sockets.threads()) - set(threads)
    with pytest.raises(ConnectError, match="closed"):
        session.get(server.endpoint)


def test_proxy_of_a_single_request_is_rejected(session: requests.Session, server: FaultServer) -> None:
    """It would be ignored silently; those of other schemes are of no account."""
    with pytest.raises(ConfigurationError, match="proxies"):
        session.get(server.endpoint, proxies={"http": "http://127.0.0.1:9"})
    assert session.get(server.endpoint, proxies={"https": "http://127.0.0.1:9"}).status_code == 200

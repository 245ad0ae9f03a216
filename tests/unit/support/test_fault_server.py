"""Each fault of the fault server, observed with raw sockets and http.client."""

from __future__ import annotations

import gzip
import http.client
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from tests.support import faults, sockets
from tests.support.answers import Answer, always, forward_to
from tests.support.fault_server import Fault, FaultServer, infer_requests, serve

BODY = b"0123456789" * 5
GOOD = Answer(200, BODY, (("Content-Type", "text/plain"),))
ORIGIN = always(GOOD)
REQUEST = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"


@contextmanager
def connected(server: FaultServer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), 5.0) as sock:
        yield sock


def everything(sock: socket.socket) -> bytes:
    """All bytes until FIN; a reset raises."""
    parts = []
    while data := sock.recv(65536):
        parts.append(data)
    return b"".join(parts)


def answer_of_one_request(server: FaultServer) -> bytes:
    """One request's whole answer, until the server ends the connection."""
    with connected(server) as sock:
        sock.sendall(REQUEST)
        return everything(sock)


def read_by_http_client(server: FaultServer) -> tuple[http.client.HTTPResponse, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=5.0)) as connection:
        connection.request("POST", "/v2/models/m/infer", b"body")
        response = connection.getresponse()
        return response, response.read()


def test_requests_are_served_recorded_and_counted() -> None:
    """Two requests on one connection are answered, and counted as one connection with two requests."""
    with FaultServer(ORIGIN) as server:
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5.0)
        for number in range(2):
            client.request("POST", f"/{number}", b"body %d" % number, {"X-Number": str(number)})
            assert client.getresponse().read() == BODY
        assert (server.opened, server.open_now, server.requests_per_connection) == (1, 1, [2])
        client.close()
        assert sockets.settles(lambda: server.open_now, 0) == 0
        assert [(r.method, r.target, r.body, r.header("x-number")) for r in server.requests] == [
            ("POST", "/0", b"body 0", "0"),
            ("POST", "/1", b"body 1", "1"),
        ]


def test_most_connections_open_at_once_are_counted() -> None:
    """Three connections at a time and then one more make four in all and three at most."""
    with FaultServer(ORIGIN) as server:
        with connected(server), connected(server), connected(server):
            assert sockets.settles(lambda: server.open_now, 3) == 3
        assert sockets.settles(lambda: server.open_now, 0) == 0
        assert answer_with_connection_close(server).endswith(BODY)
        assert (server.opened, server.most_open) == (4, 3)


def answer_with_connection_close(server: FaultServer) -> bytes:
    with connected(server) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        return everything(sock)


def test_chunked_request_bodies_are_recorded() -> None:
    """A request body in chunks is put together."""
    with FaultServer(ORIGIN) as server:
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5.0)
        client.request(
            "POST", "/", iter([b"one", b"two"]), {"Transfer-Encoding": "chunked"}, encode_chunked=True
        )
        client.getresponse().read()
        client.close()
        assert server.requests[0].body == b"onetwo"


def test_the_script_is_played_once_and_then_requests_are_served() -> None:
    """Each request takes the next fault; after the last one the origin answers."""
    busy = Answer(503, b"busy")
    with FaultServer(ORIGIN, [faults.answered(busy), serve, faults.answered(busy)]) as server:
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5.0)
        statuses = []
        for _ in range(5):
            client.request("GET", "/")
            response = client.getresponse()
            response.read()
            statuses.append(response.status)
        client.close()
        assert statuses == [503, 200, 503, 200, 200]


def test_only_chosen_requests_take_part_in_the_script() -> None:
    """With ``when`` the other requests are served and use up no fault."""
    with FaultServer(ORIGIN, [faults.answered(Answer(503))], when=infer_requests) as server:
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5.0)
        statuses = []
        for target in ("/v2", "/v2/models/m/infer", "/v2/models/m/infer"):
            client.request("GET", target)
            response = client.getresponse()
            response.read()
            statuses.append(response.status)
        client.close()
        assert statuses == [200, 503, 200]


def test_a_proxy_passes_requests_on_and_damages_real_answers() -> None:
    """The upstream gets the request as it was, and the fault cuts the upstream's answer."""
    with (
        FaultServer(ORIGIN) as upstream,
        FaultServer(forward_to(upstream.port), [serve, faults.truncated_body(3)]) as proxy,
    ):
        assert read_by_http_client(proxy)[1] == BODY
        with pytest.raises(http.client.IncompleteRead) as caught:
            read_by_http_client(proxy)
        assert caught.value.partial == BODY[:-3]
        assert [request.body for request in upstream.requests] == [b"body", b"body"]


def test_a_proxy_without_its_upstream_closes_the_connection() -> None:
    """A dead upstream becomes a closed connection, not an answer."""
    with faults.refusing_port() as port, FaultServer(forward_to(port)) as proxy:
        assert answer_of_one_request(proxy) == b""


def test_a_refusing_port_refuses_connections() -> None:
    """Connecting to a refusing port is refused at once."""
    with faults.refusing_port() as port, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5.0)


def test_an_unanswering_port_answers_no_connection_request() -> None:
    """Connecting to an unanswering port ends with the client's own timeout."""
    with faults.unanswering_port() as port, pytest.raises(TimeoutError):
        socket.create_connection(("127.0.0.1", port), 0.3)


@pytest.mark.parametrize(
    "fault", [faults.silence, faults.deafness, faults.stops_reading(), faults.stalled(0)]
)
def test_silent_faults_send_nothing_and_end_with_the_client(fault: Fault) -> None:
    """No byte arrives within the client's timeout, and the server closes after the client does."""
    with FaultServer(ORIGIN, fault) as server:
        with connected(server) as sock:
            sock.sendall(REQUEST)
            sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                sock.recv(1)
            assert server.open_now == 1
        assert sockets.settles(lambda: server.open_now, 0) == 0


@pytest.mark.parametrize(
    "fault",
    [
        faults.reset_before_reading,
        faults.reset_after_reading,
        faults.reset_after_running,
        faults.reset_within_answer(60),
    ],
)
def test_reset_faults_send_rst(fault: Fault) -> None:
    """The client gets RST, not FIN."""
    with FaultServer(ORIGIN, fault) as server, pytest.raises(ConnectionResetError):
        answer_of_one_request(server)


def test_a_reset_before_reading_leaves_the_request_unread() -> None:
    """A request that was not read is not recorded; one that was reset after reading is."""
    with FaultServer(ORIGIN, [faults.reset_before_reading, faults.reset_after_reading]) as server:
        for _ in range(2):
            with pytest.raises(ConnectionResetError):
                answer_of_one_request(server)
        assert [request.body for request in server.requests] == [b"body"]


def test_a_reset_within_the_answer_delivers_its_first_part() -> None:
    """Exactly the chosen part of the answer arrives before the RST."""
    with FaultServer(ORIGIN, faults.reset_within_answer(60)) as server, connected(server) as sock:
        sock.sendall(REQUEST)
        assert sock.recv(65536) == GOOD.encode()[:60]
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_a_reset_on_accept_needs_no_request() -> None:
    """A connection can be reset before the client has sent anything."""
    with (
        FaultServer(ORIGIN, on_accept=faults.reset_before_reading) as server,
        # Around the connecting, too: the reset may arrive before it returns.
        pytest.raises(ConnectionResetError),
        connected(server) as sock,
    ):
        sock.recv(1)


def test_a_half_closed_connection_still_accepts_bytes() -> None:
    """The client reads the end at once and can continue to send without a reset."""
    with FaultServer(ORIGIN, faults.half_closed_without_answer) as server, connected(server) as sock:
        sock.sendall(REQUEST)
        assert everything(sock) == b""
        for _ in range(3):
            sock.sendall(b"more")
            time.sleep(0.02)
        assert server.open_now == 1


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (faults.closed_without_answer, b""),
        (faults.truncated(30), GOOD.encode()[:30]),
        (faults.truncated_body(2), GOOD.encode()[:-2]),
        (faults.raw_answer(b"anything"), b"anything"),
        (faults.garbage_status_line, b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n\r\n"),
    ],
)
def test_closing_faults_send_these_bytes_and_fin(fault: Fault, expected: bytes) -> None:
    """These bytes arrive, then FIN."""
    with FaultServer(ORIGIN, fault) as server:
        assert answer_of_one_request(server) == expected


def test_a_trickle_sends_byte_by_byte() -> None:
    """The answer is right, and takes the number of steps times the interval."""
    with FaultServer(ORIGIN, faults.trickle(0.05, after_bytes=len(GOOD.encode()) - 6)) as server:
        started = time.monotonic()
        assert read_by_http_client(server)[1] == BODY
        assert time.monotonic() - started >= 0.25


def test_a_late_answer_waits_its_time() -> None:
    """The whole answer arrives, not earlier than the delay."""
    with FaultServer(ORIGIN, faults.late(0.2)) as server:
        started = time.monotonic()
        assert read_by_http_client(server)[1] == BODY
        assert time.monotonic() - started >= 0.2


def test_a_server_that_stops_reading_blocks_the_sender() -> None:
    """Once the kernel's buffers are full the client can send no more."""
    with (
        FaultServer(ORIGIN, faults.stops_reading(10), receive_buffer_bytes=4096) as server,
        connected(server) as sock,
    ):
        sock.settimeout(0.3)
        head = b"POST / HTTP/1.1\r\nContent-Length: 100000000\r\n\r\n"
        with pytest.raises(TimeoutError):
            sock.sendall(head + bytes(100_000_000))


@pytest.mark.parametrize("then_read", [True, False])
def test_an_early_answer_comes_before_the_body_was_sent(then_read: bool) -> None:
    """The answer arrives with most of the body unsent; the rest is then read, or the connection ended."""
    full = Answer(413, b"too large")
    with (
        FaultServer(ORIGIN, [faults.early_answer(full, after_bytes=2, then_read=then_read)]) as server,
        connected(server) as sock,
    ):
        sock.sendall(b"POST / HTTP/1.1\r\nContent-Length: 12\r\n\r\nfour")
        assert sock.recv(65536) == full.encode()
        sock.sendall(b"eightmor")
        if then_read:
            sock.sendall(REQUEST)
            assert sock.recv(65536) == GOOD.encode()
            assert server.requests[0].body == b"foureightmor"
        else:
            with pytest.raises(ConnectionResetError):
                everything(sock)


@pytest.mark.parametrize("value", ["-1", "abc", "99999999999999999999"])
def test_wrong_length_headers_are_sent_as_given(value: str) -> None:
    """Negative, huge and non-numeric lengths reach the wire."""
    with FaultServer(ORIGIN, faults.content_length(value, close=True)) as server:
        head, _, body = answer_of_one_request(server).partition(b"\r\n\r\n")
        assert f"Content-Length: {value}".encode() in head
        assert body == BODY


def test_two_different_lengths_are_both_sent() -> None:
    """Two ``Content-Length`` headers of one answer reach the wire."""
    with FaultServer(ORIGIN, faults.content_length("50", "49", close=True)) as server:
        assert answer_of_one_request(server).count(b"Content-Length: ") == 2


def test_a_length_can_be_wrong_by_some_bytes() -> None:
    """A length too great leaves the reader waiting; one too small leaves bytes on the connection."""
    with FaultServer(ORIGIN, [faults.wrong_content_length(5, close=True)]) as server:
        with pytest.raises(http.client.IncompleteRead):
            read_by_http_client(server)
        server.play([faults.wrong_content_length(-5, close=True)])
        assert answer_of_one_request(server).endswith(b"Content-Length: 45\r\n\r\n" + BODY)


@pytest.mark.parametrize("fault", [faults.endless_header, faults.endless_header_lines, faults.endless_body])
def test_endless_faults_send_until_the_client_closes(fault: Fault) -> None:
    """Megabytes arrive, and the server closes after the client does."""
    with FaultServer(ORIGIN, fault) as server:
        with connected(server) as sock:
            sock.sendall(REQUEST)
            received = 0
            while received < 5_000_000:
                received += len(sock.recv(1 << 20))
        assert sockets.settles(lambda: server.open_now, 0) == 0


def test_encodings_can_be_right_or_wrong() -> None:
    """A plain body can have a wrong ``Content-Encoding``; ``gzipped`` does compress."""
    with FaultServer(ORIGIN, [faults.with_headers(("Content-Encoding", "gzip")), faults.gzipped]) as server:
        (wrong, plain), (right, compressed) = read_by_http_client(server), read_by_http_client(server)
        assert wrong.getheader("Content-Encoding") == right.getheader("Content-Encoding") == "gzip"
        assert plain == BODY
        assert gzip.decompress(compressed) == BODY


def test_a_gzip_bomb_is_small_and_valid() -> None:
    """The bomb is about a thousandth of its contents, one valid gzip member with the right checksum."""
    with FaultServer(ORIGIN, faults.gzip_bomb(32 << 20)) as server:
        body = read_by_http_client(server)[1]
        assert len(body) < (32 << 20) / 500
        assert zlib.decompress(body, wbits=31) == bytes(32 << 20)


def test_chunked_answers_are_well_formed_unless_broken() -> None:
    """The chunks decode to the body; a cut ending is broken."""
    with FaultServer(ORIGIN, [faults.chunked(), faults.chunked(ending=b"5\r\nab", close=True)]) as server:
        assert read_by_http_client(server)[1] == BODY
        with pytest.raises(http.client.IncompleteRead):
            read_by_http_client(server)


def test_informational_answers_come_before_the_right_one() -> None:
    """Two 103s, then the answer; 1xx carry no length."""
    with FaultServer(ORIGIN, faults.informational_first(103, 2)) as server, connected(server) as sock:
        sock.sendall(REQUEST)
        received = sock.recv(65536)
        assert received.count(b"HTTP/1.1 103 ") == 2
        assert received.count(b"Content-Length") == 1
        assert received.endswith(BODY)


def test_a_close_delimited_answer_has_no_length() -> None:
    """The body ends with the connection, and no header gives its length."""
    with FaultServer(ORIGIN, faults.close_delimited) as server:
        received = answer_of_one_request(server)
        assert b"content-length" not in received.lower()
        assert b"transfer-encoding" not in received.lower()
        assert received.endswith(b"\r\n\r\n" + BODY)


@pytest.mark.parametrize("status", [204, 304, 302])
def test_answers_in_place_of_the_origins(status: int) -> None:
    """Any status and headers can be answered, and the connection serves on."""
    answer = Answer(status, headers=(("Location", "http://elsewhere.example/"),))
    with FaultServer(ORIGIN, [faults.answered(answer)]) as server:
        response, _ = read_by_http_client(server)
        assert (response.status, response.getheader("Location")) == (status, "http://elsewhere.example/")
        assert read_by_http_client(server)[1] == BODY


def test_unsolicited_bytes_follow_the_answer() -> None:
    """Bytes of no request arrive on a connection that stays open."""
    with (
        FaultServer(ORIGIN, faults.unsolicited_after_answer(b"surprise", after_seconds=0.05)) as server,
        connected(server) as sock,
    ):
        sock.sendall(REQUEST)
        assert sock.recv(65536) == GOOD.encode()
        assert sock.recv(65536) == b"surprise"
        assert server.open_now == 1


def test_connections_close_after_so_many_requests() -> None:
    """The last request is answered, then the connection closes without an announcement."""
    with FaultServer(ORIGIN, requests_per_connection_limit=2) as server, connected(server) as sock:
        sock.sendall(REQUEST)
        assert sock.recv(65536) == GOOD.encode()
        sock.sendall(REQUEST)
        assert everything(sock) == GOOD.encode()


def test_connections_close_after_an_idle_time() -> None:
    """An idle connection is closed after its time, after the farewell that some proxies send."""
    farewell = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n\r\n"
    with FaultServer(ORIGIN, idle_seconds=0.2, idle_farewell=farewell) as server, connected(server) as sock:
        sock.sendall(REQUEST)
        assert sock.recv(65536) == GOOD.encode()
        started = time.monotonic()
        assert everything(sock) == farewell
        assert 0.1 <= time.monotonic() - started <= 2.0


def test_all_connections_can_be_dropped_at_once() -> None:
    """``drop_connections`` closes open connections and the server accepts new ones."""
    with FaultServer(ORIGIN) as server:
        with connected(server) as first, connected(server) as second:
            assert sockets.settles(lambda: server.open_now, 2) == 2
            server.drop_connections()
            assert everything(first) == everything(second) == b""
        assert answer_with_connection_close(server).endswith(BODY)


def test_closing_the_server_ends_threads_and_sockets() -> None:
    """Whatever its connections do, no thread or socket stays after the ``with`` block."""
    threads, files = sockets.threads(), sockets.open_files()
    with FaultServer(ORIGIN, [faults.silence, faults.trickle(60.0), faults.endless_body]) as server:
        clients = [socket.create_connection(("127.0.0.1", server.port), 5.0) for _ in range(4)]
        for client in clients[:3]:
            client.sendall(REQUEST)
        assert sockets.settles(lambda: len(server.requests), 3) == 3
    for client in clients:
        client.close()
    assert (sockets.threads(), sockets.open_files()) == (threads, files)

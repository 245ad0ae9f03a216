"""One exchange, with the server's bytes scripted."""

from __future__ import annotations

import gc
import socket
import threading
import time

import numpy as np
import pytest

from beam_triton.errors import ConnectionLostError, RemoteProtocolError
from beam_triton.transport.exchange import WANT_READ, WANT_WRITE
from beam_triton.transport.response_head import MAX_HEAD_BYTES
from tests.support.socket_pair_exchange import Hangs, SocketPair, outcome_of, play

OK = b"HTTP/1.1 200 OK\r\n"


def sized(body: bytes) -> bytes:
    return OK + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def in_bytes(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


@pytest.mark.parametrize(
    ("answer", "body", "reusable"),
    [
        (sized(b"abc"), b"abc", True),
        (sized(b""), b"", True),
        (OK + b"Content-Length: 3, 3\r\n\r\nabc", b"abc", True),
        (OK + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", b"abc", True),
        (OK + b"content-length:3\r\nCONNECTION: Keep-Alive\r\n\r\nabc", b"abc", True),
        (OK + b"Content-Length: 3\r\nConnection: x, Close\r\n\r\nabc", b"abc", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\nConnection: keep-alive\r\n\r\nabc", b"abc", True),
        (OK + b"Transfer-Encoding: Chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", b"abc", True),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n3;x\r\nabc\r\n1 \r\nd\r\n0\r\nA: b\r\n\r\n", b"abcd", True),
        (OK + b"Transfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n1\r\na\r\n0\r\n\r\n", b"a", False),
        (OK + b"\r\nabc", b"abc", False),
        (OK + b"Content-Length: 3\r\n\nabc", b"abc", True),
        (OK + b"Content-Length: 3\n\r\nabc", b"abc", True),
        (b"HTTP/1.1 200 OK\nContent-Length: 3\n\nabc", b"abc", True),
        (b"HTTP/1.1 200\r\nContent-Length: 3\r\n\r\nabc", b"abc", True),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\n", b"", True),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n", b"", True),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + sized(b"abc"), b"abc", True),
        (b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 \r\n\r\n" + sized(b"abc"), b"abc", True),
        (b"HTTP/1.1 102 \r\nTransfer-Encoding: gzip\r\n\r\n" + sized(b"abc"), b"abc", True),
        (
            b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"1\r\na\r\n0\r\n\r\n",
            b"a",
            False,
        ),
        (sized(b"abc") + b"surplus", b"abc", False),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nsurplus", b"", False),
    ],
)
def test_well_formed_answers_are_read(answer: bytes, body: bytes, reusable: bool) -> None:
    """Each legal form of an answer gives its body, and whether the connection can be reused."""
    for pieces in ([answer], in_bytes(answer)):
        exchange = play(pieces)
        assert bytes(exchange.body) == body
    # Only an answer in one piece is read together with what follows it.
    assert play([answer]).reusable is reusable


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        OK + b"no colon\r\n\r\n",
        OK + b": no name\r\n\r\n",
        OK + b"Space : before colon\r\n\r\n",
        OK + b"Folded: a\r\n b\r\n\r\n",
        OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        OK + b"Content-Length: -3\r\n\r\nabc",
        OK + b"Content-Length: +3\r\n\r\nabc",
        OK + b"Content-Length: 3.0\r\n\r\nabc",
        OK + b"Content-Length: \xb3\r\n\r\nabc",
        OK + b"Content-Length: %b\r\n\r\nabc" % (b"9" * 5000),
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: identity\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n\r\nabc",
        OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 16 + b"\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 70_000,
        OK + b"X: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n",
    ],
)
def test_malformed_answers_raise_remote_protocol_error(answer: bytes) -> None:
    """A malformed length is never guessed."""
    with pytest.raises(RemoteProtocolError):
        play([answer], closes=False)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HT",
        OK,
        OK + b"Content-Length: 3\r\n",
        OK + b"Content-Length: 3\r\n\r\nab",
        OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nab",
        OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
    ],
)
def test_truncated_answers_raise_connection_lost(answer: bytes) -> None:
    """The error says how many bytes had arrived."""
    with pytest.raises(ConnectionLostError, match=rf"{len(answer)} bytes"):
        play([answer])


@pytest.mark.parametrize("answer", [OK, sized(b"abc")[:-1], OK + b"\r\nabc"])
def test_unfinished_answer_is_waited_for(answer: bytes) -> None:
    """No answer counts as complete while the connection is open and more may come."""
    with pytest.raises(Hangs):
        play([answer], closes=False)


def test_answer_to_head_has_no_body() -> None:
    """It ends with its head, whatever length it declares."""
    exchange = play([OK + b"Content-Length: 1000\r\n\r\n"], closes=False, expects_body=False)
    assert outcome_of(exchange).body == b""
    assert exchange.reusable


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Content-Length: 11\r\n\r\n",
        OK + b"\r\n" + b"x" * 11,
        OK + b"Transfer-Encoding: chunked\r\n\r\nb\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n6\r\nabcdef\r\n5\r\n",
    ],
)
def test_answer_above_max_response_bytes_is_refused(answer: bytes) -> None:
    """One byte too many is refused, however the length becomes known."""
    with pytest.raises(RemoteProtocolError, match="max_response_bytes=10"):
        play([answer], max_response_bytes=10)


def test_answer_of_max_response_bytes_is_accepted() -> None:
    """Exactly ``max_response_bytes`` are accepted."""
    assert outcome_of(play([sized(b"x" * 10)], max_response_bytes=10)).body == b"x" * 10


@pytest.mark.parametrize("length", [10**17, (1 << 62) - 1])
def test_length_beyond_memory_raises_remote_protocol_error(length: int) -> None:
    """A length that exceeds any memory is the server's error, not a ``MemoryError``."""
    with pytest.raises(RemoteProtocolError, match=str(length)):
        play([OK + b"Content-Length: %d\r\n\r\n" % length], max_response_bytes=1 << 63)


def test_thousands_of_interim_answers_are_skipped() -> None:
    """Interim answers are skipped without recursion, whatever their number."""
    interim = b"HTTP/1.1 100 \r\n\r\n" * 20_000
    pieces = [interim[i : i + 60_000] for i in range(0, len(interim), 60_000)]
    assert outcome_of(play([*pieces, sized(b"abc")])).body == b"abc"


@pytest.mark.parametrize(
    ("head", "flood"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"Trailer: x\r\n"),
        (OK + b"\r\n", b"x"),
        (OK + b"Content-Length: %d\r\n\r\n" % (1 << 30), b"x"),
    ],
)
def test_flood_returns_to_the_caller_regularly(head: bytes, flood: bytes) -> None:
    """``advance`` returns regularly while the peer sends without pause, so that deadlines are checked."""
    block = flood * (1_000_000 // len(flood))
    stop = threading.Event()

    def pour(sock: socket.socket) -> None:
        try:
            sock.sendall(head)
            while not stop.is_set():
                sock.sendall(block)
        except OSError:
            return

    with SocketPair() as pair:
        exchange = pair.exchange(max_response_bytes=1 << 41)
        thread = threading.Thread(target=pour, args=(pair.server,))
        thread.start()
        try:
            deadline = time.monotonic() + 0.15
            while time.monotonic() < deadline:
                started = time.monotonic()
                assert exchange.advance() & WANT_READ
                assert time.monotonic() - started < 0.4
        finally:
            stop.set()
            pair.client.close()
            thread.join(5)
    assert exchange.bytes_received > 0


def test_fast_reading_peer_returns_to_the_caller_regularly() -> None:
    """A peer that reads a large request as fast as it is sent does not keep the caller from its deadlines."""
    body = memoryview(np.zeros(64 << 20, np.uint8).data).cast("B")
    received = 0
    with SocketPair() as pair:
        exchange = pair.exchange([b"POST / HTTP/1.1\r\n\r\n", body])

        def take() -> None:
            nonlocal received
            while data := pair.server.recv(1 << 20):
                received += len(data)
                if received == len(body) + 19:
                    pair.server.sendall(sized(b"done"))

        thread = threading.Thread(target=take)
        thread.start()
        turns = 0
        while exchange.advance():
            turns += 1
        pair.client.close()
        thread.join(5)
    assert bytes(exchange.body) == b"done"
    assert exchange.reusable
    assert turns > 3


def test_many_small_parts_are_sent_in_order() -> None:
    """More parts than one system call takes, some of them empty, arrive whole and in order."""
    parts: list[bytes | bytearray | memoryview] = [b"%05d" % i if i % 7 else b"" for i in range(5000)]
    expected = b"".join(parts)
    with SocketPair() as pair:
        exchange = pair.exchange(parts)
        received = b""
        while len(received) < len(expected):
            assert exchange.advance()
            received += pair.server.recv(65536)
        pair.server.sendall(sized(b"ok"))
        while exchange.advance():
            pass
    assert received == expected
    assert exchange.reusable


def test_early_answer_stops_the_upload() -> None:
    """An answer in the middle of a large upload is read; the connection is not reused."""
    with SocketPair() as pair:
        exchange = pair.exchange([bytes(8 << 20)])
        assert exchange.advance() == WANT_READ | WANT_WRITE
        pair.server.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        assert exchange.advance() == 0
    assert exchange.head is not None and exchange.head.status == 413
    assert not exchange.reusable


def test_early_answer_is_read_before_the_connection_loss() -> None:
    """An answer sent before the server closed the connection, with the body unread, is returned."""
    with SocketPair() as pair:
        pair.server.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
        pair.server.close()
        exchange = pair.exchange([bytes(8 << 20)])
        assert exchange.advance() == 0
    assert exchange.head is not None and exchange.head.status == 503
    assert not exchange.reusable


def test_unsent_request_raises_connection_lost() -> None:
    """A connection that is closed before the first byte is sent is lost, with nothing received."""
    with SocketPair() as pair:
        pair.server.close()
        exchange = pair.exchange()
        with pytest.raises(ConnectionLostError):
            while exchange.advance():
                pass
    assert exchange.bytes_received == 0


def test_request_parts_are_not_modified() -> None:
    """The caller's parts stay as they were, so that they can be sent again."""
    parts: list[bytes | bytearray | memoryview] = [b"head", memoryview(b"b" * (4 << 20))]
    with SocketPair() as pair:
        pair.exchange(parts).advance()
    assert [len(part) for part in parts] == [4, 4 << 20]


@pytest.mark.parametrize(
    "answer",
    [sized(b"abc"), OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", OK + b"\r\nabc"],
)
def test_exchanges_are_freed_without_the_garbage_collector(answer: bytes) -> None:
    """No cycle keeps an answer alive: it is freed with the last reference to it."""
    gc.collect()
    gc.disable()
    try:
        play([answer])
        assert gc.collect() == 0
    finally:
        gc.enable()

"""The faults that ``FaultServer`` plays. Most of them damage the good answer of the server's origin.

``after_bytes`` counts bytes of the whole answer, its head included, unless the fault says otherwise.
"""

from __future__ import annotations

import gzip
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from tests.support.answers import Answer
from tests.support.fault_server import Exchange, Fault


@contextmanager
def refusing_port() -> Iterator[int]:
    """A port that refuses every connection; it is bound, so that no other process gets it."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@contextmanager
def unanswering_port(host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A port that drops connection requests, as a firewall does: its accept queue is full."""
    with socket.socket() as listener, socket.socket() as occupant:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(0)
        occupant.connect(listener.getsockname())
        yield listener.getsockname()[1]


def silence(exchange: Exchange) -> None:
    """Reads the whole request and sends nothing until the client closes."""
    exchange.request()
    exchange.hold()
    exchange.close()


def deafness(exchange: Exchange) -> None:
    """Neither reads nor sends anything until the client closes."""
    exchange.hold()
    exchange.close()


def reset_before_reading(exchange: Exchange) -> None:
    """RST while the request is unread."""
    exchange.reset()


def reset_after_reading(exchange: Exchange) -> None:
    """RST after the request was read, without a byte of an answer."""
    exchange.request()
    exchange.reset()


def reset_after_running(exchange: Exchange) -> None:
    """RST after the origin has run the request, without a byte of its answer."""
    exchange.answer()
    exchange.reset()


def reset_within_answer(after_bytes: int) -> Fault:
    """RST after a part of the answer, which the client's kernel has time to receive."""

    def play(exchange: Exchange) -> None:
        exchange.send(exchange.answer().encode()[:after_bytes])
        exchange.hold(0.05)
        exchange.reset()

    return play


def closed_without_answer(exchange: Exchange) -> None:
    """Closes the connection after the request was read."""
    exchange.request()
    exchange.close()


def half_closed_without_answer(exchange: Exchange) -> None:
    """FIN after the request was read; the server continues to read until the client closes."""
    exchange.request()
    exchange.half_close()
    exchange.hold()


def truncated(after_bytes: int) -> Fault:
    """FIN after a part of the answer."""

    def play(exchange: Exchange) -> None:
        exchange.send(exchange.answer().encode()[:after_bytes])
        exchange.close()

    return play


def truncated_body(missing_bytes: int = 1) -> Fault:
    """FIN before the last bytes of the answer."""

    def play(exchange: Exchange) -> None:
        exchange.send(exchange.answer().encode()[:-missing_bytes])
        exchange.close()

    return play


def stalled(after_bytes: int) -> Fault:
    """A part of the answer, then nothing until the client closes."""

    def play(exchange: Exchange) -> None:
        exchange.send(exchange.answer().encode()[:after_bytes])
        exchange.hold()
        exchange.close()

    return play


def trickle(interval_seconds: float = 1.0, *, after_bytes: int = 0, step_bytes: int = 1) -> Fault:
    """The right answer, its bytes after ``after_bytes`` sent ``step_bytes`` at a time."""

    def play(exchange: Exchange) -> None:
        data = exchange.answer().encode()
        if after_bytes:
            exchange.send(data[:after_bytes])
        for start in range(after_bytes, len(data), step_bytes):
            exchange.send(data[start : start + step_bytes])
            if exchange.hold(interval_seconds):
                exchange.close()
                return

    return play


def late(seconds: float) -> Fault:
    """The right answer, ``seconds`` later."""

    def play(exchange: Exchange) -> None:
        answer = exchange.answer()
        if exchange.hold(seconds):
            exchange.close()
        else:
            exchange.send(answer.encode())

    return play


def stops_reading(after_bytes: int = 0) -> Fault:
    """Reads the head and ``after_bytes`` of the body, and no more until the client closes.

    The client notices it when the kernel's buffers are full: use ``receive_buffer_bytes`` and a large body.
    """

    def play(exchange: Exchange) -> None:
        exchange.read_some_body(after_bytes)
        exchange.hold()
        exchange.close()

    return play


def early_answer(answer: Answer, *, after_bytes: int = 0, then_read: bool) -> Fault:
    """Answers while the client still sends the body, then reads the rest of it, or closes without reading."""

    def play(exchange: Exchange) -> None:
        exchange.read_some_body(after_bytes)
        exchange.send(answer.encode())
        if then_read:
            exchange.request()
        else:
            # A close with unread bytes is a reset, which must not overtake the answer.
            exchange.hold(0.2)
            exchange.close()

    return play


def answered(answer: Answer) -> Fault:
    """This answer in place of the origin's, which does not run."""

    def play(exchange: Exchange) -> None:
        exchange.request()
        exchange.send(answer.encode())

    return play


def raw_answer(data: bytes, *, close: bool = True) -> Fault:
    """These bytes in place of an answer."""

    def play(exchange: Exchange) -> None:
        exchange.request()
        exchange.send(data)
        if close:
            exchange.close()

    return play


def content_length(*values: str, close: bool) -> Fault:
    """The right body with these ``Content-Length`` headers; then closes, or keeps the connection open."""

    def play(exchange: Exchange) -> None:
        _send_with_lengths(exchange, exchange.answer(), values, close)

    return play


def wrong_content_length(difference: int, *, close: bool) -> Fault:
    """The right body with a ``Content-Length`` that is wrong by ``difference`` bytes."""

    def play(exchange: Exchange) -> None:
        answer = exchange.answer()
        _send_with_lengths(exchange, answer, (str(len(answer.body) + difference),), close)

    return play


def garbage_status_line(exchange: Exchange) -> None:
    """Bytes that are not HTTP, then the end of the connection."""
    raw_answer(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n\r\n")(exchange)


def endless_header(exchange: Exchange) -> None:
    """A header line that never ends, sent as fast as the client reads."""
    exchange.request()
    exchange.send(b"HTTP/1.1 200 OK\r\nX-Endless: ")
    while True:
        exchange.send(b"a" * 65536)


def endless_header_lines(exchange: Exchange) -> None:
    """A head of short lines that never ends."""
    exchange.request()
    exchange.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        exchange.send(b"X-Endless: a\r\n" * 4096)


def endless_body(exchange: Exchange) -> None:
    """A body without a length that never ends, sent as fast as the client reads."""
    exchange.request()
    exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n\r\n")
    while True:
        exchange.send(bytes(65536))


def with_headers(*headers: tuple[str, str]) -> Fault:
    """The right body with additional headers, such as a wrong ``Content-Encoding``."""

    def play(exchange: Exchange) -> None:
        answer = exchange.answer()
        exchange.send(replace(answer, headers=(*answer.headers, *headers)).encode())

    return play


def gzipped(exchange: Exchange) -> None:
    """The right answer, compressed with gzip whether the client accepts it or not."""
    answer = exchange.answer()
    headers = (*answer.headers, ("Content-Encoding", "gzip"))
    exchange.send(replace(answer, body=gzip.compress(answer.body), headers=headers).encode())


def gzip_bomb(inflated_bytes: int) -> Fault:
    """A valid gzip body of zeros, about a thousandth of its inflated size (whole MiBs)."""
    body = _gzip_of_zeros(inflated_bytes >> 20)

    def play(exchange: Exchange) -> None:
        exchange.request()
        headers = (("Content-Type", "application/octet-stream"), ("Content-Encoding", "gzip"))
        exchange.send(Answer(200, body, headers).encode())

    return play


def chunked(*, chunk_bytes: int = 7, ending: bytes = b"0\r\n\r\n", close: bool = False) -> Fault:
    """The right body in chunks; an ``ending`` other than the default breaks it."""

    def play(exchange: Exchange) -> None:
        answer = exchange.answer().without("Content-Length")
        head = replace(answer, headers=(*answer.headers, ("Transfer-Encoding", "chunked"))).head()
        chunks = (
            answer.body[start : start + chunk_bytes] for start in range(0, len(answer.body), chunk_bytes)
        )
        body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
        exchange.send(head + body + ending)
        if close:
            exchange.close()

    return play


def informational_first(status: int = 103, count: int = 1) -> Fault:
    """Interim answers before the right one."""

    def play(exchange: Exchange) -> None:
        interim = Answer(status, headers=(("Link", "</>; rel=preload"),)).encode()
        exchange.send(interim * count + exchange.answer().encode())

    return play


def close_delimited(exchange: Exchange) -> None:
    """The right body without a length: the end of the connection ends it."""
    answer = exchange.answer().without("Content-Length", "Connection")
    head = replace(answer, headers=(*answer.headers, ("Transfer-Encoding", "identity"))).head()
    exchange.send(head.replace(b"Transfer-Encoding: identity\r\n", b"Connection: close\r\n") + answer.body)
    exchange.close()


def unsolicited_after_answer(data: bytes, *, after_seconds: float = 0.0) -> Fault:
    """The right answer, then bytes that answer no request, on a connection that stays open."""

    def play(exchange: Exchange) -> None:
        exchange.send(exchange.answer().encode())
        exchange.hold(after_seconds)
        exchange.send(data)

    return play


def _send_with_lengths(exchange: Exchange, answer: Answer, lengths: tuple[str, ...], close: bool) -> None:
    headers = answer.without("Content-Length").headers
    headers = (*headers, *(("Content-Length", length) for length in lengths))
    exchange.send(replace(answer, headers=headers).encode())
    if close:
        exchange.close()


def _gzip_of_zeros(mebibytes: int) -> bytes:
    """One gzip member whose deflate blocks repeat, which makes it cheap to build."""
    block = bytes(1 << 20)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    repeated = deflate.compress(block) + deflate.flush(zlib.Z_FULL_FLUSH)
    checksum = 0
    for _ in range(mebibytes):
        checksum = zlib.crc32(block, checksum)
    header = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff"
    trailer = checksum.to_bytes(4, "little") + ((mebibytes << 20) & 0xFFFFFFFF).to_bytes(4, "little")
    return header + repeated * mebibytes + deflate.flush(zlib.Z_FINISH) + trailer

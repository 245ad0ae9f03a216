"""Server-sent events out of bodies that come in any pieces."""

from __future__ import annotations

import math
import socket
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.errors import ConnectionLostError
from beam_triton.transport.event_stream import EventStream, StreamLimits
from tests.support.socket_pair_exchange import SocketPair

BODY = (
    ": a comment\r\ndata: one\n\nid: 7\rdata:two\r\rdata: x\r\ndata: é\r\n\r\nevent: e\n\ndata\n\n".encode()
)
EVENTS = ["one", "two", "x\né"]


def stream_of(*pieces: bytes) -> EventStream:
    stream = EventStream(StreamLimits(), 0.0)
    for piece in pieces:
        stream.feed(piece, 0.0)
    return stream


@given(st.lists(st.integers(0, len(BODY))))
def test_events_are_the_same_in_whatever_pieces_they_come(cuts: list[int]) -> None:
    """Every line ending, comments, other fields, several lines of data, and an event without any."""
    bounds = [0, *sorted(cuts), len(BODY)]
    stream = stream_of(*(BODY[start:stop] for start, stop in pairwise(bounds)))
    assert stream.events == [*EVENTS, ""]
    assert not stream.is_within_event


def test_a_byte_order_mark_and_broken_utf8_are_no_errors() -> None:
    """The standard ignores the one and replaces the other."""
    assert stream_of(b"\xef\xbb\xbfdata: a\n\ndata: \xff\n\n").events == ["a", "\ufffd"]


@pytest.mark.parametrize("rest", [b"d", b"data: on", b"data: one\n", b"data: one\r"])
def test_half_an_event_is_known_to_be_half(rest: bytes) -> None:
    """It is no event, and the stream says so."""
    stream = stream_of(b"data: one\n\n", rest)
    assert stream.events == ["one"] and stream.is_within_event


def test_half_a_comment_is_not_missed() -> None:
    """Nothing is lost with it."""
    assert not stream_of(b"data: one\n\n: stay al").is_within_event


def test_events_put_the_deadline_off_and_comments_do_not() -> None:
    """The first one is due by its own limit, each further one after the last."""
    stream = EventStream(StreamLimits(first_token_seconds=5, between_tokens_seconds=2), 10.0)
    assert stream.due_at == 15
    assert not stream.feed(b": alive\n\n", 14.0) and stream.due_at == 15
    assert stream.feed(b"data: a\n\n", 14.0) and stream.due_at == 16
    assert not stream.feed(b": alive\n\n", 15.0) and stream.due_at == 16
    assert stream.feed(b"data: b\n\ndata: c\n\n", 15.5)
    assert (stream.first_at, stream.last_at, stream.due_at) == (14, 15.5, 17.5)
    assert EventStream(StreamLimits(), 0.0).due_at == math.inf


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_events_are_read_while_the_body_comes(framing: str) -> None:
    """Each event is there as soon as its bytes are, however the body is delimited."""
    head = {
        "chunked": b"Transfer-Encoding: chunked\r\n",
        "length": b"Content-Length: 26\r\n",
        "close": b"Connection: close\r\n",
    }[framing]
    with SocketPair() as pair:
        exchange = pair.exchange()
        exchange.stream = EventStream(StreamLimits(), 0.0)
        exchange.advance()
        pair.server.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n")
        pair.server.sendall(head + b"\r\n")
        for number, piece in enumerate([b"data: first\n\n", b"data: later\n\n"], start=1):
            pair.server.sendall(b"d\r\n%b\r\n" % piece if framing == "chunked" else piece)
            waits = exchange.advance()
            if waits and len(exchange.stream.events) < number:
                waits = exchange.advance()
            assert exchange.feed_stream(1.0)
            assert len(exchange.stream.events) == number
        if framing == "chunked":
            pair.server.sendall(b"0\r\n\r\n")
        pair.server.shutdown(socket.SHUT_WR)
        if waits:
            assert exchange.advance() == 0
        assert not exchange.feed_stream(2.0)
        assert exchange.stream.events == ["first", "later"]


def test_events_before_a_cut_are_kept() -> None:
    """What came in the last packet before the connection ended is read."""
    with SocketPair() as pair:
        exchange = pair.exchange()
        exchange.stream = EventStream(StreamLimits(), 0.0)
        exchange.advance()
        pair.server.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 99\r\n\r\n"
        )
        pair.server.sendall(b"data: a\n\ndata: b")
        pair.server.close()
        with pytest.raises(ConnectionLostError):
            while True:
                exchange.advance()
        assert exchange.feed_stream(1.0)
        assert exchange.stream.events == ["a"] and exchange.stream.is_within_event


def test_the_body_of_an_error_is_no_stream() -> None:
    """A refusal that comes as an event does not make a generation look started."""
    with SocketPair() as pair:
        exchange = pair.exchange()
        exchange.stream = EventStream(StreamLimits(), 0.0)
        exchange.advance()
        body = b'data: {"error":"no"}\n\n'
        pair.server.sendall(b"HTTP/1.1 400 Bad\r\nContent-Type: text/event-stream\r\n")
        pair.server.sendall(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        while exchange.advance():
            pass
        assert not exchange.feed_stream(1.0) and bytes(exchange.body) == body

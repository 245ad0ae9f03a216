"""One HTTP/1.1 exchange on a connected, non-blocking socket, as a state machine (RFC 9112).

``http.client`` spends four fifths of a small request on header objects, sends head and body separately, and
can only block, so that a trickling peer stretches every timeout (figures: docs/performance.md,
docs/reliability.md). Here the request leaves in one gathering send, the answer's body is read into one
buffer, and the caller waits between two steps, so that its deadline holds whatever the peer does.

``advance`` does what is possible without waiting and returns the poll events to wait for. It knows nothing of
time, pools or tensors.
"""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Sequence

import numpy as np

from beam_triton.errors import ConnectionLostError, RemoteProtocolError, TlsError, TransportError
from beam_triton.transport.event_stream import EventStream
from beam_triton.transport.response_body import ChunkedBody
from beam_triton.transport.response_head import MAX_HEAD_BYTES, ResponseHead, parse_response_head

WANT_READ = select.POLLIN
WANT_WRITE = select.POLLOUT
_FIRST_READ_BYTES = 65_536
_READ_BYTES = 262_144
# A peer that sends, or reads, as fast as this side can must not keep the caller from its clock: `advance`
# returns after so many calls, and after one read of unknown length, which may hold thousands of tiny chunks.
_MAX_CALLS_PER_ADVANCE = 16
# Linux takes at most 1,024 buffers in one call (IOV_MAX).
_MAX_BUFFERS = 1_024
# How the first frame of an HTTP/2 server begins, after its length: a gRPC server sends it to everybody.
_HTTP2_SETTINGS = b"\x04\x00\x00\x00\x00\x00"
# TLS has no gathering send; parts below this are copied together to fill its 16 KiB records.
_TLS_JOIN_BYTES = 262_144

Buffer = bytes | bytearray | memoryview

_NOTHING = memoryview(b"")


class Exchange:
    """A request being sent and its answer being received.

    Attributes:
        head: the answer's head, once it is complete.
        body: the answer's body, once ``advance`` has returned 0: 1-D bytes.
        bytes_received: bytes of the answer so far; 0 means that a reused connection may have been stale.
        reusable: the connection can carry another exchange.
        stream: gets the events of an answer that is a stream of them, by `feed_stream`.
    """

    head: ResponseHead | None = None
    body = _NOTHING
    bytes_received = 0
    reusable = False
    stream: EventStream | None = None
    _fed_bytes = 0
    _answer: memoryview | None = None
    _chunked: ChunkedBody | None = None
    _filled = 0
    _sending = True

    def __init__(
        self,
        sock: socket.socket,
        parts: Sequence[Buffer],
        *,
        max_response_bytes: int,
        expects_body: bool = True,
    ) -> None:
        self._socket = sock
        self._is_tls = isinstance(sock, ssl.SSLSocket)
        self._pending: list[Buffer] = _joined(parts) if self._is_tls else list(parts)
        self._max_response_bytes = max_response_bytes
        self._expects_body = expects_body
        self._pieces = bytearray()

    def advance(self) -> int:
        """Send and receive what is possible without waiting.

        Returns:
            0 when the answer is complete, otherwise the poll events to wait for.

        Raises:
            ConnectionLostError: the connection ended before the answer was complete.
            RemoteProtocolError: the answer is not HTTP/1.1, larger than ``max_response_bytes``, or too
                large for this machine's memory.
            TlsError: the server refused the client's certificate.
        """
        try:
            events = 0
            if self._sending:
                events = self._send()
                if not self._pending:
                    return WANT_READ
            return self._receive(events)
        except ssl.SSLError as error:
            raise _tls_error(error) from error
        except OSError as error:
            raise self._lost(error.strerror or str(error)) from error
        except MemoryError as error:
            raise RemoteProtocolError(
                f"no memory for the answer ({self.bytes_received} bytes of it had come)"
            ) from error

    def feed_stream(self, now: float) -> bool:
        """Give ``stream`` what has come of the body since; True where that completed an event."""
        head = self.head
        if self.stream is None or head is None or head.status != 200 or not is_event_stream(head):
            return False
        received: Buffer = self.body
        if not received:
            received = self._chunked.body if self._chunked is not None else self._pieces
            if self._answer is not None:
                received = self._answer[: self._filled]
        data = bytes(memoryview(received)[self._fed_bytes :])
        self._fed_bytes += len(data)
        return self.stream.feed(data, now)

    def _send(self) -> int:
        calls_left = _MAX_CALLS_PER_ADVANCE
        try:
            while self._pending:
                if not calls_left:
                    return WANT_WRITE
                calls_left -= 1
                if self._is_tls:
                    sent = self._socket.send(self._pending[0])
                else:
                    sent = self._socket.sendmsg(self._pending[:_MAX_BUFFERS])
                self._consume(sent)
        except (BlockingIOError, ssl.SSLWantWriteError):
            return WANT_WRITE
        except ssl.SSLWantReadError:
            return WANT_READ
        except OSError:
            # A server that refuses the request early may answer and then reset: its answer says more than
            # the reset, and if there is none, receiving fails.
            pass
        self._sending = False
        return 0

    def _consume(self, sent: int) -> None:
        done = 0
        for part in self._pending:
            if sent < len(part):
                break
            sent -= len(part)
            done += 1
        del self._pending[:done]
        if sent:
            self._pending[0] = memoryview(self._pending[0])[sent:]

    def _receive(self, events: int) -> int:
        # An early answer (or the end of the connection) is noticed while the request is still being sent: a
        # server that refuses a large body does not wait for its end.
        waiting = events | WANT_READ
        calls_left = _MAX_CALLS_PER_ADVANCE
        try:
            while calls_left > 0 or self._holds_decrypted_bytes():
                calls_left -= 1
                if self._answer is not None:
                    count = self._socket.recv_into(self._answer[self._filled :])
                    if not count:
                        raise self._lost("the connection was closed within the answer")
                    self._filled += count
                    self.bytes_received += count
                    if self._filled == len(self._answer):
                        return self._finish(self._answer)
                    continue
                data = self._socket.recv(_FIRST_READ_BYTES if self.head is None else _READ_BYTES)
                self.bytes_received += len(data)
                if self._take_head(data) if self.head is None else self._take(data):
                    return 0
                if self._answer is None:
                    calls_left = 0
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except ssl.SSLWantWriteError:
            waiting |= WANT_WRITE
        return waiting

    def _holds_decrypted_bytes(self) -> bool:
        """Whether TLS holds bytes that have left the socket already, so that poll does not report them."""
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0

    def _take(self, data: bytes) -> bool:
        """Add bytes of the body; empty ``data`` is the end of the connection. True when complete."""
        if self._chunked is not None:
            if not data:
                raise self._lost("the connection was closed within the answer")
            return self._take_chunked(data)
        if not data:
            self._finish(memoryview(self._pieces))
            self.reusable = False
            return True
        self._pieces += data
        self._check_size(len(self._pieces))
        return False

    def _take_head(self, data: bytes) -> bool:
        """Add bytes of the head, and of what may follow it. True when the answer is complete."""
        if not data:
            if self.bytes_received:
                raise self._lost("the connection was closed within the answer's head")
            raise self._lost("the connection was closed without an answer")
        if self._pieces:
            self._pieces += data
            data = bytes(self._pieces)
        start = 0
        while True:
            end, rest_start = _head_end(data, start)
            if (len(data) if end < 0 else end) - start > MAX_HEAD_BYTES:
                raise RemoteProtocolError(f"the answer's head is longer than {MAX_HEAD_BYTES} bytes")
            if end < 0:
                if data[3:9] == _HTTP2_SETTINGS:
                    raise RemoteProtocolError(
                        "the server speaks HTTP/2, not HTTP/1.1: if this is its gRPC port (Triton's is "
                        "8001), give its HTTP port (8000)"
                    )
                self._pieces = bytearray(data[start:])
                return False
            head = parse_response_head(data[start:end])
            start = rest_start
            if head.status == 101:
                raise RemoteProtocolError("the server switched protocols without being asked")
            if head.status >= 200:
                break
        rest = memoryview(data)[start:]
        self.head = head
        self._pieces.clear()
        if not self._expects_body or not head.has_body:
            self._finish(_NOTHING)
            self.reusable = self.reusable and not rest
            return True
        if head.chunked:
            self._chunked = ChunkedBody(self._max_response_bytes)
            return bool(rest) and self._take_chunked(bytes(rest))
        if head.content_length is None:
            self._pieces += rest
            self._check_size(len(self._pieces))
            return False
        return self._take_sized(rest, head.content_length)

    def _take_sized(self, rest: memoryview, length: int) -> bool:
        self._check_size(length)
        if len(rest) >= length:
            self._finish(rest[:length])
            self.reusable = self.reusable and len(rest) == length
            return True
        # Not a bytearray, which would touch every page: a false length must cost no memory.
        try:
            self._answer = np.empty(length, dtype=np.uint8).data
        except (MemoryError, ValueError) as error:
            raise RemoteProtocolError(f"the answer has {length} bytes: no memory for so many") from error
        self._answer[: len(rest)] = rest
        self._filled = len(rest)
        return False

    def _take_chunked(self, data: bytes) -> bool:
        assert self._chunked is not None
        surplus = self._chunked.feed(data)
        if surplus is None:
            return False
        self._finish(memoryview(self._chunked.body))
        self.reusable = self.reusable and surplus == 0
        return True

    def _finish(self, body: memoryview) -> int:
        assert self.head is not None
        self.body = body
        # An answer that came before the request was sent leaves the rest of it unsent on the connection.
        self.reusable = self.head.keeps_alive and not self._sending and not self._pending
        self._pending = []
        return 0

    def _check_size(self, size: int) -> None:
        if size > self._max_response_bytes:
            raise RemoteProtocolError(
                f"the answer has {size} bytes or more, above max_response_bytes={self._max_response_bytes}"
            )

    def _lost(self, reason: str) -> ConnectionLostError:
        return ConnectionLostError(f"{reason} ({self.bytes_received} bytes of it had come)")


def is_event_stream(head: ResponseHead) -> bool:
    """Whether the answer's body is a stream of server-sent events."""
    return (head.get("content-type") or "").lower().startswith("text/event-stream")


def _head_end(data: bytes, start: int) -> tuple[int, int]:
    """The end of the head that begins at ``start`` (-1: not complete), and the start of its body."""
    end = data.find(b"\n\r\n", start)
    # RFC 9112 section 2.2: a lone LF ends a line as well.
    bare = data.find(b"\n\n", start, end + 1 if end >= 0 else len(data))
    return (end, end + 3) if bare < 0 else (bare, bare + 2)


def _joined(parts: Sequence[Buffer]) -> list[Buffer]:
    """The same bytes for TLS: large parts as they are, small ones between them copied together."""
    joined: list[Buffer] = []
    small: bytearray | None = None
    for part in parts:
        if len(part) >= _TLS_JOIN_BYTES:
            joined.append(part)
            small = None
        elif small is None or len(small) >= _TLS_JOIN_BYTES:
            small = bytearray(part)
            joined.append(small)
        else:
            small += part
    return joined


def _tls_error(error: ssl.SSLError) -> TransportError:
    reason = (error.reason or str(error)).lower().replace("_", " ")
    if "alert" in reason and ("certificate" in reason or "unknown ca" in reason):
        return TlsError(f"the server refused this client's certificate: {reason}")
    return ConnectionLostError(f"the TLS connection failed: {reason}")

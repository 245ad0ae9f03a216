"""An HTTP exchange over a socket pair: the test plays the server byte by byte, without a thread."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

from beam_triton.transport.exchange import Buffer, Exchange

REQUEST = b"GET /v2 HTTP/1.1\r\nHost: somewhere\r\n\r\n"
_TIMEOUT_SECONDS = 5.0


class Hangs(AssertionError):
    """The exchange still waits although the whole answer was sent."""


class SocketPair:
    """A connected pair: ``client`` is non-blocking like a pool's sockets, ``server`` is the test's end."""

    def __init__(self) -> None:
        self.client, self.server = socket.socketpair()
        self.client.setblocking(False)
        self.server.settimeout(_TIMEOUT_SECONDS)

    def __enter__(self) -> SocketPair:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self.server.close()

    def exchange(
        self,
        parts: Sequence[Buffer] = (REQUEST,),
        *,
        max_response_bytes: int = 1 << 20,
        expects_body: bool = True,
    ) -> Exchange:
        return Exchange(self.client, parts, max_response_bytes=max_response_bytes, expects_body=expects_body)


@dataclass(frozen=True)
class Outcome:
    """How an answer was read."""

    status: int
    body: bytes
    fields: tuple[tuple[str, str], ...]


def play(
    pieces: Iterable[bytes],
    *,
    closes: bool = True,
    max_response_bytes: int = 1 << 20,
    expects_body: bool = True,
) -> Exchange:
    """A complete exchange whose answer comes in these pieces, each read before the next is sent.

    Raises what the exchange raises, and `Hangs` if it still waits after the last piece.
    """
    with SocketPair() as pair:
        exchange = pair.exchange(max_response_bytes=max_response_bytes, expects_body=expects_body)
        assert exchange.advance(), "complete before the first byte of an answer"
        pair.server.recv(65536)
        for piece in pieces:
            pair.server.sendall(piece)
            if not _advance_while_ready(pair, exchange):
                return exchange
        if closes:
            pair.server.shutdown(socket.SHUT_WR)
        if _advance_while_ready(pair, exchange):
            raise Hangs(f"still waiting, {exchange.bytes_received} bytes received")
        return exchange


def outcome_of(exchange: Exchange) -> Outcome:
    assert exchange.head is not None
    return Outcome(exchange.head.status, bytes(exchange.body), exchange.head.fields)


def _advance_while_ready(pair: SocketPair, exchange: Exchange) -> int:
    """Advance until nothing is ready; the events that the exchange waits for, 0 if it is complete."""
    events = exchange.advance()
    while events:
        poller = select.poll()
        poller.register(pair.client, events)
        if not poller.poll(0):
            break
        events = exchange.advance()
    return events

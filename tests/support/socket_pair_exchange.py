"""An exchange over a socket pair: the test plays the server, byte by byte, without a thread."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

from beam_triton.transport.exchange import Buffer, Exchange

REQUEST = b"GET /v2 HTTP/1.1\r\nHost: somewhere\r\n\r\n"
_PATIENCE_MILLISECONDS = 5000


class Hangs(AssertionError):
    """The exchange waits for something although all that will ever come has come."""


class Wire:
    """A connected pair: ``client`` does not block, as a pool's sockets do not; ``server`` is the test's."""

    def __init__(self) -> None:
        self.client, self.server = socket.socketpair()
        self.client.setblocking(False)
        self.server.settimeout(_PATIENCE_MILLISECONDS / 1000)

    def __enter__(self) -> Wire:
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
    """What an answer was taken for."""

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
    """A complete exchange whose answer comes in these pieces, each one seen before the next is sent.

    Raises what the exchange raises, and `Hangs` where it goes on waiting after the last piece.
    """
    with Wire() as wire:
        exchange = wire.exchange(max_response_bytes=max_response_bytes, expects_body=expects_body)
        assert exchange.advance(), "complete before a byte of an answer came"
        wire.server.recv(65536)
        for piece in pieces:
            wire.server.sendall(piece)
            if not _advance_while_ready(wire, exchange):
                return exchange
        if closes:
            wire.server.shutdown(socket.SHUT_WR)
        if _advance_while_ready(wire, exchange):
            raise Hangs(f"still waiting, {exchange.bytes_received} bytes received")
        return exchange


def outcome_of(exchange: Exchange) -> Outcome:
    assert exchange.head is not None
    return Outcome(exchange.head.status, bytes(exchange.body), exchange.head.fields)


def _advance_while_ready(wire: Wire, exchange: Exchange) -> int:
    """Events that the exchange waits for once nothing is ready any more; 0 when it is complete."""
    events = exchange.advance()
    while events:
        poller = select.poll()
        poller.register(wire.client, events)
        if not poller.poll(0):
            break
        events = exchange.advance()
    return events

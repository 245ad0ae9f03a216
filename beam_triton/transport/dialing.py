"""Opens TCP connections: to the first address that answers, with a kernel that notices a dead peer.

A name has several addresses, and any of them may be dead without saying so: a pod that is gone, an IPv6 route
that leads nowhere. So addresses are tried as RFC 8305 (Happy Eyeballs) says, families in turn, each a quarter
of a second after the one before or as soon as that has failed. The first that connects wins. A unix
socket has one address, its path.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple

USER_TIMEOUT_SECONDS = 30.0
"""See `_socket_options`. A connection that carries a request with a later deadline has none."""

# RFC 8305, section 5: "Connection Attempt Delay".
_ATTEMPT_DELAY_SECONDS = 0.25
_UNIX_PAUSE_SECONDS = 0.01
# An address that did not answer is tried after the others for so long.
_AVOIDED_SECONDS = 60.0


class Address(NamedTuple):
    """What `socket.getaddrinfo` says of one address of a name."""

    family: int
    kind: int
    protocol: int
    sockaddr: tuple[Any, ...]

    def __str__(self) -> str:
        return str(self.sockaddr[0])


def look_up(host: str, port: int) -> list[Address]:
    """The addresses of ``host``, the ones that the system prefers first; raises OSError."""
    found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    return [Address(family, kind, protocol, sockaddr) for family, kind, protocol, _, sockaddr in found]


class Dialer:
    """Connects to one of several addresses, and remembers which did not answer. Thread-safe."""

    def __init__(self) -> None:
        # Read and written by whole entries, which needs no lock.
        self._failed_at: dict[tuple[Any, ...], float] = {}

    def dial(self, addresses: Sequence[Address], deadline: float) -> socket.socket:
        """A connected socket; ``deadline`` is in monotonic seconds.

        Raises:
            TimeoutError: an address did not answer in time, and no other connected.
            OSError: every address refused; names each one where there are several.
        """
        waiting = self._in_order(addresses)
        race = _Race()
        try:
            while True:
                now = time.monotonic()
                if now >= deadline:
                    break
                if waiting and now >= race.next_at:
                    race.start(waiting.pop(0), now)
                    continue
                if not race.sockets and not waiting:
                    break
                winner = race.wait(min(deadline, race.next_at if waiting else deadline) - now)
                if winner is not None:
                    return winner
            raise race.error(waiting)
        finally:
            self._remember(race)
            race.close()

    def _in_order(self, addresses: Sequence[Address]) -> list[Address]:
        first = addresses[0].family
        same = [address for address in addresses if address.family == first]
        other = [address for address in addresses if address.family != first]
        pairs = chain.from_iterable(zip_longest(same, other))
        now = time.monotonic()
        # The sort is stable.
        return sorted(
            (address for address in pairs if address is not None),
            key=lambda address: (
                now < self._failed_at.get(address.sockaddr, -_AVOIDED_SECONDS) + _AVOIDED_SECONDS
            ),
        )

    def _remember(self, race: _Race) -> None:
        """An address that was overtaken counts as dead, too: the next connection shall not wait for it."""
        now = time.monotonic()
        if race.winner is not None:
            self._failed_at.pop(race.winner.sockaddr, None)
        for address in (*race.sockets.values(), *race.errors):
            self._failed_at[address.sockaddr] = now
        if len(self._failed_at) > 1000:
            self._failed_at = {}


class _Race:
    """Attempts to connect, side by side. ``next_at`` is when the next one may start."""

    def __init__(self) -> None:
        self.sockets: dict[socket.socket, Address] = {}
        self.errors: dict[Address, OSError] = {}
        self.winner: Address | None = None
        self.next_at = 0.0

    def start(self, address: Address, now: float) -> None:
        self.next_at = now + _ATTEMPT_DELAY_SECONDS
        sock: socket.socket | None = None
        try:
            sock = socket.socket(address.family, address.kind, address.protocol)
            for option in _SOCKET_OPTIONS:
                sock.setsockopt(*option)
            sock.setblocking(False)
            sock.connect(address.sockaddr)
        except BlockingIOError:
            assert sock is not None
        except OSError as error:
            if sock is not None:
                sock.close()
            self._lose(address, error)
            return
        self.sockets[sock] = address

    def wait(self, seconds: float) -> socket.socket | None:
        """The socket that has connected within this time, if one has."""
        poller = select.poll()
        for sock in self.sockets:
            poller.register(sock, select.POLLOUT)
        ended = {number for number, _ in poller.poll(max(seconds, 0.001) * 1000)}
        for sock in [sock for sock in self.sockets if sock.fileno() in ended]:
            address = self.sockets.pop(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not code:
                self.winner = address
                return sock
            sock.close()
            self._lose(address, OSError(code, os.strerror(code)))
        return None

    def error(self, not_tried: Sequence[Address]) -> OSError:
        """Why no address has connected."""
        silent = [*self.sockets.values(), *not_tried]
        told = [f"{address}: no answer" for address in silent]
        told += [f"{address}: {error.strerror or error}" for address, error in self.errors.items()]
        if silent:
            return TimeoutError("; ".join(told))
        if len(self.errors) == 1:
            return next(iter(self.errors.values()))
        return OSError("; ".join(told))

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()

    def _lose(self, address: Address, error: OSError) -> None:
        self.errors[address] = error
        self.next_at = 0.0


def dial_unix(path: str, deadline: float) -> socket.socket:
    """A socket that is connected to the unix socket at ``path``.

    Raises:
        TimeoutError: it accepted no connection in time.
        OSError: there is none, nobody listens, or this user may not connect.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(path)
                return sock
            except BlockingIOError:
                # Its backlog is full, and poll does not report when there is room.
                if time.monotonic() >= deadline:
                    raise TimeoutError("its backlog is full") from None
                time.sleep(_UNIX_PAUSE_SECONDS)
    except BaseException:
        sock.close()
        raise


def unset_user_timeout(sock: socket.socket) -> None:
    """Take ``TCP_USER_TIMEOUT`` away; the number of unanswered keep-alive probes counts again."""
    if hasattr(socket, "TCP_USER_TIMEOUT") and sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)


def _socket_options() -> list[tuple[int, int, int]]:
    """Options of every connection, as far as the system has them.

    After 15 s without a byte, idle or waiting for an answer, the kernel asks the peer whether it is there,
    then every 5 s; a peer that is silent three times is dead. That is 30 s in all (by default two hours),
    and often enough for NATs and balancers, which forget a silent connection after some minutes.

    ``TCP_USER_TIMEOUT`` does the same for a request that the peer has not acknowledged, for which Linux takes
    15 minutes. Linux then looks at this time instead of the number of probes: with much less than 30 s, one
    lost probe would end a connection. It also ends one whose peer is alive, but has read nothing for so long
    that it has no room for more; a deadline of up to 30 s ends such a request before.
    """
    tcp = socket.IPPROTO_TCP
    options = [(tcp, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    if hasattr(socket, "TCP_KEEPIDLE"):
        options.append((tcp, socket.TCP_KEEPIDLE, 15))
    elif sys.platform == "darwin":
        options.append((tcp, getattr(socket, "TCP_KEEPALIVE", 0x10), 15))
    if hasattr(socket, "TCP_KEEPINTVL"):
        options.append((tcp, socket.TCP_KEEPINTVL, 5))
    if hasattr(socket, "TCP_KEEPCNT"):
        options.append((tcp, socket.TCP_KEEPCNT, 3))
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        options.append((tcp, socket.TCP_USER_TIMEOUT, int(USER_TIMEOUT_SECONDS * 1000)))
    return options


_SOCKET_OPTIONS = _socket_options()

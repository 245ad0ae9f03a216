"""Connections for a pool without a network: socket pairs, which open when the test lets them."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType

from urllib3.connection import HTTPConnection

from beam_triton.errors import TritonError
from beam_triton.transport.opening_threads import OpeningThreads
from beam_triton.transport.origin import Origin

_TIMEOUT_SECONDS = 10


def waits_for_a_job(thread: threading.Thread, *, within_seconds: float) -> bool:
    """Wait until a thread of `OpeningThreads` has done what it was to do, and keeps nothing of it."""
    deadline = time.monotonic() + within_seconds
    while thread.is_alive() and not _is_in(thread, OpeningThreads._next.__code__):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


def _is_in(thread: threading.Thread, code: CodeType) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


@dataclass(eq=False)
class Opening:
    """One call of the opener on a thread of the pool, which waits until the test ends it."""

    origin: Origin
    timeout_seconds: float
    thread: threading.Thread = field(default_factory=threading.current_thread)
    _done: threading.Event = field(default_factory=threading.Event)
    _error: BaseException | None = None

    def succeed(self) -> None:
        self._end(None)

    def fail(self, error: BaseException) -> None:
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        self._error = error
        self._done.set()
        assert waits_for_a_job(self.thread, within_seconds=_TIMEOUT_SECONDS)

    def wait(self) -> None:
        assert self._done.wait(_TIMEOUT_SECONDS), "the test did not end the opening"
        if self._error is not None:
            raise self._error


class PairedConnection(HTTPConnection):
    """A connection to a peer in this process; ``before_close`` is called before it closes."""

    before_close: Callable[[], None] | None = None

    def close(self) -> None:
        if self.before_close is not None:
            self.before_close()
        super().close()


class Opener:
    """``open`` is a pool's opener. With ``by_hand`` every opening waits in ``pending`` for the test."""

    def __init__(self, *, by_hand: bool = False) -> None:
        self.pending: list[Opening] = []
        self.opened: list[Origin] = []
        # By connection, not by id: Python reuses the id of a deleted object.
        self.peers: dict[HTTPConnection, socket.socket] = {}
        self._by_hand = by_hand
        self._condition = threading.Condition()

    def open(self, origin: Origin, timeout_seconds: float) -> HTTPConnection:
        if self._by_hand:
            opening = Opening(origin, timeout_seconds)
            with self._condition:
                self.pending.append(opening)
                self._condition.notify_all()
            try:
                opening.wait()
            finally:
                with self._condition:
                    self.pending.remove(opening)
        client, peer = socket.socketpair()
        client.setblocking(False)
        connection = PairedConnection(origin.host, origin.port)
        connection.sock = client
        with self._condition:
            self.opened.append(origin)
            self.peers[connection] = peer
        return connection

    def peer(self, connection: HTTPConnection) -> socket.socket:
        """The server's end of a connection."""
        return self.peers[connection]

    def until_pending(self, count: int) -> bool:
        """Wait until this many openings are pending; False after ten seconds."""
        with self._condition:
            return self._condition.wait_for(lambda: len(self.pending) == count, _TIMEOUT_SECONDS)

    def close(self) -> None:
        for opening in list(self.pending):
            opening.fail(TritonError("the test is over"))
        for peer in self.peers.values():
            peer.close()

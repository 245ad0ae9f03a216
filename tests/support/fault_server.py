"""A scripted HTTP/1.1 server on this machine whose faults control every byte, and that counts connections.

``FaultServer`` runs in threads of the test's process. Each request takes the next *fault* of the script (see
``tests.support.faults``): a function of one ``Exchange`` that reads, sends and closes as it likes. Requests
without a fault are answered by the *origin* (see ``tests.support.answers``). With ``forward_to`` as the
origin the server is a proxy in front of a real one, and the faults damage real answers.

``beam_triton.testing.FakeTriton`` is the server for whole answers: models, error statuses, lost connections.
This one is for what lies below: truncated heads, resets, slow bytes, wrong lengths, early answers.
"""

from __future__ import annotations

import itertools
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import TracebackType
from urllib.parse import quote

from tests.support.answers import Answer, Origin, Request

_POLL_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class Exchange:
    """One request on one connection, as a fault sees it.

    ``keep_alive`` is False when the connection cannot take another request; ``close``, ``reset`` and
    ``half_close`` set it.
    """

    def __init__(self, sock: socket.socket, number: int, origin: Origin, server: FaultServer) -> None:
        self.keep_alive = True
        self._socket = sock
        self._number = number
        self._origin = origin
        self._server = server
        self._request: Request | None = None
        self._surplus = b""
        self._body_read = False

    def read_head(self) -> Request:
        """Reads and records the request's head, and leaves its body."""
        if self._request is None:
            data = b""
            while b"\r\n\r\n" not in data:
                data += self._receive()
            head, _, self._surplus = data.partition(b"\r\n\r\n")
            line, *lines = head.decode("latin-1").split("\r\n")
            method, target, _ = line.split(" ", 2)
            headers = [(name, value.strip()) for name, _, value in (text.partition(":") for text in lines)]
            self._request = Request(self._number, method, target, headers)
            self._server.record(self._request)
        return self._request

    def request(self) -> Request:
        """Reads the whole request, whether its body has a length or comes in chunks."""
        request = self.read_head()
        if not self._body_read:
            self._body_read = True
            if "chunked" in request.header("Transfer-Encoding").lower():
                request.body = self._read_chunks()
            else:
                request.body = self._read_exactly(int(request.header("Content-Length", "0")))
        return request

    def read_some_body(self, size: int) -> None:
        """Reads up to ``size`` bytes of the body, and leaves the rest unread."""
        length = int(self.read_head().header("Content-Length", "0"))
        self._surplus = self._read_exactly(min(size, length)) + self._surplus

    def answer(self) -> Answer:
        """The origin's answer to this request."""
        return self._origin(self.request())

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def hold(self, seconds: float | None = None) -> bool:
        """Waits until the client closes its side (True) or the time is over (False)."""
        poll = select.poll()
        poll.register(self._socket, _POLL_GONE)
        return bool(poll.poll(None if seconds is None else seconds * 1000))

    def half_close(self) -> None:
        """Sends FIN, and continues to read."""
        self.keep_alive = False
        self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.keep_alive = False

    def reset(self) -> None:
        """Closes the connection with RST; data that is on its way may be lost."""
        self.keep_alive = False
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _receive(self, size: int = 65536) -> bytes:
        data = self._socket.recv(size)
        if not data:
            raise ConnectionError("the client closed its connection within a request")
        return data

    def _read_exactly(self, size: int) -> bytes:
        parts = [self._surplus]
        have = len(self._surplus)
        while have < size:
            parts.append(self._receive(min(size - have, 1 << 20)))
            have += len(parts[-1])
        data = b"".join(parts)
        self._surplus = data[size:]
        return data[:size]

    def _read_line(self) -> bytes:
        while b"\r\n" not in self._surplus:
            self._surplus += self._receive()
        line, _, self._surplus = self._surplus.partition(b"\r\n")
        return line

    def _read_chunks(self) -> bytes:
        parts = []
        while size := int(self._read_line().partition(b";")[0], 16):
            parts.append(self._read_exactly(size))
            self._read_line()
        while self._read_line():
            pass
        return b"".join(parts)


Fault = Callable[[Exchange], None]
Script = Fault | Iterable[Fault]


def serve(exchange: Exchange) -> None:
    """No fault: sends the origin's whole answer."""
    answer = exchange.answer()
    if exchange.request().header("Connection").lower() == "close":
        answer = replace(answer, headers=(*answer.headers, ("Connection", "close")))
        exchange.close()
    exchange.send(answer.encode())


def any_request(request_line: bytes) -> bool:
    return True


def infer_requests(request_line: bytes) -> bool:
    """Only inference takes a fault; metadata, configuration and health are answered by the origin."""
    return b"/infer" in request_line


@dataclass(eq=False, repr=False)
class FaultServer:
    """A context manager: listens while it is open, and ends all its threads and sockets when it closes.

    Args:
      script: one fault for all requests, or an iterable of faults, one for each request. Requests after its
        end are answered by the origin.
      when: takes a request line; only requests for which it is true take a fault.
      on_accept: a fault for each new connection, before its first request is read.
      requests_per_connection_limit: a connection is closed after that many requests, without an announcement.
      idle_seconds: a connection is closed after that long without a request, without an announcement.
      idle_farewell: bytes to send before an idle connection is closed (some proxies send a 408).
      receive_buffer_bytes: the kernel's buffer for a body that is not read.
      address: where it listens: an address, or the path of a unix socket.
    """

    origin: Origin
    script: Script = ()
    when: Callable[[bytes], bool] = any_request
    on_accept: Fault | None = None
    requests_per_connection_limit: int | None = None
    idle_seconds: float | None = None
    idle_farewell: bytes = b""
    receive_buffer_bytes: int | None = None
    address: str = "127.0.0.1"
    requests: list[Request] = field(default_factory=list, init=False)
    requests_per_connection: list[int] = field(default_factory=list, init=False)
    most_open: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._stopping = False
        self._faults: Iterator[Fault] = iter(())
        self.play(self.script)

    def __enter__(self) -> FaultServer:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        self._is_unix = self.address.startswith("/")
        self._listener = socket.socket(socket.AF_UNIX if self._is_unix else family)
        if self.receive_buffer_bytes is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer_bytes)
        self._listener.bind(self.address if self._is_unix else (self.address, 0))
        self._listener.listen(128)
        self.port: int = 0 if self._is_unix else self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="fault-server", daemon=True)
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        _shut_down(self._listener)
        self._acceptor.join()
        self._listener.close()
        self.drop_connections()
        for thread in self._threads:
            thread.join()

    @property
    def endpoint(self) -> str:
        if self._is_unix:
            return f"http+unix://{quote(self.address, safe='')}"
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"http://{host}:{self.port}"

    @property
    def opened(self) -> int:
        """Connections accepted since the start."""
        return len(self.requests_per_connection)

    @property
    def open_now(self) -> int:
        """Connections that neither side has closed."""
        with self._lock:
            return len(self._open)

    def play(self, script: Script) -> None:
        """Replaces the faults that are left in the script."""
        faults = itertools.repeat(script) if callable(script) else iter(script)
        with self._lock:
            self._faults = faults

    def drop_connections(self) -> None:
        """Closes every open connection, as a restarted server does."""
        with self._lock:
            for sock in self._open.values():
                _shut_down(sock)

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)
            self.requests_per_connection[request.connection] += 1

    def _next_fault(self, request_line: bytes) -> Fault:
        if not self.when(request_line):
            return serve
        with self._lock:
            return next(self._faults, serve)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            if not self._is_unix:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                number = len(self.requests_per_connection)
                self.requests_per_connection.append(0)
                self._open[number] = sock
                self.most_open = max(self.most_open, len(self._open))
            thread = threading.Thread(target=self._connection, args=(sock, number), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _connection(self, sock: socket.socket, number: int) -> None:
        try:
            self._exchanges(sock, number)
        except OSError:
            pass
        finally:
            with self._lock:
                del self._open[number]
            sock.close()

    def _exchanges(self, sock: socket.socket, number: int) -> None:
        if self.on_accept is not None:
            greeting = Exchange(sock, number, self.origin, self)
            self.on_accept(greeting)
            if not greeting.keep_alive:
                return
        for served in itertools.count(1):
            request_line = self._await_request_line(sock)
            if request_line is None:
                return
            exchange = Exchange(sock, number, self.origin, self)
            self._next_fault(request_line)(exchange)
            if not exchange.keep_alive or served == self.requests_per_connection_limit or self._stopping:
                return

    def _await_request_line(self, sock: socket.socket) -> bytes | None:
        """The next request line, left unread in the kernel; None when the connection is closed."""
        sock.settimeout(self.idle_seconds)
        try:
            line = b""
            while b"\n" not in line:
                line = sock.recv(8192, socket.MSG_PEEK)
                if not line:
                    return None
                if b"\n" not in line:
                    # A peek returns at once: without a pause the loop would spin.
                    threading.Event().wait(0.005)
            return line.partition(b"\r\n")[0]
        except TimeoutError:
            sock.sendall(self.idle_farewell)
            return None
        finally:
            sock.settimeout(None)


def _shut_down(sock: socket.socket) -> None:
    """Wakes the thread that waits for the socket; that thread closes it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return

"""The HTTP/1.1 server of `FakeTriton`: a thread that listens, and one for each connection.

It knows nothing of the protocol: ``on_request`` gets each request whole, and answers it, drops it or lets it
hang through its `Connection`.
"""

from __future__ import annotations

import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

# How soon a stop, and a client that leaves, are noticed.
_POLL_SECONDS = 0.05
_STOP_SECONDS = 5.0


class Connection(BaseHTTPRequestHandler):
    """One client connection, as the request that was read last sees it.

    ``path`` has no query; ``headers`` are those of the request.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HttpServer

    def do_GET(self) -> None:
        self.path = self.path.partition("?")[0]
        self.server.on_request(self, b"")

    def do_POST(self) -> None:
        self.path = self.path.partition("?")[0]
        self.server.on_request(self, self._read_body())

    def send(self, status: int, parts: Sequence[bytes | memoryview], headers: Mapping[str, str]) -> None:
        """Sends an answer whose body is the concatenated ``parts``."""
        try:
            reason = HTTPStatus(status).phrase
        except ValueError:
            reason = "Unknown"
        lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers.items())]
        lines.append(f"Content-Length: {sum(map(len, parts))}")
        if self.close_connection:
            lines.append("Connection: close")
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        self.connection.sendall(b"".join([head, *parts]))

    def drop(self) -> None:
        """Closes the connection without an answer."""
        self.close_connection = True

    def wait(self, seconds: float) -> bool:
        """Waits; False as soon as an answer would be in vain: the client has left, or the server stops."""
        deadline = time.monotonic() + seconds
        try:
            while not self.server.is_stopping.is_set():
                left = deadline - time.monotonic()
                if left <= 0:
                    return True
                self.connection.settimeout(min(left, _POLL_SECONDS))
                try:
                    if not self.connection.recv(1, socket.MSG_PEEK):
                        return False
                    # The next request is there already, so that the peek returns at once.
                    self.server.is_stopping.wait(min(left, _POLL_SECONDS))
                except TimeoutError:
                    continue
            return False
        finally:
            self.connection.settimeout(None)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # a trailer
        return b"".join(parts)

    def setup(self) -> None:
        super().setup()
        self.server.opened(self.connection)

    def finish(self) -> None:
        self.server.closed(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged: the requests of a test are its own."""


class HttpServer(socketserver.ThreadingTCPServer):
    """Listens on a port of 127.0.0.1 from its construction until `stop`. Raises OSError for a port in use.

    ``on_request`` gets a connection and the request's body, on the connection's thread.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self, port: int, on_request: Callable[[Connection, bytes], None], on_connect: Callable[[], None]
    ) -> None:
        self.on_request = on_request
        self.is_stopping = threading.Event()
        self._on_connect = on_connect
        self._open: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", port), Connection)
        self._listener = threading.Thread(
            target=self.serve_forever, args=(_POLL_SECONDS,), name="fake-triton", daemon=True
        )
        self._listener.start()

    def opened(self, connection: socket.socket) -> None:
        self._on_connect()
        with self._lock:
            self._open[connection] = threading.current_thread()
            is_late = self.is_stopping.is_set()
        if is_late:
            _shut_down(connection)

    def closed(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.pop(connection, None)

    def stop(self) -> None:
        """Closes the listener and every connection. Requests in flight get no answer."""
        self.is_stopping.set()
        self.shutdown()
        self.server_close()
        with self._lock:
            threads = dict(self._open)
        for connection in threads:
            _shut_down(connection)
        # Bounded: a request may be in the midst of a long computation.
        deadline = time.monotonic() + _STOP_SECONDS
        for thread in (self._listener, *threads.values()):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that leaves in the midst of an exchange is no error of the server.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def _shut_down(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return

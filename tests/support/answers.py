"""What the fault server answers without a fault: a fixed answer, or that of a real server."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Request:
    """One recorded request; ``body`` stays empty if the fault did not read it."""

    connection: int
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    def header(self, name: str, default: str = "") -> str:
        """The last value of a header; the name's case does not matter."""
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        return values[-1] if values else default


@dataclass(frozen=True)
class Answer:
    """A whole answer; ``Content-Length`` is added unless ``headers`` or the status determine the length."""

    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    reason: str = "Because"

    def head(self) -> bytes:
        headers = list(self.headers)
        named = {name.lower() for name, _ in headers}
        if not named & {"content-length", "transfer-encoding"} and self.status >= 200:
            headers.append(("Content-Length", str(len(self.body))))
        lines = [f"HTTP/1.1 {self.status} {self.reason}", *(f"{name}: {value}" for name, value in headers)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def encode(self) -> bytes:
        return self.head() + self.body

    def without(self, *names: str) -> Answer:
        """The same answer without these headers."""
        dropped = {name.lower() for name in names}
        kept = tuple(pair for pair in self.headers if pair[0].lower() not in dropped)
        return Answer(self.status, self.body, kept, self.reason)


Origin = Callable[[Request], Answer]


def always(answer: Answer) -> Origin:
    """An origin that answers every request with the same answer."""
    return lambda request: answer


def forward_to(port: int, *, timeout_seconds: float = 30.0) -> Origin:
    """An origin that forwards to the server on 127.0.0.1:``port``, over one connection for each client's."""
    of_thread = threading.local()

    def ask(request: Request) -> Answer:
        upstream: http.client.HTTPConnection | None = getattr(of_thread, "connection", None)
        if upstream is None:
            upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_seconds)
            of_thread.connection = upstream
        skipped = {"connection", "host", "transfer-encoding", "content-length"}
        headers = {name: value for name, value in request.headers if name.lower() not in skipped}
        try:
            upstream.request(request.method, request.target, request.body or None, headers)
            response = upstream.getresponse()
            body = response.read()
        except http.client.HTTPException as error:
            upstream.close()
            raise ConnectionError(f"upstream: {error!r}") from error
        except OSError:
            upstream.close()
            raise
        return Answer(
            response.status,
            body,
            tuple(pair for pair in response.getheaders() if pair[0].lower() not in skipped),
            response.reason,
        )

    return ask

"""Questions to a server on this machine: does it accept connections, is it live, is it ready?

This file imports nothing of the package: the supervisor runs without it.
"""

from __future__ import annotations

import http.client
import socket
from pathlib import Path

LIVE = "/v2/health/live"
READY = "/v2/health/ready"


def accepts(port: int) -> bool:
    """Whether something on 127.0.0.1 accepts connections on ``port``."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
    except OSError:
        return False


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def answers(place: Path | int, path: str, timeout_seconds: float) -> bool:
    """Whether the server at a unix socket, or at a port of 127.0.0.1, answers 200."""
    # http.client, because urllib.request would send loopback requests to a proxy named in the environment.
    connection = (
        http.client.HTTPConnection("127.0.0.1", place, timeout=timeout_seconds)
        if isinstance(place, int)
        else _UnixConnection(str(place), timeout_seconds)
    )
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()

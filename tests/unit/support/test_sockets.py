"""Connections, files and sockets are counted as the tests expect."""

from __future__ import annotations

import socket

from tests.support import sockets
from tests.support.answers import Answer, always
from tests.support.fault_server import FaultServer


def test_established_counts_each_connection_once() -> None:
    """Only the server's side counts, and closed connections do not."""
    with FaultServer(always(Answer())) as server:
        assert sockets.established(server.port) == 0
        clients = [socket.create_connection(("127.0.0.1", server.port), 5.0) for _ in range(3)]
        assert sockets.settles(lambda: sockets.established(server.port), 3) == 3
        for client in clients:
            client.close()
        assert sockets.settles(lambda: sockets.established(server.port), 0) == 0


def test_established_counts_ipv6_sockets() -> None:
    """A server that listens on ``::`` is in another table of the kernel."""
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), 5.0):
            assert sockets.established(port) == 1


def test_open_sockets_counts_sockets_among_files() -> None:
    """A socket adds to both counts, a file only to that of files."""
    before = sockets.open_files(), sockets.open_sockets()
    with socket.socket(), open("/dev/null"):
        assert (sockets.open_files(), sockets.open_sockets()) == (before[0] + 2, before[1] + 1)

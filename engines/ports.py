"""Free TCP ports on 127.0.0.1, for servers that must be told theirs."""

from __future__ import annotations

import socket


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on; all of them are held until all are known, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def accepts(port: int) -> bool | None:
    """True when something accepts connections on the port, else None."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
    except OSError:
        return None

"""Ports of 127.0.0.1 that a server can bind, and bind again after a restart."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_LOWEST_PORT = 10240
_ATTEMPTS = 200


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on.

    It is below the kernel's range for outgoing connections. The kernel may give a port of that range to any
    client while a server is stopped, and the server could then not bind it again.
    """
    ports = range(_LOWEST_PORT, max(_first_outgoing_port(), _LOWEST_PORT + 1000))
    for _ in range(_ATTEMPTS):
        port = random.SystemRandom().choice(ports)
        if is_free(port):
            return port
    raise OSError(f"no free port between {ports.start} and {ports.stop} on 127.0.0.1")


def is_free(port: int) -> bool:
    """Whether a server could bind ``port``; connections in TIME_WAIT do not prevent it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def _first_outgoing_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768

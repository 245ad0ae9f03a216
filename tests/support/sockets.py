"""The kernel's view of this machine's connections, and of this process's threads and files."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

_ESTABLISHED = "01"


def established(port: int) -> int:
    """The number of established connections to ``port``, counted on the server's side.

    The kernel writes its table in pieces, and an entry that moves while connections come and go can be
    listed twice (seen: nine lines for seven connections). So different addresses are counted, not lines.
    """
    return len(
        {
            (table, *entry[1:3])
            for table in ("/proc/net/tcp", "/proc/net/tcp6")
            for entry in _entries(Path(table))
            if entry[3] == _ESTABLISHED and int(entry[1].rpartition(":")[2], 16) == port
        }
    )


def client_ports(port: int) -> set[int]:
    """The clients' ports of connections to ``port``; TIME_WAIT keeps closed ones visible for a minute."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for entry in _entries(Path(table)):
            local, remote = (int(address.rpartition(":")[2], 16) for address in entry[1:3])
            # A listening socket has no remote port.
            if local == port and remote:
                found.add(remote)
            elif remote == port:
                found.add(local)
    return found


def open_files() -> int:
    """The number of file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def open_sockets() -> int:
    """The number of file descriptors of this process that are sockets."""
    return sum(_is_socket(name) for name in os.listdir("/proc/self/fd"))


def threads() -> list[str]:
    """The names of this process's threads, sorted."""
    return sorted(thread.name for thread in threading.enumerate())


def settles(read: Callable[[], int], expected: int, *, within_seconds: float = 5.0) -> int:
    """Poll until ``read`` returns ``expected``; return its last value, which differs after a timeout."""
    deadline = time.monotonic() + within_seconds
    while (value := read()) != expected and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def _entries(table: Path) -> list[list[str]]:
    try:
        lines = table.read_text().splitlines()[1:]
    except FileNotFoundError:
        return []
    return [line.split() for line in lines]


def _is_socket(descriptor: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    except FileNotFoundError:
        return False

"""Names that only tests know, for this process."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def resolving(names: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """`socket.getaddrinfo` gives the addresses that ``names`` holds at that moment, in this order.

    A name with none cannot be resolved. Other names are looked up as usual.
    """
    ordinary = socket.getaddrinfo

    def look_up(host: Any, port: Any, *arguments: Any, **keywords: Any) -> list[Any]:
        if host not in names:
            return ordinary(host, port, *arguments, **keywords)
        if not names[host]:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [each for address in names[host] for each in ordinary(address, port, *arguments, **keywords)]

    # No proxy knows these names.
    no_proxies = mock.patch.dict(os.environ, {"no_proxy": "*", "NO_PROXY": "*"})
    with mock.patch.object(socket, "getaddrinfo", look_up), no_proxies:
        yield

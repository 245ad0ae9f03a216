"""A network in front of a server: ``python -m benchmarks.delay_proxy URL ROUND_TRIP_SECONDS``.

Bytes take half a round trip each way. A connection costs a whole one more, before its first bytes: the
handshake, which the kernel of this machine answers at once. The proxy is a process of its own, so that it
takes no part of the client's time.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from beam_triton.transport.origin import UNIX, EndpointUrl

_ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def delayed(endpoint: str, round_trip_seconds: float) -> Iterator[str]:
    """The endpoint of a proxy in front of ``endpoint``, a server of this machine, or its unix socket."""
    command = [sys.executable, "-m", "benchmarks.delay_proxy", endpoint, str(round_trip_seconds)]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


class _Side(asyncio.Protocol):
    """One end of a connection: what it receives leaves through ``other``, later."""

    def __init__(self, delay_seconds: float) -> None:
        self._delay_seconds = delay_seconds
        self._loop = asyncio.get_running_loop()
        self._not_before = 0.0
        self._transport: asyncio.Transport | None = None
        self._waiting: list[bytes] = []
        self._is_over = False
        self.other: _Side | None = None

    def hold(self, seconds: float) -> None:
        """Let nothing that is received from now on leave before this time is over."""
        self._not_before = self._loop.time() + seconds

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        for data in self._waiting:
            transport.write(data)
        if self._is_over:
            transport.close()

    def data_received(self, data: bytes) -> None:
        self._later("send", data)

    def connection_lost(self, error: Exception | None) -> None:
        self._later("end")

    def send(self, data: bytes) -> None:
        if self._transport is None:
            self._waiting.append(data)
        else:
            self._transport.write(data)

    def end(self) -> None:
        self._is_over = True
        if self._transport is not None:
            self._transport.close()

    def _later(self, name: str, *arguments: bytes) -> None:
        when = max(self._loop.time(), self._not_before) + self._delay_seconds
        self._loop.call_at(when, getattr(self.other, name), *arguments)


async def _serve(endpoint: str, round_trip_seconds: float) -> None:
    loop = asyncio.get_running_loop()
    backend = EndpointUrl.parse(endpoint).origin
    one_way = round_trip_seconds / 2
    opening = set[asyncio.Task[None]]()

    def accept() -> _Side:
        client, server = _Side(one_way), _Side(one_way)
        client.other, server.other = server, client
        client.hold(round_trip_seconds)
        task = loop.create_task(_open(client, server))
        opening.add(task)
        task.add_done_callback(opening.discard)
        return client

    async def _open(client: _Side, server: _Side) -> None:
        try:
            if backend.scheme == UNIX:
                await loop.create_unix_connection(lambda: server, backend.host)
            else:
                await loop.create_connection(lambda: server, "127.0.0.1", backend.port)
        except OSError:
            client.end()

    listener = await loop.create_server(accept, "127.0.0.1", 0, backlog=1024)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await listener.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], float(sys.argv[2])))

"""A proxy of TCP connections: what a balancer of connections, a NAT or an overlay network does to them.

It knows nothing of HTTP. Connections go round the backends, as kube-proxy's do.
"""

from __future__ import annotations

import itertools
import math
import select
import socket
import threading
import time
from types import TracebackType


class ConnectionProxy:
    """A context manager: listens, and hands each connection to the next one of ``backends`` on 127.0.0.1.

    ``bytes_per_second`` go each way, those of all connections together.

    Attributes:
        connections: how many each backend has got, by its port.
    """

    def __init__(
        self,
        *backends: int,
        host: str = "127.0.0.1",
        port: int = 0,
        bytes_per_second: float = math.inf,
    ) -> None:
        self._host, self.port = host, port
        self._backends = list(backends)
        self._turns = itertools.count()
        self._age = 0
        self._seconds_per_byte = 1 / bytes_per_second
        self._links = {True: threading.Lock(), False: threading.Lock()}
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self.connections = dict.fromkeys(backends, 0)

    def __enter__(self) -> ConnectionProxy:
        self._listener = socket.create_server((self._host, self.port), backlog=256)
        self.port = self._listener.getsockname()[1]
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        # Wakes the thread that waits for a connection.
        with socket.create_connection((self._host, self.port)):
            pass
        for thread in self._threads:
            thread.join()
        self._listener.close()

    @property
    def endpoint(self) -> str:
        return f"http://{self._host}:{self.port}"

    def hole(self) -> None:
        """Swallow what is sent on the connections of now, both ways, without FIN or RST; new ones work."""
        self._age += 1

    def add(self, backend: int) -> None:
        """One more backend for new connections."""
        self.connections[backend] = 0
        self._backends.append(backend)

    def remove(self, backend: int) -> None:
        """No new connections to this backend; those that it has stay."""
        self._backends.remove(backend)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._stopped.is_set():
                client.close()
                return
            backend = self._backends[next(self._turns) % len(self._backends)]
            try:
                server = socket.create_connection(("127.0.0.1", backend))
            except OSError:
                client.close()
                continue
            self.connections[backend] += 1
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._start(self._carry, client, server, self._age)

    def _pass(self, nbytes: int, *, is_request: bool) -> None:
        if self._seconds_per_byte:
            with self._links[is_request]:
                time.sleep(nbytes * self._seconds_per_byte)

    def _carry(self, client: socket.socket, server: socket.socket, age: int) -> None:
        other = {client: server, server: client}
        try:
            while not self._stopped.is_set():
                for source in select.select([client, server], [], [], 0.1)[0]:
                    data = source.recv(65536)
                    if age != self._age:
                        # Neither a FIN nor a byte is passed on.
                        if not data:
                            self._stopped.wait()
                            return
                    elif not data:
                        return
                    else:
                        self._pass(len(data), is_request=source is client)
                        other[source].sendall(data)
        except OSError:
            return
        finally:
            client.close()
            server.close()

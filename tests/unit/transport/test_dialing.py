"""TCP connections: the first address that answers, and a kernel that notices a dead peer."""

from __future__ import annotations

import ctypes
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import pytest

from beam_triton import TritonClient
from beam_triton.errors import ConnectError, ConnectTimeoutError
from beam_triton.testing import FakeModel, FakeTriton
from beam_triton.testing.ports import free_port
from beam_triton.transport.attempt import exchange_within
from beam_triton.transport.config import ConnectionPoolConfig, TlsConfig
from beam_triton.transport.connector import Connector
from beam_triton.transport.dialing import Address, Dialer
from beam_triton.transport.origin import Origin
from beam_triton.transport.pool import ConnectionPool
from tests.support import faults, sockets
from tests.support.answers import Answer
from tests.support.fault_server import FaultServer
from tests.support.names import resolving

_SO_ATTACH_FILTER = 26


def v4(host: str, port: int) -> Address:
    return Address(socket.AF_INET, socket.SOCK_STREAM, 0, (host, port))


def option(sock: socket.socket, name: str) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))


@contextmanager
def peer_that_dies() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection of `Dialer` whose peer drops every segment from now on, as a node without power does."""

    class Instruction(ctypes.Structure):
        _fields_ = [
            ("code", ctypes.c_uint16),
            ("jump_if_true", ctypes.c_uint8),
            ("jump_if_false", ctypes.c_uint8),
            ("operand", ctypes.c_uint32),
        ]

    # "Return 0": no byte of a segment is kept.
    program = (Instruction * 1)(Instruction(6, 0, 0, 0))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = Dialer().dial([v4(*listener.getsockname())], time.monotonic() + 5)
        peer, _ = listener.accept()
        with sock, peer:
            filter_program = struct.pack("HP", 1, ctypes.addressof(program))
            peer.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_program)
            yield sock, peer


def test_kernel_is_told_to_look_for_dead_peers() -> None:
    """Probes end a connection after 30 s, long before a NAT forgets it; so do bytes not acknowledged."""
    with FaultServer(lambda request: Answer()) as server:
        connection = Connector(TlsConfig()).open(Origin("http", "127.0.0.1", server.port), 5.0)
        with closing(connection):
            sock = connection.sock
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert option(sock, "TCP_NODELAY") == 1
            idle, interval, count = (
                option(sock, name) for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
            )
            assert (idle, interval, count) == (15, 5, 3)
            assert option(sock, "TCP_USER_TIMEOUT") == 30_000 == 1000 * (idle + interval * count)


@pytest.mark.parametrize("sends", [False, True], ids=["idle", "unacknowledged"])
def test_dead_peer_is_noticed(sends: bool) -> None:
    """In the time of its options, shorter here, be the connection idle or a request on its way."""
    with peer_that_dies() as (sock, _):
        for name, value in (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_USER_TIMEOUT", 3000)):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if sends:
            sock.sendall(b"POST / HTTP/1.1\r\n\r\n")
        sock.settimeout(10)
        started = time.monotonic()
        with pytest.raises(OSError, match="timed out") as raised:
            sock.recv(1)
        assert raised.value.errno is not None, "the test's own timeout"
        assert 2.5 <= time.monotonic() - started < 5


@pytest.mark.parametrize(("timeout_seconds", "user_timeout"), [(30.0, 30_000), (31.0, 0)])
def test_deadline_bounds_how_long_a_server_may_not_read(timeout_seconds: float, user_timeout: int) -> None:
    """``TCP_USER_TIMEOUT`` would end a request that a slow server has not yet made room for."""
    with FaultServer(lambda request: Answer()) as server:
        pool = ConnectionPool(ConnectionPoolConfig(), Connector(TlsConfig()).open, time.monotonic)
        with closing(pool):
            origin = Origin("http", "127.0.0.1", server.port)
            exchange_within(
                pool,
                origin,
                [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"],
                timeout_seconds=timeout_seconds,
                max_response_bytes=1000,
            )
            connection = pool.take_idle(origin)
            assert connection is not None
            assert option(connection.sock, "TCP_USER_TIMEOUT") == user_timeout
            pool.release(connection)


def test_dead_first_address_is_passed_over() -> None:
    """After a quarter of a second, and not again by the next connections."""
    with ExitStack() as stack:
        server = stack.enter_context(FaultServer(lambda request: Answer()))
        stack.enter_context(faults.unanswering_port("127.0.0.2", server.port))
        stack.enter_context(resolving({"two": ["127.0.0.2", "127.0.0.1"]}))
        connector = Connector(TlsConfig())
        before = sockets.open_sockets()
        seconds = []
        for _ in range(3):
            started = time.monotonic()
            with closing(connector.open(Origin("http", "two", server.port), 5.0)) as connection:
                seconds.append(time.monotonic() - started)
                assert connection.sock.getpeername()[0] == "127.0.0.1"
                # This one and the server's end of it, but not the attempt that lost.
                assert sockets.settles(sockets.open_sockets, before + 2) == before + 2
            assert sockets.settles(sockets.open_sockets, before) == before
    assert 0.25 <= seconds[0] < 0.6
    assert max(seconds[1:]) < 0.2


def test_refusing_first_address_costs_no_time() -> None:
    """The next one is tried at once."""
    with (
        FaultServer(lambda request: Answer()) as server,
        resolving({"two": ["127.0.0.2", "127.0.0.1"]}),
    ):
        started = time.monotonic()
        with closing(Connector(TlsConfig()).open(Origin("http", "two", server.port), 5.0)) as connection:
            assert time.monotonic() - started < 0.2
            assert connection.sock.getpeername()[0] == "127.0.0.1"


def test_client_uses_the_address_that_answers() -> None:
    """Health, metadata and inference alike."""
    model = FakeModel(
        lambda inputs: {"y": inputs["x"]}, inputs={"x": ("FP32", [1])}, outputs={"y": ("FP32", [1])}
    )
    with ExitStack() as stack:
        triton = stack.enter_context(FakeTriton({"echo": model}))
        port = int(triton.endpoint.rpartition(":")[2])
        stack.enter_context(faults.unanswering_port("127.0.0.2", port))
        stack.enter_context(resolving({"two": ["127.0.0.2", "127.0.0.1"]}))
        client = stack.enter_context(TritonClient(f"http://two:{port}"))
        started = time.monotonic()
        assert client.is_server_ready()
        assert client.infer("echo", {"x": [[5.0]]}).outputs["y"].tolist() == [[5.0]]
        assert time.monotonic() - started < 2


def test_addresses_of_both_families_are_tried_in_turn() -> None:
    """A name with many IPv6 addresses that lead nowhere is reached at its first IPv4 one."""
    six = [Address(socket.AF_INET6, socket.SOCK_STREAM, 0, (f"fd00::{n}", 1, 0, 0)) for n in (1, 2, 3)]
    four = [v4("10.0.0.1", 1), v4("10.0.0.2", 1)]
    assert Dialer()._in_order(six + four) == [six[0], four[0], six[1], four[1], six[2]]


@pytest.mark.parametrize("silent", [True, False])
def test_error_tells_what_each_address_did(silent: bool) -> None:
    """A time-out where one of them is silent, else a refused connection."""
    port = free_port()
    with ExitStack() as stack:
        if silent:
            stack.enter_context(faults.unanswering_port("127.0.0.2", port))
        stack.enter_context(resolving({"two": ["127.0.0.2", "127.0.0.3"]}))
        kind = ConnectTimeoutError if silent else ConnectError
        with pytest.raises(kind) as raised:
            Connector(TlsConfig()).open(Origin("http", "two", port), 0.6)
    text = str(raised.value)
    assert f"http://two:{port}" in text
    assert ("127.0.0.2: no answer" if silent else "127.0.0.2: Connection refused") in text
    assert "127.0.0.3: Connection refused" in text


def test_chosen_address_is_connected_to() -> None:
    """Whatever others the name has; and errors name it."""
    with FaultServer(lambda request: Answer()) as server, resolving({"triton": ["127.0.0.2"]}):
        origin = Origin("http", "triton", server.port, "127.0.0.1")
        with closing(Connector(TlsConfig()).open(origin, 2.0)) as connection:
            assert connection.sock.getpeername() == ("127.0.0.1", server.port)
        with pytest.raises(ConnectError, match=r"http://triton:1 \(127\.0\.0\.1\): .*refused"):
            Connector(TlsConfig()).open(Origin("http", "triton", 1, "127.0.0.1"), 2.0)

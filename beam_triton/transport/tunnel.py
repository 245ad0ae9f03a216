"""Connecting through a proxy: to the proxy itself, and by CONNECT to the server behind it."""

from __future__ import annotations

import socket
import time

from beam_triton.errors import ConnectError, ConnectTimeoutError, ProxyError, RemoteProtocolError
from beam_triton.transport.dialing import Dialer, look_up
from beam_triton.transport.origin import Origin
from beam_triton.transport.proxies import Proxy
from beam_triton.transport.response_head import MAX_HEAD_BYTES, ResponseHead, parse_response_head


def connect_through(proxy: Proxy, origin: Origin, dialer: Dialer, timeout_seconds: float) -> socket.socket:
    """A socket to ``proxy`` for plain requests to ``origin``; for TLS one to ``origin``, through a tunnel.

    Raises:
        ConnectTimeoutError: not connected within ``timeout_seconds``.
        ProxyError: the proxy refused.
        ConnectError: the proxy, or ``origin`` from the proxy, cannot be reached.
    """
    deadline = time.monotonic() + timeout_seconds
    try:
        addresses = look_up(proxy.host, proxy.port)
    except (OSError, UnicodeError) as error:
        raise ConnectError(
            f"the host name of the proxy {proxy}, on the way to {origin.url}, has no address: {error}"
        ) from error
    try:
        sock = dialer.dial(addresses, deadline)
    except TimeoutError as error:
        raise ConnectTimeoutError(
            f"the proxy {proxy}, on the way to {origin.url}, did not accept a connection within "
            f"{timeout_seconds:g} s"
        ) from error
    except OSError as error:
        raise ConnectError(
            f"cannot connect to the proxy {proxy}, on the way to {origin.url}: {error}"
        ) from error
    if origin.scheme == "http":
        return sock
    try:
        head = _ask_for_tunnel(sock, proxy, origin, deadline)
    except TimeoutError as error:
        sock.close()
        raise ConnectTimeoutError(
            f"the proxy {proxy} did not connect to {origin.url} within {timeout_seconds:g} s"
        ) from error
    except OSError as error:
        sock.close()
        raise ConnectError(
            f"the proxy {proxy} ended the connection that was to lead to {origin.url}: {error}"
        ) from error
    except RemoteProtocolError as error:
        sock.close()
        raise ProxyError(f"{proxy}, named as the proxy for {origin.url}, is none: {error.message}") from error
    except BaseException:
        sock.close()
        raise
    if not 200 <= head.status < 300:
        sock.close()
        raise _refusal(head, proxy, origin)
    return sock


def _ask_for_tunnel(sock: socket.socket, proxy: Proxy, origin: Origin, deadline: float) -> ResponseHead:
    target = origin.url.partition("://")[2]
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.authorization is not None:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    _bound(sock, deadline)
    sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
    while True:
        head = _read_head(sock, deadline)
        if head.status >= 200:
            return head


def _read_head(sock: socket.socket, deadline: float) -> ResponseHead:
    data = b""
    while not data.endswith((b"\r\n\r\n", b"\n\n")):
        if len(data) > MAX_HEAD_BYTES:
            raise RemoteProtocolError(f"its answer's head is longer than {MAX_HEAD_BYTES} bytes")
        _bound(sock, deadline)
        # One byte at a time: what follows the head belongs to the server behind the proxy.
        received = sock.recv(1)
        if not received:
            raise ConnectionResetError("closed without an answer" if not data else "closed within its answer")
        data += received
    return parse_response_head(data.rstrip(b"\r\n"))


def _bound(sock: socket.socket, deadline: float) -> None:
    left_seconds = deadline - time.monotonic()
    if left_seconds <= 0:
        raise TimeoutError
    sock.settimeout(left_seconds)


def _refusal(head: ResponseHead, proxy: Proxy, origin: Origin) -> ConnectError:
    answer = f"{head.status} {head.reason}".strip()
    if head.status == 407:
        given = "refuses the credentials of its URL" if proxy.authorization else "asks for credentials"
        return ProxyError(
            f"the proxy {proxy} {given} ({answer}), so {origin.url} is not reached: give them as "
            f"http://USER:PASSWORD@host:port"
        )
    if head.status >= 500:
        return ConnectError(f"the proxy {proxy} cannot connect to {origin.url}: it answered {answer}")
    return ProxyError(f"the proxy {proxy} refuses to connect to {origin.url}: it answered {answer}")

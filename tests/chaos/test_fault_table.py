"""The table of faults: what the user sees for each, and within how long.

A proxy in front of a real Triton plays one fault on the inference request; the time is that of this one
request. ``timeout_seconds`` is 1, and a deadline may be overrun by half a second at most.
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from beam_triton import TritonClient
from beam_triton.errors import (
    ConnectError,
    ConnectionLostError,
    ConnectTimeoutError,
    DeadlineExceededError,
    InferenceError,
    InvalidRequestError,
    ModelExecutionError,
    PoolTimeoutError,
    RemoteProtocolError,
    ServerOverloadedError,
    ServerUnavailableError,
    TritonError,
)
from beam_triton.testing import LocalTriton
from tests.support import faults, sockets
from tests.support.answers import Answer, forward_to
from tests.support.fault_server import Fault, FaultServer, infer_requests, serve

TIMEOUT_SECONDS = 1.0
AT_ONCE_SECONDS = 0.5
BY_DEADLINE_SECONDS = TIMEOUT_SECONDS + 0.5
MAX_RESPONSE_BYTES = 4 << 20
QUICK_POOL = {"connect_timeout_seconds": 0.9}
MODEL = "echo_variable"

SMALL = np.arange(12, dtype=np.float32).reshape(4, 3)
LARGE = np.zeros((16, 1 << 19), np.float32)  # 32 MiB: more than the kernel buffers for a client

# Offsets that cut Triton's answer to SMALL: within its head, and within its body.
IN_HEAD = 40
IN_BODY = -10

HTML = Answer(200, b"<html><body>Please log in</body></html>", (("Content-Type", "text/html"),))


@dataclass(frozen=True)
class Row:
    """``sees`` is None where the user notices no fault: the right answer comes."""

    fault: Fault
    sees: type[TritonError] | None
    within_seconds: float
    inputs: npt.NDArray[np.float32] = field(default_factory=lambda: SMALL)
    server: Mapping[str, Any] = field(default_factory=dict)


def at_once(fault: Fault, sees: type[TritonError] | None, **more: Any) -> Row:
    return Row(fault, sees, AT_ONCE_SECONDS, **more)


def by_deadline(fault: Fault, **more: Any) -> Row:
    return Row(fault, DeadlineExceededError, BY_DEADLINE_SECONDS, **more)


def status(code: int, body: bytes = b'{"error":"the reason"}', *headers: tuple[str, str]) -> Fault:
    return faults.answered(Answer(code, body, headers))


TABLE = {
    # The connection ends.
    "reset before the request is read": at_once(faults.reset_before_reading, ConnectionLostError),
    "reset after the request was read": at_once(faults.reset_after_reading, ConnectionLostError),
    "reset after the model has run": at_once(faults.reset_after_running, ConnectionLostError),
    "reset within the answer's head": at_once(faults.reset_within_answer(IN_HEAD), ConnectionLostError),
    "reset within the answer's body": at_once(faults.reset_within_answer(IN_BODY), ConnectionLostError),
    "reset while a large body is sent": at_once(
        faults.reset_before_reading, ConnectionLostError, inputs=LARGE, server={"receive_buffer_bytes": 4096}
    ),
    "closed without an answer": at_once(faults.closed_without_answer, ConnectionLostError),
    "half-closed without an answer": at_once(faults.half_closed_without_answer, ConnectionLostError),
    "closed within the head": at_once(faults.truncated(IN_HEAD), ConnectionLostError),
    "closed within the body": at_once(faults.truncated(IN_BODY), ConnectionLostError),
    "closed one byte early": at_once(faults.truncated_body(1), ConnectionLostError),
    # No answer, or too slow.
    "silence": by_deadline(faults.silence),
    "silence, request unread": by_deadline(faults.deafness),
    "silence within the head": by_deadline(faults.stalled(IN_HEAD)),
    "silence within the body": by_deadline(faults.stalled(IN_BODY)),
    "a byte a second from the start": by_deadline(faults.trickle(1.0)),
    "a byte every 50 ms from the start": by_deadline(faults.trickle(0.05)),
    "a byte every 50 ms of the body": by_deadline(faults.trickle(0.05, after_bytes=150)),
    "request body is not read": by_deadline(
        faults.stops_reading(), inputs=LARGE, server={"receive_buffer_bytes": 4096}
    ),
    "request body is read in part": by_deadline(
        faults.stops_reading(1 << 20), inputs=LARGE, server={"receive_buffer_bytes": 4096}
    ),
    "late, within the deadline": Row(faults.late(0.4), None, BY_DEADLINE_SECONDS),
    # Lengths.
    "length too long, closed": at_once(faults.wrong_content_length(5, close=True), ConnectionLostError),
    "length too long, open": by_deadline(faults.wrong_content_length(5, close=False)),
    "length too short, open": at_once(faults.wrong_content_length(-5, close=False), RemoteProtocolError),
    "length too short, closed": at_once(faults.wrong_content_length(-5, close=True), RemoteProtocolError),
    "length negative": at_once(faults.content_length("-1", close=False), RemoteProtocolError),
    "length not a number": at_once(faults.content_length("many", close=False), RemoteProtocolError),
    "length with a sign": at_once(faults.content_length("+12", close=False), RemoteProtocolError),
    "length above max_response_bytes": at_once(
        faults.content_length(str(1 << 40), close=False), RemoteProtocolError
    ),
    "length of 400 digits": at_once(faults.content_length("9" * 400, close=False), RemoteProtocolError),
    "two different lengths": at_once(faults.content_length("12", "13", close=False), RemoteProtocolError),
    "no length, delimited by close": at_once(faults.close_delimited, None),
    "chunked": at_once(faults.chunked(), None),
    "chunked, chunks of one byte": at_once(faults.chunked(chunk_bytes=1), None),
    "chunked, with a trailer": at_once(faults.chunked(ending=b"0\r\nX-Sum: 1\r\n\r\n"), None),
    "chunked, closed within a chunk": at_once(
        faults.chunked(ending=b"5\r\nab", close=True), ConnectionLostError
    ),
    "chunked, closed before the last chunk": at_once(
        faults.chunked(ending=b"", close=True), ConnectionLostError
    ),
    "chunked, silence before the last chunk": by_deadline(faults.chunked(ending=b"")),
    "chunked, size not a number": at_once(faults.chunked(ending=b"no\r\n"), RemoteProtocolError),
    "chunked, negative size": at_once(faults.chunked(ending=b"-1\r\n"), RemoteProtocolError),
    "chunked, huge size": at_once(faults.chunked(ending=b"f" * 40 + b"\r\n"), RemoteProtocolError),
    "chunked, chunk longer than its size": at_once(
        faults.chunked(ending=b"2\r\nabcd\r\n0\r\n\r\n"), RemoteProtocolError
    ),
    "chunked, endless size line": at_once(faults.chunked(ending=b"0" * 100_000), RemoteProtocolError),
    # Heads.
    "not HTTP": at_once(faults.garbage_status_line, RemoteProtocolError),
    "endless header": at_once(faults.endless_header, RemoteProtocolError),
    "endless header lines": at_once(faults.endless_header_lines, RemoteProtocolError),
    "endless body": at_once(faults.endless_body, RemoteProtocolError),
    "HTTP/2 preface": at_once(faults.raw_answer(b"\0\0\x12\4\0\0\0\0\0\0\3\0\0\0\x80"), RemoteProtocolError),
    "103 before the answer": at_once(faults.informational_first(103), None),
    "100 before the answer": at_once(faults.informational_first(100), None),
    "thousands of 100s before the answer": at_once(faults.informational_first(100, 5000), None),
    "101": at_once(faults.answered(Answer(101)), RemoteProtocolError),
    # Encodings.
    "gzip, not requested": at_once(faults.gzipped, None),
    "invalid gzip": at_once(faults.with_headers(("Content-Encoding", "gzip")), RemoteProtocolError),
    "invalid deflate": at_once(faults.with_headers(("Content-Encoding", "deflate")), RemoteProtocolError),
    "unknown encoding": at_once(faults.with_headers(("Content-Encoding", "br")), RemoteProtocolError),
    "gzip bomb of 1 GiB": at_once(faults.gzip_bomb(1 << 30), RemoteProtocolError),
    # Statuses that a proxy sends rather than Triton.
    "login page": at_once(faults.answered(HTML), RemoteProtocolError),
    "empty 200": at_once(faults.answered(Answer(200)), RemoteProtocolError),
    "204": at_once(faults.answered(Answer(204)), InferenceError),
    "redirect": at_once(
        faults.answered(Answer(302, b"", (("Location", "http://elsewhere.example/"),))), InferenceError
    ),
    "304": at_once(faults.answered(Answer(304)), InferenceError),
    "400": at_once(status(400), InvalidRequestError),
    "401": at_once(status(401), InferenceError),
    "407": at_once(status(407), InferenceError),
    "413": at_once(status(413, b"<html>too large</html>"), InvalidRequestError),
    "413 while a large body is sent": at_once(
        faults.early_answer(Answer(413), after_bytes=1000, then_read=False), InvalidRequestError, inputs=LARGE
    ),
    "429": at_once(status(429), ServerOverloadedError),
    "500": at_once(status(500), ModelExecutionError),
    "502": at_once(status(502, b"<html>Bad Gateway</html>"), ServerUnavailableError),
    "503": at_once(status(503, b""), ServerUnavailableError),
    "503 while a large body is sent": at_once(
        faults.early_answer(Answer(503), after_bytes=1000, then_read=True),
        ServerUnavailableError,
        inputs=LARGE,
    ),
    "504": at_once(status(504, b"\xff\xfe\x00 not text"), ServerUnavailableError),
    "599": at_once(status(599), InferenceError),
}


@contextmanager
def proxied(
    triton: LocalTriton, row: Row, *, once: bool = False, **client_options: Any
) -> Iterator[tuple[FaultServer, TritonClient]]:
    """A fault proxy in front of Triton, and a client that already knows the model."""
    upstream = forward_to(int(triton.endpoint.rpartition(":")[2]))
    with FaultServer(upstream, when=infer_requests, **row.server) as proxy:
        options: dict[str, Any] = {
            "timeout_seconds": TIMEOUT_SECONDS,
            "pool": QUICK_POOL,
            "max_response_bytes": MAX_RESPONSE_BYTES + row.inputs.nbytes,
            "retry": {"max_retries": 0},
            "circuit_breaker": None,
            # The faults are those of a body on its way.
            "shared_memory": "never",
        }
        with TritonClient(proxy.endpoint, **(options | client_options)) as client:
            assert np.array_equal(echo(client, SMALL), SMALL)
            proxy.play([row.fault] if once else row.fault)
            yield proxy, client


def echo(client: TritonClient, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    y: npt.NDArray[np.float32] = client.infer(MODEL, {"x": x}).outputs["y"]
    return y


def inferences(proxy: FaultServer) -> int:
    return sum(infer_requests(request.target.encode()) for request in proxy.requests)


@pytest.mark.parametrize("name", TABLE)
def test_fault_raises_its_error_within_its_time(triton: LocalTriton, name: str) -> None:
    """The next request succeeds, and no connection stays open."""
    row = TABLE[name]
    with proxied(triton, row) as (proxy, client):
        started = time.monotonic()
        if row.sees is None:
            assert np.array_equal(echo(client, row.inputs), row.inputs)
        else:
            with pytest.raises(TritonError) as caught:
                echo(client, row.inputs)
            assert type(caught.value) is row.sees, caught.value
        assert time.monotonic() - started <= row.within_seconds
        proxy.play(serve)
        assert np.array_equal(echo(client, SMALL + 100), SMALL + 100)
    assert sockets.settles(lambda: proxy.open_now, 0) == 0


@pytest.mark.parametrize(
    "name", [name for name, row in TABLE.items() if row.within_seconds <= AT_ONCE_SECONDS]
)
def test_transient_faults_are_retried_and_others_are_not(triton: LocalTriton, name: str) -> None:
    """A fault that does not last costs a retryable request only time; any other is sent only once."""
    row = TABLE[name]
    with proxied(triton, row, once=True, timeout_seconds=10.0, retry={}) as (proxy, client):
        if row.sees is None or row.sees.retryable:
            assert np.array_equal(echo(client, row.inputs), row.inputs)
        else:
            before = inferences(proxy)
            with pytest.raises(row.sees):
                echo(client, row.inputs)
            assert inferences(proxy) - before == 1


def test_timed_out_request_closes_its_connection(triton: LocalTriton) -> None:
    """The connection of a request that timed out is closed at once, while the client stays open."""
    with proxied(triton, by_deadline(faults.silence)) as (proxy, client):
        with pytest.raises(DeadlineExceededError):
            echo(client, SMALL)
        assert sockets.settles(lambda: proxy.open_now, 0, within_seconds=0.5) == 0


def test_timed_out_upload_closes_its_connection(triton: LocalTriton) -> None:
    """Megabytes that the server does not read do not keep the connection open after the deadline."""
    row = TABLE["request body is not read"]
    with proxied(triton, row) as (proxy, client):
        with pytest.raises(DeadlineExceededError):
            echo(client, row.inputs)
        assert sockets.settles(lambda: proxy.open_now, 0, within_seconds=0.5) == 0


def test_refused_connection_raises_connect_error_at_once(triton: LocalTriton) -> None:
    """A port without a listener raises ``ConnectError``, and the request cannot have run."""
    started = time.monotonic()
    with faults.refusing_port() as port, pytest.raises(ConnectError) as caught:
        refused = TritonClient(
            f"http://127.0.0.1:{port}",
            timeout_seconds=TIMEOUT_SECONDS,
            pool=QUICK_POOL,
            retry={"max_retries": 0},
        )
        with refused:
            echo(refused, SMALL)
    assert type(caught.value) is ConnectError
    assert not caught.value.may_have_run
    assert time.monotonic() - started <= AT_ONCE_SECONDS


@pytest.mark.parametrize("connect_timeout_seconds", [0.3, 0.9])
def test_connecting_is_bounded_by_connect_timeout_seconds(connect_timeout_seconds: float) -> None:
    """A port that never answers a connection request raises ``ConnectTimeoutError``."""
    started = time.monotonic()
    with (
        faults.unanswering_port() as port,
        TritonClient(
            f"http://127.0.0.1:{port}",
            timeout_seconds=TIMEOUT_SECONDS,
            pool={"connect_timeout_seconds": connect_timeout_seconds},
            retry={"max_retries": 0},
        ) as client,
        pytest.raises(ConnectTimeoutError),
    ):
        echo(client, SMALL)
    assert time.monotonic() - started <= connect_timeout_seconds + 0.5


def test_connection_reset_on_accept_is_retried(triton: LocalTriton) -> None:
    """A connection that is reset as soon as it is established is lost, and a retry opens the next one."""
    pending = iter([faults.reset_before_reading, faults.reset_before_reading])
    with proxied(triton, at_once(serve, None), timeout_seconds=10.0, retry={}) as (proxy, client):
        opened = proxy.opened
        proxy.on_accept = lambda exchange: next(pending, lambda _: None)(exchange)
        proxy.drop_connections()
        assert np.array_equal(echo(client, SMALL), SMALL)
        assert proxy.opened - opened == 3


def test_https_to_a_plain_http_port_raises_connect_error(triton: LocalTriton) -> None:
    """The error is raised at once and names TLS."""
    started = time.monotonic()
    endpoint = triton.endpoint.replace("http:", "https:")
    with (
        TritonClient(
            endpoint, timeout_seconds=TIMEOUT_SECONDS, pool=QUICK_POOL, retry={"max_retries": 0}
        ) as client,
        pytest.raises(ConnectError, match=r"TLS|SSL"),
    ):
        echo(client, SMALL)
    assert time.monotonic() - started <= AT_ONCE_SECONDS


def test_tls_failure_fails_over_to_the_next_endpoint(triton: LocalTriton) -> None:
    """A failed handshake is not retried at the same endpoint, but at the next one."""
    broken = triton.endpoint.replace("http:", "https:")
    with TritonClient(
        [broken, triton.endpoint], timeout_seconds=TIMEOUT_SECONDS, pool=QUICK_POOL, retry={"max_retries": 1}
    ) as client:
        for _ in range(4):
            assert np.array_equal(echo(client, SMALL), SMALL)


def test_tls_handshake_is_bounded_by_connect_timeout_seconds(triton: LocalTriton) -> None:
    """The handshake is part of connecting."""
    started = time.monotonic()
    with (
        FaultServer(lambda request: Answer(), on_accept=faults.deafness) as server,
        TritonClient(
            server.endpoint.replace("http:", "https:"),
            timeout_seconds=10.0,
            pool={"connect_timeout_seconds": 0.5},
            retry={"max_retries": 0},
        ) as client,
        pytest.raises(ConnectTimeoutError),
    ):
        echo(client, SMALL)
    assert time.monotonic() - started <= 1.0


def test_request_fails_with_pool_timeout_when_no_connection_becomes_free(triton: LocalTriton) -> None:
    """Waiting for a connection that another client of the process holds ends at the deadline."""
    one: dict[str, Any] = {"pool": QUICK_POOL | {"max_total": 1, "max_idle": 1}, "max_concurrent_requests": 1}
    with (
        proxied(triton, by_deadline(faults.silence), **one) as (proxy, waiting),
        # A different retry policy, so that the two share the pool but not the limit of requests in flight.
        TritonClient(proxy.endpoint, timeout_seconds=3.0, retry={"max_retries": 1}, **one) as holding,
        ThreadPoolExecutor(1) as threads,
    ):
        held = threads.submit(echo, holding, SMALL)
        time.sleep(0.2)
        started = time.monotonic()
        with pytest.raises(PoolTimeoutError):
            echo(waiting, SMALL)
        assert time.monotonic() - started <= BY_DEADLINE_SECONDS
        assert isinstance(held.exception(), DeadlineExceededError)
        assert proxy.most_open == 1


def test_gzip_bomb_inflates_at_most_to_max_response_bytes(triton: LocalTriton) -> None:
    """A 1 GiB bomb under a limit of 4 MiB costs at most tens of MiB."""
    with proxied(triton, TABLE["gzip bomb of 1 GiB"], timeout_seconds=10.0) as (_, client):
        gc.collect()
        tracemalloc.start()
        try:
            with pytest.raises(RemoteProtocolError):
                echo(client, SMALL)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak_bytes <= 32 << 20


def test_retries_end_at_the_deadline(triton: LocalTriton) -> None:
    """A fault that lasts fails at the deadline, or earlier where no further retry fits."""
    row = TABLE["502"]
    with proxied(triton, row, timeout_seconds=1.5, retry={}) as (proxy, client):
        before, started = inferences(proxy), time.monotonic()
        with pytest.raises(TritonError) as caught:
            echo(client, SMALL)
        assert time.monotonic() - started <= 2.0
        assert caught.value.attempts
        assert 2 <= inferences(proxy) - before == len(caught.value.attempts) + 1

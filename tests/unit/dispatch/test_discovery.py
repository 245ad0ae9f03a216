"""Discovery by DNS: the addresses of a name are endpoints, and those that are gone get no more requests."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any
from unittest import mock

import pytest

from beam_triton.dispatch.call import Call
from beam_triton.dispatch.discovery import Discovery
from beam_triton.dispatch.dispatcher import Dispatcher
from beam_triton.dispatch.endpoints import Admission, EndpointSet, EndpointSetKey
from beam_triton.errors import ConnectError
from beam_triton.policy.circuit_breaker import CircuitBreakerPolicy
from beam_triton.policy.retry import RetryPolicy
from beam_triton.transport.origin import EndpointUrl
from tests.support import faults, sockets
from tests.support.answers import Answer, always
from tests.support.connection_proxy import ConnectionProxy
from tests.support.dispatching import QUICK_RETRIES, ask, open_channel, post, read
from tests.support.fault_server import FaultServer
from tests.support.names import resolving

NAME = EndpointUrl.parse("http://triton:8000/prefix")
OTHER = EndpointUrl.parse("https://other:8443")
OK = always(Answer())
INTERVAL_SECONDS = 0.05
PATIENCE_SECONDS = 5.0


@contextmanager
def discovering(
    *urls: EndpointUrl, is_unhealthy: Callable[[], bool] = lambda: False, seconds: float = INTERVAL_SECONDS
) -> Iterator[queue.Queue[list[str | None]]]:
    """The addresses that a discovery reports, one entry for each change."""
    changes: queue.Queue[list[str | None]] = queue.Queue()
    discovery = Discovery(
        urls, seconds, lambda found: changes.put([each.origin.address for each in found]), is_unhealthy
    )
    discovery.start()
    try:
        yield changes
    finally:
        discovery.stop()
        assert sockets.settles(lambda: sockets.threads().count("beam_triton-discovery"), 0) == 0


def wait_for(condition: Callable[[], bool]) -> None:
    assert sockets.settles(lambda: int(condition()), 1, within_seconds=PATIENCE_SECONDS)


def endpoint_set(*urls: EndpointUrl) -> EndpointSet:
    return EndpointSet(EndpointSetKey(urls, "model", 8, 30.0, RetryPolicy(), CircuitBreakerPolicy()))


def allow(endpoints: EndpointSet, requests: int) -> None:
    """Let the limit of all endpoints together grow to at least so many, by answers that do not slow down."""
    limit = endpoints.limit
    assert limit is not None
    while limit.limit < requests:
        limit.was_reached = True
        limit.on_success(0.0)


def test_addresses_that_join_and_leave_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Each change once, with one line in the log; a name stands for itself until it has been looked up."""
    caplog.set_level(logging.INFO)
    names = {"triton": ["127.0.0.2", "127.0.0.3"]}
    with resolving(names), discovering(NAME) as changes:
        first = changes.get(timeout=PATIENCE_SECONDS)
        assert sorted(map(str, first)) == ["127.0.0.2", "127.0.0.3"]
        names["triton"] = ["127.0.0.4", "127.0.0.3"]
        assert changes.get(timeout=PATIENCE_SECONDS) == ["127.0.0.3", "127.0.0.4"]
        time.sleep(3 * INTERVAL_SECONDS)
        assert changes.empty()
    lines = [record.message for record in caplog.records if "address" in record.message]
    assert len(lines) == 2
    assert lines[1] == (
        "http://triton:8000/prefix has 2 address(es) now; new: 127.0.0.4; "
        "gone, and gets no more requests: 127.0.0.2"
    )


def test_each_name_of_a_list_expands() -> None:
    """An endpoint that is given by its address stays as it is."""
    names = {"triton": ["127.0.0.2", "127.0.0.3"], "other": ["127.0.0.2"]}
    literal = EndpointUrl.parse("http://127.0.0.9:1")
    with resolving(names), discovering(NAME, literal, OTHER) as changes:
        found = changes.get(timeout=PATIENCE_SECONDS)
        assert sorted(map(str, found)) == ["127.0.0.2", "127.0.0.2", "127.0.0.3", "None"]
        assert found[2] is None


def test_addresses_alone_need_no_thread() -> None:
    """There is nothing to look up."""
    with discovering(EndpointUrl.parse("http://127.0.0.9:1"), EndpointUrl.parse("http://[::1]:1")):
        assert sockets.settles(lambda: sockets.threads().count("beam_triton-discovery"), 0) == 0


def test_failing_lookup_keeps_what_was_found(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged once, and later lookups go on."""
    names = {"triton": ["127.0.0.2"]}
    lookups = 0
    ordinary = socket.getaddrinfo

    def counting(*arguments: Any, **keywords: Any) -> Any:
        nonlocal lookups
        lookups += 1
        return ordinary(*arguments, **keywords)

    with resolving(names), discovering(NAME) as changes:
        assert changes.get(timeout=PATIENCE_SECONDS) == ["127.0.0.2"]
        ordinary = socket.getaddrinfo
        with mock.patch.object(socket, "getaddrinfo", counting):
            names["triton"] = []
            wait_for(lambda: lookups >= 3)
            names["triton"] = ["127.0.0.5"]
            assert changes.get(timeout=PATIENCE_SECONDS) == ["127.0.0.5"]
    warnings = [record.message for record in caplog.records if "cannot be looked up" in record.message]
    assert len(warnings) == 1 and "http://triton:8000/prefix" in warnings[0]


def test_unhealthy_server_is_looked_for_sooner() -> None:
    """Another one may have taken its place."""
    names = {"triton": ["127.0.0.2"]}
    with resolving(names), discovering(NAME, is_unhealthy=lambda: True, seconds=1.2) as changes:
        changes.get(timeout=PATIENCE_SECONDS)
        names["triton"] = ["127.0.0.3"]
        started = time.monotonic()
        assert changes.get(timeout=PATIENCE_SECONDS) == ["127.0.0.3"]
        assert time.monotonic() - started < 0.6


def test_endpoint_that_stays_keeps_its_state() -> None:
    """Its breaker and limit; what is in flight to one that is gone ends there, and frees nothing else."""
    endpoints = endpoint_set(NAME.at("a"), NAME.at("b"))
    first, second = endpoints.endpoints
    allow(endpoints, 8)
    admissions = [endpoints.admit(()) for _ in range(2)]
    assert first.in_flight == second.in_flight == 1
    endpoints.replace([NAME.at("b"), NAME.at("c")])
    assert endpoints.endpoints[0] is second
    third = endpoints.endpoints[1]
    assert (second.in_flight, third.in_flight) == (1, 0)
    # A limit begins at one request.
    admission = endpoints.admit(())
    assert isinstance(admission, Admission) and admission.endpoint is third
    for admission in admissions:
        assert isinstance(admission, Admission)
        admission.end(True)
    assert (first.in_flight, second.in_flight, third.in_flight) == (0, 0, 1)


def test_slow_lookup_delays_no_request() -> None:
    """Requests go to the name, or to what is known, meanwhile; and a channel can be closed."""
    ordinary, is_over = socket.getaddrinfo, threading.Event()

    def hanging(*arguments: Any, **keywords: Any) -> Any:
        if threading.current_thread().name == "beam_triton-discovery":
            is_over.wait(10)
        return ordinary(*arguments, **keywords)

    with FaultServer(OK) as server, mock.patch.object(socket, "getaddrinfo", hanging):
        try:
            started = time.monotonic()
            channel = open_channel(f"http://localhost:{server.port}", discovery_seconds=INTERVAL_SECONDS)
            with closing(channel):
                assert ask(channel).error is None
            assert time.monotonic() - started < 2
        finally:
            is_over.set()
    assert sockets.settles(lambda: sockets.threads().count("beam_triton-discovery"), 0) == 0


def test_requests_name_the_host_and_errors_the_address() -> None:
    """A server sees the name that the user gave; the user sees which of its addresses failed."""
    with FaultServer(OK) as server, resolving({"triton": ["127.0.0.1"]}):
        endpoint = f"http://triton:{server.port}"
        with closing(open_channel(endpoint, discovery_seconds=INTERVAL_SECONDS)) as channel:
            wait_for(lambda: channel.endpoints.endpoints[0].url.origin.address == "127.0.0.1")
            assert ask(channel).error is None
            assert server.requests[0].header("Host") == f"triton:{server.port}"
            assert str(channel.endpoints) == f"{endpoint} (127.0.0.1)"
    with resolving({"triton": ["127.0.0.1"]}):
        with closing(open_channel("http://triton:1", discovery_seconds=INTERVAL_SECONDS)) as channel:
            wait_for(lambda: channel.endpoints.endpoints[0].url.origin.address == "127.0.0.1")
            error = ask(channel).error
        assert isinstance(error, ConnectError)
        assert "http://triton:1 (127.0.0.1)" in str(error)


@pytest.mark.parametrize("leaves", ["drained", "killed"])
def test_address_that_leaves_loses_nothing(leaves: str) -> None:
    """Requests in flight to it end there, or are sent to another one if it is killed."""
    with ExitStack() as stack:
        server = stack.enter_context(FaultServer(OK, [faults.late(0.3)] * 4))
        pod = stack.enter_context(ExitStack())
        leaving = pod.enter_context(ConnectionProxy(server.port, host="127.0.0.2"))
        staying = stack.enter_context(ConnectionProxy(server.port, host="127.0.0.3", port=leaving.port))
        names = {"triton": ["127.0.0.2", "127.0.0.3"]}
        stack.enter_context(resolving(names))
        channel = stack.enter_context(
            closing(
                open_channel(
                    f"http://triton:{leaving.port}", retry=QUICK_RETRIES, discovery_seconds=INTERVAL_SECONDS
                )
            )
        )
        wait_for(lambda: len(channel.endpoints.endpoints) == 2)
        allow(channel.endpoints, 4)
        dispatcher: Dispatcher[int] = Dispatcher(channel)
        for number in range(4):
            dispatcher.submit(number, post(), read)
        while not (leaving.connections[server.port] and staying.connections[server.port]):
            dispatcher.step()
        names["triton"] = ["127.0.0.3"]
        wait_for(lambda: len(channel.endpoints.endpoints) == 1)
        before = leaving.connections[server.port]
        if leaves == "killed":
            pod.close()
        dispatcher.drain()
        calls: list[Call] = [call for _, call in dispatcher.completed]
        assert [call.error for call in calls] == [None] * 4
        assert sum(call.record.retries for call in calls) == (before if leaves == "killed" else 0)
        for _ in range(4):
            assert ask(channel).error is None
        assert leaving.connections[server.port] == before

"""Calls and circuit breakers: held, probed, admitted again."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from beam_triton.dispatch import request_head as request_module
from beam_triton.dispatch.channel import Channel
from beam_triton.dispatch.dispatcher import Dispatcher
from beam_triton.dispatch.endpoints import Admission
from beam_triton.errors import CircuitOpenError, ConfigurationError, ServerUnavailableError
from beam_triton.policy.circuit_breaker import CircuitBreakerPolicy, State
from tests.support import faults, sockets
from tests.support.answers import Answer, always
from tests.support.dispatching import QUICK_RETRIES, ask, free_slots, open_channel, post, read
from tests.support.fault_server import Exchange, FaultServer, infer_requests, serve

OK = always(Answer(200, b"answer"))
SICK = faults.answered(Answer(503, b'{"error":"stopping"}'))


def policy(**options: Any) -> CircuitBreakerPolicy:
    return CircuitBreakerPolicy(
        **{
            "minimum_requests": 3,
            "open_seconds": 0.3,
            "half_open_requests": 2,
            "health_check_interval_seconds": None,
        }
        | options
    )


def state_of(channel: Channel, number: int = 0) -> State:
    breaker = channel.endpoints.endpoints[number].breaker
    assert breaker is not None
    return breaker.state


def open_breaker(channel: Channel) -> None:
    """Fails requests until the breaker of the only endpoint opens; the request that opens it may be held."""
    dispatcher: Dispatcher[None] = Dispatcher(channel)
    for _ in range(3):
        dispatcher.submit(None, post(), read)
    while state_of(channel) is not State.OPEN:
        dispatcher.wait()
    dispatcher.cancel()


def test_time_in_which_others_have_their_turn_is_not_spent_of_max_wait_seconds() -> None:
    """A request is held for overload, waits long for its turn, and is held while its server is unhealthy."""
    breaker = policy(minimum_requests=1, half_open_requests=1, max_wait_seconds=0.6)
    busy = faults.answered(Answer(429, b'{"error":"busy"}'))
    with FaultServer(OK, [busy]) as server:
        channel = open_channel(
            server.endpoint, retry=QUICK_RETRIES, circuit_breaker=breaker, max_concurrent_requests=1
        )
        with closing(channel):
            (endpoint,) = channel.endpoints.endpoints
            dispatcher: Dispatcher[None] = Dispatcher(channel)
            dispatcher.submit(None, post(), read)
            while endpoint.in_flight:
                dispatcher.wait()
            other = channel.endpoints.admit(())
            assert isinstance(other, Admission)
            ends_at = time.monotonic() + 1.0
            while time.monotonic() < ends_at:
                endpoint.answered_at = time.monotonic()
                dispatcher.wait()
            other.end(False, unreachable=True)
            assert not endpoint.is_healthy
            dispatcher.drain()
            ((_, call),) = dispatcher.completed
    assert (call.error, call.result) == (None, b"answer")


def test_when_open_fail_rejects_requests_at_once() -> None:
    """Nothing is sent to the server, and the error says when the breaker admits probes."""
    with (
        FaultServer(OK, SICK) as server,
        closing(open_channel(server.endpoint, circuit_breaker=policy(when_open="fail"))) as channel,
    ):
        for _ in range(3):
            assert isinstance(ask(channel).error, ServerUnavailableError)
        asked = len(server.requests)
        started = time.monotonic()
        error = ask(channel).error
        assert time.monotonic() - started < 0.2
        assert isinstance(error, CircuitOpenError) and 0 < error.open_seconds_left <= 0.3
        assert server.endpoint in error.message
        assert len(server.requests) == asked
        assert free_slots(channel) == 4


def test_held_requests_succeed_when_the_server_recovers() -> None:
    """Requests are held while the breaker is open, probe the server, and all succeed in the end."""
    with (
        FaultServer(OK, [SICK] * 3) as server,
        closing(open_channel(server.endpoint, circuit_breaker=policy())) as channel,
    ):
        open_breaker(channel)
        server.play([SICK])
        dispatcher: Dispatcher[int] = Dispatcher(channel)
        for number in range(12):
            dispatcher.submit(number, post(), read)
        dispatcher.drain()
        assert sorted(number for number, _ in dispatcher.completed) == list(range(12))
        assert all(call.result == b"answer" for _, call in dispatcher.completed)
        assert state_of(channel) is State.CLOSED
        assert dispatcher.throttled_seconds >= 0.5
        assert free_slots(channel) == 4


def test_max_wait_seconds_bounds_the_hold() -> None:
    """After ``max_wait_seconds`` a held request fails with the errors that it had before."""
    patience = policy(max_wait_seconds=0.4, open_seconds=30.0)
    with (
        FaultServer(OK, SICK) as server,
        closing(open_channel(server.endpoint, circuit_breaker=patience)) as channel,
    ):
        open_breaker(channel)
        started = time.monotonic()
        error = ask(channel).error
        assert 0.4 <= time.monotonic() - started < 0.9
        assert isinstance(error, CircuitOpenError)


def test_hold_does_not_count_against_the_deadline() -> None:
    """The deadline bounds the time that the server takes, not the time that it is down."""
    with (
        FaultServer(OK, [SICK] * 3) as server,
        closing(
            open_channel(server.endpoint, circuit_breaker=policy(open_seconds=0.6), timeout_seconds=0.3)
        ) as channel,
    ):
        open_breaker(channel)
        assert ask(channel).result == b"answer"


def test_passed_health_check_ends_the_hold_early() -> None:
    """A server that is ready again is probed long before ``open_seconds`` are over."""
    early = policy(open_seconds=30.0, health_check_interval_seconds=0.1)
    with (
        FaultServer(OK, [SICK] * 3, when=infer_requests) as server,
        closing(open_channel(server.endpoint, circuit_breaker=early)) as channel,
    ):
        open_breaker(channel)
        started = time.monotonic()
        assert ask(channel).result == b"answer"
        assert time.monotonic() - started < 2.0
        asked = [request.target for request in server.requests if request.method == "GET"]
        assert asked[:2] == ["/v2/health/ready", "/v2/models/model/ready"]


def test_health_checks_run_with_when_open_fail() -> None:
    """Where requests fail at once none is held, but the server is checked all the same."""
    early = policy(open_seconds=30.0, when_open="fail", health_check_interval_seconds=0.05)
    with (
        FaultServer(OK, [SICK] * 3, when=infer_requests) as server,
        closing(open_channel(server.endpoint, circuit_breaker=early)) as channel,
    ):
        for _ in range(3):
            assert isinstance(ask(channel).error, ServerUnavailableError)
        deadline = time.monotonic() + 5.0
        while ask(channel).error is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert ask(channel).result == b"answer"
        assert state_of(channel) is not State.OPEN


def test_failed_health_check_keeps_the_breaker_open() -> None:
    """A server that is not ready gets no requests, only further checks."""

    def not_ready(exchange: Exchange) -> None:
        (SICK if exchange.read_head().method == "POST" else faults.answered(Answer(400)))(exchange)

    early = policy(open_seconds=30.0, health_check_interval_seconds=0.1, max_wait_seconds=0.8)
    with (
        FaultServer(OK, not_ready) as server,
        closing(open_channel(server.endpoint, circuit_breaker=early)) as channel,
    ):
        open_breaker(channel)
        posts = sum(request.method == "POST" for request in server.requests)
        assert isinstance(ask(channel).error, CircuitOpenError)
        assert sum(request.method == "POST" for request in server.requests) == posts
        assert sum(request.method == "GET" for request in server.requests) >= 2
        assert state_of(channel) is State.OPEN


def test_health_check_survives_a_missing_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret that is missing while the breaker is open stops neither the reactor nor the hold."""
    monkeypatch.setattr(request_module, "HEADERS_GRACE_SECONDS", 0.5)
    works = True

    def headers() -> dict[str, str]:
        if not works:
            raise ConfigurationError("no token")
        return {}

    early = policy(open_seconds=1.5, health_check_interval_seconds=0.1)
    with (
        FaultServer(OK, [SICK] * 3) as server,
        closing(open_channel(server.endpoint, circuit_breaker=early, headers=headers)) as channel,
    ):
        open_breaker(channel)
        works = False
        # Cached heads expire after a second, and then the grace period ends: the checks need new heads.
        time.sleep(1.0)
        assert isinstance(ask(channel).error, ConfigurationError)
        works = True
        assert ask(channel).result == b"answer"


def test_rejected_elements_do_not_open_the_breaker() -> None:
    """Any number of 400s says nothing about the server's health."""
    with (
        FaultServer(OK, faults.answered(Answer(400))) as server,
        closing(open_channel(server.endpoint, circuit_breaker=policy())) as channel,
    ):
        for _ in range(10):
            ask(channel)
        assert state_of(channel) is State.CLOSED


def test_failed_probe_reopens_the_breaker() -> None:
    """A server that still fails gets one round of probes per ``open_seconds``."""
    with (
        FaultServer(OK, SICK) as server,
        closing(
            open_channel(server.endpoint, circuit_breaker=policy(when_open="fail", half_open_requests=1))
        ) as channel,
    ):
        for _ in range(3):
            ask(channel)
        time.sleep(0.35)
        asked = len(server.requests)
        assert isinstance(ask(channel).error, ServerUnavailableError)
        assert isinstance(ask(channel).error, CircuitOpenError)
        assert len(server.requests) == asked + 1


def test_endpoint_with_an_open_breaker_gets_no_requests() -> None:
    """With another endpoint available, an unhealthy one gets nothing while its breaker is open."""
    with FaultServer(OK, SICK) as unhealthy, FaultServer(OK) as healthy:
        channel = open_channel(
            [unhealthy.endpoint, healthy.endpoint],
            circuit_breaker=policy(open_seconds=30.0),
            retry=QUICK_RETRIES,
        )
        with closing(channel):
            for _ in range(20):
                assert ask(channel).result == b"answer"
            assert state_of(channel, 0) is State.OPEN and state_of(channel, 1) is State.CLOSED
            assert len(unhealthy.requests) == 3


def test_recovered_endpoint_is_used_again() -> None:
    """After ``open_seconds`` an endpoint is probed, though the others have capacity for everything."""
    with FaultServer(OK, SICK) as first, FaultServer(OK) as second:
        channel = open_channel(
            [first.endpoint, second.endpoint], circuit_breaker=policy(), retry=QUICK_RETRIES
        )
        with closing(channel):
            for _ in range(10):
                assert ask(channel).result == b"answer"
            assert state_of(channel, 0) is State.OPEN
            first.play(serve)
            time.sleep(0.35)
            before = len(first.requests)
            for _ in range(4):
                assert ask(channel).result == b"answer"
            assert state_of(channel, 0) is State.CLOSED
            assert len(first.requests) - before >= 2


def test_health_check_restores_an_endpoint_while_others_are_healthy() -> None:
    """No request waits for it, and its probe is a minute away: the next requests check it."""
    with FaultServer(OK, SICK) as first, FaultServer(OK) as second:
        channel = open_channel(
            [first.endpoint, second.endpoint],
            circuit_breaker=policy(open_seconds=60.0, health_check_interval_seconds=0.05),
            retry=QUICK_RETRIES,
        )
        with closing(channel):
            while state_of(channel, 0) is State.CLOSED:
                assert ask(channel).result == b"answer"
            first.play(serve)
            dispatcher: Dispatcher[int] = Dispatcher(channel)
            deadline = time.monotonic() + 10
            submitted = 0
            while state_of(channel, 0) is not State.CLOSED and time.monotonic() < deadline:
                dispatcher.submit(submitted, post(), read)
                submitted += 1
                dispatcher.drain()
                time.sleep(0.01)
            assert state_of(channel, 0) is State.CLOSED
            assert all(call.result == b"answer" for _, call in dispatcher.completed)
            assert len(dispatcher.completed) == submitted
            dispatcher.cancel()
            assert sockets.settles(lambda: channel.pool.statistics().active, 0) == 0


@pytest.mark.parametrize("then", ["cancel", "finish"])
def test_probe_without_a_verdict_admits_another_probe(then: str) -> None:
    """Probes whose outcome says nothing about the server do not use up the allowance."""
    finish: dict[str, Callable[[Dispatcher[None]], None]] = {
        "cancel": Dispatcher.cancel,
        "finish": Dispatcher.drain,
    }
    with (
        FaultServer(OK, [SICK] * 3) as server,
        closing(open_channel(server.endpoint, circuit_breaker=policy(half_open_requests=1))) as channel,
    ):
        open_breaker(channel)
        time.sleep(0.35)
        server.play([faults.answered(Answer(400))] if then == "finish" else [faults.silence])
        dispatcher: Dispatcher[None] = Dispatcher(channel)
        dispatcher.submit(None, post(), read)
        dispatcher.step()
        assert state_of(channel) is State.HALF_OPEN
        finish[then](dispatcher)
        assert ask(channel).result == b"answer"
        assert state_of(channel) is State.CLOSED
